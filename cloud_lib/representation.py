"""Symmetry strings: `SymmetryRecord` -> text in a named style, and text -> what it says.

Every full style has three fields, "generator | Wyckoff | composition":

* `paper`: as the published code writes it: distinct Wyckoff symbols, then elements with fractions, both in
  the order of the atoms in the file; fractions rounded half to even (0.125 -> 0.12), so they need not sum to
  1.
* `canonical` (default): the same fields, freed from the file. Elements follow the formula order; of all sets
  of Wyckoff symbols that the affine normalizer of the group connects, the smallest is written.
* `site`: the middle field tells which element sits where: "Ba 1a Ti 1b O 3c". Elements in formula order, each
  followed by its Wyckoff symbols; a symbol that n > 1 orbits of the element share is preceded by "xn". Of all
  equivalent assignments the smallest is written.

Ablations of `canonical`, all made from its text: the first field as it is, as a number ("sg221") or empty, and
the second as it is or empty: `number`, `no_generator`, `no_wyckoff`, `number_no_wyckoff`; `composition` is the
third field alone.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cloud_lib.elements import FORMULA_ORDER, NUMBERS, RANKS
from cloud_lib.spacegroups import (
    LETTERS, MAX_REPEAT, generator, multiplicities, normalizer_permutations, space_group_of,
)
from cloud_lib.symmetry import CrystalError, SymmetryRecord, read_files, symmetry_record

STYLES = ("paper", "canonical", "site")
ABLATION_STYLES = ("composition", "number", "no_generator", "no_wyckoff", "number_no_wyckoff")
MAX_POSITIONS = {  # longest sequence with [CLS] and [SEP]; 64 is the paper's, `site` reached 62 in real data
    "paper": 64, "canonical": 64, "site": 96, **dict.fromkeys(ABLATION_STYLES, 64),
}
_LETTER_RANK = {letter: rank for rank, letter in enumerate(LETTERS)}


class Decoded(NamedTuple):
    """What a string says; parts that its style leaves out are None or empty.

    `wyckoff`: Wyckoff symbol -> number of orbits, for style `site` (element, symbol) -> number of orbits;
    styles that list each symbol once count 1. `composition`: element -> fraction as written.
    """

    space_group: int | None
    wyckoff: dict
    composition: dict[str, float]


def string(record: SymmetryRecord, style: str = "canonical", generators: str = "corrected") -> str:
    """The symmetry string of a record.

    Args:
        generators: table of `spacegroups.generator`, "published" only to reproduce published strings.

    Raises:
        ValueError: unknown style or table.
    """
    if style not in STYLES + ABLATION_STYLES:
        raise ValueError(f"style: expected one of {STYLES + ABLATION_STYLES}, found {style!r}")
    group = record.space_group
    if style in ABLATION_STYLES:
        return ablate(string(record, "canonical", generators), group, style)
    head, composition = _spaced_generator(group, generators), _composition(record.amounts, style == "paper")
    if style == "site":
        sites = Counter((o.element, o.wyckoff_letter) for o in record.orbits)
        return f"{head} | {_site_field(group, tuple(sorted(sites.items())))} | {composition}"
    letters = "".join(dict.fromkeys([o.wyckoff_letter for o in record.orbits]))
    if style != "paper":
        letters = _smallest_letters(group, "".join(sorted(letters, key=_LETTER_RANK.__getitem__)))
    sizes = multiplicities(group)
    return f"{head} | {' '.join([f'{sizes[x]}{x}' for x in letters])} | {composition}"


def ablate(canonical: str, space_group: int, style: str) -> str:
    """A `canonical` string without one of its parts.

    Raises:
        ValueError: `style` is not one of ABLATION_STYLES.
    """
    if style not in ABLATION_STYLES:
        raise ValueError(f"ablation: expected one of {ABLATION_STYLES}, found {style!r}")
    head, wyckoff, composition = (field.strip() for field in canonical.split("|"))
    if style == "composition":
        return composition
    head = {"no_generator": "", "no_wyckoff": head}.get(style, f"sg{space_group}")
    wyckoff = "" if style.endswith("no_wyckoff") else wyckoff
    return " ".join(filter(None, [head, "|", wyckoff, "|", composition]))


@lru_cache(maxsize=512)
def _spaced_generator(space_group: int, table: str) -> str:
    return " ".join(generator(space_group, table))


def _composition(amounts: dict[str, int], in_file_order: bool) -> str:
    elements = amounts if in_file_order else sorted(amounts, key=RANKS.__getitem__)
    total = sum(amounts.values())
    return " ".join([f"{e} {_fraction(amounts[e], total)}" for e in elements])


@lru_cache(maxsize=100_000)
def _fraction(amount: int, total: int) -> str:
    """NumPy's rounding, half to even at two decimals, is the published code's."""
    return str(float(np.round(amount / total, 2)))


@lru_cache(maxsize=100_000)
def _smallest_letters(space_group: int, letters: str) -> str:
    """The smallest of the equivalent letter sets, its letters in order."""
    images = np.sort(_permutation_array(space_group)[:, [_LETTER_RANK[x] for x in letters]], axis=1)
    return "".join(LETTERS[i] for i in min(images.tolist()))


@lru_cache(maxsize=230)
def _permutation_array(space_group: int) -> np.ndarray:
    """(n_permutations, n_letters) numbers of the image letters."""
    permutations = normalizer_permutations(space_group)
    return np.array([[_LETTER_RANK[x] for x in p] for p in permutations], dtype=np.int64)


@lru_cache(maxsize=100_000)
def _site_field(space_group: int, sites: tuple[tuple[tuple[str, str], int], ...]) -> str:
    """Field for ((element, letter), number of orbits) pairs, smallest over the normalizer."""
    ranks = np.array([RANKS[element] for (element, _), _ in sites])
    counts = np.array([n for _, n in sites])
    images = _permutation_array(space_group)[:, [_LETTER_RANK[letter] for (_, letter), _ in sites]]
    codes = np.sort((ranks * len(LETTERS) + images) * 2**32 + counts, axis=1)  # element, letter, count
    words, last = [], None
    sizes = multiplicities(space_group)
    for code in min(codes.tolist()):
        rank, index = divmod(code >> 32, len(LETTERS))
        if rank != last:
            words.append(FORMULA_ORDER[rank])
            last = rank
        words += _repeated(f"{sizes[LETTERS[index]]}{LETTERS[index]}", code & (2**32 - 1))
    return " ".join(words)


def _repeated(symbol: str, n: int) -> list[str]:
    full, rest = divmod(n, MAX_REPEAT)
    counts = [MAX_REPEAT] * full + [rest] * (rest > 0)
    return [word for k in counts for word in ((f"x{k}", symbol) if k > 1 else (symbol,))]


def parse(text: str, style: str = "canonical") -> Decoded:
    """Read a string of a known style back.

    Raises:
        ValueError: unknown style, or the text does not follow it.
    """
    if style not in STYLES + ABLATION_STYLES:
        raise ValueError(f"style: expected one of {STYLES + ABLATION_STYLES}, found {style!r}")
    fields = [field.split() for field in text.split("|")]
    expected = 1 if style == "composition" else 3
    if len(fields) != expected:
        raise ValueError(f"style {style!r}: expected {expected} fields, found {len(fields)} in {text[:60]!r}")
    composition = _parse_composition(fields[-1])
    if style == "composition":
        return Decoded(None, {}, composition)
    head = "".join(fields[0])
    if style == "no_generator":
        return Decoded(None, dict(Counter(fields[1])), composition)
    group = _parse_number(head) if style.startswith("number") else space_group_of(head)
    return Decoded(group, _parse_wyckoff(fields[1], group, style), composition)


def _parse_number(head: str) -> int:
    if not (head.startswith("sg") and head[2:].isdigit() and 1 <= int(head[2:]) <= 230):
        raise ValueError(f"space group: expected sg1 to sg230, found {head!r}")
    return int(head[2:])


def _parse_composition(words: list[str]) -> dict[str, float]:
    elements, fractions = words[::2], words[1::2]
    unknown = [e for e in elements if e not in NUMBERS]
    if not words or len(words) % 2 or unknown or len(set(elements)) < len(elements):
        raise ValueError(f"composition: expected distinct elements, each with a fraction, "
                         f"found {' '.join(words)!r}")
    return dict(zip(elements, map(float, fractions)))


def _parse_wyckoff(words: list[str], space_group: int, style: str) -> dict:
    symbols = {f"{n}{letter}" for letter, n in multiplicities(space_group).items()}
    counts: Counter = Counter()
    element, repeat = None, 1
    for word in words:
        if style == "site" and word in NUMBERS:
            element = word
        elif style == "site" and word[0] == "x" and word[1:].isdigit():
            repeat = int(word[1:])
        elif word in symbols and (style != "site" or element):
            counts[(element, word) if style == "site" else word] += repeat
            repeat = 1
        else:
            raise ValueError(f"Wyckoff field: expected symbols of space group {space_group}, found {word!r}")
    return dict(counts)


def describe(path: str | Path, style: str = "canonical", symprec: float = 0.01,
             engine: str = "auto") -> Iterator[dict]:
    """A row per crystal of a file or folder: file, material_id, formula_reduced, space_group, string, error.

    A crystal that cannot be described has its reason in `error` and None in the three columns before it.

    Raises:
        FileNotFoundError: no such file, or no readable file in the folder.
        ValueError: unknown style or engine, or symprec not positive.
    """
    for file, material_id, crystal in read_files(path):
        row = {"file": str(file), "material_id": material_id, "formula_reduced": None, "space_group": None,
               "string": None, "error": None}
        try:
            if isinstance(crystal, CrystalError):
                raise crystal
            record = symmetry_record(crystal, symprec, engine)
            row |= {"formula_reduced": record.formula_reduced, "space_group": record.space_group,
                    "string": string(record, style)}
        except CrystalError as error:
            row["error"] = str(error)
        yield row
