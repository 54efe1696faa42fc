"""The tables of the 230 groups against pymatgen, spglib and themselves."""

import json
from pathlib import Path

import numpy as np
import pymatgen.symmetry
import pytest
import spglib

from benchmarks.derive_wyckoff import derive_positions, normalizer_steps
from benchmarks.random_crystals import orbit_of, random_point
from cloud_lib import spacegroups as sg

GROUPS = range(1, 231)

pytestmark = pytest.mark.filterwarnings("ignore:Set OLD_ERROR_HANDLING:DeprecationWarning")


def _spglib_operations(hall_number):
    database = spglib.get_symmetry_from_database(hall_number)
    return {(r.astype(int).tobytes(), (np.rint(t * 24).astype(int) % 24).tobytes())
            for r, t in zip(database["rotations"], database["translations"])}


def _operations(text, origin_shift=0):
    """Closure of a generator string, in coordinates x - origin_shift * shift of its tail."""
    generators = sg.parse_generator(text)
    rotations, translations = sg.close(generators)
    moved = translations + (rotations - np.eye(3, dtype=int)) @ generators.origin_shift * origin_shift
    return {(r.tobytes(), (t % 24).tobytes()) for r, t in zip(rotations, moved)}


def test_generators_are_pymatgens():
    data = json.loads((Path(pymatgen.symmetry.__file__).parent / "symm_data.json").read_text())
    expected = {v["int_number"]: v["enc"] for v in data["space_group_encoding"].values()}
    assert {n: sg.generator(n) for n in GROUPS} == expected


@pytest.mark.parametrize("space_group", GROUPS)
def test_closure_equals_spglibs_setting(space_group):
    found = _operations(sg.generator(space_group))
    assert found == _spglib_operations(sg.hall_number(space_group))
    assert spglib.get_spacegroup_type(sg.hall_number(space_group)).number == space_group
    exact = {(np.array(r).tobytes(), np.array([int(x * 24) for x in t]).tobytes())
             for r, t in sg.operations(space_group)}
    assert exact == found


def test_origin_tail_leads_to_origin_choice_2():
    two_origins = [n for n in GROUPS if sg.origin_choice(n) == "1"]
    assert len(two_origins) == 24 and two_origins == [n for n in GROUPS if not sg.generator(n).endswith("0")]
    for n in two_origins:
        second = sg.hall_number(n) + 1
        assert spglib.get_spacegroup_type(second).choice == "2"
        assert _operations(sg.generator(n), origin_shift=-1) == _spglib_operations(second)


def test_examples_of_the_paper():
    """Appendix A.2.1; its string for No. 35 is a misprint (it is that of No. 44 without the tail)."""
    assert [sg.generator(n) for n in (36, 38, 42, 44)] == [
        "03aDDObOODjOOD0", "03aODDbOOOjOOO0", "04aODDaDODbOOOjOOO0", "03aDDDbOOOjOOO0"]
    assert sg.generator(35) == "03aDDObOOOjOOO0"
    with pytest.raises(ValueError, match="expected flag, count, 4 letters per generator and a tail"):
        sg.parse_generator("03aDDDbOOOjOOO")


def test_published_deviations():
    changed = [n for n in GROUPS if sg.generator(n, "published") != sg.generator(n)]
    assert changed == [39, 131, 222]
    generated = {n: spglib.get_spacegroup_type_from_symmetry(*_arrays(sg.generator(n, "published"))).number
                 for n in changed}
    assert generated == {39: 21, 131: 130, 222: 222}
    assert _operations(sg.generator(222, "published")) == _spglib_operations(519)


def _arrays(text):
    rotations, translations = sg.close(sg.parse_generator(text))
    return rotations, translations / 24


def test_wyckoff_tables_are_complete():
    assert sum(len(sg.wyckoff_positions(n)) for n in GROUPS) == 1731  # International Tables A
    rng = np.random.default_rng(0)
    for n in GROUPS:
        for position in sg.wyckoff_positions(n):
            assert len(orbit_of(n, random_point(position, rng))) == position.multiplicity
    assert sg.wyckoff_positions(221)[2] == ("c", 3, "4/mm.m", "0,1/2,1/2")
    assert sg.wyckoff_positions(47)[-1].symbol == "8A"


@pytest.mark.parametrize("space_group", [3, 64, 155, 205, 216])
def test_wyckoff_table_derived_again(space_group):
    found = derive_positions(space_group, np.random.default_rng(1))
    assert [p[:3] for p in found] == [p[:3] for p in sg.wyckoff_positions(space_group)]


@pytest.mark.parametrize("space_group", [14, 64, 99, 155, 205, 216])
def test_normalizer_permutations_derived_again(space_group):
    """The shipped generators and newly found ones span the same permutations."""
    shipped = sg.normalizer_permutations(space_group)
    assert shipped[0] == sg.LETTERS[: len(sg.wyckoff_positions(space_group))]
    found = normalizer_steps(space_group, np.random.default_rng(2), limit=200)
    assert set(found) <= set(shipped)
    assert _span(shipped[0], found) == set(shipped)


def _span(identity, steps):
    known = {identity}
    while True:
        more = {w.translate(str.maketrans(identity, s)) for w in known for s in steps} - known
        if not more:
            return known
        known |= more


def test_known_normalizer_actions():
    """P-1: affine group of the 8 inversion centres; Pm-3m: origin at 1/2,1/2,1/2; Pmmm: 8 origins, 6 axes."""
    assert len(sg.normalizer_permutations(2)) == 1344
    assert sg.normalizer_permutations(221) == ("abcdefghijklmn", "badcfeghjilkmn")
    assert len(sg.normalizer_permutations(47)) == 48
    assert sg.normalizer_permutations(230) == ("abcdefgh",)
    for n in GROUPS:  # equivalent positions have equal multiplicities
        sizes = sg.multiplicities(n)
        for p in sg.normalizer_permutations(n):
            assert all(sizes[a] == sizes[b] for a, b in zip(sg.LETTERS, p))


def test_names_and_errors():
    assert (sg.hm_symbol(221), sg.hall_number(221), sg.origin_choice(227)) == ("Pm-3m", 517, "1")
    assert all(sg.space_group_of(sg.generator(n, t)) == n for n in GROUPS for t in sg.TABLES)
    for number in (0, 231):
        with pytest.raises(ValueError, match="expected a number from 1 to 230"):
            sg.generator(number)
    with pytest.raises(ValueError, match="expected one of .*'corrected', 'published'"):
        sg.generator(1, "new")
    with pytest.raises(ValueError, match="expected one of the 230"):
        sg.space_group_of("12")
