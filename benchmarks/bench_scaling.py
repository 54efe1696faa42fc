"""Scaling fit: time against scipy one start at a time, and coverage of the 95 % intervals.

    python -m benchmarks.bench_scaling [--hoffmann] [--worlds 200] [--noise 0.005 0.01 0.02]

The runs timed are a synthetic world of 80, or with --hoffmann the 240 points of Hoffmann et al. that
Besiroglu et al. fitted (scaling/chinchilla_figure4_points.csv in the folder named by CLOUD_DATA). Both sides
minimise the same objective with its analytic gradient from the same starts on the same resamples, in one
thread; scipy does a random subset of both, and its time is scaled up. Times are CPU seconds. Prints Markdown
and writes benchmarks/results/scaling_*.csv.
"""

import argparse
import time
from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from cloud_lib import io, powerlaw, scaling
from cloud_lib.powerlaw import Law, Problem

TRUTH = Law(A=90.7464, B=21.9854, E=0.2296, alpha=0.4339, beta=0.3518)  # the paper's constants
BUDGET = 1e17                                                           # [FLOP], for N_opt and D_opt
TIGHT = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 20_000, "maxfun": 50_000}
QUANTITIES = {**{name: attrgetter(name) for name in scaling.QUANTITIES},
              "N_opt": lambda law: scaling.optimal_size(law, BUDGET)[0],
              "D_opt": lambda law: scaling.optimal_size(law, BUDGET)[1]}
RESULTS = Path(__file__).parent / "results"


def world(seed, noise):
    """80 synthetic runs: the paper's 12 encoders x 5 data sizes, a third twice; noise = std of log loss."""
    rng = np.random.default_rng(seed)
    n = np.array([layers * (12 * w ** 2 + 13 * w) for layers in (1, 3, 6, 12) for w in (64, 256, 768)])
    n, d = (g.ravel() for g in np.meshgrid(n, np.geomspace(12_500, 200_000, 5).round(), indexing="ij"))
    n, d = np.concatenate([n, n[::3]]), np.concatenate([d, d[::3]])
    loss = TRUTH.loss(n, d) * np.exp(noise * rng.standard_normal(len(n)))
    return pd.DataFrame({"n_params_non_embedding": n, "n_examples": d, "val_loss": loss})


def hoffmann():
    """The reconstructed runs of Hoffmann et al. without the five of the highest loss; D = C / 6N."""
    points = pd.read_csv(io.raw_dir() / "scaling" / "chinchilla_figure4_points.csv")
    points = points.sort_values("loss").iloc[:-5]
    return pd.DataFrame({"n_params_non_embedding": points["Model Size"], "val_loss": points["loss"],
                         "n_tokens_seen": points["Training FLOP"] / 6 / points["Model Size"]})


def plain_objective(theta, log_n, log_d, log_loss, weights):
    """Objective and gradient of one copy, as anyone would write them.

    theta = (log A, log B, log E, alpha, beta).
    """
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full(len(log_n), e)])
    log_sum = np.logaddexp.reduce(terms, axis=0)
    r, share = log_sum - log_loss, np.exp(terms - log_sum)
    pull = weights * np.clip(r, -powerlaw.DELTA, powerlaw.DELTA) * share
    gradient = [pull[0].sum(), pull[1].sum(), pull[2].sum(), -pull[0] @ log_n, -pull[1] @ log_d]
    return weights @ powerlaw.huber(r, powerlaw.DELTA), np.array(gradient)


def value_only(*arguments):
    """The objective without its gradient: scipy then takes finite differences."""
    return plain_objective(*arguments)[0]


def one_at_a_time(rows, columns, weights, gradient=True):
    """Seconds per fit and objectives (K,) of scipy's L-BFGS-B from every row of constants."""
    function, logs = plain_objective if gradient else value_only, [np.log(column) for column in columns]
    starts = np.column_stack([np.log(rows[:, :3]), rows[:, 3:]])
    minimize(function, starts[0], (*logs, weights[0]), "L-BFGS-B", gradient or None, options=TIGHT)
    began = time.process_time()
    found = [minimize(function, start, (*logs, w), "L-BFGS-B", gradient or None, options=TIGHT).fun
             for start, w in zip(starts, weights)]
    return (time.process_time() - began) / len(rows), np.array(found)


def timed(function, *arguments):
    """(CPU seconds of the second of two calls, result): the first one pays for the memory it asks for."""
    function(*arguments)
    began = time.process_time()
    result = function(*arguments)
    return time.process_time() - began, result


def speed(runs, data_column, subset, n_bootstrap=4000):
    """Rows fits, ours_s, scipy_s, ratio, and the share of fits that reached the optimum, ours and scipy's."""
    columns, rng = scaling.check_runs(runs, data_column), np.random.default_rng(0)
    problem = Problem(*columns)
    starts, ones = powerlaw.start_grid(problem), np.ones((subset, len(runs)))
    search_s, (theta, best, reached) = timed(powerlaw.search, problem, starts)
    weights = scaling.resample(*columns[:2], n_bootstrap, rng)
    resampled = Problem(*columns, weights=weights)
    bootstrap_s, (_, ours) = timed(powerlaw.minimise, resampled, np.tile(theta, (n_bootstrap, 1)))

    some = problem.constants(starts[rng.choice(len(starts), subset, replace=False)])
    optimum = np.tile(problem.constants(theta), (subset, 1))
    per_start, found = one_at_a_time(some, columns, ones)
    per_numeric, _ = one_at_a_time(some[:20], columns, ones, gradient=False)
    per_resample, theirs = one_at_a_time(optimum, columns, weights)
    lowest = np.minimum(ours[:subset], theirs) * (1 + 1e-6)
    n = len(starts)
    rows = [(f"{n} starts", search_s, n * per_start, reached, (found <= best * (1 + 1e-6)).mean()),
            (f"{n_bootstrap} resamples", bootstrap_s, n_bootstrap * per_resample,
             (ours[:subset] <= lowest).mean(), (theirs <= lowest).mean()),
            ("both", search_s + bootstrap_s, n * per_start + n_bootstrap * per_resample, np.nan, np.nan),
            (f"{n} starts, scipy with finite differences", search_s, n * per_numeric, np.nan, np.nan)]
    table = pd.DataFrame(rows, columns=["fits", "ours_s", "scipy_s", "ours_reached", "scipy_reached"])
    table.insert(3, "ratio", table.scipy_s / table.ours_s)
    return table


def coverage(n_worlds, noise, n_bootstrap=1000):
    """Per quantity: share of worlds whose 95 % interval holds the truth, and the median of fitted / true."""
    hits, ratios = [], []
    for seed in range(n_worlds):
        fitted = scaling.fit(world(seed, noise), n_bootstrap=n_bootstrap, seed=seed)
        truth = {name: of(TRUTH) for name, of in QUANTITIES.items()}
        intervals = {name: fitted.interval(of) for name, of in QUANTITIES.items()}
        hits.append([low <= truth[name] <= high for name, (low, high) in intervals.items()])
        ratios.append([of(fitted.law) / truth[name] for name, of in QUANTITIES.items()])
    return pd.DataFrame({"quantity": list(QUANTITIES), "noise": noise, "n_worlds": n_worlds,
                         "coverage": np.mean(hits, axis=0),
                         "median_fitted_over_true": np.median(ratios, axis=0)})


def report(table, name):
    """Print as Markdown and write."""
    print("|".join(["", *table.columns, ""]) + "\n" + "|---" * table.shape[1] + "|")
    for row in table.itertuples(index=False):
        print("|".join(["", *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row), ""]))
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"scaling_{name}.csv", index=False, float_format="%.4g")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hoffmann", action="store_true", help="time on the points of Hoffmann et al.")
    parser.add_argument("--subset", type=int, default=200, help="starts and resamples that scipy fits")
    parser.add_argument("--worlds", type=int, default=200)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.005, 0.01, 0.02], help="std of log loss")
    args = parser.parse_args()
    if args.hoffmann:
        report(speed(hoffmann(), "n_tokens_seen", args.subset), "speed_hoffmann")
    else:
        report(speed(world(0, 0.01), "n_examples", args.subset), "speed")
    if args.worlds:
        report(pd.concat([coverage(args.worlds, noise) for noise in args.noise]), "coverage")


if __name__ == "__main__":
    main()
