"""Derive cloud_lib/spacegroups.jsonl anew: settings, generators, Wyckoff positions, normalizer permutations.

    python -m benchmarks.derive_wyckoff [OUT.jsonl]        about 8 minutes on one core

Wyckoff letters cannot be derived, they are a convention of International Tables A. They are read off moyo:
random crystals with atoms on special points of the group's own operations are given to it, and its answer
names letter, site symmetry and representative coordinates. All 1,731 positions were found. The permutations
need no convention: `normalizer_steps` finds them from the operations alone.
"""

import itertools
import json
import sys
from pathlib import Path

import moyopy
import numpy as np
import spglib

from benchmarks.random_crystals import coordinates, orbit_of, random_lattice, random_point
from cloud_lib.spacegroups import LETTERS, WyckoffPosition, operations, wyckoff_positions

CELL = 24  # translations of normalizers, too, are multiples of 1/24
GRID = np.array(list(itertools.product(range(CELL), repeat=3)))
SHIFTS = np.array(list(itertools.product((-2, -1, 0, 1, 2), repeat=3)))


def special_point(space_group: int, rng: np.random.Generator) -> np.ndarray | None:
    """A point that one to three random operations leave fixed, or one on a grid of eighths or 24ths."""
    if rng.random() < 0.3:
        n = rng.choice([8, CELL])
        return rng.integers(0, n, 3) / n
    rotations, translations = (np.array(x, dtype=float) for x in zip(*operations(space_group)))
    chosen = rng.integers(0, len(rotations), rng.integers(1, 4))
    matrix = np.concatenate(rotations[chosen] - np.eye(3))
    target = -(translations[chosen] + rng.integers(-1, 2, (len(chosen), 3))).ravel()
    point = np.linalg.lstsq(matrix, target, rcond=None)[0]
    if np.abs(matrix @ point - target).max() > 1e-9:
        return None
    _, singular, basis = np.linalg.svd(matrix)
    free = basis[(singular > 1e-9).sum() :]
    return point + rng.random(len(free)) @ free


def crystal_on_special_points(space_group: int, rng: np.random.Generator) -> moyopy.Cell:
    """General orbits, which fix the group, and a few orbits of other elements on special points."""
    atoms = [orbit_of(space_group, rng.random(3)) for _ in range(4 if space_group < 3 else 2)]
    for _ in range(60):
        point = special_point(space_group, rng)
        if len(atoms) == 6 or point is None:
            continue
        orbit = orbit_of(space_group, point)
        difference = np.concatenate(atoms)[:, None] - orbit
        if np.abs(difference - np.rint(difference)).max(axis=2).min() > 1e-3:
            atoms.append(orbit)
    numbers = [i + 1 for i, orbit in enumerate(atoms) for _ in orbit]
    lattice = 3 * random_lattice(space_group, rng)
    return moyopy.Cell(lattice.tolist(), np.concatenate(atoms).tolist(), numbers)


def derive_positions(space_group: int, rng: np.random.Generator, tries: int = 2000) -> list[WyckoffPosition]:
    """All Wyckoff positions in the order of their letters, once the letters have no gap."""
    found: dict[str, WyckoffPosition] = {}
    for _ in range(tries):
        try:
            dataset = moyopy.MoyoDataset(crystal_on_special_points(space_group, rng),
                                         setting=moyopy.Setting.spglib())
        except ValueError:
            continue
        if dataset.number != space_group:
            continue
        for _, positions in dataset.normalizer_wyckoff_positions().coset_representatives:
            for p in positions:
                found[p.letter] = WyckoffPosition(p.letter, p.multiplicity, p.site_symmetry, p.coordinates)
        table = [found.get(letter) for letter in LETTERS[: len(found)]]
        if None not in table and table[-1].multiplicity == len(operations(space_group)):
            return table
    raise RuntimeError(f"space group {space_group}: letters with gaps after {tries} tries: {sorted(found)}")


def normalizer_steps(space_group: int, rng: np.random.Generator, limit: int = 3000) -> list[str]:
    """Generators of the letter permutations under the affine normalizer, each a string of image letters."""
    positions = wyckoff_positions(space_group)
    points = [random_point(p, rng) for p in positions]
    transformations = affine_normalizer(space_group, rng)
    rng.shuffle(transformations)
    identity = LETTERS[: len(positions)]
    known, steps, idle = {identity}, [], 0
    for matrix, shift in transformations[:limit]:
        image = "".join(letter_at(space_group, matrix @ x + shift) for x in points)
        assert sorted(image) == sorted(identity), (space_group, image)
        if image in known:
            idle += 1
            if idle > 100:
                break
            continue
        steps, idle = [*steps, image], 0
        known = _closed(identity, steps)
    return steps


def _closed(identity: str, steps: list[str]) -> set[str]:
    known, pending = {identity}, [identity]
    tables = [str.maketrans(identity, step) for step in steps]
    while pending:
        images = {word.translate(t) for word in pending for t in tables} - known
        known |= images
        pending = list(images)
    return known


def letter_at(space_group: int, point: np.ndarray) -> str:
    """Letter of the most special position whose orbit contains the point."""
    rotations, translations = (np.array(x, dtype=float) for x in zip(*operations(space_group)))
    images = (rotations @ point + translations) % 1.0
    for position in wyckoff_positions(space_group):
        matrix, offset = coordinates(position)
        left, singular, _ = np.linalg.svd(matrix)
        across = left[:, (singular > 1e-9).sum() :]  # directions that leave the position
        if (np.abs((images[:, None] - offset + SHIFTS) @ across).max(axis=2, initial=0) < 1e-6).any():
            return position.letter
    raise AssertionError("the general position contains every point")


def affine_normalizer(space_group: int, rng: np.random.Generator, n_linear: int = 400) -> list:
    """(matrix, shift) pairs in conventional coordinates that map the group onto itself.

    Linear parts: the unimodular matrices of -1, 0, 1 in the primitive basis, which generate the action on
    letters also where the normalizer is infinite; at most `n_linear` of them. Shifts: multiples of 1/24.
    """
    to_primitive = np.array(moyopy.HallSymbolEntry(spglib_hall(space_group)).centering.linear, dtype=float)
    to_conventional = np.linalg.inv(to_primitive)
    group = moyopy.operations_from_number(space_group, setting=moyopy.Setting.spglib(), primitive=True)
    rotations = np.array(group.rotations)
    translations = np.rint(np.array(group.translations) * CELL).astype(int)
    index = {r.tobytes(): i for i, r in enumerate(rotations)}
    linear = [m for m in _unimodular() if all((m @ r @ _inverse(m)).tobytes() in index for r in rotations)]
    if len(linear) > n_linear:
        linear = [linear[i] for i in rng.choice(len(linear), n_linear, replace=False)]
    found = []
    for m in linear:
        fits = np.ones(len(GRID), dtype=bool)
        for r, t in zip(rotations, translations):
            image = m @ r @ _inverse(m)
            need = translations[index[image.tobytes()]] - m @ t
            fits &= ((GRID @ (np.eye(3, dtype=int) - image).T - need) % CELL == 0).all(axis=1)
        found += [(to_conventional @ m @ to_primitive, to_conventional @ s / CELL) for s in GRID[fits]]
    return found


def _unimodular() -> np.ndarray:
    matrices = np.array(list(itertools.product((-1, 0, 1), repeat=9))).reshape(-1, 3, 3)
    return matrices[np.abs(np.rint(np.linalg.det(matrices))) == 1]


def _inverse(matrix: np.ndarray) -> np.ndarray:
    return np.rint(np.linalg.inv(matrix)).astype(int)


def spglib_hall(space_group: int) -> int:
    """The smallest Hall number of the group."""
    return next(h for h in range(1, 531) if spglib.get_spacegroup_type(h).number == space_group)


def main() -> None:
    """Derive every group's line and write it."""
    from cloud_lib.spacegroups import generator

    out = Path(sys.argv[1] if len(sys.argv) > 1 else "spacegroups.jsonl")
    with out.open("w") as file:
        for n in range(1, 231):
            rng = np.random.default_rng(n)
            positions = derive_positions(n, rng)
            hall = spglib_hall(n)
            kind = spglib.get_spacegroup_type(hall)
            file.write(json.dumps({
                "space_group": n, "hm_symbol": kind.international_short, "hall_number": hall,
                "choice": kind.choice, "generator": generator(n),
                "wyckoff": [[p.multiplicity, p.site_symmetry, p.coordinates] for p in positions],
                "normalizer": normalizer_steps(n, rng)}) + "\n")


if __name__ == "__main__":
    main()
