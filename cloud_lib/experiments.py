"""The paper's experiments: units trained on folds and seeds, and what they predict.

A long table of predictions has the columns `model`, `task`, `fold`, `seed`, `split`, `material_id`, `row`,
`target`, `prediction`. It is what `results/` keeps and what `scoring` makes every results table from.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cloud_lib import dataset, io, units
from cloud_lib.tokenizer import Tokenizer

PREDICTION_COLUMNS = ["model", "task", "fold", "seed", "split", "material_id", "row", "target", "prediction"]
STAGES = ("run", "restore")
INTERMEDIATE = "CLOUD (intermediate)"  # the encoder learnt labels of other tasks after pre-training
JOINT = "CLOUD (joint)"  # all tasks in one model
ENSEMBLE = "CLOUD (ensemble)"


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


# ------------------------------------------------------------------------------------------ fine-tuning
@dataclass(frozen=True)
class CrossValidation:
    """Which folds and seeds of which data are trained, and where.

    `token_dir` holds one packed folder per task, `out_dir` gets one run per task, model, fold and seed.
    `settings_by_task`: task -> settings that differ from a model's own there, e.g. {"mp_gap": {"epochs": 10}}.
    """

    token_dir: Path
    out_dir: Path
    folds: Sequence[int]
    seeds: Sequence[int]
    settings_by_task: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def folder(self, task: str, model: str, run: str) -> Path:
        """Where a run is."""
        return self.out_dir / task / model / run


def finetune_units(tasks: Iterable[str], configs: Mapping[str, Any], cv: CrossValidation) -> list[dict[str, Any]]:
    """One unit for every model, task, fold and seed.

    Args:
        configs: model name -> its train.FinetuneConfig (fold and seed are set here).
    Raises:
        ValueError: a fold that the task does not have, or an unknown setting.
    """
    found = []
    for task in tasks:
        present = np.unique(np.load(cv.token_dir / task / "labels.npz")["fold"])
        if missing := sorted(set(cv.folds) - set(present.tolist())):
            raise ValueError(f"expected folds of {present.tolist()} for {task}, found {missing}; correct the parameter")
        for model, config in configs.items():
            config = _with_settings(config, cv.settings_by_task.get(task, {}), task)
            found += [_unit(dataclasses.replace(config, fold=fold, seed=seed), cv.token_dir / task,
                            cv.folder(task, model, f"fold{fold}-seed{seed}")) for fold in cv.folds for seed in cv.seeds]
    return found


def intermediate_units(settings: Mapping[str, Any], tasks: Sequence[str], config: Any,
                       cv: CrossValidation) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A unit that learns all labels of well-stocked tasks together, and `finetune_units` that start from its encoder.

    Training on an intermediate task: Phang et al., arXiv:1811.01088. The first unit sees no crystal of the `tasks`
    that follow; what it learns is written to `intermediate` below the tokens.

    Args:
        settings: "tasks" to learn first; all else is what differs from `config` there.
        tasks: the tasks that follow; those learnt first are left out.
    """
    learnt, special = settings["tasks"], {name: value for name, value in settings.items() if name != "tasks"}
    then, data_dir = [task for task in tasks if task not in learnt], cv.token_dir / "intermediate"
    dataset.join({task: cv.token_dir / task for task in learnt}, data_dir, [cv.token_dir / task for task in then])
    before = dataclasses.replace(_with_settings(config, special, "the intermediate tasks"), fold=None, seed=cv.seeds[0])
    first = _unit(before, data_dir, _intermediate_dir(cv))
    return first, finetune_units(then, {INTERMEDIATE: _after_intermediate(config, cv)}, cv)


def joint_units(settings: Mapping[str, Any], tasks: Sequence[str], config: Any, cv: CrossValidation,
                learnt: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One unit for every fold and seed that learns all tasks together, from their rows joined below the tokens.

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
                             f"{[*learnt]}; lower max_rows_compared, or leave after_intermediate out")
        config = _after_intermediate(config, cv)
    dataset.join({task: cv.token_dir / task for task in tasks}, cv.token_dir / "joint")
    return finetune_units(["joint"], {"CLOUD": config}, cv)


def _unit(config: Any, data_dir: Path, out_dir: Path) -> dict[str, Any]:
    return {"kind": "finetune", "config": io.plain(config), "data_dir": str(data_dir), "out_dir": str(out_dir)}


def _intermediate_dir(cv: CrossValidation) -> Path:
    return cv.folder("intermediate", "CLOUD", f"seed{cv.seeds[0]}")


def _after_intermediate(config: Any, cv: CrossValidation) -> Any:
    return dataclasses.replace(config, init=str(_intermediate_dir(cv) / "model"))


def _with_settings(config: Any, settings: dict[str, Any], task: str) -> Any:
    names = [item.name for item in dataclasses.fields(config)]
    if unknown := sorted(set(settings) - set(names)):
        raise ValueError(f"expected settings of {names} for {task}, found {unknown[:3]}; correct settings_by_task or joint")
    return dataclasses.replace(config, **settings)


def finetune(tasks: Iterable[str], configs: Mapping[str, Any], cv: CrossValidation, n_workers: int,
             only_finished: bool = False) -> pd.DataFrame:
    """Train `finetune_units` (same arguments); the long table of their predictions.

    Finished units are not repeated, interrupted ones go on.

    Args:
        n_workers: units side by side.
        only_finished: train nothing, take the units that have finished, such as those imported from another machine.
    """
    return train_and_read(finetune_units(tasks, configs, cv), n_workers, only_finished)


def finetune_after(settings: Mapping[str, Any], tasks: Sequence[str], config: Any, cv: CrossValidation, n_workers: int,
                   only_finished: bool = False) -> pd.DataFrame:
    """Train `intermediate_units`; predictions as `finetune`; no settings: no rows."""
    if not settings:
        return read_predictions([])
    first, then = intermediate_units(settings, tasks, config, cv)
    if not only_finished:
        units.run_units([first], 1)
    return train_and_read(then, n_workers, only_finished)


def finetune_jointly(settings: Mapping[str, Any], tasks: Sequence[str], config: Any, cv: CrossValidation, n_workers: int,
                     only_finished: bool = False, learnt: Sequence[str] = ()) -> pd.DataFrame:
    """Train `joint_units`; predictions as `finetune`, of the model JOINT; no settings: no rows."""
    todo = joint_units(settings, tasks, config, cv, learnt) if settings else []
    return train_and_read(todo, n_workers, only_finished).assign(model=JOINT)


def train_and_read(todo: Sequence[dict[str, Any]], n_workers: int, only_finished: bool) -> pd.DataFrame:
    """Train the fine-tuning units, or (`only_finished`) none; what those that have finished predict."""
    if not only_finished:
        units.run_units(todo, n_workers)
    return read_predictions(units.finished(todo))


def read_predictions(done: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The long table of what finished units of `finetune_units` predicted."""
    return pd.concat([pd.DataFrame(columns=PREDICTION_COLUMNS), *map(_read, done)], ignore_index=True)


def _read(unit: dict[str, Any]) -> pd.DataFrame:
    folder = Path(unit["out_dir"])
    return pd.read_csv(folder / "predictions.csv").assign(model=folder.parent.name)[PREDICTION_COLUMNS]


# ------------------------------------------------------------------------------------ other models beside
def dummy(tasks: Iterable[str], cv: CrossValidation) -> pd.DataFrame:
    """Predictions of the mean over all rows outside the test fold, as MatBench's own dummy."""
    found = [_dummy(cv.token_dir / task, task, fold) for task in tasks for fold in cv.folds]
    return pd.concat([pd.DataFrame(columns=PREDICTION_COLUMNS), *found], ignore_index=True)


def _dummy(folder: Path, task: str, fold: int) -> pd.DataFrame:
    labels = np.load(folder / "labels.npz")
    test = labels["fold"] == fold
    names = np.array(io.read_json(folder / "material_id.json"))
    return pd.DataFrame({"model": "dummy", "task": task, "fold": fold, "seed": 0, "split": "test",
                         "material_id": names[test], "row": labels["row"][test], "target": labels["target"][test],
                         "prediction": labels["target"][~test].mean()})


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


def on_folds_of(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """The rows of those tasks and folds that `model` has finished, so that all are compared on the same crystals."""
    finished = table.loc[(table["model"] == model) & (table["split"] == "test"), ["task", "fold"]].drop_duplicates()
    return table.merge(finished, on=["task", "fold"])


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
