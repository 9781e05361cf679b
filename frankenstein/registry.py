"""Name -> class registries. A new entry is one file in the registry's package; nothing else changes."""

import difflib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar

from frankenstein.errors import FrankensteinError, NotBuiltYetError

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, else the empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry(Mapping[str, T], Generic[T]):
    """Mapping of names to classes, filled by the modules of one package at first use.

    Args:
        kind: what an entry is called in messages, e.g. "mixer".
        package: dotted name of the package whose modules register themselves on import.
        announced: names that the contract has and this version does not; asking for one raises NotBuiltYetError.
    """

    def __init__(self, kind: str, package: str, announced: tuple[str, ...] = ()) -> None:
        self.kind, self.package, self._announced = kind, package, announced
        self._entries: dict[str, T] = {}
        self._loaded = False

    @property
    def announced(self) -> tuple[str, ...]:
        """Names that are part of the contract and not built yet."""
        self._load()
        return tuple(n for n in self._announced if n not in self._entries)

    def register(self, *names: str) -> Callable[[T], T]:
        """Class decorator: make the class known under these names (the first one is its own)."""

        def add(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise FrankensteinError(f"{self.kind} {name!r} is registered twice")
                self._entries[name] = entry
            return entry

        return add

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = import_module(self.package)
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            import_module(f"{self.package}.{module}")

    def __getitem__(self, name: str) -> T:
        self._load()
        if name in self._entries:
            return self._entries[name]
        if name in self._announced:
            raise NotBuiltYetError(f"{self.kind} {name!r} is not built yet; built: {', '.join(self)}")
        known = sorted(self._entries)
        raise UnknownNameError(f"unknown {self.kind} {name!r}; known: {', '.join(known)}{nearest(name, known)}")

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)


class UnknownNameError(FrankensteinError, KeyError):
    """A registry was asked for a name it does not know."""

    def __str__(self) -> str:
        return str(self.args[0])
