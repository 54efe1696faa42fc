"""UnconvBench: the six tasks of the paper's Table 2 on folds KFold(5, shuffle=True, random_state=42).

Files are MatBench's `orient="split"` JSON, compressed or not. The publisher states no units; those given here
are of the quantity's source. Wang et al., arXiv 2407.16131 (2024), figshare.com/articles/dataset/26657428.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cloud_lib import io
from cloud_lib.sources import NotAvailable, records
from cloud_lib.sources.matbench import TaskSpec

if TYPE_CHECKING:
    import pandas as pd

FOLD_SEED = 42

TASKS = {spec.name: spec for spec in (
    TaskSpec("2d_e_exf", 4527, "not stated", "target", "exfoliation energy (2DMatPedia)"),
    TaskSpec("2d_e_tot", 3520, "not stated", "target", "total energy (C2DB)"),
    TaskSpec("2d_gap", 3520, "not stated", "target", "band gap (C2DB)"),
    TaskSpec("qmof", 5106, "not stated", "target", "property of metal-organic frameworks (QMOF)"),
    TaskSpec("supercon", 1058, "K", "Tc", "superconducting transition temperature (JARVIS)"),
    TaskSpec("defected", 530, "eV", "E_vac", "vacancy formation energy, crystal with the vacancy (JARVIS)"),
)}


def path(task: str) -> Path | None:
    """The task's file below raw_dir(), or None.

    Raises:
        ValueError: no task has this name.
    """
    if task not in TASKS:
        raise ValueError(f"expected an UnconvBench task of {list(TASKS)}, found {task!r}; correct the "
                         "parameter")
    files = (io.raw_dir() / "unconvbench" / (task + suffix) for suffix in (".json.gz", ".json"))
    return next(filter(Path.is_file, files), None)


def load(task: str) -> "pd.DataFrame":
    """[material_id, structure, target, fold, row], `attrs` as in matbench.load().

    The folds are official if the file has all official rows; of a shorter file (whose rows are not the
    official ones) they are dealt the same way over the rows that are there.

    Raises:
        ValueError: unknown task; no column of targets; a target that is not a number.
        NotAvailable: its file is not below raw_dir().
        DamagedFile: the file is cut short or damaged.
    """
    import pandas as pd

    file = path(task)
    if file is None:
        raise NotAvailable(f"expected the UnconvBench task {task!r} in {io.raw_dir() / 'unconvbench'}, found "
                           f"no file; run python -m cloud_lib data 'unconvbench/{task}*', or set CLOUD_DATA "
                           "to a folder that has it")
    document = records.read_json(file)
    target = np.array(_targets(document, TASKS[task].target_column, file), float)
    if bad := np.flatnonzero(~np.isfinite(target)).tolist():
        raise ValueError(f"{file}: expected a number for every row, found {len(bad)} of {len(target)} "
                         f"without, e.g. rows {bad[:3]}; delete it and run make data")
    n, official = len(target), TASKS[task].n_official
    frame = pd.DataFrame({
        "material_id": [f"ub-{task}-{row + 1:0{len(str(official))}d}" for row in range(n)],
        "structure": [row[document["columns"].index("structure")] for row in document["data"]],
        "target": target, "fold": records.kfold(n, FOLD_SEED), "row": np.arange(n)})
    frame.attrs = {"task": task, "unit": TASKS[task].unit, "rows": n, "rows_official": official,
                   "folds": "official" if n == official else "own (same seed, fewer rows)",
                   "source": file.name}
    return frame


def _targets(document: dict, column: str, file: Path) -> list:
    """Values of the named column, or of the official files' column "target"."""
    columns = document.get("columns", [])
    name = column if column in columns else "target"
    if name not in columns or "structure" not in columns:
        raise ValueError(f"{file}: expected the columns 'structure' and {column!r} (or 'target'), found "
                         f"{columns}; delete it and run make data")
    return [row[columns.index(name)] for row in document["data"]]
