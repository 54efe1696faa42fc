"""Tables and figures: one look, full precision in CSV, rounded in Markdown, provenance beside each product.

Conventions that `as_markdown` knows: a column `x_std` is shown with `x` as "mean ± std", `rows` with
`rows_official` as "k of n", and a missing number as a dash, never as a number.
"""

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cloud_lib.io import atomic_path, figures_dir, root, tables_dir, write_json

COLUMN_MM, TEXT_MM = 85.0, 180.0  # one column, full width of a journal page
PALETTE = {"blue": "#0072b2", "orange": "#e69f00", "green": "#009e73", "red": "#d55e00", "purple": "#cc79a7",
           "sky": "#56b4e9", "yellow": "#f0e442", "black": "#000000", "grey": "#8c8c8c", "light": "#d9d9d9"}
# The first eight: Okabe and Ito, distinct for colour-blind readers (jfly.uni-koeln.de/color).
MISSING = "–"
COUNTS = ("rows", "rows_official", "folds", "seeds")
START, END = "<!-- results of {profile} -->", "<!-- end of results -->"


# ------------------------------------------------------------------------------------------------ style
def style() -> None:
    """Set the one plot style: 8 pt sans serif, thin ticks, text in PDF kept as text."""
    sns.set_theme(context="paper", style="ticks", palette=list(PALETTE.values())[:6], rc={
        "figure.figsize": figure_size(), "figure.constrained_layout.use": True, "figure.dpi": 120,
        "savefig.dpi": 300, "pdf.fonttype": 42,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8, "axes.labelsize": 8,
        "axes.titlesize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4,
        "ytick.minor.width": 0.4, "xtick.major.size": 3, "ytick.major.size": 3, "lines.linewidth": 1.2,
        "lines.markersize": 4, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    })


def figure_size(width_mm: float = COLUMN_MM, height_mm: float = 65.0) -> tuple[float, float]:
    """Width and height in the inches that matplotlib wants."""
    return width_mm / 25.4, height_mm / 25.4


def panel_letter(ax: Axes, letter: str) -> None:
    """Bold a, b, c, d at the upper left corner, outside the axes."""
    ax.annotate(letter, xy=(0, 1), xycoords="axes fraction", xytext=(-30, 4), textcoords="offset points",
                fontsize=9, fontweight="bold", va="bottom")


# --------------------------------------------------------------------------------------------- products
def write_table(df: pd.DataFrame, name: str, profile: str, caption: str,
                provenance: dict[str, Any]) -> pd.DataFrame:
    """Write tables/<profile>/<name>.csv (every digit), .md (rounded, with caption) and .json (provenance).

    Returns:
        What the Markdown shows, to display in the notebook.
    """
    folder = tables_dir(profile)
    _write_csv(df, folder / f"{name}.csv")
    shown = as_displayed(df)
    with atomic_path(folder / f"{name}.md") as temporary:
        temporary.write_text(f"{caption}\n\n{as_markdown(shown)}\n", encoding="utf-8")
    write_json(folder / f"{name}.json", {"caption": caption, **provenance})
    return shown


def write_figure(fig: Figure, name: str, profile: str, data: pd.DataFrame,
                 provenance: dict[str, Any]) -> Path:
    """Write figures/<profile>/<name>.pdf, .png (300 dpi), .csv (the plotted numbers) and .json (provenance).

    The files carry no date, so that equal numbers give equal bytes.

    Returns:
        Path of the PNG.
    """
    folder = figures_dir(profile)
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        with atomic_path(folder / f"{name}{suffix}") as temporary:
            fig.savefig(temporary, metadata=metadata, format=suffix[1:])
    _write_csv(data, folder / f"{name}.csv")
    write_json(folder / f"{name}.json", provenance)
    return folder / f"{name}.png"


def _write_csv(df: pd.DataFrame, path: Path) -> None:
    with atomic_path(path) as temporary:
        df.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")


# ----------------------------------------------------------------------------------- paper beside ours
def paper_values(name: str) -> pd.DataFrame:
    """The paper's printed numbers, for example `paper_values("table1_matbench_mae")`.

    Raises:
        ValueError: there is no such table.
    """
    folder = resources.files("cloud_lib") / "paper_values"
    known = sorted(file.name.removesuffix(".csv") for file in folder.iterdir() if file.name.endswith(".csv"))
    if name not in known:
        raise ValueError(f"unknown paper table {name!r}; known: {', '.join(known)}")
    with (folder / f"{name}.csv").open(encoding="utf-8") as handle:
        return pd.read_csv(handle)


def compare(paper: pd.DataFrame, ours: pd.DataFrame, on: Sequence[str]) -> pd.DataFrame:
    """The paper's number, ours and their ratio, one line per `on`; what is missing on one side stays empty.

    Args:
        paper: columns `on`, `paper`, perhaps `paper_std`; its order of lines is kept.
        ours: columns `on`, `ours`, perhaps `ours_std`, `rows`, `rows_official`, `folds`, `seeds`.
    Raises:
        ValueError: a line occurs twice on one side.
    """
    on = list(on)
    for side, df in (("paper", paper), ("ours", ours)):
        twice = df.loc[df.duplicated(on), on]
        if len(twice):
            raise ValueError(f"expected one line per {on} in {side}, found {len(twice)} more, "
                             f"e.g. {twice.head(3).values.tolist()}")
    joined = pd.concat([paper[on], ours[on]]).drop_duplicates(ignore_index=True)
    for side in (paper, ours):
        joined = joined.merge(side, on=on, how="left", validate="1:1")
    joined["ratio"] = joined["ours"] / joined["paper"]
    order = [*on, "paper", "paper_std", "ours", "ours_std", "ratio", *COUNTS]
    return joined[[c for c in order if c in joined] + [c for c in joined if c not in order]]


# --------------------------------------------------------------------------------------------- Markdown
def as_displayed(df: pd.DataFrame) -> pd.DataFrame:
    """All cells as rounded text; `x_std` merged into `x`, `rows_official` into `rows`."""
    merged = [f"{c}_std" for c in df if f"{c}_std" in df] + ["rows_official"] * ("rows" in df)
    shown = pd.DataFrame(index=df.index)
    for column in df.columns.difference(merged, sort=False):
        shown[column] = _format_column(df[column])
        if f"{column}_std" in df:
            shown[column] = [format_mean_std(m, s) for m, s in zip(df[column], df[f"{column}_std"])]
        if column == "rows" and "rows_official" in df:
            shown[column] = [format_rows(k, n) for k, n in zip(df["rows"], df["rows_official"])]
    return shown


def _format_column(column: pd.Series) -> list[str]:
    """The fewest decimals (0 to 3) that lose nothing in the whole column, else each number by itself."""
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    present = column.dropna().astype(float) if numeric else column
    for decimals in range(4) if numeric else ():
        if (present - present.round(decimals)).abs().max() < 1e-12 or present.empty:
            return [MISSING if pd.isna(value) else f"{value:,.{decimals}f}" for value in column]
    return [format_number(value) for value in column]


def as_markdown(shown: pd.DataFrame) -> str:
    """Pipe table of text cells."""
    lines = [shown.columns, ["---"] * shown.shape[1], *shown.itertuples(index=False)]
    escaped = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _decimals(value: float) -> int:
    """Decimals for four significant digits, four at most (as in the paper's tables)."""
    return min(4, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 4


def format_number(value: Any) -> str:
    """Four significant digits, whole numbers whole, a dash for what is missing."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return MISSING
    if pd.api.types.is_bool(value) or not pd.api.types.is_number(value):
        return str(value)
    if pd.api.types.is_integer(value):
        return f"{value:,}"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.{_decimals(value)}f}"


def format_rows(rows: float, official: float) -> str:
    """"9,502 of 10,987"; the count alone where there is no official number."""
    if pd.isna(rows):
        return MISSING
    return f"{rows:,.0f}" if pd.isna(official) else f"{rows:,.0f} of {official:,.0f}"


def format_mean_std(mean: float, std: float) -> str:
    """"0.3038 ± 0.0782": both with the decimals of the mean; no ± without a standard deviation."""
    if pd.isna(mean) or pd.isna(std):
        return format_number(mean)
    decimals = _decimals(mean)
    return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}"


# ----------------------------------------------------------------------------------------------- README
def update_readme(profile: str) -> Path:
    """Rewrite the README's table of a profile, between its two markers, from tables/<profile>/summary*.csv.

    Each notebook writes its own lines of the summary (summary_03.csv, ...); they are joined in that order.

    Raises:
        FileNotFoundError: the profile has no summary yet.
        ValueError: the README lacks the two markers.
    """
    sources, readme = sorted(tables_dir(profile).glob("summary*.csv")), root() / "README.md"
    if not sources:
        raise FileNotFoundError(f"expected {tables_dir(profile)}/summary*.csv; run make all PROFILE={profile}")
    text = readme.read_text(encoding="utf-8")
    before, start, rest = text.partition(START.format(profile=profile))
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"expected the lines {START.format(profile=profile)} and {END} in {readme}, found one or none "
                         "of them; add them where the table belongs")
    table = as_markdown(as_displayed(pd.concat(map(pd.read_csv, sources), ignore_index=True)))
    with atomic_path(readme) as temporary:
        temporary.write_text(f"{before}{start}\n{table}\n{END}{after}", encoding="utf-8")
    return readme
