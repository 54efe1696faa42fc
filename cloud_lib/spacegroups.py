"""The 230 space groups: generator strings, exact operations, Wyckoff positions, normalizer permutations.

The tables sit in `spacegroups.jsonl`, one group per line, read once on first use:

* `generator`: encoding of De Graef and McHenry (Structure of Materials, 2012), as in pymatgen's data file:
  inversion flag, number of generators, then per generator one rotation letter and three translation letters,
  then the origin tail (`0`, or `1` and the shift that leads to origin choice 2).
* `wyckoff`: multiplicity, letter, site symmetry and representative coordinates of all 1,731 positions,
  letters as in International Tables A, coordinates in the setting of `hall_number`.
* `normalizer`: generators of the permutations of Wyckoff letters under the affine normalizer. They were
  derived from the operations alone; `benchmarks/derive_wyckoff.py` writes the file, a test derives a sample
  again.

One setting is used throughout: the smallest Hall number of the group, which is spglib's default (origin
choice 1, unique axis b, hexagonal axes). Without the origin tail each generator string gives exactly that
setting.
"""

import json
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyzA"
MAX_REPEAT = 99  # largest count word "x99" before a repeated Wyckoff symbol in strings of style site

ROTATIONS = {  # rotation letter -> 3 x 3 matrix by rows; 0-based 'h' is the inversion
    "a": (1, 0, 0, 0, 1, 0, 0, 0, 1), "b": (-1, 0, 0, 0, -1, 0, 0, 0, 1), "c": (-1, 0, 0, 0, 1, 0, 0, 0, -1),
    "d": (0, 0, 1, 1, 0, 0, 0, 1, 0), "e": (0, 1, 0, 1, 0, 0, 0, 0, -1), "f": (0, -1, 0, -1, 0, 0, 0, 0, -1),
    "g": (0, -1, 0, 1, 0, 0, 0, 0, 1), "h": (-1, 0, 0, 0, -1, 0, 0, 0, -1), "i": (1, 0, 0, 0, 1, 0, 0, 0, -1),
    "j": (1, 0, 0, 0, -1, 0, 0, 0, 1), "k": (0, -1, 0, -1, 0, 0, 0, 0, 1), "l": (0, 1, 0, 1, 0, 0, 0, 0, 1),
    "m": (0, 1, 0, -1, 0, 0, 0, 0, -1), "n": (0, -1, 0, 1, -1, 0, 0, 0, 1),
}
TRANSLATIONS = {  # translation letter -> fraction of a cell edge
    "A": Fraction(1, 6), "B": Fraction(1, 4), "C": Fraction(1, 3), "D": Fraction(1, 2), "E": Fraction(2, 3),
    "F": Fraction(3, 4), "G": Fraction(5, 6), "O": Fraction(0), "X": Fraction(-3, 8), "Y": Fraction(-1, 4),
    "Z": Fraction(-1, 8),
}
PUBLISHED_DEVIATIONS = {  # the three lines of the published table that differ, kept to load published weights
    39: "03aODDbOOOcODO0",  # generates group 21
    131: "13bDDOgDOOcODD0",  # generates group 130
    222: "14bDDOcDODdOOOeOOD1YYY",  # the right group, but already in origin choice 2
}
TABLES = ("corrected", "published")
_DENOMINATOR = 24  # every translation of every setting is a multiple of 1/24


class WyckoffPosition(NamedTuple):
    """One Wyckoff position: letter, multiplicity in the conventional cell, site symmetry, coordinates."""

    letter: str
    multiplicity: int
    site_symmetry: str
    coordinates: str

    @property
    def symbol(self) -> str:
        """Multiplicity and letter, "3c"."""
        return f"{self.multiplicity}{self.letter}"


@dataclass(frozen=True)
class Generators:
    """A parsed generator string.

    `rotations` (g, 3, 3) int, `translations` (g, 3) int in units of 1/24, the inversion included when the
    flag is set; `origin_shift` (3,) int in units of 1/24: coordinates in origin choice 2 = coordinates -
    shift.
    """

    rotations: np.ndarray
    translations: np.ndarray
    origin_shift: np.ndarray


@cache
def _table() -> tuple[dict, ...]:
    text = files("cloud_lib").joinpath("spacegroups.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def _row(space_group: int) -> dict:
    if not 1 <= space_group <= 230:
        raise ValueError(f"space_group: expected a number from 1 to 230, found {space_group}")
    return _table()[space_group - 1]


def generator(space_group: int, table: str = "corrected") -> str:
    """The group's generator string, for example "14bOOOcOOOdOOOeOOO0" for 221.

    `table="published"` gives the three deviating lines of the paper's code (39, 131, 222), which exist only
    to reproduce published strings and weights.

    Raises:
        ValueError: no such group or table.
    """
    if table not in TABLES:
        raise ValueError(f"table: expected one of {TABLES}, found {table!r}")
    text = _row(space_group)["generator"]
    return PUBLISHED_DEVIATIONS.get(space_group, text) if table == "published" else text


def hall_number(space_group: int) -> int:
    """Hall number (1-530) of the setting used here: the group's smallest, spglib's default."""
    return _row(space_group)["hall_number"]


def origin_choice(space_group: int) -> str:
    """What distinguishes that setting, in spglib's words: "1" (origin), "b1" or "b" (axis), "H", or ""."""
    return _row(space_group)["choice"]


def hm_symbol(space_group: int) -> str:
    """Short Hermann-Mauguin symbol, "Pm-3m"."""
    return _row(space_group)["hm_symbol"]


@cache
def wyckoff_positions(space_group: int) -> tuple[WyckoffPosition, ...]:
    """All Wyckoff positions of the group, from "a" to the general position."""
    return tuple(
        WyckoffPosition(letter, *entry) for letter, entry in zip(LETTERS, _row(space_group)["wyckoff"])
    )


@cache
def multiplicities(space_group: int) -> dict[str, int]:
    """Wyckoff letter -> multiplicity in the conventional cell."""
    return {position.letter: position.multiplicity for position in wyckoff_positions(space_group)}


def parse_generator(text: str) -> Generators:
    """Read a generator string.

    Raises:
        ValueError: it does not follow flag, count, count x (rotation, 3 translations), tail.
    """
    count = int(text[1]) if text[:1] in ("0", "1") and text[1:2].isdigit() else -1
    body, tail = text[2 : 2 + 4 * count], text[2 + 4 * count :]
    well_formed = (
        count >= 0 and len(body) == 4 * count and (tail == "0" or (len(tail) == 4 and tail[0] == "1"))
        and set(body[::4]) <= set(ROTATIONS)
        and {c for i, c in enumerate(body + tail[1:].rjust(4)) if i % 4} <= set(TRANSLATIONS) | {" "}
    )
    if not well_formed:
        raise ValueError(
            f"generator string: expected flag, count, 4 letters per generator and a tail, found {text!r}"
        )
    blocks = [body[i : i + 4] for i in range(0, 4 * count, 4)] + ["hOOO"] * int(text[0])
    return Generators(
        np.array([ROTATIONS[b[0]] for b in blocks], dtype=int).reshape(-1, 3, 3),
        np.array([_translation(b[1:]) for b in blocks], dtype=int).reshape(-1, 3),
        np.array(_translation(tail[1:] or "OOO"), dtype=int),
    )


def _translation(letters: str) -> list[int]:
    return [int(TRANSLATIONS[c] * _DENOMINATOR) for c in letters]


def close(generators: Generators) -> tuple[np.ndarray, np.ndarray]:
    """The group that the generators span, modulo lattice translations.

    Returns:
        rotations (n, 3, 3) int, translations (n, 3) int in units of 1/24, the identity first.
    """
    identity = (np.eye(3, dtype=int), np.zeros(3, dtype=int))
    found = {_key(*identity): identity}
    pending = [identity]
    while pending:
        rotation, translation = pending.pop()
        for r, t in zip(generators.rotations, generators.translations):
            product = (r @ rotation, (r @ translation + t) % _DENOMINATOR)
            if _key(*product) not in found:
                found[_key(*product)] = product
                pending.append(product)
    rotations, translations = zip(*found.values())
    return np.array(rotations), np.array(translations)


def _key(rotation: np.ndarray, translation: np.ndarray) -> bytes:
    return rotation.tobytes() + translation.tobytes()


@cache
def operations(space_group: int) -> tuple[tuple[tuple[tuple[int, ...], ...], tuple[Fraction, ...]], ...]:
    """All operations of the conventional cell as exact (rotation, translation) pairs, setting `hall_number`.

    Centring translations are included, translations lie in [0, 1): 192 pairs for group 225.
    """
    rotations, translations = close(parse_generator(generator(space_group)))
    return tuple(
        (tuple(map(tuple, r.tolist())), tuple(Fraction(int(x), _DENOMINATOR) for x in t))
        for r, t in zip(rotations, translations)
    )


@cache
def normalizer_permutations(space_group: int) -> tuple[str, ...]:
    """All distinct actions of the group's affine normalizer on its Wyckoff letters, the identity first.

    Each is a string p: letter number i becomes p[i]. The affine normalizer contains the Euclidean one of
    every lattice and every change between equivalent cells, so what is invariant under it depends neither on
    the origin nor on the axes that a symmetry finder happens to choose.
    """
    identity = LETTERS[: len(_row(space_group)["wyckoff"])]
    found, pending = {identity: None}, [identity]
    steps = [str.maketrans(identity, step) for step in _row(space_group)["normalizer"]]
    while pending:
        word = pending.pop()
        for step in steps:
            image = word.translate(step)
            if image not in found:
                found[image] = None
                pending.append(image)
    return tuple(found)


@cache
def space_group_of(generator_string: str) -> int:
    """The group whose generator string, corrected or published, this is.

    Raises:
        ValueError: it is nobody's string.
    """
    for table in TABLES:
        for number in range(1, 231):
            if generator(number, table) == generator_string:
                return number
    raise ValueError(f"generator string: expected one of the 230, found {generator_string!r}")
