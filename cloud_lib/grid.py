"""The runs behind the scaling law: which encoders see how much data, as units for `units.run_units`.

Every run has its own cosine schedule from start to end; a point in the middle of a longer run is not a run.
Data sizes are nested: the first n rows of one fixed random order (`n_train`), so that more data contains
less data. All runs share the validation set, which depends on `data_seed` only.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cloud_lib import io

PAPER_LAYERS, PAPER_HEADS = (1, 3, 6, 12), (1, 4, 12)  # section 4.5; 64 wide per head
REPEAT_EVERY = 3                                       # every third cell is repeated with the further seeds
RUN_COLUMNS = ["n_layers", "n_heads", "n_params_non_embedding", "n_params_total", "n_examples",
               "n_tokens_unique", "n_tokens_seen", "epochs", "train_flops", "val_loss", "seed", "wall_time_s",
               "best_step", "n_steps"]


def data_sizes(n_rows: int, n_sizes: int = 5, ratio: float = 2.0) -> list[int]:
    """Geometric data sizes that end at n_rows, ascending: n_rows / ratio^(n_sizes - 1), ..., n_rows."""
    return [round(n_rows / ratio ** k) for k in reversed(range(n_sizes))]


def scaling_grid(layers: Sequence[int], heads: Sequence[int], n_examples: Sequence[int], seeds: Sequence[int],
                 data_dir: Path, out_dir: Path, config: Any, epochs: Mapping[int, float] | None = None,
                 lr: Mapping[int, float] | None = None) -> list[dict[str, Any]]:
    """Units of all layers x heads x n_examples, cheapest first, so that a stopped grid is still a grid.

    Args:
        n_examples: training rows of each data size, e.g. `data_sizes(...)`.
        seeds: the first one for every cell, all of them for every third cell.
        config: train.PretrainConfig with everything that the grid does not set.
        epochs: n_examples -> epochs; None = `config.epochs` for all.
        lr: heads -> learning rate, as wider encoders need smaller ones; None = `config.lr` for all.
    Raises:
        ValueError: a size is missing or not positive, or is there twice; a mapping lacks a size.
    """
    for name, values in (("layers", layers), ("heads", heads), ("n_examples", n_examples), ("seeds", seeds)):
        if not len(values) or len(set(values)) < len(values) or (name != "seeds" and min(values) < 1):
            raise ValueError(f"expected one or more different positive {name}, found {list(values)}")
    for name, mapping, keys in (("epochs", epochs, n_examples), ("lr", lr, heads)):
        if mapping is not None and (missing := sorted(set(keys) - set(mapping))):
            raise ValueError(f"expected {name} for every one of {sorted(keys)}, missing {missing[:3]}")
    cells = sorted((_cost(n_layers, n_heads, n, epochs), n_layers, n_heads, n)
                   for n_layers in layers for n_heads in heads for n in n_examples)
    found = []
    for i, (_, n_layers, n_heads, n) in enumerate(cells):
        cell = dataclasses.replace(
            config, encoder=dataclasses.replace(config.encoder, n_layers=n_layers, n_heads=n_heads), n_train=n,
            epochs=epochs[n] if epochs else config.epochs, lr=lr[n_heads] if lr else config.lr)
        found += [_unit(dataclasses.replace(cell, seed=seed), data_dir, out_dir)
                  for seed in (seeds if i % REPEAT_EVERY == 0 else seeds[:1])]
    return found


def _cost(n_layers: int, n_heads: int, n: int, epochs: Mapping[int, float] | None) -> float:
    """Compute of a cell up to a common factor: weights (layers x width^2) times examples seen."""
    return n_layers * n_heads ** 2 * n * (epochs[n] if epochs else 1)


def _unit(config: Any, data_dir: Path, out_dir: Path) -> dict[str, Any]:
    name = f"L{config.encoder.n_layers}-H{config.encoder.n_heads}-n{config.n_train}-s{config.seed}"
    return {"kind": "pretrain", "config": io.plain(config), "data_dir": str(data_dir),
            "out_dir": str(Path(out_dir) / name)}


def finetune_configs(units: Sequence[dict[str, Any]], config: Any) -> dict[str, Any]:
    """Model name -> train.FinetuneConfig for `experiments.finetune_units`: Figure 4c-d.

    Every pre-trained unit under its folder's name, and every encoder of the grid once from scratch as
    "scratch-L1-H4".

    Args:
        config: train.FinetuneConfig with an encoder, whose layers and heads are set here.
    """
    found = {}
    for unit in units:
        encoder = unit["config"]["encoder"]
        n_layers, n_heads = encoder["n_layers"], encoder["n_heads"]
        sizes = dataclasses.replace(config.encoder, n_layers=n_layers, n_heads=n_heads)
        found[f"scratch-L{n_layers}-H{n_heads}"] = dataclasses.replace(config, init="scratch", encoder=sizes)
        found[Path(unit["out_dir"]).name] = dataclasses.replace(
            config, init=str(Path(unit["out_dir"]) / "model"), encoder=None)
    return found


def collect_runs(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Results of pre-training (what `units.run_units` returns) as one row per run, smallest compute first.

    Losses in nats per masked token, wall_time_s in seconds. best_step < n_steps tells that val_loss was
    reached before the schedule ended (the run overfits).

    Raises:
        ValueError: a result is not one of pre-training.
    """
    other = [result.get("task", "?") for result in results if result.get("kind") != "pretrain"]
    if other or not results:
        raise ValueError(f"expected results of pre-training, found {len(results)} of which {len(other)} are "
                         f"others, e.g. {other[:3]}; pass what run_units returns for scaling_grid")
    rows = [{column: {**result["config"]["encoder"], **result}[column] for column in RUN_COLUMNS}
            for result in results]
    return pd.DataFrame(rows).sort_values(["train_flops", "seed"], ignore_index=True)
