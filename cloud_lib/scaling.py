"""Scaling law of the pre-training loss: fit, bootstrap intervals, compute-optimal frontier, contours.

Input is a table with one row per finished run: `n_params_non_embedding` (N), `val_loss` [nats per masked
token] and a data column that the caller declares as D, because the paper leaves it open (its Eq. 1 says
tokens, its Figure 4 data points, and C = 6 N D needs processed tokens):

    n_examples         distinct crystals in the training set
    n_tokens_unique    tokens in those crystals' strings
    n_tokens_seen      tokens processed, that is n_tokens_unique times epochs

Compute is C = 6 N x (tokens processed) = 6 N D x `tokens_per_datum`, with tokens_per_datum = 1 for
n_tokens_seen; this is the C of the paper's Eq. 4 whichever D was fitted.
"""

from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import pandas as pd

from cloud_lib import powerlaw
from cloud_lib.powerlaw import CONSTANTS, DELTA, EXPONENTS, Law, Problem

N_COLUMN, LOSS_COLUMN, SEEN_COLUMN = "n_params_non_embedding", "val_loss", "n_tokens_seen"
DATA_COLUMNS = ("n_examples", "n_tokens_unique", "n_tokens_seen")
QUANTITIES = (*CONSTANTS, "a", "b", "G")
MIN_SIZES = 3                  # distinct N, and distinct D, below which an exponent is not identified
PERCENTILES = (2.5, 97.5)      # 95 % intervals
NEGLIGIBLE = 1e-3              # a term that is a smaller part of every loss is on the boundary


@dataclass(frozen=True)
class Fit:
    """A fitted law with everything needed to judge it.

    residuals: (n,) log of the predicted minus log of the measured loss. objective: summed Huber.
    bootstrap: (n_bootstrap, 5) rows (A, B, E, alpha, beta). share_reached: part of the starts that ended
    in this minimum. boundary: what the runs do not determine, with what to add; empty for a sound fit.
    """

    law: Law
    data_column: str
    n_params: np.ndarray
    data: np.ndarray
    loss: np.ndarray
    tokens_per_datum: float
    residuals: np.ndarray
    objective: float
    delta: float
    n_starts: int
    share_reached: float
    bootstrap: np.ndarray
    share_boundary: float
    boundary: tuple[str, ...]

    @property
    def samples(self):
        """Law whose fields hold the bootstrap resamples (n_bootstrap,)."""
        return Law(*self.bootstrap.T)

    def interval(self, of):
        """95 % percentile interval (low, high) of a function of a Law; NaN without a bootstrap."""
        if not len(self.bootstrap):
            return float("nan"), float("nan")
        return tuple(float(q) for q in np.percentile(of(self.samples), PERCENTILES))

    def table(self):
        """DataFrame: quantity, value, low, high for A, B, E, alpha, beta, a, b and G."""
        rows = [(name, float(getattr(self.law, name)), *self.interval(attrgetter(name)))
                for name in QUANTITIES]
        return pd.DataFrame(rows, columns=["quantity", "value", "low", "high"])

    def text(self, budgets=()):
        """Readable summary: constants, quality of the fit, what to add, optimum at budgets [FLOP]."""
        lines = [f"L = A/N^alpha + B/D^beta + E; {len(self.loss)} runs; "
                 f"N = {N_COLUMN}, D = {self.data_column}",
                 f"{'':6}{'value':>12}   95 % interval ({len(self.bootstrap)} resamples of the runs)"]
        lines += [f"{row.quantity:6}{row.value:12.5g}   {row.low:.4g} to {row.high:.4g}"
                  for row in self.table().itertuples()]
        lines += [f"objective {self.objective:.6g} (summed Huber, delta {self.delta:g}); "
                  f"reached from {self.share_reached:.1%} of {self.n_starts} starts",
                  f"residual spread {self.residuals.std():.4f} in log loss, "
                  f"largest {np.abs(self.residuals).max():.4f}"]
        lines += [f"not determined: {note}" for note in self.boundary]
        lines += [f"C = {row.train_flops:.3g} FLOP: N_opt {row.n_params:.3g} ({row.n_params_low:.3g} to "
                  f"{row.n_params_high:.3g}), D_opt {row.data:.3g} ({row.data_low:.3g} to "
                  f"{row.data_high:.3g})"
                  for row in frontier(self, budgets).itertuples()]
        return "\n".join(lines)

    def to_dict(self, budgets=()):
        """JSON-ready summary: constants at the top level, their intervals under "intervals".

        budgets: compute [FLOP] at which the compute-optimal run is listed under "frontier".
        """
        table, optimum = _without_nan(self.table()), frontier(self, budgets)
        absolute = np.abs(self.residuals)
        return {**dict(zip(table.quantity, table.value)),
                "intervals": dict(zip(table.quantity, table[["low", "high"]].to_numpy().tolist())),
                "interval_level": 0.95, "frontier": _without_nan(optimum).to_dict("records"),
                "objective": self.objective, "huber_delta": self.delta,
                "residual_spread": float(self.residuals.std()),
                "residual_median_abs": float(np.median(absolute)), "residual_max_abs": float(absolute.max()),
                "data_column": self.data_column, "tokens_per_datum": self.tokens_per_datum,
                "n_runs": len(self.loss), "n_starts": self.n_starts, "share_reached": self.share_reached,
                "n_bootstrap": len(self.bootstrap), "share_boundary": self.share_boundary,
                "boundary": list(self.boundary)}


def _without_nan(table):
    """The table with None for NaN, which JSON does not know."""
    return table.astype(object).where(table.notna(), None)


def check_runs(runs, data_column="n_examples"):
    """Columns of a table of runs as (n_params, data, loss), each (n,) float.

    Raises:
        ValueError: a column is missing; a value is not finite and positive; a row is there twice; there are
            too few runs, or too few model or data sizes, to determine the law.
    """
    columns = [N_COLUMN, data_column, LOSS_COLUMN]
    missing = [c for c in columns if c not in runs.columns]
    if missing:
        raise ValueError(f"expected columns {columns}, missing {missing}; found {list(runs.columns)}; "
                         "name the data column with --data-column")
    values = runs[columns].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)).all(axis=1))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(runs)} runs have a non-finite or non-positive value in "
                         f"{columns}, e.g. {_rows(runs, columns, bad)}; remove unfinished or diverged runs")
    twice = np.flatnonzero(runs.duplicated(subset=columns))
    if len(twice):
        raise ValueError(f"{len(twice)} of {len(runs)} runs are duplicate rows (same N, D and loss), "
                         f"e.g. {_rows(runs, columns, twice)}; keep each run once, or the intervals shrink "
                         "for nothing")
    if len(runs) <= len(CONSTANTS):
        raise ValueError(f"expected more runs than the {len(CONSTANTS)} constants, found {len(runs)}; "
                         f"add {len(CONSTANTS) + 1 - len(runs)} or more runs of other sizes")
    for column, what in ((N_COLUMN, "model sizes"), (data_column, "data sizes")):
        sizes = runs[column].nunique()
        if sizes < MIN_SIZES:
            raise ValueError(f"expected at least {MIN_SIZES} {what}, found {sizes} in {column} "
                             f"({sorted(runs[column].unique().tolist())}); add runs of other {what}")
    return tuple(values.T)


def _rows(runs, columns, which):
    """Up to three rows as text for an error message."""
    rows = runs[columns].iloc[which[:3]].to_dict("records")
    return [{"row": int(i), **row} for i, row in zip(which, rows)]


def fit(runs, data_column="n_examples", n_bootstrap=4000, seed=0, delta=DELTA, starts=None):
    """Fit the law to a table of runs, see the module's head for its columns; returns a Fit.

    Minimum over 4,500 starts (or the rows `starts` of (A, B, E, alpha, beta)); intervals from n_bootstrap
    resamples of the runs.

    Raises:
        ValueError: what `check_runs` finds; n_bootstrap is negative.
    """
    if n_bootstrap < 0:
        raise ValueError(f"expected 0 or more bootstrap resamples, found {n_bootstrap}")
    n_params, data, loss = check_runs(runs, data_column)
    problem = Problem(n_params, data, loss, delta=delta)
    grid = powerlaw.start_grid(problem) if starts is None else problem.theta(starts)
    theta, objective, share = powerlaw.search(problem, grid)
    law = Law(*(float(v) for v in problem.constants(theta)[0]))
    bootstrap = _bootstrap(n_params, data, loss, theta, n_bootstrap, np.random.default_rng(seed), delta)
    on_edge = _boundary_share(n_params, data, loss, bootstrap)
    return Fit(law, data_column, n_params, data, loss, _tokens_per_datum(runs, data_column),
               problem.residuals(theta[None])[0], float(objective), delta, len(grid), float(share), bootstrap,
               on_edge, _boundary(law, n_params, data, loss))


def _tokens_per_datum(runs, data_column):
    """Processed tokens per unit of the data column: geometric mean over runs; 1 if the table does not say."""
    if SEEN_COLUMN not in runs.columns or data_column == SEEN_COLUMN:
        return 1.0
    return float(np.exp(np.log(runs[SEEN_COLUMN] / runs[data_column]).mean()))


def _bootstrap(n_params, data, loss, theta, n_bootstrap, rng, delta):
    """Refit resamples of the runs, each from the optimum theta of all runs: (n_bootstrap, 5) constants."""
    if not n_bootstrap:
        return np.empty((0, len(CONSTANTS)))
    weights = resample(n_params, data, n_bootstrap, rng)
    problem = Problem(n_params, data, loss, weights=weights, delta=delta)
    solved, _ = powerlaw.minimise(problem, np.tile(theta, (n_bootstrap, 1)))
    return problem.constants(solved)


def resample(n_params, data, n_bootstrap, rng):
    """How often each run is drawn, (n_bootstrap, n).

    A resample that could not identify the law (too few distinct sizes or runs) is drawn again.
    """
    n = len(n_params)
    levels = [(np.unique(values)[:, None] == values).astype(float) for values in (n_params, data)]

    def usable(w):
        enough = (w > 0).sum(axis=1) >= len(CONSTANTS)
        for level in levels:
            enough &= ((w @ level.T) > 0).sum(axis=1) >= MIN_SIZES
        return w[enough]

    weights = np.empty((0, n))
    while len(weights) < n_bootstrap:
        draws = rng.multinomial(n, np.full(n, 1 / n), size=n_bootstrap).astype(float)
        weights = np.concatenate([weights, usable(draws)])
    return weights[:n_bootstrap]


def _boundary(law, n_params, data, loss):
    """What the runs leave undetermined, as sentences that say what to add."""
    terms = {"A": law.A * n_params ** -law.alpha, "B": law.B * data ** -law.beta,
             "E": np.full(len(loss), law.E)}
    add = {"A": "the loss does not depend on model size here; add smaller models",
           "B": "the loss does not depend on data size here; add smaller data sets",
           "E": "no irreducible loss is seen; add larger models on more data"}
    found = [f"{name} -> 0: {add[name]}" for name, term in terms.items() if (term / loss).max() < NEGLIGIBLE]
    for name, size in (("alpha", "model"), ("beta", "data")):
        value = getattr(law, name)
        if value < NEGLIGIBLE:
            found.append(f"{name} -> 0: its term cannot be told from E; add a wider range of {size} sizes")
        elif value > EXPONENTS[1] - NEGLIGIBLE:
            found.append(f"{name} at its upper bound {EXPONENTS[1]:g}: its term acts on the smallest runs "
                         f"only; add {size} sizes between the smallest two")
    return tuple(found)


def _boundary_share(n_params, data, loss, bootstrap):
    """Share of bootstrap resamples whose fit lies on the boundary."""
    if not len(bootstrap):
        return 0.0
    A, B, E, alpha, beta = bootstrap.T
    largest = np.stack([A * n_params.min() ** -alpha / loss.max(), B * data.min() ** -beta / loss.max(),
                        E / loss.min()])
    edge = (largest < NEGLIGIBLE).any(axis=0) | (np.minimum(alpha, beta) < NEGLIGIBLE)
    return float((edge | (np.maximum(alpha, beta) > EXPONENTS[1] - NEGLIGIBLE)).mean())


def optimal_size(law, train_flops, tokens_per_datum=1.0):
    """(N_opt, D_opt) at a compute budget [FLOP] (paper, Eq. 4); arguments broadcast."""
    per = np.asarray(train_flops) / (6 * tokens_per_datum)
    return law.G * per ** law.a, per ** law.b / law.G


def frontier(fitted, train_flops):
    """Compute-optimal runs at the budgets train_flops [FLOP]: DataFrame with 95 % intervals.

    Columns: train_flops, n_params, data, loss, each of the last three also with _low and _high.
    """
    rows = []
    for budget in np.atleast_1d(np.asarray(train_flops, float)):
        def at(law, which):
            n, d = optimal_size(law, budget, fitted.tokens_per_datum)
            return {"n_params": n, "data": d, "loss": law.loss(n, d)}[which]

        row = {"train_flops": budget}
        for name in ("n_params", "data", "loss"):
            low, high = fitted.interval(lambda law: at(law, name))
            row |= {name: float(at(fitted.law, name)), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def budget_for(fitted, gpu_hours, flop_per_s):
    """How large a model on how much data: the frontier at gpu_hours of a sustained flop_per_s [FLOP/s]."""
    return frontier(fitted, gpu_hours * 3600 * flop_per_s).assign(gpu_hours=gpu_hours)


def contours(law, levels, n_params, tokens_per_datum=1.0):
    """Iso-loss lines: DataFrame loss, n_params, data, train_flops.

    levels: losses [nats]; n_params: model sizes along each line. A model too small for a level, however
    much data it sees, has no row there.
    """
    loss, n = (g.ravel() for g in np.meshgrid(levels, n_params, indexing="ij"))
    left = loss - law.E - law.A * n ** -law.alpha
    loss, n, left = (v[left > 0] for v in (loss, n, left))
    data = (law.B / left) ** (1 / law.beta)
    return pd.DataFrame({"loss": loss, "n_params": n, "data": data,
                         "train_flops": 6 * n * data * tokens_per_datum})


def readings(runs, n_bootstrap=4000, seed=0):
    """The law fitted with every reading of D that the table offers: {data column: Fit}."""
    return {c: fit(runs, c, n_bootstrap, seed) for c in DATA_COLUMNS if c in runs.columns}
