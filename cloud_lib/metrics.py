"""Metrics of the paper's tables, in NumPy alone.

Energies in eV/atom. A material is stable if its distance to the hull is at or below a threshold (the
benchmark's `<=`; the paper's section 4.3 says lower). NaN is a missing prediction: it counts as predicted
unstable, and is left out of MAE, RMSE and R2.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _vectors(**named: ArrayLike) -> list[NDArray]:
    """One-dimensional float arrays of equal, non-zero length."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in named.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 or shape[0] == 0 for shape in shapes.values()):
        raise ValueError(f"expected vectors of one length, found {shapes}; join them on material_id first")
    return list(arrays.values())


def mae(target: ArrayLike, prediction: ArrayLike) -> float:
    """Mean absolute error, in the target's unit.

    Raises:
        ValueError: the lengths differ, or there are no rows.
    """
    target, prediction = _vectors(target=target, prediction=prediction)
    return float(np.abs(target - prediction).mean())


def mad(target: ArrayLike) -> float:
    """Mean absolute deviation from the mean: the MAE of the dummy that knows the mean of these rows."""
    (target,) = _vectors(target=target)
    return float(np.abs(target - target.mean()).mean())


def rmse(target: ArrayLike, prediction: ArrayLike) -> float:
    """Root-mean-square error, in the target's unit."""
    target, prediction = _vectors(target=target, prediction=prediction)
    return float(np.sqrt(np.mean((target - prediction) ** 2)))


def r2(target: ArrayLike, prediction: ArrayLike) -> float:
    """Coefficient of determination; NaN if all targets are equal."""
    target, prediction = _vectors(target=target, prediction=prediction)
    total = np.sum((target - target.mean()) ** 2)
    return float(1 - np.sum((target - prediction) ** 2) / total) if total else float("nan")


def fold_mae(target: ArrayLike, prediction: ArrayLike, fold: ArrayLike) -> dict[int, float]:
    """MAE of each test fold over its concatenated predictions (not a mean of batch means)."""
    target, prediction, fold = _vectors(target=target, prediction=prediction, fold=fold)
    return {int(k): mae(target[fold == k], prediction[fold == k]) for k in np.unique(fold)}


class Summary(NamedTuple):
    mean: float
    std: float
    n: int


def summary(values: ArrayLike) -> Summary:
    """Mean and population standard deviation (ddof 0) over folds, as on the MatBench leaderboard."""
    (values,) = _vectors(values=values)
    return Summary(float(values.mean()), float(values.std()), len(values))


def hull_distance(e_form_per_atom_pred: ArrayLike, e_form_per_atom_dft: ArrayLike,
                  e_above_hull_dft: ArrayLike) -> NDArray:
    """Predicted distance to the DFT convex hull [eV/atom].

    The hull stays at its DFT energies, so a formation-energy error shifts the distance one to one.
    All inputs in eV/atom, same order of materials; NaN = no prediction, and stays NaN.

    Raises:
        ValueError: the lengths differ.
    Source: Matbench Discovery (10.1038/s42256-025-01055-1).
    """
    predicted, dft, hull = _vectors(
        e_form_per_atom_pred=e_form_per_atom_pred, e_form_per_atom_dft=e_form_per_atom_dft,
        e_above_hull_dft=e_above_hull_dft)
    return hull + predicted - dft


def discovery_metrics(e_above_hull_dft: ArrayLike, e_above_hull_pred: ArrayLike,
                      threshold: float = 0.0) -> dict[str, float]:
    """F1, DAF, precision, accuracy, TPR, TNR, MAE, RMSE and R2 as in Tables 6 and 7.

    Args:
        e_above_hull_dft: the truth, stable at <= 0 whatever the threshold. [eV/atom]
        e_above_hull_pred: the prediction, stable at <= `threshold`; NaN counts as unstable. [eV/atom]
    Returns:
        Fractions, and errors in eV/atom. A ratio without cases (no material predicted stable) is NaN.
    Raises:
        ValueError: the lengths differ, or a true distance is NaN.
    """
    truth, prediction = _vectors(e_above_hull_dft=e_above_hull_dft, e_above_hull_pred=e_above_hull_pred)
    stable, chosen, known = _known_truth(truth) <= 0, prediction <= threshold, ~np.isnan(prediction)
    tp, fp = np.sum(stable & chosen), np.sum(~stable & chosen)
    fn, tn = np.sum(stable & ~chosen), np.sum(~stable & ~chosen)
    precision = _ratio(tp, tp + fp)
    return {
        "F1": _ratio(2 * tp, 2 * tp + fp + fn),
        "DAF": precision / _ratio(tp + fn, len(truth)) if tp + fn else float("nan"),
        "precision": precision,
        "accuracy": _ratio(tp + tn, len(truth)),
        "TPR": _ratio(tp, tp + fn),
        "TNR": _ratio(tn, tn + fp),
    } | {
        name: metric(truth[known], prediction[known]) if known.any() else float("nan")
        for name, metric in (("MAE", mae), ("RMSE", rmse), ("R2", r2))
    }


def _known_truth(truth: NDArray) -> NDArray:
    if np.isnan(truth).any():
        raise ValueError(f"{np.isnan(truth).sum()} of {len(truth)} true hull distances are NaN; "
                         "leave these rows out")
    return truth


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def roc_curve(is_stable: ArrayLike, e_above_hull_pred: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    """False and true positive rate as the prediction's threshold rises.

    Args:
        is_stable: true class of n materials.
        e_above_hull_pred: predicted distance [eV/atom]; NaN ranks as the least stable of all.
    Returns:
        fpr, tpr, threshold: from (0, 0, -inf) to (1, 1, largest distance), one point per distinct distance.
    Raises:
        ValueError: the lengths differ, or one of the two classes is empty.
    """
    stable, distance = _vectors(is_stable=is_stable, e_above_hull_pred=e_above_hull_pred)
    if not 0 < stable.sum() < len(stable):
        raise ValueError(f"expected stable and unstable materials, "
                         f"found {int(stable.sum())} stable of {len(stable)}")
    distance = np.where(np.isnan(distance), np.inf, distance)
    order = np.argsort(distance, kind="stable")
    distance, stable = distance[order], stable[order]
    last = np.append(distance[1:] != distance[:-1], True)  # one point per distinct distance
    tpr = np.cumsum(stable)[last] / stable.sum()
    fpr = np.cumsum(1 - stable)[last] / (1 - stable).sum()
    return np.append(0, fpr), np.append(0, tpr), np.append(-np.inf, distance[last])


def roc_auc(is_stable: ArrayLike, e_above_hull_pred: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a stable material is predicted below an unstable one.

    NaN if one of the two classes is empty.
    """
    if len(np.unique(is_stable)) == 1:
        return float("nan")
    fpr, tpr, _ = roc_curve(is_stable, e_above_hull_pred)
    return float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))


class Interval(NamedTuple):
    difference: float
    low: float
    high: float


def paired_bootstrap(statistic: Callable[[NDArray, NDArray], float], truth: ArrayLike, ours: ArrayLike,
                     other: ArrayLike, *, n_resamples: int = 1000, level: float = 0.95,
                     seed: int = 0) -> Interval:
    """Percentile interval of statistic(truth, ours) - statistic(truth, other).

    The same rows are drawn for both models, so what makes a row hard for both cancels. Draws on which the
    statistic is NaN (a ROC AUC without a stable material) are left out.

    Args:
        statistic: for example `mae`, or `lambda t, p: roc_auc(t <= 0, p)`.
    Raises:
        ValueError: the lengths differ.
    """
    truth, ours, other = _vectors(truth=truth, ours=ours, other=other)
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(len(truth), size=len(truth)) for _ in range(n_resamples)]
    differences = [statistic(truth[rows], ours[rows]) - statistic(truth[rows], other[rows]) for rows in drawn]
    defined = [difference for difference in differences if not np.isnan(difference)] or [float("nan")]
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(statistic(truth, ours) - statistic(truth, other), float(low), float(high))
