"""Submissions have the layout that the two leaderboards' own packages read."""

import gzip
import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn import metrics as sk

from cloud_lib import cli, leaderboards
from cloud_lib.sources import matbench

REQUIRED = {"authors", "checkpoint_url", "date_added", "date_published", "doi", "license", "model_name", "model_params",
            "model_type", "model_version", "n_estimators", "openness", "paper", "pr_url", "repo", "requirements",
            "targets", "test_task", "train_task", "trained_for_benchmark", "training_cost", "training_set"}
# of tests/model-schema.yml in janosh/matbench-discovery; metrics keys of its DiscoveryMetricsSet:
SET = {"F1", "DAF", "Precision", "Recall", "Accuracy", "TPR", "FPR", "TNR", "FNR", "TP", "FP", "TN", "FN", "MAE",
       "RMSE", "R2", "missing_preds"}


@pytest.fixture
def kept(empty_root):
    """Predictions of the whole of jdft2d (two seeds) and of a part of phonons."""
    folds, rng, tables = matbench.official_folds("jdft2d"), np.random.default_rng(0), []
    target = rng.random(len(folds))
    for seed in (0, 1):
        tables.append(pd.DataFrame({"model": "CLOUD", "task": "jdft2d", "fold": folds, "seed": seed, "split": "test",
                                    "row": range(len(folds)), "target": target,
                                    "prediction": target + rng.normal(size=len(folds))}))
    part = matbench.official_folds("phonons")[:50]
    tables.append(pd.DataFrame({"model": "CLOUD", "task": "phonons", "fold": part, "seed": 0, "split": "test",
                                "row": range(50), "target": 1.0, "prediction": 2.0}))
    folder = empty_root / "results/demo"
    folder.mkdir(parents=True)
    pd.concat(tables).assign(material_id="m").to_parquet(folder / "matbench.parquet")
    return empty_root


def _results(folder):
    return json.loads(gzip.decompress((folder / "results.json.gz").read_bytes()))


def test_matbench_layout(kept, tmp_path):
    """Keys, identifiers, folds, scores and hash as matbench.bench and matbench.task check them on reading."""
    leaderboards.write_matbench("demo", tmp_path / "out")
    document = _results(tmp_path / "out")
    assert set(document) == {"@module", "@class", "version", "benchmark_name", "tasks", "user_metadata", "datestamp",
                             "hash"}
    assert list(document["tasks"]) == ["matbench_jdft2d"]  # phonons is not complete
    task = document["tasks"]["matbench_jdft2d"]
    assert set(task) == {"@module", "@class", "benchmark_name", "dataset_name", "results"}
    assert list(task["results"]) == [f"fold_{k}" for k in range(5)]
    ids = [name for fold in task["results"].values() for name in fold["data"]]
    assert sorted(ids) == [f"mb-jdft2d-{row + 1:03d}" for row in range(636)]
    table = pd.read_parquet(kept / "results/demo/matbench.parquet").query("task == 'jdft2d' and fold == 3")
    mean = table.groupby("row")[["target", "prediction"]].mean()
    fold = task["results"]["fold_3"]
    assert set(fold) == {"data", "parameters", "scores"}
    assert list(fold["data"].values()) == pytest.approx(mean["prediction"].tolist())
    assert fold["scores"] == pytest.approx({
        "mae": sk.mean_absolute_error(mean["target"], mean["prediction"]),
        "rmse": sk.root_mean_squared_error(mean["target"], mean["prediction"]),
        "mape": sk.mean_absolute_percentage_error(mean["target"], mean["prediction"]),
        "max_error": sk.max_error(mean["target"], mean["prediction"])})
    stored = document.pop("hash")
    assert stored == hashlib.sha256(json.dumps(_sorted(document)).encode()).hexdigest()
    assert {"authors", "algorithm", "algorithm_long", "bibtex_refs", "notes", "requirements"} == set(
        json.loads((tmp_path / "out/info.json").read_text()))


def _sorted(document):
    """immutify_dictionary of matbench.util: keys in order, at every level."""
    return {k: _sorted(v) if isinstance(v, dict) else v for k, v in sorted(document.items())}


def test_identifiers_and_small_targets():
    assert leaderboards.official_id("log_gvrh", 0) == "mb-log-gvrh-00001"
    found = leaderboards.fold_scores(np.array([0.0, 2.0]), np.array([1.0, 1.0]))
    assert found == {"mae": 1, "rmse": 1, "mape": 0.5, "max_error": 1}  # a target of 0 has no percentage


def test_incomplete_tasks_are_refused_or_marked(kept, tmp_path, capsys):
    file = kept / "results/demo/matbench.parquet"
    table = pd.read_parquet(file)
    table[table["task"] == "phonons"].to_parquet(file)
    with pytest.raises(ValueError, match="expected a task with all official rows, .*1215 of 1265 rows are missing"):
        leaderboards.write_matbench("demo", tmp_path)
    leaderboards.write_matbench("demo", tmp_path, partial=True)
    assert _results(tmp_path)["user_metadata"]["complete_tasks"] == []
    table[table["task"] == "jdft2d"].assign(fold=0).to_parquet(file)
    with pytest.raises(ValueError, match="are not in their official fold"):
        leaderboards.write_matbench("demo", tmp_path)
    with pytest.raises(ValueError, match="expected test predictions of a model of .*'CLOUD'.*none of 'other'"):
        leaderboards.write_matbench("demo", tmp_path, "other")
    assert cli.main(["leaderboard", "matbench", "--profile", "none", "--out", str(tmp_path)]) == 2
    assert "run make matbench PROFILE=none" in capsys.readouterr().err


def test_discovery_layout(empty_root, tmp_path, capsys):
    rng, n = np.random.default_rng(0), 200
    truth, error = rng.normal(size=n), rng.normal(size=n) / 3
    table = pd.DataFrame({"model": "CLOUD (ours)", "material_id": [f"wbm-1-{i}" for i in range(n)],
                          "e_form_per_atom_dft": truth - 1, "e_above_hull_dft": truth,
                          "e_form_per_atom_pred": truth - 1 + error, "e_above_hull_pred": truth + error})
    table.loc[7, ["e_form_per_atom_pred", "e_above_hull_pred"]] = np.nan
    (empty_root / "results/demo").mkdir(parents=True)
    table.to_parquet(empty_root / "results/demo/discovery.parquet")
    with pytest.raises(ValueError, match="expected predictions for 256963 crystals .*found 199"):
        leaderboards.write_discovery("demo", tmp_path)
    assert cli.main(["leaderboard", "discovery", "--out", str(tmp_path), "--partial"]) == 0
    card, csv_file = map(str, capsys.readouterr().out.split())
    found = pd.read_csv(csv_file)
    assert found.columns.tolist() == ["material_id", "e_form_per_atom"] and len(found) == 199
    joined = found.merge(table, on="material_id", validate="1:1")
    assert joined["e_form_per_atom"].to_numpy() == pytest.approx(joined["e_form_per_atom_pred"].to_numpy())
    with open(card) as handle:
        content = yaml.safe_load(handle)
    assert set(content) >= REQUIRED and (content["train_task"], content["test_task"]) == ("RP2RE", "IP2E")
    numbers = content["metrics"]["discovery"]["full_test_set"]
    assert set(numbers) == SET and numbers["missing_preds"] == 256963 - 199
    rest = table.dropna()
    stable, said = rest["e_above_hull_dft"] <= 0, rest["e_above_hull_pred"] <= 0
    assert numbers["F1"] == pytest.approx(sk.f1_score(stable, said), abs=5e-4)
    assert [numbers[k] for k in ("TN", "FP", "FN", "TP")] == sk.confusion_matrix(stable, said).ravel().tolist()
    with pytest.raises(FileNotFoundError, match="run make discovery PROFILE=none"):
        leaderboards.write_discovery("none", tmp_path)
