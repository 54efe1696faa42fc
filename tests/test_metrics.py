"""Oracles: scikit-learn, scipy's bootstrap and the matbench-discovery package."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from cloud_lib import metrics

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(0.1, 0.2, 400).round(2)  # rounded: ties, and values at the threshold
PREDICTION = (TRUTH + RNG.normal(0, 0.15, 400)).round(2)


@pytest.fixture(scope="module")
def published():
    """stable_metrics of the matbench-discovery package."""
    return pytest.importorskip("matbench_discovery.metrics").stable_metrics


def test_regression_metrics_equal_scikit_learn():
    assert metrics.mae(TRUTH, PREDICTION) == pytest.approx(sk.mean_absolute_error(TRUTH, PREDICTION))
    assert metrics.rmse(TRUTH, PREDICTION) == pytest.approx(sk.root_mean_squared_error(TRUTH, PREDICTION))
    assert metrics.r2(TRUTH, PREDICTION) == pytest.approx(sk.r2_score(TRUTH, PREDICTION))
    assert metrics.mad([0, 0, 3]) == pytest.approx(4 / 3)
    assert np.isnan(metrics.r2([1, 1], [1, 2]))


def test_roc_equals_scikit_learn():
    fpr, tpr, threshold = metrics.roc_curve(TRUTH <= 0, PREDICTION)
    assert metrics.roc_auc(TRUTH <= 0, PREDICTION) == pytest.approx(sk.roc_auc_score(TRUTH <= 0, -PREDICTION))
    oracle = sk.roc_curve(TRUTH <= 0, -PREDICTION, drop_intermediate=False)
    np.testing.assert_allclose([fpr, tpr], oracle[:2])
    np.testing.assert_allclose(threshold, -oracle[2])


def test_missing_prediction_ranks_as_least_stable():
    worst = metrics.roc_auc([1, 0, 0], [np.nan, 0.1, 0.2])
    assert worst == 0
    assert metrics.roc_auc([1, 0], [np.nan, np.nan]) == 0.5
    assert np.isnan(metrics.roc_auc([1, 1], [0, 0]))


def test_discovery_metrics_equal_the_benchmarks(published):
    oracle = published(pd.Series(TRUTH), pd.Series(PREDICTION), stability_threshold=0)
    ours = metrics.discovery_metrics(TRUTH, PREDICTION)
    names = {"precision": "Precision", "accuracy": "Accuracy"}
    assert ours == pytest.approx({name: oracle[names.get(name, name)] for name in ours})


def test_missing_predictions_count_as_unstable(published):
    gaps = np.where(np.arange(400) % 5, PREDICTION, np.nan)
    oracle = published(pd.Series(TRUTH), pd.Series(gaps), stability_threshold=0)
    ours = metrics.discovery_metrics(TRUTH, gaps)
    for name in ("F1", "DAF", "TPR", "TNR", "MAE", "RMSE", "R2"):
        assert ours[name] == pytest.approx(oracle[name])
    # The package divides by the rows with a prediction, so its accuracy can exceed 1; ours by all rows.
    assert ours["accuracy"] == pytest.approx(oracle["Accuracy"] * np.sum(~np.isnan(gaps)) / 400)


def test_only_the_predictions_threshold_moves():
    truth, prediction = [0.0, 0.04, 0.2], [0.05, 0.03, 0.3]
    assert metrics.discovery_metrics(truth, prediction)["TPR"] == 0
    loose = metrics.discovery_metrics(truth, prediction, threshold=0.05)  # <= counts
    assert (loose["TPR"], loose["precision"], loose["DAF"]) == (1, 0.5, 1.5)


def test_nothing_predicted_stable_is_nan_not_zero():
    none = metrics.discovery_metrics([0.0, 0.1], [0.2, 0.2])
    assert np.isnan(none["precision"]) and np.isnan(none["DAF"]) and none["F1"] == 0


def test_hull_distance_shifts_one_to_one():
    np.testing.assert_allclose(metrics.hull_distance([-1.0, np.nan], [-1.1, -2], [0.02, 0]), [0.12, np.nan])


def test_folds_are_summarised_as_on_the_leaderboard():
    folds = [23.7560, 35.7004, 53.9029, 23.9486, 43.5412]  # coNGN, jdft2d: published as 36.1698 (11.5973)
    assert metrics.summary(folds)[:2] == pytest.approx((36.1698, 11.5973), abs=1e-4)
    assert metrics.fold_mae([1, 2, 3], [1, 1, 1], [0, 1, 1]) == {0: 0.0, 1: 1.5}


def test_paired_bootstrap_cancels_shared_difficulty():
    hard = RNG.normal(0, 10, 300)  # the same error in both models
    truth, ours = np.zeros(300), hard
    interval = metrics.paired_bootstrap(lambda t, p: float(np.mean(p - t)), truth, ours, hard + 0.1, seed=1)
    assert interval == pytest.approx((-0.1, -0.1, -0.1))
    wide = metrics.paired_bootstrap(metrics.mae, TRUTH, PREDICTION, TRUTH, n_resamples=200)
    assert wide.low < wide.difference < wide.high
    assert wide == metrics.paired_bootstrap(metrics.mae, TRUTH, PREDICTION, TRUTH, n_resamples=200)
    rare = metrics.paired_bootstrap(metrics.roc_auc, [1, 0, 0, 0], [0, 1, 2, 3], [3, 2, 1, 0], n_resamples=50)
    assert rare == (1, 1, 1)  # about a third of the draws has no stable material


@pytest.mark.parametrize("call, message", [
    (lambda: metrics.mae([1, 2], [1]), r"expected vectors of one length, .*\(2,\).*\(1,\).*material_id"),
    (lambda: metrics.mae([], []), "expected vectors of one length"),
    (lambda: metrics.roc_curve([1, 1], [0, 0]), "found 2 stable of 2"),
    (lambda: metrics.discovery_metrics([np.nan, 0], [0, 0]), "1 of 2 true hull distances are NaN"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
