"""Training and inference against what a user would otherwise run: transformers.Trainer and padding to 64.

    python -m benchmarks.bench_training [--layers 4 --heads 4] [--threads 1] [--clock cpu] [--data DIR]
    python -m benchmarks.bench_training --kills 20

Both sides train the same BERT with the same AdamW on the same strings; the opponent reads ids that are
padded already (the published code also tokenizes while training), masks with
DataCollatorForLanguageModeling and runs in transformers.Trainer (needs `pip install accelerate`). The
rounds alternate; a step's time is the median after a warm-up, the best round counts. --clock cpu counts
processor seconds of one thread, for a machine that is busy otherwise. Without --data, strings have the
corpus's lengths (29.2 +- 6 tokens). --kills ends a run with SIGKILL so many times and compares its weights
with an undisturbed run's. Prints Markdown, writes benchmarks/results/training_*.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (BertConfig, BertForMaskedLM, BertModel, DataCollatorForLanguageModeling,
                          PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments)

from cloud_lib import dataset, io, loop, model as models, predict, train
from cloud_lib.dataset import PackedTokens
from cloud_lib.model import EncoderConfig
from cloud_lib.train import PretrainConfig, RunConfig

VOCAB_SIZE, N_SPECIAL, PADDED = 776, 4, 64
RESULTS = Path(__file__).parent / "results"


def synthetic(path: Path, n: int, seed: int = 0) -> PackedTokens:
    """Random strings with the corpus's distribution of lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.normal(29.2, 6, n).round().astype(int), 10, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(N_SPECIAL, VOCAB_SIZE, offsets[-1]).astype(np.uint16)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = 1, 2
    meta = {"vocab_sha256": "0" * 64, "vocab_version": "random", "vocab_size": VOCAB_SIZE, "mask_id": 3,
            "cls_id": 1, "sep_id": 2, "n_special": N_SPECIAL, "part_of_id": [0] * 4 + [1] * (VOCAB_SIZE - 4),
            "style": "paper"}
    labels = {"target": rng.normal(size=n), "fold": np.arange(n) % 5, "row": np.arange(n)}
    return dataset.pack(tokens, offsets, path, meta, labels)


def padded_ids(packed: PackedTokens, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, (len(rows), 64)."""
    ids = torch.zeros(len(rows), PADDED, dtype=torch.long)
    for i, row in enumerate(rows):
        item = packed.item(row).astype(np.int64)
        ids[i, :len(item)] = torch.from_numpy(item)
    return ids, (ids != 0).long()


class _Stamps(TrainerCallback):
    def __init__(self, clock: Callable[[], float]):
        self.clock, self.times = clock, []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(self.clock())


def opponent(packed: PackedTokens, encoder: EncoderConfig, batch_size: int, steps: int, precision: str,
             clock: Callable[[], float]) -> float:
    """Seconds per step of transformers.Trainer on padded strings; precision "fp32", "bf16" or "fp16"."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    words = [*special.values(), *(f"t{i}" for i in range(len(special), VOCAB_SIZE))]
    words = {word: i for i, word in enumerate(words)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[MASK]")), **special)
    ids, attend = padded_ids(packed, np.arange(min(len(packed), batch_size * (steps + 1))))
    rows = [{"input_ids": i, "attention_mask": a} for i, a in zip(ids, attend)]
    bert = BertForMaskedLM(BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=encoder.width, num_hidden_layers=encoder.n_layers,
        num_attention_heads=encoder.n_heads, intermediate_size=4 * encoder.width,
        max_position_embeddings=PADDED, hidden_dropout_prob=encoder.dropout,
        attention_probs_dropout_prob=0.0))
    stamps = _Stamps(clock)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=batch_size, max_steps=steps, learning_rate=1e-4, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=precision == "bf16",
            fp16=precision == "fp16", use_cpu=not torch.cuda.is_available(), dataloader_num_workers=0,
            dataloader_pin_memory=torch.cuda.is_available(), max_grad_norm=1.0)
        Trainer(bert, settings, train_dataset=rows, callbacks=[stamps],
                data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)).train()
    return statistics.median(np.diff(stamps.times)[1:])


def ours(packed: PackedTokens, encoder: EncoderConfig, batch_size: int, steps: int, precision: str,
         clock: Callable[[], float], **how: Any) -> tuple[float, list[dict[str, Any]]]:
    """Seconds per step of `pretrain`, and its log."""
    times, step = [], loop._step

    def stamped(*arguments: Any) -> torch.Tensor:
        loss = step(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(clock())
        return loss

    loop._step = stamped
    run = RunConfig(precision=precision, progress=False, log_every=5, **how)
    config = PretrainConfig(encoder=encoder, n_steps=steps, batch_size=batch_size, n_eval=64, n_evals=1,
                            val_fraction=0.02, run=run)
    try:
        with tempfile.TemporaryDirectory() as folder:
            train.pretrain(config, packed.path, folder)
            log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    finally:
        loop._step = step
    skip = max(1, len(times) // 3)  # compilation, caches
    return statistics.median(np.diff(times)[skip:]), log


def inference(packed: PackedTokens, encoder: EncoderConfig, clock: Callable[[], float]) -> dict[str, float]:
    """Strings per second: [CLS] of a padded transformers forward, and `embeddings`; float32 and bfloat16."""
    config = models.with_vocab(encoder, VOCAB_SIZE)
    bert = BertModel(config.bert_config(), add_pooling_layer=False).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        bert.save_pretrained(folder)
        for precision in ("fp32", "bf16"):
            predict.embeddings(folder, packed, precision=precision)  # warm-up
            started = clock()
            predict.embeddings(folder, packed, precision=precision)
            rates[f"ours {precision}"] = len(packed) / (clock() - started)
    ids, attend = padded_ids(packed, np.arange(len(packed)))
    bert.to(device)
    for precision in ("fp32", "bf16"):
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            started = clock()
            for i, a in zip(ids.split(256), attend.split(256)):
                bert(i.to(device), attention_mask=a.to(device)).last_hidden_state[:, 0].float().cpu()
            rates[f"padded {precision}"] = len(packed) / (clock() - started)
    return rates


def kills(n: int) -> dict[str, Any]:
    """Whether a run that was killed `n` times at random moments ends with an undisturbed run's weights."""
    encoder = EncoderConfig(n_layers=1, n_heads=2, head_dim=32, max_positions=PADDED)
    config = PretrainConfig(encoder=encoder, n_steps=100 * n, batch_size=64,
                            run=RunConfig(device="cpu", progress=False, checkpoint_every=5))
    rng, moments = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        packed = synthetic(Path(folder) / "data", 2000)
        train.pretrain(config, packed.path, Path(folder) / "whole")
        unit = {"kind": "pretrain", "config": io.plain(config), "data_dir": str(packed.path),
                "out_dir": f"{folder}/killed"}
        file = io.write_json(Path(folder) / "unit.json", unit)
        command = [sys.executable, "-m", "cloud_lib.train", str(file)]
        for _ in range(n):
            log = Path(folder) / "killed" / "log.jsonl"
            size = log.stat().st_size if log.exists() else 0
            child = subprocess.Popen(command)
            while child.poll() is None and not (log.exists() and log.stat().st_size > size):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            child.kill()
            if child.wait() == 0:
                break
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            moments.append(json.loads(lines[-1])["step"])
        subprocess.run(command, check=True)
        weights = [models.weights_sha256(Path(folder) / name / "model") for name in ("whole", "killed")]
    return {"kills": len(moments), "after_steps": moments, "same_weights": weights[0] == weights[1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--data", type=Path, help="packed corpus; default: random strings")
    parser.add_argument("--inference", type=int, default=2000, help="strings to embed")
    parser.add_argument("--kills", type=int, help="only this: kill a run so many times")
    arguments = parser.parse_args()
    if arguments.kills:
        print(io.read_json(io.write_json(RESULTS / "training_kills.json", kills(arguments.kills))))
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    encoder = EncoderConfig(arguments.layers, arguments.heads, max_positions=PADDED,
                            dropout=arguments.dropout)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = None if arguments.data else synthetic(Path(folder) / "data", 20_000)
        packed = made or PackedTokens.open(arguments.data)
        for _ in range(arguments.rounds):
            for precision in ("fp32", "bf16"):
                setting = packed, encoder, arguments.batch_size, arguments.steps, precision, clock
                times.setdefault(f"Trainer, padded to {PADDED}, {precision}", []).append(opponent(*setting))
                times.setdefault(f"ours, {precision}", []).append(ours(*setting)[0])
        few = synthetic(Path(folder) / "few", arguments.inference)
        rates = inference(few, replace(encoder, dropout=0.0), clock)
    training = {name: arguments.batch_size / min(values) for name, values in times.items()}
    report = {"machine": io.device_name(), "threads": arguments.threads, "clock": arguments.clock,
              "encoder": [arguments.layers, encoder.width], "batch_size": arguments.batch_size,
              "dropout": arguments.dropout, "training_crystals_per_s": training,
              "inference_strings_per_s": rates}
    io.write_json(RESULTS / f"training_{arguments.threads}_threads.json", report)
    base = training[f"Trainer, padded to {PADDED}, fp32"]
    print("| training | crystals/s | times Trainer fp32 |\n|---|---|---|")
    for name, rate in training.items():
        print(f"| {name} | {rate:.0f} | {rate / base:.2f} |")
    print("\n| inference | strings/s | times padded fp32 |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / rates['padded fp32']:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
