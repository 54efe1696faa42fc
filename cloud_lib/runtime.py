"""What surrounds the training loop: device and processes, optimizer, schedule, prefetching, logging."""

import contextlib
import fcntl
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from cloud_lib import model as models, sharding

# Dense bfloat16 peak [FLOP/s] without sparsity, from NVIDIA's data sheets; the first name that fits counts.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12,
              "A100": 312e12, "L40S": 362e12, "L40": 181e12, "A40": 150e12, "A10": 125e12, "L4": 121e12,
              "V100": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
LOCK_WAIT_S = 60


# ---------------------------------------------------------------------------------- device and processes
@dataclass
class Run:
    """One training process: its device, precision and place among the others."""

    device: torch.device
    precision: str  # "bf16" | "fp32"
    rank: int = 0
    world_size: int = 1
    stop: threading.Event = field(default_factory=threading.Event)  # SIGTERM arrived

    @property
    def varlen(self) -> bool:
        """Whether attention can use the variable-length kernel."""
        return self.device.type == "cuda" and self.precision == "bf16" and models.varlen_attn is not None

    @property
    def exact_logging(self) -> bool:
        """Whether looking at the loss of every step costs nothing."""
        return self.device.type == "cpu" and self.world_size == 1

    def token_budget(self, wanted: int | None) -> int:
        """Tokens per micro-batch; a CPU likes what stays in its caches, a GPU large matrices."""
        return wanted or (4_096 if self.device.type == "cpu" else 32_768)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def spread(self, model: nn.Module, parallel: str) -> nn.Module:
        """What the optimizer works on: the model itself, or ("fsdp") a copy whose state the processes share out.

        Raises:
            ValueError: unknown name.
        """
        if parallel not in ("ddp", "fsdp"):
            raise ValueError(f'expected parallel "ddp" or "fsdp", found "{parallel}"')
        if parallel == "ddp" or self.world_size == 1:
            return model
        return sharding.shard(model, self.device, self.world_size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: one gradient for all processes."""
        if self.world_size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over the processes."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def should_stop(self) -> bool:
        """Whether SIGTERM reached any process (all processes get the same answer)."""
        return bool(self.sum(np.array([float(self.stop.is_set())]))[0])

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.sum(np.zeros(1))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_device(name: str) -> torch.device:
    """Device for "auto", "cpu", "cuda" or "cuda:1"; with several processes, each takes its own GPU.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f'expected a GPU for device="{name}", found none; say device="auto" or "cpu"')
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """"bf16" or "fp32"; "auto" takes bfloat16 where the hardware multiplies it.

    Raises:
        ValueError: unknown name.
    """
    if name not in ("auto", "bf16", "fp32"):
        raise ValueError(f'expected precision "auto", "bf16" or "fp32", found "{name}"')
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


@contextlib.contextmanager
def process(device: str, precision: str, out_dir: Path) -> Iterator[Run]:
    """Set up one training process: device, process group (torchrun's environment), folder lock, SIGTERM.

    Raises:
        OSError: out_dir cannot be written, or another process trains in it.
    """
    chosen = choose_device(device)
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    run = Run(chosen, choose_precision(precision, chosen), rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        with _locked(out_dir) if rank == 0 else contextlib.nullcontext(), _on_sigterm(run.stop), \
                torch.random.fork_rng(devices=[chosen] if chosen.type == "cuda" else []):
            yield run
    finally:
        if world_size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def _locked(out_dir: Path) -> Iterator[None]:
    """Hold out_dir/.lock; a process that is about to end after SIGTERM gets a minute to do so."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        handle = open(out_dir / ".lock", "w")
    except OSError as error:
        raise OSError(error.errno, f"expected a folder that can be written at {out_dir}, found: {error}; "
                                   "choose another out_dir") from error
    with handle:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise OSError(error.errno, f"another process is training in {out_dir}; wait for it or "
                                               "end it") from error
                time.sleep(0.2)
        yield


@contextlib.contextmanager
def _on_sigterm(stop: threading.Event) -> Iterator[None]:
    """SIGTERM sets `stop` inside the block (in the main thread; elsewhere Python allows no handler)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# ------------------------------------------------------------------------------- optimizer and schedule
def learning_rate(step: int, n_steps: int, warmup_ratio: float) -> float:
    """Factor of the peak learning rate: linear warm-up, then a half cosine to 0."""
    warmup = round(warmup_ratio * n_steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0,
                   head_lr: float | None = None) -> torch.optim.AdamW:
    """AdamW; biases and layer norms have no weight decay.

    Args:
        layer_decay: learning-rate factor per layer below the head (1 = none): layer i of L has
            lr * layer_decay ** (L - i), the embeddings layer_decay ** (L + 1), the head 1.
        head_lr: peak learning rate of the head, if another.
    """
    n_layers = len(model.bert.encoder.layer)
    of_encoder = {id(parameter) for parameter in model.bert.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        in_head = id(parameter) not in of_encoder
        peak = (head_lr or lr) if in_head else lr * layer_decay ** (n_layers + 1 - _depth(name))
        groups.setdefault((peak, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return torch.optim.AdamW([{"params": members, "lr": peak, "peak": peak, "weight_decay": decay}
                              for (peak, decay), members in groups.items()], fused=True)


def _depth(name: str) -> int:
    """0 for the embeddings, i + 1 for the encoder's layer i."""
    parts = name.split(".")
    return int(parts[parts.index("layer") + 1]) + 1 if "layer" in parts else 0


def step_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


# ------------------------------------------------------------------------------------ data and logging
class Prefetch:
    """Values of make(step) for step = start, start + 1, ...; the next one is made while one is used."""

    def __init__(self, make: Callable[[int], Any], start: int, stop: int):
        self.make, self.next, self.stop, self.wait_s = make, start, stop, 0.0
        self.pool = ThreadPoolExecutor(1)
        self.future = self._submit()

    def _submit(self) -> Any:
        step, self.next = self.next, self.next + 1
        return self.pool.submit(self.make, step) if step < self.stop else None

    def get(self) -> Any:
        started = time.perf_counter()
        value = self.future.result()
        self.wait_s += time.perf_counter() - started
        self.future = self._submit()
        return value

    def take_wait_s(self) -> float:
        """Seconds spent waiting since the last call."""
        waited, self.wait_s = self.wait_s, 0.0
        return waited

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


class Journal:
    """log.jsonl, progress, and on request TensorBoard and Weights & Biases; silent on all ranks but 0."""

    def __init__(self, out_dir: Path, run: Run, start: int, n_steps: int, n_params: int, progress: bool,
                 tensorboard: bool = False, wandb_project: str | None = None):
        self.run, self.n_steps, self.n_params = run, n_steps, n_params
        self.active = run.rank == 0
        self.file = out_dir / "log.jsonl"
        self.bar = tqdm(total=n_steps, initial=start, desc=out_dir.name, unit="step",
                        disable=None if progress and self.active else True)
        self.writers = list(_writers(out_dir, tensorboard, wandb_project)) if self.active else []
        self.peak = next((peak for name, peak in PEAK_FLOPS.items() if name in _gpu(run.device)), None)
        self.paused_s = 0.0
        if self.active:
            _cut(self.file, start)
        self._begin()

    def _begin(self) -> None:
        self.started, self.paused_s, self.strings, self.tokens, self.steps = time.perf_counter(), 0.0, 0, 0, 0

    def count(self, strings: int, tokens: int) -> None:
        """Note one optimizer step."""
        self.strings, self.tokens, self.steps = self.strings + strings, self.tokens + tokens, self.steps + 1
        self.bar.update(1)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training (evaluation, checkpoints) and does not count in the rates."""
        self.run.synchronize()
        started = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - started

    def train(self, step: int, loss: float, lr: float, wait_s: float) -> None:
        """Row of the steps since the last one: their mean `loss`, and `wait_s` that they waited for data."""
        seconds = max(time.perf_counter() - self.started - self.paused_s, 1e-9)
        tokens_per_s = self.tokens / seconds
        mfu = 6 * self.n_params * tokens_per_s / (self.peak * self.run.world_size) if self.peak else None
        self.row({"step": step, "split": "train", "loss": loss, "lr": lr,
                  "crystals_per_s": self.strings / seconds, "tokens_per_s": tokens_per_s, "mfu": mfu,
                  "data_wait_share": wait_s / seconds,
                  "eta_s": (self.n_steps - step) * seconds / max(1, self.steps)})
        self._begin()

    def row(self, row: dict[str, Any]) -> None:
        """Append one row."""
        if not self.active:
            return
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        shown = {key: f"{row[key]:.4g}" for key in ("loss", "crystals_per_s", "mfu") if row.get(key)}
        self.bar.set_postfix(shown | {"split": row["split"]}, refresh=False)
        for write in self.writers:
            write(row)

    def say(self, text: str) -> None:
        if self.active:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _cut(file: Path, start: int) -> None:
    """Drop rows that the resumed run will write again, and a half-written last line."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        kept += [line] if row["step"] <= start else []
    file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _writers(out_dir: Path, tensorboard: bool, wandb_project: str | None) -> Iterator[Callable[[dict], None]]:
    """Extra loggers.

    Raises:
        ImportError: asked for, but not installed.
    """
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(out_dir / "tensorboard")
        yield lambda row: [board.add_scalar(f"{row['split']}/{key}", value, row["step"])
                           for key, value in row.items() if isinstance(value, float)]
    if wandb_project:
        import wandb

        session = wandb.init(project=wandb_project, name=out_dir.name, dir=out_dir, resume="allow")
        yield lambda row: session.log({f"{row['split']}/{key}": value for key, value in row.items()
                                       if isinstance(value, float)}, step=row["step"])
