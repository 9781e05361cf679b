"""The exported embeddings: what stands in the files, and that the files repeat themselves bit for bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from frankenstein.artifact import MANIFEST, digests, open_folder, sha256
from frankenstein.errors import FrankensteinError
from frankenstein.sentence import export as module
from frankenstein.sentence.encoder import SentenceEncoder
from frankenstein.sentence.export import export_embeddings
from frankenstein.sentence.options import ExportOptions
from tests.sentence.world import SENTENCES, World

OPTIONS = ExportOptions(model="full", rows=120, batch_size=16)


@pytest.fixture
def sbert(world: World, tmp_path: Path) -> Path:
    folder = tmp_path / "sbert"
    folder.mkdir()
    (folder / "full").symlink_to(world.full, target_is_directory=True)
    (folder / "ternary").symlink_to(world.quantized / "packed", target_is_directory=True)
    return folder


def export(sbert: Path, world: World, out: Path, options: ExportOptions = OPTIONS) -> Path:
    export_embeddings(sbert=sbert, cache=world.cache, options=options, threads=1, out=out)
    return out


@pytest.mark.parametrize("name", ["full", "ternary"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_both_files_hold_the_vectors_of_the_first_rows_across_shards(
    sbert: Path, world: World, name: str, precision: str
) -> None:
    options = replace(OPTIONS, model=name, precision=precision)
    out = export(sbert, world, sbert.parent / "out", options)
    expected = SentenceEncoder.load(sbert / name).encode(SENTENCES[:120], precision=precision)
    array, table = np.load(out / "embeddings.npy"), pq.read_table(out / "embeddings.parquet")
    assert array.dtype == expected.dtype == np.dtype(precision)
    np.testing.assert_allclose(array.astype(float), expected.astype(float), atol=1 if precision == "int8" else 2e-3)
    stored = np.stack(table.column("embedding").to_numpy())
    assert np.array_equal(stored, array) and stored.dtype == array.dtype
    assert table.column("text").to_pylist() == SENTENCES[:120]
    assert table.column("id").to_pylist() == [f"s0-{k}" for k in range(90)] + [f"s1-{k}" for k in range(30)]


def test_the_config_says_how_the_vectors_were_made(sbert: Path, world: World) -> None:
    out = export(sbert, world, sbert.parent / "out", replace(OPTIONS, precision="int8"))
    assert open_folder(out, "embeddings") == {
        "kind": "embeddings",
        "model_kind": "encoder",
        "dimension": 32,
        "rows": 120,
        "precision": "int8",
        "int8_scale": 127,
        "pooling": "mean",
        "normalize": True,
        "max_length": 32,
        "source": {
            "model": "full",
            "model_sha256": sha256(world.full / MANIFEST),
            "corpus_sha256": sha256(world.cache / MANIFEST),
        },
    }


def test_the_bytes_do_not_depend_on_the_run(sbert: Path, world: World) -> None:
    first, second = (export(sbert, world, sbert.parent / name) for name in ("one", "two"))
    assert digests(first) == digests(second)


def test_rows_beyond_one_block_are_written_in_order(sbert: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.load(export(sbert, world, sbert.parent / "whole") / "embeddings.npy")
    monkeypatch.setattr(module, "_BLOCK", 33)
    out = export(sbert, world, sbert.parent / "blocks")
    assert pq.ParquetFile(out / "embeddings.parquet").num_row_groups == 4
    np.testing.assert_allclose(np.load(out / "embeddings.npy"), whole, atol=1e-5)


def test_a_smaller_corpus_is_exported_whole(sbert: Path, world: World) -> None:
    out = export(sbert, world, sbert.parent / "out", replace(OPTIONS, rows=10_000))
    assert len(np.load(out / "embeddings.npy")) == len(SENTENCES) == open_folder(out)["rows"]


def test_a_model_that_was_not_made_is_refused_and_nothing_is_written(sbert: Path, world: World) -> None:
    (sbert / "ternary").unlink()
    with pytest.raises(FrankensteinError, match=r"export\.model is 'ternary', but there is only: full"):
        export(sbert, world, sbert.parent / "out", ExportOptions())
    assert not (sbert.parent / "out").exists()
