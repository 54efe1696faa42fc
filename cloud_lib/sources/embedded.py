"""About 20,000 real crystals that packages of the Python index carry: the demo's corpus and labels.

Read from the verified members below embedded_dir() (manifest.yaml names packages, licences and citations).
The crystals of one compound may come from several sources: split by formula, never by row.
"""

import ast
import importlib.util
import itertools
import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cloud_lib import io
from cloud_lib.sources import DamagedFile, NotAvailable, matbench, minerals, records

if TYPE_CHECKING:
    import pandas as pd

MATMINER_TABLES = ("flla_2015", "elastic_tensor", "dielectric_constant", "piezoelectric_tensor")
# MatBench task -> (embedded file, column, logarithm of it?)
TASKS = {"dielectric": ("matbench_dielectric.json.gz", "n", False),
         "log_gvrh": ("elastic_tensor.csv", "G_VRH", True),
         "log_kvrh": ("elastic_tensor.csv", "K_VRH", True),
         "mp_e_form": ("flla_2015.csv", "formation_energy_per_atom", False)}


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
        raise ValueError(f"expected an embedded task of {list(TASKS)}, found {task!r}; set CLOUD_DATA to a "
                         "folder that has it, or correct the parameter")
    name, column, logarithm = TASKS[task]
    if task == "dielectric":
        return _dielectric()
    frame = matminer_table(name.removesuffix(".csv"))
    target = np.log10(frame[column]) if logarithm else frame[column]
    folds = records.kfold_grouped(frame["structure"].map(records.formula), matbench.FOLD_SEED)
    rows = np.arange(len(frame))
    table = matbench.table(task, frame["structure"], target, rows, folds, records.embedded_file(name))
    table["material_id"] = frame["material_id"]
    table.attrs |= {"folds": "own (grouped by formula)"}
    return table


def _dielectric() -> "pd.DataFrame":
    source = records.embedded_file("matbench_dielectric.json.gz")
    document = records.read_json(source)
    rows = np.array([int(key) for key in document["n"]], np.int64)
    n_official = matbench.spec("dielectric").n_official
    if len(rows) != n_official:
        raise DamagedFile(f"{source}: expected {n_official} rows, found {len(rows)}; delete it and run make "
                          "data")
    folds = records.kfold(n_official, matbench.FOLD_SEED)[rows]
    structures, targets = list(document["structure"].values()), list(document["n"].values())
    return matbench.table("dielectric", structures, targets, rows, folds, source)


def corpus() -> Iterator[tuple[str, str, dict]]:
    """All embedded crystals as (material_id, source, structure or {"error": reason}); see minerals.py."""
    for row, structure in zip(itertools.count(), _dielectric()["structure"]):
        yield matbench.material_id("dielectric", row), "matbench_dielectric", structure
    for name in MATMINER_TABLES:
        table = matminer_table(name)
        for material_id, structure in zip(table["material_id"], table["structure"]):
            yield material_id, name, structure
    for material_id, structure in open_catalyst_bulks():
        yield material_id, "open_catalyst_bulks", structure
    for material_id, structure in minerals.minerals():
        yield material_id, "amcsd", structure
    for material_id, structure in prototypes():
        yield material_id, "aflow_prototypes", structure


# --------------------------------------------------------------------------------------- matminer's CSV files
def matminer_table(name: str) -> "pd.DataFrame":
    """One of MATMINER_TABLES with `material_id` (such as "flla_2015:mp-10"), `structure` and its own columns.

    Units as in the file: moduli in GPa, energies in eV/atom.
    """
    import pandas as pd

    path = records.embedded_file(f"{name}.csv")
    with records.checked(path):
        frame = pd.read_csv(path, skiprows=1)  # the first line is the citation
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
_INERT = {("ase.atoms", "Atoms"), ("ase.cell", "Cell"), ("ase.calculators.calculator", "Parameters"),
          ("ase.calculators.singlepoint", "SinglePointCalculator"), ("builtins", "getattr")}
_ARRAYS = {("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
           ("numpy", "ndarray"): ("numpy", "ndarray"), ("numpy", "dtype"): ("numpy", "dtype")}


UNPICKLING_ERRORS = (pickle.UnpicklingError, AttributeError, KeyError, TypeError, IndexError, ValueError)


class RestrictedUnpickler(pickle.Unpickler):
    """Knows NumPy's arrays and inert stand-ins for five other names; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INERT:
            return _Inert
        if (module, name) in _ARRAYS:
            return super().find_class(*_ARRAYS[module, name])
        raise DamagedFile(f"expected a pickle of arrays and of {sorted(_INERT)}, found {module}.{name}; "
                          "delete bulks.pkl and run make data")


def open_catalyst_bulks() -> Iterator[tuple[str, dict]]:
    """Bulk crystals of Open Catalyst 2020: (id, structure); relaxed with RPBE: cells 1-2 % too large."""
    symbols = element_symbols()
    path = records.embedded_file("bulks.pkl")
    with records.checked(path, *UNPICKLING_ERRORS), open(path, "rb") as stream:
        bulks = [(f"open_catalyst_bulks:{bulk['src_id']}", bulk["atoms"]._cellobj.array, bulk["atoms"].arrays)
                 for bulk in RestrictedUnpickler(stream).load()]
    for material_id, lattice, arrays in bulks:
        fractions = np.linalg.solve(lattice.T, arrays["positions"].T).T
        yield material_id, records.slim_structure(lattice, [symbols[z] for z in arrays["numbers"]], fractions)


@cache
def element_symbols() -> tuple[str, ...]:
    """Symbols by atomic number; 0 is empty."""
    from pymatgen.core.periodic_table import Element

    return ("", *(Element.from_Z(z).symbol for z in range(1, 119)))


# -------------------------------------------------------------------------------- AFLOW prototypes (pymatgen)
def prototypes() -> Iterator[tuple[str, dict]]:
    """The 288 prototype crystals that pymatgen ships: (id, structure); Mehl et al., CMS 136, S1 (2017)."""
    package = importlib.util.find_spec("pymatgen.analysis.prototypes")  # not imported: that takes seconds
    entries = records.read_json(Path(package.submodule_search_locations[0], "aflow_prototypes.json.gz"))
    for number, entry in enumerate(entries):
        sites = entry["snl"]["sites"]
        yield f"aflow_prototypes:{number:03d}", records.slim_structure(
            entry["snl"]["lattice"]["matrix"], [site["species"][0]["element"] for site in sites],
            [site["abc"] for site in sites])
