import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from cloud_lib import baselines, report


@pytest.fixture
def products(tmp_path, monkeypatch):
    """An empty root for tables/, figures/ and README.md."""
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path))
    return tmp_path


def _table1() -> pd.DataFrame:
    values = report.paper_values("table1_matbench_mae").query("model == 'CLOUD'")
    paper = values[["task", "mae_mean", "mae_std"]].set_axis(["task", "paper", "paper_std"], axis=1)
    ours = pd.DataFrame([{"task": "dielectric", "ours": 0.3, "ours_std": 0.05, "rows": 4764,
                          "rows_official": 4764, "folds": 5, "seeds": 1}])
    return report.compare(paper, ours, ["task"])


def test_table_is_exact_in_csv_and_readable_in_markdown(products):
    table = _table1()
    report.write_table(table, "table1", "demo", "Table 1.", {"seed": 1})
    folder = products / "tables" / "demo"
    pd.testing.assert_frame_equal(pd.read_csv(folder / "table1.csv"), table)
    lines = (folder / "table1.md").read_text().splitlines()
    assert lines[0] == "Table 1."
    assert lines[2] == "| task | paper | ours | ratio | rows | folds | seeds |"
    assert "| dielectric | 0.3038 ± 0.0782 | 0.3000 ± 0.0500 | 0.9875 | 4,764 of 4,764 | 5 | 1 |" in lines
    assert json.loads((folder / "table1.json").read_text()) == {"caption": "Table 1.", "seed": 1}


def test_what_was_not_computed_is_a_dash(products):
    shown = report.as_displayed(_table1()).set_index("task")
    assert shown.loc["phonons", "ours":].tolist() == ["–"] * 5
    assert shown.loc["phonons", "paper"] == "40.69 ± 2.62"


def test_compare_refuses_duplicate_lines():
    twice = pd.DataFrame({"task": ["a", "a"], "ours": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"one line per \['task'\] in ours, found 1 more, e.g. \[\['a'\]\]"):
        report.compare(pd.DataFrame({"task": ["a"], "paper": [1.0]}), twice, ["task"])


@pytest.mark.parametrize("rows, official, text", [
    (9502, 10987, "9,502 of 10,987"), (12, np.nan, "12"), (np.nan, 530, "–"),
])
def test_rows_of_the_official_number(rows, official, text):
    shown = report.as_displayed(pd.DataFrame({"rows": [rows], "rows_official": [official]}))
    assert shown.to_dict("records") == [{"rows": text}]


def test_a_column_keeps_the_fewest_decimals_that_lose_nothing():
    shown = report.as_displayed(pd.DataFrame({
        "threshold": [-0.05, 0, 0.05], "n": [5.0, np.nan, 1e6], "F1": [0.467, 0.474, 0.38],
        "mae": [0.25, 1 / 3, 12.0], "stable": [True, False, True], "none": [np.nan] * 3}))
    assert shown["threshold"].tolist() == ["-0.05", "0.00", "0.05"]
    assert shown["n"].tolist() == ["5", "–", "1,000,000"]
    assert shown["F1"].tolist() == ["0.467", "0.474", "0.380"]
    assert shown["mae"].tolist() == ["0.2500", "0.3333", "12.00"]
    assert shown["stable"].tolist() == ["True", "False", "True"]
    assert shown["none"].tolist() == ["–"] * 3


@pytest.mark.parametrize("value, text", [
    (0.05, "0.0500"), (35.0057, "35.01"), (1265.4, "1,265"), (106113, "106,113"), (1e-5, "1e-05"),
    (-0.0513, "-0.0513"), (0.0, "0.0000"), (None, "–"), (np.nan, "–"), ("Pm-3m", "Pm-3m"), (True, "True"),
])
def test_numbers_for_reading(value, text):
    assert report.format_number(value) == text


def test_figure_is_deterministic_and_keeps_its_numbers(products):
    data = pd.DataFrame({"x": [1, 2], "y": [0.1, 0.2]})
    folder, written = products / "figures" / "demo", []
    for _ in range(2):
        with mpl.rc_context():
            report.style()
            fig = Figure(figsize=report.figure_size())
            ax = fig.add_subplot()
            ax.plot(data.x, data.y)
            report.panel_letter(ax, "a")
            report.write_figure(fig, "figure2", "demo", data, {"seed": 1})
        written.append([(folder / f"figure2.{suffix}").read_bytes() for suffix in ("pdf", "png")])
    assert written[0] == written[1]
    assert b"/FontFile" in written[0][0] and b"Type3" not in written[0][0]  # text stays text, font embedded
    assert {file.suffix for file in folder.iterdir()} == {".pdf", ".png", ".csv", ".json"}
    pd.testing.assert_frame_equal(pd.read_csv(folder / "figure2.csv"), data)


def test_paper_values_names_what_it_knows():
    with pytest.raises(ValueError, match="unknown paper table 'table9'; known: .*table1_matbench_mae"):
        report.paper_values("table9")


def test_readme_block(products):
    readme = products / "README.md"
    demo, other = (report.START.format(profile=profile) for profile in ("demo", "cpu"))
    block = f"{other}\nkept\n{report.END}\n"
    readme.write_text(f"# Title\n{block}{demo}\nold\n{report.END}\nrest\n")
    with pytest.raises(FileNotFoundError, match="run make all PROFILE=demo"):
        report.update_readme("demo")
    for name, ours in (("summary_04", np.nan), ("summary_03", "0.30")):  # one file per notebook, in order
        report.write_table(pd.DataFrame({"result": [name], "ours": [ours]}), name, "demo", "", {})
    report.update_readme("demo")
    table = "| result | ours |\n| --- | --- |\n| summary_03 | 0.3 |\n| summary_04 | – |"
    assert readme.read_text() == f"# Title\n{block}{demo}\n{table}\n{report.END}\nrest\n"
    readme.write_text("# Title\n")
    with pytest.raises(ValueError, match="expected the lines <!-- results of demo -->"):
        report.update_readme("demo")


@pytest.mark.parametrize("table, column", [
    ("table1_matbench_mae", "matbench"), ("table2_unconvbench_mae", "unconvbench"),
    ("table6_discovery_metrics", "discovery"),
])
def test_registry_covers_the_papers_tables(table, column):
    models = set(report.paper_values(table)["model"]) - {"CLOUD"}
    registered = {model.name for model in (*baselines.PAPER_BASELINES, *baselines.OWN_BASELINES)
                  if getattr(model, column) not in ("", baselines.HERE)}
    assert models == registered


def test_table_5():
    table = baselines.baseline_table().set_index("model")
    assert len(baselines.PAPER_BASELINES) == 19 and table.index.is_unique  # as in the paper, and ours
    assert table.loc["Roost", "on MatBench leaderboard"] == "no"  # the paper says leaderboard
    kept = Path(__file__).parents[1] / "results/demo"
    ours = {name for file in kept.glob("matbench*.parquet") for name in pd.read_parquet(file)["model"].str.lower()}
    assert "random forest" in ours and ours - {"cloud"} <= set(table.index.str.lower())
