"""Crystals in, predictions out: from files and memory, with what can go wrong on the way."""

import json
import math
import random
from pathlib import Path

import ase.build
import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from toy_models import write_joint, write_runs

from cloud_lib import bundle, cli, io, predict, tabular, use
from cloud_lib.representation import string
from cloud_lib.symmetry import symmetry_record

CIF = """data_x
_cell_length_a {a}
_cell_length_b {a}
_cell_length_c {a}
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_space_group_name_H-M_alt 'F m -3 m'
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
{first} 0 0 0
{second} 0.5 0.5 0.5
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def runs(root):
    return write_runs(root)


@pytest.fixture(scope="module")
def models(runs, root):
    """The runs collected into models/, where they are found without being named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD_ROOT", str(root))
        return bundle.write(bundle.find(runs), root / "models", note="A toy.")


@pytest.fixture(autouse=True)
def _root(root, models, monkeypatch):
    monkeypatch.setenv("CLOUD_ROOT", str(root))


@pytest.fixture
def structures():
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    tin = ase.build.bulk("Sn", "diamond", 6.49)
    return [salt, tin]


def _rows(capsys):
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


# ------------------------------------------------------------------------------------------------- in memory
def test_structures_and_atoms_are_predicted(structures, models):
    found = use.predict_structures(structures)
    assert found["formula_reduced"].tolist() == ["NaCl", "Sn"] and found["error"].isna().all()
    assert found["log_gvrh_unit"].tolist() == ["log10(GPa)"] * 2
    one = use.predict_structures(structures[:1], models, ["dielectric"])
    assert "log_gvrh" not in one and one["dielectric"][0] == pytest.approx(found["dielectric"][0], abs=1e-3)


def test_mean_and_deviation_are_those_of_the_models(structures, models):
    """The same strings through each model of the ensemble, by the functions that training is tested with."""
    texts = [string(symmetry_record(structure, 0.1)) for structure in structures]
    described = [use._Described("f", "i", structure, [models.properties["log_gvrh"].recipe]) for structure in structures]
    packed, kept, _ = use._Strings(described, models.properties["log_gvrh"].recipe).packed(
        use.Tokenizer.default(), 64)
    assert kept == texts
    folders = [models.folder / m.head for m in models.properties["log_gvrh"].members]
    each = np.stack([predict.predict(folder, packed) for folder in folders])
    mean, spread = each.mean(0), each.std(0)
    found = use.predict_structures(structures, models, ["log_gvrh"])
    assert found["log_gvrh"].to_numpy() == pytest.approx(mean, abs=1e-5)
    expected = np.hypot(spread, models.properties["log_gvrh"].error_68)
    assert found["log_gvrh_std"][0] == pytest.approx(expected[0], abs=1e-5)  # NaCl is among the labelled crystals


def test_a_new_element_is_warned_of_and_less_certain(models):
    cells = [Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.4), [e, "O"], [[0, 0, 0], [0.25] * 3]) for e in
             ("Pu", "Ba", "U")]
    found = use.predict_structures(cells, models)
    assert found["warnings"][0] == "Pu: in no labelled crystal of dielectric"
    assert found["warnings"].isna().tolist() == [False, True, False]
    assert found["warnings"][2] == "U: in no labelled crystal"
    assert (found["dielectric_std"][[0, 2]] > 5).all() and found["dielectric_std"][1] < 2
    assert found["log_gvrh_std"][0] < 2 < found["log_gvrh_std"][2]
    hexagonal = ase.build.bulk("Ti", "hcp", 2.95, 4.68)
    assert use.predict_structures([hexagonal])["warnings"][0] == "space group 194: in no labelled crystal"


def test_what_is_no_crystal_has_its_reason(structures, models):
    disordered = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    found = use.predict_structures([disordered, *structures, 7], models)
    assert found["error"].notna().tolist() == [True, False, False, True]
    assert "disordered site" in found["error"][0] and "found int" in found["error"][3]
    vectors = use.embed_structures([disordered, *structures], models)
    assert vectors.shape == (3, 32) and np.isnan(vectors[0]).all() and np.isfinite(vectors[1:]).all()


def test_pieces_and_order_do_not_matter(structures, models, monkeypatch):
    many = structures * 5
    whole = use.predict_structures(many, models)
    monkeypatch.setattr(use, "CHUNK", 3)
    assert use.predict_structures(many, models)["log_gvrh"].to_numpy() == pytest.approx(
        whole["log_gvrh"].to_numpy(), abs=1e-5)


def test_a_string_too_long_for_the_model_is_one_rows_error(structures, models, monkeypatch):
    monkeypatch.setattr(use, "_max_positions", lambda folder: 28)
    found = use.predict_structures([structures[0], ase.build.bulk("Ti", "hcp", 2.95, 4.68)], models)
    assert found["error"][0] == "string of 37 tokens: the model takes 28" and pd.isna(found["error"][1])
    assert np.isnan(found["dielectric"][0]) and np.isfinite(found["dielectric"][1])


# ------------------------------------------------------------------------------------------------ from files
def test_fifty_broken_files_among_ten_good_ones(tmp_path, capsys):
    """Every good one is predicted, every bad one reported, and the exit status tells."""
    rng, good = random.Random(0), CIF.format(a=5.6, first="Na", second="Cl")
    for number in range(10):
        (tmp_path / f"good{number}.cif").write_text(CIF.format(a=5 + number / 10, first="Ba", second="O"))
    for number in range(50):
        text = list(good)
        for _ in range(60):
            text[rng.randrange(len(text))] = chr(rng.randrange(1, 255))
        broken = ["".join(text), good[:rng.randrange(1, 250)], "", good.replace("5.6", "-1"),
                  good.replace("Na", "Xx")][number % 5]
        (tmp_path / f"bad{number}.cif").write_text(broken, encoding="utf-8")
    assert cli.main(["predict", str(tmp_path), "--format", "jsonl"]) == 1
    rows, error = _rows(capsys)
    failed = {row["material_id"] for row in rows if row["error"]}
    assert len(rows) == 60 and failed == {f"bad{n}" for n in range(50)}
    assert "50 of 60 crystals failed" in error
    assert all(math.isfinite(row["dielectric"]) for row in rows if not row["error"])


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_formats_hold_the_same(tmp_path, capsys, suffix):
    (tmp_path / "a.cif").write_text(CIF.format(a=5.6, first="Na", second="Cl"))
    (tmp_path / "b.cif").write_text("nothing")
    target = tmp_path / "out" / f"found.{suffix}"
    assert cli.main(["predict", str(tmp_path / "b.cif"), str(tmp_path / "a.cif"), "-o", str(target)]) == 1
    read = {"jsonl": lambda f: pd.read_json(f, lines=True), "csv": pd.read_csv, "parquet": pd.read_parquet}[suffix]
    table = read(target)
    assert table.columns.tolist() == use.columns(bundle.find().choose())
    assert table["formula_reduced"][1] == "NaCl" and table["space_group"][1] == 225
    assert isinstance(table["error"][0], str) and table["dielectric_unit"][1] in ("1", 1)
    if suffix == "parquet":
        assert cli.main(["predict", str(tmp_path / "a.cif"), "--format", "parquet"]) == 2
        assert "expected --output FILE for Parquet" in capsys.readouterr().err


def test_the_table_reads_well(tmp_path, capsys):
    (tmp_path / "salt.cif").write_text(CIF.format(a=5.6, first="Na", second="Cl"))
    assert cli.main(["predict", str(tmp_path / "salt.cif")]) == 0
    head, first, second, text = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "formula", "group", "property", "value", "±", "unit"]
    assert first.split()[:4] == ["salt.cif", "NaCl", "225", "dielectric"] and second.split()[0] == "log_gvrh"
    assert text.strip().endswith("4a 4b | Na 0.5 Cl 0.5")
    assert cli.main(["predict", "--list"]) == 0
    assert "meaning of log_gvrh" in capsys.readouterr().out


def test_parquet_of_structures(tmp_path, structures):
    salt = structures[0]
    dicts, texts = salt.as_dict(), json.dumps(salt.as_dict())
    cif = CIF.format(a=5.64, first="Na", second="Cl")
    optimade = {"lattice_vectors": salt.lattice.matrix.tolist(), "cartesian_site_positions": salt.cart_coords.tolist(),
                "species_at_sites": [s.specie.symbol for s in salt],
                "species": [{"name": e, "chemical_symbols": [e], "concentration": [1.0]} for e in ("Na", "Cl")]}
    sites = [{k: site[k] for k in ("species", "abc")} for site in dicts["sites"]]
    columns = {"dicts": {"structure": [{"lattice": {"matrix": dicts["lattice"]["matrix"]}, "sites": sites}]},
               "texts": {"material_id": ["m-1", "m-2", "m-3"], "structure": [texts, None, "{"]},
               "cifs": {"cif": [cif, "data_x"]}, "optimade": {"id": ["o-1"]} | {k: [v] for k, v in optimade.items()}}
    for name, content in columns.items():
        pd.DataFrame(content).to_parquet(tmp_path / f"{name}.parquet")
    found = {name: list(tabular.entries([tmp_path / f"{name}.parquet"])) for name in columns}
    assert [entry[1] for entry in found["texts"]] == ["m-1", "m-2", "m-3"] and found["cifs"][0][1] == "cifs#1"
    good = [found[name][0][2] for name in columns]
    assert {string(symmetry_record(crystal)) for crystal in good} == {string(symmetry_record(salt))}
    bad = [str(found[name][i][2]) for name, i in (("texts", 1), ("texts", 2), ("cifs", 1))]
    assert bad[0] == "empty column 'structure'" and bad[1].startswith("not JSON") and "cell parameter" in bad[2]


def test_embeddings_to_a_file(tmp_path, capsys, structures):
    (tmp_path / "salt.cif").write_text(CIF.format(a=5.64, first="Na", second="Cl"))
    assert cli.main(["embed", str(tmp_path / "salt.cif"), "-o", str(tmp_path / "e.parquet")]) == 0
    vector = np.stack(pd.read_parquet(tmp_path / "e.parquet")["embedding"])
    assert vector == pytest.approx(use.embed_structures(structures[:1]), abs=1e-5)
    assert cli.main(["embed", str(tmp_path / "salt.cif")]) == 0
    assert len(_rows(capsys)[0][0]["embedding"]) == 32
    assert cli.main(["embed", str(tmp_path / "salt.cif"), "-o", str(tmp_path / "e.npz")]) == 0
    with np.load(tmp_path / "e.npz") as stored:
        assert stored["embedding"] == pytest.approx(vector) and stored["material_id"].tolist() == ["salt"]
    assert cli.main(["embed", str(tmp_path / "salt.cif"), "-o", str(tmp_path / "e.xyz")]) == 2
    assert "expected --output with .npz" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["{tmp}"], "expected CIF, POSCAR, XYZ or OPTIMADE files, found none"),
    ([], "expected files or folders with crystals, found none; name them, or say --list"),
    (["{tmp}/none.cif"], "no such file or folder"),
    (["{tmp}/none.parquet"], "no such file or folder"),
    (["{tmp}", "--property", "colour"], "expected properties of .*found .'colour'."),
    (["{tmp}", "--models", "{tmp}"], "expected models in .*found neither"),
])
def test_a_mistake_is_one_clear_line(tmp_path, capsys, arguments, message):
    import re

    assert cli.main(["predict", *(text.format(tmp=tmp_path) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


def test_wrong_parquet_files_are_refused(tmp_path):
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ValueError, match="expected a Parquet file, found damage"):
        tabular.entries([tmp_path / "text.parquet"])
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="expected one of the columns .*found .'a'."):
        tabular.entries([tmp_path / "other.parquet"])
    with pytest.raises(ValueError, match="expected a format of"), tabular.writer([], "xls"):
        pass


# -------------------------------------------------------------------------------------------------- bundles
def test_a_bundle_predicts_what_its_runs_do(runs, models, structures):
    own, copied = (use.predict_structures(structures, m) for m in (runs, models))
    for name in ("dielectric", "log_gvrh"):
        assert copied[name].to_numpy() == pytest.approx(own[name].to_numpy(), abs=0.05)
        assert 0 < models.properties[name].error_68 == pytest.approx(0.68, abs=0.01)
    sizes = [sum(f.stat().st_size for f in folder.rglob("model.safetensors")) for folder in (runs, models.folder)]
    assert sizes[1] < 0.55 * sizes[0]
    assert len(models.held_out()) == 400 and models.held_out(["dielectric"]).equals(
        bundle.find(runs).held_out(["dielectric"]))
    assert "| dielectric | meaning of dielectric | 1 |" in (models.folder / "README.md").read_text()


def test_a_frozen_encoder_is_stored_once(tmp_path, monkeypatch, structures):
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path))
    shared = bundle.write(bundle.find(write_runs(tmp_path, frozen=True)), tmp_path / "shared")
    again = bundle.write(shared, tmp_path / "again")
    for one in (shared, again):
        assert [f.parent.name for f in one.folder.rglob("model.safetensors")] == ["encoder"]
    first, second = (use.predict_structures(structures, m)["dielectric"] for m in (tmp_path / "checkpoints/demo", again))
    assert second.to_numpy() == pytest.approx(first.to_numpy(), abs=0.05)


def test_a_joint_model_serves_all_its_properties(tmp_path, monkeypatch, structures):
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path))
    runs = write_runs(tmp_path, folds=(0,))
    for fold in (0, 1):
        write_joint(runs, fold)
    made = bundle.write(bundle.find(runs), tmp_path / "models")
    assert sorted(f.parent.relative_to(made.folder).as_posix() for f in made.folder.rglob("head.safetensors")) == [
        "joint/fold0-seed0", "joint/fold1-seed0"]
    found = use.predict_structures(structures, made)
    own = use.predict_structures(structures, runs)
    for name, (low, high) in {"dielectric": (0, 10), "log_gvrh": (990, 1010)}.items():  # each its own output and scale
        assert found[name].between(low, high).all()
        assert found[name].to_numpy() == pytest.approx(own[name].to_numpy(), abs=0.05)
    with pytest.raises(ValueError, match="expected a task of .*, found 'mp_gap'"):
        predict.apply_head(made.path("joint/fold0-seed0"), np.zeros((1, 32)), "mp_gap")


def test_the_weights_of_the_repository_predict():
    """Known crystals, within three stated deviations of what is measured or calculated for them."""
    shipped = bundle.open_bundle(Path(__file__).parents[1] / "models")
    assert sum(f.stat().st_size for f in shipped.folder.rglob("*")) < 80 * 2**20
    crystals = {"NaCl": (5.64, ["Na", "Cl"]), "MgO": (4.21, ["Mg", "O"])}
    made = [Structure.from_spacegroup(225, Lattice.cubic(a), species, [[0, 0, 0], [0.5, 0.5, 0.5]])
            for a, species in crystals.values()]
    found = use.predict_structures(made, shipped)
    assert found["error"].isna().all()
    assert found["warnings"].str.startswith("space group 225: in no labelled crystal of jdft2d, perovskites").all()
    known = {"dielectric": [1.54, 1.74], "log_kvrh": [1.38, 2.18], "log_gvrh": [1.17, 2.11],  # refractive index, log10(GPa)
             "mp_e_form": [-2.1, -3.0], "mp_gap": [5.0, 4.4]}  # PBE: eV/atom, eV
    for name, values in known.items():
        assert (np.abs(found[name] - values) < 3 * found[f"{name}_std"]).all(), found[[name, f"{name}_std"]]
    held_out = shipped.held_out()
    for name, prop in shipped.properties.items():
        rows = held_out[held_out["task"] == name]
        assert prop.mae_test == pytest.approx((rows["prediction"] - rows["target"]).abs().mean())
        assert not rows.duplicated("material_id").any()  # every crystal by the model that has not seen it


def test_every_model_has_the_tolerance_of_its_training(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path))
    runs = write_runs(tmp_path, folds=(0,))
    io.write_json(tmp_path / "results/demo/curation.json", {"symprec": 0.05})
    found = bundle.find()  # no models/ here: the runs of the demo
    assert found.folder == runs and found.encoder_recipe == ("canonical", 0.05, "corrected")
    assert {name: p.recipe.symprec for name, p in found.properties.items()} == {"dielectric": 0.01, "log_gvrh": 0.1}


def test_one_fine_tuned_model_predicts_alone(runs, structures):
    unit = runs / "matbench/dielectric/CLOUD/fold0-seed0"
    found = use.predict_structures(structures, unit)
    assert found["dielectric"].notna().all() and found["warnings"].isna().all()
    with pytest.raises(FileNotFoundError, match="expected a pre-trained encoder"):
        use.embed_structures(structures, unit)


def test_missing_or_damaged_weights_are_named(tmp_path, models, structures, monkeypatch):
    import shutil

    copy = tmp_path / "models"
    shutil.copytree(models.folder, copy)
    file = copy / models.properties["dielectric"].members[0].encoder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="expected weights .*found other content: damaged"):
        use.predict_structures(structures, copy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="expected weights .*found none; fetch the models again"):
        use.predict_structures(structures, copy)
    (file.parent / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="found no config.json; fetch"):
        use.predict_structures(structures, copy)
    manifest = io.read_json(copy / "models.json")
    for content, message in ((manifest | {"format": 2}, "expected format 1 .*found 2; update"),
                             ({"format": 1, "properties": {"x": {}}}, "expected a manifest .*KeyError")):
        io.write_json(copy / "models.json", content)
        with pytest.raises(ValueError, match=message):
            bundle.find(copy)
    with pytest.raises(FileNotFoundError, match="expected models.json in"):
        bundle.open_bundle(tmp_path)
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="found none; name their folder with --models"):
        bundle.find()


def test_runs_without_held_out_predictions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path))
    runs = write_runs(tmp_path, folds=(0,))
    file = runs / "matbench/dielectric/CLOUD/fold0-seed0/predictions.csv"
    header = "task,fold,split,material_id,target,prediction\n"
    file.write_text(f"{header}dielectric,0,val,a,1,2\nlog_gvrh,0,test,b,1,9\n")
    assert bundle.find(runs).properties["dielectric"].mae_test == 1
    file.write_text(header)
    with pytest.raises(ValueError, match="expected held-out rows"):
        bundle.find(runs)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="expected held-out predictions"):
        bundle.find(runs)


def test_heads_that_are_missing_or_damaged(tmp_path, models):
    with pytest.raises(FileNotFoundError, match="expected head.safetensors in"):
        predict.apply_head(tmp_path, np.zeros((1, 32)), "dielectric")
    (tmp_path / "head.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="expected readable weights in .*head.safetensors, found damage"):
        predict.apply_head(tmp_path, np.zeros((1, 32)), "dielectric")


def test_the_bundle_command(tmp_path, runs, capsys):
    assert cli.main(["bundle", "--models", str(runs), "--out", str(tmp_path / "b"), "--property", "dielectric"]) == 0
    assert " MB in " in capsys.readouterr().out and list(bundle.find(tmp_path / "b").properties) == ["dielectric"]
    with open(tmp_path / "b/README.md") as handle:
        assert "profile demo" in handle.read()
    assert cli.main(["bundle", "--models", str(runs), "--out", str(tmp_path / "c"), "--members", "1"]) == 0
    assert cli.main(["bundle", "--out", str(tmp_path / "d"), "--members", "1"]) != 0
    assert "expected --members of at least 1 together with --models" in capsys.readouterr().err
    first, all_folds = (bundle.find(path).properties["dielectric"] for path in (tmp_path / "c", runs))
    assert len(first.members) == 1 < len(all_folds.members) and first.n_test < all_folds.n_test
