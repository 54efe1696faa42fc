"""Where crystals and labels come from: one module per origin; fetched, verified, read into our columns.

A task is a pandas DataFrame [material_id, structure, target, fold, row] whose `attrs` say what it is:
`task`, `unit`, `rows` (here), `rows_official`, `folds` ("official" or "own (grouped by formula)"), `source`.
Structures are plain dicts (pymatgen's or OPTIMADE's), not pymatgen objects: those are slow to build.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from cloud_lib import io

if TYPE_CHECKING:
    import pandas as pd


class NotAvailable(LookupError):
    """Data that is not on this machine; the message says what to do."""


class DamagedFile(ValueError):
    """A file whose content is not what it should be; the message says what was expected and found."""


def is_synthetic() -> bool:
    """Whether the data folder is the miniature, whose labels are made up."""
    return (io.raw_dir() / "SYNTHETIC.txt").is_file()


def corpus_files() -> list[Path]:
    """The OPTIMADE JSON Lines files of the corpus below raw_dir(), sorted; none: the embedded crystals are the corpus."""
    return sorted((io.raw_dir() / "corpus").glob("*.jsonl*"))


def load_task(task: str) -> "pd.DataFrame":
    """Table of one MatBench or UnconvBench task: the folder raw_dir() first, then the embedded crystals.

    Raises:
        ValueError: no task has this name.
        NotAvailable: its file is not on this machine.
    """
    from cloud_lib.sources import embedded, matbench, unconvbench

    if task in unconvbench.TASKS:
        return unconvbench.load(task)
    if task not in matbench.TASKS:
        known = [*matbench.TASKS, *unconvbench.TASKS]
        raise ValueError(f"expected a task of {known}, found {task!r}; correct the parameter")
    if matbench.path(task) is None and embedded.has_task(task):
        return embedded.load_task(task)
    return matbench.load(task)
