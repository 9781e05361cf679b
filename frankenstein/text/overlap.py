"""How much of a test set was already seen: in its own train and dev pairs, and in the pretraining corpus."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

_KEY_WORDS = 3


class Overlap:
    """Counts repeated pairs and test sentences that stand in the corpus.

    Texts are compared as words between white space, ignoring case. A sentence of fewer than 3 words is not looked for:
    it would be found in almost any corpus.
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], set[bytes]] = {}
        self._test_pairs: dict[str, list[bytes]] = {}
        self._sentences: dict[tuple[str, ...], set[str]] = defaultdict(set)
        self._by_key: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = defaultdict(list)
        self._found: set[tuple[str, ...]] = set()

    def add_split(self, task: str, split: str, first: Sequence[str], second: Sequence[str]) -> None:
        """Take note of all pairs of one split; those of `test` are what is looked for."""
        digests = [_digest(a, b) for a, b in zip(first, second, strict=True)]
        if split != "test":
            self._pairs[task, split] = set(digests)
            return
        self._test_pairs[task] = digests
        for sentence in (*first, *second):
            words = tuple(_words(sentence))
            if len(words) >= _KEY_WORDS:
                if words not in self._sentences:
                    offset = _key_offset(words)
                    self._by_key[words[offset : offset + _KEY_WORDS]].append((offset, words))
                self._sentences[words].add(task)

    def look_in(self, text: str) -> int:
        """Search one corpus text for test sentences; returns its number of words."""
        words = _words(text)
        if not self._by_key.keys().isdisjoint(zip(words, words[1:], words[2:], strict=False)):
            self._match(tuple(words))
        return len(words)

    def _match(self, words: tuple[str, ...]) -> None:
        for i in range(len(words) - _KEY_WORDS + 1):
            for offset, sentence in self._by_key.get(words[i : i + _KEY_WORDS], ()):
                if offset <= i and words[i - offset : i - offset + len(sentence)] == sentence:
                    self._found.add(sentence)

    def report(self) -> dict[str, dict[str, int]]:
        """Per task with a test split: test pairs also in train and in dev, test sentences, and those in the corpus."""
        counts = {}
        for task, digests in sorted(self._test_pairs.items()):
            sentences = [words for words, tasks in self._sentences.items() if task in tasks]
            counts[task] = {
                f"test_pairs_in_{split}": self._shared(task, split, digests) for split in ("train", "dev")
            } | {
                "test_sentences": len(sentences),
                "test_sentences_in_corpus": sum(words in self._found for words in sentences),
            }
        return counts

    def _shared(self, task: str, split: str, digests: list[bytes]) -> int:
        other = self._pairs.get((task, split), set())
        return sum(digest in other for digest in digests)


def _key_offset(words: tuple[str, ...]) -> int:
    """Where the three neighbouring words with the most letters begin: long words are rare, so few texts hold all."""
    return max(range(len(words) - _KEY_WORDS + 1), key=lambda i: sum(map(len, words[i : i + _KEY_WORDS])))


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _digest(first: str, second: str) -> bytes:
    joined = " ".join(_words(first)) + "\n" + " ".join(_words(second))
    return hashlib.blake2b(joined.encode("utf-8"), digest_size=16).digest()
