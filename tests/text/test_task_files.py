import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frankenstein.errors import FrankensteinError
from frankenstein.text.options import DataOptions
from frankenstein.text.task_files import find_tasks, task_splits


def splits(place):
    data = DataOptions(tasks_path=str(place))
    return {(task, split): pairs for task, split, pairs in task_splits(data, seed=0, batch_size=2)}


def message(place):
    with pytest.raises(FrankensteinError) as caught:
        splits(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_csv(place, rows, *, task="xnli", split="dev", column="label"):
    folder = place / task
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.csv").write_text(
        f"sentence1,sentence2,{column}\n" + "".join(f"{r}\n" for r in rows), encoding="utf-8"
    )


def test_folders_are_found_by_task_and_language_and_others_left_alone(tmp_path):
    for name in ("xnli_es", "pawsx", "corpus", "xnli2"):
        (tmp_path / name).mkdir()
    assert find_tasks(tmp_path) == {"pawsx": tmp_path / "pawsx", "xnli": tmp_path / "xnli_es"}


def test_two_folders_for_one_task_are_refused(tmp_path):
    (tmp_path / "xnli").mkdir()
    (tmp_path / "xnli_es").mkdir()
    assert re.search(r"two folders for the task xnli: .*xnli and .*xnli_es", message(tmp_path))


def test_missing_folders_and_files_are_named(tmp_path):
    assert "no such folder" in message(tmp_path / "nada")
    assert "no task folder; expected <task> or <task>_<language>, tasks: inferes, pawsx, stsb, xnli" in message(
        tmp_path
    )
    (tmp_path / "xnli_es").mkdir()
    assert "xnli_es: no train, dev or test file" in message(tmp_path)


def test_every_format_is_read_and_extra_files_are_not(tmp_path):
    write_csv(tmp_path, ["Uno.,Dos.,0", "Tres.,Cuatro.,2"], split="train")
    folder = tmp_path / "xnli"
    records = [{"id": f"r{i}", "sentence1": f"a{i}", "sentence2": " b ", "label": i} for i in range(3)]
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, records)))
    pq.write_table(pa.Table.from_pylist(records), folder / "test.parquet")
    (folder / "dev_ns.parquet").write_text("nothing")
    found = splits(tmp_path)
    assert sorted(found) == [("xnli", "dev"), ("xnli", "test"), ("xnli", "train")]
    assert found["xnli", "train"].ids == ["xnli:train:1", "xnli:train:2"]
    assert found["xnli", "train"].targets.tolist() == [0, 2]
    for split in ("dev", "test"):
        pairs = found["xnli", split]
        assert (pairs.ids, pairs.first, pairs.second) == (["r0", "r1", "r2"], ["a0", "a1", "a2"], ["b"] * 3)
        assert pairs.targets.tolist() == [0, 1, 2]


def test_the_same_split_in_two_formats_is_refused(tmp_path):
    write_csv(tmp_path, ["Uno.,Dos.,0"])
    (tmp_path / "xnli" / "dev.jsonl").write_text("{}")
    assert "dev.csv and dev.jsonl hold the same split" in message(tmp_path)


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("3", "found 3; allowed: 0 entailment, 1 neutral, 2 contradiction"),
        ("-1", "found -1; allowed"),
        ("1.5", "found '1.5'; expected an integer"),
        ("entailment", "found 'entailment'; expected an integer"),
        ("", "found ''; expected an integer"),
    ],
)
def test_labels_that_the_task_has_not_are_refused_with_their_row(tmp_path, label, reason):
    write_csv(tmp_path, ["a,b,0", "a,b,1", f"a,b,{label}"])
    assert f"dev.csv: line 4: column 'label': {reason}" in message(tmp_path)


@pytest.mark.parametrize("score", ["5.1", "-0.1", "nan", "inf"])
def test_scores_out_of_range_are_refused_with_their_row(tmp_path, score):
    write_csv(tmp_path, ["a,b,0", f"a,b,{score}"], task="stsb", column="score")
    assert re.search(r"dev\.csv: line 3: column 'score': found .*; expected a number from 0 to 5", message(tmp_path))


@pytest.mark.parametrize("label", [True, None, 1.0, [1]])
def test_labels_of_another_type_are_refused(tmp_path, label):
    (tmp_path / "xnli").mkdir()
    (tmp_path / "xnli" / "dev.jsonl").write_text(json.dumps({"sentence1": "a", "sentence2": "b", "label": label}))
    assert re.search(r"line 1: column 'label': found .*; expected an integer", message(tmp_path))


def test_empty_and_null_sentences_are_refused_with_their_row(tmp_path):
    write_csv(tmp_path, ["a,b,0", "a, \x00 ,1"])
    assert "line 3: column 'sentence2' is empty; expected a sentence" in message(tmp_path)
    (tmp_path / "xnli" / "dev.csv").unlink()
    pq.write_table(
        pa.table({"sentence1": ["a", None], "sentence2": ["a", "b"], "label": [0, 1]}), tmp_path / "xnli/dev.parquet"
    )
    assert "dev.parquet: row 2: column 'sentence1' is null" in message(tmp_path)


def test_a_missing_column_names_those_that_exist(tmp_path):
    write_csv(tmp_path, ["a,b,0"], column="score")
    assert "dev.csv: no column 'label'; columns: sentence1, sentence2, score" in message(tmp_path)


def test_repeated_ids_and_files_without_rows_are_refused(tmp_path):
    write_csv(tmp_path, [])
    assert "dev.csv: no rows" in message(tmp_path)
    (tmp_path / "xnli" / "dev.csv").write_text("id,sentence1,sentence2,label\nq,a,b,0\nr,a,b,0\nq,a,b,0\n")
    assert "1 id(s) occur more than once: 'q'" in message(tmp_path)
