"""MatBench v0.1: the eight tasks of the paper's Table 1 on their official folds.

Reads the official files and partial ones (some rows missing) alike: pandas `orient="split"` JSON, whose
index is the official 0-based row number. Dunn et al., npj Comput. Mater. 6, 138 (2020).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_lib import io
from cloud_lib.sources import NotAvailable, records

if TYPE_CHECKING:
    import pandas as pd

FOLD_SEED = 18012019  # KFold(5, shuffle=True, random_state=18012019) over the official row order


class TaskSpec(NamedTuple):
    """One task: its number of official rows, unit, column of the target in the file, and meaning."""

    name: str
    n_official: int
    unit: str
    target_column: str
    description: str


TASKS = {spec.name: spec for spec in (
    TaskSpec("jdft2d", 636, "meV/atom", "exfoliation_en", "exfoliation energy of layered crystals"),
    TaskSpec("phonons", 1265, "1/cm", "last phdos peak", "highest peak of the phonon density of states"),
    TaskSpec("dielectric", 4764, "1", "n", "refractive index"),
    TaskSpec("log_gvrh", 10987, "log10(GPa)", "log10(G_VRH)", "shear modulus, Voigt-Reuss-Hill"),
    TaskSpec("log_kvrh", 10987, "log10(GPa)", "log10(K_VRH)", "bulk modulus, Voigt-Reuss-Hill"),
    TaskSpec("perovskites", 18928, "eV/cell", "e_form", "formation energy of a five-atom perovskite cell"),
    TaskSpec("mp_gap", 106113, "eV", "gap pbe", "PBE band gap"),
    TaskSpec("mp_e_form", 132752, "eV/atom", "e_form", "formation energy"),
)}


def spec(task: str) -> TaskSpec:
    """Description of a task.

    Raises:
        ValueError: no task has this name.
    """
    if task not in TASKS:
        raise ValueError(f"expected a MatBench task of {list(TASKS)}, found {task!r}; correct the parameter")
    return TASKS[task]


def path(task: str) -> Path | None:
    """The task's file below raw_dir(), or None."""
    file = io.raw_dir() / "matbench" / f"matbench_{spec(task).name}.json.gz"
    return file if file.is_file() else None


def material_id(task: str, row: int) -> str:
    """Official identifier of a row: rows count from 1 and are padded to the task's width."""
    n = spec(task).n_official
    return f"mb-{task}-{row + 1:0{len(str(n))}d}"


def official_folds(task: str) -> np.ndarray:
    """Official test fold of every official row, (n_official,) int8; -1 where folds.json.gz lists no row.

    Taken from raw_dir()/matbench/folds.json.gz if it is there, else computed (the two are equal).
    """
    file = io.raw_dir() / "matbench" / "folds.json.gz"
    if not file.is_file():
        return records.kfold(spec(task).n_official, FOLD_SEED)
    folds = np.full(spec(task).n_official, -1, np.int8)
    for fold, rows in enumerate(records.read_json(file)[task]):
        folds[rows] = fold
    return folds


def load(task: str) -> "pd.DataFrame":
    """Rows of one task that are on this machine: [material_id, structure, target, fold, row].

    `fold` is the official test fold 0-4, `row` the official row. `attrs` as described in the package.

    Raises:
        ValueError: unknown task; columns, rows or targets are not those of the task.
        NotAvailable: its file is not below raw_dir().
        DamagedFile: the file is cut short or damaged.
    """
    file = path(task)
    if file is None:
        raise NotAvailable(f"expected the MatBench task {task!r} in {io.raw_dir() / 'matbench'}, found no "
                           f"file; run python -m cloud_lib data 'matbench/matbench_{task}*', or set "
                           "CLOUD_DATA to a folder that has it")
    document = records.read_json(file)
    rows = row_numbers(document["index"], spec(task).n_official, file)
    targets = split_column(document, spec(task).target_column, file)
    structures = split_column(document, "structure", file)
    return table(task, structures, targets, rows, official_folds(task)[rows], file)


def table(task: str, structures: Sequence, targets: Sequence, rows: np.ndarray, folds: np.ndarray,
          file: Path) -> "pd.DataFrame":
    """The task's DataFrame with its `attrs`, checked.

    Raises:
        ValueError: a target is not a number, or a row is in no fold.
    """
    import pandas as pd

    target = np.asarray(targets, float)
    if bad := rows[~np.isfinite(target) | (folds < 0)].tolist():
        raise ValueError(f"{file}: expected a number and a fold 0-4 for every row, found {len(bad)} of "
                         f"{len(rows)} without, e.g. rows {bad[:3]}; delete it and run make data")
    frame = pd.DataFrame({"material_id": [material_id(task, row) for row in rows],
                          "structure": list(structures), "target": target, "fold": folds, "row": rows})
    frame.attrs = {"task": task, "unit": spec(task).unit, "rows": len(frame), "folds": "official",
                   "rows_official": spec(task).n_official, "source": file.name}
    return frame


def row_numbers(index: Sequence, n_official: int, file: Path) -> np.ndarray:
    """Official 0-based rows (n,) int64 from the index of a split JSON: numbers, or names ("mb-phonons-0001").

    Raises:
        ValueError: rows repeat or lie outside the task.
    """
    rows = np.array([int(i.rsplit("-", 1)[1]) - 1 if isinstance(i, str) else i for i in index], np.int64)
    if len(np.unique(rows)) != len(rows) or (len(rows) and not 0 <= rows.min() <= rows.max() < n_official):
        raise ValueError(f"{file}: expected distinct row numbers 0 to {n_official - 1}, found {len(rows)} "
                         f"rows from {rows.min()} to {rows.max()}; delete it and run make data")
    return rows


def split_column(document: dict, name: str, file: Path) -> list:
    """One column of a pandas `orient="split"` document.

    Raises:
        ValueError: it has no such column.
    """
    if name not in document.get("columns", ()):
        raise ValueError(f"{file}: expected the column {name!r}, found {document.get('columns')}; "
                         "delete it and run make data")
    position = document["columns"].index(name)
    return [row[position] for row in document["data"]]


# ------------------------------------------------------------------------------- published predictions
def _leaderboard_files() -> list[Path]:
    return sorted((io.raw_dir() / "matbench" / "leaderboard").glob("*.json.gz"))


def load_leaderboard(tasks: Sequence[str] | None = None) -> "pd.DataFrame":
    """Published predictions of the leaderboard's models: [model, task, row, prediction], in the task's unit.

    Empty (with the same columns) where raw_dir() has no matbench/leaderboard/.
    """
    import pandas as pd

    parts = []
    for file in _leaderboard_files():
        for task, predictions in records.read_json(file).items():
            if task in TASKS and (tasks is None or task in tasks):
                parts.append(pd.DataFrame({"model": file.name.removesuffix(".json.gz"), "task": task,
                                           "row": np.array(list(predictions), np.int64),
                                           "prediction": np.array(list(predictions.values()), float)}))
    if not parts:
        empty = pd.DataFrame(columns=["model", "task", "row", "prediction"])
        return empty.astype({"model": str, "task": str, "row": np.int64, "prediction": float})
    return pd.concat(parts, ignore_index=True).astype({"model": "category", "task": "category"})


def load_published_mae() -> "pd.DataFrame":
    """Published test errors on all official rows: [model, task, mae, std, fold_mae], in the task's unit."""
    import pandas as pd

    rows = [{"model": file.name.removesuffix(".json.gz"), "task": task, "mae": value["mean"],
             "std": value["std"], "fold_mae": value["fold_mae"]}
            for file in _leaderboard_files()
            for task, value in records.read_json(file).get("published_mae", {}).items()]
    return pd.DataFrame(rows, columns=["model", "task", "mae", "std", "fold_mae"])
