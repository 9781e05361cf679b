"""SentencePiece tokenizer with fixed control pieces that no text can produce.

Source: Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226; unigram: Kudo 2018, https://arxiv.org/abs/1804.10959.
"""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from frankenstein.artifact import MANIFEST, new_folder, open_folder, read_json
from frankenstein.errors import FrankensteinError
from frankenstein.text.normalize import one_line, split_long
from frankenstein.text.options import TokenizerOptions

MODEL_NAME = "tokenizer.model"
_PAD, _UNK, _CONTROLS = "[PAD]", "[UNK]", ("[CLS]", "[SEP]", "[MASK]")
_WORD_START = "\u2581"
_QUIET = 2  # SentencePiece's level for errors only
_LINE_CHARS = 200  # its trainer needs quadratic time in the length of a repetitive line; no piece spans a space anyway


class Tokenizer:
    """Text to token ids and back; `decode(encode(x)) == one_line(x)` when byte_fallback is on.

    Texts are normalised by `normalize.one_line`: NFC, white space and control characters to one space.
    Args:
        model: bytes of a SentencePiece model that has the pieces [PAD] [UNK] [CLS] [SEP] [MASK].
    """

    def __init__(self, model: bytes) -> None:
        self.model_bytes = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise FrankensteinError("not a SentencePiece model") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id, self.unk_id = self._control(_PAD), self._processor.unk_id()
        self.cls_id, self.sep_id, self.mask_id = (self._control(piece) for piece in _CONTROLS)

    @classmethod
    def train(
        cls, texts: Iterable[str], folder: str | Path, *, options: TokenizerOptions, vocab_size: int, seed: int
    ) -> "Tokenizer":
        """Train on a seeded sample of the texts and write a `tokenizer` artifact; same arguments, same bytes.

        Raises:
            FrankensteinError: when the texts cannot give `vocab_size` pieces; names the possible size.
        """
        sample = sample_texts(map(one_line, texts), options.training_chars, seed)
        tokenizer = cls(_train_model(sample, options, vocab_size))
        special = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id")
        config = {
            "vocab_size": tokenizer.vocab_size,
            **dict(zip(special, tokenizer.special_ids, strict=True)),
            "model_type": options.model_type,
            "byte_fallback": options.byte_fallback,
            "training_rows": len(sample),
            "training_chars": sum(map(len, sample)),
        }
        with new_folder(folder, "tokenizer", config) as temporary:
            (temporary / MODEL_NAME).write_bytes(tokenizer.model_bytes)
        return tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of any folder that holds a `tokenizer.model`; a tokenizer artifact is checked first."""
        file = Path(folder) / MODEL_NAME
        if (Path(folder) / MANIFEST).is_file() and read_json(Path(folder) / MANIFEST).get("kind") == "tokenizer":
            open_folder(folder, "tokenizer")
        try:
            return cls(file.read_bytes())
        except OSError as error:
            raise FrankensteinError(f"{file}: cannot be read: {error.strerror}") from None
        except FrankensteinError as error:
            raise FrankensteinError(f"{file}: {error}") from None

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that no text gives: padding, unknown, [CLS], [SEP], [MASK] (unknown: only without byte_fallback)."""
        return (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)

    @cached_property
    def word_starts(self) -> np.ndarray:
        """(vocab_size,) bool: pieces that begin a word."""
        return np.array([self._processor.id_to_piece(i).startswith(_WORD_START) for i in range(self.vocab_size)])

    @cached_property
    def byte_ids(self) -> np.ndarray:
        """(vocab_size,) bool: pieces that spell one byte of a character outside the vocabulary."""
        return np.array([self._processor.is_byte(i) for i in range(self.vocab_size)])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self._processor.encode(one_line(valid_unicode(text))))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        lines = [one_line(valid_unicode(text)) for text in texts]
        # One thread: N processes share the cores, and SentencePiece gains nothing from threads on lists.
        return list(self._processor.encode(lines, num_threads=1)) if lines else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give no text.

        Raises:
            FrankensteinError: for an id outside the vocabulary.
        """
        listed = [int(i) for i in ids]
        wrong = [i for i in listed if not 0 <= i < self.vocab_size]
        if wrong:
            raise FrankensteinError(f"token id {wrong[0]} is outside the vocabulary 0..{self.vocab_size - 1}")
        return str(self._processor.decode(listed))

    def _control(self, piece: str) -> int:
        id = int(self._processor.piece_to_id(piece))
        if not self._processor.is_control(id):
            raise FrankensteinError(f"the SentencePiece model has no control piece {piece}")
        return id


def valid_unicode(text: str) -> str:
    """The text itself; FrankensteinError when it holds a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FrankensteinError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at {error.start}"
        ) from None
    return text


def sample_texts(texts: Iterable[str], max_chars: int, seed: int) -> list[str]:
    """The texts with the smallest seeded hashes that together have at most `max_chars` characters, in their own order.

    A longer text is never cut; when the first choice alone is longer it is the only one. Memory: O(max_chars).
    """
    key = seed.to_bytes(8, "little")
    kept: list[tuple[int, int, str]] = []  # a heap whose first entry has the largest hash
    chars = 0
    for order, text in enumerate(texts):
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=key).digest()
        heapq.heappush(kept, (-int.from_bytes(digest, "little"), -order, text))
        chars += len(text)
        while chars > max_chars and len(kept) > 1:
            chars -= len(heapq.heappop(kept)[2])
    return [text for _, _, text in sorted(kept, key=lambda entry: -entry[1])]


def _train_model(sample: list[str], options: TokenizerOptions, vocab_size: int) -> bytes:
    writer = io.BytesIO()
    try:
        # Identity: texts are already normalised. The trainer's own subsampling, shuffling and threads change the bytes
        # between runs, so all are off. A hard limit: the encoder's embedding has exactly vocab_size rows.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in sample for line in split_long(text, _LINE_CHARS)),
            model_writer=writer,
            model_type=options.model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            character_coverage=options.character_coverage,
            byte_fallback=options.byte_fallback,
            normalization_rule_name="identity",
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece=_PAD,
            unk_piece=_UNK,
            control_symbols=list(_CONTROLS),
            max_sentence_length=1 << 30,
            num_threads=1,
            minloglevel=_QUIET,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size, len(sample)) from None
    return writer.getvalue()


def _training_error(message: str, vocab_size: int, rows: int) -> FrankensteinError:
    high = re.search(r"too high .*<= (\d+)", message)
    if high:
        return FrankensteinError(
            f"model.vocab_size: found {vocab_size}; the {rows} training texts give at most {high[1]} pieces "
            "(lower model.vocab_size, or bring more text)"
        )
    low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if low:
        return FrankensteinError(
            f"model.vocab_size: found {vocab_size}; the characters of the corpus alone need {low[1]} pieces "
            "(raise model.vocab_size, or lower tokenizer.character_coverage)"
        )
    return FrankensteinError(f"SentencePiece cannot train on {rows} texts: {message}")
