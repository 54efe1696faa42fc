"""The scaling law: solver against scipy, known truths, published replications, named errors; and its grid."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize, minimize_scalar

from cloud_lib import cli, grid, powerlaw, report, scaling, scaling_checks, scaling_tables
from cloud_lib.powerlaw import Law, Problem

TRUTH = Law(A=90.7464, B=21.9854, E=0.2296, alpha=0.4339, beta=0.3518)  # the paper's constants


def make_runs(noise=0.0, law=TRUTH, seed=0, n_sizes=5):
    """The paper's 12 encoders x n_sizes data sizes; 29 tokens per crystal, 10 epochs."""
    n = np.array([layers * (12 * w ** 2 + 13 * w) for layers in (1, 3, 6, 12) for w in (64, 256, 768)])
    n, d = (g.ravel() for g in np.meshgrid(n, np.geomspace(12_500, 200_000, n_sizes).round(), indexing="ij"))
    loss = law.loss(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return pd.DataFrame({"n_params_non_embedding": n, "n_examples": d, "n_tokens_unique": 29 * d,
                         "n_tokens_seen": 290 * d, "val_loss": loss})


@pytest.fixture(scope="module")
def noisy():
    return make_runs(0.01)


@pytest.fixture(scope="module")
def fitted(noisy):
    return scaling.fit(noisy, n_bootstrap=300)


def constants(law):
    return np.array([law.A, law.B, law.E, law.alpha, law.beta])


# ---------------------------------------------------------------------------------------- the solver
def test_derivatives_are_those_of_the_objective(noisy):
    problem = Problem(*scaling.check_runs(noisy))
    theta = powerlaw.start_grid(problem)[::450]
    weights = np.random.default_rng(0).integers(0, 3, (len(theta), len(noisy))).astype(float)
    value, gradient, hessian, majoriser = problem.derivatives(theta, weights, 0.05, newton=True)
    expected = (weights * powerlaw.huber(problem.residuals(theta), 0.05)).sum(axis=1)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for k in range(5):
        step = np.zeros(5)
        step[k] = 1e-6
        up, down = (problem.derivatives(theta + s, weights, 0.05, True) for s in (step, -step))
        np.testing.assert_allclose((up[0] - down[0]) / 2e-6, gradient[:, k], atol=1e-6)
        np.testing.assert_allclose((up[1] - down[1]) / 2e-6, hessian[:, :, k], atol=2e-5)
    assert (np.linalg.eigvalsh(majoriser) > -1e-9).all()


def plain_objective(theta, n, d, loss):
    """Summed Huber of log-sum-exp, written out; theta = (log A, log B, log E, alpha, beta)."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * np.log(n), b - beta * np.log(d), np.full(len(n), e)])
    r = np.logaddexp.reduce(terms) - np.log(loss)
    return np.where(abs(r) <= 1e-3, r ** 2 / 2, 1e-3 * (abs(r) - 5e-4)).sum()


def test_the_minimum_is_that_of_scipy(noisy, fitted):
    columns = scaling.check_runs(noisy)
    mine = np.concatenate([np.log(constants(fitted.law)[:3]), constants(fitted.law)[3:]])
    assert plain_objective(mine, *columns) == pytest.approx(fitted.objective, rel=1e-10)
    start = [4.0, 3.0, -1.0, 0.4, 0.4]
    options = {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 20_000, "maxfev": 20_000, "adaptive": True}
    for _ in range(3):  # a simplex shrinks too early once or twice
        theirs = minimize(plain_objective, start, columns, "Nelder-Mead", options=options)
        start = theirs.x
    assert fitted.objective <= theirs.fun * (1 + 1e-9)
    np.testing.assert_allclose(theirs.x, mine, rtol=1e-4)


def test_weights_are_repeated_runs(noisy):
    columns = scaling.check_runs(noisy)
    weights = scaling.resample(*columns[:2], 1, np.random.default_rng(1))
    drawn = [np.repeat(column, weights[0].astype(int)) for column in columns]
    weighted, repeated = Problem(*columns, weights=weights), Problem(*drawn)
    (one, f), (two, g) = (powerlaw.minimise(p, p.theta(constants(TRUTH))) for p in (weighted, repeated))
    assert f[0] == pytest.approx(g[0], rel=1e-9)
    np.testing.assert_allclose(weighted.constants(one), repeated.constants(two), rtol=1e-6)


def test_bounds_freeze_and_hold(noisy):
    problem = Problem(*scaling.check_runs(noisy))
    starts = powerlaw.start_grid(problem)[::500]
    lower, upper = problem.lower.copy(), problem.upper.copy()
    starts[:, 1] = lower[1] = upper[1] = 0.5
    theta, _ = powerlaw.minimise(problem, starts, lower, upper)
    assert (theta[:, 1] == 0.5).all() and (theta >= problem.lower).all() and (theta <= problem.upper).all()


# ---------------------------------------------------------------------------------- known truths
def test_exact_runs_give_the_constants_back():
    fit = scaling.fit(make_runs(), n_bootstrap=0)
    np.testing.assert_allclose(constants(fit.law), constants(TRUTH), rtol=1e-5)
    assert fit.n_starts >= 4500 and fit.share_reached > 0.99 and fit.boundary == ()
    assert np.isnan(fit.interval(lambda law: law.A)).all()


def test_intervals_hold_the_truth_and_move_with_the_seed_only(noisy, fitted):
    table = fitted.table().set_index("quantity")
    truth = pd.Series({name: getattr(TRUTH, name) for name in scaling.QUANTITIES})
    assert ((table.low < truth) & (truth < table.high)).sum() >= 7
    assert (table.low < table.value).all() and (table.value < table.high).all()
    again, other = scaling.fit(noisy, n_bootstrap=300), scaling.fit(noisy, n_bootstrap=300, seed=1)
    np.testing.assert_array_equal(fitted.bootstrap, again.bootstrap)
    assert not np.array_equal(fitted.bootstrap, other.bootstrap)


def test_the_papers_exponents_follow_from_its_constants():
    paper = report.paper_values("scaling_law").set_index("symbol").value
    law = Law(*paper[["A", "B", "E", "alpha", "beta"]])
    assert (round(law.a, 2), round(law.b, 2)) == (paper.a, paper.b)
    assert law.G == pytest.approx(7.935, abs=5e-4)


def test_epochs_replication_of_hoffmann(cloud_data):
    """Besiroglu et al. 2024; their five outliers are the five points of the highest loss."""
    points = pd.read_csv(cloud_data / "scaling" / "chinchilla_figure4_points.csv")
    points = points.sort_values("loss").iloc[:-5]
    runs = pd.DataFrame({"n_params_non_embedding": points["Model Size"], "val_loss": points["loss"],
                         "n_tokens_seen": points["Training FLOP"] / 6 / points["Model Size"]})
    fit = scaling.fit(runs, "n_tokens_seen", n_bootstrap=2000)
    theirs = np.array([482.01, 2085.43, 1.8172, 0.3478, 0.3658])
    errors = np.array([124.58, 1293.23, 0.03, 0.02, 0.02])
    assert (abs(constants(fit.law) - theirs) < 0.1 * errors).all()
    ratio = fit.bootstrap.std(axis=0) / errors
    assert ((ratio > 0.7) & (ratio < 1.3)).all()
    problem = Problem(*scaling.check_runs(runs, "n_tokens_seen"))
    published = powerlaw.huber(problem.residuals(problem.theta(theirs)), powerlaw.DELTA).sum()
    assert fit.objective <= published


# ------------------------------------------------------------------------------------- second opinions
def test_variable_projection_finds_the_same_law(fitted):
    exact = scaling.fit(make_runs(), n_bootstrap=0)
    found = scaling_checks.variable_projection(exact)
    np.testing.assert_allclose(constants(found), constants(TRUTH), rtol=1e-4)
    law, objective = scaling_checks.polished(fitted, scaling_checks.variable_projection(fitted))
    assert objective == pytest.approx(fitted.objective, rel=1e-6)
    np.testing.assert_allclose(constants(law), constants(fitted.law), rtol=1e-4)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_the_profile_has_its_minimum_at_the_fit(fitted, name):
    best = getattr(fitted.law, name)
    table = scaling_checks.profile(fitted, name, best + np.linspace(-0.1, 0.1, 21))
    assert table.objective.idxmin() == 10 and table.objective[10] == pytest.approx(fitted.objective, rel=1e-6)
    assert (np.diff(table.deviance[10:]) > 0).all() and (np.diff(table.deviance[:11]) < 0).all()
    assert table.inside[10] and not table.inside.iloc[[0, -1]].any()
    default = scaling_checks.profile(fitted, name)
    assert default.inside.any() and not default.inside.all()


def test_small_runs_predict_the_largest(noisy):
    table = scaling_checks.holdout(noisy, share=0.2, n_bootstrap=100)
    assert 12 <= len(table) <= 15 and (table.log_error.abs() < 0.05).all()
    assert (table.predicted_low < table.predicted).all() and (table.predicted < table.predicted_high).all()
    assert (scaling_checks.holdout(noisy, by="n_params", n_bootstrap=0).n_params >= 2e7).all()
    with pytest.raises(ValueError, match="found 'flops' and 0.2"):
        scaling_checks.holdout(noisy, by="flops")


def test_isoflop_follows_the_law():
    fit = scaling.fit(make_runs(n_sizes=9), "n_tokens_seen", n_bootstrap=0)
    table = scaling_checks.isoflop(fit)
    assert len(table) > 5 and abs(np.log(table.n_params / table.n_params_law)).max() < 0.5
    assert table.attrs["a"] == pytest.approx(fit.law.a, abs=0.06)
    unreached = scaling_checks.isoflop(fit, [1.0])
    assert len(unreached) == 0 and np.isnan(unreached.attrs["a"])


def test_profile_wants_an_exponent(fitted):
    with pytest.raises(ValueError, match=r"expected one of \['alpha', 'beta'\], found 'E'"):
        scaling_checks.profile(fitted, "E")


# ------------------------------------------------------------------------------------ what follows from it
@pytest.mark.parametrize("per_datum", [1.0, 290.0])
def test_the_frontier_minimises_the_loss_at_fixed_compute(per_datum):
    flops = 3e16
    best = minimize_scalar(lambda log_n: TRUTH.loss(np.exp(log_n), flops / 6 / per_datum / np.exp(log_n)),
                           bounds=(8, 30), method="bounded", options={"xatol": 1e-8})
    n, d = scaling.optimal_size(TRUTH, flops, per_datum)
    assert n == pytest.approx(np.exp(best.x), rel=1e-4) and 6 * n * d * per_datum == pytest.approx(flops)


def test_frontier_intervals_and_budgets(fitted):
    table = scaling.frontier(fitted, [1e15, 1e17])
    assert fitted.tokens_per_datum == pytest.approx(290)
    for name in ("n_params", "data", "loss"):
        assert ((table[f"{name}_low"] < table[name]) & (table[name] < table[f"{name}_high"])).all()
    hours = scaling.budget_for(fitted, 2, 1e17 / 7200)
    assert hours.n_params[0] == pytest.approx(table.n_params[1]) and hours.gpu_hours[0] == 2


def test_contours_have_their_loss():
    table = scaling.contours(TRUTH, [0.4, 0.8], np.geomspace(1e3, 1e9, 20), tokens_per_datum=29)
    np.testing.assert_allclose(TRUTH.loss(table.n_params, table.data), table.loss)
    np.testing.assert_allclose(table.train_flops, 6 * 29 * table.n_params * table.data)
    assert 0 < (table.loss == 0.4).sum() < (table.loss == 0.8).sum() < 20  # small models stay above


def test_three_readings_of_d(noisy):
    fits = scaling.readings(noisy, n_bootstrap=0)
    assert list(fits) == ["n_examples", "n_tokens_unique", "n_tokens_seen"]
    frontiers = np.array([scaling.frontier(f, 1e16).n_params[0] for f in fits.values()])
    np.testing.assert_allclose(frontiers, frontiers[0], rtol=1e-4)  # constant ratios: only B and G change
    assert fits["n_tokens_seen"].law.B > 2 * fits["n_examples"].law.B


# ----------------------------------------------------------------------------------------------- bad input
def spoil(column, value):
    runs = make_runs()
    runs.loc[[1, 4], column] = value
    return runs


@pytest.mark.parametrize("runs, message", [
    (make_runs().drop(columns="val_loss"), r"missing \['val_loss'\].*--data-column"),
    (spoil("val_loss", np.nan), r"2 of 60 runs have a non-finite .*'row': 1.*'row': 4.*remove"),
    (spoil("val_loss", -0.5), "2 of 60 runs have a non-finite or non-positive value"),
    (spoil("n_examples", np.inf), "2 of 60 runs have a non-finite or non-positive value"),
    (pd.concat([make_runs(), make_runs()[:2]]), r"2 of 62 runs are duplicate rows.*keep each run once"),
    (make_runs()[:4], "expected more runs than the 5 constants, found 4; add 2 or more"),
    (make_runs()[:0], "found 0"),
    (make_runs(n_sizes=9)[:9], "expected at least 3 model sizes, found 1 .*add runs of other model sizes"),
    (make_runs(n_sizes=2), r"expected at least 3 data sizes, found 2 in n_examples \(\[12500.0, 200000.0\]\)"),
])
def test_bad_runs_are_named(runs, message):
    with pytest.raises(ValueError, match=message):
        scaling.fit(runs, n_bootstrap=0)


def test_negative_resamples_are_an_error(noisy):
    with pytest.raises(ValueError, match="0 or more bootstrap resamples, found -1"):
        scaling.fit(noisy, n_bootstrap=-1)


def test_a_law_without_a_frontier_still_has_numbers(noisy):
    flat = noisy.assign(val_loss=np.exp(0.01 * np.random.default_rng(0).standard_normal(len(noisy))))
    fit = scaling.fit(flat, n_bootstrap=50)
    assert fit.boundary and np.isfinite(fit.table()[["value", "low", "high"]].to_numpy()).all()
    json.dumps(fit.to_dict([1e15]), allow_nan=False)


@pytest.mark.parametrize("law, message", [
    (Law(A=90, B=20, E=1e-9, alpha=0.43, beta=0.35), "E -> 0.*add larger models on more data"),
    (Law(A=1e-9, B=20, E=0.2, alpha=0.43, beta=0.35), "A -> 0.*add smaller models|alpha"),
    (Law(A=90, B=1e-9, E=0.2, alpha=0.43, beta=0.35), "B -> 0.*add smaller data sets|beta"),
    (Law(A=1e28, B=20, E=0.2, alpha=6, beta=0.35), "alpha at its upper bound.*add model sizes"),
])
def test_a_fit_on_the_boundary_says_what_to_add(law, message):
    found = scaling.fit(make_runs(0.002, law), n_bootstrap=20)
    assert pd.Series(found.boundary).str.contains(message).any() and found.share_boundary > 0.2
    assert f"not determined: {found.boundary[0]}" in found.text()
    lines = scaling_tables.summary(found, report.paper_values("scaling_law").set_index("symbol")["value"])
    without = lines["result"].str.startswith(f"scaling law, {found.boundary[0].split()[0]} (not determined")
    assert without.sum() == 1 and lines.loc[without, "ours"].isna().all() and lines["ours"].notna().any()


# -------------------------------------------------------------------------------------- command line
@pytest.fixture
def runs_csv(tmp_path, noisy):
    noisy.to_csv(tmp_path / "runs.csv", index=False)
    return str(tmp_path / "runs.csv")


def test_command_prints_json(runs_csv, capsys):
    assert cli.main(["scaling", runs_csv, "--format", "json", "--data-column", "n_tokens_seen",
                     "--bootstrap", "50", "--budget", "1e16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"A", "B", "E", "alpha", "beta", "a", "b", "G", "objective", "residual_spread"} <= set(found)
    assert all(low < found[name] < high for name, (low, high) in found["intervals"].items())
    assert found["n_bootstrap"] == 50 and found["data_column"] == "n_tokens_seen"
    assert found["frontier"][0]["n_params_low"] < found["frontier"][0]["n_params"]


def test_command_without_bootstrap_is_valid_json(runs_csv, capsys):
    assert cli.main(["scaling", runs_csv, "--format", "json", "--bootstrap", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["intervals"]["A"] == [None, None]


def test_command_prints_text_and_errors(runs_csv, capsys):
    assert cli.main(["scaling", runs_csv, "--bootstrap", "50", "--budget", "1e16"]) == 0
    text = capsys.readouterr().out
    assert "95 % interval (50 resamples" in text and "\nalpha" in text and "N_opt" in text
    assert cli.main(["scaling", runs_csv, "--data-column", "n_tokens"]) == 2
    assert "missing ['n_tokens']" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- the grid
def make_grid(tmp_path, **changes):
    from cloud_lib.train import EncoderConfig, PretrainConfig

    arguments = {"layers": [1, 3], "heads": [1, 4], "n_examples": grid.data_sizes(4000, 3), "seeds": [0, 1],
                 "data_dir": tmp_path / "data", "out_dir": tmp_path / "runs",
                 "config": PretrainConfig(encoder=EncoderConfig(dropout=0.0))}
    return grid.scaling_grid(**{**arguments, **changes})


def test_grid_has_every_cell_and_repeats_a_third(tmp_path):
    units = make_grid(tmp_path, epochs={1000: 8, 2000: 4, 4000: 2}, lr={1: 1e-3, 4: 5e-4})
    cells = pd.DataFrame([{**u["config"]["encoder"], **u["config"]} for u in units])
    assert (cells.seed == 0).sum() == 12 and (cells.seed == 1).sum() == 4
    assert len({u["out_dir"] for u in units}) == 16
    assert set(cells.dropout) == {0.0} and set(cells.data_seed) == {0}
    assert (cells.n_train * cells.epochs == 8000).all()
    assert (cells.lr == cells.n_heads.map({1: 1e-3, 4: 5e-4})).all()
    cost = cells.n_layers * cells.n_heads ** 2
    assert (np.diff(cost) >= 0).all()  # cheapest first
    json.dumps(units)


@pytest.mark.parametrize("changes, message", [
    ({"layers": []}, r"different positive layers, found \[\]"),
    ({"n_examples": [10, 10]}, "different positive n_examples"),
    ({"heads": [0]}, "different positive heads"),
    ({"epochs": {1000: 1}}, r"expected epochs for every one of .* missing \[2000, 4000\]"),
])
def test_grid_names_what_is_wrong(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_grid(tmp_path, **changes)


def test_finetuning_covers_every_pretrained_unit_and_scratch(tmp_path):
    from cloud_lib.train import EncoderConfig, FinetuneConfig

    units = make_grid(tmp_path)
    configs = grid.finetune_configs(units, FinetuneConfig(encoder=EncoderConfig(dropout=0.0)))
    assert len(configs) == len(units) + 4
    pretrained, scratch = configs["L3-H4-n2000-s0"], configs["scratch-L3-H4"]
    assert pretrained.init.endswith("L3-H4-n2000-s0/model") and pretrained.encoder is None
    assert scratch.init == "scratch" and (scratch.encoder.n_layers, scratch.encoder.n_heads) == (3, 4)


def test_results_become_runs_that_can_be_fitted(tmp_path):
    results = [{"kind": "pretrain", "config": {"encoder": {"n_layers": 1, "n_heads": 1}}, "n_params_total": 1,
                "epochs": 10.0, "train_flops": row.n_params_non_embedding * row.n_tokens_seen, "seed": 0,
                "wall_time_s": 1.0, "best_step": 5, "n_steps": 5, **row._asdict()} for row in
               make_runs(0.01).sample(frac=1, random_state=0).itertuples(index=False)]
    runs = grid.collect_runs(results)
    assert list(runs.columns) == grid.RUN_COLUMNS and runs.train_flops.is_monotonic_increasing
    assert scaling.fit(runs, n_bootstrap=0).law.alpha == pytest.approx(TRUTH.alpha, abs=0.05)
    with pytest.raises(ValueError, match=r"found 1 of which 1 are others, e.g. \['phonons'\]"):
        grid.collect_runs([{"kind": "finetune", "task": "phonons"}])


def test_a_unit_of_the_grid_trains_and_is_collected(tmp_path):
    from cloud_lib import train
    from toy_tokens import toy

    toy(tmp_path / "data")
    run = train.RunConfig(device="cpu", precision="fp32", progress=False)
    config = train.PretrainConfig(epochs=1, batch_size=16, n_evals=1, run=run)
    unit = make_grid(tmp_path, layers=[1], heads=[1], n_examples=[32], seeds=[3], config=config)[0]
    config = train.from_dict(train.PretrainConfig, unit["config"])
    result = train.pretrain(config, unit["data_dir"], unit["out_dir"])
    row = grid.collect_runs([result]).iloc[0]
    assert (row.n_layers, row.n_heads, row.n_examples, row.seed, row.n_steps) == (1, 1, 32, 3, 2)
    assert row.n_params_non_embedding == 12 * 64 ** 2 + 13 * 64 and row.n_tokens_seen == row.n_tokens_unique
