"""Predict your own crystals: files, pymatgen structures or ASE atoms -> properties, embeddings.

    from cloud_lib.use import predict_structures
    predict_structures([structure])            # a DataFrame: property, property_std, property_unit, ...

Every crystal gives one row; one that cannot be predicted has the reason in `error`. Work goes in pieces of
CHUNK crystals, so memory does not grow with their number; equal strings are computed once per piece.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cloud_lib import bundle as bundles
from cloud_lib import io
from cloud_lib.bundle import Bundle, Property, Recipe
from cloud_lib.dataset import PackedTokens
from cloud_lib.representation import string
from cloud_lib.symmetry import CrystalError, SymmetryRecord, as_crystal, symmetry_record
from cloud_lib.tabular import Entry, Rows, entries
from cloud_lib.tokenizer import Tokenizer, UnknownTokenError

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 2000
FACTS = ("file", "material_id", "formula_reduced", "space_group", "string")


# ------------------------------------------------------------------------------------------------ predicting
def predict_structures(structures: Iterable[Any], models: str | Path | Bundle | None = None,
                       properties: Sequence[str] | None = None, device: str = "auto") -> "pd.DataFrame":
    """Predicted properties of crystals in memory, a row each in their order.

    Columns material_id (the number of the crystal), formula_reduced, space_group, string; for each property its
    value, `<property>_std` (stated uncertainty, one standard deviation) and `<property>_unit`; warnings; error.

    Args:
        structures: pymatgen Structures, ASE Atoms, OPTIMADE records, or what else `as_crystal` takes.
        models: a bundle or its folder; None = as `bundle.find`.
    Raises:
        FileNotFoundError: no models, or weights are missing.
        ValueError: unknown property, or damaged weights.
    """
    import pandas as pd

    found = models if isinstance(models, Bundle) else bundles.find(models)
    chosen = found.choose(properties)
    rows = [row for rows in predict_entries(_in_memory(structures), found, chosen, device) for row in rows]
    return pd.DataFrame(rows, columns=columns(chosen)).drop(columns="file")


def predict_files(paths: Sequence[str | Path], models: Bundle, properties: Sequence[str] | None = None,
                  device: str = "auto") -> Iterator[Rows]:
    """Rows of the crystals in files and folders, in pieces. Raises: as `predict_structures`, `tabular.entries`."""
    return predict_entries(entries(paths), models, models.choose(properties), device)


def columns(properties: Sequence[Property]) -> list[str]:
    """Columns of a row."""
    own = [name for p in properties for name in (p.name, f"{p.name}_std", f"{p.name}_unit")]
    return [*FACTS, *own, "warnings", "error"]


def predict_entries(crystals: Iterable[Entry], models: Bundle, properties: Sequence[Property],
                    device: str = "auto") -> Iterator[Rows]:
    """Rows for (file, material_id, crystal or error) entries, in pieces of CHUNK."""
    recipes = list(dict.fromkeys(p.recipe for p in properties))
    tokenizers = _Tokenizers(models)
    for piece in _pieces(crystals):
        described = [_Described(*entry, recipes) for entry in piece]
        batches = {recipe: _Strings(described, recipe) for recipe in recipes}
        cache: dict[tuple[Recipe, str], np.ndarray] = {}  # [CLS] vectors by encoder, which heads may share
        for prop in properties:
            values = batches[prop.recipe].predict(models, prop, tokenizers, device, cache)
            for one in described:
                one.take(prop, values)
        yield [one.row(properties) for one in described]


def _in_memory(structures: Iterable[Any]) -> Iterator[Entry]:
    for number, structure in enumerate(structures):
        try:
            yield Path(str(number)), str(number), as_crystal(structure)
        except CrystalError as error:
            yield Path(str(number)), str(number), error


def _pieces(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while piece := list(islice(iterator, CHUNK)):
        yield piece


class _Described:
    """One crystal on its way: its strings, then its predictions."""

    def __init__(self, file: Path, material_id: str, crystal: Any, recipes: Sequence[Recipe]) -> None:
        self.facts = dict.fromkeys(FACTS) | {"file": str(file), "material_id": material_id}
        self.record: SymmetryRecord | None = None
        self.strings: dict[Recipe, str] = {}
        self.values: dict[str, Any] = {}
        self.error: str | None = None
        self.new: dict[str, list[str]] = {}  # what no labelled crystal had -> properties
        try:
            if isinstance(crystal, CrystalError):
                raise crystal
            self._describe(crystal, recipes)
        except CrystalError as error:
            self.error = str(error)

    def _describe(self, crystal: Any, recipes: Sequence[Recipe]) -> None:
        records = {symprec: symmetry_record(crystal, symprec) for symprec in {r.symprec for r in recipes}}
        self.strings = {r: string(records[r.symprec], r.style, r.generators) for r in recipes}
        self.record = records[recipes[0].symprec]
        self.facts |= {"formula_reduced": self.record.formula_reduced, "space_group": self.record.space_group,
                       "string": self.strings[recipes[0]]}

    def take(self, prop: Property, values: dict[str, tuple[float, float] | str]) -> None:
        """The prediction (value, deviation over the models) of this crystal, or why there is none."""
        if self.record is None:
            return
        found = values[self.strings[prop.recipe]]
        if isinstance(found, str):
            self.error = found
            return
        new = novelties(self.record, prop)
        for what in new:
            self.new.setdefault(what, []).append(prop.name)
        std = hypot(found[1], prop.error_68, prop.target_std if new else 0.0)
        self.values |= {prop.name: found[0], f"{prop.name}_std": std, f"{prop.name}_unit": prop.unit}

    def row(self, properties: Sequence[Property]) -> dict[str, Any]:
        """All columns; None where there is nothing."""
        everywhere = len(properties)
        warnings = [f"{what}: in no labelled crystal" + ("" if len(names) == everywhere else
                    f" of {', '.join(names)}") for what, names in self.new.items()]
        return dict.fromkeys(columns(properties)) | self.facts | self.values | {
            "warnings": "; ".join(warnings) or None, "error": self.error}


def novelties(record: SymmetryRecord, prop: Property) -> list[str]:
    """Elements and the space group of a crystal that no labelled crystal of the property had."""
    elements = [] if prop.elements is None else [e for e in record.amounts if e not in prop.elements]
    known_group = prop.space_groups is None or record.space_group in prop.space_groups
    return elements + ([] if known_group else [f"space group {record.space_group}"])


# ------------------------------------------------------------------------------------------------ the models
class _Tokenizers:
    """The tokenizer of each model folder, read once."""

    def __init__(self, models: Bundle) -> None:
        self._models, self._by_version = models, {}

    def of(self, folder: Path) -> Tokenizer:
        version = io.read_json(folder / "cloud.json")["vocab_version"]
        if version not in self._by_version:
            published = version.startswith("published")
            self._by_version[version] = Tokenizer.published() if published else Tokenizer.default()
        return self._by_version[version]


class _Strings:
    """The distinct strings of a piece in one recipe, and what models say to them."""

    def __init__(self, described: Sequence[_Described], recipe: Recipe) -> None:
        self.recipe = recipe
        self.texts = list(dict.fromkeys(one.strings[recipe] for one in described if one.strings))

    def predict(self, models: Bundle, prop: Property, tokenizers: _Tokenizers, device: str,
                cache: dict[tuple[Recipe, str], np.ndarray]) -> dict[str, tuple[float, float] | str]:
        """string -> (mean, standard deviation) over the property's models, or the reason why not."""
        from cloud_lib import predict

        first = models.folder / prop.members[0].encoder
        if not self.texts:
            return {}
        packed, kept, reasons = self.packed(tokenizers.of(first), _max_positions(first))
        if not kept:
            return reasons
        for member in prop.members:
            if (self.recipe, member.encoder) not in cache:
                cache[self.recipe, member.encoder] = predict.embeddings(models.path(member.encoder), packed, device)
        each = np.stack([predict.apply_head(models.path(m.head), cache[self.recipe, m.encoder], prop.name)
                         for m in prop.members])
        return reasons | dict(zip(kept, zip(each.mean(0).tolist(), each.std(0).tolist())))

    def packed(self, tokenizer: Tokenizer, max_positions: int) -> tuple[PackedTokens | None, list[str], dict[str, str]]:
        """The strings that fit the model, packed, and the reasons why the others do not."""
        kept, ids, reasons = [], [], {}
        for text in self.texts:
            try:
                found = tokenizer.encode(text)
            except UnknownTokenError as error:
                reasons[text] = str(error)
                continue
            if len(found) > max_positions:
                reasons[text] = f"string of {len(found)} tokens: the model takes {max_positions}"
                continue
            kept.append(text)
            ids.append(found)
        if not kept:
            return None, kept, reasons
        offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
        meta = {"vocab_sha256": tokenizer.sha256, "style": self.recipe.style}
        return PackedTokens(Path("strings"), np.concatenate(ids).astype(np.uint16), offsets, meta), kept, reasons


def _max_positions(folder: Path) -> int:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"expected a model in {folder}, found no config.json; fetch the models again")
    return io.read_json(folder / "config.json")["max_position_embeddings"]


# ----------------------------------------------------------------------------------------------- embeddings
def embed_structures(structures: Iterable[Any], models: str | Path | Bundle | None = None,
                     device: str = "auto") -> np.ndarray:
    """[CLS] vectors of the pre-trained encoder, float32 (n, width); NaN where a crystal has no string.

    Arguments and errors as `predict_structures`.
    """
    found = models if isinstance(models, Bundle) else bundles.find(models)
    rows = [row for rows in embed_entries(_in_memory(structures), found, device) for row in rows]
    width = next((len(row["embedding"]) for row in rows if row["embedding"] is not None), 0)
    return np.array([np.full(width, np.nan) if row["embedding"] is None else row["embedding"] for row in rows],
                    np.float32).reshape(len(rows), width)


def embed_entries(crystals: Iterable[Entry], models: Bundle, device: str = "auto") -> Iterator[Rows]:
    """Rows with file, material_id, formula_reduced, space_group, string, embedding (list of floats), error.

    Raises:
        FileNotFoundError: the models come without a pre-trained encoder.
    """
    from cloud_lib import predict

    if models.encoder is None:
        raise FileNotFoundError(f"expected a pre-trained encoder in {models.folder / 'encoder'}, found none; run make "
                                "pretraining, or name another folder")
    recipe, folder = models.encoder_recipe, models.path(models.encoder)
    tokenizer = _Tokenizers(models).of(folder)
    for piece in _pieces(crystals):
        described = [_Described(*entry, [recipe]) for entry in piece]
        packed, kept, reasons = _Strings(described, recipe).packed(tokenizer, _max_positions(folder))
        vectors = dict(zip(kept, predict.embeddings(folder, packed, device))) if kept else {}
        yield [_embedded(one, recipe, vectors, reasons) for one in described]


def _embedded(one: _Described, recipe: Recipe, vectors: dict[str, np.ndarray], reasons: dict[str, str]) -> dict:
    text = one.strings.get(recipe)
    vector = vectors.get(text)
    return one.facts | {"embedding": None if vector is None else vector.tolist(),
                        "error": one.error or reasons.get(text)}
