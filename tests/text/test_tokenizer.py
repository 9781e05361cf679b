import itertools
import unicodedata

import numpy as np
import pytest
import sentencepiece

from frankenstein.artifact import open_folder
from frankenstein.errors import FrankensteinError
from frankenstein.text.normalize import one_line
from frankenstein.text.options import TokenizerOptions
from frankenstein.text.tokenizer import Tokenizer, sample_texts

STEMS = ["cas", "perr", "camión", "niñ", "lun", "merc", "plaz", "río", "lluv", "sombr", "olivo", "puent"]
WORDS = [stem + end for stem in STEMS for end in ("a", "o", "as", "os", "ita", "ero")]
TEXTS = [
    " ".join(words).capitalize() + "." for words in itertools.islice(itertools.permutations(WORDS, 4), 0, 400_000, 997)
]
HARD = [
    "Hola, mundo.",
    "texto con [MASK], [CLS], [SEP], [PAD] y [UNK] escritos",
    "<0x41> <unk> <s> </s>",
    "漢字 y 😀 y \u00adguion",
    "  muchos \n espacios\t aquí ",
    "\u2581barra baja\u2581",
    unicodedata.normalize("NFD", "ÑANDÚ camión"),
    "\x00nulo",
    "",
    "x" * 5000,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    Tokenizer.train(TEXTS, place, options=TokenizerOptions(), vocab_size=340, seed=0)
    return place


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


def train(folder, texts=TEXTS, vocab_size=340, seed=0, **options):
    return Tokenizer.train(texts, folder, options=TokenizerOptions(**options), vocab_size=vocab_size, seed=seed)


def test_special_ids_are_the_agreed_ones(tokenizer, folder):
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    config = open_folder(folder, "tokenizer")
    assert [config[k] for k in ("vocab_size", "pad_id", "unk_id", "cls_id", "sep_id", "mask_id")] == [
        340,
        0,
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_decoding_gives_the_normalised_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == one_line(text.replace("\u2581", " "))


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_no_text_gives_a_control_piece_even_if_trained_on_it(tmp_path, model_type):
    texts = [f"{text} [MASK] [CLS][SEP] <unk>" for text in TEXTS]
    tokenizer = train(tmp_path / "t", texts, model_type=model_type)
    for text in (*HARD, "[MASK]", "\u2581[MASK]", "[MASK][MASK]", "[PAD]"):
        assert not set(tokenizer.encode(text)) & set(tokenizer.special_ids)


def test_without_byte_fallback_only_the_unknown_token_can_occur(tmp_path):
    tokenizer = train(tmp_path / "t", vocab_size=80, byte_fallback=False)
    assert set(tokenizer.encode("漢 [MASK]")) & set(tokenizer.special_ids) == {tokenizer.unk_id}


def test_a_batch_gives_what_single_texts_give(tokenizer):
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]
    assert tokenizer.encode_batch([]) == []


def test_ids_are_those_of_sentencepiece_on_the_normalised_text(tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    assert tokenizer.encode("La casa  del\nniño") == reference.encode("La casa del niño")


def test_word_starts_are_the_pieces_that_begin_with_a_space(tokenizer):
    ids = tokenizer.encode("niñita camionero 漢 sombras")
    assert tokenizer.word_starts.dtype == bool
    assert tokenizer.word_starts[ids].sum() == 4
    assert tokenizer.word_starts[ids[0]]
    assert not tokenizer.word_starts[list(tokenizer.special_ids)].any()
    assert tokenizer.byte_ids.sum() == 256
    assert tokenizer.byte_ids[tokenizer.encode("漢")].sum() == 3


def test_special_tokens_decode_to_nothing_and_foreign_ids_are_refused(tokenizer):
    ids = tokenizer.encode("una casa")
    assert tokenizer.decode(np.array([2, *ids, 3, 0, 0])) == "una casa"
    with pytest.raises(FrankensteinError, match=r"token id 340 is outside the vocabulary 0\.\.339"):
        tokenizer.decode([340])


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_twice_gives_the_same_bytes_and_is_quiet(tmp_path, capfd, model_type):
    first = train(tmp_path / "a", model_type=model_type).model_bytes
    assert train(tmp_path / "bb", iter(TEXTS), model_type=model_type).model_bytes == first
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_the_possible_vocabulary_is_named_when_the_wanted_one_is_not_and_then_works(tmp_path, capfd, model_type):
    with pytest.raises(FrankensteinError, match=r"model\.vocab_size: found 9000; .* at most (\d+) pieces") as caught:
        train(tmp_path / "t", TEXTS[:20], vocab_size=9000, model_type=model_type)
    possible = int(str(caught.value).split("at most ")[1].split()[0])
    assert train(tmp_path / "t", TEXTS[:20], vocab_size=possible, model_type=model_type).vocab_size == possible
    with pytest.raises(FrankensteinError, match=r"found 265; .* characters .* need \d+ pieces"):
        train(tmp_path / "u", vocab_size=265, model_type=model_type)
    assert not (tmp_path / "u").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_megabyte_without_white_space_can_be_trained_on(tmp_path, model_type):
    assert train(tmp_path / "t", [*TEXTS, "x" * 1_000_000], model_type=model_type).vocab_size == 340


def test_long_rows_are_not_skipped(tmp_path):
    assert train(tmp_path / "t", [" ".join(TEXTS)]).vocab_size == 340


def test_the_training_sample_is_seeded_bounded_and_in_order():
    texts = [f"texto número {i}" for i in range(1000)]
    sample = sample_texts(iter(texts), 3000, 0)
    assert 2900 < sum(map(len, sample)) <= 3000
    assert sample == [t for t in texts if t in set(sample)]
    assert set(sample) == set(sample_texts(reversed(texts), 3000, 0))
    assert sample != sample_texts(texts, 3000, 1)
    assert sample_texts(texts, 10**6, 0) == texts
    assert sample_texts(["largo" * 100], 10, 0) == ["largo" * 100]


def test_damaged_foreign_and_missing_models_are_named(tmp_path, folder):
    with pytest.raises(FrankensteinError, match=r"tokenizer\.model: cannot be read: No such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(FrankensteinError, match=r"tokenizer\.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes().replace(b"[MASK]", b"[MUSK]"))
    with pytest.raises(FrankensteinError, match=r"tokenizer\.model: .* no control piece \[MASK\]"):
        Tokenizer.load(tmp_path)


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(FrankensteinError, match=r"lone surrogate U\+D83D at 4"):
        tokenizer.encode("mal \ud83d")
