"""Crystals, symmetry records and file readers; spglib, moyo and pymatgen are the oracles."""

import gzip
import json
import random

import numpy as np
import pytest
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.core.periodic_table import Element

from benchmarks.bench_fuzz import mutated_cif, mutated_optimade, outcome
from cloud_lib.elements import FORMULA_ORDER, SYMBOLS
from cloud_lib.representation import describe, string
from cloud_lib.symmetry import Crystal, CrystalError, as_crystal, read_crystals, symmetry_record

pytestmark = pytest.mark.filterwarnings("ignore:Set OLD_ERROR_HANDLING:DeprecationWarning")  # by pymatgen

PEROVSKITE = Structure(Lattice.cubic(4.0), ["Ba", "Ti", "O", "O", "O"],
                       [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
RUTILE_CIF = """data_rutile
_cell_length_a 4.594(1)
_cell_length_b 4.594(1)
_cell_length_c 2.959
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 42/m n m'
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Ti1 0 0 0 1
O1 0.3053(2) 0.3053 0 1.0
"""


def optimade(crystal, **changes):
    """An OPTIMADE entry of a Crystal."""
    names = sorted(set(crystal.symbols))
    species = [{"name": n, "chemical_symbols": [n], "concentration": [1.0]} for n in names]
    attributes = {"lattice_vectors": crystal.lattice.tolist(), "species": species,
                  "cartesian_site_positions": (crystal.positions @ crystal.lattice).tolist(),
                  "species_at_sites": list(crystal.symbols)} | changes
    return {"id": "x-1", "type": "structures", "attributes": attributes}


@pytest.mark.parametrize("engine", ["auto", "spglib", "moyopy"])
def test_perovskite(engine):
    record = symmetry_record(PEROVSKITE, engine=engine)
    assert (record.space_group, record.hall_number, record.n_sites) == (221, 517, 5)
    assert record.formula_reduced == "BaTiO3"
    assert [(o.element, o.multiplicity, o.site_symmetry) for o in record.orbits] == [
        ("Ba", 1, "m-3m"), ("Ti", 1, "m-3m"), ("O", 3, record.orbits[2].site_symmetry)]
    assert record.orbits[2].wyckoff_letter in "cd" and record.volume_per_atom == pytest.approx(64 / 5)
    assert record.engine == ("spglib" if engine == "spglib" else "moyopy")


def test_origin_choice_is_1_with_both_engines():
    """Diamond: 8a in both settings; the record says which one its letters belong to."""
    diamond = Structure.from_spacegroup("Fd-3m", Lattice.cubic(3.57), ["C"], [[0.125] * 3])
    for engine in ("spglib", "moyopy"):
        record = symmetry_record(diamond, engine=engine)
        assert (record.space_group, record.hall_number, record.origin_choice) == (227, 525, "1")


def test_all_inputs_agree():
    from pymatgen.io.ase import AseAtomsAdaptor

    expected = symmetry_record(PEROVSKITE)
    crystal = as_crystal(PEROVSKITE)
    record = optimade(crystal)
    atoms = AseAtomsAdaptor.get_atoms(PEROVSKITE)
    for given in (crystal, PEROVSKITE.as_dict(), atoms, record, record["attributes"],
                  PEROVSKITE.copy().add_oxidation_state_by_element({"Ba": 2, "Ti": 4, "O": -2})):
        assert symmetry_record(given) == expected


@pytest.mark.filterwarnings("ignore:No Pauling electronegativity")
def test_formula_follows_electronegativity():
    values = [Element(e).X for e in FORMULA_ORDER]
    known = [x for x in values if x == x]
    assert known == sorted(known) and all(x != x for x in values[len(known):])
    assert sorted(FORMULA_ORDER) == sorted(SYMBOLS) == sorted([e.symbol for e in Element] + ["D"])
    record = symmetry_record(PEROVSKITE.copy().make_supercell([2, 1, 1], in_place=False))
    assert Composition(record.formula_reduced) == PEROVSKITE.composition.reduced_composition
    assert record.amounts == {"Ba": 2, "Ti": 2, "O": 6}


def test_deuterium_is_its_own_species():
    """H and D on the sites of CsCl: with one kind of hydrogen the cell would be body-centred."""
    crystal = Crystal(3.0 * np.eye(3), ("H", "D"), np.array([[0, 0, 0], [0.5] * 3]))
    assert (symmetry_record(crystal).space_group, symmetry_record(crystal).formula_reduced) == (221, "HD")
    assert symmetry_record(crystal._replace(symbols=("H", "H"))).space_group == 229


BAD = {
    "found ['X']": {"species_at_sites": ["Ba", "Ti", "X", "O", "O"],
                    "species": [{"name": n, "chemical_symbols": [n]} for n in ("Ba", "Ti", "O", "X")]},
    "disordered site: expected one element with occupancy 1, found {'Fe': 0.5, 'Mn': 0.5}": {
        "species": [{"name": n, "chemical_symbols": ["Fe", "Mn"], "concentration": [0.5, 0.5]}
                    for n in ("Ba", "Ti", "O")]},
    "disordered site": {"species": [
        {"name": n, "chemical_symbols": [n, "vacancy"], "concentration": [0.9, 0.1]}
        for n in ("Ba", "Ti", "O")]},
    "volume: expected at least 0.5 A^3 per atom, found 0": {
        "lattice_vectors": [[1, 0, 0], [2, 0, 0], [0, 0, 1]]},
    "up to 10000 in size, found [nan]": {"lattice_vectors": [[float("nan"), 0, 0], [0, 4, 0], [0, 0, 4]]},
    "lattice: expected translations of at least 0.5 A, found 0.1 A": {
        "lattice_vectors": [[0.1, 0, 0], [0, 40, 0], [0, 0, 40]]},
    "up to 10000 in size, found [inf]": {"lattice_vectors": [[float("inf"), 0, 0], [0, 4, 0], [0, 0, 4]]},
    "found 0.000 A between numbers 1 and 2": {
        "cartesian_site_positions": [[0, 0, 0]] * 2 + [[2, 0, 0], [0, 2, 0], [0, 0, 2]]},
    "0 atoms": {"cartesian_site_positions": [], "species_at_sites": []},
    "for 5 atoms": {"cartesian_site_positions": [[0, 0, 0]]},
    "found [nan]": {"lattice_vectors": [[None, 0, 0], [0, 4, 0], [0, 0, 4]]},
    "malformed structure: TypeError": {"lattice_vectors": [[{}, 0, 0], [0, 4, 0], [0, 0, 4]]},
    "malformed structure: KeyError": {"species_at_sites": ["Q"] * 5},
    "expected 3 x 3 numbers, found shape (2, 3)": {"lattice_vectors": [[4, 0, 0], [0, 4, 0]]},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_crystals_are_rejected_with_a_reason(reason):
    with pytest.raises(CrystalError) as caught:
        symmetry_record(optimade(as_crystal(PEROVSKITE), **BAD[reason]))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_too_many_atoms_unknown_types_and_options():
    many = Crystal(100.0 * np.eye(3), ("H",) * 5001, np.zeros((5001, 3)))
    with pytest.raises(CrystalError, match="too many atoms: expected at most 5000, found 5001"):
        symmetry_record(many)
    with pytest.raises(CrystalError, match="expected a Crystal, .* found int"):
        as_crystal(7)
    for options in ({"engine": "fast"}, {"symprec": 0.0}, {"symprec": float("nan")}):
        with pytest.raises(ValueError, match="expected engine in .* and symprec > 0"):
            symmetry_record(PEROVSKITE, **options)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pymatgen on the file that names its group only
def test_cif_equals_pymatgen(tmp_path):
    """The same atoms as pymatgen's parser, from files with operators, with a name only, and of P1."""
    from pymatgen.io.cif import CifWriter

    (tmp_path / "rutile.cif").write_text(RUTILE_CIF)
    CifWriter(PEROVSKITE, symprec=0.01).write_file(tmp_path / "symmetric.cif")
    CifWriter(PEROVSKITE).write_file(tmp_path / "p1.cif")
    for file in sorted(tmp_path.glob("*.cif")):
        ((name, crystal),) = read_crystals(file)
        theirs = Structure.from_file(file)
        assert name == file.stem
        assert sorted(crystal.symbols) == sorted(s.specie.symbol for s in theirs)
        assert symmetry_record(crystal) == symmetry_record(crystal, engine="moyopy")
        assert string(symmetry_record(crystal), "site") == string(symmetry_record(theirs), "site")


def test_cif_reports_what_is_wrong(tmp_path):
    cases = {
        "1 of 2 sites are partly occupied, e.g. ['Ti1 0.5']": RUTILE_CIF.replace("0 0 0 1", "0 0 0 0.5"),
        "fractional coordinate: expected a number": RUTILE_CIF.replace("Ti1 0 0 0 1", "Ti1 ? 0 0 1"),
        "cell parameter: expected a number": RUTILE_CIF.replace("_cell_length_c 2.959\n", ""),
        "cell: expected lengths and angles of a cell with volume": RUTILE_CIF.replace("beta 90", "beta 180"),
        "space group: no operators listed and": RUTILE_CIF.replace("42/m n m", "99 q"),
        "unknown species": RUTILE_CIF.replace("Ti1", "Zz1"),
        "no atoms: expected a loop": RUTILE_CIF[: RUTILE_CIF.index("loop_")],
        "no structure in": "data_empty\n",
        "cannot read": "loop_ _a _b 1 2 3\n",
    }
    for reason, text in cases.items():
        (tmp_path / "bad.cif").write_text(text)
        ((_, error),) = read_crystals(tmp_path / "bad.cif")
        assert isinstance(error, CrystalError) and reason in str(error)
    operators = RUTILE_CIF.replace("_symmetry_space_group_name_H-M 'P 42/m n m'",
                                   "loop_\n_symmetry_equiv_pos_as_xyz\n'x,y,w'")
    (tmp_path / "bad.cif").write_text(operators)
    ((_, error),) = read_crystals(tmp_path / "bad.cif")
    assert "symmetry operator" in str(error)


def test_every_format_reads(tmp_path):
    PEROVSKITE.to(filename=str(tmp_path / "POSCAR"), fmt="poscar")
    PEROVSKITE.to_ase_atoms().write(tmp_path / "a.extxyz", format="extxyz")
    (tmp_path / "b.extxyz").write_text("1\nno lattice\nH 0 0 0\n")
    record = optimade(as_crystal(PEROVSKITE))
    (tmp_path / "c.json").write_text(json.dumps({"data": [record, record]}))
    lines = [{"x-optimade": {"meta": {"api_version": "1.1.0"}}}, {"type": "info", "id": "structures"}, record]
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write("\n".join([*map(json.dumps, lines), '{"cut": [', "17"]))
    (tmp_path / "e.cif.gz").write_bytes(gzip.compress(RUTILE_CIF.encode()))
    rows = list(describe(tmp_path, style="site"))
    perovskite = [r for r in rows if r["formula_reduced"] == "BaTiO3"]
    assert len(perovskite) == 5 and len({r["string"] for r in perovskite}) == 1
    assert [r["material_id"] for r in rows if r["error"]] == ["b", "d#4", "d#5"]
    assert all(r["error"] is None or r["string"] is None for r in rows)
    assert rows[-1]["string"].endswith("| Ti 2a O 4f | Ti 0.33 O 0.67")
    ((_, error),) = read_crystals(__file__)
    assert "unknown file type" in str(error)
    for missing in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="no such file or folder|found none"):
            list(read_crystals(missing))


def test_command_prints_one_json_object_per_crystal(tmp_path, capsys):
    from cloud_lib.cli import main

    (tmp_path / "rutile.cif").write_text(RUTILE_CIF)
    (tmp_path / "bad.cif").write_text("data_x\n")
    assert main(["string", str(tmp_path), "--style", "site"]) == 1
    output = capsys.readouterr()
    bad, good = map(json.loads, output.out.splitlines())
    assert list(good) == ["file", "material_id", "formula_reduced", "space_group", "string", "error"]
    assert (good["formula_reduced"], good["space_group"], good["error"]) == ("TiO2", 136, None)
    assert bad["string"] is None and "no structure" in bad["error"]
    assert "1 of 2 crystals have no string" in output.err
    assert main(["string", str(tmp_path / "none")]) == 2


def test_fuzzed_input_never_crashes(tmp_path):
    """Each mutation ends as a string or as a one-line reason; benchmarks/bench_fuzz.py runs thousands."""
    rng = random.Random(0)
    record = optimade(as_crystal(PEROVSKITE))
    for index in range(60):
        name, content = (mutated_cif(RUTILE_CIF, rng) if index % 2 else mutated_optimade(record, rng))
        assert outcome(tmp_path / name, content)["error"] != "crash"
