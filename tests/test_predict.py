"""A saved model predicts what it predicted in training, whatever the order and the batches."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_tokens import TINY, toy
from transformers import BertModel

from cloud_lib import dataset, predict
from cloud_lib.dataset import PackedTokens
from cloud_lib.train import FinetuneConfig, RunConfig, finetune

RUN = RunConfig(device="cpu", precision="fp32", progress=False)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("toy") / "task", 100, labels=True)


@pytest.fixture(scope="module")
def models(packed, tmp_path_factory):
    """Two fine-tuned models, folds 0 and 1."""
    out_dir = tmp_path_factory.mktemp("runs")
    config = FinetuneConfig(encoder=replace(TINY, max_positions=24), epochs=2, batch_size=16, run=RUN)
    for fold in (0, 1):
        finetune(replace(config, fold=fold), packed.path, out_dir / str(fold))
    return [out_dir / str(fold) / "model" for fold in (0, 1)]


def test_predictions_are_those_of_training(packed, models):
    found = predict.predict(models[0], packed, precision="fp32", token_budget=100)
    with open(models[0].parent / "predictions.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    where = [int(row["row"]) for row in rows]
    assert found[where] == pytest.approx([float(row["prediction"]) for row in rows], abs=1e-5)


def test_bfloat16_is_close(packed, models):
    exact, fast = (predict.predict(models[0], packed, "cpu", precision) for precision in ("fp32", "bf16"))
    assert fast == pytest.approx(exact, abs=0.02 * exact.std() + 0.01)


def test_order_and_batches_do_not_matter(packed, models):
    order = np.random.default_rng(0).permutation(len(packed))
    tokens, lengths = dataset.gather(packed, order)
    shuffled = PackedTokens(packed.path, tokens, np.concatenate([[0], np.cumsum(lengths)]), packed.meta)
    first, second = (predict.predict(models[0], strings, precision="fp32", token_budget=budget)
                     for strings, budget in ((packed, 10_000), (shuffled, 50)))
    assert second == pytest.approx(first[order], abs=1e-5)


def test_embeddings_and_attention_are_transformers(packed, models):
    theirs = BertModel.from_pretrained(models[0], add_pooling_layer=False, attn_implementation="eager").eval()
    found = predict.embeddings(models[0], packed, precision="fp32")
    assert found.shape == (100, 32) and found.dtype == np.float32
    ids = packed.item(7).astype(int)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)[None], output_attentions=True)
    assert found[7] == pytest.approx(expected.last_hidden_state[0, 0].numpy(), abs=1e-5)
    maps = predict.attention(models[0], ids)
    assert maps.shape == (2, 2, len(ids), len(ids)) and maps.sum(-1) == pytest.approx(1, abs=1e-5)
    assert maps == pytest.approx(torch.cat(expected.attentions).numpy(), abs=1e-6)


def test_strings_that_do_not_fit_the_model_are_refused(tmp_path, packed, models):
    with pytest.raises(ValueError, match="model's vocabulary aaaaaaaaaaaa, found bbbbbbbbbbbb; pack them"):
        predict.predict(models[0], toy(tmp_path / "vocab", 20, vocab_sha256="b" * 64))
    with pytest.raises(ValueError, match='strings of style "canonical" as in training, found "site"'):
        predict.embeddings(models[0], toy(tmp_path / "style", 20, style="site"))
    with pytest.raises(ValueError, match="expected 1 to 24 tokens, found 25; give the ids of one string"):
        predict.attention(models[0], [1] * 25)
    with pytest.raises(FileNotFoundError, match="expected a model folder at"):
        predict.embeddings(tmp_path, packed)
