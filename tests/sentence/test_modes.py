"""Similarity and embeddings of a user's files, and what is said about files that are wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frankenstein.artifact import open_folder
from frankenstein.errors import FrankensteinError, NotBuiltYetError
from frankenstein.registry import UnknownNameError
from frankenstein.sentence.encoder import SentenceEncoder
from frankenstein.sentence.files import read_scored_pairs, read_sentence_pairs, read_texts
from frankenstein.sentence.modes import check_mode, encode_file, similarity
from tests.sentence.world import World

TEXTS = ["La gata mira el libro.", 'Un niño dijo: "sí, quiero".', "El perro come."]


def write(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".txt":
        path.write_text("\n".join([texts[0], "", *texts[1:]]) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t, "id": f"n{i}"}) + "\n" for i, t in enumerate(texts)))
    elif path.suffix == ".csv":
        rows = ['"' + t.replace('"', '""') + '"' for t in texts]
        path.write_text("text,other\n" + "".join(f"{row},1\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": texts, "id": [7, 8, 9]}), path)
    return path


@pytest.mark.parametrize(
    ("suffix", "ids"),
    [
        (".txt", ["1", "3", "4"]),
        (".jsonl", ["n0", "n1", "n2"]),
        (".csv", ["2", "3", "4"]),
        (".parquet", ["7", "8", "9"]),
    ],
)
def test_each_file_type_gives_its_sentences_and_ids(tmp_path: Path, suffix: str, ids: list[str]) -> None:
    assert list(read_texts(write(tmp_path / f"file{suffix}", TEXTS))) == list(zip(ids, TEXTS, strict=True))


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_a_file_of_sentences_becomes_an_embeddings_artifact(world: World, tmp_path: Path, suffix: str) -> None:
    model = SentenceEncoder.load(world.full)
    path = write(tmp_path / f"file{suffix}", TEXTS)
    assert encode_file(model, path, tmp_path / "out", "float16") == 3
    np.testing.assert_allclose(np.load(tmp_path / "out" / "embeddings.npy"), model.encode(TEXTS), atol=1e-3)
    config = open_folder(tmp_path / "out", "embeddings")
    assert (config["rows"], config["precision"], config["int8_scale"]) == (3, "float16", None)


def test_similarity_scores_pairs_of_sentences(world: World) -> None:
    model = SentenceEncoder.load(world.full)
    scores = similarity(model, [(TEXTS[0], TEXTS[0]), (TEXTS[0], TEXTS[1])])
    a, b = model.encode(TEXTS[:2])
    np.testing.assert_allclose(scores, [1.0, a @ b], atol=1e-6)
    assert similarity(model, []).shape == (0,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.doc", "x", "found the file type '.doc'; expected .csv, .jsonl, .parquet, .txt"),
        (
            "b.csv",
            "texto\nhola\n",
            "no column 'text'; columns: texto; did you mean 'texto'",
        ),
        ("c.jsonl", '{"text": "hola"}\n{"text": 3}\n', "line 2: column 'text' holds int '3'; expected text"),
        ("d.jsonl", '{"text": "hola"\n', "line 1: not valid JSON"),
        ("e.parquet", "not parquet", "not a parquet file"),
        ("f.txt", "\n \n", "has no sentences"),
        ("g.txt", b"ma\xf1ana\n", "is not UTF-8"),
    ],
)
def test_a_wrong_file_is_refused_in_words_before_anything_is_written(
    world: World, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FrankensteinError, match=message):
        encode_file(SentenceEncoder.load(world.full), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_a_wrong_precision_are_refused(world: World, tmp_path: Path) -> None:
    model = SentenceEncoder.load(world.full)
    with pytest.raises(FrankensteinError, match=r"nothing\.txt: no such file"):
        encode_file(model, tmp_path / "nothing.txt", tmp_path / "out")
    with pytest.raises(FrankensteinError, match="unknown precision 'int4'; known: float32, float16, int8"):
        encode_file(model, write(tmp_path / "a.txt", TEXTS), tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_pairs_come_from_files_with_or_without_scores(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\nuno,dos,0.5\ntres,cuatro,-1\n")
    pairs = read_scored_pairs(path)
    assert (pairs.first, pairs.second, pairs.targets.tolist()) == (["uno", "tres"], ["dos", "cuatro"], [0.5, -1.0])
    assert read_sentence_pairs(path) == [("uno", "dos"), ("tres", "cuatro")]


@pytest.mark.parametrize("score", ["4.5", "nan", "x", ""])
def test_a_score_that_is_no_cosine_is_named_with_its_row(tmp_path: Path, score: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f"sentence1,sentence2,score\nuno,dos,0.5\ntres,cuatro,{score}\n")
    with pytest.raises(
        FrankensteinError, match=f"line 3: column 'score': found '{score}'; expected a number from -1 to 1"
    ):
        read_scored_pairs(path)


def test_a_pair_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\n")
    with pytest.raises(FrankensteinError, match="has no pairs"):
        read_scored_pairs(path)


def test_modes_are_built_announced_or_unknown() -> None:
    for name in ("similarity", "encode"):
        check_mode(name)
    for name in ("search", "cluster"):
        with pytest.raises(NotBuiltYetError, match=f"mode {name!r} is not built yet; built: similarity, encode"):
            check_mode(name)
    with pytest.raises(
        UnknownNameError, match="unknown mode 'similarty'; known: similarity, encode; did you mean 'similarity'"
    ):
        check_mode("similarty")
