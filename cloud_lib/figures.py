"""The paper's figures as functions: a table in, a matplotlib figure out. Nothing is computed or written here."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from .report import COLUMN_MM, PALETTE, TEXT_MM, figure_size, panel_letter

PARTS = ("special", "generator", "Wyckoff", "element", "fraction")
PART_COLOURS = ("#9a9a9a", PALETTE["blue"], PALETTE["orange"], PALETTE["green"], PALETTE["purple"])


def _panels(width_mm: float, height_mm: float, rows: int = 1, columns: int = 1,
            width_ratios: tuple[float, ...] | None = None) -> tuple[Figure, np.ndarray]:
    """Figure of a given size in millimetres and its axes, lettered where there are several."""
    fig, axes = plt.subplots(rows, columns, figsize=figure_size(width_mm, height_mm), layout="constrained",
                             squeeze=False, width_ratios=width_ratios)
    for letter, ax in zip("abcdefgh", axes.flat if axes.size > 1 else ()):
        panel_letter(ax, letter)
    return fig, axes


def attention(tokens: list[str], parts: np.ndarray, weights: np.ndarray) -> Figure:
    """Figure 1: attention over one symmetry string.

    Args:
        tokens: the n tokens, `[CLS]` and `[SEP]` included.
        parts: (n,) index into `PARTS` of each token.
        weights: (n, n) attention from row to column, rows sum to 1.
    """
    n = len(tokens)
    fig, ((left, right),) = _panels(TEXT_MM, max(88, 18 + 2.4 * n), columns=2, width_ratios=(1.25, 1))  # labels of 2.1 mm
    image = left.imshow(weights, cmap="Blues", vmin=0, vmax=np.quantile(weights, 0.99), aspect="auto")
    left.set(xticks=range(n), yticks=range(n), xlabel="attended token", ylabel="attending token")
    left.set_xticklabels(tokens, rotation=90, fontsize=6)
    left.set_yticklabels(tokens, fontsize=6)
    for labels in (left.get_xticklabels(), left.get_yticklabels()):
        for label, part in zip(labels, parts):
            label.set_color(PART_COLOURS[part])
    fig.colorbar(image, ax=left, label="attention weight", shrink=0.8, pad=0.02)
    right.barh(range(n), weights[0], color=[PART_COLOURS[part] for part in parts])
    right.set(yticks=range(n), xlabel="attention weight from [CLS]", ylim=(n - 0.5, -0.5))
    right.set_yticklabels(tokens, fontsize=6)
    handles = [Line2D([], [], marker="s", ls="", color=c) for c in PART_COLOURS[1:]]
    right.legend(handles, PARTS[1:], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=0.8,
                 handletextpad=0.1)
    return fig


def corpus_overview(statistics: pd.DataFrame) -> Figure:
    """Figure S1: crystals per space group and per element, and the lengths of the strings in each style.

    Args:
        statistics: `curation.corpus_statistics`; lengths are without `[CLS]` and `[SEP]`.
    """
    space_groups, elements, lengths = (statistics[statistics["statistic"] == name]
                                       for name in ("space_groups", "elements", "lengths"))
    fig, ((top,), (middle,), (bottom,)) = _panels(TEXT_MM, 110, rows=3)
    top.bar(space_groups["space_group"], space_groups["n"], width=1.0, color=PALETTE["blue"])
    top.set(xlabel="space-group number", ylabel="crystals", xlim=(0, 231), yscale="log")
    middle.bar(elements["element"], elements["n"], color=PALETTE["green"])
    middle.set(xlabel="element", ylabel="crystals", yscale="log", xlim=(-0.7, len(elements) - 0.3))
    middle.tick_params(axis="x", labelrotation=90, labelsize=4.5, length=1.5)
    looks = zip(lengths.groupby("style", sort=False), PART_COLOURS[1:], ("-", "--", "-"))
    for (style, rows), colour, dashes in looks:
        share = rows["n"] / rows["n"].sum()
        bottom.step(rows["n_tokens"], share, where="mid", color=colour, ls=dashes, label=style)
        longest = rows.loc[share.cumsum() < 0.995, "n_tokens"].max()
        bottom.set_xlim(0, max(longest, bottom.get_xlim()[1] if bottom.lines[1:] else 0))
    bottom.set(xlabel="tokens per string", ylabel="share of crystals", ylim=(0, None))
    bottom.legend(frameon=False)
    return fig


def pretraining(log: pd.DataFrame, accuracy: pd.DataFrame) -> Figure:
    """Figure S2: MLM loss during pre-training, and masked accuracy per part of the string.

    Args:
        log: columns `step`, `split` (train, val), `loss` [nats per masked token].
        accuracy: one row per part of the string; columns `part`, `model`, `per-position`, `unigram`.
    """
    fig, ((left, right),) = _panels(TEXT_MM, 62, columns=2)
    for split, colour, width in (("train", PALETTE["grey"], 0.7), ("val", PALETTE["blue"], 1.4)):
        rows = log[log["split"] == split]
        left.plot(rows["step"], rows["loss"], color=colour, lw=width, label={"val": "validation"}.get(split, split))
    left.set(xlabel="step", ylabel="MLM loss (nats per masked token)", xlim=(0, None))
    left.legend(frameon=False)
    columns = [name for name in ("unigram", "per-position", "model") if name in accuracy]
    colours = {"unigram": PALETTE["light"], "per-position": PALETTE["grey"], "model": PALETTE["blue"]}
    positions = np.arange(len(accuracy))
    for k, name in enumerate(columns):
        right.bar(positions + (k - 1) * 0.27, accuracy[name], 0.27, color=colours[name], label=name)
    right.set(xticks=positions, xticklabels=accuracy["part"], ylabel="accuracy on masked tokens", ylim=(0, 1.18))
    right.legend(frameon=False, loc="upper left", ncols=3, columnspacing=1.0, handlelength=1.2)
    return fig


def pretrained_vs_scratch(table: pd.DataFrame) -> Figure:
    """Figure 2: MAE after pre-training and from scratch, with the reduction in per cent.

    Args:
        table: columns `task`, `mae_scratch`, `mae_pretrained` and their fold deviations `std_scratch`,
            `std_pretrained`, in the task's unit.
    """
    fig, ((ax,),) = _panels(COLUMN_MM if len(table) < 5 else TEXT_MM, 66)
    positions = np.arange(len(table))
    for shift, name, colour in ((-0.2, "scratch", PALETTE["grey"]), (0.2, "pretrained", PALETTE["blue"])):
        mae, std = table[f"mae_{name}"], table[f"std_{name}"]
        label = {"scratch": "from scratch", "pretrained": "pre-trained"}[name]
        ax.bar(positions + shift, mae, 0.38, yerr=std, color=colour, label=label, error_kw={"lw": 0.8})
    ax.set(xticks=positions, ylabel="MAE (unit of each task)", yscale="log")
    ax.set_xticklabels(table["task"], rotation=30 if len(table) > 3 else 0, ha="right" if len(table) > 3 else "center")
    change = 100 * (table["mae_pretrained"] / table["mae_scratch"] - 1)
    top = np.maximum(table["mae_scratch"] + table["std_scratch"], table["mae_pretrained"] + table["std_pretrained"])
    for x, y, percent in zip(positions, top, change):
        ax.annotate(f"{percent:+.1f} %", (x, y), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.12)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.14), ncols=2, borderaxespad=0)
    return fig


def roc(curves: pd.DataFrame, solid: list[str], title: str | None = None) -> Figure:
    """Figures 3 and 5: ROC curves, ordered by their area.

    Args:
        curves: columns `model`, `source`, `fpr`, `tpr`, `auc`; one row per point of a curve.
        solid: models drawn with a solid line (ours), the others dashed.
    """
    order = curves.groupby("model")["auc"].first().sort_values(ascending=False)
    colours = dict(zip(order.index, plt.get_cmap("viridis")(np.linspace(0.05, 0.92, len(order)))))
    fig, ((ax,),) = _panels(COLUMN_MM * 1.2, COLUMN_MM * 1.2)
    for model, auc in order.items():
        rows = curves[curves["model"] == model]
        ours = model in solid
        style = {"color": PALETTE["red"], "lw": 1.8, "zorder": 5} if ours else {"color": colours[model], "ls": "--"}
        ax.plot(rows["fpr"], rows["tpr"], label=f"{model}: {auc:.3f}", **{"lw": 0.9, **style})
    ax.plot([0, 1], [0, 1], color="0.7", lw=0.7, ls=":")
    ax.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1))
    ax.set_aspect("equal")
    ax.legend(frameon=False, title=title or "model: AUC", loc="lower right", fontsize=6 if len(order) > 8 else 7,
              title_fontsize=7, alignment="left", labelspacing=0.3)
    return fig


def scaling_panels(runs: pd.DataFrame, finetuned: pd.DataFrame, unit: str) -> Figure:
    """Figure 4: pre-training loss and fine-tuning error over data size and model size.

    Args:
        runs: columns `n_params_non_embedding`, `n_examples`, `val_loss`; several seeds are averaged.
        finetuned: columns `init` (pretrained, scratch), `n_params_non_embedding`, `n_examples`, `mae`, `mae_std`;
            scratch rows have no `n_examples`.
        unit: unit of `mae`.
    """
    fig, axes = _panels(TEXT_MM, 128, rows=2, columns=2)
    mean = runs.groupby(["n_params_non_embedding", "n_examples"], as_index=False)["val_loss"].mean()
    _lines(axes[0, 0], mean, "n_examples", "n_params_non_embedding", "pre-training crystals", "parameters")
    _lines(axes[0, 1], mean, "n_params_non_embedding", "n_examples", "non-embedding parameters", "crystals")
    for ax, x in ((axes[1, 0], "n_examples"), (axes[1, 1], "n_params_non_embedding")):
        _finetuned_panel(ax, finetuned, x)
        ax.set_ylabel(f"test MAE ({unit})")
    axes[1, 0].set_xlabel("pre-training crystals")
    axes[1, 1].set_xlabel("non-embedding parameters")
    return fig


def _lines(ax: plt.Axes, table: pd.DataFrame, x: str, group: str, xlabel: str, legend: str) -> None:
    """One line per `group`: validation loss over `x`, both axes logarithmic."""
    groups = sorted(table[group].unique())
    for value, colour in zip(groups, plt.get_cmap("viridis")(np.linspace(0.05, 0.88, len(groups)))):
        rows = table[table[group] == value].sort_values(x)
        ax.plot(rows[x], rows["val_loss"], "o-", ms=3, lw=1, color=colour, label=_short(value))
    ax.set(xlabel=xlabel, ylabel="validation MLM loss (nats)", xscale="log", yscale="log")
    _plain_log_ticks(ax.xaxis, table[x])
    _plain_log_ticks(ax.yaxis)
    ax.legend(frameon=False, title=legend, alignment="left", fontsize=6.5, title_fontsize=7, labelspacing=0.25)


def _finetuned_panel(ax: plt.Axes, table: pd.DataFrame, x: str) -> None:
    """Pre-trained models as points with fold deviations, the scratch twins beside them or as a band."""
    pretrained = table[table["init"] == "pretrained"]
    scratch = table[table["init"] == "scratch"]
    other = {"n_examples": "n_params_non_embedding", "n_params_non_embedding": "n_examples"}[x]
    rows = pretrained[pretrained[other] == pretrained[other].max()].sort_values(x)
    ax.errorbar(rows[x], rows["mae"], rows["mae_std"], fmt="o-", ms=3, lw=1, capsize=2, color=PALETTE["blue"],
                label="pre-trained")
    if x == "n_params_non_embedding":
        rows = scratch.sort_values(x)
        ax.errorbar(rows[x], rows["mae"], rows["mae_std"], fmt="s--", ms=3, lw=1, capsize=2, color=PALETTE["grey"],
                    label="from scratch")
    else:
        same = scratch[scratch[other] == scratch[other].max()]
        ax.axhline(same["mae"].mean(), color=PALETTE["grey"], ls="--", lw=1, label="from scratch")
    ax.set_xscale("log")
    _plain_log_ticks(ax.xaxis, rows[x])
    ax.legend(frameon=False)


def frontier(runs: pd.DataFrame, contours: pd.DataFrame, optimum: pd.DataFrame) -> Figure:
    """Figure 6: iso-loss contours over training compute and model size, with the compute-optimal frontier.

    Args:
        runs: our runs; columns `train_flops`, `n_params_non_embedding`.
        contours: iso-loss lines; columns `law`, `loss` [nats], `n_params`, `train_flops`.
        optimum: the frontier; columns `law`, `train_flops`, `n_params`, `n_params_low`, `n_params_high` (95 %
            interval, may be NaN). The first law is drawn solid, the second dashed.
    """
    fig, ((ax,),) = _panels(TEXT_MM * 0.75, 95)
    limits = {"xlim": tuple(optimum["train_flops"].agg(["min", "max"])),
              "ylim": (contours["n_params"].min(), contours["n_params"].max())}
    for law, colour, dashes in zip(optimum["law"].unique(), (PALETTE["blue"], PALETTE["red"]), ("-", "--")):
        lines = contours[contours["law"] == law]
        shades = plt.get_cmap("Blues_r" if dashes == "-" else "Oranges_r")(np.linspace(0.1, 0.7, lines["loss"].nunique()))
        for (loss, line), shade in zip(lines.groupby("loss"), shades):
            ax.plot(line["train_flops"], line["n_params"], color=shade, lw=0.7, ls=dashes)
            if dashes == "-":
                _label_contour(ax, line, f"{loss:.2f}", limits)
        best = optimum[optimum["law"] == law]
        ax.fill_between(best["train_flops"], best["n_params_low"], best["n_params_high"], color=colour, alpha=0.2, lw=0)
        ax.plot(best["train_flops"], best["n_params"], color=colour, lw=1.8, ls=dashes, label=f"optimum, {law}")
    ax.scatter(runs["train_flops"], runs["n_params_non_embedding"], s=8, c="black", zorder=5, label="our runs")
    ax.set(xscale="log", yscale="log", xlabel="training compute (FLOPs)", ylabel="non-embedding parameters", **limits)
    ax.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
    return fig


def _label_contour(ax: plt.Axes, line: pd.DataFrame, text: str, limits: dict[str, tuple[float, float]]) -> None:
    """Write the loss where a contour turns: its smallest compute, if that lies inside the axes."""
    turn = line.loc[line["train_flops"].idxmin()]
    (left, right), (low, high) = limits["xlim"], limits["ylim"]
    if left * 1.1 < turn["train_flops"] < right and low < turn["n_params"] < high:
        ax.annotate(text, (turn["train_flops"], turn["n_params"]), fontsize=6, ha="center", va="center",
                    bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none"})


def _short(value: float) -> str:
    """1234567 -> '1.2 M'."""
    for scale, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:g}"


def _plain_log_ticks(axis: Axis, values: pd.Series | None = None) -> None:
    """Readable numbers on a logarithmic axis that spans about a decade; ticks at `values` if they are given."""
    axis.set_major_locator(MaxNLocator(5) if values is None else FixedLocator(sorted(values.unique())))
    axis.set_major_formatter("{x:g}" if values is None else FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_locator(NullLocator())
