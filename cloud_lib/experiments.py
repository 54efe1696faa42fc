"""The paper's experiments as tables: benchmarks prepared, units trained, predictions collected and scored.

A long table of predictions has the columns `model`, `task`, `fold`, `seed`, `split`, `material_id`, `row`,
`target`, `prediction`. It is what `results/` keeps and what every results table is made from.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cloud_lib import curation, dataset, io, metrics, report, sources, units
from cloud_lib.representation import STYLES, string
from cloud_lib.sources import matbench, optimade
from cloud_lib.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pymatgen.core import Structure

PREDICTION_COLUMNS = ["model", "task", "fold", "seed", "split", "material_id", "row", "target", "prediction"]
SCORE_COLUMNS = ["task", "model", "mae", "mae_std", "rows", "folds", "seeds", "mad"]
STAGES = ("run", "restore")
INTERMEDIATE = "CLOUD (intermediate)"  # the encoder learnt labels of other tasks after pre-training
ENSEMBLE = "CLOUD (ensemble)"
PARTS = ["generator", "wyckoff", "element", "fraction"]  # of a string, in its order
HYPERPARAMETERS = {  # Table 4's name -> ours
    "pretrain": {"bert_hidden_layers": "n_layers", "bert_attention_heads": "n_heads",
                 "max_position_embeddings": "max_positions", "embedding_size": "width", "pretrain_epochs": "epochs",
                 "pretrain_learning_rate": "lr", "pretrain_batch_size": "batch_size",
                 "pretrain_weight_decay": "weight_decay", "pretrain_warmup_ratio": "warmup_ratio"},
    "finetune": {"mlp_hidden_layers": "n_hidden", "mlp_hidden_width": "hidden_width", "finetune_epochs": "epochs",
                 "finetune_learning_rate": "lr", "finetune_batch_size": "batch_size",
                 "finetune_weight_decay": "weight_decay", "finetune_warmup_ratio": "warmup_ratio",
                 "finetune_frozen_encoder_epochs": "frozen_epochs"},
}
EXAMPLES = {  # name -> space group, cell [a, b, c, alpha, beta, gamma; angstrom, degrees], element -> coordinates
    "rock salt, NaCl": (225, (5.640, 5.640, 5.640, 90, 90, 90), [("Na", (0, 0, 0)), ("Cl", (0.5, 0.5, 0.5))]),
    "rutile, TiO2": (136, (4.594, 4.594, 2.959, 90, 90, 90), [("Ti", (0, 0, 0)), ("O", (0.3053, 0.3053, 0))]),
    "perovskite, BaTiO3": (221, (4.006, 4.006, 4.006, 90, 90, 90),
                           [("Ba", (0, 0, 0)), ("Ti", (0.5, 0.5, 0.5)), ("O", (0.5, 0.5, 0))]),
    "zincblende, ZnS": (216, (5.409, 5.409, 5.409, 90, 90, 90), [("Zn", (0, 0, 0)), ("S", (0.25, 0.25, 0.25))]),
    "zircon, ZrSiO4": (141, (6.607, 6.607, 5.982, 90, 90, 90),
                       [("Zr", (0, 0, 0)), ("Si", (0, 0, 0.5)), ("O", (0, -0.1839, 0.3203))]),
}


# ------------------------------------------------------------------------------------------ preparation
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
    small = ~(table["rows"] > (max_rows or np.inf))
    return table.assign(chosen=table["available"] & table["task"].isin(tasks) & small)


def chosen_tasks(benchmarks: pd.DataFrame, max_rows: int | None = None) -> list[str]:
    """The chosen tasks of `read_benchmarks` with at most max_rows rows; None or 0 = no limit."""
    return benchmarks.loc[benchmarks["chosen"] & ~(benchmarks["rows"] > (max_rows or np.inf)), "task"].tolist()


def _prepare(task: str, out_dir: Path, symprec: float, n_workers: int) -> dict[str, Any]:
    try:
        frame = sources.load_task(task)
    except sources.NotAvailable:
        return {"task": task, "available": False, "source": "not here"}
    made = curation.prepare_task(frame, out_dir, task, symprec, n_workers)
    return {"task": task, "available": True, "rows": made["n_usable"], "rejects": sum(made["rejects"].values()),
            "folds": frame.attrs["folds"], "symprec": symprec, "source": frame.attrs["source"]}


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


def pack(tables: dict[str, Path], style: str, data_dir: Path, exclude_test_crystals: bool) -> dict[str, Any]:
    """Packed tokens of the corpus and of every task below `data_dir`/tokens; the counts of each."""
    tokenizer = Tokenizer.default()
    exclude = curation.exclusion_keys(tables) if exclude_test_crystals and tables else None
    packed = {"corpus": curation.pack_corpus(data_dir / "corpus.parquet", style, tokenizer,
                                             data_dir / "tokens" / "corpus", exclude)}
    return packed | {task: curation.pack_task(path, style, tokenizer, data_dir / "tokens" / task)
                     for task, path in tables.items()}


# ------------------------------------------------------------------------------- results kept, and restored
def kept(file: Path, stage: str, compute: Callable[[], Any]) -> Any:
    """`compute()` with its answer kept in `file`, or (`stage` "restore") the answer that was kept.

    Tables go to .csv or .parquet, everything else to .json; what is returned is what was read back, so both stages
    see the same.

    Raises:
        ValueError: `stage` is neither "run" nor "restore".
        FileNotFoundError: "restore", and nothing was kept.
    """
    if stage not in STAGES:
        raise ValueError(f"expected stage of {STAGES}, found {stage!r}; correct the parameter")
    if stage == "run":
        _write(compute(), file)
    if not file.is_file():
        raise FileNotFoundError(f"expected kept results in {file}, found none; run with stage=run first")
    return {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".json": io.read_json}[file.suffix](file)


def _write(answer: Any, file: Path) -> None:
    if file.suffix == ".json":
        io.write_json(file, answer)
        return
    with io.atomic_path(file) as temporary:
        (answer.to_csv if file.suffix == ".csv" else answer.to_parquet)(temporary, index=False)


# ----------------------------------------------------------------------------------------- pre-training
def pretrain(config: Any, data_dir: Path, out_dir: Path, n_processes: int) -> dict[str, Any]:
    """Pre-train with one process per core or GPU, or return the result of the finished run."""
    unit = {"kind": "pretrain", "config": io.plain(config), "data_dir": str(data_dir), "out_dir": str(out_dir)}
    return units.launch(unit, n_processes) if n_processes > 1 else units.run_units([unit], 1)[0]


def publish(run_dir: Path, target: Path) -> Path:
    """Copy the best model of a finished pre-training, with its tokenizer, to `target` (atomic)."""
    with io.atomic_path(target) as temporary:
        shutil.copytree(run_dir / "model", temporary)
        Tokenizer.default().save(temporary)
    return target


def masked_accuracy(result: dict[str, Any]) -> pd.DataFrame:
    """Held-out masked tokens: the model and two baselines that guess by frequency.

    A line per part of the string and one for all tokens with the accuracy of `unigram`, `per-position` and `model`,
    and a last line with their losses [nats per masked token].
    """
    columns = {"unigram": result["baselines"]["unigram"], "per-position": result["baselines"]["position"],
               "model": result | {"loss": result["val_loss"]}}
    table = {name: [*(found["accuracy_by_part"][part] for part in PARTS), found["accuracy"], found["loss"]]
             for name, found in columns.items()}
    return pd.DataFrame({"part": [*PARTS, "all", "loss (nats)"]} | table)


def attention_rows(tokens: list[str], weights: np.ndarray) -> pd.DataFrame:
    """Attention (n, n) between n tokens as rows: `position`, `token`, `attended`, `attended_token`, `weight`."""
    i, j = np.indices(weights.shape).reshape(2, -1)
    names = np.asarray(tokens)
    return pd.DataFrame({"position": i, "token": names[i], "attended": j, "attended_token": names[j],
                         "weight": weights.ravel()})


def training_log(run_dir: Path) -> pd.DataFrame:
    """`log.jsonl` of a run, one row per logged step: `step`, `split`, `loss`."""
    return pd.read_json(run_dir / "log.jsonl", lines=True)[["step", "split", "loss"]]


# ------------------------------------------------------------------------------------------ fine-tuning
def finetune_units(tasks: Iterable[str], token_dir: Path, configs: dict[str, Any], folds: Sequence[int],
                   seeds: Sequence[int], out_dir: Path,
                   settings_by_task: dict[str, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """One unit for every model, task, fold and seed.

    Args:
        token_dir: holds one packed folder per task.
        configs: model name -> its train.FinetuneConfig (fold and seed are set here).
        settings_by_task: task -> settings that differ from the configs' there, e.g. {"mp_gap": {"epochs": 10}}.
    Raises:
        ValueError: a fold that the task does not have, or an unknown setting.
    """
    found = []
    for task in tasks:
        present = np.unique(np.load(token_dir / task / "labels.npz")["fold"])
        if missing := sorted(set(folds) - set(present.tolist())):
            raise ValueError(f"expected folds of {present.tolist()} for {task}, found {missing}; correct the parameter")
        for model, config in configs.items():
            config = _with_settings(config, (settings_by_task or {}).get(task, {}), task)
            found += [{"kind": "finetune", "config": io.plain(dataclasses.replace(config, fold=fold, seed=seed)),
                       "data_dir": str(token_dir / task), "out_dir": str(out_dir / task / model / f"fold{fold}-seed{seed}")}
                      for fold in folds for seed in seeds]
    return found


def _with_settings(config: Any, settings: dict[str, Any], task: str) -> Any:
    names = [item.name for item in dataclasses.fields(config)]
    if unknown := sorted(set(settings) - set(names)):
        raise ValueError(f"expected settings of {names} for {task}, found {unknown[:3]}; correct settings_by_task or joint")
    return dataclasses.replace(config, **settings)


def finetune(tasks: Iterable[str], token_dir: Path, configs: dict[str, Any], folds: Sequence[int],
             seeds: Sequence[int], out_dir: Path, n_workers: int, settings_by_task: dict[str, dict[str, Any]] | None = None,
             only_finished: bool = False) -> pd.DataFrame:
    """Train one unit for every model, task, fold and seed; the long table of their predictions.

    Finished units are not repeated, interrupted ones go on. Arguments as `finetune_units`; `only_finished` trains
    nothing and takes the units that have finished, such as those imported from another machine.
    """
    todo = finetune_units(tasks, token_dir, configs, folds, seeds, out_dir, settings_by_task)
    return train_and_read(todo, n_workers, only_finished)


def train_and_read(todo: Sequence[dict[str, Any]], n_workers: int, only_finished: bool) -> pd.DataFrame:
    """Train the fine-tuning units, or (`only_finished`) none; what those that have finished predict."""
    if not only_finished:
        units.run_units(todo, n_workers)
    return read_predictions(units.finished(todo))


def joint_units(settings: dict[str, Any], tasks: Sequence[str], token_dir: Path, config: Any, folds: Sequence[int],
                seeds: Sequence[int], out_dir: Path, learnt: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One unit for every fold and seed that learns all tasks together, from their rows joined in `token_dir`/joint.

    No such model sees a crystal that it is tested on, not even its label of another task.

    Args:
        settings: what differs from `config`; "after_intermediate": True starts from the encoder of `intermediate_units`.
        learnt: the tasks which that encoder has learnt.
    Raises:
        ValueError: as `finetune_units`; also if it has learnt crystals that would be tested.
    """
    special = {name: value for name, value in settings.items() if name != "after_intermediate"}
    config = _with_settings(config, special, "joint")
    if settings.get("after_intermediate"):
        if not learnt or set(learnt) & set(tasks):
            raise ValueError(f"expected intermediate tasks outside the joint tasks {[*tasks]} for after_intermediate, found "
                             f"{[*learnt]}, whose test crystals it has learnt; lower max_rows_compared, or leave it out")
        config = dataclasses.replace(config, init=str(_intermediate_dir(out_dir, seeds) / "model"))
    dataset.join({task: token_dir / task for task in tasks}, token_dir / "joint")
    return finetune_units(["joint"], token_dir, {"CLOUD": config}, folds, seeds, out_dir)


def finetune_jointly(settings: dict[str, Any], *args: Any, n_workers: int, only_finished: bool = False,
                     **kwargs: Any) -> pd.DataFrame:
    """Train `joint_units` (same arguments); predictions as `finetune`, of "CLOUD (joint)"; no settings: no rows."""
    todo = joint_units(settings, *args, **kwargs) if settings else []
    return train_and_read(todo, n_workers, only_finished).assign(model="CLOUD (joint)")


def _intermediate_dir(out_dir: Path, seeds: Sequence[int]) -> Path:
    return out_dir / "intermediate" / "CLOUD" / f"seed{seeds[0]}"


def intermediate_units(settings: dict[str, Any], tasks: Sequence[str], token_dir: Path, config: Any, folds: Sequence[int],
                       seeds: Sequence[int], out_dir: Path,
                       settings_by_task: dict[str, dict[str, Any]] | None = None) -> tuple[dict, list[dict[str, Any]]]:
    """One unit that learns all labels of well-stocked tasks together, and `finetune_units` that start from its encoder.

    Training on an intermediate task: Phang et al., arXiv:1811.01088. The first unit learns no crystal of the `tasks`
    that follow; what it learns is written to `token_dir`/intermediate.

    Args:
        settings: "tasks" to learn first; all else is what differs from `config` there.
        tasks: the tasks that follow; those learnt first are left out.
    """
    first = settings["tasks"]
    then = [task for task in tasks if task not in first]
    dataset.join({task: token_dir / task for task in first}, token_dir / "intermediate", [token_dir / task for task in then])
    special = {name: value for name, value in settings.items() if name != "tasks"}
    stage = dataclasses.replace(_with_settings(config, special, "the intermediate tasks"), fold=None, seed=seeds[0])
    unit = {"kind": "finetune", "config": io.plain(stage), "data_dir": str(token_dir / "intermediate"),
            "out_dir": str(_intermediate_dir(out_dir, seeds))}
    following = dataclasses.replace(config, init=f"{unit['out_dir']}/model")
    return unit, finetune_units(then, token_dir, {INTERMEDIATE: following}, folds, seeds, out_dir, settings_by_task)


def finetune_after(settings: dict[str, Any], *args: Any, n_workers: int, only_finished: bool = False,
                   **kwargs: Any) -> pd.DataFrame:
    """Train `intermediate_units` (same arguments); predictions as `finetune`; no settings: no rows."""
    if not settings:
        return read_predictions([])
    first, then = intermediate_units(settings, *args, **kwargs)
    if not only_finished:
        units.run_units([first], 1)
    return train_and_read(then, n_workers, only_finished)


def read_predictions(done: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The long table of what finished units of `finetune_units` predicted."""
    return pd.concat([pd.DataFrame(columns=PREDICTION_COLUMNS), *map(_read, done)], ignore_index=True)


def _read(unit: dict[str, Any]) -> pd.DataFrame:
    folder = Path(unit["out_dir"])
    return pd.read_csv(folder / "predictions.csv").assign(model=folder.parent.name)[PREDICTION_COLUMNS]


def ensemble(table: pd.DataFrame, models: Sequence[str] = ("CLOUD", INTERMEDIATE)) -> pd.DataFrame:
    """Test rows predicted by the mean over all `models` and their seeds: model "CLOUD (ensemble)".

    Only tasks with at least two members, and only rows that all members of the task predict.
    """
    rows = table[(table["split"] == "test") & table["model"].isin(models)]
    size = rows.drop_duplicates(["task", "model", "seed"]).groupby("task").size()
    keys = [name for name in PREDICTION_COLUMNS if name not in ("model", "seed", "prediction")]
    means = rows.groupby(keys, sort=False)["prediction"].agg(["mean", "size"]).reset_index()
    means = means[(means["size"] == means["task"].map(size)) & (means["size"] > 1)]
    return means.rename(columns={"mean": "prediction"}).assign(model=ENSEMBLE, seed=0)[PREDICTION_COLUMNS]


def with_profiles(table: pd.DataFrame, profiles: Iterable[str]) -> pd.DataFrame:
    """The predictions and, beside them, those of other profiles on the same tasks: "CLOUD (gpu, canonical)".

    Raises:
        FileNotFoundError: a profile has kept none.
    """
    found = [table]
    for profile in profiles:
        folder = io.results_dir() / profile
        if not (folder / "matbench.parquet").is_file():
            raise FileNotFoundError(f"expected results of profile {profile} in {folder}, found none; run make matbench "
                                    f"PROFILE={profile}, or take it out of the parameter `beside`")
        label = f"CLOUD ({profile}, {io.read_json(folder / 'curation.json')['style']})"
        there = pd.read_parquet(folder / "matbench.parquet", filters=[("model", "==", "CLOUD"), ("split", "==", "test")])
        found.append(there[there["task"].isin(table["task"])].assign(model=label))
    return pd.concat(found, ignore_index=True)


def dummy(token_dir: Path, tasks: Iterable[str], folds: Sequence[int]) -> pd.DataFrame:
    """Predictions of the mean over all rows outside the test fold, as MatBench's own dummy."""
    found = [_dummy(token_dir / task, task, fold) for task in tasks for fold in folds]
    return pd.concat([pd.DataFrame(columns=PREDICTION_COLUMNS), *found], ignore_index=True)


def _dummy(folder: Path, task: str, fold: int) -> pd.DataFrame:
    labels = np.load(folder / "labels.npz")
    test = labels["fold"] == fold
    names = np.array(io.read_json(folder / "material_id.json"))
    return pd.DataFrame({"model": "dummy", "task": task, "fold": fold, "seed": 0, "split": "test",
                         "material_id": names[test], "row": labels["row"][test], "target": labels["target"][test],
                         "prediction": labels["target"][~test].mean()})


# ---------------------------------------------------------------------------------------------- scores
def scores(table: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """MAE per model and task: over each fold's rows, then mean and deviation over folds; seeds are averaged.

    Columns `task`, `model`, `mae`, `mae_std` (unit of the task; over folds, ddof 0 as MatBench), `rows`, `folds`,
    `seeds`, `mad` (mean absolute deviation of the targets, for MAE/MAD).
    """
    found = []
    for (task, model), rows in table[table["split"] == split].groupby(["task", "model"], sort=False):
        by_fold = rows.assign(error=(rows["prediction"] - rows["target"]).abs())
        by_fold = by_fold.groupby(["fold", "seed"])["error"].mean().groupby("fold").mean()
        found.append({"task": task, "model": model, "mae": by_fold.mean(), "mae_std": by_fold.std(ddof=0),
                      "rows": rows["row"].nunique(), "folds": len(by_fold), "seeds": rows["seed"].nunique(),
                      "mad": metrics.mad(rows.drop_duplicates("row")["target"])})
    return pd.DataFrame(found, columns=SCORE_COLUMNS)


def fold_errors(table: pd.DataFrame) -> pd.DataFrame:
    """Test MAE of every model and task in each fold (seeds averaged): columns `task`, `model`, one per fold."""
    test = table[table["split"] == "test"].assign(error=lambda t: (t["prediction"] - t["target"]).abs())
    return test.pivot_table("error", ["task", "model"], "fold", sort=False).reset_index()


def leaderboard(table: pd.DataFrame) -> pd.DataFrame:
    """Published models scored on exactly the rows and folds of our test predictions; empty if there are none."""
    try:
        published = matbench.load_leaderboard()
    except sources.NotAvailable:
        return scores(table[:0])
    ours = table[table["split"] == "test"].drop_duplicates(["task", "row"])[["task", "row", "fold", "material_id",
                                                                             "target"]]
    joined = published[published["model"] != "Dummy"].merge(ours, on=["task", "row"], validate="m:1")
    joined = joined.assign(split="test", seed=0)
    return scores(joined)


def benchmark_table(found: pd.DataFrame, paper: pd.DataFrame, benchmarks: pd.DataFrame, models: Sequence[str],
                    main: str) -> pd.DataFrame:
    """Tables 1 and 2: a line per task; the paper's CLOUD, ours, their ratio, and every other model of `models`.

    A model that has not finished all folds of ours on a task is missing there: other rows are no comparison.

    Args:
        found: `scores` of all models, ours and published ones on the same rows.
        paper: the paper's table; its model CLOUD is compared.
        benchmarks: Table 3 as `prepare_benchmarks` returns it.
        main: the model that is compared with the paper.
    """
    lines = benchmarks[["task", "unit", "rows_official", "folds"]].rename(columns={"folds": "fold origin"})
    ours = found[found["model"] == main].drop(columns="model").rename(columns={"mae": "ours", "mae_std": "ours_std"})
    cloud = paper[paper["model"] == "CLOUD"].rename(columns={"mae_mean": "paper (all rows)",
                                                              "mae_std": "paper (all rows)_std"})
    cloud = cloud.drop(columns=["model", "type"])
    lines = lines.merge(cloud, on="task", how="left", validate="1:1").merge(ours, on="task", how="left", validate="1:1")
    lines["ratio"] = lines["ours"] / lines["paper (all rows)"]
    lines["ours/MAD"] = lines["ours"] / lines["mad"]
    lines.loc[lines["rows"].isna(), "fold origin"] = None
    same_rows = found.merge(lines[["task", "folds", "rows"]], on=["task", "folds", "rows"])
    for model in models:
        rows = same_rows[same_rows["model"] == model].set_index("task")
        lines[model], lines[f"{model}_std"] = lines["task"].map(rows["mae"]), lines["task"].map(rows["mae_std"])
    paper_columns = [c for c in ("paper (all rows)", "paper (all rows)_std") if c in lines]
    order = ["task", "unit", "rows", "rows_official", "folds", "fold origin", "seeds", *paper_columns, "ours",
             "ours_std", "ratio", "ours/MAD"]
    return lines[order + [c for model in models for c in (model, f"{model}_std")]]


def paired_scores(found: pd.DataFrame, pretrained: str, scratch: str) -> pd.DataFrame:
    """Figure 2: a line per task of which both have the same rows, with their `mae_` and `std_`, and the change in per cent."""
    two = found[found["model"].isin([pretrained, scratch])]
    two = two[two.groupby("task")["rows"].transform("nunique") == 1]
    wide = two.pivot(index="task", columns="model", values=["mae", "mae_std"])
    both = pd.MultiIndex.from_product([["mae", "mae_std"], [pretrained, scratch]])
    wide = wide.reindex(index=found["task"].unique(), columns=both)
    table = pd.DataFrame({f"{column}_{name}": wide[value, model] for name, model in (("scratch", scratch),
                          ("pretrained", pretrained)) for column, value in (("mae", "mae"), ("std", "mae_std"))})
    table["change_percent"] = 100 * (table["mae_pretrained"] / table["mae_scratch"] - 1)
    return table.dropna(subset="change_percent").reset_index()


def paper_models(paper: pd.DataFrame, exclude: Sequence[str] = ()) -> pd.DataFrame:
    """The paper's numbers with a line per task and a column per model, marked (paper)."""
    wide = paper[~paper["model"].isin(exclude)].pivot(index="task", columns="model", values="mae_mean")
    wide = wide[[model for model in paper["model"].unique() if model in wide]]
    return wide.add_suffix(" (paper)").reset_index().rename_axis(columns=None)


def hyperparameters(config: dict[str, Any], stage: str) -> pd.DataFrame:
    """Table 4: the paper's values beside those of this profile.

    Args:
        config: the settings that were used.
        stage: "pretrain" or "finetune".
    """
    paper = report.paper_values("table4_hyperparameters").set_index("hyperparameter")["values"]
    ours = [(name, config[key]) for name, key in HYPERPARAMETERS[stage].items() if key in config]
    return pd.DataFrame([{"hyper-parameter": name, "paper": paper[name].replace(";", ", "), "ours": str(value)}
                         for name, value in ours])


def pretraining_note(curated: dict[str, Any]) -> str:
    """What every results table says about its pre-training corpus: strings, symprec, test crystals in or out."""
    n, excluded = curated["packed"]["corpus"]["n"], curated["packed"]["corpus"]["n_excluded"]
    leak = f"{excluded:,} crystals of the test folds left out" if curated["exclude_test_crystals"] else \
        "test crystals not left out, as in the paper"
    note = f"pre-trained on {n:,} {curated['style']} strings ({leak}), symprec {curated['symprec']} angstrom"
    return f"SYNTHETIC LABELS, not a result; {note}" if curated["synthetic"] else note


def summary(table: pd.DataFrame, metric: str, notebook: str) -> pd.DataFrame:
    """Lines of the README's table from a `benchmark_table`."""
    columns = {"paper": "paper (all rows)", "ours": "ours"} | ({"ours, ensemble": ENSEMBLE} if ENSEMBLE in table else {})
    values = {f"{name}{end}": table[f"{column}{end}"] for name, column in columns.items() for end in ("", "_std")
              if f"{column}{end}" in table}
    return pd.DataFrame({"result": table["task"] + f" {metric} (" + table["unit"] + ")"} | values
                        | {"rows": table["rows"], "rows_official": table["rows_official"], "notebook": notebook,
                           "make": notebook.partition("_")[2]})
