import json
import re

import pyarrow.parquet as pq
import pytest

from frankenstein.artifact import open_folder
from frankenstein.errors import FrankensteinError
from frankenstein.text.cache import cache_parquet
from frankenstein.text.options import DataOptions
from frankenstein.text.pairs import read_pairs

PAIRS = "id,sentence1,sentence2,score\na,Uno dos tres.,Cuatro cinco seis.,2.5\nb,Siete ocho nueve.,Siete y ocho.,0\n"


@pytest.fixture
def place(tmp_path):
    """A folder with one small graded task and an empty place for corpus files."""
    (tmp_path / "tasks" / "stsb_es").mkdir(parents=True)
    (tmp_path / "tasks" / "stsb_es" / "test.csv").write_text(PAIRS, encoding="utf-8")
    return tmp_path


def write_lines(place, lines, name="corpus.txt"):
    (place / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def build(place, *, source="text", out="cache", **options):
    reading = {k: options.pop(k) for k in ("max_samples", "dataset_batch_size", "stream_local_parquet") if k in options}
    data = DataOptions(source=source, path=str(place), tasks_path=str(place / "tasks"), **options)
    return cache_parquet(data, seed=0, out=place / out, **reading)


def rows_of(cache):
    table = [pq.read_table(cache / name) for name in open_folder(cache, "corpus_cache")["shards"]]
    return [tuple(row.values()) for part in table for row in part.to_pylist()]


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_rows_are_normalised_counted_and_refused_by_reason(place):
    write_lines(place, ["  Can\u0303a\x00 ", "", "Caña", "sí", "una frase de cinco palabras", "   "])
    counts = build(place, min_chars=3)
    assert counts["rejected"] == {"empty": 2, "too_short": 1, "duplicate": 1}
    assert (counts["rows"], counts["documents"], counts["chars"], counts["words"]) == (2, 6, 31, 6)
    assert rows_of(place / "cache") == [
        ("corpus:1", "Caña", "corpus"),
        ("corpus:5", "una frase de cinco palabras", "corpus"),
    ]
    assert open_folder(place / "cache", "corpus_cache")["rows"] == 2


def test_a_megabyte_line_is_split_and_loses_no_word(place):
    words = [f"palabra{i}" for i in range(90_000)]
    write_lines(place, [" ".join(words), "x" * 1_000_000])
    counts = build(place)
    rows = rows_of(place / "cache")
    assert counts["split_documents"] == 2
    assert " ".join(text for id, text, _ in rows if id.partition("#")[0] == "corpus:1").split() == words
    assert [len(text) for id, text, _ in rows if id.partition("#")[0] == "corpus:2"] == [20_000]
    assert counts["rejected"]["duplicate"] == 49  # the pieces of one repeated letter are equal
    assert max(len(text) for _, text, _ in rows) <= 20_000
    assert rows[1][0] == "corpus:1#1"


def test_shards_have_the_wanted_rows_and_bytes_do_not_depend_on_the_batches(place):
    write_lines(place, [f"línea número {i}" for i in range(2500)])
    build(place, rows_per_shard=1100, dataset_batch_size=7)
    assert [pq.read_metadata(f).num_rows for f in sorted((place / "cache").glob("*.parquet"))] == [1100, 1100, 300]
    first = tree(place / "cache")
    build(place, rows_per_shard=1100, dataset_batch_size=10_000)
    assert tree(place / "cache") == first


def test_given_ids_are_kept_and_repeated_ones_named(place):
    (place / "c.csv").write_text("id,text\na,uno\nb,dos\na,tres\nb,cuatro\n", encoding="utf-8")
    with pytest.raises(
        FrankensteinError, match=r"c\.csv: column 'id': ids occur twice: 'a' \(line 4\), 'b' \(line 5\)"
    ):
        build(place, source="csv", id_column="id")
    (place / "c.csv").write_text("id,text\na,uno\nb,dos\n", encoding="utf-8")
    build(place, source="csv", id_column="id")
    assert rows_of(place / "cache") == [("a", "uno", "c"), ("b", "dos", "c")]


def test_a_failed_run_leaves_the_earlier_cache_and_nothing_else(place):
    write_lines(place, ["una línea"])
    build(place)
    before = tree(place)
    (place / "z.txt").write_bytes(b"ni\xf1o\n")
    with pytest.raises(FrankensteinError, match="not UTF-8"):
        build(place)
    (place / "z.txt").unlink()
    assert tree(place) == before
    assert sorted(p.name for p in place.iterdir()) == ["cache", "corpus.txt", "tasks"]


def test_a_corpus_without_usable_text_says_why(place):
    write_lines(place, ["", " ", "a", "b"])
    with pytest.raises(FrankensteinError, match=r"no usable text in 4 rows \(2 empty, 2 too short, 0 duplicate\)"):
        build(place, min_chars=2)
    assert not (place / "cache").exists()


def test_pairs_come_back_as_they_were_given(place):
    write_lines(place, ["una línea"])
    assert build(place)["tasks"] == {"stsb": {"test": 2}}
    pairs = read_pairs(place / "cache", "stsb", "test")
    assert (pairs.ids, pairs.first, pairs.second) == (
        ["a", "b"],
        ["Uno dos tres.", "Siete ocho nueve."],
        ["Cuatro cinco seis.", "Siete y ocho."],
    )
    assert pairs.targets.tolist() == [2.5, 0.0]
    assert read_pairs(place / "cache", "stsb", "train") is None


def test_seen_test_sentences_and_pairs_are_counted(place):
    (place / "tasks" / "stsb_es" / "dev.csv").write_text(
        "sentence1,sentence2,score\nsiete  OCHO nueve.,Siete y ocho.,1\n", encoding="utf-8"
    )
    write_lines(place, ["Antes. CUATRO\u00a0cinco seis. Después.", "uno dos", "tres.", "siete y ocho sin punto"])
    overlap = {"test_pairs_in_train": 0, "test_pairs_in_dev": 1, "test_sentences": 4, "test_sentences_in_corpus": 1}
    assert build(place)["overlap"] == {"stsb": overlap}


def test_max_samples_limits_the_documents(place):
    write_lines(place, [f"línea {i}" for i in range(100)])
    assert build(place, max_samples=7)["documents"] == 7


def test_the_default_tasks_path_stands_for_the_generated_pairs(tmp_path):
    data = DataOptions(sample_sentences=200, sample_pairs=60, sample_eval_pairs=60)
    counts = cache_parquet(data, seed=3, out=tmp_path / "cache")
    sizes = {"train": 60, "dev": 60, "test": 60}
    assert counts["tasks"] == {"pawsx": sizes, "stsb": sizes, "xnli": sizes}
    assert counts["documents"] == 200
    first = tree(tmp_path / "cache")
    cache_parquet(data, seed=3, out=tmp_path / "cache")
    assert tree(tmp_path / "cache") == first
    assert set(read_pairs(tmp_path / "cache", "xnli", "test").targets) == {0, 1, 2}
    assert re.fullmatch(r"sample:\d+", rows_of(tmp_path / "cache")[0][0])


def test_the_example_files_hold_the_same_documents_in_every_format(tmp_path, request):
    examples = request.config.rootpath / "data" / "sample"
    texts = []
    for source in ("text", "jsonl", "csv"):
        data = DataOptions(source=source, path=str(examples), tasks_path=str(examples / "tasks"))
        counts = cache_parquet(data, seed=0, out=tmp_path / source)
        assert counts["tasks"] == {"stsb": {"dev": 12, "test": 12, "train": 12}}
        texts.append([text for _, text, _ in rows_of(tmp_path / source)])
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 32
    assert sum(p.stat().st_size for p in examples.rglob("*") if p.is_file()) < 100_000


def test_counts_hold_no_paths_or_times(place):
    write_lines(place, ["una línea"])
    assert str(place) not in json.dumps(build(place))
    assert str(place) not in (place / "cache" / "config.json").read_text()
