import numpy as np
import pytest

from frankenstein.artifact import new_folder, open_folder
from frankenstein.errors import FrankensteinError
from frankenstein.text.options import TokenizerOptions
from frankenstein.text.parquet_folder import CorpusWriter
from frankenstein.text.shards import RowWriter, TokenRows, tokenize_corpus
from frankenstein.text.tokenizer import Tokenizer

WORDS = [f"{stem}{end}" for stem in ("cas", "perr", "lun", "plaz", "sombr", "niñ") for end in ("a", "o", "as")]


def documents(n):
    rng = np.random.default_rng(0)
    return [(f"d{i}", " ".join(rng.choice(WORDS, rng.integers(3, 40)))) for i in range(n)]


def write_cache(folder, texts):
    with new_folder(folder, "corpus_cache") as temporary:
        writer = CorpusWriter(temporary, 1500)
        for id, text in texts:
            writer.add(id, text, "prueba")
        writer.close()
        (temporary / "config.json").write_text('{"shards": ["' + '", "'.join(writer.shards) + '"]}')
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer and a cache of 3000 documents in two shards."""
    place = tmp_path_factory.mktemp("shards")
    texts = documents(3000)
    tokenizer = Tokenizer.train(
        (t for _, t in texts), place / "tokenizer", options=TokenizerOptions(model_type="bpe"), vocab_size=330, seed=0
    )
    return tokenizer, write_cache(place / "cache", texts), dict(texts)


def unpack(rows, tokenizer):
    """The documents of packed rows, and the number of padding places."""
    assert (rows[:, 0] == tokenizer.cls_id).all()
    stream = rows[:, 1:].ravel()
    real = stream[stream != tokenizer.pad_id]
    assert real[-1] == tokenizer.sep_id
    parts = np.split(real, np.flatnonzero(real == tokenizer.sep_id) + 1)[:-1]
    return [tokenizer.decode(part[:-1].tolist()) for part in parts], len(stream) - len(real)


def test_rows_hold_every_document_once_and_the_splits_share_none(world, tmp_path):
    tokenizer, cache, texts = world
    report = tokenize_corpus(cache, tokenizer, max_length=64, seed=0, out=tmp_path / "t", validation_fraction=0.1)
    found = {}
    for split in ("train", "valid"):
        rows = TokenRows.open(tmp_path / "t", split)
        assert rows.num_rows == report["rows"][split]
        found[split], padding = unpack(rows.take(np.arange(rows.num_rows)), tokenizer)
        assert padding < 63  # only the last row has any
    assert sorted(found["train"] + found["valid"]) == sorted(texts.values())
    assert abs(len(found["valid"]) / 3000 - 0.1) < 0.03
    assert report["packing_efficiency"] >= 0.98


def test_counts_are_those_of_the_texts(world, tmp_path):
    tokenizer, cache, texts = world
    report = tokenize_corpus(cache, tokenizer, max_length=64, seed=0, out=tmp_path / "t")
    tokens = sum(map(len, tokenizer.encode_batch(list(texts.values()))))
    assert report["tokens"] == tokens
    assert report["chars_per_token"] == pytest.approx(sum(map(len, texts.values())) / tokens, abs=1e-6)
    assert report["rows"] == {"train": -(-(tokens + 3000) // 63), "valid": 0}
    assert TokenRows.open(tmp_path / "t", "valid").num_rows == 0
    assert (report["unk_rate"], report["byte_rate"]) == (0, 0)


def test_the_bytes_do_not_depend_on_the_number_of_processes(world, tmp_path):
    tokenizer, cache, _ = world
    trees = []
    for workers in (0, 2):
        out = tmp_path / f"t{workers}"
        tokenize_corpus(cache, tokenizer, max_length=32, seed=0, out=out, validation_fraction=0.1, num_workers=workers)
        trees.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert trees[0] == trees[1]


def test_rows_are_found_across_shard_files(world, tmp_path):
    tokenizer, cache, _ = world
    for name, size in (("one", 1 << 24), ("many", 64 * 100)):
        tokenize_corpus(cache, tokenizer, max_length=64, seed=0, out=tmp_path / name, tokens_per_shard=size)
    one, many = (TokenRows.open(tmp_path / name, "train") for name in ("one", "many"))
    shards = open_folder(tmp_path / "many", "tokens")["splits"]["train"]["shards"]
    assert len(shards) == -(-one.num_rows // 100)
    assert {s["rows"] for s in shards[:-1]} == {100}
    order = np.random.default_rng(1).permutation(one.num_rows)
    assert (one.take(order) == many.take(order)).all()
    assert many.take(order[:0]).shape == (0, 64)
    for wrong in ([-1], [one.num_rows]):
        with pytest.raises(IndexError, match="there are"):
            many.take(np.array(wrong))


def test_the_held_out_documents_depend_on_the_seed_and_pieces_of_one_stay_together(world, tmp_path):
    tokenizer, _, _ = world
    pieces = [(f"libro{i}#{k}" if k else f"libro{i}", f"{WORDS[i]} {WORDS[k]}") for i in range(16) for k in range(4)]
    cache = write_cache(tmp_path / "c", pieces)
    held = []
    for seed in (0, 1):
        tokenize_corpus(cache, tokenizer, max_length=16, seed=seed, out=tmp_path / "t", validation_fraction=0.3)
        rows = TokenRows.open(tmp_path / "t", "valid")
        texts, _ = unpack(rows.take(np.arange(rows.num_rows)), tokenizer)
        books = [text.split()[0] for text in texts]
        assert all(books.count(book) == 4 for book in books)
        held.append(set(books))
    assert held[0] != held[1]


@pytest.mark.parametrize("fraction", [1e-9, 0.5])
def test_both_splits_have_rows_however_few_documents_there_are(world, tmp_path, fraction):
    tokenizer, _, _ = world
    cache = write_cache(tmp_path / "c", [("a", "casa"), ("b", "perro")])
    for seed in range(5):
        report = tokenize_corpus(
            cache, tokenizer, max_length=16, seed=seed, out=tmp_path / "t", validation_fraction=fraction
        )
        assert report["rows"] == {"train": 1, "valid": 1}


def test_one_document_cannot_be_divided(world, tmp_path):
    cache = write_cache(tmp_path / "c", [("a", "casa")])
    with pytest.raises(FrankensteinError, match=r"data\.validation_fraction: found 0\.02; expected 0"):
        tokenize_corpus(cache, world[0], max_length=16, seed=0, out=tmp_path / "t", validation_fraction=0.02)
    assert not (tmp_path / "t").exists()


def test_a_row_begins_with_cls_and_a_long_document_goes_on_in_the_next(world, tmp_path):
    tokenizer, _, _ = world
    writer = RowWriter(tmp_path, "train", tokenizer, 4, 1024)
    writer.add(np.array([10, 11, 12, 13, 3]))
    writer.add(np.array([14, 3]))
    writer.close()
    rows = TokenRows([(tmp_path / "train-00000.bin", 3)], max_length=4, vocab_size=330, dtype="uint16")
    assert rows.take(np.arange(3)).tolist() == [[2, 10, 11, 12], [2, 13, 3, 14], [2, 3, 0, 0]]
    assert rows.take(np.array([2, 0])).dtype == np.int64


def test_large_vocabularies_are_stored_in_four_bytes(world, tmp_path, monkeypatch):
    tokenizer, cache, _ = world
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    tokenize_corpus(cache, tokenizer, max_length=64, seed=0, out=tmp_path / "t")
    config = open_folder(tmp_path / "t", "tokens")
    assert config["dtype"] == "uint32"
    rows = TokenRows.open(tmp_path / "t", "train")
    assert (tmp_path / "t" / "train-00000.bin").stat().st_size == rows.num_rows * 64 * 4
    assert rows.take(np.array([0])).max() < 330
