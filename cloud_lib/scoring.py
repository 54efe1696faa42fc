"""Tables of the paper from what the experiments found: scores, Tables 1, 2 and 4, Figure 2, the README's lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cloud_lib import metrics, report, sources
from cloud_lib.experiments import ENSEMBLE
from cloud_lib.sources import matbench

SCORE_COLUMNS = ["task", "model", "mae", "mae_std", "rows", "folds", "seeds", "mad"]
PARTS = ["generator", "wyckoff", "element", "fraction"]  # of a string, in its order
HYPERPARAMETERS = {  # Table 4's name -> ours
    "pretrain": {"bert_hidden_layers": "n_layers", "bert_attention_heads": "n_heads",
                 "max_position_embeddings": "max_positions", "embedding_size": "width", "pretrain_epochs": "epochs",
                 "pretrain_learning_rate": "lr", "pretrain_batch_size": "batch_size",
                 "pretrain_weight_decay": "weight_decay", "pretrain_warmup_ratio": "warmup_ratio"},
    "finetune": {"mlp_hidden_layers": "n_hidden", "mlp_hidden_width": "hidden_width", "finetune_epochs": "epochs",
                 "finetune_learning_rate": "lr", "finetune_batch_size": "batch_size",
                 "finetune_weight_decay": "weight_decay", "finetune_warmup_ratio": "warmup_ratio",
                 "finetune_frozen_encoder_epochs": "frozen_epochs"},
}


def scores(table: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """MAE per model and task: over each fold's rows, then mean and deviation over folds; seeds are averaged.

    Columns `task`, `model`, `mae`, `mae_std` (unit of the task; over folds, ddof 0 as MatBench), `rows`, `folds`,
    `seeds`, `mad` (mean absolute deviation of the targets, for MAE/MAD).
    """
    found = []
    for (task, model), rows in table[table["split"] == split].groupby(["task", "model"], sort=False):
        by_fold = rows.assign(error=(rows["prediction"] - rows["target"]).abs())
        by_fold = by_fold.groupby(["fold", "seed"])["error"].mean().groupby("fold").mean()
        found.append({"task": task, "model": model, "mae": by_fold.mean(), "mae_std": by_fold.std(ddof=0),
                      "rows": rows["row"].nunique(), "folds": len(by_fold), "seeds": rows["seed"].nunique(),
                      "mad": metrics.mad(rows.drop_duplicates("row")["target"])})
    return pd.DataFrame(found, columns=SCORE_COLUMNS)


def fold_errors(table: pd.DataFrame) -> pd.DataFrame:
    """Test MAE of every model and task in each fold (seeds averaged): columns `task`, `model`, one per fold."""
    test = table[table["split"] == "test"].assign(error=lambda t: (t["prediction"] - t["target"]).abs())
    return test.pivot_table("error", ["task", "model"], "fold", sort=False).reset_index()


def leaderboard(table: pd.DataFrame) -> pd.DataFrame:
    """Published models scored on exactly the rows and folds of our test predictions; empty if there are none."""
    try:
        published = matbench.load_leaderboard()
    except sources.NotAvailable:
        return scores(table[:0])
    ours = table[table["split"] == "test"].drop_duplicates(["task", "row"])[["task", "row", "fold", "material_id",
                                                                             "target"]]
    joined = published[published["model"] != "Dummy"].merge(ours, on=["task", "row"], validate="m:1")
    joined = joined.assign(split="test", seed=0)
    return scores(joined)


def benchmark_table(found: pd.DataFrame, paper: pd.DataFrame, benchmarks: pd.DataFrame, models: Sequence[str],
                    main: str) -> pd.DataFrame:
    """Tables 1 and 2: a line per task; the paper's CLOUD, ours, their ratio, and every other model of `models`.

    A model that has not finished all folds of ours on a task is missing there, as other rows are no comparison, and one
    that has finished no task has no column.

    Args:
        found: `scores` of all models, ours and published ones on the same rows.
        paper: the paper's table; its model CLOUD is compared.
        benchmarks: Table 3 as `prepare_benchmarks` returns it.
        main: the model that is compared with the paper.
    """
    lines = benchmarks[["task", "unit", "rows_official", "folds"]].rename(columns={"folds": "fold origin"})
    ours = found[found["model"] == main].drop(columns="model").rename(columns={"mae": "ours", "mae_std": "ours_std"})
    cloud = paper[paper["model"] == "CLOUD"].rename(columns={"mae_mean": "paper (all rows)",
                                                              "mae_std": "paper (all rows)_std"})
    cloud = cloud.drop(columns=["model", "type"])
    lines = lines.merge(cloud, on="task", how="left", validate="1:1").merge(ours, on="task", how="left", validate="1:1")
    lines["ratio"] = lines["ours"] / lines["paper (all rows)"]
    lines["ours/MAD"] = lines["ours"] / lines["mad"]
    lines.loc[lines["rows"].isna(), "fold origin"] = None
    same_rows = found.merge(lines[["task", "folds", "rows"]], on=["task", "folds", "rows"])
    models = [model for model in models if model in set(same_rows["model"])]
    for model in models:
        rows = same_rows[same_rows["model"] == model].set_index("task")
        lines[model], lines[f"{model}_std"] = lines["task"].map(rows["mae"]), lines["task"].map(rows["mae_std"])
    paper_columns = [c for c in ("paper (all rows)", "paper (all rows)_std") if c in lines]
    order = ["task", "unit", "rows", "rows_official", "folds", "fold origin", "seeds", *paper_columns, "ours",
             "ours_std", "ratio", "ours/MAD"]
    return lines[order + [c for model in models for c in (model, f"{model}_std")]]


def paired_scores(found: pd.DataFrame, pretrained: str, scratch: str) -> pd.DataFrame:
    """Figure 2: a line per task of which both have the same rows, with their `mae_` and `std_`, and the change in per cent."""
    two = found[found["model"].isin([pretrained, scratch])]
    two = two[two.groupby("task")["rows"].transform("nunique") == 1]
    wide = two.pivot(index="task", columns="model", values=["mae", "mae_std"])
    both = pd.MultiIndex.from_product([["mae", "mae_std"], [pretrained, scratch]])
    wide = wide.reindex(index=found["task"].unique(), columns=both)
    table = pd.DataFrame({f"{column}_{name}": wide[value, model] for name, model in (("scratch", scratch),
                          ("pretrained", pretrained)) for column, value in (("mae", "mae"), ("std", "mae_std"))})
    table["change_percent"] = 100 * (table["mae_pretrained"] / table["mae_scratch"] - 1)
    return table.dropna(subset="change_percent").reset_index()


def paper_models(paper: pd.DataFrame, exclude: Sequence[str] = ()) -> pd.DataFrame:
    """The paper's numbers with a line per task and a column per model, marked (paper)."""
    wide = paper[~paper["model"].isin(exclude)].pivot(index="task", columns="model", values="mae_mean")
    wide = wide[[model for model in paper["model"].unique() if model in wide]]
    return wide.add_suffix(" (paper)").reset_index().rename_axis(columns=None)


def hyperparameters(config: dict[str, Any], stage: str) -> pd.DataFrame:
    """Table 4: the paper's values beside those of this profile.

    Args:
        config: the settings that were used.
        stage: "pretrain" or "finetune".
    """
    paper = report.paper_values("table4_hyperparameters").set_index("hyperparameter")["values"]
    ours = [(name, config[key]) for name, key in HYPERPARAMETERS[stage].items() if key in config]
    return pd.DataFrame([{"hyper-parameter": name, "paper": paper[name].replace(";", ", "), "ours": str(value)}
                         for name, value in ours])


def pretraining_note(curated: dict[str, Any]) -> str:
    """What every results table says about its pre-training corpus: strings, symprec, test crystals in or out."""
    n, excluded = curated["packed"]["corpus"]["n"], curated["packed"]["corpus"]["n_excluded"]
    leak = f"{excluded:,} crystals of the test folds left out" if curated["exclude_test_crystals"] else \
        "test crystals not left out, as in the paper"
    note = f"pre-trained on {n:,} {curated['style']} strings ({leak}), symprec {curated['symprec']} angstrom"
    return f"SYNTHETIC LABELS, not a result; {note}" if curated["synthetic"] else note


def summary(table: pd.DataFrame, metric: str, notebook: str) -> pd.DataFrame:
    """Lines of the README's table from a `benchmark_table`."""
    columns = {"paper": "paper (all rows)", "ours": "ours"} | ({"ours, ensemble": ENSEMBLE} if ENSEMBLE in table else {})
    values = {f"{name}{end}": table[f"{column}{end}"] for name, column in columns.items() for end in ("", "_std")
              if f"{column}{end}" in table}
    return pd.DataFrame({"result": table["task"] + f" {metric} (" + table["unit"] + ")"} | values
                        | {"rows": table["rows"], "rows_official": table["rows_official"], "notebook": notebook,
                           "make": notebook.partition("_")[2]})


def masked_accuracy(result: dict[str, Any]) -> pd.DataFrame:
    """Held-out masked tokens: the model and two baselines that guess by frequency.

    A line per part of the string and one for all tokens with the accuracy of `unigram`, `per-position` and `model`,
    and a last line with their losses [nats per masked token].
    """
    columns = {"unigram": result["baselines"]["unigram"], "per-position": result["baselines"]["position"],
               "model": result | {"loss": result["val_loss"]}}
    table = {name: [*(found["accuracy_by_part"][part] for part in PARTS), found["accuracy"], found["loss"]]
             for name, found in columns.items()}
    return pd.DataFrame({"part": [*PARTS, "all", "loss (nats)"]} | table)


def attention_rows(tokens: list[str], weights: np.ndarray) -> pd.DataFrame:
    """Attention (n, n) between n tokens as rows: `position`, `token`, `attended`, `attended_token`, `weight`."""
    i, j = np.indices(weights.shape).reshape(2, -1)
    names = np.asarray(tokens)
    return pd.DataFrame({"position": i, "token": names[i], "attended": j, "attended_token": names[j],
                         "weight": weights.ravel()})


def training_log(run_dir: Path) -> pd.DataFrame:
    """`log.jsonl` of a run, one row per logged step: `step`, `split`, `loss`."""
    return pd.read_json(run_dir / "log.jsonl", lines=True)[["step", "split", "loss"]]
