"""The training loop, the same for pre-training and fine-tuning, one process or many.

Last step? -> evaluate -> checkpoint -> stop -> (forward, backward, step) -> log. What differs between the two
kinds of training comes in as a `Plan`.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cloud_lib import checkpoint, dataset, model as models, runtime, sharding
from cloud_lib.model import Packed, Regressor


@dataclass(frozen=True)
class RunConfig:
    """How to run: nothing here changes what is learned, so a run may be continued under other values."""

    device: str = "auto"             # "cpu", "cuda", "cuda:1"
    precision: str = "auto"          # "bf16", "fp32"
    token_budget: int | None = None  # tokens per micro-batch; None = 4,096 on a CPU, 32,768 on a GPU
    parallel: str = "ddp"            # several processes; "fsdp" also spreads the optimizer's state over them
    compile: bool | None = None      # torch.compile; None = on a GPU, for runs long enough to earn it back
    log_every: int = 20              # steps
    checkpoint_minutes: float = 5.0
    checkpoint_every: int | None = None  # also every so many steps
    keep_last: int = 2               # checkpoints
    progress: bool = True
    tensorboard: bool = False
    wandb_project: str | None = None


class Prepared(NamedTuple):
    """One optimizer step's data."""

    pieces: list[Packed]  # this process's micro-batches, on its device
    rows: np.ndarray      # of the whole batch
    n: int                # divisor of the summed loss: masked tokens, or strings, of the whole batch
    n_tokens: int         # of the whole batch


class Plan(NamedTuple):
    """What the loop has to do for one run."""

    n_steps: int
    prepare: Callable[[int, int], Prepared]      # (step, token budget)
    loss: Callable[[nn.Module, Packed], Tensor]  # summed over a piece
    evaluate: Callable[[], dict[str, Any]]       # its "loss": the smaller the better
    evaluate_at: Callable[[int], bool]
    trained: nn.Module                           # the model, or its copy that is spread over the processes
    optimizer: torch.optim.Optimizer             # of `trained`
    run: RunConfig
    seed: int
    warmup_ratio: float
    clip: float | None
    frozen_steps: int = 0                        # the encoder stays as it is so long
    patience: int | None = None                  # evaluations without a better one


@dataclass
class Best:
    """The best model so far and what the run has counted; part of every checkpoint."""

    loss: float = math.inf
    step: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    evaluations_since: int = 0
    n_tokens: int = 0
    last_step: int = 0
    elapsed_s: float = 0.0


def prepare(batch: dataset.Batch, n: int, budget: int, run: runtime.Run,
            target: np.ndarray | None = None, task: np.ndarray | None = None) -> Prepared:
    """This process's share of a batch, in micro-batches of at most `budget` tokens, on its device.

    Args:
        target, task: of all rows of the data; `task` only if there are several.
    """
    pieces = [Packed.of(piece, run.device, run.varlen, None if target is None else target[piece.rows],
                        None if task is None else task[piece.rows])
              for piece in dataset.micro_batches(batch, budget, run.rank, run.world_size)]
    return Prepared(pieces, batch.rows, n, int(batch.lengths.sum()))


def fit(plan: Plan, model: nn.Module, run: runtime.Run, out_dir: Path, identity: dict[str, Any]) -> Best:
    """Train `model` from its last checkpoint (if any) to the end and leave the best weights in it.

    Raises:
        FloatingPointError: the loss is not finite.
        RuntimeError: out of memory; says which micro-batch fits.
        SystemExit: SIGTERM came; everything is saved (status 143).
    """
    start, best = _resume(model, plan, out_dir, identity)
    journal = runtime.Journal(out_dir, run, start, plan.n_steps, models.encoder_size(model),
                              plan.run.progress, plan.run.tensorboard, plan.run.wandb_project)
    data = runtime.Prefetch(lambda step: plan.prepare(step, run.token_budget(plan.run.token_budget)), start,
                            plan.n_steps)
    began = time.perf_counter() - best.elapsed_s
    saved, losses, net = time.perf_counter(), [], None
    model.train()
    try:
        for step in range(start, plan.n_steps + 1):
            if step > start and (step == plan.n_steps or plan.evaluate_at(step)):
                with journal.paused():
                    _gather(plan, model)
                    _note(best, step, plan.evaluate(), model, journal)
            best.last_step, best.elapsed_s = step, time.perf_counter() - began
            if step == plan.n_steps or best.evaluations_since >= (plan.patience or math.inf):
                break
            if step > start and (run.world_size == 1 or step % plan.run.log_every == 0):
                stop = run.should_stop()
                if stop or _due(plan.run, step, saved):
                    with journal.paused():
                        _check_finite(losses, step, plan, run, out_dir)
                        _gather(plan, model)
                        _save(best, model, plan, out_dir, identity, run)
                    saved = time.perf_counter()
                if stop:
                    journal.say(f"SIGTERM: saved after step {step} in {out_dir}; run again to continue")
                    raise SystemExit(143)
            if net is None or step == plan.frozen_steps:
                net = _network(model, step < plan.frozen_steps, plan, run)
            batch = data.get()
            factor = runtime.learning_rate(step, plan.n_steps, plan.warmup_ratio)
            losses.append(_step(net, model, batch, plan, run, factor, step))
            best.n_tokens += batch.n_tokens
            journal.count(len(batch.rows), batch.n_tokens)
            if run.exact_logging or (step + 1) % plan.run.log_every == 0 or step + 1 == plan.n_steps:
                _check_finite(losses, step + 1, plan, run, out_dir)
            if (step + 1) % plan.run.log_every == 0 or step + 1 == plan.n_steps:
                mean = float(run.sum(torch.stack(losses).double().mean().cpu().numpy()))
                journal.train(step + 1, mean, plan.optimizer.param_groups[-1]["lr"], data.take_wait_s())
                losses = []
    finally:
        data.close()
        journal.close()
    model.load_state_dict(best.state)
    return best


def _network(model: nn.Module, frozen: bool, plan: Plan, run: runtime.Run) -> nn.Module:
    """The model as the loop calls it, its encoder frozen or not."""
    if isinstance(model, Regressor):
        plan.trained.bert.requires_grad_(not frozen)
    whole, compiled = plan.trained is model, plan.run.compile
    if compiled is None:
        compiled = run.device.type == "cuda" and plan.n_steps >= 500 and whole
    net = torch.compile(plan.trained, dynamic=True) if compiled else plan.trained
    return run.wrap(net) if whole else net


def _step(net: nn.Module, model: nn.Module, batch: Prepared, plan: Plan, run: runtime.Run, factor: float,
          step: int) -> Tensor:
    """One optimizer step; returns this process's share of the batch's mean loss, still on the device."""
    torch.manual_seed(runtime.step_seed(plan.seed, step, run.rank))  # dropout
    total = torch.zeros((), device=run.device)
    try:
        for i, piece in enumerate(batch.pieces):
            with _together(net, model, plan, run, last=i + 1 == len(batch.pieces)):
                with run.autocast():
                    loss = plan.loss(net, piece)
                (loss * (run.world_size / batch.n)).backward()  # DDP takes the mean over the processes
            total += loss.detach() / batch.n
    except torch.OutOfMemoryError as error:
        raise RuntimeError(_out_of_memory(model, batch, plan, run, step)) from error
    if plan.clip is not None:
        nn.utils.clip_grad_norm_(plan.trained.parameters(), plan.clip)
    for group in plan.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    plan.optimizer.step()
    plan.optimizer.zero_grad(set_to_none=True)
    return total


def _together(net: nn.Module, model: nn.Module, plan: Plan, run: runtime.Run,
              last: bool) -> contextlib.AbstractContextManager:
    """The processes sum their gradients in the step's last micro-batch only."""
    if plan.trained is not model:
        sharding.set_last(plan.trained, last)
    return net.no_sync() if isinstance(net, nn.parallel.DistributedDataParallel) and not last else (
        contextlib.nullcontext())


def _gather(plan: Plan, model: nn.Module) -> None:
    """Bring the model up to date with what is trained."""
    if plan.trained is not model:
        sharding.gather(plan.trained, model)


def _out_of_memory(model: nn.Module, batch: Prepared, plan: Plan, run: runtime.Run, step: int) -> str:
    """Message with the largest micro-batch that does fit, found by trying halves."""
    tried = max(len(piece.input_ids) for piece in batch.pieces)
    message = f"out of memory at step {step} with micro-batches of {tried} tokens"
    for budget in (tried // 2**k for k in range(1, 12) if tried // 2**k >= 64):
        plan.optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            largest = max(plan.prepare(step, budget).pieces, key=lambda piece: len(piece.input_ids))
            with run.autocast():
                loss = plan.loss(model, largest)
            loss.backward()
        except torch.OutOfMemoryError:
            continue
        return f"{message}; {budget} fit: set RunConfig(token_budget={budget}), the result stays the same"
    return f"{message}; not even 64 fit, the model is too large for this device"


def _note(best: Best, step: int, metrics: dict[str, Any], model: nn.Module, journal: runtime.Journal) -> None:
    """Log an evaluation, and keep a copy of the weights if it is the best so far."""
    journal.row({"step": step, "split": "val"} | metrics)
    best.evaluations_since += 1
    if metrics["loss"] < best.loss or not best.state:
        best.loss, best.step, best.evaluations_since = metrics["loss"], step, 0
        best.state = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def _check_finite(losses: list[Tensor], step: int, plan: Plan, run: runtime.Run, out_dir: Path) -> None:
    """Stop if one of the losses of the steps before `step` is not finite (all processes see the same)."""
    values = run.sum(torch.stack(losses).double().cpu().numpy()) if losses else np.zeros(0)
    if np.all(np.isfinite(values)):
        return
    at = step - len(losses) + int(np.flatnonzero(~np.isfinite(values))[0])
    rows = plan.prepare(at, run.token_budget(plan.run.token_budget)).rows
    good = max((path.name for path in (out_dir / "checkpoints").glob("step_*")), default="none")
    raise FloatingPointError(
        f"expected a finite loss, found {values[at - step + len(losses)]} at step {at} (batch of {len(rows)} "
        f'rows, e.g. {rows[:3].tolist()}); last good checkpoint: {good}. Lower lr, or set clip or '
        'precision="fp32"')


def _due(how: RunConfig, step: int, saved: float) -> bool:
    by_steps = how.checkpoint_every is not None and step % how.checkpoint_every == 0
    return by_steps or time.perf_counter() - saved > 60 * how.checkpoint_minutes


def _resume(model: nn.Module, plan: Plan, out_dir: Path, identity: dict[str, Any]) -> tuple[int, Best]:
    found = checkpoint.latest(out_dir / "checkpoints", identity)
    if found is None:
        return 0, Best()
    step, state = found
    model.load_state_dict(state["model"])
    if plan.trained is not model:
        sharding.scatter(model, plan.trained)
    sharding.load_optimizer(plan.optimizer, state["optimizer"])
    return step, Best(**state["best"])


def _save(best: Best, model: nn.Module, plan: Plan, out_dir: Path, identity: dict[str, Any],
          run: runtime.Run) -> None:
    state = {"model": model.state_dict(), "optimizer": sharding.optimizer_state(plan.optimizer), "best": vars(best)}
    if run.rank == 0:
        checkpoint.save(out_dir / "checkpoints", best.last_step, state, identity, plan.run.keep_last)
