"""The errors a user can cause; front doors print their text without a traceback and exit with 2."""


class FrankensteinError(ValueError):
    """Something the user gave (config, data, checkpoint, artifact, command line) is wrong; the text says what."""


class NotBuiltYetError(FrankensteinError):
    """A feature that the configuration contract names, but that this version does not have."""
