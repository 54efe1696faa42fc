"""A bundle: fine-tuned models as one folder that predicts, with what has to be known to use them.

    models.json                          properties, units, recipe of the strings, held-out errors, checksums
    README.md                            model card
    held_out.parquet                     what every model predicted for the crystals of its test fold
    encoder/                             the pre-trained encoder with its tokenizer, for embeddings
    <property>/fold0-seed0/              one folder per model of the ensemble, as train writes them, in bfloat16
    joint/fold0-seed0/                   the same of models fine-tuned on several properties together

Models with the same encoder (a frozen one) share its file: the first has it, the others only their heads.
"""

import csv
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cloud_lib import io
from cloud_lib.model_card import card

if TYPE_CHECKING:
    import pandas as pd

MANIFEST, HELD_OUT, FORMAT = "models.json", "held_out.parquet", 1
HELD_OUT_COLUMNS = ["task", "fold", "split", "material_id", "target", "prediction"]
PROFILES = ("paper", "gpu_site", "gpu", "cpu", "demo")  # whose models are taken if there is no models/: largest first
ONE_SIGMA = 68.27  # per cent of a normal distribution within one standard deviation


class Recipe(NamedTuple):
    """How a crystal becomes a model's string."""

    style: str
    symprec: float  # angstrom
    generators: str  # table of spacegroups.generator


class Member(NamedTuple):
    """One model of an ensemble: the folders of its encoder and of its head, relative to the bundle."""

    encoder: str
    head: str


@dataclass(frozen=True)
class Property:
    """One predicted property; errors and deviations in its unit.

    `error_68`: 68 % of the held-out crystals were predicted within it. `elements` and `space_groups` are those
    of the labelled crystals; None = not known, so no warnings.
    """

    name: str
    unit: str
    description: str
    recipe: Recipe
    members: tuple[Member, ...]
    target_std: float
    mae_test: float
    error_68: float
    n_test: int
    elements: frozenset[str] | None
    space_groups: frozenset[int] | None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, or the runs of a profile seen as one."""

    folder: Path
    properties: dict[str, Property]
    encoder: str | None  # folder of the pre-trained encoder
    encoder_recipe: Recipe | None
    sha256: dict[str, str]  # of the files with weights, by path in the bundle
    note: str = ""

    def choose(self, names: Sequence[str] | None = None) -> list[Property]:
        """The named properties, all without names.

        Raises:
            ValueError: a name is unknown.
        """
        if unknown := sorted(set(names or ()) - set(self.properties)):
            raise ValueError(f"expected properties of {sorted(self.properties)}, found {unknown[:3]}; these are "
                             f"what the models in {self.folder} predict")
        return [self.properties[name] for name in dict.fromkeys(names or self.properties)]

    def path(self, name: str) -> Path:
        """Folder of a model whose weights are as the manifest says.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file has changed.
        """
        for file in self._weights(name):
            if not (self.folder / file).is_file():
                raise FileNotFoundError(f"expected weights {self.folder / file}, found none; fetch the models "
                                        "again (git checkout, git lfs pull), or run make matbench")
            if file in self.sha256 and io.sha256(self.folder / file) != self.sha256[file]:
                raise ValueError(f"expected weights {self.folder / file} with sha256 {self.sha256[file][:12]}, "
                                 "found other content: damaged; fetch the models again")
        return self.folder / name

    def held_out(self, names: Sequence[str] | None = None) -> "pd.DataFrame":
        """What the models predict for crystals of their test folds: HELD_OUT_COLUMNS, in the properties' units.

        Raises:
            FileNotFoundError: a model has no predictions beside it.
            ValueError: a name is unknown, or there are no held-out rows.
        """
        import pandas as pd

        chosen = self.choose(names)
        if (self.folder / HELD_OUT).is_file():
            found = pd.read_parquet(self.folder / HELD_OUT)
        else:
            found = _held_out(dict.fromkeys(self.folder / member.head for p in chosen for member in p.members))
        return found[found["task"].isin([p.name for p in chosen])].reset_index(drop=True)

    def _weights(self, name: str) -> list[str]:
        return [file for file in self.sha256 if file.rsplit("/", 1)[0] == name]


# -------------------------------------------------------------------------------------------------- finding
def find(models: str | os.PathLike | None = None) -> Bundle:
    """The bundle in a folder; without one, models/ of the repository, else the first of PROFILES with runs.

    Args:
        models: a bundle, checkpoints/<profile>, or the folder of one fine-tuned model.
    Raises:
        FileNotFoundError: no models there.
        ValueError: a damaged manifest, or one of a newer version.
    """
    if models is not None:
        return _named(Path(models))
    if (io.root() / "models" / MANIFEST).is_file():
        return open_bundle(io.root() / "models")
    for profile in PROFILES:
        if any(_model_dirs(io.checkpoints_dir(profile))):
            return from_runs(io.checkpoints_dir(profile))
    raise FileNotFoundError(f"expected models in {io.root() / 'models'} or checkpoints/<profile>/matbench, found "
                            "none; name their folder with --models, or run make matbench")


def _named(folder: Path) -> Bundle:
    if (folder / MANIFEST).is_file():
        return open_bundle(folder)
    for model in (folder, folder / "model"):
        if (model / "head.safetensors").is_file():
            return from_model(model)
    return from_runs(folder)


def open_bundle(folder: str | os.PathLike) -> Bundle:
    """Open a folder written by `write`.

    Raises:
        FileNotFoundError: it has no manifest.
        ValueError: a damaged manifest, or one of a newer version.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"expected {MANIFEST} in {folder}, found none; name a folder of models")
    found = io.read_json(folder / MANIFEST)
    if found.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT} in {folder / MANIFEST}, found {found.get('format')}; update "
                         "the program, or fetch the models again")
    try:
        properties = {name: _property(name, value) for name, value in found["properties"].items()}
        recipe = Recipe(**found["encoder_recipe"]) if found["encoder_recipe"] else None
        return Bundle(folder, properties, found["encoder"], recipe, found["sha256"], found["note"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a manifest in {folder / MANIFEST}, found {type(error).__name__} {error}; "
                         "fetch the models again") from error


def _property(name: str, value: dict[str, Any]) -> Property:
    seen = {key: None if value[key] is None else frozenset(value[key]) for key in ("elements", "space_groups")}
    return Property(name, **(value | seen | {"recipe": Recipe(**value["recipe"]),
                                             "members": tuple(Member(*pair) for pair in value["members"])}))


def from_runs(runs: Path, members: int | None = None) -> Bundle:
    """The fine-tuned models and the encoder below checkpoints/<profile>, as a bundle without copying.

    A property of a jointly fine-tuned model is predicted by those models, not by its own. `members`: of each property
    the first so many models, in the order of fold and seed; None = all.

    Units and tolerances come from results/<profile>/benchmarks.csv, elements and space groups from
    data/processed/<profile>/tasks.

    Raises:
        FileNotFoundError: no fine-tuned model.
    """
    folders: dict[str, list[Path]] = {}
    found = [(folder, io.read_json(folder / "cloud.json")["tasks"]) for folder in _model_dirs(runs)]
    joint = {task for _, tasks in found if len(tasks) > 1 for task in tasks}
    for folder, tasks in found:
        for task in tasks:
            if len(tasks) > 1 or task not in joint:
                folders.setdefault(task, []).append(folder)
    if not folders:
        raise FileNotFoundError(f"expected models in {runs}, found neither {MANIFEST} nor fine-tuned ones; run "
                                "make matbench, or name another folder")
    facts = _benchmarks(io.results_dir() / runs.name / "benchmarks.csv")
    tasks = io.processed_dir(runs.name) / "tasks"
    folders = {name: found[:members] for name, found in folders.items()}
    held_out = _held_out(dict.fromkeys(folder for found in folders.values() for folder in found))
    properties = {name: _from_units(name, found, held_out, facts.get(name, {}), tasks / f"{name}.parquet", runs)
                  for name, found in folders.items()}
    encoder = "encoder" if (runs / "encoder" / "config.json").is_file() else None
    curation = io.results_dir() / runs.name / "curation.json"
    recipe = _recipe(runs / "encoder", io.read_json(curation) if curation.is_file() else {}) if encoder else None
    return Bundle(runs, properties, encoder, recipe, {}, f"profile {runs.name}")


def from_model(model: Path) -> Bundle:
    """One fine-tuned model, <unit>/model, as a bundle; its units and its labelled crystals are not known.

    Raises:
        FileNotFoundError: no held-out predictions beside it.
    """
    tasks = io.read_json(model / "cloud.json")["tasks"]
    held_out = _held_out([model])
    found = {task: _from_units(task, [model], held_out, {}, model / "none", model.parent) for task in tasks}
    return Bundle(model.parent, found, None, None, {}, f"one model of {', '.join(tasks)}")


def _model_dirs(runs: Path) -> Iterator[Path]:
    return (file.parent for file in sorted(runs.glob("matbench/*/CLOUD/fold*-seed*/model/head.safetensors")))


def _benchmarks(file: Path) -> dict[str, dict[str, str]]:
    if not file.is_file():
        return {}
    with open(file, newline="", encoding="utf-8") as handle:
        return {row["task"]: row for row in csv.DictReader(handle)}


def _recipe(model_dir: Path, facts: dict[str, Any]) -> Recipe:
    meta = io.read_json(model_dir / "cloud.json")
    generators = "published" if meta["vocab_version"].startswith("published") else "corrected"
    return Recipe(meta["style"], float(facts.get("symprec") or 0.01), generators)


def _from_units(name: str, folders: list[Path], held_out: "pd.DataFrame", facts: dict[str, str], table: Path,
                runs: Path) -> Property:
    metas = [io.read_json(folder / "cloud.json") for folder in folders]
    rows = held_out[held_out["task"] == name]
    errors = (rows["prediction"] - rows["target"]).abs().to_numpy()
    std = np.mean([np.atleast_1d(meta["target_std"])[meta["tasks"].index(name)] for meta in metas])
    names = [folder.relative_to(runs).as_posix() for folder in folders]
    return Property(name, facts.get("unit", ""), facts.get("property", name), _recipe(folders[0], facts),
                    tuple(Member(path, path) for path in names), float(std),
                    float(errors.mean()), float(np.percentile(errors, ONE_SIGMA)), len(errors), *_seen(table))


def _held_out(models: Iterable[Path]) -> "pd.DataFrame":
    """Test rows beside the models, validation rows of tasks that a model was not tested on: HELD_OUT_COLUMNS.

    Raises:
        FileNotFoundError: no predictions.
        ValueError: none of held-out rows.
    """
    import pandas as pd

    found = []
    for model in models:
        file = model.parent / "predictions.csv"
        if not file.is_file():
            raise FileNotFoundError(f"expected held-out predictions in {file}, found none; run make matbench")
        table = pd.read_csv(file)
        is_test = table["split"] == "test"
        rows = table.loc[is_test | ~table["task"].isin(table["task"][is_test]) & (table["split"] == "val"), HELD_OUT_COLUMNS]
        if lacking := sorted(set(io.read_json(model / "cloud.json")["tasks"]) - set(rows["task"])):
            raise ValueError(f"expected held-out rows in {file}, found none of {lacking}; delete the run and run make "
                             "matbench")
        found.append(rows)
    return pd.concat(found, ignore_index=True)


def _seen(table: Path) -> tuple[frozenset[str] | None, frozenset[int] | None]:
    """Elements and space groups of a task's labelled crystals."""
    if not table.is_file():
        return None, None
    import re

    import pyarrow.parquet as pq

    found = pq.read_table(table, columns=["formula_reduced", "space_group"])
    text = " ".join(set(found["formula_reduced"].to_pylist()))
    return frozenset(re.findall("[A-Z][a-z]?", text)), frozenset(found["space_group"].to_pylist())


# -------------------------------------------------------------------------------------------------- writing
def write(source: Bundle, out_dir: str | os.PathLike, properties: Sequence[str] | None = None,
          note: str | None = None) -> Bundle:
    """Collect models into a folder of their own, in bfloat16, with checksums; atomic.

    Raises:
        ValueError: an unknown property.
        FileNotFoundError: weights are missing.
    """
    from cloud_lib.predict import save_bfloat16

    chosen = source.choose(properties)
    with io.atomic_path(out_dir) as folder:
        folder.mkdir()
        if source.encoder:
            save_bfloat16(source.path(source.encoder), folder / "encoder")
            for file in folder.glob("encoder/tokenizer*.json"):
                shutil.copyfile(file, folder / file.name)
        copied: dict[str, Member] = {}
        encoders = {io.sha256(file): "encoder" for file in folder.glob("encoder/model.safetensors")}
        kept = {p.name: [_copy(source, p, i, folder, copied, encoders) for i in range(len(p.members))] for p in chosen}
        weights = {file.relative_to(folder).as_posix(): io.sha256(file)
                   for file in sorted(folder.rglob("*.safetensors"))}
        made = {p.name: io.plain(vars(p)) | {"recipe": p.recipe._asdict(), "members": kept[p.name]}
                for p in chosen}
        for value in made.values():
            del value["name"]
        source.held_out(properties).to_parquet(folder / HELD_OUT, index=False)
        recipe = source.encoder_recipe._asdict() if source.encoder_recipe else None
        io.write_json(folder / MANIFEST, {
            "format": FORMAT, "properties": made, "encoder": "encoder" if source.encoder else None,
            "encoder_recipe": recipe, "sha256": weights, "note": source.note if note is None else note})
        (folder / "README.md").write_text(card(chosen, source.note if note is None else note), encoding="utf-8")
    return open_bundle(out_dir)


def _copy(source: Bundle, prop: Property, number: int, folder: Path, copied: dict[str, Member],
          encoders: dict[str, str]) -> Member:
    """Copy one model of a property's ensemble, once, and equal encoders once.

    `copied`, `encoders`: what is there, by its folder in the bundle and by its checksum; added to.
    """
    from cloud_lib.predict import model_meta, save_bfloat16

    member = prop.members[number]
    path = source.path(member.head)
    group = "joint" if len(model_meta(path)["tasks"]) > 1 else prop.name
    name = f"{group}/{path.parent.name if path.name == 'model' else path.name or number}"
    if name not in copied:
        save_bfloat16(path if member.encoder == member.head else source.path(member.encoder), folder / name)
        if member.encoder != member.head:
            for file in ("head.safetensors", "cloud.json"):
                shutil.copyfile(path / file, folder / name / file)
        first = encoders.setdefault(io.sha256(folder / name / "model.safetensors"), name)
        if first != name:
            (folder / name / "model.safetensors").unlink()
            (folder / name / "config.json").unlink()
        copied[name] = Member(first, name)
    return copied[name]
