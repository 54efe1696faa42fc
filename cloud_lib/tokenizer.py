"""Closed vocabularies: every unit with a meaning of its own is one token, everything else is an error.

In a string, "O" may be the translation 0 or oxygen, "1" an inversion flag, a count or an origin tail. Here
each meaning has its own token, so tokens are written with a prefix where the bare word is ambiguous:

    [PAD] [CLS] [SEP] [MASK] |      special tokens (ids 0-3) and the field separator
    flag:0 count:4 a tr:D tail:0    generator field (before the first bar); sg221 for style `number`
    3c, x12                         Wyckoff symbols of the 230 groups; count of a repeated orbit
    Ba, D                           elements 1-118 and deuterium
    0.0, 0.01, ... 1.0              fractions

The vocabulary is enumerated from the tables, so it depends on no corpus; `version` names its layout, `sha256`
its content. `Tokenizer.published()` is the 564-token vocabulary of the published weights.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np

from cloud_lib.elements import SYMBOLS
from cloud_lib.spacegroups import (
    LETTERS, MAX_REPEAT, PUBLISHED_DEVIATIONS, ROTATIONS, TRANSLATIONS, generator, wyckoff_positions,
)

VERSION = "cloud-1"
PUBLISHED_VERSION = "published-564"
SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
PARTS = ("special", "generator", "wyckoff", "element", "fraction")  # meaning of the values of part_of_id
_PREFIX = re.compile(r"^(flag|count|tr|tail):")


class UnknownTokenError(ValueError):
    """A string holds a word that the vocabulary does not know."""


class Tokenizer:
    """A vocabulary and its two directions; make one with `default`, `published` or `load`."""

    def __init__(self, vocab: dict[str, int], version: str) -> None:
        """`vocab`: token -> id, the ids being 0 to n-1."""
        self.vocab = vocab
        self.version = version
        self.tokens = sorted(vocab, key=vocab.__getitem__)
        self.vocab_size = len(vocab)
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = (vocab[t] for t in SPECIALS)
        self._fields = _PublishedFields(vocab) if version == PUBLISHED_VERSION else _Fields(vocab)

    @classmethod
    def default(cls) -> "Tokenizer":
        """The vocabulary described at the head of this module."""
        return cls({token: i for i, token in enumerate(_enumerate())}, VERSION)

    @classmethod
    def published(cls) -> "Tokenizer":
        """The published vocabulary: 463 WordPiece entries and 101 fractions, ids as in the authors' files.

        One id serves several meanings there (O, digits), and a word it lacks (At, Fr, Es, Fm, Md, No, Lr)
        falls apart into pieces as in `transformers.BertTokenizer`; only use it with published weights and
        strings. Source: ChangwenXu98/CLOUD, tokenizer_cloud_optimade (MIT licence, see published_vocab.txt).
        """
        lines = files("cloud_lib").joinpath("published_vocab.txt").read_text(encoding="utf-8").splitlines()
        words = [word for line in lines if not line.startswith("#!") for word in line.split()]
        return cls({token: i for i, token in enumerate(words + _fractions())}, PUBLISHED_VERSION)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer saved in a folder.

        Raises:
            FileNotFoundError: no tokenizer there.
            ValueError: its content does not match its recorded sha256.
        """
        meta = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
        document = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = document["model"]["vocab"] | {t["content"]: t["id"] for t in document["added_tokens"]}
        tokenizer = cls(vocab, meta["cloud_version"])
        if tokenizer.sha256 != meta["cloud_sha256"]:
            raise ValueError(f"{folder}: vocabulary changed: expected sha256 {meta['cloud_sha256'][:12]}, "
                             f"found {tokenizer.sha256[:12]}")
        return tokenizer

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokens in the order of their ids."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    @cached_property
    def part_of_id(self) -> np.ndarray:
        """(vocab_size,) int8: 0 special, 1 generator, 2 Wyckoff, 3 element, 4 fraction."""
        shared = self.version == PUBLISHED_VERSION
        return np.array([_part(token, shared) for token in self.tokens], dtype=np.int8)

    def encode(self, text: str) -> list[int]:
        """Token ids of one string, [CLS] and [SEP] included.

        Raises:
            UnknownTokenError: a word is not in the vocabulary.
        """
        return [self.cls_id, *np.frombuffer(self._fields(text), dtype=np.uint16).tolist(), self.sep_id]

    def encode_many(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Packed ids of many strings.

        Returns:
            tokens (n_tokens,) uint16 with [CLS] and [SEP] around each string, and offsets (n + 1,) int64:
            string i is tokens[offsets[i]:offsets[i + 1]].

        Raises:
            UnknownTokenError: a word is not in the vocabulary.
        """
        head, tail = (np.array([i], dtype=np.uint16).tobytes() for i in (self.cls_id, self.sep_id))
        encoded = list(map(self._fields, texts))
        tokens = np.frombuffer(head + (tail + head).join(encoded) + tail if encoded else b"", dtype=np.uint16)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)) // 2 + 2
        return tokens, np.concatenate([[0], np.cumsum(lengths)])

    def decode(self, ids: Sequence[int]) -> str:
        """The string, special tokens left out."""
        words = (self.tokens[i] for i in ids)
        return " ".join(_PREFIX.sub("", w) for w in words if not w.startswith("[")).replace(" ##", "")

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads."""
        from cloud_lib.tokenizer_file import config, document

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("tokenizer.json", document(self)), ("tokenizer_config.json", config(self))):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class _Fields:
    """string -> bytes of its token ids (uint16), without [CLS] and [SEP]."""

    def __init__(self, vocab: dict[str, int]) -> None:
        ids = {token: np.uint16(i).tobytes() for token, i in vocab.items()}
        self._word = {token: i for token, i in ids.items() if not _PREFIX.match(token)}
        generators = [generator(n) for n in range(1, 231)] + list(PUBLISHED_DEVIATIONS.values())
        heads = {" ".join(g): _generator_tokens(g) for g in generators}
        heads |= {f"sg{n}": [f"sg{n}"] for n in range(1, 231)}
        self._head = {f"{head} ": b"".join(ids[t] for t in [*tokens, "|"]) for head, tokens in heads.items()}
        self._head[""] = ids["|"]  # style `no_generator`

    def __call__(self, text: str) -> bytes:
        head, bar, rest = text.partition("|")
        word = self._word
        try:
            if not bar:
                return b"".join([word[w] for w in head.split()])
            return self._head[head] + b"".join([word[w] for w in rest.split()])
        except KeyError as error:
            what = "generator" if error.args[0] == head else "token"
            raise UnknownTokenError(f"unknown {what} {error.args[0]!r} in {text[:80]!r}") from None


class _PublishedFields:
    """The same for the published vocabulary: fractions whole, other words by greedy longest match."""

    def __init__(self, vocab: dict[str, int]) -> None:
        self._vocab = vocab
        self._known: dict[str, bytes] = {}

    def __call__(self, text: str) -> bytes:
        known = self._known
        words = text.split()
        for word in words:
            if word not in known:
                known[word] = np.array(self._pieces(word), dtype=np.uint16).tobytes()
        return b"".join([known[w] for w in words])

    def _pieces(self, word: str) -> list[int]:
        start, pieces = 0, []
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self._vocab), None)
            if end is None:
                raise UnknownTokenError(f"unknown token {word!r} for the published vocabulary")
            pieces.append(self._vocab[prefix + word[start:end]])
            start = end
        return pieces


def _generator_tokens(text: str) -> list[str]:
    """The tokens of a generator string: "100" -> flag:1 count:0 tail:0."""
    end = 2 + 4 * int(text[1])
    blocks = [c if i % 4 == 0 else f"tr:{c}" for i, c in enumerate(text[2:end])]
    shift = [f"tr:{c}" for c in text[end + 1 :]]
    return [f"flag:{text[0]}", f"count:{text[1]}", *blocks, f"tail:{text[end]}", *shift]


def _fractions() -> list[str]:
    return [str(i / 100) for i in range(101)]


def _enumerate() -> list[str]:
    """Every token of the default vocabulary, in the order of the ids."""
    symbols = {(p.multiplicity, LETTERS.index(p.letter), p.symbol)
               for n in range(1, 231) for p in wyckoff_positions(n)}
    return [
        *SPECIALS, "|", "flag:0", "flag:1", *(f"count:{i}" for i in range(8)), *ROTATIONS,
        *(f"tr:{c}" for c in TRANSLATIONS), "tail:0", "tail:1", *(f"sg{n}" for n in range(1, 231)),
        *(symbol for _, _, symbol in sorted(symbols)), *(f"x{n}" for n in range(2, MAX_REPEAT + 1)),
        *SYMBOLS, *_fractions(),
    ]


def _part(token: str, shared: bool) -> int:
    """Index into PARTS; with `shared`, letters for both translation and element count as generator."""
    if re.fullmatch(r"[01]\.\d+", token):
        return 4
    if re.fullmatch(r"\d+[a-zA]|x\d+", token):
        return 2
    if _PREFIX.match(token) or token in ROTATIONS or re.fullmatch(r"sg\d+|\d+", token):
        return 1
    if shared and token in TRANSLATIONS:
        return 1
    return 3 if token in SYMBOLS else 0
