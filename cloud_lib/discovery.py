"""Stability of unseen crystals from predicted formation energies: Tables 6 and 7, Figures 3 and 5.

A table of models has the columns `model`, `material_id`, `e_form_per_atom_dft`, `e_above_hull_dft`,
`e_form_per_atom_pred`, `e_above_hull_pred`, all in eV/atom; NaN = the model gave no prediction.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cloud_lib import curation, metrics, report
from cloud_lib.sources import discovery
from cloud_lib.tokenizer import Tokenizer

OURS, SINGLE = "CLOUD (ours)", "CLOUD (ours, one seed)"
NAMES = {"alchembert": "AlchemBERT", "alignn": "ALIGNN", "bowsr_megnet": "BOWSR", "chgnet": "CHGNet",
         "eqV2_m_omat_mp_salex": "eqV2 M", "m3gnet": "M3GNet", "megnet": "MEGNet", "voronoi_rf": "Voronoi RF"}
METRICS = ["F1", "DAF", "precision", "accuracy", "TPR", "TNR", "MAE", "RMSE", "R2"]  # order of Table 6


def prepare(data_dir: Path, style: str, symprec: float, max_train_rows: int | None, n_workers: int) -> dict:
    """Pack training and test crystals as the task `discovery`, whose only fold is the test set.

    Returns:
        What the two sets are: their sources, rows, rejects, the share of stable test crystals.
    Raises:
        NotAvailable: energies or structures are not here.
    """
    train, test = discovery.load_train(max_train_rows), discovery.load_test()
    frame = pd.concat([train.assign(fold=-1), test.assign(fold=0)], ignore_index=True)
    frame = frame.rename(columns={"e_form_per_atom_dft": "target"}).assign(row=lambda table: np.arange(len(table)))
    frame.attrs = {"task": "discovery", "rows": len(frame)}
    made = curation.prepare_task(frame, data_dir / "tasks", "discovery", symprec, n_workers)
    packed = curation.pack_task(data_dir / "tasks" / "discovery.parquet", style, Tokenizer.default(),
                                data_dir / "tokens" / "discovery")
    return {"training set": train.attrs["source"], "training rows": len(train), "test set": test.attrs["source"],
            "test rows": len(test), "test rows (official)": test.attrs.get("rows_official"),
            "rejects": sum(made["rejects"].values()) + packed["n_without_string"],
            "share of stable test crystals": float((test["e_above_hull_dft"] <= 0).mean())}


def with_hull_distances(predictions: pd.DataFrame) -> pd.DataFrame:
    """Our predictions (mean over seeds; of several also the first alone) and the published ones, for all test crystals.

    Args:
        predictions: long table of `experiments.finetune` for the task `discovery`.
    Raises:
        ValueError: a prediction names a crystal that the test set does not have.
    """
    truth = discovery.load_test()[["material_id", "e_form_per_atom_dft", "e_above_hull_dft"]]
    test = predictions[predictions["split"] == "test"].rename(columns={"prediction": "e_form_per_atom_pred"})
    if unknown := sorted(set(test["material_id"]) - set(truth["material_id"])):
        raise ValueError(f"{len(unknown)} of {test['material_id'].nunique()} predictions have unknown material_id, "
                         f"e.g. {unknown[:3]}; the kept predictions belong to other data: run with stage=run")
    mean = test.groupby("material_id", as_index=False)["e_form_per_atom_pred"].mean().assign(model=OURS)
    single = test[(test["seed"] == test["seed"].min()) & (test["seed"].nunique() > 1)].assign(model=SINGLE)
    published = discovery.load_published_predictions().replace({"model": NAMES})
    found = [truth.merge(table, on="material_id", how="left", validate="1:1").fillna({"model": model})
             for part in (mean, single, published) for model, table in part.groupby("model", sort=False)]
    table = pd.concat(found, ignore_index=True)
    table["e_above_hull_pred"] = metrics.hull_distance(table["e_form_per_atom_pred"], table["e_form_per_atom_dft"],
                                                       table["e_above_hull_dft"])
    return table[["model", "material_id", "e_form_per_atom_dft", "e_above_hull_dft", "e_form_per_atom_pred",
                  "e_above_hull_pred"]]


def metric_table(models: pd.DataFrame, threshold: float = 0.0) -> pd.DataFrame:
    """Table 6 on our rows: a line per model, by descending ROC AUC; `rows` counts those with a prediction."""
    found = []
    for model, rows in models.groupby("model", sort=False):
        scores = metrics.discovery_metrics(rows["e_above_hull_dft"], rows["e_above_hull_pred"], threshold)
        auc = metrics.roc_auc(rows["e_above_hull_dft"] <= 0, rows["e_above_hull_pred"])
        found.append({"model": model, "rows": int(rows["e_above_hull_pred"].notna().sum()),
                      "rows_official": len(rows), "ROC AUC": auc} | {name: scores[name] for name in METRICS})
    return pd.DataFrame(found).sort_values("ROC AUC", ascending=False, ignore_index=True)


def threshold_table(models: pd.DataFrame, thresholds: Sequence[float]) -> pd.DataFrame:
    """Table 7: our metrics as the prediction's threshold [eV/atom] moves, the paper's beside them."""
    rows = models[models["model"] == OURS]
    ours = [{"threshold (eV/atom)": threshold} | {
        name: value for name, value in metrics.discovery_metrics(rows["e_above_hull_dft"], rows["e_above_hull_pred"],
                                                                 threshold).items() if name in METRICS[:6]}
            for threshold in thresholds]
    paper = report.paper_values("table7_discovery_thresholds").rename(
        columns={"threshold_eV_per_atom": "threshold (eV/atom)"})
    joined = pd.DataFrame(ours).merge(paper, on="threshold (eV/atom)", how="left", suffixes=("", " (paper)"))
    return joined[["threshold (eV/atom)", *[c for name in METRICS[:6] for c in (name, f"{name} (paper)")]]]


def paper_table() -> pd.DataFrame:
    """Table 6 as printed: all official test rows, which are not ours."""
    paper = report.paper_values("table6_discovery_metrics")
    curve = report.paper_values("scaling_law").set_index("symbol")["value"]
    paper.insert(1, "ROC AUC", np.where(paper["model"] == "CLOUD", curve["roc_auc_cloud"], np.nan))
    return paper.assign(model=paper["model"] + " (paper)")


def roc_curves(models: pd.DataFrame) -> pd.DataFrame:
    """ROC curves of all models on our rows: columns `model`, `auc`, `fpr`, `tpr`."""
    found = []
    for model, rows in models[models["model"] != SINGLE].groupby("model", sort=False):
        stable = rows["e_above_hull_dft"] <= 0
        fpr, tpr, _ = metrics.roc_curve(stable, rows["e_above_hull_pred"])
        auc = metrics.roc_auc(stable, rows["e_above_hull_pred"])
        found.append(pd.DataFrame({"model": model, "auc": auc, "fpr": fpr, "tpr": tpr}))
    return pd.concat(found, ignore_index=True)


def published_curves(keys: Sequence[str]) -> pd.DataFrame:
    """Published curves on all official rows, of the models `keys`: columns as `roc_curves`; may be empty."""
    curves = discovery.load_published_curves().rename(columns={"label": "model"})
    curves = curves[curves["key"].isin(keys)].drop(columns="key")
    return curves.explode(["fpr", "tpr"], ignore_index=True).astype({"fpr": float, "tpr": float})


def auc_differences(models: pd.DataFrame, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """ROC AUC of ours minus every other model's, with paired bootstrap intervals over the crystals."""
    truth = models[models["model"] == OURS]
    found = []
    for model, rows in models[~models["model"].isin([OURS, SINGLE])].groupby("model", sort=False):
        interval = metrics.paired_bootstrap(metrics.roc_auc, truth["e_above_hull_dft"].to_numpy() <= 0,
                                            truth["e_above_hull_pred"].to_numpy(), rows["e_above_hull_pred"].to_numpy(),
                                            n_resamples=n_resamples, seed=seed)
        found.append({"model": model, **interval._asdict()})
    return pd.DataFrame(found, columns=["model", *metrics.Interval._fields])


def summary(metrics_here: pd.DataFrame, facts: dict) -> pd.DataFrame:
    """Lines of the README's table: AUC and F1, the paper's and ours; `facts` as `prepare` returns them."""
    ours = metrics_here.set_index("model").loc[OURS]
    paper = paper_table().set_index("model").loc["CLOUD (paper)"]
    return pd.DataFrame([{"result": f"Discovery {name}, test set {facts['test set']}", "paper": paper[name],
                          "ours": ours[name], "rows": ours["rows"],
                          "rows_official": facts["test rows (official)"] or ours["rows_official"],
                          "notebook": "04_discovery", "make": "discovery"} for name in ("ROC AUC", "F1")])
