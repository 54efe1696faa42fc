"""Hugging Face: round trips, a push to a stub of the Hub, and weights in the published layout."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import HfApi
from pymatgen.core import Lattice, Structure
from safetensors.torch import load_file, save_file
from toy_models import write_runs
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from cloud_lib import bundle, cli, hub, io, predict, use
from cloud_lib.dataset import PackedTokens
from cloud_lib.model import load_encoder
from cloud_lib.representation import string
from cloud_lib.symmetry import symmetry_record
from cloud_lib.tokenizer import Tokenizer

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
ROWS = 600  # more than the 564 tokens, as the published 30,522, but small


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD_ROOT", str(root))
        return bundle.write(bundle.find(write_runs(root)), root / "models")


# ---------------------------------------------------------------------------------------------- round trips
def test_transformers_loads_encoder_and_tokenizer(models, tmp_path):
    """AutoModel and AutoTokenizer alone give our [CLS] vector, also after save_pretrained."""
    text = string(symmetry_record(SALT))
    model = AutoModel.from_pretrained(models.folder / "encoder", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(models.folder / "encoder")
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    for folder in (models.folder / "encoder", tmp_path / "again"):
        model = BertModel.from_pretrained(folder, dtype="float32", add_pooling_layer=False).eval()
        inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == Tokenizer.default().encode(text)
        with torch.no_grad():
            vector = model(input_ids=inputs["input_ids"]).last_hidden_state[0, 0].numpy()
        assert use.embed_structures([SALT], models)[0] == pytest.approx(vector, abs=0.03)
    assert BertConfig.from_pretrained(models.folder / "encoder").dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------- pushing
class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push needs: make a repository, take the files of one commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        if self.server.status != 200:
            return self._answer({"error": "no"}, self.server.status)
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self._answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                           for f in files]})
        url = f"http://localhost:{self.server.server_port}/me/cloud"
        return self._answer({"url": url, "commitUrl": f"{url}/commit/abc", "commitOid": "abc", "success": True})

    def do_GET(self):
        self._answer({"id": "me/cloud", "siblings": []}, self.server.status)

    def _answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("localhost", 0), _Hub) as server:
        server.requests, server.status = [], 200
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_push_sends_every_file_in_one_commit(models, server):
    api = HfApi(endpoint=f"http://localhost:{server.server_port}", token="hf_secret")
    assert hub.push(models.folder, "me/cloud", api=api).endswith("/me/cloud/commit/abc")
    made, *_, (path, token, commit) = server.requests
    assert made[0] == "/api/repos/create" and json.loads(made[2])["visibility"] == "private"
    assert path == "/api/models/me/cloud/commit/main" and token == "Bearer hf_secret"
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in map(json.loads, commit.splitlines()) if line["key"] == "file"}
    assert sent == {file.relative_to(models.folder).as_posix(): file.read_bytes()
                    for file in models.folder.rglob("*") if file.is_file()}


def test_what_cannot_be_pushed(models, server, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="expected models.json or config.json in"):
        hub.push(tmp_path, "me/cloud")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="expected safetensors only .*pytorch_model.bin"):
        hub.push(tmp_path, "me/cloud")
    server.status = 401
    with pytest.raises(ValueError, match="expected the Hub to take me/cloud, found: .*401"):
        hub.push(models.folder, "me/cloud", api=HfApi(endpoint=f"http://localhost:{server.server_port}", token="x"))
    assert cli.main(["hub", "push", str(tmp_path), "me/cloud"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ----------------------------------------------------------------------------------------- published weights
def _published(folder, tied=False, rows=ROWS):
    """A checkpoint in the published layout: transformers' names, too many rows, row 0 zero."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=128, max_position_embeddings=64, tie_word_embeddings=tied)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0] = 0
        model.cls.predictions.bias.normal_()
        if not tied:
            model.cls.predictions.decoder.weight.normal_()
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(folder)
    state = {k: v.clone() for k, v in model.state_dict().items() if not (tied and "decoder" in k)}
    state.pop("cls.predictions.decoder.bias", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_published_weights_give_what_transformers_gives(tmp_path, tied):
    theirs, tokenizer = _published(tmp_path / "theirs", tied), Tokenizer.published()
    folder = hub.convert_published(tmp_path / "theirs", tmp_path / "ours")
    text = string(symmetry_record(SALT), "paper", "published")
    ids = torch.tensor([tokenizer.encode(text)])
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids[0].tolist()
    ours = AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[..., :564]
        assert ours(input_ids=ids).logits.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
        state = theirs.bert(input_ids=ids).last_hidden_state[0, 0].numpy()
    bert = load_encoder(str(folder), tokenizer.sha256, 564)
    assert bert.config.vocab_size == 564 and not bert.embeddings.word_embeddings.weight[0].any()
    tokens, offsets = tokenizer.encode_many([text])
    packed = PackedTokens(tmp_path, tokens, offsets, {"vocab_sha256": tokenizer.sha256, "style": "paper"})
    assert predict.embeddings(folder, packed, precision="fp32")[0] == pytest.approx(state, abs=1e-5)


def test_published_weights_embed_crystals(tmp_path):
    """The encoder of a bundle may be the published one: paper style, published generators, 564 tokens."""
    theirs = _published(tmp_path / "theirs")
    encoder = hub.convert_published(tmp_path / "theirs", tmp_path / "runs/encoder")
    models = bundle.Bundle(tmp_path / "runs", {}, "encoder", bundle._recipe(encoder, {}), {})
    group_39 = Structure.from_spacegroup(39, Lattice.orthorhombic(5, 6, 7), ["Si", "O", "Na"],
                                         [[0.1, 0.2, 0.3], [0.4, 0.15, 0.6], [0.23, 0.08, 0.81]])
    text = string(symmetry_record(group_39), "paper", "published")
    assert text != string(symmetry_record(group_39), "paper")
    with torch.no_grad():
        expected = theirs.bert(input_ids=torch.tensor([Tokenizer.published().encode(text)])).last_hidden_state[0, 0]
    assert use.embed_structures([group_39], models)[0] == pytest.approx(expected.numpy(), abs=0.05)


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("bert.encoder.layer.1.output.dense.bias"), "1 are missing, e.g. .'bert.encoder.layer.1.output"),
    (lambda w: w.update({"regressor.weight": torch.zeros(1)}), "found 1 others, e.g. .'regressor.weight'"),
    (lambda w: w.update({hub.WORDS: torch.zeros(500, 32)}), r"expected at least 564 rows .*30522.*, found 500"),
    (lambda w: w.update({hub.DECODER: torch.zeros(570, 32)}), r"decoder.weight with shape \(600, 32\), found \(570"),
    (lambda w: w.update({"bert.embeddings.LayerNorm.bias": torch.zeros(48)}), r"LayerNorm.bias with shape \(32,\)"),
])
def test_another_layout_is_refused_with_the_difference(tmp_path, change, message):
    _published(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        hub.convert_published(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_sources_that_are_not_the_published_weights(tmp_path, capsys):
    folder = tmp_path / "published"
    with pytest.raises(FileNotFoundError, match="expected a folder or OWNER/NAME"):
        hub.convert_published(folder, tmp_path / "ours")
    _published(folder)
    (folder / "vocab.txt").write_text("\n".join([*Tokenizer.published().tokens[:10], "other"]))
    with pytest.raises(ValueError, match="found 1 other words in vocab.txt, e.g. line 10: 'other'"):
        hub.convert_published(folder, tmp_path / "ours")
    (folder / "vocab.txt").unlink()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(ValueError, match="expected readable weights in .*found damage"):
        hub.convert_published(folder, tmp_path / "ours")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle, which is never opened"):
        hub.convert_published(folder, tmp_path / "ours")
    io.write_json(folder / "config.json", {"model_type": "gpt2"})
    (folder / "model.safetensors").write_bytes(data)
    assert cli.main(["hub", "convert", str(folder), str(tmp_path / "ours")]) == 2
    assert "expected model_type bert in" in capsys.readouterr().err


def test_the_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*args, **options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="expected .* on the Hub, found: no network"):
        hub.convert_published(out_dir=tmp_path / "ours")
