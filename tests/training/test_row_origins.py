"""Rows of a tokens artifact are traced to shard, documents and text."""

from pathlib import Path

import numpy as np
import pytest

from frankenstein.text.tokenizer import Tokenizer
from frankenstein.training.row_origins import RowOrigins
from tests.training.tiny_language import LENGTH, write_language


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, list[str], Path]:
    folder = tmp_path_factory.mktemp("language")
    return *write_language(folder), folder / "tokens"


def test_documents_of_a_row_are_counted_by_what_ends_before_and_in_it(
    language: tuple[Tokenizer, list[str], Path],
) -> None:
    words, documents, tokens = language
    owner = [d for d, text in enumerate(documents) for _ in range(len(words.encode(text)) + 1)]
    bodies = [owner[i : i + LENGTH - 1] for i in range(0, len(owner), LENGTH - 1)]
    assert len(bodies) > 10 and len(bodies[-1]) < LENGTH - 1  # the last row is padded
    found = RowOrigins(tokens, "train", words).describe(np.arange(len(bodies)))
    assert [row["documents"] for row in found] == [[body[0], body[-1]] for body in bodies]
    places = [(f"train-{i // 2:05d}.bin", i % 2) for i in range(len(bodies))]
    assert [(row["file"], row["row_in_file"]) for row in found] == places
    text = "".join(row["text"] for row in found)
    assert text.replace(" ", "") == "".join(documents).replace(" ", "")


def test_rows_come_back_in_the_order_they_were_asked_for(language: tuple[Tokenizer, list[str], Path]) -> None:
    words, _, tokens = language
    origins = RowOrigins(tokens, "train", words)
    assert [row["row"] for row in origins.describe(np.array([3, 0, 3, 1]))] == [3, 0, 3, 1]
    assert origins.describe(np.array([], np.int64)) == []
