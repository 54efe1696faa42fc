"""The interactive page of the report: the elements and space groups of the corpus, and crystals beside their strings.

The pictures are Plotly's, drawn by its own JavaScript, which `write_script` puts beside the page.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pymatviz
from plotly.offline import get_plotlyjs
from pymatgen.core import Structure
from pymatgen.symmetry.groups import sg_symbol_from_int_number
from pymatviz.utils import df_ptable

from cloud_lib import io
from cloud_lib.preparation import example_strings, example_structures

SCRIPT = "plotly.min.js"
FIT = 'addEventListener("load", () => dispatchEvent(new Event("resize")))'  # drawn before the page has its columns
MARGIN = {"l": 0, "r": 0, "t": 0, "b": 0}


def write_script(folder: Path) -> Path:
    """Write Plotly's JavaScript (5 MB), so that the page needs no network."""
    path = folder / SCRIPT
    path.write_text(get_plotlyjs(), encoding="utf-8")
    return path


def page(profile: str) -> str:
    """The page in Markdown; without the profile's corpus statistics it shows the example crystals only."""
    scripts = _raw(f'<script src="_static/{SCRIPT}"></script><script>{FIT}</script>')
    sections = ["# Explore", scripts, "## Elements and space groups"]
    file = io.results_dir() / profile / "corpus_statistics.csv"
    if file.is_file():
        statistics = pd.read_csv(file)
        elements, groups = (statistics[statistics["statistic"] == f"{key}s"].set_index(key)["n"].astype(int)
                            for key in ("element", "space_group"))
        sections += [f"The corpus: how many of its {groups.sum():,} crystals contain an element,",
                     _plot(periodic_table(elements), "elements", "wide"),
                     "and how they are spread over crystal systems and space groups; a click on a system opens it.",
                     _plot(space_groups(groups), "space-groups")]
    else:
        sections.append(f"`{file.relative_to(io.root())}` is not there: run notebook 1, `make 01 PROFILE={profile}`.")
    sections += ["## Crystals and their strings",
                 "Conventional cells to turn and to zoom (lighter: images of other atoms), each above its canonical "
                 "string: generators of the space group | Wyckoff positions | composition."]
    strings = example_strings().set_index("crystal")["canonical"]
    for number, (name, structure) in enumerate(example_structures().items()):
        sections += [f"### {name[0].upper()}{name[1:]}", _plot(crystal(structure), f"crystal-{number}"),
                     f"```text\n{strings[name]}\n```"]
    return "\n\n".join(sections) + "\n"


def periodic_table(counts: pd.Series) -> go.Figure:
    """Every element, the darker the more crystals contain it (grey: none); the colours go by the root of the count.

    Drawn here because `pymatviz.ptable_heatmap` (0.18) needs a function that Plotly 7 no longer has.

    Args:
        counts: symbol -> number of crystals; symbols outside the periodic table, such as D, are left out.
    """
    counts = counts.reindex(df_ptable.index, fill_value=0)
    table = df_ptable[["row", "column", "name"]].assign(n=counts).reset_index()
    table["text"] = [f"<b>{row.symbol}</b>" + f"<br>{row.n:,}" * (row.n > 0) for row in table.itertuples()]
    table["hover"] = [f"{row.name}: {row.n:,} crystals" for row in table.itertuples()]
    grid = table.pivot(index="row", columns="column").reindex(index=range(1, table["row"].max() + 1))
    empty = go.Heatmap(z=grid["n"] * 0.0, colorscale=["#eeeeee", "#eeeeee"], hoverinfo="skip")
    filled = go.Heatmap(z=np.sqrt(grid["n"].where(grid["n"] > 0)), colorscale="Blues", text=grid["text"].fillna(""),
                        texttemplate="%{text}", textfont={"size": 11}, hovertext=grid["hover"].fillna(""),
                        hoverinfo="text")
    fig = go.Figure([empty, filled]).update_traces(xgap=2, ygap=2, showscale=False)
    fig.update_xaxes(visible=False).update_yaxes(visible=False, autorange="reversed")
    return fig.update_layout(height=460, margin=MARGIN, plot_bgcolor="white")


def space_groups(counts: pd.Series) -> go.Figure:
    """Crystal systems and, around them, their space groups (`counts`: space group number -> number of crystals)."""
    fig = pymatviz.spacegroup_sunburst([int(number) for number in counts.index.repeat(counts)])
    labels = [f"{_symbol(int(label))} ({label})" if label.isdigit() else label for label in fig.data[0].labels]
    fig.update_traces(labels=labels, texttemplate="%{label}<br>%{value:,}",
                      hovertemplate="%{label}: %{value:,} crystals<extra></extra>")
    return fig.update_layout(height=480, margin=MARGIN, uniformtext={"minsize": 9, "mode": "hide"})


def _symbol(space_group: int) -> str:
    """Hermann-Mauguin symbol with its screw axes as subscripts in HTML."""
    return re.sub(r"_(\d)", r"<sub>\1</sub>", sg_symbol_from_int_number(space_group))


def crystal(structure: Structure) -> go.Figure:
    """The atoms of a cell, with their images on its faces, and its edges."""
    cell = {"edge": {"color": "#444444", "width": 3, "dash": "solid"}, "node": {"opacity": 0}}
    fig = pymatviz.structure_3d(structure, subplot_title=False, show_cell=cell, show_image_sites={"opacity": 1})
    fig.update_scenes(camera={"eye": {"x": 1.7, "y": 0.9, "z": 0.6}, "projection": {"type": "orthographic"}})
    return fig.update_layout(width=None, height=320, margin=MARGIN, legend={"font": {"size": 14}})


def _plot(fig: go.Figure, name: str, kind: str = "square") -> str:
    """A figure as wide as its box: "wide" ones scroll sideways on a phone, "square" ones shrink."""
    drawn = fig.to_html(full_html=False, include_plotlyjs=False, div_id=name,
                        config={"displayModeBar": False, "responsive": True})
    return _raw(f'<div class="plot"><div class="{kind}">{drawn}</div></div>')


def _raw(html: str) -> str:
    return f"```{{raw}} html\n{html}\n```"
