"""The training units of a profile, as its notebooks would ask for them, in the order in which they are wanted.

Notebooks 2 to 7 build their settings from their parameters cell; here the same is done for a machine that has no
notebooks. A test runs the notebooks after an import and finds every unit done.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from cloud_lib import ablations, discovery, grid, io, notebook, preparation, scaling_tables
from cloud_lib.dataset import PackedTokens
from cloud_lib.experiments import CrossValidation, finetune_units, intermediate_units, joint_units
from cloud_lib.model import EncoderConfig, with_vocab
from cloud_lib.representation import MAX_POSITIONS
from cloud_lib.train import FinetuneConfig, PretrainConfig

PARTS = ("pretraining", "matbench", "discovery", "unconvbench", "baselines", "scaling", "ablations")
LARGE = 20_000  # rows; of larger tasks fold 0 comes early and the other folds late


class Job(NamedTuple):
    """One unit and when it is wanted.

    `wave`: units of a wave need the weights of earlier waves. `urgency`: small first, within a wave. `publish`: the
    folder that other units start from, to which the finished encoder is copied (and which has to come back).
    """

    unit: dict[str, Any]
    wave: int
    urgency: int
    publish: Path | None = None


def jobs(profiles: Sequence[str], parts: Sequence[str] = PARTS) -> list[Job]:
    """All jobs of the profiles, the most wanted first.

    Order: pre-training; small tasks; fold 0 of the large ones; small tasks from scratch; discovery; UnconvBench; the
    other folds of the large tasks; Table 1's baselines; the scaling grid; ablations. The last two of the first profile
    only: they do not depend on its style.

    Raises:
        FileNotFoundError: notebook 01_data_curation has not run for a profile.
        ValueError: an unknown part or profile, or parameters that do not fit.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"expected parts of {PARTS}, found {unknown[:3]}")
    found = []
    for i, profile in enumerate(profiles):
        todo = [part for part in parts if i == 0 or part not in ("scaling", "ablations")]
        found += [job for part in todo for job in _MAKE[part](profile)]
    return sorted(found, key=lambda job: (job.wave, job.urgency))


def parameters(name: str, profile: str) -> dict[str, Any]:
    """Parameters of a notebook ("03_matbench") in a profile.

    Raises:
        FileNotFoundError: there is no such profile.
        ValueError: see `notebook.check_parameters`.
    """
    source, file = io.root() / "notebooks" / f"{name}.ipynb", io.root() / "params" / profile / f"{name}.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"expected the parameters {file}, found none; choose one of the profiles in params/")
    defaults, given = notebook.parameter_defaults(source), notebook.read_parameters(file)
    notebook.check_parameters(given, defaults, f"{file} for {source.name}")
    return defaults | given | {"profile": profile}


def pretraining_config(profile: str) -> PretrainConfig:
    """Settings of notebook 2."""
    p = parameters("02_pretraining", profile)
    style = parameters("01_data_curation", profile)["style"]
    encoder = EncoderConfig(p["n_layers"], p["n_heads"], max_positions=MAX_POSITIONS[style])
    return PretrainConfig(encoder, epochs=p["epochs"], batch_size=p["batch_size"], lr=p["learning_rate"],
                          mask_prob=p["mask_prob"], warmup_ratio=p["warmup_ratio"], weight_decay=p["weight_decay"],
                          val_fraction=p["val_fraction"], seed=p["seed"])


def _pretraining(profile: str) -> list[Job]:
    data, runs = io.processed_dir(profile), io.checkpoints_dir(profile)
    unit = {"kind": "pretrain", "config": io.plain(pretraining_config(profile)),
            "data_dir": str(data / "tokens" / "corpus"), "out_dir": str(runs / "pretraining")}
    return [Job(unit, 0, 0, runs / "encoder")]


def _with_vocab(profile: str) -> PretrainConfig:
    """Settings of the pre-training as its result repeats them."""
    config = pretraining_config(profile)
    meta = PackedTokens.open(io.processed_dir(profile) / "tokens" / "corpus").meta
    return dataclasses.replace(config, encoder=with_vocab(config.encoder, meta["vocab_size"]))


def _pair(profile: str, p: dict[str, Any]) -> dict[str, FinetuneConfig]:
    """The two starts of notebooks 3 and 5."""
    settings = {"epochs": p["epochs"], "batch_size": p["batch_size"], "lr": p["learning_rate"],
                "warmup_ratio": p["warmup_ratio"], "weight_decay": p["weight_decay"], "n_hidden": p["head_layers"]}
    settings |= {name: p[name] for name in ("frozen_epochs", "val_fraction") if name in p}
    return {"CLOUD": FinetuneConfig(str(io.checkpoints_dir(profile) / "encoder"), **settings),
            "from scratch": FinetuneConfig("scratch", _with_vocab(profile).encoder, **settings)}


def _matbench(profile: str) -> list[Job]:
    p, found = parameters("03_matbench", profile), []
    pair, cv = _pair(profile, p), _cross_validation(profile, "matbench", p)
    table = _benchmarks(profile, "MatBench", p)
    compared = preparation.chosen_tasks(table, p["max_rows_compared"])
    for task, n in table[table["chosen"]].sort_values("rows", kind="stable")[["task", "rows"]].itertuples(index=False):
        for unit in finetune_units([task], pair if task in compared else {"CLOUD": pair["CLOUD"]}, cv):
            scratch, first = unit["config"]["init"] == "scratch", unit["config"]["fold"] == p["folds"][0]
            small = 3 if scratch else 1
            large = 7 if scratch else 2 if first else 6
            found.append(Job(unit, 1, small if n <= LARGE else large))
    if p["intermediate"]:
        first, then = intermediate_units(p["intermediate"], compared, pair["CLOUD"], cv)
        found += [Job(first, 1, 2), *(Job(unit, 2, 3) for unit in then)]
    if p["joint"]:
        wave, learnt = 1 + bool(p["joint"].get("after_intermediate")), p["intermediate"].get("tasks", ())
        found += [Job(unit, wave, 3) for unit in joint_units(p["joint"], compared, pair["CLOUD"], cv, learnt)]
    return found


def _cross_validation(profile: str, part: str, p: dict[str, Any], folds: Sequence[int] | None = None) -> CrossValidation:
    return CrossValidation(io.processed_dir(profile) / "tokens", io.checkpoints_dir(profile) / part,
                           p["folds"] if folds is None else folds, p["seeds"], p.get("settings_by_task", {}))


def _benchmarks(profile: str, benchmark: str, p: dict[str, Any]) -> pd.DataFrame:
    return preparation.read_benchmarks(io.results_dir() / profile / "benchmarks.csv", benchmark, p["tasks"], p["max_rows"])


def _discovery(profile: str) -> list[Job]:
    p, data = parameters("04_discovery", profile), io.processed_dir(profile)
    style = parameters("01_data_curation", profile)["style"]
    _prepare_discovery(data, style, p)
    config = FinetuneConfig(str(io.checkpoints_dir(profile) / "encoder"), epochs=p["epochs"], batch_size=p["batch_size"],
                            lr=p["learning_rate"], warmup_ratio=p["warmup_ratio"], frozen_epochs=p["frozen_epochs"],
                            n_hidden=p["head_layers"], val_fraction=p["val_fraction"],
                            encoder_dropout=p["encoder_dropout"])
    cv = _cross_validation(profile, "discovery", p, [0])
    return [Job(unit, 1, 4) for unit in finetune_units(["discovery"], {"CLOUD": config}, cv)]


def _prepare_discovery(data: Path, style: str, p: dict[str, Any]) -> None:
    """As notebook 4, but once: reading 100,000 structures takes minutes."""
    settings = {"style": style, "symprec": p["symprec"], "max_train_rows": p["max_train_rows"]}
    stamp = data / "tasks" / "discovery.settings.json"
    if not (stamp.is_file() and io.read_json(stamp) == settings and (data / "tokens" / "discovery").is_dir()):
        discovery.prepare(data, style, p["symprec"], p["max_train_rows"] or None, p["n_workers"])
        io.write_json(stamp, settings)


def _unconvbench(profile: str) -> list[Job]:
    p = parameters("05_unconvbench", profile)
    tasks = preparation.chosen_tasks(_benchmarks(profile, "UnconvBench", p))
    cv = _cross_validation(profile, "unconvbench", p)
    return [Job(unit, 1, 5) for unit in finetune_units(tasks, _pair(profile, p), cv)]


def _baselines(profile: str) -> list[Job]:
    p, data = parameters("03_matbench", profile), io.processed_dir(profile)
    out_dir = io.checkpoints_dir(profile) / "baselines"
    chosen = ablations.variants(p["baseline_styles"])
    tasks = preparation.chosen_tasks(_benchmarks(profile, "MatBench", p))
    ablations.pack(chosen, tasks, data)
    first = ablations.pretraining_units(chosen, _with_vocab(profile), data, out_dir)
    then = ablations.finetuning_units(chosen, _pair(profile, p)["CLOUD"], tasks, p["folds"], p["seeds"], data, out_dir,
                                      p["settings_by_task"])
    return [*(Job(unit, 1, 8) for unit in first), *(Job(unit, 2, 8) for unit in then)]


def _scaling(profile: str) -> list[Job]:
    p, data, runs = parameters("06_scaling_law", profile), io.processed_dir(profile), io.checkpoints_dir(profile)
    encoder = EncoderConfig(max_positions=MAX_POSITIONS[parameters("01_data_curation", profile)["style"]])
    config = PretrainConfig(encoder, epochs=p["epochs"], batch_size=p["batch_size"], lr=p["learning_rate"],
                            val_fraction=0.05, n_evals=1)
    todo = grid.scaling_grid(p["layers"], p["heads"], p["n_examples"], p["seeds"], data / "tokens" / "corpus",
                             runs / "scaling", config)
    base = FinetuneConfig(encoder=encoder, epochs=p["finetune_epochs"], batch_size=32, lr=5e-4, warmup_ratio=0.1)
    cv = CrossValidation(data / "tokens", runs / "scaling_finetuned", p["folds"], p["seeds"][:1])
    tuned = finetune_units([p["finetune_task"]], grid.finetune_configs(scaling_tables.edges(todo), base), cv)
    return [*(Job(unit, 1, 9) for unit in todo), *(Job(unit, 2, 9) for unit in tuned)]


def _ablations(profile: str) -> list[Job]:
    p, data, runs = parameters("07_ablations", profile), io.processed_dir(profile), io.checkpoints_dir(profile)
    chosen = ablations.variants(p["styles"], p["mask_probs"])
    tasks = preparation.chosen_tasks(_benchmarks(profile, "MatBench", p | {"max_rows": 0}))
    ablations.pack(chosen, tasks, data)
    pretraining = PretrainConfig(EncoderConfig(p["n_layers"], p["n_heads"]), epochs=p["pretrain_epochs"],
                                 batch_size=p["pretrain_batch_size"], lr=p["pretrain_learning_rate"], val_fraction=0.05,
                                 n_train=p["n_pretrain"] or None, n_evals=1)
    finetuning = FinetuneConfig(epochs=p["epochs"], batch_size=p["batch_size"], lr=p["learning_rate"], warmup_ratio=0.1,
                                n_train=p["n_train"] or None)
    first = ablations.pretraining_units(chosen, pretraining, data, runs / "ablations")
    then = ablations.finetuning_units(chosen, finetuning, tasks, p["folds"], p["seeds"], data, runs / "ablations")
    return [*(Job(unit, 1, 10) for unit in first), *(Job(unit, 2, 10) for unit in then)]


_MAKE = {"pretraining": _pretraining, "matbench": _matbench, "discovery": _discovery, "unconvbench": _unconvbench,
         "baselines": _baselines, "scaling": _scaling, "ablations": _ablations}
