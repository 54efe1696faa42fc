"""Crystals from files: CIF, POSCAR, extended XYZ, OPTIMADE JSON and JSON Lines, or a folder of them.

A file or entry that cannot be read yields a `CrystalError` in place of its crystal, so that one bad entry
never stops a long run. CIF is read with gemmi and expanded with the operators that the file lists, else with
those of the space group that it names, else as P1.
"""

import gzip
import json
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cloud_lib.crystal import MAX_SITES, Crystal, CrystalError, as_crystal
from cloud_lib.elements import NUMBERS

Entry = tuple[str, Crystal | CrystalError]

MERGE_DISTANCE = 0.2  # [A]; symmetry images of one listed atom that fall closer are one atom
MAX_OPERATORS = 384  # twice those of an F-centred cubic group
_OPERATORS = ("_space_group_symop_operation_xyz", "_space_group_symop.operation_xyz",
              "_symmetry_equiv_pos_as_xyz")
_NAMES = ("_space_group_name_Hall", "_symmetry_space_group_name_Hall", "_space_group_name_H-M_alt",
          "_symmetry_space_group_name_H-M", "_space_group_IT_number", "_symmetry_Int_Tables_number")
_CELL = ("_cell_length_a", "_cell_length_b", "_cell_length_c", "_cell_angle_alpha", "_cell_angle_beta",
         "_cell_angle_gamma")
_SITE = ("_atom_site_label", "?_atom_site_type_symbol", "_atom_site_fract_x", "_atom_site_fract_y",
         "_atom_site_fract_z", "?_atom_site_occupancy", "?_atom_site_disorder_group")


def read_crystals(path: str | Path) -> Iterator[Entry]:
    """(material_id, crystal or the reason why not) of every entry in a file or, recursively, in a folder.

    The material_id is the entry's own id where it has one (OPTIMADE), else the file's stem, with "#2" and so
    on appended from the second entry of a file on.

    Raises:
        FileNotFoundError: no such file or folder, or no readable file in the folder.
    """
    return ((material_id, crystal) for _, material_id, crystal in read_files(path))


def read_files(path: str | Path) -> Iterator[tuple[Path, str, Crystal | CrystalError]]:
    """As `read_crystals`, each entry with its file in front."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _reader(p))
        if not files:
            raise FileNotFoundError(f"{path}: expected CIF, POSCAR, XYZ or OPTIMADE files, found none")
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return ((file, *entry) for file in files for entry in _guarded(file))


def _guarded(path: Path) -> Iterator[Entry]:
    """The entries of one file; what goes wrong inside a third-party parser becomes a reject."""
    reader = _reader(path)
    if reader is None:
        yield path.stem, CrystalError(f"unknown file type {path.name!r}: expected .cif, POSCAR, .extxyz, "
                                      f".json or .jsonl, optionally .gz")
        return
    entries = reader(path)
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                entry = next(entries, None)
        except CrystalError as error:
            entry = (path.stem, error)
        except (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
                AssertionError, RuntimeError, MemoryError) as error:
            reason = f"cannot read {path.name}: {type(error).__name__}: {_one_line(error)}"
            entry = (path.stem, CrystalError(reason))
        if entry is None:
            return
        yield entry


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _reader(path: Path) -> Any:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".cif", ".mcif")):
        return read_cif
    if name.endswith((".extxyz", ".xyz")):
        return _read_xyz
    if name.endswith(".jsonl"):
        return _read_jsonl
    if name.endswith(".json"):
        return _read_json
    if name.endswith((".vasp", ".poscar")) or name.startswith(("poscar", "contcar")):
        return _read_poscar
    return None


def _text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", errors="replace")


def _read_poscar(path: Path) -> Iterator[Entry]:
    from pymatgen.io.vasp import Poscar

    yield path.stem if path.suffix else path.name, as_crystal(Poscar.from_str(_text(path)).structure)


def _read_xyz(path: Path) -> Iterator[Entry]:
    import ase.io

    for index, atoms in enumerate(ase.io.iread(path, index=":", format="extxyz")):
        if not atoms.cell.rank == 3:
            yield _numbered(path, index), CrystalError("no lattice: expected three vectors (Lattice=...)")
        else:
            yield _numbered(path, index), as_crystal(atoms)


def _numbered(path: Path, index: int) -> str:
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    return f"{stem}#{index + 1}" if index else stem


def _read_jsonl(path: Path) -> Iterator[Entry]:
    """OPTIMADE JSON Lines: entries of type structures; header and info lines are skipped."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            if line.strip():
                yield from _json_entries(line, _numbered(path, number))


def _read_json(path: Path) -> Iterator[Entry]:
    yield from _json_entries(_text(path), _numbered(path, 0))


def _json_entries(text: str, name: str) -> Iterator[Entry]:
    """The structures in one JSON document: an OPTIMADE response, one entry, or a pymatgen dict."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield name, CrystalError(f"not JSON: {_one_line(error)}")
        return
    data = document.get("data", document) if isinstance(document, dict) else document
    entries = data if isinstance(data, list) else [data]
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            yield name, CrystalError(f"expected a JSON object per structure, found {type(entry).__name__}")
        elif entry.get("type", "structures") == "structures" and "x-optimade" not in entry:
            yield _json_entry(entry, f"{name}#{index + 1}" if index else name)


def _json_entry(entry: dict, name: str) -> Entry:
    material_id = str(entry.get("id", entry.get("material_id", name)))
    try:
        return material_id, as_crystal(entry.get("structure", entry))
    except CrystalError as error:
        return material_id, error


def read_cif(path: Path) -> Iterator[Entry]:
    """Every data block with atoms."""
    from gemmi import cif

    document = cif.read_string(_text(path))
    blocks = [b for b in document if b.find_value("_cell_length_a") or b.find_values("_atom_site_fract_x")]
    if not blocks:
        raise CrystalError(f"no structure in {path.name}: expected a data block with a cell and atoms")
    for index, block in enumerate(blocks):
        try:
            yield _numbered(path, index), crystal_from_block(block)
        except CrystalError as error:
            yield _numbered(path, index), error


def crystal_from_block(block: Any) -> Crystal:
    """The full unit cell of one CIF block (gemmi.cif.Block).

    Raises:
        CrystalError: no cell or atoms, a site without coordinates, partial occupancy, unknown operators.
    """
    lattice = _lattice(block)
    table = block.find(list(_SITE))
    if not len(table):
        raise CrystalError("no atoms: expected a loop with _atom_site_label and _atom_site_fract_x, y, z")
    symbols = [_site_symbol(row) for row in table]
    positions = _numbers([row[k] for row in table for k in (2, 3, 4)], "fractional coordinate").reshape(-1, 3)
    _check_order(table)
    return _expanded(lattice, symbols, positions, _operators(block))


def _lattice(block: Any) -> np.ndarray:
    a, b, c, *angles = _numbers([block.find_value(tag) or "?" for tag in _CELL], "cell parameter").tolist()
    alpha, beta, gamma = np.cos(np.radians(angles)).tolist()
    squared = 1 - alpha**2 - beta**2 - gamma**2 + 2 * alpha * beta * gamma
    if squared <= 1e-8 or min(a, b, c) <= 0:
        raise CrystalError(f"cell: expected lengths and angles of a cell with volume, "
                           f"found {a, b, c, *angles}")
    sine = (1 - gamma**2) ** 0.5
    return np.array([[a, 0, 0], [b * gamma, b * sine, 0],
                     [c * beta, c * (alpha - beta * gamma) / sine, c * squared**0.5 / sine]])


def _numbers(texts: list[str], what: str) -> np.ndarray:
    """CIF numbers without their standard uncertainties: "0.1234(5)"."""
    try:
        values = np.array([float(text.partition("(")[0]) for text in texts])
    except ValueError as error:
        raise CrystalError(f"{what}: expected a number, {_one_line(error)}") from error
    if not np.isfinite(values).all():
        raise CrystalError(f"{what}: expected finite numbers, "
                           f"found {values[~np.isfinite(values)][:3].tolist()}")
    return values


@cache
def _symbol(text: str) -> str:
    """The element in a type symbol or label: "Fe3+", "O1A" or "CL" -> "Fe", "O", "Cl"."""
    match = re.match(r"[A-Za-z]{1,2}", text.strip("'\""))
    for length in (2, 1):
        symbol = match.group()[:length].capitalize() if match else ""
        if len(symbol) == length and symbol in NUMBERS:
            return symbol
    raise CrystalError(f"unknown species: expected an element or D, found {text!r}")


def _site_symbol(row: Any) -> str:
    return _symbol(row[1] if row.has(1) and row[1] not in ("?", ".") else row[0])


def _check_order(table: Any) -> None:
    """Only fully occupied sites make an ordered crystal."""
    partial = [f"{row[0]} {row[5]}" for row in table
               if row.has(5) and row[5] not in ("?", ".") and abs(float(row[5].partition("(")[0]) - 1) > 1e-3]
    if partial:
        raise CrystalError(f"disordered: {len(partial)} of {len(table)} sites are partly occupied, "
                           f"e.g. {partial[:3]}")


def _operators(block: Any) -> tuple[np.ndarray, np.ndarray]:
    for tag in _OPERATORS:
        triplets = [v.strip("'\"") for v in block.find_values(tag)]
        if triplets:
            return _parse_operators(tuple(triplets))
    for tag in _NAMES:
        name = (block.find_value(tag) or "?").strip("'\"")
        if name not in ("?", "."):
            return _named_operators(name, tag)
    return np.eye(3)[None], np.zeros((1, 3))


@cache
def _parse_operators(triplets: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    import gemmi

    if len(triplets) > MAX_OPERATORS:
        raise CrystalError(f"symmetry operators: expected at most {MAX_OPERATORS}, found {len(triplets)}")
    try:
        operators = [gemmi.Op(triplet) for triplet in triplets]
    except RuntimeError as error:
        raise CrystalError(f"symmetry operator: {_one_line(error)}") from error
    return (np.array([op.rot for op in operators]) / gemmi.Op.DEN,
            np.array([op.tran for op in operators]) / gemmi.Op.DEN)


@cache
def _named_operators(name: str, tag: str) -> tuple[np.ndarray, np.ndarray]:
    import gemmi

    if "Int" in tag or "IT" in tag:
        group = gemmi.find_spacegroup_by_number(int(name)) if name.isdigit() else None
    elif "Hall" in tag:
        return _parse_operators(tuple(op.triplet() for op in gemmi.symops_from_hall(name)))
    else:
        group = gemmi.find_spacegroup_by_name(name)
    if group is None:
        raise CrystalError(f"space group: no operators listed and {tag} {name!r} is unknown")
    return _parse_operators(tuple(op.triplet() for op in group.operations()))


def _expanded(lattice: np.ndarray, symbols: list[str], positions: np.ndarray,
              operators: tuple[np.ndarray, np.ndarray]) -> Crystal:
    """All atoms of the cell; images of one site within MERGE_DISTANCE are one atom."""
    rotations, translations = operators
    if len(rotations) * len(symbols) > 50 * MAX_SITES:
        raise CrystalError(f"too many atoms: {len(symbols)} sites under {len(rotations)} operators")
    if len(rotations) == 1:
        return Crystal(lattice, tuple(symbols), positions)
    images = np.einsum("gij,nj->ngi", rotations, positions) + translations
    kept_symbols, kept = [], []
    for symbol, orbit in zip(symbols, images):
        distinct = orbit[_first_of_each(orbit, lattice)]
        kept.append(distinct)
        kept_symbols += [symbol] * len(distinct)
    return Crystal(lattice, tuple(kept_symbols), np.concatenate(kept))


def _first_of_each(orbit: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """Mask (g,) of the images that do not repeat an earlier one."""
    difference = orbit[:, None] - orbit
    difference -= np.rint(difference)
    cartesian = difference @ lattice
    close = np.einsum("ijk,ijk->ij", cartesian, cartesian) < MERGE_DISTANCE**2
    return close.argmax(axis=1) == np.arange(len(orbit))
