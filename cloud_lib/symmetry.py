"""From a crystal to its frozen `SymmetryRecord`: space group, Wyckoff orbits, composition.

`as_crystal` takes what users have in memory, `read_crystals` what they have in files; `symmetry_record` does
the symmetry search. spglib is the reference (with the published code's tolerances); moyo is the fast path,
tried first by `engine="auto"`, spglib then takes what moyo cannot do. Both report Wyckoff letters in the
setting of `spacegroups.hall_number`: the smallest Hall number, origin choice 1.
"""

import logging
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any, NamedTuple

from cloud_lib.crystal import Crystal, CrystalError, as_crystal, check_distances, checked_volume
from cloud_lib.elements import NUMBERS, RANKS
from cloud_lib.readers import read_crystals, read_files
from cloud_lib.spacegroups import hall_number, multiplicities, origin_choice

__all__ = ["Crystal", "CrystalError", "Orbit", "SymmetryRecord", "as_crystal", "read_crystals", "read_files",
           "symmetry_record"]

ENGINES = ("auto", "spglib", "moyopy")
_FALLBACK_MAX_SITES = 1000  # spglib needs a second there, and grows with the square
_SPGLIB_ANGLE_TOLERANCE = 5.0  # degrees; pymatgen's default, hence that of the published code


class Orbit(NamedTuple):
    """A set of symmetry-equivalent atoms; two orbits may share one Wyckoff position."""

    element: str
    wyckoff_letter: str
    multiplicity: int  # in the conventional cell
    site_symmetry: str


@dataclass(frozen=True, slots=True)
class SymmetryRecord:
    """What the symmetry search found; orbits and elements in the order in which the atoms are listed.

    `amounts` counts the atoms of the given cell, `volume_per_atom` is in A^3, `symprec` [A] is the tolerance
    that was really used, which the engines may reduce.
    """

    space_group: int
    hall_number: int
    origin_choice: str
    orbits: tuple[Orbit, ...]
    amounts: dict[str, int]
    volume_per_atom: float
    symprec: float
    engine: str

    @property
    def n_sites(self) -> int:
        """Atoms in the given cell."""
        return sum(self.amounts.values())

    @property
    def formula_reduced(self) -> str:
        """Smallest integer formula, elements by electronegativity: "BaTiO3"."""
        divisor = gcd(*self.amounts.values())
        parts = ((e, self.amounts[e] // divisor) for e in sorted(self.amounts, key=RANKS.__getitem__))
        return "".join(f"{e}{n if n > 1 else ''}" for e, n in parts)


def symmetry_record(crystal: Any, symprec: float = 0.01, engine: str = "auto") -> SymmetryRecord:
    """Search the symmetry of a crystal, or of anything `as_crystal` takes.

    Args:
        symprec: largest deviation of an atom from its ideal position [A].
        engine: "spglib", "moyopy", or "auto": moyopy where it succeeds, else spglib.

    Raises:
        CrystalError: a bad crystal, or the search failed.
        ValueError: unknown engine, or symprec not positive.
    """
    if engine not in ENGINES or not symprec > 0:
        raise ValueError(f"expected engine in {ENGINES} and symprec > 0, found {engine!r} and {symprec}")
    crystal = as_crystal(crystal)
    volume = checked_volume(crystal)
    try:
        found = _search(crystal, symprec, engine)
    except CrystalError:
        check_distances(crystal, list(range(len(crystal.symbols))))  # the usual cause, said more clearly
        raise
    symbols, letters, site_symmetries = crystal.symbols, found.letters, found.site_symmetries
    first = dict(zip(reversed(found.orbits), range(len(symbols) - 1, -1, -1)))  # orbit -> its first atom
    sites = sorted(first.values())
    check_distances(crystal, sites)
    sizes = multiplicities(found.space_group)
    orbits = tuple([Orbit(symbols[i], letters[i], sizes[letters[i]], site_symmetries[i]) for i in sites])
    return SymmetryRecord(found.space_group, hall_number(found.space_group), origin_choice(found.space_group),
                          orbits, dict(Counter(symbols)), volume / len(symbols), found.symprec, found.engine)


class _Found(NamedTuple):
    """Answer of an engine; the lists have one entry per atom, `orbits` the number of its orbit."""

    engine: str
    space_group: int
    symprec: float
    orbits: list[int]
    letters: list[str]
    site_symmetries: list[str]


def _search(crystal: Crystal, symprec: float, engine: str) -> _Found:
    if engine != "spglib":
        try:
            return _search_moyopy(crystal, symprec)
        except CrystalError:
            if engine == "moyopy" or len(crystal.symbols) > _FALLBACK_MAX_SITES:
                raise
    return _search_spglib(crystal, symprec)


@cache
def _moyopy() -> Any:
    import moyopy

    logging.getLogger("moyo").setLevel(logging.CRITICAL)  # it logs every retry of the tolerance as a warning
    return moyopy


def _search_moyopy(crystal: Crystal, symprec: float) -> _Found:
    moyopy = _moyopy()
    numbers = [NUMBERS[s] for s in crystal.symbols]
    cell = moyopy.Cell(crystal.lattice.tolist(), crystal.positions.tolist(), numbers)
    try:
        found = moyopy.MoyoDataset(cell, symprec=symprec, setting=moyopy.Setting.spglib())
    except ValueError as error:
        raise CrystalError(f"symmetry search failed (moyopy): {error}") from error
    return _Found("moyopy", found.number, found.symprec, found.orbits, found.wyckoffs,
                  found.site_symmetry_symbols)


@cache
def _spglib() -> Any:
    import spglib

    os.environ.setdefault("SPGLIB_WARNING", "OFF")  # else its C code prints internal retries to stderr
    return spglib


def _search_spglib(crystal: Crystal, symprec: float) -> _Found:
    cell = (crystal.lattice, crystal.positions, [NUMBERS[s] for s in crystal.symbols])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it urges to a global switch
        found = _spglib().get_symmetry_dataset(cell, symprec=symprec, angle_tolerance=_SPGLIB_ANGLE_TOLERANCE)
    if found is None:
        raise CrystalError("symmetry search failed (spglib): no symmetry found")
    number = int(found.number)
    if found.hall_number != hall_number(number):
        raise CrystalError(f"symmetry search (spglib): expected Hall number {hall_number(number)}, "
                           f"found {found.hall_number}")
    return _Found("spglib", number, symprec, found.crystallographic_orbits.tolist(), list(found.wyckoffs),
                  list(found.site_symmetry_symbols))
