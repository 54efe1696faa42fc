"""Stable-crystal discovery: formation energies to learn from, candidates with DFT hull distances to find.

With raw_dir()/discovery: Materials Project for training, WBM for testing, in the official column names of
Matbench Discovery (Riebesell et al., Nat. Mach. Intell. 7, 836, 2025); the full official files and smaller
prepared ones are read alike. Without: the embedded flla_2015 table, split by formula. Energies in eV/atom.
"""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cloud_lib import io
from cloud_lib.sources import NotAvailable, embedded, records

if TYPE_CHECKING:
    import pandas as pd

E_FORM = "e_form_per_atom_mp2020_corrected"
E_HULL = "e_above_hull_mp2020_corrected_ppd_mp"
CURVE_COLUMNS = ["key", "label", "auc", "fpr", "tpr"]
PREDICTION_COLUMNS = ["material_id", "model", "e_form_per_atom_pred"]
TEST_SHARE = 5  # one formula in five of the embedded table is for testing


def folder() -> Path | None:
    """raw_dir()/discovery if it has the WBM summary, else None (then the embedded table is used)."""
    path = io.raw_dir() / "discovery"
    return path if (path / "wbm_summary.csv.gz").is_file() else None


def _need(name: str, hint: str = "") -> Path:
    path = io.raw_dir() / name
    if not path.is_file():
        raise NotAvailable(f"expected {path}, found no file; run python -m cloud_lib data {name}{hint}")
    return path


# ------------------------------------------------------------------------------------------- training set
def load_train(limit: int | None = None, seed: int = 0) -> "pd.DataFrame":
    """[material_id, structure, e_form_per_atom_dft] of crystals that the test set does not contain.

    Args:
        limit: at most this many rows, drawn with `seed` from the sorted ids; None = all.
    Raises:
        NotAvailable: energies or structures are not on this machine.
        ValueError: no energy has a structure.
    """
    if folder() is None:
        return _sample(_embedded(test=False).drop(columns=["formula", "e_above_hull_dft"]), limit, seed)
    columns = ["material_id", "formation_energy_per_atom"]
    energies = records.read_csv(_need("discovery/mp_energies.csv.gz"), columns)
    energies = energies.dropna(subset="formation_energy_per_atom").drop_duplicates("material_id")
    return _training_table(_sample(energies, limit, seed))


def _sample(table: "pd.DataFrame", limit: int | None, seed: int) -> "pd.DataFrame":
    table = table.sort_values("material_id", ignore_index=True)
    if limit is None or limit >= len(table):
        return table
    chosen = np.sort(np.random.default_rng(seed).choice(len(table), limit, replace=False))
    sample = table.iloc[chosen].reset_index(drop=True)
    sample.attrs = table.attrs | {"rows": limit}
    return sample


def _training_table(energies: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    value = dict(zip(energies["material_id"], energies["formation_energy_per_atom"], strict=True))
    rows = [(name, structure, value[name]) for name, structure in _training_structures(value.keys())]
    if not rows:
        raise ValueError(f"expected structures of the {len(value)} materials with an energy, e.g. "
                         f"{list(value)[:3]}, found none; the files in {io.raw_dir()} do not belong together")
    table = pd.DataFrame(rows, columns=["material_id", "structure", "e_form_per_atom_dft"])
    table.attrs = {"source": "Materials Project", "rows": len(table), "rows_with_energy": len(value)}
    return table


def _training_structures(wanted: Collection[str]) -> Iterator[tuple[str, dict]]:
    """Structures of these Materials Project ids: from the corpus, else from the official entries."""
    entries = io.raw_dir() / "discovery" / "mp_computed_structure_entries.json.gz"
    corpus = io.raw_dir() / "corpus" / "materials_project.jsonl.gz"
    if not corpus.is_file() and entries.is_file():
        document = records.read_json(entries)
        for key, name in document["material_id"].items():
            if name in wanted:
                yield name, document["entry"][key]["structure"]
        return
    _need("corpus/materials_project.jsonl.gz", ", or of discovery/mp_computed_structure_entries.json.gz")
    for record in records.read_json_lines(corpus):
        if record.get("type") == "structures" and record["id"] in wanted:
            yield record["id"], record


# ----------------------------------------------------------------------------------------------- test set
def load_test() -> "pd.DataFrame":
    """[material_id, structure, formula, e_form_per_atom_dft, e_above_hull_dft, (unique_prototype, note)].

    Raises:
        NotAvailable: the structures are not on this machine.
        ValueError: columns are missing, ids repeat, or rows have no structure.
    """
    if folder() is None:
        return _embedded(test=True)
    import pandas as pd

    summary = records.read_csv(folder() / "wbm_summary.csv.gz", ["material_id", "formula", E_FORM, E_HULL])
    structures = dict(_test_structures())
    absent = summary.loc[~summary["material_id"].isin(structures.keys()), "material_id"].tolist()
    if absent or not summary["material_id"].is_unique:
        repeated = summary["material_id"].duplicated().sum()
        raise ValueError(f"expected one structure for each of the {len(summary)} rows of wbm_summary.csv.gz, "
                         f"found {len(absent)} without, e.g. {absent[:3]}, and {repeated} repeated ids; "
                         "delete discovery/wbm_* and run make data")
    table = pd.DataFrame({"material_id": summary["material_id"],
                          "structure": [structures[name] for name in summary["material_id"]],
                          "formula": summary["formula"], "e_form_per_atom_dft": summary[E_FORM],
                          "e_above_hull_dft": summary[E_HULL]})
    for optional in ("unique_prototype", "note"):
        if optional in summary:
            table[optional] = summary[optional]
    table.attrs = {"source": "WBM", "rows": len(table), "rows_official": 256963}
    return table


def _test_structures() -> Iterator[tuple[str, dict]]:
    """(id, structure): "structure" in prepared files, "initial_structure" in the official one."""
    for record in records.read_json_lines(_need("discovery/wbm_structures.jsonl.gz")):
        yield record["material_id"], record.get("structure") or record["initial_structure"]


def _embedded(test: bool) -> "pd.DataFrame":
    """flla_2015, one formula in five for testing: chosen by the formula's hash, whatever the order."""
    table = embedded.matminer_table("flla_2015")
    table["formula"] = table["structure"].map(records.formula)
    digests = [hashlib.sha256(name.encode()).digest() for name in table["formula"]]
    in_test = np.array([digest[0] % TEST_SHARE == 0 for digest in digests])
    table = table[in_test == test].rename(columns={"formation_energy_per_atom": "e_form_per_atom_dft",
                                                   "e_above_hull": "e_above_hull_dft"})
    columns = ["material_id", "structure", "formula", "e_form_per_atom_dft", "e_above_hull_dft"]
    table = table[columns].reset_index(drop=True)
    table.attrs = {"source": "flla_2015, split by formula", "rows": len(table)}
    return table


# --------------------------------------------------------------------------------------- published results
def load_published_predictions() -> "pd.DataFrame":
    """Published predictions of the test rows: [material_id, model, e_form_per_atom_pred]; NaN = none.

    Empty (same columns) where raw_dir() has no discovery/preds/.
    """
    import pandas as pd

    parts = []
    for file in sorted((io.raw_dir() / "discovery" / "preds").glob("*.csv.gz")):
        table = records.read_csv(file, ["material_id"])
        column = next((name for name in table if name.startswith("e_form_per_atom")), None)
        if column is None:
            raise ValueError(f"{file}: expected a column e_form_per_atom, found {list(table)}")
        parts.append(pd.DataFrame({"material_id": table["material_id"],
                                   "model": file.name.removesuffix(".csv.gz"),
                                   "e_form_per_atom_pred": table[column].astype(float)}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=PREDICTION_COLUMNS)


def load_published_curves() -> "pd.DataFrame":
    """Published ROC curves on all WBM rows: [key, label, auc, fpr, tpr], the last two as arrays.

    Empty (same columns) where raw_dir() has no discovery/roc-models.jsonl.
    """
    import pandas as pd

    file = io.raw_dir() / "discovery" / "roc-models.jsonl"
    rows = [{**curve, "fpr": np.array(curve["fpr"]), "tpr": np.array(curve["tpr"])}
            for curve in (records.read_json_lines(file) if file.is_file() else ())]
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)
