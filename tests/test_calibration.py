import numpy as np
import pandas as pd
import pytest

from cloud_lib.calibration import coverage


def _table(errors, **columns):
    n = len(errors)
    return pd.DataFrame({"task": "t", "fold": np.arange(n) % 5, "split": "test", "target": 1.0,
                         "prediction": 1.0 + errors} | columns)


def test_normal_errors_are_covered_as_promised():
    found = coverage(_table(3 * np.random.default_rng(0).normal(size=20_000)))
    assert found["observed"].to_numpy() == pytest.approx(found["nominal"].to_numpy(), abs=0.015)
    assert (found["n"] == 20_000).all() and (found["task"] == "t").all()


def test_a_heavy_tail_falls_short_at_high_levels():
    found = coverage(_table(np.random.default_rng(0).standard_t(1.5, size=20_000))).set_index("nominal")["observed"]
    assert found[0.6827] == pytest.approx(0.6827, abs=0.015) and found[0.95] < 0.88


def test_validation_rows_do_not_count_and_one_fold_is_too_few():
    errors = np.ones(10)
    assert coverage(_table(errors, split=["test"] * 5 + ["val"] * 5))["n"].eq(5).all()
    with pytest.raises(ValueError, match=r"expected test rows of two folds or more of t, found fold \[0\]"):
        coverage(_table(errors, fold=0))
