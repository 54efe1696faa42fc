"""A crystal in memory, and the checks that a symmetry search relies on.

What is not an ordered, three-dimensional crystal of known elements is rejected with a `CrystalError`: partial
occupancy, vacancies written as species, species other than the 118 elements and D, no atoms, numbers that are
not finite, a cell without volume, atoms on top of each other.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from cloud_lib.elements import NUMBERS

MAX_SITES = 5000  # a search in P1 takes seconds here, and grows with the square
MIN_DISTANCE = 0.5  # [A]; two atoms closer than this are one atom written twice, or an error
MIN_VOLUME_PER_SITE = 0.5  # [A^3]; the densest known crystals have more than 3
MAX_LENGTH = 1e4  # [A]; longest accepted cell edge

_SUMS = np.array([n for n in itertools.product((-2, -1, 0, 1, 2), repeat=3) if any(n)])  # (124, 3)


class CrystalError(ValueError):
    """This is not a crystal that a symmetry string can describe; the message is the one-line reason."""


class Crystal(NamedTuple):
    """A crystal: `lattice` rows a, b, c [A], element `symbols`, fractional `positions`."""

    lattice: np.ndarray  # (3, 3) float64
    symbols: tuple[str, ...]  # n symbols out of elements.SYMBOLS
    positions: np.ndarray  # (n, 3) float64


def as_crystal(obj: Any) -> Crystal:
    """A `Crystal` from a pymatgen Structure or its dict, an ASE Atoms, or an OPTIMADE record.

    Raises:
        CrystalError: disordered, of unknown species, or malformed.
    """
    if isinstance(obj, Crystal):
        return obj
    try:
        if isinstance(obj, dict):
            return _from_pymatgen_dict(obj) if "sites" in obj else _from_optimade(obj)
        if hasattr(obj, "get_scaled_positions"):
            symbols = tuple(obj.get_chemical_symbols())
            return Crystal(np.array(obj.cell[:]), symbols, obj.get_scaled_positions(wrap=False))
        if hasattr(obj, "frac_coords"):
            symbols = tuple(_only_species(site.species.as_dict()) for site in obj)
            return Crystal(np.array(obj.lattice.matrix), symbols, np.array(obj.frac_coords))
    except CrystalError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError,
            np.linalg.LinAlgError) as error:
        raise CrystalError(f"malformed structure: {type(error).__name__}: {str(error)[:80]}") from error
    raise CrystalError(
        f"expected a Crystal, a pymatgen Structure or its dict, an ASE Atoms or an OPTIMADE record, "
        f"found {type(obj).__name__}"
    )


def _from_optimade(record: dict) -> Crystal:
    """An OPTIMADE structures entry, whole or only its attributes."""
    entry = record.get("attributes", record)
    lattice = np.array(entry["lattice_vectors"], dtype=float)
    cartesian = np.array(entry["cartesian_site_positions"], dtype=float).reshape(-1, 3)
    if lattice.shape != (3, 3):
        raise CrystalError(f"lattice: expected 3 x 3 numbers, found shape {lattice.shape}")
    names = {s["name"]: _species_symbol(s) for s in entry["species"]}
    symbols = tuple(map(names.__getitem__, entry["species_at_sites"]))
    volume, normals = _normals(lattice)
    if not 0 < abs(volume) < np.inf:
        return Crystal(lattice, symbols, cartesian)  # rejected with its reason by the check of the lattice
    return Crystal(lattice, symbols, cartesian @ (np.array(normals) / volume).T)


def _species_symbol(species: dict) -> str:
    """The element of an OPTIMADE species."""
    symbols, concentration = species["chemical_symbols"], species.get("concentration", [1.0])
    if len(symbols) == 1 and concentration == [1.0] and symbols[0] in NUMBERS:
        return symbols[0]
    return _only_species(dict(zip(symbols, concentration, strict=True)))


def _from_pymatgen_dict(structure: dict) -> Crystal:
    symbols, positions = [], []
    for site in structure["sites"]:
        symbols.append(_only_species({s["element"]: s.get("occu", 1) for s in site["species"]}))
        positions.append(site["abc"])
    return Crystal(np.array(structure["lattice"]["matrix"], dtype=float), tuple(symbols),
                   np.array(positions, dtype=float))


def _only_species(occupancies: dict[str, float]) -> str:
    """The one element of a site; oxidation states are dropped ("Fe3+" -> "Fe")."""
    if len(occupancies) != 1 or abs(next(iter(occupancies.values())) - 1) > 1e-3:
        raise CrystalError(f"disordered site: expected one element with occupancy 1, found {occupancies}")
    (name,) = occupancies
    return name if name in NUMBERS else name.rstrip("+-.0123456789")


def _normals(lattice: np.ndarray) -> tuple[float, list[tuple[float, float, float]]]:
    """Signed volume [A^3], and the normals b x c, c x a, a x b of the cell's faces [A^2]."""
    (a, b, c), (d, e, f), (g, h, i) = lattice.tolist()
    normals = [(e * i - f * h, f * g - d * i, d * h - e * g), (h * c - i * b, i * a - g * c, g * b - h * a),
               (b * f - c * e, c * d - a * f, a * e - b * d)]
    x, y, z = normals[0]
    return a * x + b * y + c * z, normals


def checked_volume(crystal: Crystal) -> float:
    """Volume of the cell [A^3]; raises CrystalError for what no symmetry search should see."""
    n = len(crystal.symbols)
    if crystal.lattice.shape != (3, 3) or crystal.positions.shape != (n, 3) or n == 0:
        raise CrystalError(f"expected a 3 x 3 lattice and n > 0 positions, found shapes "
                           f"{crystal.lattice.shape} and {crystal.positions.shape} for {n} atoms")
    if n > MAX_SITES:
        raise CrystalError(f"too many atoms: expected at most {MAX_SITES}, found {n}")
    unknown = sorted(set(crystal.symbols) - NUMBERS.keys())
    if unknown:
        raise CrystalError(f"unknown species: expected an element or D, found {unknown[:3]}")
    for values in (crystal.lattice, crystal.positions):
        if not np.abs(values).max() <= MAX_LENGTH:  # also true for NaN
            raise CrystalError(f"expected lattice vectors [A] and fractional positions up to {MAX_LENGTH:g} "
                               f"in size, found {values[~(np.abs(values) <= MAX_LENGTH)][:3].tolist()}")
    volume, normals = _normals(crystal.lattice)
    volume = abs(volume)
    if volume < MIN_VOLUME_PER_SITE * n:
        raise CrystalError(f"volume: expected at least {MIN_VOLUME_PER_SITE} A^3 per atom, "
                           f"found {volume / n:.3g}")
    if any(x * x + y * y + z * z > (volume / MIN_DISTANCE) ** 2 for x, y, z in normals):
        _check_translations(crystal.lattice)
    return volume


def _check_translations(lattice: np.ndarray) -> None:
    """Reject a lattice with a vector shorter than MIN_DISTANCE, which puts an atom on top of its own image.

    Impossible where all lattice planes are at least MIN_DISTANCE apart; here sums of up to two of each cell
    vector are tried.
    """
    shortest = np.linalg.norm(_SUMS @ lattice, axis=1).min()
    if shortest < MIN_DISTANCE:
        raise CrystalError(f"lattice: expected translations of at least {MIN_DISTANCE} A, "
                           f"found {shortest:.3g} A")


def check_distances(crystal: Crystal, sites: list[int]) -> None:
    """Reject atoms closer than MIN_DISTANCE to one of the listed `sites`, one per orbit being enough.

    Exact where lattice planes are more than 2 MIN_DISTANCE apart; in narrower cells it may miss a pair.

    Raises:
        CrystalError: overlapping atoms.
    """
    volume, normals = _normals(crystal.lattice)
    areas = [x * x + y * y + z * z for x, y, z in normals]
    smallest = min(areas)  # its lattice planes are the farthest apart
    reach = MIN_DISTANCE * smallest**0.5 / abs(volume)
    along = crystal.positions[:, areas.index(smallest)]
    for start in range(0, len(sites), 256):
        rows = np.array(sites[start : start + 256])
        difference = along[rows, None] - along
        difference -= np.rint(difference)
        first, second = np.nonzero(np.abs(difference, out=difference) < reach)
        first = rows[first]
        distances = _distances(crystal, first, second)
        distances[first == second] = np.inf
        if distances.min() < MIN_DISTANCE:
            k = distances.argmin()
            raise CrystalError(f"overlapping atoms: expected at least {MIN_DISTANCE} A between atoms, found "
                               f"{distances[k]:.3f} A between numbers {first[k] + 1} and {second[k] + 1}")


def _distances(crystal: Crystal, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distances [A] between pairs of atoms, each to the image nearest in fractional coordinates."""
    difference = crystal.positions[first] - crystal.positions[second]
    difference -= np.rint(difference)
    cartesian = difference @ crystal.lattice
    return np.sqrt(np.einsum("ij,ij->i", cartesian, cartesian))
