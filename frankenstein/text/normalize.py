"""The one text normalisation of the pipeline: Unicode composition and control characters. Case and accents stay.

Compatibility folding (NFKC) is not used: it would turn 1.º into 1.o and x² into x2.
"""

import re
import unicodedata
from collections.abc import Iterator

# All control characters but the line feed; the byte order mark; U+2581, which SentencePiece uses for the space.
_UNWANTED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ufeff\u2581]")


def clean(text: str) -> str:
    """NFC; carriage returns become line feeds, other control characters and U+2581 a space; trimmed."""
    text = unicodedata.normalize("NFC", text)
    if _UNWANTED.search(text):
        text = _UNWANTED.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.strip()


def one_line(text: str) -> str:
    """`clean`, with every run of white space as one space: what the tokenizer sees."""
    return " ".join(clean(text).split())


def clean_pieces(text: str, max_chars: int) -> Iterator[str]:
    """`clean` text in pieces of at most `max_chars` characters.

    Composition needs quadratic time in the worst case (long runs of combining marks), so a long text is split before it
    is cleaned, and again where composition made a piece longer.
    """
    for piece in split_long(text, max_chars):
        yield from split_long(clean(piece), max_chars)


def split_long(text: str, max_chars: int) -> Iterator[str]:
    """The text in pieces of at most `max_chars` characters, split at the last white space that fits, else hard.

    White space at a split is dropped; a text that fits comes back as it is.
    """
    start = 0
    while len(text) - start > max_chars:
        window = text[start : start + max_chars + 1]
        cut = len(window.rstrip()) if window[-1].isspace() else _last_space(window)
        if cut > 0:
            yield text[start : start + cut]
            start += cut + 1
        else:
            yield text[start : start + max_chars]
            start += max_chars
    yield text[start:]


def _last_space(window: str) -> int:
    """Position of the last white space character, or 0."""
    return next((i for i in range(len(window) - 1, 0, -1) if window[i].isspace()), 0)
