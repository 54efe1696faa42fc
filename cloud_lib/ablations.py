"""What each part of the string is worth: the same small encoder, pre-trained and fine-tuned on strings without it.

The authors' repository names such runs (no Wyckoff part, space-group number, other mask rates), the paper shows
none of them. The strings without a part are also baselines of Table 1: `composition` is a structure-agnostic BERT,
`number` the idea of MatInFormer (arXiv:2308.16259).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cloud_lib import curation, io, units
from cloud_lib.experiments import CrossValidation, finetune_units, train_and_read
from cloud_lib.representation import MAX_POSITIONS
from cloud_lib.tokenizer import Tokenizer

MAX_LENGTH = max(MAX_POSITIONS.values())  # one size of encoder for all styles
SAYS = {  # style -> what tells the space group, and what the Wyckoff part says
    "site": ("generators", "element on its sites"), "canonical": ("generators", "set of positions"),
    "paper": ("generators", "set of positions, order of the file"), "number": ("number", "set of positions"),
    "no_generator": ("-", "set of positions"), "no_wyckoff": ("generators", "-"),
    "number_no_wyckoff": ("number", "-"), "composition": ("-", "-"),
}


@dataclass(frozen=True)
class Variant:
    """One way to write the strings and to mask them.

    Raises:
        ValueError: an unknown style.
    """

    style: str = "canonical"
    mask_prob: float = 0.15

    def __post_init__(self) -> None:
        if self.style not in SAYS:
            raise ValueError(f"expected a style of {[*SAYS]}, found {self.style!r}; correct the parameter")

    @property
    def name(self) -> str:
        """The style, with the mask rate where it is not BERT's 0.15: a model's name in every table."""
        return self.style if self.mask_prob == 0.15 else f"{self.style}, mask {self.mask_prob:g}"


def variants(styles: Sequence[str], mask_probs: Sequence[float] = (), main: str = "canonical") -> list[Variant]:
    """Every style with the usual mask rate, and the style `main` with each of `mask_probs`; none twice."""
    chosen = [Variant(style) for style in styles] + [Variant(main, mask_prob) for mask_prob in mask_probs]
    return list(dict.fromkeys(chosen))


def pack(chosen: Iterable[Variant], tasks: Sequence[str], data_dir: Path) -> dict[str, dict[str, int]]:
    """Packed corpus and tasks below `data_dir`/ablations/<style>; style -> rows of each."""
    tokenizer, found = Tokenizer.default(), {}
    for style in dict.fromkeys(variant.style for variant in chosen):
        out = token_dir(data_dir, style)
        corpus = curation.pack_corpus(data_dir / "corpus.parquet", style, tokenizer, out / "corpus")
        found[style] = {"corpus": corpus["n"]} | {
            task: curation.pack_task(data_dir / "tasks" / f"{task}.parquet", style, tokenizer, out / task)["n"]
            for task in tasks}
    return found


def token_dir(data_dir: Path, style: str) -> Path:
    """Where the packed strings of a style lie."""
    return data_dir / "ablations" / style


def pretraining_units(chosen: Iterable[Variant], config: Any, data_dir: Path, out_dir: Path) -> list[dict[str, Any]]:
    """One unit per variant; `config`: a train.PretrainConfig, whose mask rate and number of positions are set here."""
    encoder = dataclasses.replace(config.encoder, max_positions=MAX_LENGTH)
    return [{"kind": "pretrain", "data_dir": str(token_dir(data_dir, variant.style) / "corpus"),
             "config": io.plain(dataclasses.replace(config, encoder=encoder, mask_prob=variant.mask_prob)),
             "out_dir": str(out_dir / "pretraining" / variant.name)} for variant in chosen]


def finetuning_units(chosen: Iterable[Variant], config: Any, tasks: Sequence[str], folds: Sequence[int],
                     seeds: Sequence[int], data_dir: Path, out_dir: Path,
                     settings_by_task: Mapping[str, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """One unit per variant, task, fold and seed, from the encoders of `pretraining_units`.

    Args:
        config: train.FinetuneConfig; its initial weights are set here.
    Raises:
        ValueError: see `experiments.finetune_units`.
    """
    found = []
    for variant in chosen:
        init = str(out_dir / "pretraining" / variant.name / "model")
        cv = CrossValidation(token_dir(data_dir, variant.style), out_dir, folds, seeds, settings_by_task or {})
        found += finetune_units(tasks, {variant.name: dataclasses.replace(config, init=init, encoder=None)}, cv)
    return found


def run(chosen: Sequence[Variant], pretraining: Any, finetuning: Any, tasks: Sequence[str], folds: Sequence[int],
        seeds: Sequence[int], data_dir: Path, out_dir: Path, n_workers: int,
        settings_by_task: Mapping[str, dict[str, Any]] | None = None, only_finished: bool = False) -> pd.DataFrame:
    """Pre-train and fine-tune every variant on strings that `pack` wrote; the long table of predictions.

    Arguments as `pretraining_units` and `finetuning_units`. Finished units are not repeated;
    `only_finished` trains nothing and takes what has finished.
    """
    todo = finetuning_units(chosen, finetuning, tasks, folds, seeds, data_dir, out_dir, settings_by_task)
    if not only_finished:
        units.run_units(pretraining_units(chosen, pretraining, data_dir, out_dir), n_workers)
    return train_and_read(todo, n_workers, only_finished)


def baselines(styles: Sequence[str], pretraining: Any, finetuning: Any, tasks: Sequence[str], folds: Sequence[int],
              seeds: Sequence[int], data_dir: Path, out_dir: Path, n_workers: int,
              settings_by_task: Mapping[str, dict[str, Any]] | None = None, only_finished: bool = False) -> pd.DataFrame:
    """`run` for Table 1, which packs the strings first: models "BERT on composition", ...; no styles, no rows."""
    chosen = variants(styles)
    pack(chosen, tasks, data_dir)
    found = run(chosen, pretraining, finetuning, tasks, folds, seeds, data_dir, out_dir, n_workers, settings_by_task,
                only_finished)
    return found.assign(model="BERT on " + found["model"].astype(str))


def table(scores: pd.DataFrame, chosen: Sequence[Variant], reference: str = "canonical") -> pd.DataFrame:
    """Table S12: a line per variant; per task MAE, its deviation over folds, and the change to `reference` in per cent.

    Args:
        scores: `scoring.scores` of the predictions of `run`.
    """
    lines = pd.DataFrame([{"strings": variant.style, "space group": SAYS[variant.style][0],
                           "Wyckoff part": SAYS[variant.style][1], "mask rate": variant.mask_prob}
                          for variant in chosen], index=[variant.name for variant in chosen])
    for task, rows in scores.groupby("task", sort=False):
        found = rows.set_index("model")
        lines[task], lines[f"{task}_std"] = found["mae"], found["mae_std"]
        base = found["mae"].get(reference, float("nan"))
        lines[f"{task} change (%)"] = 100 * (found["mae"] / base - 1)
    return lines.reset_index(drop=True)
