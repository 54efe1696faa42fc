"""American Mineralogist crystal structure database: experimental structures from an SQLite file.

Downs and Hall-Wallace, Am. Mineral. 88, 247 (2003).
"""

import base64
import json
import re
import sqlite3
from collections.abc import Iterator

import numpy as np

from cloud_lib.sources import DamagedFile, records

_ARRAY_SCALE = 4e6  # coordinates are stored as base64 of little-endian int32 times this
_UNKNOWN = (2.0, 3.0)  # stored in place of "?" and "."


def minerals() -> Iterator[tuple[str, dict]]:
    """Experimental structures: (id, structure), symmetry operations applied; deuterium is hydrogen.

    Records that are no complete ordered crystal (partial occupancy, missing coordinates or hydrogens) yield
    {"error": reason} in place of the structure, so that they can be counted.
    """
    path = records.embedded_file("amcsd_cif1.db")
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        operations = {number: _operations(text) for number, text in
                      connection.execute("select id, symmetry_xyz from spacegroups")}
        for record in connection.execute("select * from cif order by id"):
            yield f"amcsd:{record['id']:05d}", _mineral(record, *operations[record["spacegroup_id"]])
    except sqlite3.DatabaseError as error:
        raise DamagedFile(f"{path} is damaged ({error}); delete it and run make data") from error
    finally:
        connection.close()


def _mineral(record: sqlite3.Row, rotations: np.ndarray, translations: np.ndarray) -> dict:
    if record["atoms_sites"] in (None, "0", '"<missing>"'):
        return {"error": "no coordinates published"}
    published = _formula_elements(record["formula"])
    symbols = [_symbol(label, published) for label in json.loads(record["atoms_sites"])]
    positions = np.stack([_decode(record[f"atoms_{axis}"]) for axis in "xyz"], axis=1)
    occupancies = np.ones(1) if record["atoms_occupancy"] == "0" else _decode(record["atoms_occupancy"])
    if None in symbols or np.isnan(positions).any():
        return {"error": "a site without coordinates, or of water or another group"}
    if (occupancies != 1).any():
        return {"error": f"partial occupancy at {(occupancies != 1).sum()} of {len(symbols)} sites"}
    if missing := published - set(symbols):
        return {"error": f"no coordinates for {', '.join(sorted(missing))} of {record['formula']}"}
    lattice = _cell(record)
    orbits = [_orbit(position, rotations, translations, lattice) for position in positions]
    every = [symbol for symbol, orbit in zip(symbols, orbits, strict=True) for _ in orbit]
    return records.slim_structure(lattice, every, np.concatenate(orbits))


def _cell(record: sqlite3.Row) -> np.ndarray:
    """Lattice vectors (3, 3) [A]; a few numbers are typed as "3,2518" or "6.4235."."""
    values = [float(re.search(r"\d+(\.\d+)?", record[name].replace(",", ".")).group())
              for name in ("a", "b", "c", "alpha", "beta", "gamma")]
    return records.cell_matrix(values[:3], values[3:])


def _formula_elements(formula: str) -> set[str]:
    """Elements of a formula such as "Mg (O2 D2)"; deuterium is hydrogen."""
    return {"H" if symbol == "D" else symbol for symbol in re.findall(r"[A-Z][a-z]?", formula)}


def _symbol(label: str, published: set[str]) -> str | None:
    """Element of a label such as "Ca2", "AlM1", "Ow", "D1": two letters if the formula has them, else one."""
    letters = re.match(r"[A-Za-z]*", str(label)).group()
    if letters.startswith("Wat"):
        return None
    candidates = (letters[:2].capitalize(), "H" if letters[:1] == "D" else letters[:1])
    return next((symbol for symbol in candidates if symbol in published), None)


def _decode(text: str) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(text), "<i4") / _ARRAY_SCALE
    return np.where(np.isin(values, _UNKNOWN), np.nan, values)


def _operations(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Rotations (n, 3, 3) and translations (n, 3) of a list such as ["x,y,z", "1/2-x,y+1/2,-z"]."""
    rows = [[_affine_row(part) for part in operation.split(",")] for operation in json.loads(text)]
    affine = np.array(rows, float)
    return affine[:, :, :3], affine[:, :, 3]


def _affine_row(expression: str) -> list[float]:
    """One row [x, y, z, shift] of an operation, from an expression such as "1/2-x+y"."""
    row = [0.0, 0.0, 0.0, 0.0]
    for sign, term in re.findall(r"([+-]?)\s*([xyz]|\d+(?:\.\d+)?(?:/\d+)?)", expression.lower()):
        factor = -1.0 if sign == "-" else 1.0
        if term in "xyz":
            row["xyz".index(term)] += factor
        else:
            numerator, _, denominator = term.partition("/")
            row[3] += factor * float(numerator) / float(denominator or 1)
    return row


def _orbit(position: np.ndarray, rotations: np.ndarray, translations: np.ndarray, lattice: np.ndarray,
           tolerance: float = 0.05) -> np.ndarray:
    """Distinct images (m, 3) of one position in the cell.

    Published coordinates have 3 to 5 digits: images within `tolerance` [A] of the position are the same atom
    on a special position, and their mean is that position exactly.
    """
    shifts = rotations @ position + translations - position
    shifts -= np.round(shifts)
    stabilizer = np.linalg.norm(shifts @ lattice, axis=1) < tolerance
    images = (rotations @ (position + shifts[stabilizer].mean(axis=0)) + translations) % 1.0
    grid = np.round(images * 1_000_000).astype(np.int64) % 1_000_000  # equal images differ by rounding only
    return images[np.unique(grid @ (10**12, 10**6, 1), return_index=True)[1]]
