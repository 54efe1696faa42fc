"""A tiny folder in the layout of the real data, written in a second without any download.

The crystals are real (pymatgen's AFLOW prototypes); every label and every "published" number is SYNTHETIC: a
smooth function of composition and volume plus noise, so that a model has something to learn and no number can
be mistaken for a result. It feeds the smoke profile and the tests. The same call writes the same bytes.
"""

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from cloud_lib import io
from cloud_lib.sources import embedded, matbench, records, unconvbench

N_TASK_ROWS = 60
N_TEST = 80  # WBM-like candidates; the other crystals have energies to train on
N_DUPLICATES = 40
MAX_SITES = 60
MODELS = {"coNGN": 0.15, "ALIGNN": 0.18, "DeeperGATGNN": 0.2, "AMMExpress_v2020": 0.3, "CGCNN_v2019": 0.35,
          "CrabNet": 0.4, "Finder_v1.2_composition": 0.4, "RF": 0.5}  # error in units of the target's spread
DISCOVERY_MODELS = {"alignn": 0.03, "megnet": 0.06, "voronoi_rf": 0.15}  # error [eV/atom]
CURVES = {"alignn": ("ALIGNN", 4.0), "megnet": ("MEGNet", 3.0), "wrenformer": ("Wrenformer", 2.6),
          "voronoi-rf": ("Voronoi RF", 1.6)}  # label, exponent of the made-up tpr = 1 - (1 - fpr)^exponent
NOTICE = """SYNTHETIC DATA

The crystals in this folder are the 288 AFLOW prototypes that pymatgen ships (Mehl et al., Comput. Mater. Sci.
136, S1, 2017). All labels, energies, predictions and curves are made up by cloud_lib.sources.miniature, for
tests and for the smoke profile. The file names are those of the real data so that the same code reads them;
the identifiers are not. No number computed from this folder is a result.
"""


@dataclass(frozen=True)
class Material:
    """One crystal: identifier, slim structure, volume [A^3] and three smooth features of order one (3,)."""

    material_id: str
    structure: dict
    volume: float
    features: np.ndarray

    @property
    def n_sites(self) -> int:
        return len(self.structure["sites"])


def write_miniature(folder: str | Path) -> Path:
    """Write the folder, replacing an earlier one; returns it."""
    materials = [material for material in _materials() if material.n_sites <= MAX_SITES]
    with io.atomic_path(folder) as temporary:
        _write_corpus(temporary / "corpus", materials)
        _write_matbench(temporary / "matbench", materials)
        _write_discovery(temporary / "discovery", materials)
        _write_unconvbench(temporary / "unconvbench", materials)
        (temporary / "SYNTHETIC.txt").write_text(NOTICE, encoding="utf-8")
    return Path(folder)


# --------------------------------------------------------------------------------------- crystals, features
def _materials() -> list[Material]:
    found = []
    for number, (_, structure) in enumerate(embedded.prototypes()):
        rounded = _rounded(structure)
        volume = abs(float(np.linalg.det(rounded["lattice"]["matrix"])))
        found.append(Material(f"aflow-{number:03d}", rounded, volume, _features(rounded, volume)))
    return found


def _rounded(structure: dict) -> dict:
    """Six decimals, as in the prepared files; also makes the bytes independent of a platform's last digit."""
    sites = structure["sites"]
    return records.slim_structure(np.round(structure["lattice"]["matrix"], 6) + 0.0,
                                  [site["species"][0]["element"] for site in sites],
                                  np.round([site["abc"] for site in sites], 6) + 0.0)


def _features(structure: dict, volume: float) -> np.ndarray:
    """Mean group and period of the elements and the logarithm of volume per atom, each of order one: (3,)."""
    from pymatgen.core.periodic_table import Element

    counts = records.elements(structure)
    amounts = np.array(list(counts.values()), float) / counts.total()
    group, period = amounts @ np.array([(Element(name).group, Element(name).row) for name in counts], float)
    return np.array([group / 5 - 2, period - 3.5, 2 * np.log(volume / counts.total() / 18)])


def _target(task: str, x: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Synthetic label (n,) in the task's unit and usual range, from features (n, 3) and noise (n,)."""
    group, period, size = x.T + 0.05 * noise
    values = {"jdft2d": 80 * np.exp(0.5 * group - 0.3 * period),
              "phonons": 400 * np.exp(0.3 * group - 0.4 * size),
              "dielectric": 1 + 1.5 * np.exp(0.3 * size + 0.3 * period),
              "log_gvrh": 1.5 - 0.2 * group - 0.3 * size, "log_kvrh": 1.9 - 0.1 * period - 0.3 * size,
              "perovskites": 1.4 + 0.2 * period - 0.5 * group,
              "mp_gap": np.maximum(0, 1.2 + 0.8 * group - 0.5 * period),
              "mp_e_form": -1.2 - 0.8 * group + 0.3 * period,
              "supercon": 5 * np.exp(0.4 * period - 0.4 * group), "defected": 3 + 0.5 * group - 0.5 * period}
    return np.round(values[task], 6)


def _sample(materials: Sequence[Material], n: int, rng: np.random.Generator) -> list[Material]:
    return [materials[i] for i in np.sort(rng.choice(len(materials), n, replace=False))]


def _label(task: str, materials: Sequence[Material], rng: np.random.Generator) -> np.ndarray:
    return _target(task, np.stack([m.features for m in materials]), rng.standard_normal(len(materials)))


# ------------------------------------------------------------------------------------------- the four folders
def _write_corpus(folder: Path, materials: Sequence[Material]) -> None:
    """Three files: all crystals; some again in a larger cell (duplicates); three that no program can use."""
    larger = [replace(m, material_id=f"duplicate-{m.material_id}", structure=_scaled(m.structure, 1.02))
              for m in materials[:N_DUPLICATES]]
    _write_optimade(folder / "materials_project.jsonl.gz", materials, "AFLOW prototypes in another's place")
    _write_optimade(folder / "duplicates.jsonl.gz", larger, "the same crystals in cells 2 % larger")
    _write_optimade(folder / "unusable.jsonl.gz", _unusable(materials[0]), "crystals that become rejects")


def _scaled(structure: dict, factor: float) -> dict:
    matrix = np.round(np.array(structure["lattice"]["matrix"]) * factor, 6)
    return {**structure, "lattice": {"matrix": matrix.tolist()}}


def _unusable(material: Material) -> list[Material]:
    sites = material.structure["sites"]
    bad = {"overlapping": material.structure | {"sites": [sites[0], *sites]},
           "without-volume": material.structure | {"lattice": {"matrix": [[0.0] * 3] * 3}},
           "without-atoms": material.structure | {"sites": []}}
    return [replace(material, material_id=f"unusable-{name}", structure=structure)
            for name, structure in bad.items()]


def _write_matbench(folder: Path, materials: Sequence[Material]) -> None:
    folds = records.kfold(N_TASK_ROWS, matbench.FOLD_SEED)
    predictions: dict[str, dict] = {model: {} for model in (*MODELS, "Dummy")}
    for seed, task in enumerate(matbench.TASKS):
        rng = np.random.default_rng(seed)
        chosen = _sample(materials, N_TASK_ROWS, rng)
        target = _label(task, chosen, rng)
        columns = ["structure", matbench.TASKS[task].target_column]
        _write_split(folder / f"matbench_{task}.json.gz", columns,
                     zip((m.structure for m in chosen), target.tolist()))
        for model, values in _published(target, folds, rng).items():
            predictions[model][task] = values
    _write_json(folder / "folds.json.gz",
                dict.fromkeys(matbench.TASKS, [np.flatnonzero(folds == k).tolist() for k in range(5)]))
    for model, tasks in predictions.items():
        _write_json(folder / "leaderboard" / f"{model}.json.gz",
                    {task: dict(enumerate(values.tolist())) for task, (values, _) in tasks.items()}
                    | {"published_mae": {task: score for task, (_, score) in tasks.items()}})


def _published(target: np.ndarray, folds: np.ndarray, rng: np.random.Generator) -> dict[str, tuple]:
    """Made-up predictions and their fold errors by model; "Dummy" is the mean of the training folds."""
    found = {model: target + error * target.std() * rng.standard_normal(len(target))
             for model, error in MODELS.items()}
    found["Dummy"] = np.array([target[folds != fold].mean() for fold in folds])
    scores = {}
    for model, values in found.items():
        values = np.round(values, 6)
        mae = [float(np.abs(values - target)[folds == fold].mean()) for fold in range(5)]
        scores[model] = values, {"fold_mae": mae, "mean": float(np.mean(mae)), "std": float(np.std(mae))}
    return scores


def _write_discovery(folder: Path, materials: Sequence[Material]) -> None:
    rng = np.random.default_rng(100)
    is_test = np.zeros(len(materials), bool)
    is_test[rng.choice(len(materials), N_TEST, replace=False)] = True
    energy = _label("mp_e_form", materials, rng)
    train = [(m.material_id, records.formula(m.structure), e, "synthetic")
             for m, e, test in zip(materials, energy, is_test) if not test]
    header = "material_id,formula_pretty,formation_energy_per_atom,source"
    _write_csv(folder / "mp_energies.csv.gz", header, train)
    test = [m for m, chosen in zip(materials, is_test) if chosen]
    e_form = energy[is_test]
    e_hull = np.round(rng.gamma(2.0, 0.06, N_TEST) - 0.05, 6)  # about one in five is stable
    _write_summary(folder / "wbm_summary.csv.gz", test, e_form, e_hull)
    _write_lines(folder / "wbm_structures.jsonl.gz",
                 [{"material_id": _test_id(i), "structure": m.structure} for i, m in enumerate(test)])
    for model, error in DISCOVERY_MODELS.items():
        predicted = np.round(e_form + error * rng.standard_normal(N_TEST), 4).tolist()
        _write_csv(folder / "preds" / f"{model}.csv.gz", "material_id,e_form_per_atom",
                   [(_test_id(i), "" if i == N_TEST - 1 else value) for i, value in enumerate(predicted)])
    _write_curves(folder / "roc-models.jsonl")


def _test_id(number: int) -> str:
    return f"wbm-0-{number + 1}"


def _write_summary(path: Path, test: Sequence[Material], e_form: np.ndarray, e_hull: np.ndarray) -> None:
    header = ("material_id,formula,n_sites,volume,e_form_per_atom_wbm,e_form_per_atom_mp2020_corrected,"
              "e_above_hull_mp2020_corrected_ppd_mp,bandgap_pbe,unique_prototype,note")
    rows = [(_test_id(i), records.formula(m.structure), m.n_sites, round(m.volume, 4), e, e, hull, 0.0,
             i % 8 != 0, "synthetic") for i, (m, e, hull) in enumerate(zip(test, e_form, e_hull))]
    _write_csv(path, header, rows)


def _write_curves(path: Path) -> None:
    fpr = np.linspace(0, 1, 21)
    lines = []
    for key, (label, exponent) in CURVES.items():
        tpr = 1 - (1 - fpr) ** exponent
        lines.append({"key": key, "label": label, "auc": round(float(np.trapezoid(tpr, fpr)), 2),
                      "fpr": fpr.round(5).tolist(), "tpr": tpr.round(5).tolist()})
    _write_lines(path, lines)


def _write_unconvbench(folder: Path, materials: Sequence[Material]) -> None:
    rng = np.random.default_rng(200)
    chosen = _sample(materials, N_TASK_ROWS, rng)
    columns = ["structure", unconvbench.TASKS["supercon"].target_column, "jid"]
    _write_split(folder / "supercon.json.gz", columns,
                 zip((m.structure for m in chosen), _label("supercon", chosen, rng).tolist(),
                     (m.material_id for m in chosen)))
    chosen = _sample([m for m in materials if m.n_sites > 3], N_TASK_ROWS, rng)
    columns = ["structure", unconvbench.TASKS["defected"].target_column, "bulk_structure", "jid"]
    vacancies = (m.structure | {"sites": m.structure["sites"][1:]} for m in chosen)
    _write_split(folder / "defected.json.gz", columns,
                 zip(vacancies, _label("defected", chosen, rng).tolist(), (m.structure for m in chosen),
                     (m.material_id for m in chosen)))


# ----------------------------------------------------------------------------------------------- file formats
def _write(path: Path, content: bytes) -> None:
    """Write bytes, compressed if the name says so, without a time stamp in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _write_json(path: Path, document: Any) -> None:
    _write(path, orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS))


def _write_lines(path: Path, documents: Iterable[Any]) -> None:
    _write(path, b"".join(orjson.dumps(document) + b"\n" for document in documents))


def _write_csv(path: Path, header: str, rows: Iterable[Sequence]) -> None:
    _write(path, "\n".join([header, *(",".join(map(str, row)) for row in rows), ""]).encode())


def _write_split(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """pandas `orient="split"`, as MatBench publishes its tasks."""
    data = [list(row) for row in rows]
    _write_json(path, {"index": list(range(len(data))), "columns": list(columns), "data": data})


def _write_optimade(path: Path, materials: Sequence[Material], description: str) -> None:
    head = [{"x-optimade": {"meta": {"api_version": "1.1.0"}}},
            {"type": "info", "id": "structures", "description": description, "properties": {},
             "formats": ["json"], "output_fields_by_format": {"json": []}}]
    _write_lines(path, head + [_optimade(m.material_id, m.structure) for m in materials])


def _optimade(material_id: str, structure: dict) -> dict:
    """An OPTIMADE 1.1 entry of an ordered crystal."""
    counts = dict(sorted(records.elements(structure).items()))
    n = len(structure["sites"])
    divisor = reduce(gcd, counts.values(), 0) or 1
    matrix = structure["lattice"]["matrix"]
    fractions = np.array([site["abc"] for site in structure["sites"]]).reshape(-1, 3)
    attributes = {
        "elements": list(counts), "nelements": len(counts),
        "elements_ratios": [k / n for k in counts.values()],
        "chemical_formula_descriptive": _formula(counts.items()),
        "chemical_formula_reduced": _formula((name, k // divisor) for name, k in counts.items()),
        "chemical_formula_anonymous": _formula(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", sorted(
            (k // divisor for k in counts.values()), reverse=True))),
        "dimension_types": [1, 1, 1], "nperiodic_dimensions": 3, "lattice_vectors": matrix,
        "cartesian_site_positions": np.round(fractions @ np.array(matrix), 5).tolist(), "nsites": n,
        "species": [{"name": name, "chemical_symbols": [name], "concentration": [1.0]} for name in counts],
        "species_at_sites": [site["species"][0]["element"] for site in structure["sites"]],
        "structure_features": [], "last_modified": "2026-01-01T00:00:00Z", "immutable_id": material_id}
    return {"type": "structures", "id": material_id, "attributes": attributes}


def _formula(amounts: Iterable[tuple[str, int]]) -> str:
    return "".join(f"{name}{k if k > 1 else ''}" for name, k in amounts)
