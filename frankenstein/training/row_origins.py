"""Where packed rows come from: shard, documents and text."""

from pathlib import Path
from typing import Any

import numpy as np

from frankenstein.artifact import open_folder
from frankenstein.text.tokenizer import Tokenizer


class RowOrigins:
    """Looks rows of one split up in a `tokens` artifact, which stays closed until then.

    The artifact keeps no ids of documents; a document's number in the split, in the order of the corpus cache, follows
    from the [SEP] tokens before it. So a lookup reads the split up to the rows that are asked for.
    Args:
        tokens: the artifact.
        split: train or valid.
        tokenizer: the one that made it.
    """

    def __init__(self, tokens: Path, split: str, tokenizer: Tokenizer) -> None:
        self.tokens, self.split, self.tokenizer = Path(tokens), split, tokenizer

    def describe(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """For each row: its number, file and row_in_file, the numbers of its first and last document, its text.

        Args:
            rows: (n,) numbers of rows of the split, in any order.
        """
        config = open_folder(self.tokens, "tokens")
        dtype = np.dtype(config["dtype"]).newbyteorder("<")
        found: dict[int, dict[str, Any]] = {}
        first_row = documents = 0
        for shard in config["splits"][self.split]["shards"]:
            if first_row > rows.max(initial=-1):
                break
            shape = (shard["rows"], config["max_length"])
            ids = np.memmap(self.tokens / shard["file"], dtype, "r", shape=shape)
            ends = (ids == self.tokenizer.sep_id).sum(1)
            before = documents + np.cumsum(ends) - ends
            for row in {int(r) for r in rows if first_row <= r < first_row + shape[0]}:
                within = row - first_row
                numbers = self._documents(ids[within], int(before[within]))
                text = self.tokenizer.decode([int(i) for i in ids[within]])
                place = {"row": row, "file": shard["file"], "row_in_file": within}
                found[row] = {**place, "documents": numbers, "text": text}
            first_row, documents = first_row + shape[0], documents + int(ends.sum())
        return [found[int(row)] for row in rows]

    def _documents(self, ids: np.ndarray, first: int) -> list[int]:
        """[first, last] number of the documents that a row has tokens of."""
        real = ids[ids != self.tokenizer.pad_id]
        ends = real == self.tokenizer.sep_id
        return [first, first + int(ends.sum()) - int(ends[-1])]
