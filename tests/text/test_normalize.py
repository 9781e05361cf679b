import time
import unicodedata

import pytest

from frankenstein.text.normalize import clean, clean_pieces, one_line, split_long


def test_decomposed_letters_are_composed_and_case_and_accents_stay():
    assert clean(unicodedata.normalize("NFD", "Ñandú, CAMIÓN")) == "Ñandú, CAMIÓN"


def test_compatibility_characters_are_not_folded():
    assert clean("1.º y x² ﬁn") == "1.º y x² ﬁn"


def test_control_characters_become_spaces_and_line_ends_line_feeds():
    assert clean("\ufeffuno\r\ndos\rtres\x00cuatro\tcinco\u2581seis\x85") == "uno\ndos\ntres cuatro cinco seis"


def test_one_line_joins_every_run_of_white_space():
    assert one_line("  uno \n\n dos\u00a0 tres\t") == "uno dos tres"


def test_a_text_that_fits_is_not_split():
    assert list(split_long("uno dos", 7)) == ["uno dos"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("uno dos tres", ["uno dos", "tres"]),
        ("uno dos  tres", ["uno dos", " tres"]),
        ("unodostres", ["unodost", "res"]),
        ("uno dostres cuatro", ["uno", "dostres", "cuatro"]),
    ],
)
def test_long_texts_are_split_at_the_last_white_space_that_fits_else_hard(text, pieces):
    assert list(split_long(text, 7)) == pieces


def test_no_character_but_white_space_is_lost_by_splitting():
    text = " ".join("palabra" * (1 + i % 5) for i in range(3000))
    pieces = list(split_long(text, 101))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert max(map(len, pieces)) <= 101


def test_composition_cannot_make_a_piece_too_long():
    # U+0958 has no composed form: NFC writes it as two characters.
    assert [len(p) for p in clean_pieces("\u0958" * 100, 100)] == [100, 100]


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "hola " * 200_000, "a" + "\u0301\u0316" * 500_000], ids=["run", "words", "marks"]
)
def test_a_megabyte_is_split_in_bounded_time(text):
    start = time.process_time()
    assert all(len(piece) <= 1000 for piece in clean_pieces(text, 1000))
    assert time.process_time() - start < 5
