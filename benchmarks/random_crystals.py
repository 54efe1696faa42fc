"""Random crystals of a given space group, and disturbances that leave a crystal what it is.

A crystal is built from the group's exact operations and Wyckoff positions with random free parameters, so
that its group is known without any symmetry finder (it is at least that group; accidental supergroups are
possible).
"""

import re
from fractions import Fraction

import numpy as np

from cloud_lib.spacegroups import WyckoffPosition, operations, wyckoff_positions
from cloud_lib.symmetry import Crystal

ELEMENTS = ("O", "Ti", "Ba", "Na", "Si", "Fe", "C", "Mo")
MAX_ATOMS = 400
MIN_DISTANCE = 0.9  # [A]


def random_crystal(space_group: int, rng: np.random.Generator, tries: int = 300) -> Crystal:
    """2 to 5 orbits of 1 to 4 elements, one of them on the general position in half of the crystals."""
    positions = wyckoff_positions(space_group)
    for _ in range(tries):
        lattice = random_lattice(space_group, rng)
        chosen = [positions[i] for i in rng.integers(0, len(positions), rng.integers(2, 6))]
        if rng.random() < 0.5 or space_group == 1:
            chosen[0] = positions[-1]
        if space_group == 1:  # needs enough atoms not to have an inversion centre
            chosen += [positions[-1]] * 2
        elements = rng.choice(ELEMENTS, size=rng.integers(1, 5), replace=False)
        symbols, atoms = [], []
        for position in chosen:
            orbit = orbit_of(space_group, random_point(position, rng))
            symbols += [str(rng.choice(elements))] * len(orbit)
            atoms.append(orbit)
        crystal = Crystal(lattice, tuple(symbols), np.concatenate(atoms))
        if len(symbols) <= MAX_ATOMS and _spaced(crystal):
            return crystal
    raise RuntimeError(f"space group {space_group}: no random crystal in {tries} tries")


def random_lattice(space_group: int, rng: np.random.Generator) -> np.ndarray:
    """(3, 3) rows [A] of a generic lattice of the group's system; large cells for large groups."""
    scale = 1 + len(operations(space_group)) ** (1 / 3) / 2
    a, b, c = (4 + 4 * rng.random(3)) * scale
    alpha, beta, gamma = np.radians(rng.uniform(70, 115, 3))
    if space_group > 2:
        alpha = gamma = np.pi / 2
    if space_group > 15:
        beta = np.pi / 2
    if space_group > 74:
        b = a
    if 142 < space_group < 195:
        gamma = np.radians(120)
    if space_group > 194:
        c = a
    x, y = np.cos(beta), (np.cos(alpha) - np.cos(beta) * np.cos(gamma)) / np.sin(gamma)
    return np.array([[a, 0, 0], [b * np.cos(gamma), b * np.sin(gamma), 0],
                     [c * x, c * y, c * np.sqrt(1 - x**2 - y**2)]])


def coordinates(position: WyckoffPosition) -> tuple[np.ndarray, np.ndarray]:
    """The representative "x,2x,1/4" as (matrix (3, 3), offset (3,))."""
    matrix, offset = np.zeros((3, 3)), np.zeros(3)
    for row, text in enumerate(position.coordinates.split(",")):
        for sign, number, variable in re.findall(r"([+-]?)(\d+(?:/\d+)?)?([xyz]?)", text):
            if number or variable:
                value = float(Fraction(number or 1)) * (-1 if sign == "-" else 1)
                if variable:
                    matrix[row, "xyz".index(variable)] += value
                else:
                    offset[row] += value
    return matrix, offset


def random_point(position: WyckoffPosition, rng: np.random.Generator) -> np.ndarray:
    """A generic point of a Wyckoff position."""
    matrix, offset = coordinates(position)
    return matrix @ rng.random(3) + offset


def orbit_of(space_group: int, point: np.ndarray) -> np.ndarray:
    """(n, 3) all images of a point in the cell."""
    rotations, translations = (np.array(x, dtype=float) for x in zip(*operations(space_group)))
    images = (rotations @ point + translations) % 1.0
    difference = images[:, None] - images
    same = (np.abs(difference - np.rint(difference)) < 1e-6).all(axis=2)
    return images[same.argmax(axis=1) == np.arange(len(images))]


def _spaced(crystal: Crystal) -> bool:
    difference = crystal.positions[:, None] - crystal.positions
    cartesian = (difference - np.rint(difference)) @ crystal.lattice
    distance = np.linalg.norm(cartesian, axis=2) + np.eye(len(difference)) * 9
    return distance.min() > MIN_DISTANCE


def permuted(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """The atoms in another order."""
    order = rng.permutation(len(crystal.symbols))
    return Crystal(crystal.lattice, tuple(crystal.symbols[i] for i in order), crystal.positions[order])


def supercell(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """Two or three cells in a random direction, atoms reordered."""
    matrix = np.eye(3, dtype=int)
    axis = rng.integers(3)
    matrix[axis] = rng.integers(-1, 2, 3)
    matrix[axis, axis] = rng.integers(2, 4) if len(crystal.symbols) < 150 else 2
    shifts = np.array([np.eye(3)[axis] * k for k in range(matrix[axis, axis])])
    positions = (crystal.positions[:, None] + shifts).reshape(-1, 3) @ np.linalg.inv(matrix)
    symbols = tuple(np.repeat(crystal.symbols, len(shifts)).tolist())
    return permuted(Crystal(matrix @ crystal.lattice, symbols, positions % 1.0), rng)


def other_cell(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """The same lattice spanned by other vectors: two random shears and a permutation of the axes."""
    matrix = np.eye(3, dtype=int)[rng.permutation(3)]
    for _ in range(2):
        i, j = rng.permutation(3)[:2]
        matrix[i] += matrix[j] * rng.choice([-1, 1])
    positions = crystal.positions @ np.linalg.inv(matrix)
    return Crystal(matrix @ crystal.lattice, crystal.symbols, positions % 1.0)


def rotated(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """A rigid rotation of lattice and atoms."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    q *= np.sign(np.linalg.det(q))
    return Crystal(crystal.lattice @ q, crystal.symbols, crystal.positions)


def translated(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """All atoms moved by one random vector: another origin."""
    return Crystal(crystal.lattice, crystal.symbols, (crystal.positions + rng.random(3)) % 1.0)


def noisy(crystal: Crystal, rng: np.random.Generator, size: float = 1e-4) -> Crystal:
    """Each atom moved by `size` [A] in a random direction."""
    step = rng.normal(size=crystal.positions.shape)
    step *= size / np.linalg.norm(step, axis=1, keepdims=True)
    return crystal._replace(positions=crystal.positions + step @ np.linalg.inv(crystal.lattice))


def all_of_these(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """All the above, one after the other."""
    for disturb in (permuted, supercell, other_cell, rotated, translated, noisy):
        crystal = disturb(crystal, rng)
    return crystal


DISTURBANCES = {
    "atom order": permuted, "supercell": supercell, "other cell": other_cell,
    "rotation": rotated, "translation": translated, "noise 1e-4 A": noisy, "all of these": all_of_these,
}
