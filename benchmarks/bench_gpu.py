"""Everything that needs a GPU, unattended, in less than 9 minutes, with torch, transformers and NumPy alone.

    python -m benchmarks.bench_gpu [--quick]        (writes gpu.json into $OUT, else into ./bench_out)

Checks that the unpadded encoder is the padded one there, and that a stopped run continues exactly; measures
pre-training (12 x 768, batch 2048) against the padded loop in float16, with MFU and a profile of where the
time goes, fine-tuning as on mp_e_form, and inference; projects the paper's full pre-training. A section that
fails is noted with its error and the others still run; those that would start after 8 minutes are left out.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertForMaskedLM

from cloud_lib import dataset, io, loop, model as models, predict, runtime, train
from cloud_lib.dataset import PackedTokens
from cloud_lib.model import EncoderConfig, MaskedLM, Packed
from cloud_lib.train import FinetuneConfig, PretrainConfig, RunConfig

PAPER = EncoderConfig(n_layers=12, n_heads=12, max_positions=64)
BATCH, PADDED, TIME_LIMIT_S = 2048, 64, 480
PAPER_CRYSTALS = 5_080_000 * 50  # training rows x epochs
TASK_ROWS, TASK_EPOCHS = 84_900, 50  # mp_e_form: one fold's training rows
# Kinds of kernels by their names; the first that fits counts.
KINDS = {"attention": ("flash", "fmha", "attn"),
         "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "_mm"),
         "optimizer": ("adam", "multi_tensor"), "copies": ("memcpy", "memset", "copy")}


def synthetic(path: Path, n: int) -> PackedTokens:
    """Random strings with the corpus's distribution of lengths, 29.2 +- 6 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(29.2, 6, n).round().astype(int), 10, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(4, 776, offsets[-1]).astype(np.uint16)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = 1, 2
    meta = {"vocab_sha256": "0" * 64, "vocab_version": "random", "vocab_size": 776, "mask_id": 3, "cls_id": 1,
            "sep_id": 2, "n_special": 4, "part_of_id": [0] * 4 + [1] * 772, "style": "paper"}
    labels = {"target": rng.normal(size=n), "fold": np.arange(n) % 5, "row": np.arange(n)}
    return dataset.pack(tokens, offsets, path, meta, labels)


def pretraining(packed: PackedTokens, steps: int, **how: Any) -> dict[str, Any]:
    """`pretrain` for some steps: median rates of its own log after the first third."""
    torch.cuda.reset_peak_memory_stats()
    config = PretrainConfig(encoder=PAPER, n_steps=steps, batch_size=BATCH, val_fraction=0.01, n_eval=512,
                            n_evals=1, run=RunConfig(progress=False, log_every=5, **how))
    with tempfile.TemporaryDirectory() as folder:
        train.pretrain(config, packed.path, folder)
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    rows = [row for row in log if row["split"] == "train"]
    rows = rows[len(rows) // 3:]
    keys = ("crystals_per_s", "tokens_per_s", "mfu", "data_wait_share")
    found = {key: statistics.median(row[key] or 0 for row in rows) for key in keys}
    peak = torch.cuda.max_memory_allocated() / 1e9
    return found | {"peak_memory_GB": peak, "loss": rows[-1]["loss"],
                    "paper_pretraining_hours": PAPER_CRYSTALS / found["crystals_per_s"] / 3600}


def padded_loop(packed: PackedTokens, steps: int, precision: str) -> dict[str, float]:
    """The published recipe: 64 positions, transformers' BertForMaskedLM, autocast; masked on the GPU."""
    torch.manual_seed(0)
    bert = BertForMaskedLM(models.with_vocab(PAPER, 776).bert_config()).cuda().train()
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-4, weight_decay=0.0)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    ids = torch.zeros(BATCH, PADDED, dtype=torch.long)
    for i in range(BATCH):
        item = packed.item(i).astype(np.int64)
        ids[i, :len(item)] = torch.from_numpy(item)
    ids = ids.cuda()
    attend, times = (ids != 0).long(), []
    for _ in range(steps):
        chosen = (torch.rand(ids.shape, device="cuda") < 0.15) & (ids >= 4)
        labels, masked = torch.where(chosen, ids, -100), torch.where(chosen, 3, ids)
        for half in range(2):  # 1024 per device and step, as published
            part = slice(half * BATCH // 2, (half + 1) * BATCH // 2)
            with torch.autocast("cuda", dtype, enabled=precision != "fp32"):
                loss = bert(masked[part], attention_mask=attend[part], labels=labels[part]).loss / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter())
    return {"crystals_per_s": BATCH / statistics.median(np.diff(times)[2:])}


def same_as_padded(packed: PackedTokens) -> dict[str, float]:
    """Largest difference of hidden states between our encoder and the padded one, float32 and bfloat16."""
    model = MaskedLM(replace(models.with_vocab(PAPER, 776), dropout=0.0)).cuda().eval()
    batch = dataset.make_batch(packed, np.arange(256))
    inside = torch.from_numpy(np.arange(PADDED) < batch.lengths[:, None]).cuda()
    ids = torch.zeros(inside.shape, dtype=torch.long, device="cuda")
    ids[inside] = torch.from_numpy(batch.input_ids).cuda()
    found = {}
    with torch.inference_mode():
        expected = model.bert(ids, attention_mask=inside.long()).last_hidden_state
        for name, varlen in (("fp32", False), ("bf16", True)):
            with torch.autocast("cuda", torch.bfloat16, enabled=varlen):
                ours = Packed.of(batch, "cuda", varlen)
                tokens, cls = models.encode(model.bert, ours), models.encode_cls(model.bert, ours)
                found[f"tokens_{name}"] = float((tokens - expected[inside]).abs().max())
                found[f"cls_{name}"] = float((cls - expected[:, 0]).abs().max())
    return found


def continues(packed: PackedTokens) -> dict[str, float]:
    """Losses of 20 steps against 10 and, after an interruption, 10 more."""
    how = RunConfig(progress=False, log_every=1, checkpoint_every=10)
    config = PretrainConfig(encoder=replace(PAPER, n_layers=2), n_steps=20, batch_size=256, val_fraction=0.01,
                            n_eval=64, n_evals=1, run=how)
    step, losses = loop._step, {}

    def broken(*arguments: Any) -> torch.Tensor:
        if arguments[-1] == 15 and not losses:
            raise KeyboardInterrupt
        return step(*arguments)

    with tempfile.TemporaryDirectory() as folder:
        loop._step = broken
        try:
            train.pretrain(config, packed.path, Path(folder) / "parts")
        except KeyboardInterrupt:
            losses["interrupted"] = []
        finally:
            loop._step = step
        for name in ("parts", "whole"):
            train.pretrain(config, packed.path, Path(folder) / name)
            lines = (Path(folder) / name / "log.jsonl").read_text().splitlines()
            losses[name] = [row["loss"] for row in map(json.loads, lines) if row["split"] == "train"]
    return {"largest_difference": float(np.abs(np.subtract(losses["parts"], losses["whole"])).max())}


def profile(packed: PackedTokens, **how: Any) -> dict[str, float]:
    """Share of the GPU's busy time by kind of kernel over three optimizer steps."""
    run = runtime.Run(torch.device("cuda"), "bf16")
    model = MaskedLM(models.with_vocab(PAPER, 776)).cuda().train()
    optimizer = runtime.make_optimizer(model, 1e-4, 0.0)
    rows = np.arange(len(packed))

    def prepare(step: int, budget: int) -> loop.Prepared:
        batch = dataset.training_batch(packed, rows, BATCH, 0.15, 0, step)
        return loop.prepare(batch, len(batch.masked), budget, run)

    plan = loop.Plan(10, prepare, lambda net, piece: net(piece)[0], dict, bool, model, optimizer,
                     RunConfig(**how), seed=0, warmup_ratio=0.1, clip=1.0)
    net = torch.compile(model, dynamic=True) if how.get("compile") else model
    for step in range(4):
        loop._step(net, model, prepare(step, 32_768), plan, run, 1.0, step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        started = time.perf_counter()
        for step in range(4, 7):
            loop._step(net, model, prepare(step, 32_768), plan, run, 1.0, step)
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    shares: dict[str, float] = {}
    for event in recorded.key_averages():
        fitting = [kind for kind, names in KINDS.items() if any(name in event.key.lower() for name in names)]
        kind = fitting[0] if fitting else "element-wise, norms, losses"
        shares[kind] = shares.get(kind, 0.0) + event.self_device_time_total / 1e6 / wall
    return shares | {"idle": 1 - sum(shares.values())}


def fine_tuning(packed: PackedTokens, steps: int) -> dict[str, float]:
    """Rate of `finetune` at batch 512, and the minutes of one mp_e_form fold that follow from it."""
    config = FinetuneConfig(encoder=PAPER, batch_size=512, epochs=steps * 512 / len(packed) * 1.4,
                            run=RunConfig(progress=False, log_every=5))
    with tempfile.TemporaryDirectory() as folder:
        train.finetune(config, packed.path, folder)
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    rates = [row["crystals_per_s"] for row in log if row["split"] == "train"]
    rate = statistics.median(rates[len(rates) // 3:])
    return {"crystals_per_s": rate, "mp_e_form_fold_minutes": TASK_ROWS * TASK_EPOCHS / rate / 60}


def inference(packed: PackedTokens) -> dict[str, float]:
    """Seconds for all strings, model loading included."""
    with tempfile.TemporaryDirectory() as folder:
        models.save_model(MaskedLM(models.with_vocab(PAPER, 776)), Path(folder) / "m", packed.meta)
        started = time.perf_counter()
        predict.embeddings(Path(folder) / "m", packed, token_budget=65_536)
        return {"strings": len(packed), "seconds": time.perf_counter() - started}


def host_memory(packed: PackedTokens) -> dict[str, float]:
    """Growth of the process's largest resident size over 60 more steps [MB]."""
    pretraining(packed, 10, compile=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pretraining(packed, 60, compile=False)
    return {"growth_MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a third of the steps")
    steps = 15 if parser.parse_args().quick else 45
    if not torch.cuda.is_available():
        print("bench_gpu needs a CUDA device, found none; nothing was measured", file=sys.stderr)
        return 2
    out_dir = Path(os.environ.get("OUT") or "bench_out")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                              "varlen": models.varlen_attn is not None}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        packed = synthetic(Path(folder) / "data", 250_000)
        sections: dict[str, Callable[[], dict[str, float]]] = {
            "same_as_padded": lambda: same_as_padded(packed),
            "pretraining": lambda: pretraining(packed, steps, compile=False),
            "padded_fp16": lambda: padded_loop(packed, steps // 2, "fp16"),
            "pretraining_compiled": lambda: pretraining(packed, 2 * steps, compile=True),
            "pretraining_compiled_65536": lambda: pretraining(packed, steps, compile=True,
                                                              token_budget=65_536),
            "continues": lambda: continues(packed),
            "inference": lambda: inference(packed),
            "fine_tuning": lambda: fine_tuning(packed, 4 * steps),
            "profile_compiled": lambda: profile(packed, compile=True),
            "profile": lambda: profile(packed),
            "padded_bf16": lambda: padded_loop(packed, steps // 2, "bf16"),
            "host_memory": lambda: host_memory(packed)}
        for name, section in sections.items():
            begun = time.perf_counter()
            if begun - started > TIME_LIMIT_S:
                report[name] = {"left_out": "no time left"}
                continue
            try:
                report[name] = section()
            except Exception:  # the other sections still run; the error is part of the report
                report[name] = {"error": traceback.format_exc()[-2000:]}
            report[name]["section_s"] = time.perf_counter() - begun
            io.write_json(out_dir / "gpu.json", report)
            print(json.dumps({name: report[name]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
