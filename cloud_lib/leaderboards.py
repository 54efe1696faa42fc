"""Submissions to the two public leaderboards, from the predictions that results/<profile>/ keeps.

MatBench: results.json.gz and info.json in the layout of the package `matbench` (0.6), one entry per task with all
official rows and folds. Matbench Discovery: <key>.yml and the csv.gz of predicted formation energies.
"""

import datetime
import gzip
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from cloud_lib import io, metrics
from cloud_lib.sources import matbench

if TYPE_CHECKING:
    import pandas as pd

BENCHMARK, MATBENCH_VERSION, N_FOLDS = "matbench_v0.1", "0.6", 5
N_WBM = 256_963  # crystals of Matbench Discovery's test set
MAPE_THRESHOLD = 1e-5  # smaller targets are left out of the benchmark's mean absolute percentage error
DISCOVERY_MODEL = "CLOUD (ours)"
AUTHORS = ["Changwen Xu", "Shang Zhu", "Venkatasubramanian Viswanathan"]  # of the method
MISSING = "missing"  # what only the submitter knows


# ------------------------------------------------------------------------------------------------- MatBench
def write_matbench(profile: str, out_dir: str | Path, model: str = "CLOUD", partial: bool = False) -> list[Path]:
    """Write results.json.gz and info.json from results/<profile>/matbench.parquet; the files written.

    Seeds are averaged. Only tasks whose every official row is predicted in its official fold are written.

    Args:
        partial: also write the rows and folds that are there of other tasks; the leaderboard refuses such a file.
    Raises:
        FileNotFoundError: no kept predictions.
        ValueError: no such model, or no complete task.
    """
    import pandas as pd

    file = io.results_dir() / profile / "matbench.parquet"
    if not file.is_file():
        raise FileNotFoundError(f"expected predictions in {file}, found none; run make matbench PROFILE={profile}")
    table = pd.read_parquet(file)
    rows = table[(table["model"] == model) & (table["split"] == "test")]
    if rows.empty:
        raise ValueError(f"expected test predictions of a model of {sorted(set(table['model']))}, found none of "
                         f"{model!r}; name one of them with --model")
    gaps = {task: gap for task, one in rows.groupby("task") if (gap := missing_rows(task, one))}
    tasks = [task for task in matbench.TASKS if task in set(rows["task"]) and (partial or task not in gaps)]
    if not tasks:
        raise ValueError(f"expected a task with all official rows, found none: {gaps}; set CLOUD_DATA to the official "
                         "files and run make matbench, or give --partial for a file that only shows the layout")
    document = matbench_document({task: rows[rows["task"] == task] for task in tasks}, {
        "model": model, "profile": profile, "complete_tasks": [task for task in tasks if task not in gaps]})
    return [_write_gzip(Path(out_dir) / "results.json.gz", json.dumps(document)),
            io.write_json(Path(out_dir) / "info.json", _info())]


def missing_rows(task: str, rows: "pd.DataFrame") -> str:
    """What a task's test predictions lack for a submission; "" = nothing."""
    folds = matbench.official_folds(task)
    found = rows.drop_duplicates("row")
    if wrong := int((folds[found["row"]] != found["fold"]).sum()):
        return f"{wrong} rows are not in their official fold"
    gap = len(folds) - len(found)
    return f"{gap} of {len(folds)} rows are missing" if gap else ""


def matbench_document(tasks: dict[str, "pd.DataFrame"], metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of results.json.gz, with the hash that the package checks on reading.

    Args:
        tasks: task -> rows with fold, seed, row, target, prediction.
    """
    document = {
        "@module": "matbench.bench", "@class": "MatbenchBenchmark", "version": MATBENCH_VERSION,
        "benchmark_name": BENCHMARK, "user_metadata": metadata,
        "tasks": {f"matbench_{task}": _task_document(task, rows) for task, rows in tasks.items()},
        "datestamp": datetime.datetime.now(datetime.UTC).strftime("%Y.%m.%d %H:%M.%S")}
    return document | {"hash": content_hash(document)}


def _task_document(task: str, rows: "pd.DataFrame") -> dict[str, Any]:
    results = {}
    for fold, one in rows.groupby("fold"):
        mean = one.groupby("row")[["target", "prediction"]].mean()  # over seeds
        data = {official_id(task, row): float(value) for row, value in mean["prediction"].items()}
        results[f"fold_{fold}"] = {"data": data, "parameters": {"seeds": int(one["seed"].nunique())},
                                   "scores": fold_scores(mean["target"].to_numpy(), mean["prediction"].to_numpy())}
    return {"@module": "matbench.task", "@class": "MatbenchTask", "benchmark_name": BENCHMARK,
            "dataset_name": f"matbench_{task}", "results": results}


def official_id(task: str, row: int) -> str:
    """Identifier of an official 0-based row, with hyphens throughout: "mb-log-gvrh-00001"."""
    return matbench.material_id(task, row).replace("_", "-")


def fold_scores(target: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """The four scores of a fold: mae, rmse, mape (targets above MAPE_THRESHOLD only) and max_error."""
    error, large = np.abs(target - prediction), np.abs(target) > MAPE_THRESHOLD
    mape = float((error[large] / np.abs(target[large])).mean()) if large.any() else float("nan")
    return {"mae": metrics.mae(target, prediction), "rmse": metrics.rmse(target, prediction), "mape": mape,
            "max_error": float(error.max())}


def content_hash(document: dict[str, Any]) -> str:
    """SHA-256 of the JSON with sorted keys, as matbench.util.hash_dictionary."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _info() -> dict[str, Any]:
    return {"authors": " and ".join(AUTHORS), "algorithm": "CLOUD", "algorithm_long": (
                "A BERT encoder pre-trained on symmetry strings (space-group generators, Wyckoff positions, "
                "composition) and fine-tuned on each task."),
            "bibtex_refs": "@inproceedings{xu2024cloud, title={CLOUD: A Scalable Scientific Foundation Model for "
                           f"Crystal Representation Learning}}, author={{{' and '.join(AUTHORS)}}}, year={{2024}}, "
                           "booktitle={Foundation Models for Science Workshop, NeurIPS}}",
            "notes": "An independent replication.",
            "requirements": {"python": [f"{name}=={version}" for name, version in io.versions().items() if version]}}


# --------------------------------------------------------------------------------------- Matbench Discovery
def write_discovery(profile: str, out_dir: str | Path, partial: bool = False, key: str = "cloud") -> list[Path]:
    """Write <key>.yml and <key>-wbm-IP2E.csv.gz from results/<profile>/discovery.parquet; the files written.

    Args:
        partial: write also when crystals of the test set are missing; they count as unstable there.
    Raises:
        FileNotFoundError: no kept predictions.
        ValueError: not all crystals of the test set are predicted.
    """
    import pandas as pd

    file = io.results_dir() / profile / "discovery.parquet"
    if not file.is_file():
        raise FileNotFoundError(f"expected predictions in {file}, found none; run make discovery PROFILE={profile}")
    table = pd.read_parquet(file)
    rows = table[(table["model"] == DISCOVERY_MODEL) & table["e_form_per_atom_pred"].notna()].sort_values("material_id")
    if len(rows) < N_WBM and not partial:
        raise ValueError(f"expected predictions for {N_WBM} crystals in {file}, found {len(rows)}; set CLOUD_DATA to "
                         "the official files and run make discovery, or give --partial")
    predictions = Path(out_dir) / f"{key}-wbm-IP2E.csv.gz"
    frame = rows[["material_id", "e_form_per_atom_pred"]].rename(columns={"e_form_per_atom_pred": "e_form_per_atom"})
    _write_gzip(predictions, frame.to_csv(index=False, lineterminator="\n"))
    card = Path(out_dir) / f"{key}.yml"
    with io.atomic_path(card) as temporary:
        text = yaml.safe_dump(_discovery_card(profile, key, rows), sort_keys=False, allow_unicode=True)
        temporary.write_text(f"# Before submitting, replace every '{MISSING}'.\n{text}", encoding="utf-8")
    return [card, predictions]


def _discovery_card(profile: str, key: str, rows: "pd.DataFrame") -> dict[str, Any]:
    """The model's YAML; what only the submitter knows says so ("missing" is the schema's own word)."""
    pretraining = io.results_dir() / profile / "pretraining.json"
    found = io.read_json(pretraining) if pretraining.is_file() else {}
    versions, today = io.versions(), datetime.date.today().isoformat()
    return {
        "model_name": "CLOUD", "model_key": key, "model_version": f"replication-{profile}", "date_added": today,
        "date_published": MISSING, "authors": [{"name": MISSING, "email": MISSING}], "repo": MISSING, "doi": MISSING,
        "paper": MISSING, "pr_url": MISSING, "checkpoint_url": MISSING,
        "license": {"code": "MIT", "checkpoint": "MIT"},
        "requirements": {name: versions[name] for name in ("torch", "transformers", "spglib", "numpy")
                         if name in versions},
        "trained_for_benchmark": True, "training_set": ["MP 2022"], "model_type": "Transformer",
        "model_params": int(found.get("n_params_total", 0)), "n_estimators": MISSING, "training_cost": MISSING,
        "train_task": "RP2RE", "test_task": "IP2E", "targets": "E", "openness": "OSOD",
        "notes": {"Description": "Space-group generators, Wyckoff positions and composition in, formation energy out; "
                                 "no distances. An independent replication of CLOUD by " + " and ".join(AUTHORS)},
        "metrics": {"phonons": "not applicable", "geo_opt": "not applicable", "discovery": {
            "pred_file": f"models/{key}/{key}-wbm-IP2E.csv.gz", "pred_file_url": MISSING,
            "pred_col": "e_form_per_atom", "full_test_set": discovery_metrics(rows)}}}


def discovery_metrics(rows: "pd.DataFrame") -> dict[str, float]:
    """The benchmark's numbers on the rows that are here, under its names, threshold 0."""
    truth, prediction = rows["e_above_hull_dft"].to_numpy(), rows["e_above_hull_pred"].to_numpy()
    known = metrics.discovery_metrics(truth, prediction)
    stable, said = truth <= 0, prediction <= 0
    rates = {"F1": known["F1"], "DAF": known["DAF"], "Precision": known["precision"], "Recall": known["TPR"],
             "Accuracy": known["accuracy"], "TPR": known["TPR"], "FPR": 1 - known["TNR"], "TNR": known["TNR"],
             "FNR": 1 - known["TPR"]}
    counts = {"TP": stable & said, "FP": ~stable & said, "TN": ~stable & ~said, "FN": stable & ~said}
    found = rates | {name: int(rows.sum()) for name, rows in counts.items()} | {
        name: known[name] for name in ("MAE", "RMSE", "R2")}
    return {name: round(value, 3) for name, value in found.items()} | {"missing_preds": max(0, N_WBM - len(rows))}


def _write_gzip(target: Path, text: str) -> Path:
    with io.atomic_path(target) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    return target
