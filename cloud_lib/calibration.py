"""How far a stated uncertainty can be trusted: the share of held-out errors within it, beside what it promises."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6827, 0.8, 0.9, 0.95)


def coverage(table: pd.DataFrame, levels: Sequence[float] = LEVELS) -> pd.DataFrame:
    """Share of test errors within a central interval of a normal distribution, per task.

    The deviation of a fold's crystals is taken from the other folds, the 68 % quantile of their errors, as a
    bundle states it before the spread of its models is added. A heavy tail shows as a share that falls short
    at high levels.

    Args:
        table: columns task, fold, split, target, prediction; two folds or more per task.
        levels: promised shares, between 0 and 1.
    Returns:
        task, nominal, observed, n (rows behind it).
    Raises:
        ValueError: a task has test rows of one fold only.
    """
    rows = [row for task, one in table[table["split"] == "test"].groupby("task", sort=False)
            for row in _coverage(task, one, levels)]
    return pd.DataFrame(rows, columns=["task", "nominal", "observed", "n"])


def _coverage(task: str, rows: pd.DataFrame, levels: Sequence[float]) -> Iterator[dict[str, Any]]:
    errors, folds = (rows["prediction"] - rows["target"]).abs().to_numpy(), rows["fold"].to_numpy()
    if len(np.unique(folds)) < 2:
        raise ValueError(f"expected test rows of two folds or more of {task}, found fold {folds[:1].tolist()}; "
                         "run more folds")
    scaled = np.concatenate([errors[folds == k] / np.quantile(errors[folds != k], 0.6827) for k in np.unique(folds)])
    for level in levels:
        within = float((scaled <= norm.ppf((1 + level) / 2)).mean())
        yield {"task": task, "nominal": level, "observed": within, "n": len(scaled)}
