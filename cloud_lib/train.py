"""Pre-training and fine-tuning.

The same call trains on a CPU, one GPU or several (`launch`, or `torchrun -m cloud_lib.train UNIT.json`).
Batches, masks and dropout are functions of (seed, step): a run that was stopped anywhere continues exactly.
"""

import csv
import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cloud_lib import checkpoint, dataset, io, model as models, runtime
from cloud_lib.dataset import PackedTokens
from cloud_lib.loop import Best, Plan, Prepared, RunConfig, fit, prepare
from cloud_lib.model import EncoderConfig, MaskedLM, Packed, Regressor
from cloud_lib.units import launch, run_units, worker_main

__all__ = ["EncoderConfig", "FinetuneConfig", "PretrainConfig", "RunConfig", "evaluate_mlm", "finetune",
           "from_dict", "launch", "pretrain", "run_units", "task_rows", "unit_identity"]


# ---------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class PretrainConfig:
    """Masked-language-model pre-training; the defaults are the paper's (Table 4)."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    epochs: float = 50.0
    n_steps: int | None = None     # instead of epochs
    batch_size: int = 2048         # strings per optimizer step, over all processes and micro-batches
    lr: float = 1e-4
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    clip: float | None = 1.0       # largest gradient norm
    mask_prob: float = 0.15
    val_fraction: float = 0.2
    n_train: int | None = None     # the first so many training rows of a fixed random order; None = all
    n_eval: int | None = 20_000    # validation rows of an evaluation during training; the final one takes all
    n_evals: int = 20              # evaluations during training
    seed: int = 0                  # initial weights, order, masks, dropout
    data_seed: int = 0             # split, and masks of the validation rows, so that runs can be compared
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning of one (task, fold, seed); the defaults are within the paper's Table 4."""

    init: str = "scratch"          # or a model folder, or "hub:OWNER/NAME/SUBFOLDER"
    encoder: EncoderConfig | None = None  # from scratch only
    fold: int | None = 0           # test fold; None = no test rows
    epochs: float = 50.0
    batch_size: int = 32
    lr: float = 1e-4
    head_lr: float | None = None   # None = lr
    layer_decay: float = 1.0       # learning-rate factor per layer below the head; 1 = none
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    clip: float | None = 1.0       # largest gradient norm
    frozen_epochs: float = 0.0     # the head learns alone first
    loss: str = "l1"               # or "huber"
    n_hidden: int = 1              # hidden layers of the head
    hidden_width: int | None = None  # None = the encoder's width
    dropout: float = 0.1           # of the head
    encoder_dropout: float | None = None  # None = as the encoder was configured; less for few epochs on many rows
    min_rows: int = 0              # rows of a joined task with fewer are repeated up to so many per epoch
    val_fraction: float = 0.1      # of the rows outside the test fold
    grouped: bool = True           # equal strings never on both sides of train | val
    n_train: int | None = None     # a random subset of the training rows
    patience: int | None = None    # epochs without a better validation MAE before stopping; None = never
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Configuration from a dictionary, e.g. read from JSON.

    Raises:
        ValueError: a key that the configuration does not have.
    """
    names = [item.name for item in dataclasses.fields(cls)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"expected settings of {cls.__name__}, found unknown {unknown[:3]}; choose from "
                         f"{names}")
    nested = {"encoder": EncoderConfig, "run": RunConfig}
    inner = {name: from_dict(kind, values[name]) for name, kind in nested.items()
             if isinstance(values.get(name), dict)}
    return cls(**values | inner)


# ------------------------------------------------------------------------------------------- pre-training
def pretrain(config: PretrainConfig, data_dir: str | os.PathLike, out_dir: str | os.PathLike,
             restart: bool = False) -> dict[str, Any]:
    """Pre-train one masked language model, or continue, or return the result of the finished run.

    Writes out_dir/{model/, checkpoints/, log.jsonl, result.json}; the model is the one with the best
    validation loss. Losses are in nats per masked token.

    Args:
        restart: replace a run of other settings or data in out_dir instead of refusing.
    Raises:
        ValueError: settings, data, and an earlier run in out_dir do not fit together.
        FloatingPointError, RuntimeError, SystemExit: see loop.fit.
    """
    out_dir, packed = Path(out_dir), PackedTokens.open(data_dir)
    config = dataclasses.replace(config, encoder=models.with_vocab(config.encoder, packed.meta["vocab_size"]))
    packed.require_length(config.encoder.max_positions)
    identity = _identity("pretrain", config, packed)
    with runtime.process(config.run.device, config.run.precision, out_dir) as run:
        if result := _finished(out_dir, identity, run, restart):
            return result
        train_rows, val_rows = dataset.split_rows(packed, config.val_fraction, config.data_seed)
        train_rows = _subset(train_rows, config.n_train, config.data_seed)
        n_eval = min(config.n_eval or len(val_rows), len(val_rows))
        eval_rows = np.sort(_subset(val_rows, n_eval, config.data_seed))
        with models.seeded(config.seed):
            model = MaskedLM(config.encoder).to(run.device)

        def prepare_step(step: int, budget: int) -> Prepared:
            batch = dataset.training_batch(packed, train_rows, config.batch_size, config.mask_prob,
                                           config.seed, step)
            return prepare(batch, max(1, len(batch.masked)), budget, run)

        def evaluate(rows: np.ndarray) -> dict[str, Any]:
            return evaluate_mlm(model, packed, rows, config.mask_prob, config.data_seed, run)

        n_steps = _n_steps(config, len(train_rows), run)
        interval = max(1, n_steps // max(1, config.n_evals))
        best = fit(_plan(config, model, run, n_steps, prepare_step, lambda net, piece: net(piece)[0],
                         lambda: evaluate(eval_rows), lambda step: step % interval == 0), model, run, out_dir,
                   identity)
        final = evaluate(val_rows)
        masks = dataset.evaluation_batches(packed, val_rows, config.mask_prob, config.data_seed)
        result = {"val_loss": final.pop("loss"), "n_val": len(val_rows),
                  "baselines": dataset.frequency_baselines(packed, train_rows, masks)} | final
        return _finish(result, best, model, packed, train_rows, config, identity, out_dir, run)


def evaluate_mlm(model: MaskedLM, packed: PackedTokens, rows: np.ndarray, mask_prob: float, seed: int,
                 run: runtime.Run) -> dict[str, Any]:
    """Loss and accuracy on fixed masks of `rows`; the accuracy also per part of the string."""
    part_of_id = np.asarray(packed.meta["part_of_id"])
    loss, counts = 0.0, np.zeros((2, len(dataset.PARTS)))  # masked tokens, correct ones
    model.eval()
    with torch.inference_mode(), run.autocast():
        for batch in dataset.evaluation_batches(packed, rows, mask_prob, seed):
            for piece in dataset.micro_batches(batch, run.token_budget(None), run.rank, run.world_size):
                piece_loss, logits = model(Packed.of(piece, run.device, run.varlen))
                right = logits.argmax(1).cpu().numpy() == piece.labels
                counts += [np.bincount(part_of_id[labels], minlength=len(dataset.PARTS))
                           for labels in (piece.labels, piece.labels[right])]
                loss += float(piece_loss)
    model.train()
    loss, *flat = run.sum(np.array([loss, *counts.ravel()])).tolist()
    masked, right = np.reshape(flat, counts.shape)
    total = max(1.0, float(masked.sum()))
    by_part = {name: right[i] / masked[i] if masked[i] else None for i, name in enumerate(dataset.PARTS) if i}
    return {"loss": loss / total, "accuracy": float(right.sum()) / total,
            "accuracy_by_part": io.plain(by_part), "n_masked": int(masked.sum())}


# -------------------------------------------------------------------------------------------- fine-tuning
def finetune(config: FinetuneConfig, task_dir: str | os.PathLike, out_dir: str | os.PathLike,
             restart: bool = False) -> dict[str, Any]:
    """Fine-tune one (task, fold, seed), or continue, or return the result of the finished run.

    Targets are z-scored on the training rows; the epoch with the best validation MAE counts (of joined tasks, see
    `dataset.join`: the mean of their MAE in deviations). Writes out_dir/{model/, checkpoints/, log.jsonl,
    predictions.csv, result.json}; MAE in the target's unit, of joined tasks a dictionary.

    Raises: as `pretrain`; also FileNotFoundError when the initial weights are missing.
    """
    out_dir, packed = Path(out_dir), PackedTokens.open(task_dir)
    if config.loss not in ("l1", "huber"):
        raise ValueError(f'expected loss "l1" or "huber", found "{config.loss}"')
    loss_of = F.l1_loss if config.loss == "l1" else F.huber_loss
    rows = task_rows(packed, config)
    targets = _Targets.of(packed, rows["train"])
    bert = _initial_encoder(config, packed)
    packed.require_length(bert.config.max_position_embeddings)
    identity = _identity("finetune", config, packed)
    with runtime.process(config.run.device, config.run.precision, out_dir) as run:
        if result := _finished(out_dir, identity, run, restart):
            return result
        with models.seeded(config.seed + 1):
            model = Regressor(bert, config.n_hidden, config.hidden_width, config.dropout,
                              len(targets.names)).to(run.device)
        learned = targets.repeated(rows["train"], config.min_rows)
        n_train, scaled = len(learned), targets.scaled()

        def prepare_step(step: int, budget: int) -> Prepared:
            chosen = dataset.step_rows(learned, config.batch_size, config.seed, step)
            return prepare(dataset.make_batch(packed, chosen), len(chosen), budget, run, scaled, targets.wanted)

        def predict(split: str) -> np.ndarray:
            return targets.unscaled(_predict_rows(model, packed, rows[split], targets.wanted, run), rows[split])

        def epoch_ends(step: int) -> bool:
            return step * config.batch_size // n_train > (step - 1) * config.batch_size // n_train

        best = fit(_plan(config, model, run, _n_steps(config, n_train, run), prepare_step,
                         lambda net, piece: loss_of(net(piece), piece.target, reduction="sum"),
                         lambda: {"loss": targets.mean_error(predict("val"), rows["val"])}, epoch_ends,
                         round(config.frozen_epochs * n_train / config.batch_size), config.patience),
                   model, run, out_dir, identity)
        predicted = {split: predict(split) for split in ("val", "test")}
        by_task = {f"mae_{split}": targets.mae(values, rows[split]) for split, values in predicted.items()}
        by_task |= {"target_mean": targets.mean.tolist(), "target_std": targets.std.tolist()}
        result = {key: values if packed.meta.get("tasks") else values[0] for key, values in by_task.items()}
        result |= {f"n_{split}": len(rows[split]) for split in rows} | {
            "task": packed.meta.get("task"), "tasks": targets.names, "fold": config.fold,
            "best_epoch": round(best.step * config.batch_size / n_train, 2)}
        if run.rank == 0:
            _write_predictions(out_dir / "predictions.csv", packed, config, targets, rows, predicted)
        return _finish(result, best, model, packed, rows["train"], config, identity, out_dir, run)


@dataclass(frozen=True)
class _Targets:
    """Targets of one task, or of several joined ones: n rows, T tasks."""

    names: list[str]    # of the tasks
    value: np.ndarray   # (n,) in the task's unit
    task: np.ndarray    # (n,) index into names
    mean: np.ndarray    # (T,) over the training rows
    std: np.ndarray     # (T,)

    @classmethod
    def of(cls, packed: PackedTokens, train: np.ndarray) -> "_Targets":
        """Raises ValueError if a task has no training rows."""
        names, labels = packed.meta.get("tasks", [packed.meta.get("task", packed.path.name)]), packed.labels()
        learned = [labels["target"][train[labels["task"][train] == i]] for i in range(len(names))]
        if empty := [name for name, values in zip(names, learned) if not len(values)]:
            raise ValueError(f"expected training rows of every task in {packed.path}, found none of {empty[:3]}; lower "
                             "val_fraction or add data")
        return cls(names, labels["target"], labels["task"], np.array([values.mean() for values in learned]),
                   np.array([values.std() or 1.0 for values in learned]))

    @property
    def wanted(self) -> np.ndarray | None:
        """The model's output that a row wants; None if there is one only."""
        return self.task if len(self.names) > 1 else None

    def scaled(self) -> np.ndarray:
        return (self.value - self.mean[self.task]) / self.std[self.task]

    def unscaled(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return values * self.std[self.task[rows]] + self.mean[self.task[rows]]

    def repeated(self, rows: np.ndarray, min_rows: int) -> np.ndarray:
        """An epoch's rows: those of each task as often as it takes to have min_rows."""
        times = -(-min_rows // np.bincount(self.task[rows], minlength=len(self.names)))
        return np.repeat(rows, np.maximum(1, times)[self.task[rows]])

    def mae(self, predicted: np.ndarray, rows: np.ndarray) -> list[float | None]:
        """One per task, None where it has no rows."""
        error, task = np.abs(predicted - self.value[rows]), self.task[rows]
        return [float(error[task == i].mean()) if np.any(task == i) else None for i in range(len(self.names))]

    def mean_error(self, predicted: np.ndarray, rows: np.ndarray) -> float:
        """Mean over the tasks of MAE / deviation of the training targets."""
        return float(np.mean([mae / std for mae, std in zip(self.mae(predicted, rows), self.std) if mae is not None]))


def task_rows(packed: PackedTokens, config: FinetuneConfig) -> dict[str, np.ndarray]:
    """Rows of "train", "val" and "test", disjoint and sorted; they depend on fold and seed only.

    Rows of joined tasks whose string is tested in another of them are in none of the three.

    Raises:
        ValueError: targets are missing, there are too few rows, or the fold does not exist.
    """
    labels, n = packed.labels(), len(packed)
    missing = np.flatnonzero(~np.isfinite(labels["target"]))
    if len(missing):
        names = packed.material_id()
        raise ValueError(f"expected a finite target in every row of {packed.path}, {len(missing)} of {n} "
                         f"have none, e.g. {[names[i] for i in missing[:3]]}; drop these rows when preparing "
                         "the task")
    folds = sorted(set(labels["fold"][labels["fold"] >= 0].tolist()))
    n_folds = packed.meta.get("n_folds", max(folds, default=-1) + 1)
    if n < n_folds:
        raise ValueError(f"expected at least as many rows as folds ({n_folds}) in {packed.path}, found {n}")
    if config.fold is not None and config.fold not in folds:
        raise ValueError(f"expected a fold with rows in {packed.path}, found fold {config.fold}; choose from "
                         f"{folds}")
    is_test = np.zeros(n, bool) if config.fold is None else labels["fold"] == config.fold
    rest = np.flatnonzero(~is_test & ~_tested_elsewhere(packed, labels["task"], is_test))
    groups = dataset.string_groups(packed, rest) if config.grouped else np.arange(len(rest))
    order = np.random.default_rng([config.seed, 1]).permutation(groups.max(initial=-1) + 1)
    in_val = np.isin(groups, order[:max(1, round(config.val_fraction * len(order)))])
    if in_val.all():
        raise ValueError(f"expected training rows in {packed.path}, found none of {n} outside validation and "
                         "test; lower val_fraction or add data")
    rows = {"train": _subset(rest[~in_val], config.n_train, config.seed), "val": rest[in_val],
            "test": np.flatnonzero(is_test)}
    return {name: np.sort(values) for name, values in rows.items()}


def _tested_elsewhere(packed: PackedTokens, task: np.ndarray, is_test: np.ndarray) -> np.ndarray:
    """Whether a row's string is a test row of another task, (n,)."""
    found = np.zeros(len(packed), bool)
    if task.any():
        groups = dataset.string_groups(packed, np.arange(len(packed)))
        for i in range(int(task.max()) + 1):
            found |= (task != i) & np.isin(groups, groups[is_test & (task == i)])
    return found


def _initial_encoder(config: FinetuneConfig, packed: PackedTokens) -> models.BertModel:
    meta = packed.meta
    if config.init != "scratch":
        bert = models.load_encoder(config.init, meta["vocab_sha256"], meta["vocab_size"])
    elif config.encoder is None:
        raise ValueError('expected encoder=EncoderConfig(...) with init="scratch", found None; name the '
                         "sizes, or give init the folder of a pre-trained model")
    else:
        with models.seeded(config.seed):
            bert = models.BertModel(models.with_vocab(config.encoder, meta["vocab_size"]).bert_config(),
                                    add_pooling_layer=False)
    if config.encoder_dropout is not None:
        models.set_dropout(bert, config.encoder_dropout)
    return bert


def _predict_rows(model: Regressor, packed: PackedTokens, rows: np.ndarray, wanted: np.ndarray | None,
                  run: runtime.Run) -> np.ndarray:
    """Predicted z-scored targets of `rows`, float64 in their order; `wanted`: the output for each row of `packed`."""
    out = np.zeros(len(packed))
    model.eval()
    with torch.inference_mode(), run.autocast():
        batch = dataset.make_batch(packed, rows)
        for piece in dataset.micro_batches(batch, run.token_budget(None), run.rank, run.world_size):
            task = None if wanted is None else wanted[piece.rows]
            found = model(Packed.of(piece, run.device, run.varlen, task=task))
            out[piece.rows] = found.double().cpu().numpy()
    model.train()
    return run.sum(out)[rows]


def _write_predictions(file: Path, packed: PackedTokens, config: FinetuneConfig, targets: _Targets,
                       rows: dict[str, np.ndarray], predicted: dict[str, np.ndarray]) -> None:
    names, labels = packed.material_id(), packed.labels()
    with io.atomic_path(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["material_id", "task", "fold", "seed", "split", "row", "target", "prediction"])
        for split, values in predicted.items():
            for i, value in zip(rows[split], values):
                writer.writerow([names[i], targets.names[targets.task[i]], config.fold, config.seed, split,
                                 labels["row"][i], float(targets.value[i]), float(value)])


# ------------------------------------------------------------------------------------------------ helpers
def _plan(config: PretrainConfig | FinetuneConfig, model: nn.Module, run: runtime.Run, n_steps: int,
          *what: Any) -> Plan:
    """Plan with the settings that both kinds of training share.

    `what`: prepare, loss, evaluate, evaluate_at and, for fine-tuning, frozen_steps and patience.
    Raises:
        ValueError: unknown RunConfig.parallel, or one that cannot be had.
    """
    trained = run.spread(model, config.run.parallel)
    extra = (config.layer_decay, config.head_lr) if isinstance(config, FinetuneConfig) else ()
    optimizer = runtime.make_optimizer(trained, config.lr, config.weight_decay, *extra)
    return Plan(n_steps, *what[:4], trained, optimizer, config.run, config.seed, config.warmup_ratio, config.clip,
                *what[4:])


def _subset(rows: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """The first n of `rows` in a random order that the seed fixes: a smaller set lies inside a larger one.

    Raises:
        ValueError: there are fewer.
    """
    if n is not None and not 0 < n <= len(rows):
        raise ValueError(f"expected n_train from 1 to {len(rows)} (all rows there are), found {n}")
    return rows if n is None else rows[np.random.default_rng([seed, 2]).permutation(len(rows))[:n]]


def _n_steps(config: PretrainConfig | FinetuneConfig, n_train: int, run: runtime.Run) -> int:
    if not run.world_size <= config.batch_size <= n_train:
        raise ValueError(f"expected a batch_size from {run.world_size} (processes) to {n_train} (training "
                         f"rows), found {config.batch_size}; lower it or add data")
    given = config.n_steps if isinstance(config, PretrainConfig) else None
    return given or max(1, round(config.epochs * n_train / config.batch_size))


def _identity(kind: str, config: PretrainConfig | FinetuneConfig, packed: PackedTokens) -> dict[str, Any]:
    """What a result depends on: two runs with the same identity learn the same."""
    settings = io.plain(config)
    del settings["run"]
    if settings.get("init", "scratch") != "scratch" and not settings["init"].startswith("hub:"):
        settings["init"] = "weights " + models.weights_sha256(config.init)[:12]
    return {"kind": kind, "config": settings, "data_sha256": packed.data_sha256,
            "vocab_sha256": packed.meta["vocab_sha256"]}


def unit_identity(unit: dict[str, Any]) -> dict[str, Any]:
    """The identity that a finished unit's identity.json holds.

    Raises:
        FileNotFoundError: its data, or the weights it starts from, are missing.
    """
    packed = PackedTokens.open(unit["data_dir"])
    if unit["kind"] == "finetune":
        return _identity("finetune", from_dict(FinetuneConfig, unit["config"]), packed)
    config = from_dict(PretrainConfig, unit["config"])
    encoder = models.with_vocab(config.encoder, packed.meta["vocab_size"])
    return _identity("pretrain", dataclasses.replace(config, encoder=encoder), packed)


def _finished(out_dir: Path, identity: dict[str, Any], run: runtime.Run,
              restart: bool) -> dict[str, Any] | None:
    """Result of a finished run with this identity; None if it has to be trained (on)."""
    file = out_dir / "identity.json"
    if run.rank == 0:
        found = io.read_json(file) if file.is_file() else identity
        if restart and checkpoint.differences(identity, found):
            for path in (path for path in out_dir.iterdir() if path.name not in (".lock", "unit.json")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        checkpoint.require_same(identity, found if file.is_file() else identity, out_dir)
        io.write_json(file, identity)
    run.barrier()
    return io.read_json(out_dir / "result.json") if (out_dir / "result.json").is_file() else None


def _finish(result: dict[str, Any], best: Best, model: MaskedLM | Regressor, packed: PackedTokens,
            train_rows: np.ndarray, config: PretrainConfig | FinetuneConfig, identity: dict[str, Any],
            out_dir: Path, run: runtime.Run) -> dict[str, Any]:
    """Write model/ and result.json (last: it marks the run as finished); checkpoints are no longer needed."""
    n_params, n_seen = models.encoder_size(model), config.batch_size * best.last_step
    result = result | {
        "n_params_non_embedding": n_params, "n_params_total": models.n_params_total(model),
        "n_examples": len(train_rows), "n_examples_seen": n_seen, "epochs": n_seen / len(train_rows),
        "n_tokens_unique": int(packed.lengths[train_rows].sum()), "n_tokens_seen": best.n_tokens,
        "train_flops": 6 * n_params * best.n_tokens,  # 2 forward, 4 backward (Kaplan et al., 2020)
        "n_steps": best.last_step, "best_step": best.step, "wall_time_s": round(best.elapsed_s, 2),
        "seed": config.seed, "style": packed.meta["style"], "config": io.plain(config),
        "config_hash": io.config_hash(identity), "world_size": run.world_size, "precision": run.precision,
        "threads": torch.get_num_threads(), "device": io.device_name(), "versions": io.versions()}
    result |= {key: identity[key] for key in ("kind", "data_sha256", "vocab_sha256")}
    if run.rank == 0:
        kept = {"kind", "task", "tasks", "fold", "seed", "target_mean", "target_std", "config_hash", "val_loss",
                "mae_val"}
        meta = {key: packed.meta[key] for key in dataset.META_KEYS}
        meta |= {key: value for key, value in result.items() if key in kept}
        models.save_model(model, out_dir / "model", meta, packed.path)
        io.write_json(out_dir / "result.json", result)
        shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)
    run.barrier()
    return io.read_json(out_dir / "result.json")


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv[1:]))
