"""Untrained fine-tuned models where a profile's own would lie: checkpoints, results and task tables below a root."""

import csv
from pathlib import Path

import pandas as pd
import torch
from toy_tokens import TINY
from transformers import BertModel

from cloud_lib import io
from cloud_lib.bundle import HELD_OUT_COLUMNS
from cloud_lib.model import Regressor, save_model, with_vocab
from cloud_lib.tokenizer import Tokenizer

TASKS = {"dielectric": ("1", 0.01), "log_gvrh": ("log10(GPa)", 0.1)}  # unit, symprec


def write_runs(root: Path, folds: tuple[int, ...] = (0, 1), frozen: bool = False) -> Path:
    """checkpoints/demo below `root` and what belongs to it; with `frozen` all models share the encoder's weights."""
    runs, tokenizer, config = root / "checkpoints/demo", Tokenizer.default(), with_vocab(TINY, 776)
    meta = {"vocab_sha256": tokenizer.sha256, "vocab_version": tokenizer.version, "style": "canonical"}
    torch.manual_seed(0)
    bert = BertModel(config.bert_config(), add_pooling_layer=False)
    tokenizer.save(root / "tokenizer")
    save_model(Regressor(bert), runs / "encoder", meta, root / "tokenizer")
    (runs / "encoder/head.safetensors").unlink()
    for task in TASKS:
        for fold in folds:
            unit = runs / "matbench" / task / "CLOUD" / f"fold{fold}-seed0"
            own = bert if frozen else BertModel(config.bert_config(), add_pooling_layer=False)
            save_model(Regressor(own), unit / "model", meta | {"tasks": [task], "fold": fold, "target_mean": 2.0,
                                                               "target_std": 5.0})
            with open(unit / "predictions.csv", "w", newline="") as handle:
                writer = csv.writer(handle)
                writer.writerow(HELD_OUT_COLUMNS)
                writer.writerows([[task, fold, "val", "m0", 0, 9],
                                  *([task, fold, "test", f"m{i}", 0, i / 100] for i in range(1, 101))])
    lines = [{"task": task, "property": f"meaning of {task}", "unit": unit, "symprec": symprec}
             for task, (unit, symprec) in TASKS.items()]
    (root / "results/demo").mkdir(parents=True)
    pd.DataFrame(lines).to_csv(root / "results/demo/benchmarks.csv", index=False)
    tables = io.processed_dir("demo") / "tasks" if io.root() == root else root / "data/processed/demo/tasks"
    tables.mkdir(parents=True)
    for task, elements in (("dielectric", ["BaTiO3", "NaCl"]), ("log_gvrh", ["BaTiO3", "NaCl", "PuO2"])):
        pd.DataFrame({"formula_reduced": elements, "space_group": [221, 225, 225][:len(elements)]}).to_parquet(
            tables / f"{task}.parquet")
    return runs


def write_joint(runs: Path, fold: int) -> None:
    """A jointly fine-tuned model of all TASKS in `runs`, whose outputs lie around 5 and 1000."""
    meta = io.read_json(runs / "matbench/dielectric/CLOUD/fold0-seed0/model/cloud.json")
    torch.manual_seed(fold)
    bert = BertModel(with_vocab(TINY, 776).bert_config(), add_pooling_layer=False)
    unit = runs / "matbench/joint/CLOUD" / f"fold{fold}-seed0"
    save_model(Regressor(bert, n_outputs=2), unit / "model", meta | {
        "tasks": [*TASKS], "fold": fold, "target_mean": [5.0, 1000.0], "target_std": [1.0, 2.0]})
    with open(unit / "predictions.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([HELD_OUT_COLUMNS, *([task, fold, "test", "m", 0, 1] for task in TASKS)])
