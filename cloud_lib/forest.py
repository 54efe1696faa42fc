"""Random forest on the composition alone: what a table of elements knows about a property without symmetry.

The features of a reduced formula are the atomic fraction of every element, and of each property in PROPERTIES the
fraction-weighted mean, the mean absolute deviation from it, the smallest and the largest value and their difference
(five of Magpie's six statistics; Ward et al., npj Comput. Mater. 2, 16028 (2016)). The values are pymatgen's table
of elements, not Magpie's; where it has none, the mean over the elements that have one stands in.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestRegressor

from cloud_lib.elements import NUMBERS

NAME = "random forest"
PROPERTIES = {  # name -> key in pymatgen's table and unit, or how it is derived
    "Z": "atomic number", "row": "period of the table", "group": "1 to 18; f block 3",
    "mendeleev": "Mendeleev no", "mass": "Atomic mass [u]", "x": "X, Pauling's electronegativity",
    "radius": "Atomic radius [angstrom]", "vdw_radius": "Van der waals radius [angstrom]",
    "ionization": "first of Ionization energies [eV]", "affinity": "Electron affinity [eV]",
    "melting": "Melting point [K]", "molar_volume": "Molar volume [cm3]",
    "s": "s electrons outside the noble-gas core", "p": "likewise p", "d": "likewise d", "f": "likewise f",
}
COLUMNS = ["model", "task", "fold", "seed", "split", "material_id", "row", "target", "prediction"]
STATISTICS = ("mean", "mad", "min", "max", "range")
_TOKEN = re.compile(r"([A-Z][a-z]?)([0-9.]*)")


def forest(tables: Mapping[str, Path], style: str, folds: Sequence[int], seed: int = 0, n_trees: int = 300,
           n_jobs: int = 2) -> pd.DataFrame:
    """Test predictions of a forest per task and fold, trained on all rows outside the fold.

    Nothing is tuned, so no rows are held out for validation. Settings: a third of the features at each split, all
    else scikit-learn's defaults; the result does not depend on `n_jobs`.

    Args:
        tables: task -> its table with formula_reduced, fold, row, target (made by `curation.prepare_task`).
        style: only rows that have a string of this style, so that models are compared on the same rows.
        n_jobs: threads.
    Returns:
        The long table of `experiments` with model "random forest", targets in the task's unit.
    Raises:
        ValueError: a fold that a task does not have.
    """
    found = []
    for task, path in tables.items():
        table = pd.read_parquet(path).dropna(subset=[style])
        if missing := sorted(set(folds) - set(table["fold"])):
            raise ValueError(f"expected folds of {sorted(set(table['fold']))} for {task}, found {missing}; correct the "
                             "parameter")
        values, target = features(table["formula_reduced"]), table["target"].to_numpy()
        for fold in folds:
            test = (table["fold"] == fold).to_numpy()
            trees = RandomForestRegressor(n_trees, max_features=1 / 3, n_jobs=n_jobs, random_state=seed)
            trees.fit(values[~test], target[~test])
            trees.set_params(n_jobs=1)  # several threads add up the trees' predictions in any order
            found.append(table.loc[test, ["material_id", "row", "target"]].assign(
                model=NAME, task=task, fold=fold, seed=seed, split="test", prediction=trees.predict(values[test])))
    return pd.concat([pd.DataFrame(columns=COLUMNS), *found], ignore_index=True)[COLUMNS]


def features(formulas: Iterable[str]) -> np.ndarray:
    """Features of reduced formulas such as BaTiO3, float32 (n, n_elements + 5 n_properties).

    Columns: fractions by atomic number (deuterium counts as hydrogen), then STATISTICS of each of PROPERTIES.
    Raises:
        ValueError: an element that the table does not have (above 103).
    """
    values = element_properties()
    found = []
    for formula in formulas:
        fractions = _fractions(formula, len(values))
        present = np.flatnonzero(fractions)
        share, rows = fractions[present, None], values[present]
        mean = (share * rows).sum(axis=0)
        low, high = rows.min(axis=0), rows.max(axis=0)
        found.append(np.concatenate([fractions, mean, (share * np.abs(rows - mean)).sum(axis=0), low, high, high - low]))
    return np.array(found, dtype=np.float32)


def _fractions(formula: str, n: int) -> np.ndarray:
    """Atomic fraction of elements 1 to n."""
    amounts = np.zeros(n)
    for symbol, amount in _TOKEN.findall(formula):
        number = 1 if symbol == "D" else NUMBERS.get(symbol, 0)
        if not 0 < number <= n:
            raise ValueError(f"expected elements up to number {n} in a formula, found {symbol!r} in {formula!r}; "
                             "leave the crystal out")
        amounts[number - 1] += float(amount or 1)
    return amounts / amounts.sum()


@cache
def element_properties() -> np.ndarray:
    """PROPERTIES of elements 1 to 103, float64 (103, n_properties); never NaN."""
    from pymatgen.core import Element

    values = np.array([_properties(Element.from_Z(z)) for z in range(1, 104)], dtype=float)
    return np.where(np.isnan(values), np.nanmean(values, axis=0), values)


def _properties(element) -> list[float]:
    data = element.data
    keys = ("Mendeleev no", "Atomic mass", "X", "Atomic radius", "Van der waals radius")
    valence = _valence(element.electronic_structure)
    first = (data.get("Ionization energies") or [np.nan])[0]
    rest = [data.get(key) for key in ("Electron affinity", "Melting point", "Molar volume")]
    found = [element.Z, element.row, element.group, *map(data.get, keys), first, *rest, *valence]
    return [float(value) if isinstance(value, int | float) else np.nan for value in found]


def _valence(structure: str) -> list[int]:
    """s, p, d and f electrons in "[Ar].3d6.4s2": 2, 0, 6, 0."""
    shells = re.findall(r"\d([spdf])(\d+)", re.sub(r"\[\w+\]", "", structure))
    return [sum(int(n) for kind, n in shells if kind == letter) for letter in "spdf"]
