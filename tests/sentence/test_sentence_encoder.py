"""The sentence encoder: what its vectors may depend on, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from frankenstein.artifact import ArtifactError
from frankenstein.errors import FrankensteinError
from frankenstein.model.storage import load_encoder, save_encoder
from frankenstein.quantization.convert import ternary_layers
from frankenstein.sentence.encoder import SentenceEncoder, SentenceSettings
from tests.sentence.world import SENTENCES, World

TEXTS = [*SENTENCES[:40], "", "sí", " ".join(SENTENCES[40:50]), "perro", *SENTENCES[90:130]]


@pytest.fixture(params=["full", "latent", "packed"])
def model(request: pytest.FixtureRequest, world: World) -> SentenceEncoder:
    return SentenceEncoder.load(world.full if request.param == "full" else world.quantized / request.param)


def one_by_one(model: SentenceEncoder, text: str) -> np.ndarray:
    """The vector by the definition: [CLS] pieces [SEP] cut to the length, the mean of the real tokens, unit length."""
    words = model.tokenizer
    ids = [words.cls_id, *words.encode(text)[: model.settings.max_length - 2], words.sep_id]
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids]))[0]
    return F.normalize(hidden.mean(0), dim=0).numpy()


def test_vectors_follow_the_definition(model: SentenceEncoder) -> None:
    expected = np.stack([one_by_one(model, text) for text in TEXTS])
    # Rounding of activations to int8 turns a difference in the last bit into a step, so ternary models get more room.
    tolerance = 5e-3 if ternary_layers(model.model) or model.kind == "packed_encoder" else 1e-5
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=tolerance)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 500])
def test_vectors_do_not_depend_on_batch_size_or_order(model: SentenceEncoder, batch_size: int) -> None:
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = model.encode([TEXTS[i] for i in order], batch_size=batch_size)
    np.testing.assert_allclose(shuffled, model.encode(TEXTS)[order], atol=1e-5)


def test_vectors_are_float32_of_unit_length_and_all_rows_are_filled(model: SentenceEncoder) -> None:
    vectors = model.encode(TEXTS, batch_size=5)
    assert vectors.shape == (len(TEXTS), model.dimension) == (len(TEXTS), 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


def test_the_packed_model_gives_the_vectors_of_the_latent_one(world: World) -> None:
    packed, latent = (SentenceEncoder.load(world.quantized / name) for name in ("packed", "latent"))
    assert np.array_equal(packed.encode(TEXTS), latent.encode(TEXTS))


def test_no_texts_give_no_rows_of_the_right_width(model: SentenceEncoder) -> None:
    assert model.encode([]).shape == (0, 32)
    assert model.encode([], precision="int8").dtype == np.int8


def test_a_stream_gives_the_same_vectors_and_reads_only_a_window_ahead(world: World) -> None:
    model = SentenceEncoder.load(world.full)
    taken = 0

    def texts():  # type: ignore[no-untyped-def]
        nonlocal taken
        for text in SENTENCES:
            taken += 1
            yield text

    stream = model.encode_stream(texts(), batch_size=1)
    first = next(stream)
    assert len(first) == taken < len(SENTENCES)
    assert np.array_equal(np.concatenate([first, *stream]), model.encode(SENTENCES, batch_size=1))


def test_only_the_end_beyond_max_length_is_cut(world: World) -> None:
    loaded = SentenceEncoder.load(world.full)
    model = SentenceEncoder(loaded.model, loaded.tokenizer, SentenceSettings(max_length=12))
    long = " ".join(SENTENCES[:5])
    other_end = long[:60] + " termina de otra manera"
    assert len(loaded.tokenizer.encode(long[:60])) > 12
    a, b, whole = model.encode([long, other_end, long])
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.array_equal(a, whole)


def test_precisions_keep_the_vectors_up_to_their_rounding(model: SentenceEncoder) -> None:
    exact = model.encode(TEXTS)
    half, codes = (model.encode(TEXTS, precision=p) for p in ("float16", "int8"))
    assert (half.dtype, codes.dtype) == (np.float16, np.int8)
    np.testing.assert_allclose(half, exact, atol=5e-4)
    np.testing.assert_allclose(codes / 127.0, exact, atol=0.5 / 127 + 1e-7)
    cosines = (codes.astype(np.int32) @ codes.astype(np.int32).T) / 127**2
    np.testing.assert_allclose(cosines, exact @ exact.T, atol=0.02)


def test_similarity_is_the_cosine_of_each_pair(world: World) -> None:
    model = SentenceEncoder.load(world.full)
    first, second = TEXTS[:6], TEXTS[6:12]
    a, b = (torch.from_numpy(model.encode(texts)) for texts in (first, second))
    np.testing.assert_allclose(model.similarity(first, second), F.cosine_similarity(a, b), atol=1e-6)
    np.testing.assert_allclose(model.similarity(3 * a.numpy(), b.numpy()), F.cosine_similarity(a, b), atol=1e-6)
    with pytest.raises(FrankensteinError, match="found 2 first and 1 second"):
        model.similarity(["a", "b"], ["c"])


def test_settings_of_a_sentence_encoder_come_back_and_a_plain_one_gets_the_mean(world: World, tmp_path: Path) -> None:
    assert SentenceEncoder.load(world.full).settings == SentenceSettings("mean", True, 32)
    stored = SentenceSettings(pooling="cls", normalize=False, max_length=9)
    tokenizer = SentenceEncoder.load(world.full).tokenizer.model_bytes
    plain = load_encoder(world.full)
    save_encoder(plain, tmp_path / "cls", tokenizer=tokenizer, max_length=32, sentence=stored.to_config())
    model = SentenceEncoder.load(tmp_path / "cls")
    assert model.settings == stored
    assert abs(np.linalg.norm(model.encode(["la gata mira"])) - 1) > 0.01
    with pytest.raises(
        FrankensteinError, match="int8 needs unit vectors, and this model was made with normalize: false"
    ):
        model.encode(["la gata"], precision="int8")


def test_wrong_input_is_refused_in_words(world: World) -> None:
    model = SentenceEncoder.load(world.full)
    cases = [
        ("hola", {}, "expected a list of sentences, found one string 'hola'"),
        (["a", None], {}, "sentence 1: expected a string, found NoneType"),
        ([3], {}, "sentence 0: expected a string, found int '3'"),
        (["a"], {"precision": "int4"}, "unknown precision 'int4'; known: float32, float16, int8"),
        (["a"], {"batch_size": 0}, "batch_size is 0; expected at least 1"),
    ]
    for texts, options, message in cases:
        with pytest.raises(FrankensteinError, match=message):
            model.encode(texts, **options)


def test_wrong_folders_are_refused_in_words(world: World, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        SentenceEncoder.load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="is a tokenizer artifact; expected encoder or packed_encoder"):
        SentenceEncoder.load(world.tokenizer)
    with pytest.raises(FrankensteinError, match="full-precision encoder; backend 'int_mm' is for packed"):
        SentenceEncoder.load(world.full, backend="int_mm")
