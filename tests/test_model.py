"""The unpadded encoder is transformers' BERT; counts are exact; models are saved and loaded whole."""

import numpy as np
import pytest
import torch
from toy_tokens import META, TINY, toy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM, BertModel

from cloud_lib import dataset, model as models
from cloud_lib.model import EncoderConfig, MaskedLM, Packed, Regressor

CONFIG = EncoderConfig(n_layers=3, n_heads=2, head_dim=64, vocab_size=64, max_positions=24)
FLOAT32, BFLOAT16 = 2e-5, 0.06  # largest difference of hidden states of size about 1


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("toy") / "data", 100)


@pytest.fixture(scope="module")
def batch(packed):
    return dataset.training_batch(packed, np.arange(100), 40, 0.15, seed=0, step=0)


def _model(config=CONFIG):
    with models.seeded(0):
        return MaskedLM(config).eval()


def _padded(batch):
    """input_ids, attention_mask and labels as transformers wants them, (B, T)."""
    shape = (len(batch.rows), int(batch.lengths.max()))
    inside = torch.from_numpy(np.arange(shape[1]) < batch.lengths[:, None])
    flat_labels = torch.full((len(batch.input_ids),), -100)
    flat_labels[torch.from_numpy(batch.masked)] = torch.from_numpy(batch.labels)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    ids[inside], labels[inside] = torch.from_numpy(batch.input_ids), flat_labels
    return ids, inside, labels


def _oracle(model, batch, device="cpu"):
    ids, inside, labels = (tensor.to(device) for tensor in _padded(batch))
    with torch.no_grad():
        hidden = model.bert(ids, attention_mask=inside.long()).last_hidden_state
        loss = model.mlm(ids, attention_mask=inside.long(), labels=labels).loss
    return hidden[inside], hidden[:, 0], loss


def test_dropout_of_an_encoder_can_be_changed(batch):
    bert, ours = _model().train().bert, Packed.of(batch)
    same = {}
    for p in (0.0, 0.3):
        models.set_dropout(bert, p)
        one, other = (models.encode(bert, ours) for _ in range(2))
        same[p] = torch.equal(one, other)
    assert same == {0.0: True, 0.3: False} and bert.config.hidden_dropout_prob == 0.3


def test_unpadded_equals_padded_transformers_bert(batch):
    model, ours = _model(), Packed.of(batch)
    hidden, cls, loss = _oracle(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(models.encode(model.bert, ours), hidden, atol=FLOAT32, rtol=0)
        torch.testing.assert_close(models.encode_cls(model.bert, ours), cls, atol=FLOAT32, rtol=0)
        total, logits = model(ours)
    assert float(total) / len(batch.labels) == pytest.approx(float(loss), abs=1e-5)
    assert logits.shape == (len(batch.labels), CONFIG.vocab_size)


def test_unpadded_in_bfloat16_is_close_to_float32(batch):
    model = _model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = models.encode(model.bert, Packed.of(batch))
        cls = models.encode_cls(model.bert, Packed.of(batch))
    expected, expected_cls, _ = _oracle(model, batch)
    torch.testing.assert_close(hidden.float(), expected, atol=BFLOAT16, rtol=0)
    torch.testing.assert_close(cls.float(), expected_cls, atol=BFLOAT16, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("varlen", "dtype", "tolerance"), [(False, torch.float32, 1e-4),
                                                            (True, torch.bfloat16, BFLOAT16)])
def test_unpadded_equals_padded_on_a_gpu(batch, varlen, dtype, tolerance):
    model = _model().cuda()
    hidden, cls, _ = _oracle(model, batch, "cuda")
    ours = Packed.of(batch, "cuda", varlen)
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=varlen):
        torch.testing.assert_close(models.encode(model.bert, ours).float(), hidden, atol=tolerance, rtol=0)
        torch.testing.assert_close(models.encode_cls(model.bert, ours).float(), cls, atol=tolerance, rtol=0)


def test_micro_batches_give_the_whole_batch_s_gradient(batch):
    gradients = []
    for budget in (10_000, 60):
        model = _model()
        for piece in dataset.micro_batches(batch, budget):
            (model(Packed.of(piece))[0] / len(batch.labels)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_unsorted_batches_are_refused(batch):
    with pytest.raises(ValueError, match="expected strings sorted by length"):
        Packed.of(batch._replace(lengths=batch.lengths[::-1]))


def test_parameter_counts_are_the_papers():
    paper = EncoderConfig(vocab_size=564)
    assert models.n_params_non_embedding(paper) == 85_054_464  # 12 x 768 without embeddings
    with torch.device("meta"):
        bert = BertModel(paper.bert_config(), add_pooling_layer=False)
    assert models.n_params_total(bert.encoder) == 85_054_464
    model = _model()
    assert models.encoder_size(model) == models.n_params_total(model.bert.encoder)


def test_flop_counts_are_torch_s(packed):
    """On strings of equal length: shorter ones cost attention the longest one's in torch's count."""
    batch = dataset.mask_batch(dataset.make_batch(packed, np.flatnonzero(packed.lengths == 12)), META, 0.3, (0,))
    model, counter = _model(), FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(Packed.of(batch))
    expected = models.forward_flops(CONFIG, batch.lengths, len(batch.masked))
    assert sum(expected.values()) == counter.get_total_flops()
    weights = expected["query_key_value"] + expected["attention_output"] + expected["feed_forward"]
    assert 3 * weights == pytest.approx(  # 6 N D counts biases and layer norms too
        6 * models.n_params_non_embedding(CONFIG) * len(batch.input_ids), rel=0.02)


@pytest.mark.parametrize("field", ["n_layers", "n_heads", "head_dim", "vocab_size", "max_positions"])
def test_sizes_have_to_be_positive(field):
    sizes = {"n_layers": 1, "n_heads": 1, "head_dim": 8, "vocab_size": 9, "max_positions": 8}
    with pytest.raises(ValueError, match=f"expected positive encoder sizes, found .*{field}"):
        EncoderConfig(**sizes | {field: 0}).bert_config()


def test_another_vocabulary_size_is_refused():
    assert models.with_vocab(TINY, 64).vocab_size == 64
    with pytest.raises(ValueError, match="expected vocab_size 65 as in the data, found 64"):
        models.with_vocab(CONFIG, 65)


def test_a_saved_model_is_read_by_us_and_by_transformers(tmp_path, batch):
    model = _model()
    models.save_model(model, tmp_path / "m", META)
    theirs, report = BertForMaskedLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.cls.predictions.decoder.weight is theirs.bert.embeddings.word_embeddings.weight
    ours = models.load_encoder(str(tmp_path / "m"), META["vocab_sha256"], 64).eval()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, model.bert.state_dict()[name]) and torch.equal(value, theirs.bert.state_dict()[name])


def test_a_saved_regressor_comes_back(tmp_path, batch):
    with models.seeded(1):
        model = Regressor(_model().bert, n_hidden=2, hidden_width=20).eval()
    models.save_model(model, tmp_path / "m", META | {"tasks": ["t"], "target_mean": 1.0, "target_std": 2.0})
    again, meta = models.load_regressor(tmp_path / "m")
    assert meta["target_std"] == 2.0
    with torch.no_grad():
        assert torch.equal(model(Packed.of(batch)), again(Packed.of(batch)))
    with pytest.raises(ValueError, match="expected n_hidden >= 0, found -1"):
        Regressor(_model().bert, n_hidden=-1)


def test_models_that_do_not_fit_are_refused(tmp_path):
    models.save_model(_model(), tmp_path / "m", META)
    with pytest.raises(ValueError, match="data's vocabulary bbbbbbbbbbbb, found aaaaaaaaaaaa"):
        models.load_encoder(str(tmp_path / "m"), "b" * 64)
    with pytest.raises(FileNotFoundError, match='or say init="scratch"'):
        models.load_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="expected a fine-tuned model with head.safetensors"):
        models.load_regressor(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected readable weights in .* found damage"):
        models.load_encoder(str(tmp_path / "m"))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="expected weights in"):
        models.weights_sha256(tmp_path / "m")


def test_hub_models_are_fetched_by_name_and_cropped(monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return _model().bert

    monkeypatch.setattr(BertModel, "from_pretrained", fetch)
    bert = models.load_encoder("hub:OWNER/NAME/ckpt", vocab_size=50)
    assert (asked["name"], asked["subfolder"]) == ("OWNER/NAME", "ckpt")
    assert bert.embeddings.word_embeddings.weight.shape[0] == bert.config.vocab_size == 50
    with pytest.raises(ValueError, match="expected at least 70 embedding rows, found 64"):
        models.load_encoder("hub:OWNER/NAME", vocab_size=70)
