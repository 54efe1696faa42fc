"""Units of the experiments, and the tables of what they predict."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from toy_tokens import TINY, toy

from cloud_lib import dataset, experiments, io, scoring
from cloud_lib.experiments import CrossValidation
from cloud_lib.train import FinetuneConfig, RunConfig

RUN = RunConfig(device="cpu", precision="fp32", progress=False)


def test_intermediate_tasks_hide_the_crystals_that_are_tested_later(tmp_path):
    big = toy(tmp_path / "tokens/big", 300, labels=True)
    small = toy(tmp_path / "tokens/small", 60, seed=1, labels=True, task="small")
    config = FinetuneConfig("scratch", TINY, epochs=1, lr=1e-3, run=RUN)
    settings = {"tasks": ["big"], "epochs": 2}
    cv = CrossValidation(tmp_path / "tokens", tmp_path / "runs", [0, 1], [0], {"small": {"epochs": 3}})
    first, then = experiments.intermediate_units(settings, ["small", "big"], config, cv)
    learnt = dataset.PackedTokens.open(first["data_dir"])
    hashes = [set(dataset.string_hashes(packed, np.arange(len(packed))).tolist()) for packed in (big, small, learnt)]
    assert hashes[2] == hashes[0] - hashes[1] and hashes[0] & hashes[1]
    assert learnt.meta["n_left_out"] == len(big) - len(learnt)
    place = {name: i for i, name in enumerate(big.material_id())}
    assert all(np.array_equal(learnt.item(i), big.item(place[name])) and learnt.labels()["target"][i]
               == big.labels()["target"][place[name]] for i, name in enumerate(learnt.material_id()))
    assert first["config"]["fold"] is None and first["config"]["epochs"] == 2
    assert {unit["config"]["init"] for unit in then} == {f"{first['out_dir']}/model"} and len(then) == 2
    found = experiments.finetune_after(settings, ["small", "big"], config, cv, n_workers=1)
    assert set(found["model"]) == {experiments.INTERMEDIATE} and set(found["task"]) == {"small"}
    assert io.read_json(tmp_path / "runs/small/CLOUD (intermediate)/fold1-seed0/result.json")["config"]["epochs"] == 3
    assert experiments.finetune_after({}, ["small"], config, cv, n_workers=1).empty
    (jointly,) = experiments.joint_units({"after_intermediate": True, "epochs": 1}, ["small"], config, replace(cv, folds=[0]), ["big"])
    assert jointly["config"]["init"] == f"{first['out_dir']}/model"
    with pytest.raises(ValueError, match=r"expected intermediate tasks outside the joint tasks .*, found \['big'\]"):
        experiments.joint_units({"after_intermediate": True}, ["small", "big"], config, cv, ["big"])
    with pytest.raises(ValueError, match=r"expected rows of \['small'\] that are not in .*, found none; name fewer"):
        dataset.join({"small": small.path}, tmp_path / "none", [small.path])


def test_ensemble_is_the_mean_over_models_and_seeds():
    rows = [(model, task, seed, row, prediction) for task in ("a", "b") for row in (0, 1) for model, seed, prediction in
            (("CLOUD", 0, 1.0), ("CLOUD", 1, 2.0), (experiments.INTERMEDIATE, 0, 6.0), ("dummy", 0, 99.0))]
    table = pd.DataFrame(rows, columns=["model", "task", "seed", "row", "prediction"]).assign(
        fold=0, split="test", material_id="m", target=3.0)
    table = table[(table["task"] == "a") & ~((table["model"] == experiments.INTERMEDIATE) & (table["row"] == 1))
                  | (table["task"] == "b") & (table["model"] == "CLOUD") & (table["seed"] == 0)]
    found = experiments.ensemble(table)
    assert list(found) == experiments.PREDICTION_COLUMNS
    assert found[["model", "task", "row", "prediction"]].values.tolist() == [[experiments.ENSEMBLE, "a", 0, 3.0]]


def test_settings_of_one_task(tmp_path):
    toy(tmp_path / "tokens/jdft2d", labels=True)
    config = FinetuneConfig(epochs=9)
    cv = CrossValidation(tmp_path / "tokens", tmp_path / "runs", [0], [3], {"jdft2d": {"epochs": 2}, "phonons": {"epochs": 5}})
    (unit,) = experiments.finetune_units(["jdft2d"], {"CLOUD": config}, cv)
    assert (unit["config"]["epochs"], unit["config"]["seed"]) == (2, 3)
    with pytest.raises(ValueError, match="expected settings of .* for jdft2d, found .'epoch'.*settings_by_task"):
        experiments.finetune_units(["jdft2d"], {"CLOUD": config}, replace(cv, settings_by_task={"jdft2d": {"epoch": 2}}))


def test_other_profiles_stand_beside(monkeypatch, tmp_path):
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path))
    ours = pd.DataFrame({"model": ["CLOUD", "dummy"], "task": "jdft2d", "fold": 0, "seed": 0, "split": "test",
                         "material_id": "m", "row": 0, "target": 1.0, "prediction": [2.0, 3.0]})
    assert experiments.with_profiles(ours, []).equals(ours)
    with pytest.raises(FileNotFoundError, match="expected results of profile gpu in .*make matbench PROFILE=gpu"):
        experiments.with_profiles(ours, ["gpu"])
    folder = tmp_path / "results/gpu"
    folder.mkdir(parents=True)
    io.write_json(folder / "curation.json", {"style": "canonical"})
    pd.concat([ours, ours.assign(task="phonons")]).to_parquet(folder / "matbench.parquet")
    found = scoring.scores(experiments.with_profiles(ours, ["gpu"]))
    assert found["model"].tolist() == ["CLOUD", "dummy", "CLOUD (gpu, canonical)"] and found["mae"].tolist() == [1, 2, 1]


def test_all_are_compared_on_the_folds_that_have_finished():
    rows = [("CLOUD", 0, "test"), ("CLOUD", 1, "val"), ("dummy", 0, "test"), ("dummy", 1, "test"), ("CLOUD", 0, "val")]
    table = pd.DataFrame(rows, columns=["model", "fold", "split"]).assign(task="jdft2d")
    found = experiments.on_folds_of(table, "CLOUD")
    assert found[["model", "fold", "split"]].values.tolist() == [list(rows[i]) for i in (0, 2, 4)]


def test_models_without_all_folds_are_not_compared():
    rows = [(model, task, fold) for model, task, folds in
            (("CLOUD", "jdft2d", 3), ("from scratch", "jdft2d", 2), ("dummy", "jdft2d", 3),
             ("CLOUD", "phonons", 2), ("from scratch", "phonons", 2)) for fold in range(folds)]
    table = pd.DataFrame(rows, columns=["model", "task", "fold"]).assign(
        seed=0, split="test", row=lambda t: t["fold"], target=0.0, prediction=lambda t: 1.0 + (t["model"] == "CLOUD"))
    found = scoring.scores(table)
    benchmarks = pd.DataFrame({"task": ["jdft2d", "phonons"], "unit": "u", "rows_official": 9, "folds": "official"})
    paper = pd.DataFrame({"model": "CLOUD", "type": "t", "task": ["jdft2d"], "mae_mean": 4.0, "mae_std": 1.0})
    shown = scoring.benchmark_table(found, paper, benchmarks, ["from scratch", "dummy"], "CLOUD").set_index("task")
    assert shown["ours"].tolist() == [2, 2] and shown.loc["jdft2d", "ratio"] == 0.5
    assert np.isnan(shown.loc["jdft2d", "from scratch"]) and shown.loc["jdft2d", "dummy"] == 1
    assert shown.loc["phonons", "from scratch"] == 1
    assert scoring.paired_scores(found, "CLOUD", "from scratch")["task"].tolist() == ["phonons"]
