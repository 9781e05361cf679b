import json
import logging
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frankenstein.errors import FrankensteinError
from frankenstein.text.options import DataOptions
from frankenstein.text.sources.corpus import Reading, even_sample, read_corpus
from frankenstein.text.sources.hub import HubAccess

TEXTS = [f"Documento número {i}, con una coma y «comillas»." for i in range(50)]


def write_parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


def write_source(folder, kind):
    """The same 50 documents in two files of one kind."""
    folder.mkdir()
    for part, texts in enumerate((TEXTS[:20], TEXTS[20:])):
        file = folder / f"parte-{part}{'.txt' if kind == 'text' else '.' + kind}"
        if kind == "parquet":
            write_parquet(file, {"text": texts}, row_group_size=7)
        elif kind == "text":
            file.write_text("\n".join(texts), encoding="utf-8")
        elif kind == "jsonl":
            file.write_text("\n\n".join(json.dumps({"text": t, "n": 1}) for t in texts), encoding="utf-8")
        else:
            file.write_text("text,n\n" + "".join(f'"{t}",1\n' for t in texts), encoding="utf-8-sig")
    return folder


def read(source, path, *, most=10**6, batch=8, seed=0, **options):
    data = DataOptions(source=source, path=str(path), **options)
    return [t for rows in read_corpus(data, Reading(most, batch), seed=seed) for t in rows.strings(data.text_column)]


def message(source, path, **options):
    with pytest.raises(FrankensteinError) as caught:
        read(source, path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "text", "jsonl", "csv"])
def test_every_format_gives_the_rows_of_a_folder_in_file_order(tmp_path, kind):
    assert read(kind, write_source(tmp_path / "in", kind)) == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "text", "jsonl", "csv"])
def test_max_samples_takes_an_even_sample_over_all_files(tmp_path, kind):
    folder = write_source(tmp_path / "in", kind)
    sample = read(kind, folder, most=10)
    numbers = [TEXTS.index(t) for t in sample]
    assert [n // 5 for n in numbers] == list(range(10))
    assert sample == read(kind, folder, most=10, batch=3)
    assert sample != read(kind, folder, most=10, seed=1)


def test_an_even_sample_has_the_wanted_size_no_repeats_and_no_preference():
    hits = np.zeros(17)
    for seed in range(3000):
        rows = even_sample(17, 5, seed)
        assert len(rows) == 5
        assert (np.diff(rows) > 0).all()
        hits[rows] += 1
    assert abs(hits / 3000 - 5 / 17).max() < 0.06
    assert even_sample(4, 9, 0).tolist() == [0, 1, 2, 3]


def test_a_single_file_is_read_whatever_its_name(tmp_path):
    (tmp_path / "textos.dat").write_text("uno\ndos\n", encoding="utf-8")
    assert read("text", tmp_path / "textos.dat") == ["uno", "dos"]


def test_only_a_line_feed_ends_a_line_of_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("uno\u2028dos\x0btres\r\ncuatro".encode())
    assert read("text", tmp_path) == ["uno\u2028dos\x0btres", "cuatro"]


def test_csv_fields_may_hold_commas_quotes_line_breaks_and_a_megabyte(tmp_path):
    long = "x" * 1_000_000
    (tmp_path / "a.csv").write_text(f'n,text\n1,"uno, ""dos""\ntres"\n\n2,{long}\n', encoding="utf-8")
    assert read("csv", tmp_path) == ['uno, "dos"\ntres', long]


def test_binary_and_dictionary_columns_of_parquet_are_text_too(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": pa.array([t.encode() for t in TEXTS])})
    write_parquet(tmp_path / "b.parquet", {"text": pa.array(TEXTS).dictionary_encode()})
    write_parquet(tmp_path / "c.parquet", {"text": pa.array(TEXTS, pa.large_string())})
    assert read("parquet", tmp_path) == TEXTS * 3


def test_a_missing_path_and_an_empty_folder_are_named(tmp_path):
    assert re.search(r"data\.path: .*nada: no such file or folder", message("parquet", tmp_path / "nada"))
    assert re.search(r"holds no \.parquet file", message("parquet", tmp_path))


def test_a_truncated_parquet_and_a_file_that_is_none_are_told_apart(tmp_path):
    whole = write_parquet(tmp_path / "a.parquet", {"text": TEXTS}).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    assert re.search(r"a\.parquet: truncated or damaged", message("parquet", tmp_path))
    (tmp_path / "a.parquet").write_text("hola")
    assert re.search(r"a\.parquet: not a parquet file \(starts with b'hola'\)", message("parquet", tmp_path))


def test_damaged_parquet_pages_are_named(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"text": TEXTS}, use_dictionary=False, write_statistics=False)
    data = bytearray(file.read_bytes())
    data[4:40] = b"\xff" * 36
    file.write_bytes(data)
    assert re.search(r"a\.parquet: damaged after row 0", message("parquet", tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_wrong_column_name_lists_the_columns_and_the_nearest(tmp_path, kind):
    found = message(kind, write_source(tmp_path / "in", kind), text_column="texto")
    assert re.search(r"no column 'texto'; columns: text.*did you mean 'text'\?", found)


def test_a_column_of_another_type_is_named_with_its_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": [5, 6]})
    assert re.search(r"a\.parquet: row 1: column 'text' holds int '5'; expected text", message("parquet", tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ["y"]}\n')
    assert re.search(r"a\.jsonl: line 2: column 'text' holds list", message("jsonl", tmp_path))


def test_a_null_is_named_with_its_row_even_in_a_later_batch(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": [*TEXTS[:30], None, "fin"]})
    assert re.search(r"a\.parquet: row 31: column 'text' is null", message("parquet", tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    assert re.search(r"a\.jsonl: line 1: column 'text' is null", message("jsonl", tmp_path))


@pytest.mark.parametrize(("kind", "name"), [("text", "a.txt"), ("csv", "a.csv"), ("jsonl", "a.jsonl")])
def test_latin_1_bytes_are_named_with_line_and_byte_offset(tmp_path, kind, name):
    lines = {"text": "hola\nniño\n", "csv": "text\nniño\n", "jsonl": '{"text": "hola"}\n{"text": "niño"}\n'}[kind]
    data = lines.encode("latin-1")
    (tmp_path / name).write_bytes(data)
    assert re.search(
        rf"{name}: line 2: byte 0xf1 at byte offset {data.index(0xF1)} is not UTF-8", message(kind, tmp_path)
    )


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()])
def test_latin_1_bytes_in_parquet_are_named_with_their_row(tmp_path, kind):
    column = pa.array([b"hola", "niño".encode("latin-1")]).view(kind) if kind == pa.string() else [b"hola", b"ni\xf1o"]
    write_parquet(tmp_path / "a.parquet", {"text": column})
    assert re.search(r"row 2: column 'text': byte 0xf1 at byte offset 2 is not UTF-8", message("parquet", tmp_path))


def test_lone_surrogates_of_json_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "bien"}\n{"text": "mal \\ud83d"}\n')
    assert re.search(
        r"line 2: column 'text' holds the lone surrogate U\+D83D at character 4", message("jsonl", tmp_path)
    )


@pytest.mark.parametrize(
    ("line", "reason"), [("{", "not valid JSON"), ("[1]", "found a JSON list"), ("[" * 100_000, "not valid JSON")]
)
def test_bad_json_is_named_with_its_line(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
    assert re.search(rf"a\.jsonl: line 2: {reason}", message("jsonl", tmp_path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("id,text\n1,a,b\n", "line 2: 3 fields, the header has 2"),
        ('text\n"abierta\n', "line 2: not valid CSV"),
        ("", "empty file"),
    ],
)
def test_bad_csv_is_named_with_its_line(tmp_path, content, reason):
    (tmp_path / "a.csv").write_text(content)
    assert reason in message("csv", tmp_path)


def test_local_parquet_is_preferred_to_the_hub_only_when_it_has_data(tmp_path, monkeypatch):
    data = DataOptions(source="hub", hub_name="org/nombre")
    write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    hub = HubAccess(local_parquet_dir=str(tmp_path))
    rows = list(read_corpus(data, Reading(10**6, 8, hub=hub), seed=0))
    assert sum(map(len, rows)) == 50
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for access in (
        HubAccess(local_parquet_dir=str(tmp_path), prefer_local_cache=False),
        HubAccess(local_parquet_dir=str(tmp_path / "x")),
    ):
        with pytest.raises(FrankensteinError, match="needs the package datasets"):
            list(read_corpus(data, Reading(10**6, 8, hub=access), seed=0))


def test_whole_files_and_batches_give_the_same_rows(tmp_path):
    folder = write_source(tmp_path / "in", "parquet")
    data = DataOptions(source="parquet", path=str(folder))
    whole = list(read_corpus(data, Reading(10**6, 8, whole_files=True), seed=0))
    assert [len(rows) for rows in whole] == [20, 30]
    assert [t for rows in whole for t in rows.strings("text")] == TEXTS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_dataset_is_streamed_through_the_hub_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = write_source(tmp_path / "in", "jsonl")
    hub = HubAccess(cache_dir=str(tmp_path / "cache"))
    data = DataOptions(source="hub", hub_name=str(folder))
    rows = list(read_corpus(data, Reading(30, 8, hub=hub), seed=0))
    assert [t for batch in rows for t in batch.strings("text")] == TEXTS[:30]
    assert rows[-1].numbers[-1] == 30
    logging.disable(logging.CRITICAL)
    try:
        for wrong in ({"text_column": "texto"}, {"hub_name": str(tmp_path / "ninguno")}):
            with pytest.raises(FrankensteinError, match="hub/"):
                list(
                    read_corpus(
                        DataOptions(**{"source": "hub", "hub_name": str(folder), **wrong}),
                        Reading(30, 8, hub=hub),
                        seed=0,
                    )
                )
    finally:
        logging.disable(logging.NOTSET)
