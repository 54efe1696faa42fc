"""Four second opinions on a scaling-law fit: other solver, profile likelihood, extrapolation, iso-FLOP.

Each takes a `scaling.Fit` or the table of runs that `scaling.fit` takes, and returns a DataFrame or a Law.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import erf

from cloud_lib import powerlaw, scaling
from cloud_lib.powerlaw import Law, Problem

CHI2_95 = 3.841459             # 95 % point of chi-square with one degree of freedom
_COLUMN = {"alpha": 1, "beta": 3}  # of the solver's theta


def variable_projection(fitted, n_grid=64, n_zooms=12):
    """Law of least squares in relative loss, from a search that has only two unknowns and no start.

    Given alpha and beta, A, B and E are a non-negative linear least-squares problem in three unknowns,
    solved exactly; alpha and beta are searched on a grid that zooms in. Compare with `polished`.
    """
    n0, d0 = (np.exp(np.log(v).mean()) for v in (fitted.n_params, fitted.data))
    low, high = np.array([0.01, 0.01]), np.array([3.0, 3.0])
    for _ in range(n_zooms):
        alpha, beta = (np.linspace(*pair, n_grid) for pair in zip(low, high))
        terms, error = _project(alpha, beta, fitted.n_params / n0, fitted.data / d0, fitted.loss)
        i, j = np.unravel_index(error.argmin(), error.shape)
        best, width = np.array([alpha[i], beta[j]]), (high - low) / 8
        low, high = np.maximum(best - width, 1e-3), best + width
    tn, td, e = terms[i, j]
    return Law(float(tn * n0 ** best[0]), float(td * d0 ** best[1]), float(e), float(best[0]), float(best[1]))


def _project(alpha, beta, n, d, loss):
    """For every pair of exponents the best non-negative (T_N, T_D, E) (I, J, 3), and its squared relative
    error (I, J)."""
    x, y, one = n ** -alpha[:, None] / loss, d ** -beta[:, None] / loss, 1 / loss
    shape = len(alpha), len(beta)
    gram, right = np.empty((*shape, 3, 3)), np.empty((*shape, 3))
    gram[..., 0, 0], gram[..., 1, 1], gram[..., 2, 2] = (x * x).sum(1)[:, None], (y * y).sum(1), one @ one
    gram[..., 0, 1] = gram[..., 1, 0] = x @ y.T
    gram[..., 0, 2] = gram[..., 2, 0] = (x @ one)[:, None]
    gram[..., 1, 2] = gram[..., 2, 1] = y @ one
    right[..., 0], right[..., 1], right[..., 2] = x.sum(1)[:, None], y.sum(1), one.sum()
    best, error = np.zeros((*shape, 3)), np.full(shape, float(len(loss)))
    for used in (list(c) for size in (1, 2, 3) for c in combinations(range(3), size)):
        part = gram[..., used, :][..., used] + 1e-13 * np.eye(len(used))
        solved = np.linalg.solve(part, right[..., used, None])[..., 0]
        left = len(loss) - (solved * right[..., used]).sum(-1)
        take = (solved >= 0).all(-1) & (left < error)
        full = np.zeros((*shape, 3))
        full[..., used] = solved
        best, error = np.where(take[..., None], full, best), np.where(take, left, error)
    return best, error


def polished(fitted, law):
    """The Huber minimum next to a law: (Law, objective). Equal to the fit's own when both searches agree."""
    problem = Problem(fitted.n_params, fitted.data, fitted.loss, delta=fitted.delta)
    floor = np.maximum([law.A, law.B, law.E, law.alpha, law.beta], 1e-300)
    theta, value = powerlaw.minimise(problem, problem.theta(floor))
    return Law(*(float(v) for v in problem.constants(theta)[0])), float(value[0])


def profile(fitted, name, values=None):
    """Profile likelihood of alpha or beta: DataFrame value, objective, deviance, inside (the 95 % interval).

    The objective is minimised over the other four constants at every value. Deviance is twice the loss of
    log-likelihood for errors with density exp(-Huber(r) / s), whose scale s is profiled out as well.

    Raises:
        ValueError: name is not an exponent.
    """
    if name not in _COLUMN:
        raise ValueError(f"expected one of {sorted(_COLUMN)}, found {name!r}")
    values = np.asarray(_profile_values(fitted, name) if values is None else values, float)
    problem = Problem(fitted.n_params, fitted.data, fitted.loss, delta=fitted.delta)
    optimum = problem.theta([fitted.law.A, fitted.law.B, fitted.law.E, fitted.law.alpha, fitted.law.beta])
    starts = np.concatenate([optimum, powerlaw.start_grid(problem, 3, 5)])
    theta, fixed = np.tile(starts, (len(values), 1)), np.repeat(values, len(starts))
    lower, upper = (np.tile(bound, (len(theta), 1)) for bound in (problem.lower, problem.upper))
    for array in (theta, lower, upper):
        array[:, _COLUMN[name]] = fixed
    _, value = powerlaw.minimise(problem, theta, lower, upper)
    objective = value.reshape(len(values), -1).min(axis=1)
    n = len(fitted.loss)
    best = _negative_log_likelihood(fitted.objective, n, fitted.delta)
    deviance = np.array([2 * (_negative_log_likelihood(v, n, fitted.delta) - best) for v in objective])
    return pd.DataFrame({name: values, "objective": objective, "deviance": deviance,
                         "inside": deviance <= CHI2_95})


def _profile_values(fitted, name):
    """41 values that reach well beyond the bootstrap interval."""
    low, high = fitted.interval(lambda law: getattr(law, name))
    centre = getattr(fitted.law, name)
    if np.isnan(low):
        low, high = 0.8 * centre, 1.2 * centre
    return np.linspace(max(centre - 2 * (centre - low), 1e-3), centre + 2 * (high - centre), 41)


def _negative_log_likelihood(objective, n, delta):
    """n log Z(s) + objective / s at its smallest, Z the norm of exp(-Huber_delta(r) / s)."""
    def at(log_s):
        s = np.exp(log_s)
        inside = np.sqrt(2 * np.pi * s) * erf(delta / np.sqrt(2 * s))
        z = inside + 2 * s / delta * np.exp(-delta ** 2 / (2 * s))
        return n * np.log(z) + objective / s

    guess = np.log(max(objective, 1e-300) / n)
    return minimize_scalar(at, bounds=(guess - 5, guess + 5), method="bounded", options={"xatol": 1e-10}).fun


def holdout(runs, data_column="n_examples", share=0.2, by="compute", n_bootstrap=1000, seed=0):
    """Fit without the largest runs and predict them: DataFrame with one row per run left out.

    by: "compute" (N D), "n_params" or "data"; share: part of the runs left out (at least one).
    Columns: n_params, data, loss, predicted with _low and _high (95 % interval of the law, without the
    scatter of a single run) and log_error = log(predicted / loss).

    Raises:
        ValueError: by or share is not understood, or `scaling.check_runs` rejects the smaller runs.
    """
    n_params, data, loss = scaling.check_runs(runs, data_column)
    size = {"compute": n_params * data, "n_params": n_params, "data": data}
    if by not in size or not 0 < share < 1:
        raise ValueError(f"expected by in {sorted(size)} and 0 < share < 1, found {by!r} and {share}")
    largest = size[by] >= np.sort(size[by])[-max(1, round(share * len(loss)))]
    fitted = scaling.fit(runs[~largest], data_column, n_bootstrap, seed)
    rows = []
    for n, d, measured in zip(n_params[largest], data[largest], loss[largest]):
        predicted = float(fitted.law.loss(n, d))
        low, high = fitted.interval(lambda law: law.loss(n, d))
        rows.append((n, d, measured, predicted, low, high, np.log(predicted / measured)))
    columns = ["n_params", "data", "loss", "predicted", "predicted_low", "predicted_high", "log_error"]
    return pd.DataFrame(rows, columns=columns)


def isoflop(fitted, budgets=None):
    """Best model size at fixed compute without the law (approach 2 of Hoffmann et al.).

    For every model size the loss is interpolated in log D (never extrapolated); per budget a parabola in
    log N through the models that reach it gives n_params and loss at its minimum, kept when that lies
    between the models. Returns DataFrame train_flops, n_params, loss, n_models, n_params_law; its attrs
    hold "a", the slope of log n_params (NaN below two budgets). A parabola is a coarse model, so expect
    agreement in trend rather than within the interval.
    """
    curves = _curves(fitted)
    per_datum = 6 * fitted.tokens_per_datum
    if budgets is None:
        flops = per_datum * fitted.n_params * fitted.data
        budgets = np.geomspace(flops.min(), flops.max(), 25)
    rows = []
    for budget in budgets:
        log_data = [np.log(budget / per_datum / n) for n, _, _ in curves]
        reached = [(np.log(n), np.interp(at, log_d, log_loss))
                   for at, (n, log_d, log_loss) in zip(log_data, curves) if log_d[0] <= at <= log_d[-1]]
        vertex = _vertex(np.array(reached))
        if vertex is not None:
            rows.append((budget, np.exp(vertex[0]), np.exp(vertex[1]), len(reached),
                         float(scaling.optimal_size(fitted.law, budget, fitted.tokens_per_datum)[0])))
    table = pd.DataFrame(rows, columns=["train_flops", "n_params", "loss", "n_models", "n_params_law"])
    table.attrs["a"] = (float(np.polyfit(np.log(table.train_flops), np.log(table.n_params), 1)[0])
                        if len(table) > 1 else float("nan"))
    return table


def _curves(fitted):
    """(N, log D ascending, log loss averaged over seeds) of every model size with at least two data sizes."""
    table = pd.DataFrame({"n": fitted.n_params, "log_d": np.log(fitted.data),
                          "log_loss": np.log(fitted.loss)})
    means = table.groupby(["n", "log_d"], as_index=False).log_loss.mean()
    return [(n, part.log_d.to_numpy(), part.log_loss.to_numpy())
            for n, part in means.groupby("n") if len(part) > 1]


def _vertex(points):
    """Minimum (x, y) of the parabola through points (m, 2); None if there is none between them."""
    if len(points) < 3:
        return None
    x, y = points.T
    curvature, slope, _ = coefficients = np.polyfit(x - x.mean(), y, 2)
    if curvature <= 0:
        return None
    at = -slope / (2 * curvature)
    if not x.min() <= at + x.mean() <= x.max():
        return None
    return at + x.mean(), np.polyval(coefficients, at)
