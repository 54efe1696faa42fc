"""Tables around the scaling law: runs kept and restored, fine-tuned sizes, constants, contours, README lines."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from cloud_lib import scaling
from cloud_lib.powerlaw import CONSTANTS, Law

OURS, PAPER = "our fit", "the paper's constants"
LEVELS = 9  # iso-loss lines of Figure 6


def edges(todo: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a grid's units those of the first seed with the most data, and those of the largest encoder."""
    first = [unit for unit in todo if unit["config"]["seed"] == todo[0]["config"]["seed"]]
    most_data = max(unit["config"]["n_train"] for unit in first)
    largest = max(_weights(unit) for unit in first)
    return [unit for unit in first if unit["config"]["n_train"] == most_data or _weights(unit) == largest]


def _weights(unit: dict[str, Any]) -> int:
    return unit["config"]["encoder"]["n_layers"] * unit["config"]["encoder"]["n_heads"] ** 2


def finetuned_sizes(found: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Scores of models named by `grid.finetune_configs` with the sizes of their encoders.

    Columns `init` (pretrained, scratch), `n_params_non_embedding`, `n_examples` (NaN from scratch), `mae`, `mae_std`,
    `rows`, `folds`.
    """
    names = runs.assign(
        pretrained=[f"L{r.n_layers}-H{r.n_heads}-n{r.n_examples}-s{r.seed}" for r in runs.itertuples()],
        scratch=[f"scratch-L{r.n_layers}-H{r.n_heads}" for r in runs.itertuples()])
    parts = [found.merge(names[[init, "n_params_non_embedding", *extra]].drop_duplicates(init), left_on="model",
                         right_on=init, validate="1:1").assign(init=init)
             for init, extra in (("pretrained", ["n_examples"]), ("scratch", []))]
    columns = ["init", "n_params_non_embedding", "n_examples", "mae", "mae_std", "rows", "folds"]
    table = pd.concat(parts, ignore_index=True)[columns]
    return table.sort_values(["init", "n_params_non_embedding", "n_examples"], ignore_index=True)


def paper_law(paper: pd.Series) -> Law:
    """The paper's constants (Section 4.5)."""
    return Law(**{name: float(paper[name]) for name in CONSTANTS})


def constants_table(fits: dict[str, scaling.Fit], paper: pd.Series) -> pd.DataFrame:
    """A line per constant: the paper's value (G computed from its constants), ours and its 95 % interval per D."""
    law = paper_law(paper)
    table = pd.DataFrame({"constant": scaling.QUANTITIES, "paper": [getattr(law, name) for name in scaling.QUANTITIES]})
    for column, fit in fits.items():
        found = fit.table()
        table[f"D = {column}"] = found["value"]
        table[f"95 % interval ({column})"] = [f"{low:.4g} to {high:.4g}" for low, high in found[["low", "high"]].to_numpy()]
    return table


def contours_and_optimum(fit: scaling.Fit, paper: pd.Series, budgets: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Figure 6: iso-loss lines (`law`, `loss`, `n_params`, `train_flops`) and the frontier at `budgets` [FLOPs].

    The paper's D is read as our fit's data column, with as many processed tokens for each.
    """
    law = paper_law(paper)
    ours = scaling.frontier(fit, budgets)
    n_paper, d_paper = scaling.optimal_size(law, budgets, fit.tokens_per_datum)
    sizes = np.geomspace(min(ours["n_params"].min(), fit.n_params.min()) / 3, max(ours["n_params"].max(),
                                                                                fit.n_params.max()) * 3, 200)
    lines = []
    for name, one, loss in ((OURS, fit.law, ours["loss"]), (PAPER, law, law.loss(n_paper, d_paper))):
        levels = np.geomspace(loss.min() * 1.01, loss.max(), LEVELS)
        lines.append(scaling.contours(one, levels, sizes, fit.tokens_per_datum).assign(law=name))
    optimum = pd.concat([ours.assign(law=OURS), pd.DataFrame({"law": PAPER, "train_flops": budgets, "n_params": n_paper,
                                                              "data": d_paper})], ignore_index=True)
    return pd.concat(lines, ignore_index=True), optimum


def summary(fit: scaling.Fit, paper: pd.Series) -> pd.DataFrame:
    """Lines of the README's table: the constants and the exponents of the frontier, with our 95 % intervals.

    A constant on the boundary has no number.
    """
    found = fit.table().set_index("quantity")
    beyond = {note.split()[0] for note in fit.boundary}
    lines = []
    for name in (*CONSTANTS, "a", "b"):
        value, low, high = found.loc[name, ["value", "low", "high"]]
        remark = "not determined by these runs" if name in beyond else f"95 % interval {low:.4g} to {high:.4g}"
        lines.append({"result": f"scaling law, {name} ({remark})", "paper": paper[name],
                      "ours": np.nan if name in beyond else value})
    return pd.DataFrame(lines).assign(rows=len(fit.loss), notebook="06_scaling_law", make="scaling_law")
