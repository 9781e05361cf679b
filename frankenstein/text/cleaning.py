"""From raw rows to the documents of the cache: normalised, bounded in length, without duplicates."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from frankenstein.errors import FrankensteinError
from frankenstein.text.normalize import clean_pieces
from frankenstein.text.options import DataOptions
from frankenstein.text.sources.rows import Rows

REASONS = ("empty", "too_short", "duplicate")


class Cleaner:
    """Turns batches of raw rows into (id, text, source), counting what is refused.

    Digests of 16 bytes of every kept text (and of every given id) are held: about 100 bytes a row.

    Fields:
        documents: raw rows seen. split: those that were too long for one row. rows, chars: what came out.
        rejected: number of rows by reason.
    """

    def __init__(self, data: DataOptions) -> None:
        self._data = data
        self._texts: set[bytes] = set()
        self._ids: set[bytes] = set()
        self.documents = self.split = self.rows = self.chars = 0
        self.rejected = dict.fromkeys(REASONS, 0)

    def documents_of(self, rows: Rows) -> Iterator[tuple[str, str, str]]:
        """(id, text, source) of every usable piece. A row without a given id is called `source:number`; later pieces
        of a split row add `#1`, `#2`, ...

        Raises:
            FrankensteinError: for text that is not UTF-8, a null, or an id that occurs twice.
        """
        source = Path(rows.file).stem
        texts = rows.strings(self._data.text_column)
        if self._data.id_column is None:
            ids = [f"{source}:{number}" for number in rows.numbers]
        else:
            ids = rows.strings(self._data.id_column)
            self._refuse_repeated(rows, ids)
        for id, text in zip(ids, texts, strict=True):
            self.documents += 1
            pieces = list(clean_pieces(text, self._data.max_chars))
            self.split += len(pieces) > 1
            for k, piece in enumerate(self._usable(pieces)):
                yield f"{id}#{k}" if k else id, piece, source

    def _usable(self, pieces: list[str]) -> Iterator[str]:
        for piece in pieces:
            reason = self._fault(piece)
            if reason is None:
                self.rows += 1
                self.chars += len(piece)
                yield piece
            else:
                self.rejected[reason] += 1

    def _fault(self, text: str) -> str | None:
        if not text:
            return "empty"
        if len(text) < self._data.min_chars:
            return "too_short"
        digest = _digest(text)
        if digest in self._texts:
            return "duplicate"
        self._texts.add(digest)
        return None

    def _refuse_repeated(self, rows: Rows, ids: list[str]) -> None:
        repeated = []
        for i, id in enumerate(ids):
            digest = _digest(id)
            if digest in self._ids:
                repeated.append(f"{id!r} ({rows.unit} {rows.numbers[i]})")
            self._ids.add(digest)
        if repeated:
            more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
            raise FrankensteinError(
                f"{rows.file}: column {self._data.id_column!r}: ids occur twice: {', '.join(repeated[:5])}{more}; "
                "expected unique ids (data.id_column: null numbers the rows)"
            )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
