"""Generated strings: charge-balanced, new, distinct, reproducible."""

from itertools import product

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Composition, Element

from cloud_lib import curation, generate
from cloud_lib.representation import parse
from cloud_lib.tokenizer import Tokenizer
from test_curation import crystals, rock_salt


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "BATCH", 5000)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    curation.curate(crystals(), folder, n_workers=1)
    return folder / "corpus.parquet"


@pytest.fixture(scope="module")
def generated(corpus, tmp_path_factory):
    target = tmp_path_factory.mktemp("generated") / "strings.parquet"
    return generate.write(corpus, target, 10_000, seed=1), pq.read_table(target).to_pandas()


def test_prototypes_forget_elements_and_origin(corpus):
    found = generate.prototypes(corpus)
    assert [(p.space_group, p.amounts) for p in found] == [(225, (1, 1)), (221, (1, 1, 3))]
    shifted = "0 4 a | Na 4b Cl 4a | Na 0.5 Cl 0.5"
    head = pq.read_table(corpus).to_pandas().query("space_group == 225").site.iloc[0].partition("|")[0]
    slots = generate._slots(head + shifted.partition("a ")[2])
    assert generate._smallest(225, slots) == found[0].slots


def test_every_string_is_new_distinct_and_of_its_prototype(corpus, generated):
    counts, table = generated
    known = pd.read_parquet(corpus)
    assert counts["n"] == len(table) == table["site"].nunique() > 200 and counts["n_corpus"] == len(known)
    assert not set(table["site"]) & set(known["site"])
    prototype = known.set_index("material_id").loc[table["prototype"]]
    assert (prototype["space_group"].to_numpy() == table["space_group"]).all()
    assert [sorted(parse(s, "site").wyckoff.values()) for s in table["site"]] == [
        sorted(parse(s, "site").wyckoff.values()) for s in prototype["site"]]
    Tokenizer.default().encode_many(table["site"])  # an unknown word would raise


def test_common_oxidation_states_balance_and_cations_are_electropositive(corpus, generated):
    for formula in generated[1]["formula_reduced"].unique():
        amounts = Composition(formula).get_el_amt_dict()
        states = [Element(e).common_oxidation_states for e in amounts]
        assert any(sum(q * n for q, n in zip(choice, amounts.values(), strict=True)) == 0 and
                   max(Element(e).X for e, q in zip(amounts, choice, strict=True) if q > 0) <=
                   min(Element(e).X for e, q in zip(amounts, choice, strict=True) if q < 0)
                   for choice in product(*states) if 0 not in choice), formula


def test_exhaustive_on_a_small_space(tmp_path):
    """One binary prototype: what is written is everything that the rules allow, and then it ends."""
    salts = [rock_salt(f"{c}{x}", c, x) for c, x in (("Li", "F"), ("Na", "Cl"), ("Mg", "O"))]
    curation.curate([(s["id"], "test", s) for s in salts], tmp_path, n_workers=1)
    counts = generate.write(tmp_path / "corpus.parquet", tmp_path / "new.parquet", 1000)
    formulas = set(pq.read_table(tmp_path / "new.parquet").to_pandas()["formula_reduced"])
    assert formulas == {"LiCl", "NaF", "ClF"} and counts["n"] == 3  # Mg 2+ and O 2- pair only with each other


def test_same_seed_same_file_and_fewer_are_a_prefix(corpus, generated, tmp_path):
    again = generate.write(corpus, tmp_path / "again.parquet", 10_000, seed=1)
    assert again == generated[0]
    assert pq.read_table(tmp_path / "again.parquet").to_pandas().equals(generated[1])
    generate.write(corpus, tmp_path / "few.parquet", 50, seed=1)
    assert pq.read_table(tmp_path / "few.parquet").to_pandas().equals(generated[1][:50])


def test_seen_counts_every_text_once():
    seen = generate.Seen()
    assert seen.new(["b", "a", "b"]).tolist() == [0, 1]
    assert seen.new(["c", "a", "d", "c"]).tolist() == [0, 2]
    assert len(seen.digests) == 4 and (np.diff(seen.digests.astype(object)) > 0).all()


def test_a_corpus_without_prototypes_is_an_error(corpus, tmp_path):
    table = pq.read_table(corpus)
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="expected site strings with 2 to 5 elements"):
        generate.write(tmp_path / "empty.parquet", tmp_path / "new.parquet", 10)
