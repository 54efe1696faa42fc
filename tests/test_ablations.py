"""Strings without a part, the same model on each; and the forest that sees the composition only."""

import numpy as np
import pandas as pd
import pytest

from cloud_lib import ablations, curation, experiments, forest, scoring, sources
from cloud_lib.ablations import Variant
from cloud_lib.dataset import PackedTokens
from cloud_lib.model import EncoderConfig
from cloud_lib.representation import ABLATION_STYLES, STYLES
from cloud_lib.tokenizer import Tokenizer
from cloud_lib.train import FinetuneConfig, PretrainConfig, RunConfig

RUN = RunConfig(device="cpu", precision="fp32", progress=False)


@pytest.fixture
def data(miniature_root):
    curation.curate(curation.corpus_items(), miniature_root, n_workers=1)
    curation.prepare_task(sources.load_task("jdft2d"), miniature_root / "tasks", "jdft2d", n_workers=1)
    return miniature_root


def test_every_style_says_what_it_lacks():
    assert {*ablations.SAYS} == {*STYLES, *ABLATION_STYLES}
    chosen = ablations.variants(["canonical", "number", "canonical"], [0.05, 0.15])
    assert [variant.name for variant in chosen] == ["canonical", "number", "canonical, mask 0.05"]
    with pytest.raises(ValueError, match="expected a style of .*, found 'poem'"):
        ablations.variants(["poem"])


def test_variants_are_trained_alike_and_compared(data):
    chosen = [Variant(), Variant("composition"), Variant(mask_prob=0.3)]
    assert ablations.pack(chosen, ["jdft2d"], data)["composition"]["jdft2d"] > 0
    pretraining = PretrainConfig(EncoderConfig(1, 1, head_dim=16), epochs=1, batch_size=16, lr=1e-3, val_fraction=0.1,
                                 run=RUN)
    finetuning = FinetuneConfig(epochs=1, batch_size=8, lr=1e-3, run=RUN)
    found = ablations.run(chosen, pretraining, finetuning, ["jdft2d"], [0, 1], [0], data, data / "runs", 1)
    tested = found[found["split"] == "test"].groupby("model")["row"].agg(frozenset)
    assert tested.nunique() == 1  # the same rows
    table = ablations.table(scoring.scores(found), chosen)
    assert table["mask rate"].tolist() == [0.15, 0.15, 0.3] and table["jdft2d change (%)"][0] == 0
    assert table["space group"].tolist() == ["generators", "-", "generators"] and table["jdft2d"].notna().all()
    again = ablations.baselines(["composition"], pretraining, finetuning, ["jdft2d"], [0], [0], data, data / "runs", 1,
                                only_finished=True)
    assert set(again["model"]) == {"BERT on composition"}  # what has finished is taken, under the name of Table 1
    lengths = PackedTokens.open(ablations.token_dir(data, "composition") / "corpus").lengths
    assert set(lengths % 2) == {0}  # [CLS], element and fraction in turn, [SEP]


def test_features_of_a_formula():
    (row,) = forest.features(["BaTiO3"])
    n, names = len(forest.element_properties()), list(forest.PROPERTIES)
    assert row[[55, 21, 7]] == pytest.approx([0.2, 0.2, 0.6]) and row[:n].sum() == pytest.approx(1)
    z = row[n:].reshape(len(forest.STATISTICS), len(names))[:, names.index("Z")]
    mean = 0.2 * 56 + 0.2 * 22 + 0.6 * 8
    assert z == pytest.approx([mean, 0.2 * (56 - mean) + 0.2 * (22 - mean) + 0.6 * (mean - 8), 8, 56, 48])
    values = dict(zip(names, forest.element_properties()[25]))
    assert (values["Z"], values["s"], values["d"], values["x"]) == (26, 2, 6, 1.83)
    assert np.array_equal(*forest.features(["D2O", "H2O"]))
    assert np.isfinite(forest.element_properties()).all()
    with pytest.raises(ValueError, match="expected elements up to number 103 in a formula, found 'Xx' in 'XxO'"):
        forest.features(["XxO"])


def test_forest_learns_from_the_other_folds(tmp_path):
    """A target that is a function of the composition; the oracle is scikit-learn's own score of a mean."""
    rng = np.random.default_rng(0)
    elements = rng.choice(["Li", "Na", "K", "Mg", "Ca", "Al", "Fe", "Zn"], (200, 2))
    formulas = [f"{a}{n}{b}O3" if a != b else f"{a}{n}O3" for (a, b), n in zip(elements, rng.integers(1, 5, 200))]
    table = pd.DataFrame({"material_id": [f"m{i}" for i in range(200)], "formula_reduced": formulas, "row": range(200),
                          "fold": np.arange(200) % 5, "site": "text"})
    table["target"] = forest.features(formulas)[:, len(forest.element_properties())]  # mean atomic number
    table.loc[0, "site"] = None
    table.to_parquet(tmp_path / "toy.parquet")
    found = forest.forest({"toy": tmp_path / "toy.parquet"}, "site", [0, 1], n_trees=30, n_jobs=1)
    assert list(found) == experiments.PREDICTION_COLUMNS and len(found) == 79 and 0 not in found["row"].tolist()
    error = (found["prediction"] - found["target"]).abs().mean()
    assert error < 0.3 * (found["target"] - table["target"].mean()).abs().mean()
    again = forest.forest({"toy": tmp_path / "toy.parquet"}, "site", [0, 1], n_trees=30, n_jobs=2)
    assert np.array_equal(found["prediction"], again["prediction"])
    with pytest.raises(ValueError, match=r"expected folds of \[0, 1, 2, 3, 4\] for toy, found \[7\]"):
        forest.forest({"toy": tmp_path / "toy.parquet"}, "site", [7])
