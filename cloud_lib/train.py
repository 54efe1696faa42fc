"""Pre-training and fine-tuning: one loop for both.

The same call trains on a CPU, one GPU or several (`units.launch`, or `torchrun -m cloud_lib.train UNIT.json`).
Batches, masks and dropout are functions of (seed, step), so a run that was stopped anywhere continues exactly.
"""

import contextlib
import csv
import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from cloud_lib import checkpoint, dataset, io, model as models, runtime
from cloud_lib.dataset import PackedTokens
from cloud_lib.model import EncoderConfig, MaskedLM, Packed, Regressor
from cloud_lib.units import launch, run_units, worker_main  # noqa: F401  (part of this module's interface)


# ---------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class RunConfig:
    """How to run; none of this changes what is learned, so a run may continue under other values."""

    device: str = "auto"           # "cpu", "cuda", "cuda:1"
    precision: str = "auto"        # "bf16", "fp32"
    token_budget: int = 16_384     # tokens per micro-batch; gradients accumulate to the whole batch
    compile: bool | None = None    # torch.compile; None = on a GPU, for runs long enough to earn it back
    log_every: int = 20            # steps
    checkpoint_minutes: float = 5.0
    checkpoint_every: int | None = None  # also every so many steps
    keep_last: int = 2
    progress: bool = True
    tensorboard: bool = False
    wandb_project: str | None = None


@dataclass(frozen=True)
class PretrainConfig:
    """Masked-language-model pre-training; defaults are the paper's (Table 4)."""

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
    data_seed: int = 0             # split and masks of the validation set, so that runs can be compared
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning of one (task, fold, seed); defaults are within the paper's Table 4."""

    init: str = "scratch"          # or a model folder, or "hub:OWNER/NAME/SUBFOLDER"
    encoder: EncoderConfig | None = None  # only from scratch
    fold: int | None = 0           # test fold; None = no test rows
    epochs: float = 50.0
    batch_size: int = 32
    lr: float = 1e-4
    head_lr: float | None = None   # None = lr
    layer_decay: float = 1.0       # learning-rate factor per layer below the head
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    clip: float | None = 1.0
    frozen_epochs: float = 0.0     # the head learns alone first
    loss: str = "l1"               # or "huber"
    n_hidden: int = 1              # hidden layers of the head
    hidden_width: int | None = None  # None = the encoder's width
    dropout: float = 0.1           # of the head; the encoder's own comes with its configuration
    val_fraction: float = 0.1      # of the rows outside the test fold
    grouped: bool = True           # equal strings never on both sides of train | val
    n_train: int | None = None     # a random subset of the training rows
    patience: int | None = None    # epochs without a better validation MAE before stopping; None = all epochs
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Configuration from a dictionary, e.g. read from JSON.

    Raises:
        ValueError: a key that the configuration does not have.
    """
    names = [item.name for item in dataclasses.fields(cls)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"expected settings of {cls.__name__}, found unknown {unknown[:3]}; choose from {names}")
    nested = {"encoder": EncoderConfig, "run": RunConfig}
    return cls(**{name: from_dict(nested[name], value) if name in nested and isinstance(value, dict) else value
                  for name, value in values.items()})


# ------------------------------------------------------------------------------------------- pre-training
def pretrain(config: PretrainConfig, data_dir: str | os.PathLike, out_dir: str | os.PathLike,
             restart: bool = False) -> dict[str, Any]:
    """Pre-train (or continue, or just return the result of) one masked language model.

    Writes out_dir/{model/, checkpoints/, log.jsonl, result.json}; the model is the one with the best validation
    loss. Losses are in nats per masked token.

    Args:
        restart: replace a run of other settings or data in out_dir instead of refusing.
    Raises:
        ValueError: settings, data and an earlier run in out_dir do not fit together.
        FloatingPointError: the loss is not finite.
        SystemExit: SIGTERM came; everything is saved (status 143).
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
        eval_rows = np.sort(_subset(val_rows, min(config.n_eval or len(val_rows), len(val_rows)), config.data_seed))
        n_steps = _n_steps(config, len(train_rows), run)
        with models.seeded(config.seed):
            model = MaskedLM(config.encoder).to(run.device)
        interval = max(1, n_steps // max(1, config.n_evals))

        def prepare(step: int, budget: int) -> Prepared:
            batch = dataset.training_batch(packed, train_rows, config.batch_size, config.mask_prob, config.seed, step)
            return _prepare(batch, max(1, len(batch.masked)), budget, run)

        def evaluate() -> dict[str, float]:
            return evaluate_mlm(model, packed, eval_rows, config.mask_prob, config.data_seed, run, config.run)

        plan = Plan(n_steps, prepare, lambda net, piece: net(piece)[0], evaluate,
                    lambda step: step % interval == 0, config)
        best = _fit(plan, model, run, out_dir, identity)
        final = evaluate_mlm(model, packed, val_rows, config.mask_prob, config.data_seed, run, config.run)
        result = {"val_loss": final.pop("loss")} | final | _counts(model, config, packed, train_rows, best) | {
            "n_val": len(val_rows), "baselines": dataset.frequency_baselines(packed, train_rows, dataset.evaluation_batches(
                packed, val_rows, config.mask_prob, config.data_seed))}
        return _finish(result, best, model, packed, config, identity, out_dir, run)


def evaluate_mlm(model: MaskedLM, packed: PackedTokens, rows: np.ndarray, mask_prob: float, seed: int,
                 run: runtime.Run, config: RunConfig) -> dict[str, Any]:
    """Loss and accuracy on fixed masks of `rows`: all together, and accuracy per part of the string."""
    part_of_id = np.asarray(packed.meta["part_of_id"])
    sums = np.zeros((2, len(dataset.PARTS)))  # masked tokens, correct ones
    loss = 0.0
    model.eval()
    with torch.inference_mode(), run.autocast():
        for i, batch in enumerate(dataset.evaluation_batches(packed, rows, mask_prob, seed, size=512)):
            if i % run.world_size != run.rank:
                continue
            for piece in dataset.micro_batches(batch, config.token_budget):
                piece_loss, logits = model(Packed.of(piece, run.device, run.varlen))
                part = part_of_id[piece.labels]
                right = (logits.argmax(1).cpu().numpy() == piece.labels)
                sums += [np.bincount(part, weights, len(dataset.PARTS)) for weights in (right >= 0, right)]
                loss += float(piece_loss)
    model.train()
    loss, *flat = run.sum(np.concatenate([[loss], sums.ravel()])).tolist()
    masked, right = np.reshape(flat, sums.shape)
    by_part = {name: float(right[i] / masked[i]) if masked[i] else None
               for i, name in enumerate(dataset.PARTS) if i}
    total = max(1.0, masked.sum())
    return {"loss": loss / total, "accuracy": float(right.sum() / total), "accuracy_by_part": by_part,
            "n_masked": int(masked.sum())}


def _counts(model: torch.nn.Module, config: PretrainConfig | FinetuneConfig, packed: PackedTokens,
            train_rows: np.ndarray, best: "Best") -> dict[str, float]:
    n_params = _encoder_size(model)
    n_seen = config.batch_size * best.last_step
    return {"n_params_non_embedding": n_params, "n_params_total": models.n_params_total(model),
            "n_examples": len(train_rows), "n_examples_seen": n_seen, "epochs": n_seen / len(train_rows),
            "n_tokens_unique": int(packed.lengths[train_rows].sum()), "n_tokens_seen": best.n_tokens,
            "train_flops": 6 * n_params * best.n_tokens}


# -------------------------------------------------------------------------------------------- fine-tuning
def finetune(config: FinetuneConfig, task_dir: str | os.PathLike, out_dir: str | os.PathLike,
             restart: bool = False) -> dict[str, Any]:
    """Fine-tune (or continue, or just return the result of) one (task, fold, seed).

    Targets are z-scored on the training rows; the epoch with the best validation MAE counts. Writes
    out_dir/{model/, checkpoints/, log.jsonl, predictions.csv, result.json}; MAE in the target's unit.

    Raises: as `pretrain`; also FileNotFoundError when the initial weights are missing.
    """
    out_dir, packed = Path(out_dir), PackedTokens.open(task_dir)
    target = packed.labels()["target"]
    rows = task_rows(packed, config)
    if config.loss not in ("l1", "huber"):
        raise ValueError(f'expected loss "l1" or "huber", found "{config.loss}"')
    bert = _initial_encoder(config, packed)
    packed.require_length(bert.config.max_position_embeddings)
    identity = _identity("finetune", config, packed)
    with runtime.process(config.run.device, config.run.precision, out_dir) as run:
        if result := _finished(out_dir, identity, run, restart):
            return result
        n_steps = _n_steps(config, len(rows["train"]), run)
        with models.seeded(config.seed + 1):
            model = Regressor(bert, config.n_hidden, config.hidden_width, config.dropout).to(run.device)
        mean, std = float(target[rows["train"]].mean()), float(target[rows["train"]].std()) or 1.0
        scaled = (target - mean) / std
        loss_of = F.l1_loss if config.loss == "l1" else F.huber_loss

        def prepare(step: int, budget: int) -> Prepared:
            chosen = dataset.step_rows(rows["train"], config.batch_size, config.seed, step)
            return _prepare(dataset.make_batch(packed, chosen), len(chosen), budget, run, scaled)

        def evaluate() -> dict[str, float]:
            predicted = predict_rows(model, packed, rows["val"], run, config.run) * std + mean
            return {"loss": float(np.abs(predicted - target[rows["val"]]).mean())}

        def epoch_ends(step: int) -> bool:
            return step * config.batch_size // len(rows["train"]) > (step - 1) * config.batch_size // len(rows["train"])

        frozen_steps = round(config.frozen_epochs * len(rows["train"]) / config.batch_size)
        plan = Plan(n_steps, prepare, lambda net, piece: loss_of(net(piece), piece.target, reduction="sum"), evaluate,
                    epoch_ends, config, frozen_steps, config.patience)
        best = _fit(plan, model, run, out_dir, identity)
        predicted = {split: predict_rows(model, packed, rows[split], run, config.run) * std + mean
                     for split in ("val", "test")}
        mae = {split: float(np.abs(values - target[rows[split]]).mean()) if len(values) else None
               for split, values in predicted.items()}
        result = {"task": packed.meta.get("task"), "fold": config.fold, "mae_val": mae["val"],
                  "mae_test": mae["test"], "target_mean": mean, "target_std": std, "style": packed.meta["style"],
                  "best_epoch": round(best.step * config.batch_size / len(rows["train"]), 2)} | {
                  f"n_{split}": len(rows[split]) for split in rows} | _counts(
                      model, config, packed, rows["train"], best)
        if run.rank == 0:
            _write_predictions(out_dir / "predictions.csv", packed, config, rows, predicted)
        return _finish(result, best, model, packed, config, identity, out_dir, run)


def task_rows(packed: PackedTokens, config: FinetuneConfig) -> dict[str, np.ndarray]:
    """Rows of "train", "val" and "test", disjoint and sorted; they depend on fold and seed only.

    Raises:
        ValueError: targets are missing, there are too few rows, or the fold does not exist.
    """
    labels = packed.labels()
    n, target, fold = len(packed), labels["target"], labels["fold"]
    missing = np.flatnonzero(~np.isfinite(target))
    if len(missing):
        names = packed.material_id()
        raise ValueError(f"expected a finite target in every row of {packed.path}, {len(missing)} of {n} have none, "
                         f"e.g. {[names[i] for i in missing[:3]]}; drop these rows when the task is prepared")
    folds = sorted(set(fold[fold >= 0].tolist()))
    n_folds = packed.meta.get("n_folds", max(folds, default=-1) + 1)
    if n < n_folds:
        raise ValueError(f"expected at least as many rows as folds ({n_folds}) in {packed.path}, found {n}")
    if config.fold is not None and config.fold not in folds:
        raise ValueError(f"expected a fold with rows in {packed.path}, found fold {config.fold}; choose from {folds}")
    is_test = np.zeros(n, bool) if config.fold is None else fold == config.fold
    rest = np.flatnonzero(~is_test)
    groups = dataset.string_groups(packed, rest) if config.grouped else np.arange(len(rest))
    order = np.random.default_rng([config.seed, 1]).permutation(int(groups.max()) + 1)
    n_val = max(1, round(config.val_fraction * len(order)))
    in_val = np.isin(groups, order[:n_val])
    rows = {"train": _subset(rest[~in_val], config.n_train, config.seed), "val": rest[in_val],
            "test": np.flatnonzero(is_test)}
    if not len(rows["train"]):
        raise ValueError(f"expected training rows in {packed.path}, found none of {n} outside validation and test")
    return {name: np.sort(values) for name, values in rows.items()}


def _initial_encoder(config: FinetuneConfig, packed: PackedTokens) -> models.BertModel:
    meta = packed.meta
    if config.init != "scratch":
        return models.load_encoder(config.init, meta["vocab_sha256"], meta["vocab_size"])
    if config.encoder is None:
        raise ValueError('expected encoder=EncoderConfig(...) with init="scratch", found None; name the sizes, or '
                         "give init the folder of a pre-trained model")
    with models.seeded(config.seed):
        return models.BertModel(models.with_vocab(config.encoder, meta["vocab_size"]).bert_config(),
                                add_pooling_layer=False)


def predict_rows(model: Regressor, packed: PackedTokens, rows: np.ndarray, run: runtime.Run,
                 config: RunConfig) -> np.ndarray:
    """Predicted z-scored targets of `rows`, float64 in their order."""
    out = np.zeros(len(packed))
    model.eval()
    with torch.inference_mode(), run.autocast():
        for piece in dataset.micro_batches(dataset.make_batch(packed, rows), config.token_budget, run.rank,
                                           run.world_size) if len(rows) else []:
            out[piece.rows] = model(Packed.of(piece, run.device, run.varlen)).double().cpu().numpy()
    model.train()
    return run.sum(out)[rows]


def _write_predictions(file: Path, packed: PackedTokens, config: FinetuneConfig, rows: dict[str, np.ndarray],
                       predicted: dict[str, np.ndarray]) -> None:
    names, labels, task = packed.material_id(), packed.labels(), packed.meta.get("task", packed.path.name)
    with io.atomic_path(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["material_id", "task", "fold", "seed", "split", "row", "target", "prediction"])
        for split, values in predicted.items():
            for i, value in zip(rows[split], values):
                writer.writerow([names[i], task, "" if config.fold is None else config.fold, config.seed, split,
                                 labels["row"][i], repr(float(labels["target"][i])), repr(float(value))])


# ------------------------------------------------------------------------------------------- the one loop
class Prepared(NamedTuple):
    """One optimizer step's data."""

    pieces: list[Packed]  # this process's micro-batches, on its device
    rows: np.ndarray      # of the whole batch
    n: int                # divisor of the summed loss: masked tokens, or strings, of the whole batch
    n_tokens: int         # of the whole batch


class Plan(NamedTuple):
    """What the loop has to do for one run."""

    n_steps: int
    prepare: Callable[[int, int], Prepared]                  # (step, token budget)
    loss: Callable[[torch.nn.Module, Packed], torch.Tensor]  # summed over a piece
    evaluate: Callable[[], dict[str, Any]]                   # its "loss": the smaller the better
    evaluate_at: Callable[[int], bool]
    config: PretrainConfig | FinetuneConfig
    frozen_steps: int = 0
    patience: int | None = None


@dataclass
class Best:
    """The best model so far and what the run has counted; part of every checkpoint."""

    loss: float = math.inf
    step: int = 0
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    evaluations_since: int = 0
    n_tokens: int = 0
    last_step: int = 0
    elapsed_s: float = 0.0


def _fit(plan: Plan, model: torch.nn.Module, run: runtime.Run, out_dir: Path, identity: dict[str, Any]) -> Best:
    """Train `model` from its last checkpoint to the end and leave the best weights in it."""
    config, how, on_cpu = plan.config, plan.config.run, run.device.type == "cpu" and run.world_size == 1
    optimizer = runtime.make_optimizer(model, config.lr, config.weight_decay, getattr(config, "layer_decay", 1.0),
                                       getattr(config, "head_lr", None))
    start, best = _resume(model, optimizer, out_dir, identity)
    journal = runtime.Journal(out_dir, run, start, plan.n_steps, _encoder_size(model), how.progress, how.tensorboard,
                              how.wandb_project)
    data = runtime.Prefetch(lambda step: plan.prepare(step, how.token_budget), start, plan.n_steps)
    began, saved, net, frozen, losses = time.perf_counter() - best.elapsed_s, time.perf_counter(), None, None, []
    model.train()
    try:
        for step in range(start, plan.n_steps + 1):
            if step > start and (step == plan.n_steps or plan.evaluate_at(step)):
                with journal.paused():
                    _note(best, step, plan.evaluate(), model, journal)
            last = step == plan.n_steps or (plan.patience is not None and best.evaluations_since > plan.patience)
            stop = (on_cpu or step % how.log_every == 0) and run.should_stop()
            due = (time.perf_counter() - saved > 60 * how.checkpoint_minutes
                   or (how.checkpoint_every is not None and step % how.checkpoint_every == 0))
            if step > start and (last or stop or due):
                with journal.paused():
                    _check_finite(losses, step, plan, out_dir)
                    best.last_step, best.elapsed_s = step, time.perf_counter() - began
                    _save(best, model, optimizer, out_dir, identity, how.keep_last, run)
                saved = time.perf_counter()
            if stop:
                journal.say(f"stopped by SIGTERM after step {step}; saved, run again to continue")
                raise SystemExit(143)
            if last:
                break
            if frozen != (step < plan.frozen_steps):
                frozen = step < plan.frozen_steps
                net = _network(model, frozen, plan, run)
            batch = data.get()
            factor = runtime.learning_rate(step, plan.n_steps, config.warmup_ratio)
            losses.append(_step(net, model, optimizer, batch, plan, run, factor, step))
            best.n_tokens += batch.n_tokens
            journal.count(len(batch.rows), batch.n_tokens)
            log = (step + 1) % how.log_every == 0 or step + 1 == plan.n_steps
            if log or on_cpu:
                _check_finite(losses[-1:] if on_cpu else losses, step + 1, plan, out_dir)
            if log:
                mean = float(run.sum(torch.stack(losses).double().mean().cpu().numpy()))
                journal.train(step + 1, mean, config.lr * factor, data.take_wait_s())
                losses = []
    finally:
        data.close()
        journal.close()
    model.load_state_dict(best.state)
    return best


def _network(model: torch.nn.Module, frozen: bool, plan: Plan, run: runtime.Run) -> torch.nn.Module:
    """The model as the loop calls it, with the encoder frozen or not."""
    for parameter in (model.bert if isinstance(model, Regressor) else model).parameters():
        parameter.requires_grad_(not frozen)
    wanted = plan.config.run.compile
    compiled = wanted if wanted is not None else run.device.type == "cuda" and plan.n_steps >= 500
    return run.wrap(torch.compile(model, dynamic=True) if compiled else model)


def _step(net: torch.nn.Module, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Prepared, plan: Plan,
          run: runtime.Run, factor: float, step: int) -> torch.Tensor:
    """One optimizer step; returns this process's share of the batch's mean loss (still on the device)."""
    torch.manual_seed(runtime.step_seed(plan.config.seed, step, run.rank))  # dropout
    total = torch.zeros((), device=run.device)
    try:
        for i, piece in enumerate(batch.pieces):
            more = i + 1 < len(batch.pieces)
            with net.no_sync() if more and run.world_size > 1 else contextlib.nullcontext():
                with run.autocast():
                    loss = plan.loss(net, piece)
                (loss * (run.world_size / batch.n)).backward()  # DDP averages over the processes
            total += loss.detach() / batch.n
    except torch.OutOfMemoryError as error:
        raise RuntimeError(_out_of_memory(model, optimizer, batch, plan, run, step)) from error
    if plan.config.clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.config.clip)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _out_of_memory(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Prepared, plan: Plan,
                   run: runtime.Run, step: int) -> str:
    """Message with the largest micro-batch that did fit, found by trying halves."""
    tried = max(len(piece.input_ids) for piece in batch.pieces)
    message = f"out of memory at step {step} with micro-batches of {tried} tokens"
    for budget in (tried // 2**k for k in range(1, 12) if tried // 2**k >= 64):
        optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with run.autocast():
                loss = plan.loss(model, max(plan.prepare(step, budget).pieces, key=lambda piece: len(piece.input_ids)))
            loss.backward()
        except torch.OutOfMemoryError:
            continue
        return f"{message}; {budget} tokens fit: set run.token_budget={budget} (the result stays the same)"
    return f"{message}; not even 64 tokens fit, the model is too large for this device"


def _note(best: Best, step: int, metrics: dict[str, Any], model: torch.nn.Module, journal: runtime.Journal) -> None:
    """Log an evaluation and keep a copy of the weights if it is the best."""
    journal.row({"step": step, "split": "val"} | metrics)
    best.evaluations_since += 1
    if metrics["loss"] < best.loss or not best.state:
        best.loss, best.step, best.evaluations_since = metrics["loss"], step, 0
        best.state = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def _check_finite(losses: list[torch.Tensor], step: int, plan: Plan, out_dir: Path) -> None:
    """Raise FloatingPointError with step, rows and last good checkpoint if one of the last losses is not finite."""
    values = torch.stack(losses).cpu() if losses else torch.zeros(0)
    bad = torch.nonzero(~torch.isfinite(values))
    if len(bad):
        at = step - len(losses) + int(bad[0])
        rows = plan.prepare(at, plan.config.run.token_budget).rows
        good = max((path.name for path in (out_dir / "checkpoints").glob("step_*")), default="none")
        raise FloatingPointError(
            f"expected a finite loss, found {float(values[bad[0]])} at step {at} (batch of {len(rows)} rows, e.g. "
            f"{rows[:3].tolist()}); last good checkpoint: {good}. Lower lr, or set clip and precision=\"fp32\"")


def _resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer, out_dir: Path,
            identity: dict[str, Any]) -> tuple[int, Best]:
    found = checkpoint.latest(out_dir / "checkpoints", identity)
    if found is None:
        return 0, Best()
    step, state = found
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return step, Best(**state["best"])


def _save(best: Best, model: torch.nn.Module, optimizer: torch.optim.Optimizer, out_dir: Path,
          identity: dict[str, Any], keep_last: int, run: runtime.Run) -> None:
    if run.rank == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": vars(best)}
        checkpoint.save(out_dir / "checkpoints", best.last_step, state, identity, keep_last)


# ------------------------------------------------------------------------------------------------ helpers
def _prepare(batch: dataset.Batch, n: int, budget: int, run: runtime.Run,
             target: np.ndarray | None = None) -> Prepared:
    pieces = [Packed.of(piece, run.device, run.varlen, None if target is None else target[piece.rows])
              for piece in dataset.micro_batches(batch, budget, run.rank, run.world_size)]
    return Prepared(pieces, batch.rows, n, int(batch.lengths.sum()))


def _subset(rows: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """The first n of `rows` in a random order that the seed fixes: a smaller set lies inside a larger one.

    Raises:
        ValueError: there are fewer.
    """
    if n is not None and not 0 < n <= len(rows):
        raise ValueError(f"expected 1 to {len(rows)} rows (all there are), found n_train or n_eval = {n}")
    return rows if n is None else rows[np.random.default_rng([seed, 2]).permutation(len(rows))[:n]]


def _n_steps(config: PretrainConfig | FinetuneConfig, n_train: int, run: runtime.Run) -> int:
    if not run.world_size <= config.batch_size <= n_train:
        raise ValueError(f"expected a batch_size from {run.world_size} (processes) to {n_train} (training rows), "
                         f"found {config.batch_size}; lower it or add data")
    if given := getattr(config, "n_steps", None):
        return given
    return max(1, round(config.epochs * n_train / config.batch_size))


def _encoder_size(model: torch.nn.Module) -> int:
    bert = model.mlm.bert if isinstance(model, MaskedLM) else model.bert
    return models.n_params_non_embedding(models.encoder_config(bert))


def _identity(kind: str, config: PretrainConfig | FinetuneConfig, packed: PackedTokens) -> dict[str, Any]:
    """What a result depends on: two runs with the same identity learn the same."""
    settings = io.plain(config)
    del settings["run"]
    if settings.get("init", "scratch") != "scratch" and not settings["init"].startswith("hub:"):
        settings["init"] = "weights " + io.sha256(Path(config.init) / "model.safetensors")[:12]
    return {"kind": kind, "config": settings, "data_sha256": packed.data_sha256,
            "vocab_sha256": packed.meta["vocab_sha256"]}


def _finished(out_dir: Path, identity: dict[str, Any], run: runtime.Run, restart: bool) -> dict[str, Any] | None:
    """Result of a finished run with this identity; None if it has to be trained (from a checkpoint, if any)."""
    file = out_dir / "identity.json"
    if run.rank == 0:
        found = io.read_json(file) if file.is_file() else identity
        if restart and checkpoint.differences(identity, found):
            for path in out_dir.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif file.is_file():
            checkpoint.require_same(identity, found, out_dir)
        io.write_json(file, identity)
    run.barrier()
    return io.read_json(out_dir / "result.json") if (out_dir / "result.json").is_file() else None


def _finish(result: dict[str, Any], best: Best, model: MaskedLM | Regressor, packed: PackedTokens,
            config: PretrainConfig | FinetuneConfig, identity: dict[str, Any], out_dir: Path,
            run: runtime.Run) -> dict[str, Any]:
    """Write model/ and result.json (last: it marks the run as finished); checkpoints are no longer needed."""
    result |= {"seed": config.seed, "config": io.plain(config), "config_hash": io.config_hash(identity),
               "wall_time_s": round(best.elapsed_s, 2), "best_step": best.step, "n_steps": best.last_step,
               "world_size": run.world_size, "precision": run.precision, "threads": torch.get_num_threads(),
               "device": io.device_name(), "versions": io.versions()} | {
                   key: identity[key] for key in ("kind", "data_sha256", "vocab_sha256")}
    if run.rank == 0:
        meta = {key: packed.meta[key] for key in (*dataset.META_KEYS,)} | {
            key: result[key] for key in ("kind", "task", "fold", "seed", "target_mean", "target_std", "config_hash",
                                         "val_loss", "mae_val") if key in result}
        models.save_model(model, out_dir / "model", meta, packed.path)
        io.write_json(out_dir / "result.json", result)
        shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)
    run.barrier()
    return io.read_json(out_dir / "result.json")


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv[1:]))
