"""What the experiments start from: benchmarks as strings, packed tokens, and a few well-known crystals."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cloud_lib import curation, io, report, sources
from cloud_lib.representation import STYLES, string
from cloud_lib.sources import optimade
from cloud_lib.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pymatgen.core import Structure

EXAMPLES = {  # name -> space group, cell [a, b, c, alpha, beta, gamma; angstrom, degrees], element -> coordinates
    "rock salt, NaCl": (225, (5.640, 5.640, 5.640, 90, 90, 90), [("Na", (0, 0, 0)), ("Cl", (0.5, 0.5, 0.5))]),
    "rutile, TiO2": (136, (4.594, 4.594, 2.959, 90, 90, 90), [("Ti", (0, 0, 0)), ("O", (0.3053, 0.3053, 0))]),
    "perovskite, BaTiO3": (221, (4.006, 4.006, 4.006, 90, 90, 90),
                           [("Ba", (0, 0, 0)), ("Ti", (0.5, 0.5, 0.5)), ("O", (0.5, 0.5, 0))]),
    "zincblende, ZnS": (216, (5.409, 5.409, 5.409, 90, 90, 90), [("Zn", (0, 0, 0)), ("S", (0.25, 0.25, 0.25))]),
    "zircon, ZrSiO4": (141, (6.607, 6.607, 5.982, 90, 90, 90),
                       [("Zr", (0, 0, 0)), ("Si", (0, 0, 0.5)), ("O", (0, -0.1839, 0.3203))]),
}


def prepare_benchmarks(tasks: Sequence[str], out_dir: Path, symprec: float, symprec_by_task: dict[str, float],
                       n_workers: int) -> pd.DataFrame:
    """Table 3 beside what is here: every task's rows become strings in `out_dir`/<task>.parquet.

    Returns:
        One line per task of the paper's Table 3 that `tasks` names: its benchmark, property and unit, the number of
        usable and of official rows, rejects, folds, symprec [angstrom], source, and whether it is `available`.
    Raises:
        ValueError: `tasks` or `symprec_by_task` names an unknown task.
    """
    paper = report.paper_values("table3_datasets")
    if unknown := sorted({*tasks, *symprec_by_task} - set(paper["task"])):
        raise ValueError(f"expected tasks of {paper['task'].tolist()}, found {unknown[:3]}; correct the parameter")
    paper = paper[paper["task"].isin(tasks)].rename(columns={"size": "rows_official"})
    found = [_prepare(task, out_dir, symprec_by_task.get(task, symprec), n_workers) for task in paper["task"]]
    columns = ["benchmark", "task", "property", "unit", "rows", "rows_official", "rejects", "folds", "symprec",
               "source", "available"]
    return paper.merge(pd.DataFrame(found), on="task", validate="1:1").reindex(columns=columns)


def _prepare(task: str, out_dir: Path, symprec: float, n_workers: int) -> dict[str, Any]:
    try:
        frame = sources.load_task(task)
    except sources.NotAvailable:
        return {"task": task, "available": False, "source": "not here"}
    made = curation.prepare_task(frame, out_dir, task, symprec, n_workers)
    return {"task": task, "available": True, "rows": made["n_usable"], "rejects": sum(made["rejects"].values()),
            "folds": frame.attrs["folds"], "symprec": symprec, "source": frame.attrs["source"]}


def read_benchmarks(file: Path, benchmark: str, tasks: Sequence[str], max_rows: int | None = None) -> pd.DataFrame:
    """The lines of one benchmark in the table of `prepare_benchmarks` that notebook 1 kept, with a column `chosen`.

    Args:
        benchmark: "MatBench" or "UnconvBench".
        tasks: tasks to choose, where they are available.
        max_rows: tasks with more rows are not chosen; None or 0 = no limit.
    Raises:
        FileNotFoundError: the tasks were not prepared.
        ValueError: an unknown task.
    """
    if not file.is_file():
        raise FileNotFoundError(f"expected the table of tasks {file}, found none; run notebook 01_data_curation first")
    table = pd.read_csv(file).query("benchmark == @benchmark").reset_index(drop=True)
    if unknown := sorted(set(tasks) - set(table["task"])):
        raise ValueError(f"expected tasks of {table['task'].tolist()}, found {unknown[:3]}; correct the parameter, or "
                         "add them to notebook 01_data_curation")
    return table.assign(chosen=table["available"] & table["task"].isin(tasks) & _up_to(table, max_rows))


def chosen_tasks(benchmarks: pd.DataFrame, max_rows: int | None = None) -> list[str]:
    """The chosen tasks of `read_benchmarks` with at most max_rows rows; None or 0 = no limit."""
    return benchmarks.loc[benchmarks["chosen"] & _up_to(benchmarks, max_rows), "task"].tolist()


def _up_to(table: pd.DataFrame, max_rows: int | None) -> pd.Series:
    return ~(table["rows"] > (max_rows or np.inf))


def pack(tables: dict[str, Path], style: str, data_dir: Path, exclude_test_crystals: bool) -> dict[str, Any]:
    """Packed tokens of the corpus and of every task below `data_dir`/tokens; the counts of each."""
    tokenizer = Tokenizer.default()
    exclude = curation.exclusion_keys(tables) if exclude_test_crystals and tables else None
    packed = {"corpus": curation.pack_corpus(data_dir / "corpus.parquet", style, tokenizer,
                                             data_dir / "tokens" / "corpus", exclude)}
    return packed | {task: curation.pack_task(path, style, tokenizer, data_dir / "tokens" / task)
                     for task, path in tables.items()}


def harvest_summary() -> pd.DataFrame:
    """A line per OPTIMADE database of the paper's providers: what `make harvest` brought, "not harvested" where nothing.

    Columns `database`, `base_url`, `status`, `pages`, `structures`, `expected`, `requests`, `failures`.
    """
    columns = ["database", "base_url", "status", "pages", "structures", "expected", "requests", "failures"]
    file = io.raw_dir() / "optimade" / "summary.json"
    found = pd.DataFrame(io.read_json(file) if file.is_file() else [], columns=columns)
    known = pd.DataFrame(optimade.known_databases().items(), columns=["database", "base_url"])
    absent = known[~known["database"].isin(found["database"])].assign(status="not harvested")
    return pd.concat([found, absent], ignore_index=True) if len(found) else absent.reindex(columns=columns)


def example_structures() -> "dict[str, Structure]":
    """The crystals of EXAMPLES in their conventional cells."""
    from pymatgen.core import Lattice, Structure

    found = {}
    for name, (space_group, cell, sites) in EXAMPLES.items():
        species, coordinates = zip(*sites)
        found[name] = Structure.from_spacegroup(space_group, Lattice.from_parameters(*cell), species, coordinates)
    return found


def example_strings(symprec: float = 0.01) -> pd.DataFrame:
    """Five well-known crystals in every style: columns `crystal`, then one per style."""
    from cloud_lib.symmetry import symmetry_record

    found = []
    for name, structure in example_structures().items():
        record = symmetry_record(structure, symprec, engine="spglib")
        found.append({"crystal": name} | {style: string(record, style) for style in STYLES})
    return pd.DataFrame(found)
