"""Readers of all data files: real formats, official folds, and what is said about missing or damaged ones."""

import gzip
import json
import pickle
import sqlite3

import numpy as np
import pytest

from cloud_lib import cli, curation, io, sources
from cloud_lib.sources import (DamagedFile, NotAvailable, discovery, embedded, matbench, minerals,
                               records, unconvbench)
from cloud_lib.sources.miniature import write_miniature

ROCK_SALT = {"lattice": {"matrix": [[4.2, 0, 0], [0, 4.2, 0], [0, 0, 4.2]]},
             "sites": [{"species": [{"element": "Mg", "occu": 1}], "abc": [0, 0, 0]},
                       {"species": [{"element": "O", "occu": 1}], "abc": [0.5, 0.5, 0.5]}]}


def write(path, document):
    """JSON, compressed if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(document).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_task(task, index=(0, 1, 2, 3, 4), column=None, values=(1.0, 2.0, 3.0, 4.0, 5.0)):
    columns = ["structure", column or matbench.TASKS[task].target_column]
    return write(io.raw_dir() / "matbench" / f"matbench_{task}.json.gz",
                 {"index": list(index), "columns": columns, "data": [[ROCK_SALT, value] for value in values]})


# ------------------------------------------------------------------------------------------------ miniature
def test_miniature_is_deterministic_and_says_what_it_is(miniature, tmp_path):
    again = write_miniature(tmp_path / "again")
    files = sorted(path.relative_to(miniature) for path in miniature.rglob("*") if path.is_file())
    assert len(files) > 25
    assert all((again / name).read_bytes() == (miniature / name).read_bytes() for name in files)
    assert "made up" in (miniature / "SYNTHETIC.txt").read_text()


def test_miniature_command(empty_root, capsys):
    assert cli.main(["miniature", str(empty_root / "data" / "miniature")]) == 0
    assert "synthetic" in capsys.readouterr().out


def test_every_task_of_the_miniature_loads_and_can_be_learnt(miniature_root):
    assert sources.is_synthetic()
    for task in (*matbench.TASKS, "supercon", "defected"):
        table = sources.load_task(task)
        assert list(table) == ["material_id", "structure", "target", "fold", "row"]
        assert len(table) == 60 == table.attrs["rows"] and table["material_id"].is_unique
        assert sorted(table["fold"].value_counts()) == [12] * 5
        features = np.stack([_composition_features(structure) for structure in table["structure"]])
        target, fold = table["target"].to_numpy(), table["fold"].to_numpy()
        assert np.corrcoef(_least_squares_out_of_fold(features, target, fold), target)[0, 1] > 0.8, task


def _composition_features(structure):
    from pymatgen.core.periodic_table import Element

    counts = records.elements(structure)
    rows = np.array([[Element(name).group, Element(name).row] for name in counts], float)
    volume = np.log(abs(np.linalg.det(structure["lattice"]["matrix"])) / counts.total())
    return np.array([1, *(np.array(list(counts.values())) / counts.total() @ rows), volume])


def _least_squares_out_of_fold(features, target, fold):
    prediction = np.empty(len(target))
    for k in range(5):
        coefficients = np.linalg.lstsq(features[fold != k], target[fold != k])[0]
        prediction[fold == k] = features[fold == k] @ coefficients
    return prediction


def test_miniature_crystals_have_the_symmetry_that_their_prototype_names(miniature_root):
    from cloud_lib.symmetry import CrystalError, as_crystal, symmetry_record

    found, rejected = set(), []
    for record in [r for file in sources.corpus_files() for r in records.read_json_lines(file)
                   if r.get("type") == "structures"]:
        try:
            found.add(symmetry_record(as_crystal(record)).space_group)
        except CrystalError:
            rejected.append(record["id"])
    assert len(found) > 90
    assert rejected == ["unusable-overlapping", "unusable-without-volume", "unusable-without-atoms"]


def test_miniature_leaderboard_scores_belong_to_its_predictions(miniature_root):
    predictions, scores = matbench.load_leaderboard(["dielectric"]), matbench.load_published_mae()
    assert set(scores["model"]) == set(predictions["model"]) and "Dummy" in set(scores["model"])
    table = sources.load_task("dielectric")
    for model, rows in predictions.groupby("model", observed=True):
        error = (rows.set_index("row")["prediction"].loc[table["row"]].to_numpy() - table["target"]).abs()
        published = scores[(scores["model"] == model) & (scores["task"] == "dielectric")].iloc[0]
        assert error.groupby(table["fold"]).mean().to_numpy() == pytest.approx(published["fold_mae"])
        assert published["mae"] == pytest.approx(np.mean(published["fold_mae"]))


# ------------------------------------------------------------------------------------------------- MatBench
def test_partial_files_keep_their_official_rows_and_folds(empty_root):
    write_task("log_gvrh", index=[0, 2, 5, 10986, 7])
    table = matbench.load("log_gvrh")
    assert table["row"].tolist() == [0, 2, 5, 10986, 7]
    assert table["material_id"].tolist()[3] == "mb-log_gvrh-10987"
    folds = records.kfold(10987, 18012019)
    assert table["fold"].tolist() == folds[table["row"]].tolist()
    assert table.attrs == {"task": "log_gvrh", "unit": "log10(GPa)", "rows": 5, "rows_official": 10987,
                           "folds": "official", "source": "matbench_log_gvrh.json.gz"}


def test_official_names_as_index(empty_root):
    write_task("phonons", index=[f"mb-phonons-{i:04d}" for i in (1, 2, 3, 4, 1265)])
    table = matbench.load("phonons")
    assert table["row"].tolist() == [0, 1, 2, 3, 1264] and table["material_id"][4] == "mb-phonons-1265"


def test_matbench_bad_input(empty_root):
    with pytest.raises(ValueError, match="expected a MatBench task of .* found 'steel'"):
        matbench.load("steel")
    with pytest.raises(ValueError, match="expected a task of .* found 'steel'"):
        sources.load_task("steel")
    with pytest.raises(NotAvailable, match=r"'jdft2d' in .*found no file; run python -m cloud_lib data 'mat"):
        sources.load_task("jdft2d")
    write_task("jdft2d", index=[0, 1, 2, 3, 3])
    with pytest.raises(ValueError, match="expected distinct row numbers 0 to 635, found 5 rows from 0 to 3"):
        matbench.load("jdft2d")
    write_task("jdft2d", index=[0, 1, 2, 3, 636])
    with pytest.raises(ValueError, match="from 0 to 636"):
        matbench.load("jdft2d")
    write_task("jdft2d", column="energy")
    with pytest.raises(ValueError, match=r"the column 'exfoliation_en', found \['structure', 'energy'\]"):
        matbench.load("jdft2d")
    write_task("jdft2d", values=[1, 2, None, 4, None])
    with pytest.raises(ValueError, match=r"found 2 of 5 without, e.g. rows \[2, 4\]"):
        matbench.load("jdft2d")


@pytest.mark.parametrize("spoil", [lambda content: content[:-30],
                                   lambda content: content[:40] + b"x" + content[41:],
                                   lambda content: b"<html>not found</html>",
                                   lambda content: gzip.compress(b"{")])
def test_damaged_file(empty_root, spoil):
    path = write_task("jdft2d")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DamagedFile, match=r"jdft2d.json.gz is cut short or dam.*: expected sha256 26"
                                          r"057dc4.* found \d+ bytes, sha256 .*; delete it and run make"):
        matbench.load("jdft2d")


def test_leaderboard_is_empty_without_files(empty_root):
    assert matbench.load_leaderboard().empty and matbench.load_published_mae().empty
    assert list(matbench.load_leaderboard()) == ["model", "task", "row", "prediction"]


def test_official_folds_equal_the_published_ones(cloud_data):
    published = records.read_json(cloud_data / "matbench" / "folds.json.gz")
    for task, spec in matbench.TASKS.items():
        folds = records.kfold(spec.n_official, matbench.FOLD_SEED)
        assert [np.flatnonzero(folds == k).tolist() for k in range(5)] == published[task], task
        assert (matbench.official_folds(task) == folds).all()


@pytest.mark.parametrize(("task", "model", "mae"), [
    ("jdft2d", "CGCNN_v2019", 49.24), ("phonons", "ALIGNN", 29.54), ("dielectric", "coNGN", 0.3142),
    ("log_kvrh", "RF", 0.0790)])
def test_published_models_reproduce_on_our_rows_and_folds(cloud_data, task, model, mae):
    table = matbench.load(task)
    predictions = matbench.load_leaderboard([task]).query("model == @model").set_index("row")["prediction"]
    error = (predictions.loc[table["row"]].to_numpy() - table["target"]).abs()
    assert error.groupby(table["fold"]).mean().mean() == pytest.approx(mae, rel=2e-3)


# ---------------------------------------------------------------------------------------------- UnconvBench
def test_unconvbench_official_and_short_files(empty_root):
    document = {"columns": ["structure", "target"], "data": [[ROCK_SALT, float(i)] for i in range(530)]}
    write(io.raw_dir() / "unconvbench" / "defected.json", document)
    table = sources.load_task("defected")
    assert table.attrs["folds"] == "official" and table["material_id"][0] == "ub-defected-001"
    assert (table["fold"] == records.kfold(530, 42)).all() and table["target"][7] == 7
    document["data"] = document["data"][:100]
    write(io.raw_dir() / "unconvbench" / "defected.json.gz", document)
    table = unconvbench.load("defected")
    assert table.attrs["folds"].startswith("own") and table.attrs["rows_official"] == 530
    assert len(table) == 100


def test_unconvbench_bad_input(empty_root):
    with pytest.raises(ValueError, match="expected an UnconvBench task of .* found 'co2'"):
        unconvbench.load("co2")
    with pytest.raises(NotAvailable, match="task 'qmof' .* run python -m cloud_lib data 'unconvbench/"):
        unconvbench.load("qmof")
    path = io.raw_dir() / "unconvbench" / "qmof.json.gz"
    write(path, {"columns": ["structure", "energy"], "data": []})
    with pytest.raises(ValueError, match="expected the columns 'structure' and 'target'"):
        unconvbench.load("qmof")
    write(path, {"columns": ["structure", "target"], "data": [[ROCK_SALT, 1.0], [ROCK_SALT, None]]})
    with pytest.raises(ValueError, match=r"found 1 of 2 without, e.g. rows \[1\]"):
        unconvbench.load("qmof")


# ------------------------------------------------------------------------------------------------ discovery
def test_discovery_tables_join_on_material_id(miniature_root):
    train, test = discovery.load_train(), discovery.load_test()
    assert list(train) == ["material_id", "structure", "e_form_per_atom_dft"]
    assert list(test)[:3] == ["material_id", "structure", "formula"]
    assert list(test)[3:5] == ["e_form_per_atom_dft", "e_above_hull_dft"]
    assert len(test) == 80 and test["unique_prototype"].dtype == bool
    assert 0.1 < (test["e_above_hull_dft"] <= 0).mean() < 0.4
    predictions = discovery.load_published_predictions()
    assert predictions.groupby("model").size().to_dict() == {"alignn": 80, "megnet": 80, "voronoi_rf": 80}
    merged = predictions.merge(test, on="material_id", validate="m:1")
    assert len(merged) == 240 and merged["e_form_per_atom_pred"].isna().sum() == 3
    curves = discovery.load_published_curves()
    assert list(curves) == discovery.CURVE_COLUMNS
    assert curves["fpr"][0].shape == curves["tpr"][0].shape == (21,)


def test_training_sample_is_reproducible(miniature_root):
    ids = discovery.load_train(limit=50, seed=1)["material_id"]
    assert len(ids) == 50 and ids.equals(discovery.load_train(limit=50, seed=1)["material_id"])
    assert not ids.equals(discovery.load_train(limit=50, seed=2)["material_id"])


@pytest.fixture
def discovery_root(empty_root, miniature, monkeypatch):
    """A copy of the miniature's discovery and corpus folders, to spoil."""
    import shutil

    shutil.copytree(miniature / "discovery", io.raw_dir() / "discovery")
    shutil.copytree(miniature / "corpus", io.raw_dir() / "corpus")
    return io.raw_dir()


def test_discovery_official_formats(discovery_root, miniature):
    official = [{"material_id": record["material_id"], "initial_structure": record["structure"]}
                for record in records.read_json_lines(miniature / "discovery" / "wbm_structures.jsonl.gz")]
    lines = "".join(json.dumps(record) + "\n" for record in official).encode()
    (discovery_root / "discovery" / "wbm_structures.jsonl.gz").write_bytes(gzip.compress(lines))
    assert len(discovery.load_test()) == 80
    (discovery_root / "corpus" / "materials_project.jsonl.gz").unlink()
    write(discovery_root / "discovery" / "mp_computed_structure_entries.json.gz",
          {"material_id": {"0": "aflow-001", "1": "aflow-002", "2": "unknown"},
           "entry": {key: {"structure": ROCK_SALT, "energy": 0.0} for key in "012"}})
    assert discovery.load_train()["material_id"].tolist() == ["aflow-001", "aflow-002"]


def test_discovery_bad_input(discovery_root):
    folder = discovery_root / "discovery"
    (folder / "preds" / "new.csv.gz").write_bytes(gzip.compress(b"material_id,energy\nwbm-0-1,1\n"))
    with pytest.raises(ValueError, match="expected a column e_form_per_atom, found .*energy"):
        discovery.load_published_predictions()
    summary = gzip.decompress((folder / "wbm_summary.csv.gz").read_bytes())
    (folder / "wbm_summary.csv.gz").write_bytes(gzip.compress(summary.replace(b"wbm-0-3,", b"wbm-0-999,")))
    with pytest.raises(ValueError, match=r"each of the 80 rows .* found 1 without, e.g. \['wbm-0-999'\]"):
        discovery.load_test()
    (folder / "wbm_summary.csv.gz").write_bytes(gzip.compress(summary.replace(b"_ppd_mp", b"")))
    with pytest.raises(ValueError, match=r"without \['e_above_hull_mp2020_corrected_ppd_mp'\]; delete it"):
        discovery.load_test()
    (folder / "wbm_summary.csv.gz").write_bytes(gzip.compress(summary)[:-20])
    with pytest.raises(DamagedFile, match="wbm_summary.csv.gz is cut short"):
        discovery.load_test()
    (discovery_root / "corpus" / "materials_project.jsonl.gz").unlink()
    with pytest.raises(NotAvailable, match="cloud_lib data corpus/materials_project.jsonl.gz, or of"):
        discovery.load_train()
    write(folder / "mp_computed_structure_entries.json.gz", {"material_id": {"0": "a"}, "entry": {"0": {}}})
    with pytest.raises(ValueError, match="structures of the 203 materials .* do not belong together"):
        discovery.load_train()


def test_published_results_are_empty_without_files(empty_root):
    assert list(discovery.load_published_predictions()) == discovery.PREDICTION_COLUMNS
    assert discovery.load_published_curves().empty


def test_the_real_discovery_files(cloud_data):
    test = discovery.load_test()
    assert len(test) == 2693 and (test["e_above_hull_dft"] <= 0).mean() == pytest.approx(0.152, abs=5e-4)
    assert len(discovery.load_train(limit=100)) == 100
    assert len(discovery.load_published_curves()) == 50


# ------------------------------------------------------------------------------------------------ corpus
def test_damaged_corpus_file(miniature_root, tmp_path, monkeypatch):
    monkeypatch.setenv("CLOUD_DATA", str(tmp_path))
    path = tmp_path / "corpus" / "materials_project.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b'{"type": "structures", "id": "a"}\n' * 9)[:-12])
    with pytest.raises(DamagedFile, match="materials_project.jsonl.gz is cut short"):
        list(curation.corpus_items())


# ----------------------------------------------------------------------------------------- embedded crystals
POSCAR = """Mg4 O4
1.0
4.2 0.0 0.0
0.0 4.2 0.0
0.0 0.0 4.2
Mg O
1 1
direct
0.0 0.0 0.0 Mg
0.5 0.5 0.5 O
"""


@pytest.fixture
def embedded_root(empty_root):
    """Tiny files in the formats of the embedded ones."""
    folder = io.embedded_dir()
    folder.mkdir(parents=True)
    rows = range(4764)
    write(folder / "matbench_dielectric.json.gz", {"structure": dict.fromkeys(map(str, rows), ROCK_SALT),
                                                   "n": dict.fromkeys(map(str, rows), 1.5)})
    quoted = '"' + POSCAR + '"'
    (folder / "elastic_tensor.csv").write_text("# ref\nmaterial_id,poscar,K_VRH,G_VRH\n" + "".join(
        f"mp-{i},{quoted.replace('Mg', element)},100,10\n"
        for i, element in enumerate(["Mg", "Ca", "Sr", "Ba", "Zn"])))
    for name in ("dielectric_constant", "piezoelectric_tensor"):
        (folder / f"{name}.csv").write_text(f"# ref\nmaterial_id,poscar\nmp-1,{quoted}\n")
    (folder / "flla_2015.csv").write_text(
        "# ref\nmaterial_id,structure,e_above_hull,formation_energy_per_atom\n"
        + "".join(f'mp-{i},"{ROCK_SALT}",0.0,-3.0\n'.replace("Mg", element)
                  for i, element in enumerate(["Mg", "Ca", "Sr", "Ba", "Zn", "Mg", "Be", "Cd"])))
    _write_minerals(folder / "amcsd_cif1.db")
    _write_bulks(folder / "bulks.pkl")
    return folder


def _write_minerals(path):
    from pymatgen.symmetry.groups import SpaceGroup

    operations = json.dumps([operation.as_xyz_str() for operation in SpaceGroup("Fm-3m").symmetry_ops])
    columns = ("id,spacegroup_id,formula,a,b,c,alpha,beta,gamma,atoms_sites,atoms_x,atoms_y,atoms_z,"
               "atoms_occupancy")
    cell = ("5,64", "5.64", "5.64.", "90", "90", "90")  # typing errors as in the real file
    at = [_encode(0, 0.5001)] * 3  # not quite on the special position, as published coordinates are
    records_ = [(1, 1, "Na Cl", *cell, '["Na", "Cl1"]', *at, "0"), (2, 1, "Na Cl", *cell, "0", *at, "0"),
                (3, 1, "Na Cl", *cell, '["NaM", "Cl"]', *at, _encode(0.5, 1)),
                (4, 1, "Na O", *cell, '["Na", "Wat1"]', *at, "0"),
                (5, 1, "Na (O H)", *cell, '["Na", "Oh"]', *at, "0"),
                (6, 1, "Na Cl", *cell, '["Na", "Cl"]', _encode(0, 2), *at[1:], "0"),
                (7, 1, "Na D", *cell, '["Na", "D1"]', *at, "0")]
    connection = sqlite3.connect(path)
    connection.execute(f"create table cif ({columns})")
    connection.execute("create table spacegroups (id, symmetry_xyz)")
    connection.execute("insert into spacegroups values (1, ?)", (operations,))
    connection.executemany(f"insert into cif values ({','.join('?' * 14)})", records_)
    connection.commit()
    connection.close()


def _encode(*values):
    import base64

    return base64.b64encode((np.array(values) * 4e6).round().astype("<i4").tobytes()).decode()


def _write_bulks(path):
    from ase import Atoms

    atoms = Atoms("MgO", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[3, 3, 3], pbc=True)
    content = pickle.dumps([{"atoms": atoms, "src_id": "mp-1"}], protocol=3)
    path.write_bytes(content.replace(b"numpy._core", b"numpy.core"))  # the name at the time of the real file


def test_embedded_tasks(embedded_root):
    dielectric = sources.load_task("dielectric")
    assert dielectric.attrs["folds"] == "official" and len(dielectric) == 4764
    assert (dielectric["fold"] == records.kfold(4764, 18012019)).all()
    assert sources.load_task("log_kvrh")["target"].tolist() == [2.0] * 5
    energies = sources.load_task("mp_e_form")
    assert energies.attrs["folds"] == "own (grouped by formula)"
    assert energies["material_id"][0] == "flla_2015:mp-0"
    assert energies["fold"][0] == energies["fold"][5], "both are MgO"


def test_embedded_discovery_splits_by_formula(embedded_root):
    train, test = discovery.load_train(), discovery.load_test()
    assert len(train) + len(test) == 8
    assert not set(train["structure"].map(records.formula)) & set(test["formula"])


def test_embedded_corpus_and_its_rejects(embedded_root):
    found = {material_id: structure for material_id, _, structure in embedded.corpus()}
    assert len(found) == 4764 + 5 + 8 + 2 + 1 + 7 + 288
    salt = found["amcsd:00001"]
    assert records.elements(salt) == {"Na": 4, "Cl": 4} and records.formula(salt) == "ClNa"
    assert records.elements(found["amcsd:00007"]) == {"Na": 4, "H": 4}
    assert found["open_catalyst_bulks:mp-1"]["sites"][1]["abc"] == pytest.approx([0.5, 0.5, 0.5])
    assert {name: structure["error"] for name, structure in found.items() if "error" in structure} == {
        "amcsd:00002": "no coordinates published", "amcsd:00003": "partial occupancy at 1 of 2 sites",
        "amcsd:00004": "a site without coordinates, or of water or another group",
        "amcsd:00005": "no coordinates for H of Na (O H)",
        "amcsd:00006": "a site without coordinates, or of water or another group"}


def test_embedded_bad_input(empty_root, embedded_root):
    with pytest.raises(ValueError, match="expected an embedded task of .* found 'jdft2d'"):
        embedded.load_task("jdft2d")
    write(embedded_root / "matbench_dielectric.json.gz", {"structure": {"0": ROCK_SALT}, "n": {"0": 1.5}})
    with pytest.raises(DamagedFile, match="expected 4764 rows, found 1"):
        embedded.load_task("dielectric")
    (embedded_root / "elastic_tensor.csv").unlink()
    with pytest.raises(NotAvailable, match=r"elastic_tensor.csv, found no file; run make data .*about 35 MB"):
        embedded.load_task("log_gvrh")
    (embedded_root / "amcsd_cif1.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    with pytest.raises(DamagedFile, match="amcsd_cif1.db is damaged .*delete it and run make data"):
        list(minerals.minerals())


def test_the_unpickler_refuses_everything_else(embedded_root):
    (embedded_root / "bulks.pkl").write_bytes(b"cos\nsystem\n(S'echo unsafe'\ntR.")
    with pytest.raises(DamagedFile, match="expected a pickle of arrays .* found os.system"):
        list(embedded.open_catalyst_bulks())
    (embedded_root / "bulks.pkl").write_bytes(b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\nS'__class__'\ntR.")
    with pytest.raises(DamagedFile, match="bulks.pkl is cut short or damaged"):  # getattr came out inert
        list(embedded.open_catalyst_bulks())
    (embedded_root / "bulks.pkl").write_bytes(pickle.dumps([{"atoms": np.eye(3)}])[:-9])
    with pytest.raises(DamagedFile, match="bulks.pkl is cut short or damaged .*expected bytes 36088635"):
        list(embedded.open_catalyst_bulks())


@pytest.mark.parametrize(("structure", "formula"), [(ROCK_SALT, "MgO"), (
    {"sites": [{"species": [{"element": "Fe", "occu": 0.5}]}, {"species": [{"element": "O", "occu": 1}]}]},
    "Fe0.5O"), ({"attributes": {"species_at_sites": ["O", "O", "Ti", "O", "O", "Ti"]}}, "O2Ti")])
def test_formula(structure, formula):
    assert records.formula(structure) == formula


def test_cell_matrix_has_the_given_lengths_and_angles():
    matrix = records.cell_matrix([4, 5, 6], [80, 95, 110])
    lengths = np.linalg.norm(matrix, axis=1)
    cosines = (matrix @ matrix.T / np.outer(lengths, lengths))[[1, 0, 0], [2, 2, 1]]
    assert lengths == pytest.approx([4, 5, 6])
    assert np.degrees(np.arccos(cosines)) == pytest.approx([80, 95, 110])
    assert (records.cell_matrix([2, 2, 2], [90, 90, 90]) == 2 * np.eye(3)).all()


def test_the_real_embedded_crystals():
    if not (io.embedded_dir() / "bulks.pkl").is_file():
        pytest.skip("needs the embedded crystals: run make data")
    assert len(list(embedded.open_catalyst_bulks())) == 11410
    assert len(embedded.load_task("log_kvrh")) == 1181
