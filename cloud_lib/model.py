"""The encoder: transformers' BERT weights, evaluated on packed tokens without padding.

Linear layers, layer norms and GELU, over 95 % of the work, see one (n_tokens, width) array. Attention alone
needs to know where the strings begin and end: in bfloat16 on CUDA one variable-length kernel does it;
elsewhere queries, keys and values are spread over (strings, longest) with a mask for that one step. The
outputs are those of the padded transformers model on the same weights (tests/test_model.py).
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel

from cloud_lib import io

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older torch: the runs of equal length serve CUDA too
    varlen_attn = None

WEIGHTS_FILE, HEAD_FILE, META_FILE = "model.safetensors", "head.safetensors", "cloud.json"
TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")  # transformers ties them on loading


# ---------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class EncoderConfig:
    """Size of the encoder; the paper's is 12 layers, 12 heads, 768 wide (Table 4).

    vocab_size None = the data's vocabulary. Attention weights have no dropout (the variable-length kernel has
    none); `dropout` acts on the embeddings and on each sub-layer's output, as in BERT.
    """

    n_layers: int = 12
    n_heads: int = 12
    head_dim: int = 64
    vocab_size: int | None = None
    max_positions: int = 64
    dropout: float = 0.1

    @property
    def width(self) -> int:
        return self.n_heads * self.head_dim

    def bert_config(self) -> BertConfig:
        """The same as a transformers configuration.

        Raises:
            ValueError: a size is missing or not positive.
        """
        sizes = {"n_layers": self.n_layers, "n_heads": self.n_heads, "head_dim": self.head_dim,
                 "vocab_size": self.vocab_size, "max_positions": self.max_positions}
        if wrong := {name: value for name, value in sizes.items() if not value or value < 1}:
            raise ValueError(f"expected positive encoder sizes, found {wrong}")
        return BertConfig(
            vocab_size=self.vocab_size, hidden_size=self.width, num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads, intermediate_size=4 * self.width,
            max_position_embeddings=self.max_positions, hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=0.0, type_vocab_size=2, pad_token_id=0)

    @classmethod
    def from_bert(cls, config: BertConfig) -> "EncoderConfig":
        return cls(n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads,
                   head_dim=config.hidden_size // config.num_attention_heads, vocab_size=config.vocab_size,
                   max_positions=config.max_position_embeddings, dropout=config.hidden_dropout_prob)


# ------------------------------------------------------------------------------------ the packed forward
class Packed(NamedTuple):
    """A batch on the device: N tokens of B strings, shortest string first."""

    input_ids: Tensor      # (N,) int64
    position_ids: Tensor   # (N,) int64
    starts: Tensor         # (B + 1,) int32, first token of each string, then N
    masked: Tensor         # (M,) int64, places among the N tokens where a loss is taken
    labels: Tensor         # (M,) int64, true ids there
    target: Tensor         # (B,) float32, z-scored; empty in pre-training
    longest: int           # largest length; with the variable-length kernel an upper bound
    place: Tensor | None   # (N,) int64, place of each token in (B, longest); None = variable-length kernel
    mask: Tensor | None    # (B, 1, 1, longest) float, -inf where there is no token; None = all equally long
    task: Tensor | None = None  # (B,) int64, the output that is wanted; None = the only one

    @classmethod
    def of(cls, batch: Any, device: torch.device | str = "cpu", varlen: bool = False,
           target: np.ndarray | None = None, task: np.ndarray | None = None) -> "Packed":
        """From a dataset.Batch; copies to a GPU without waiting for it.

        Args:
            varlen: attend with CUDA's variable-length kernel (half precision only).
            target, task: (B,) in the order of batch.rows.
        """
        if np.any(np.diff(batch.lengths) < 0):
            raise ValueError("expected strings sorted by length, found them unsorted; use dataset.make_batch")
        starts = np.concatenate([[0], np.cumsum(batch.lengths)]).astype(np.int32)
        target = np.empty(0, np.float32) if target is None else target.astype(np.float32)
        arrays = (batch.input_ids, batch.position_ids(), starts, batch.masked, batch.labels, target)
        tensors = [_to_device(array, device) for array in arrays]
        task = None if task is None else _to_device(task, device)
        longest = int(batch.lengths[-1])
        if varlen:  # few values of `longest`, so that torch.compile compiles once
            return cls(*tensors, 64 * -(-longest // 64), None, None, task)
        inside = np.arange(longest) < batch.lengths[:, None]
        place = _to_device(np.flatnonzero(inside), device)
        bias = np.where(inside, 0, -np.inf).astype(np.float32)[:, None, None]
        return cls(*tensors, longest, place, None if inside.all() else _to_device(bias, device), task)


def _to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def encode(bert: BertModel, batch: Packed) -> Tensor:
    """Last hidden states of all tokens, (N, width)."""
    x = embed(bert, batch)
    for layer in bert.encoder.layer:
        x = _apply(layer, x, x, batch)
    return x


def encode_cls(bert: BertModel, batch: Packed) -> Tensor:
    """Last hidden state of every string's [CLS], (B, width).

    The same as encode(...) there, but the last layer does not update the tokens that nobody reads afterwards.
    """
    x = embed(bert, batch)
    for layer in bert.encoder.layer[:-1]:
        x = _apply(layer, x, x, batch)
    return _apply(bert.encoder.layer[-1], x.index_select(0, batch.starts[:-1]), x, batch)


def embed(bert: BertModel, batch: Packed) -> Tensor:
    """Sum of word, position and type embeddings after layer norm and dropout, (N, width)."""
    return bert.embeddings(batch.input_ids[None], position_ids=batch.position_ids[None])[0]


def _apply(layer: nn.Module, asking: Tensor, x: Tensor, batch: Packed) -> Tensor:
    """One BERT layer: the tokens `asking` (all, or the first of each string) attend to all tokens x."""
    attention = layer.attention
    heads = (-1, attention.self.num_attention_heads, attention.self.attention_head_size)
    q, k, v = (linear(tokens).view(heads) for linear, tokens in (
        (attention.self.query, asking), (attention.self.key, x), (attention.self.value, x)))
    asking = attention.output(attend(q, k, v, batch), asking)
    return layer.output(layer.intermediate(asking), asking)


def attend(q: Tensor, k: Tensor, v: Tensor, batch: Packed) -> Tensor:
    """Softmax attention inside each string.

    k, v (N, heads, head_dim); q the same, or (B, heads, head_dim) for one query per string.
    Returns (N or B, heads * head_dim).
    """
    n_strings, one_each = len(batch.starts) - 1, len(q) < len(k)
    if batch.place is None:
        starts = torch.arange(n_strings + 1, dtype=torch.int32, device=q.device) if one_each else batch.starts
        longest = 1 if one_each else batch.longest
        return varlen_attn(q, k, v, starts, batch.starts, longest, batch.longest).flatten(1)
    q = q[:, :, None] if one_each else _spread(q, batch)
    out = _attend_padded(q, _spread(k, batch), _spread(v, batch), batch.mask)
    out = out.transpose(1, 2).flatten(0, 1).flatten(1)
    return out if one_each else out.index_select(0, batch.place)


def _spread(x: Tensor, batch: Packed) -> Tensor:
    """(N, heads, head_dim) -> (B, heads, longest, head_dim), zero where there is no token."""
    n_strings = len(batch.starts) - 1
    out = x.new_zeros(n_strings * batch.longest, *x.shape[1:]).index_copy(0, batch.place, x)
    return out.unflatten(0, (n_strings, batch.longest)).transpose(1, 2)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    mask = None if mask is None else mask.to(q.dtype)
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3))  # torch 2.13's fused backward is
    return torch.matmul((scores if mask is None else scores + mask).softmax(-1), v)  # 8 times slower here


class MaskedLM(nn.Module):
    """Encoder and MLM head; the head sees the masked tokens only."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.mlm = BertForMaskedLM(config.bert_config())

    @property
    def bert(self) -> BertModel:
        return self.mlm.bert

    def forward(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Sum of the masked tokens' losses [nats], and their logits (M, vocab_size)."""
        x = encode(self.bert, batch)
        logits = self.mlm.cls(x.index_select(0, batch.masked)).float()
        return F.cross_entropy(logits, batch.labels, reduction="sum"), logits


class Regressor(nn.Module):
    """Encoder and a head on [CLS]: dropout, `n_hidden` layers with SiLU, a linear output (z-scored) per task."""

    def __init__(self, bert: BertModel, n_hidden: int = 1, hidden_width: int | None = None,
                 dropout: float = 0.1, n_outputs: int = 1):
        super().__init__()
        if n_hidden < 0:
            raise ValueError(f"expected n_hidden >= 0, found {n_hidden}")
        width = bert.config.hidden_size
        self.bert = bert
        self.head_config = {"n_hidden": n_hidden, "hidden_width": hidden_width or width, "dropout": dropout,
                            "n_outputs": n_outputs}
        layers: list[nn.Module] = [nn.Dropout(dropout)]
        for _ in range(n_hidden):
            layers += [nn.Linear(width, hidden_width or width), nn.SiLU()]
            width = hidden_width or width
        self.head = nn.Sequential(*layers, nn.Linear(width, n_outputs))

    def forward(self, batch: Packed) -> Tensor:
        """Predicted z-scored target of each string's task, (B,)."""
        cls = encode_cls(self.bert, batch)
        with torch.autocast(cls.device.type, enabled=False):  # bfloat16 would leave the prediction 3 digits
            out = self.head(cls.float())
        return out[:, 0] if batch.task is None else out.gather(1, batch.task[:, None])[:, 0]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """torch's random numbers inside the block depend on `seed` alone; outside they go on undisturbed."""
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


# ------------------------------------------------------------------------------------------------ counts
def n_params_non_embedding(config: EncoderConfig) -> int:
    """Weights of the encoder's layers, the paper's N (Eq. 1): 85,054,464 for 12 x 768."""
    w = config.width
    return config.n_layers * (4 * (w * w + w) + 2 * (4 * w * w) + 4 * w + w + 4 * w)


def encoder_size(model: "MaskedLM | Regressor") -> int:
    """n_params_non_embedding of a model."""
    return n_params_non_embedding(EncoderConfig.from_bert(model.bert.config))


def n_params_total(module: nn.Module) -> int:
    """All distinct parameters (tied ones once)."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(config: EncoderConfig, lengths: np.ndarray, n_masked: int = 0) -> dict[str, int]:
    """Exact matrix-multiplication FLOPs of one forward pass by part (tested with torch's FlopCounterMode)."""
    w, n, per_layer = config.width, int(lengths.sum()), config.n_layers
    return {
        "query_key_value": per_layer * 2 * n * w * 3 * w,
        "attention_scores": per_layer * 4 * w * int((lengths.astype(np.int64) ** 2).sum()),
        "attention_output": per_layer * 2 * n * w * w,
        "feed_forward": per_layer * 2 * n * 2 * (4 * w * w),
        "mlm_head": 2 * n_masked * (w * w + w * (config.vocab_size or 0)),
    }


# --------------------------------------------------------------------------------------- saving, loading
def save_model(model: MaskedLM | Regressor, out_dir: str | os.PathLike, meta: dict[str, Any],
               tokenizer_dir: Path | None = None) -> Path:
    """Write a model folder atomically: transformers' files, cloud.json, and the head of a regressor.

    Args:
        meta: written to cloud.json; has to name the vocabulary (vocab_sha256, vocab_version, vocab_size).
        tokenizer_dir: folder whose tokenizer*.json are copied, so that AutoTokenizer finds them.
    """
    with io.atomic_path(out_dir) as folder:
        folder.mkdir()
        core = model.mlm if isinstance(model, MaskedLM) else model.bert
        core.config.architectures = [type(core).__name__]
        core.config.save_pretrained(folder)
        save_file({name: value.detach().cpu().contiguous() for name, value in core.state_dict().items()
                   if name not in TIED}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if isinstance(model, Regressor):
            save_file({name: value.contiguous().cpu() for name, value in model.head.state_dict().items()},
                      folder / HEAD_FILE)
            meta = meta | {"head": model.head_config}
        for file in sorted(tokenizer_dir.glob("*token*.json")) if tokenizer_dir else []:
            shutil.copy(file, folder / file.name)
        io.write_json(folder / META_FILE, meta)
    return Path(out_dir)


def load_encoder(source: str, vocab_sha256: str | None = None, vocab_size: int | None = None) -> BertModel:
    """Pre-trained encoder from a model folder or, as "hub:OWNER/NAME[/SUBFOLDER]", from the Hugging Face Hub.

    A hub model may have more embedding rows than our vocabulary (the published weights have 30,522): cropped.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another vocabulary, or weights that cannot be read.
    """
    if source.startswith("hub:"):
        owner, name, *rest = source.removeprefix("hub:").split("/")
        bert = BertModel.from_pretrained(f"{owner}/{name}", subfolder="/".join(rest), add_pooling_layer=False,
                                         use_safetensors=True)
        return crop_vocab(bert, vocab_size) if vocab_size else bert
    path = Path(source)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"expected a model folder at {source}, found none; run the pre-training "
                                'first, or say init="scratch"')
    meta = io.read_json(path / META_FILE) if (path / META_FILE).is_file() else {}
    found = meta.get("vocab_sha256")
    if vocab_sha256 and found and found != vocab_sha256:
        raise ValueError(f"expected a model with the data's vocabulary {vocab_sha256[:12]}, found "
                         f"{found[:12]} ({meta.get('vocab_version')}) in {source}; pre-train on the "
                         "data's own")
    try:
        bert = _read_encoder(path)
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"expected readable weights in {source}, found damage: {error}; delete the run and "
                         "train again") from error
    return crop_vocab(bert, vocab_size) if vocab_size and not found else bert


def _read_encoder(path: Path) -> BertModel:
    """Encoder of a folder written by save_model (with or without MLM head) or by transformers."""
    file = path / WEIGHTS_FILE
    if not file.is_file():
        return BertModel.from_pretrained(path, add_pooling_layer=False, use_safetensors=True)
    bert = BertModel(BertConfig.from_pretrained(path), add_pooling_layer=False)
    state = {name.removeprefix("bert."): value for name, value in load_file(file).items()}
    bert.load_state_dict({name: state[name] for name in bert.state_dict()})
    return bert


def crop_vocab(bert: BertModel, vocab_size: int) -> BertModel:
    """Drop embedding rows beyond the vocabulary.

    Raises:
        ValueError: the model has fewer rows than the vocabulary has tokens.
    """
    rows = bert.config.vocab_size
    if rows < vocab_size:
        raise ValueError(f"expected at least {vocab_size} embedding rows, found {rows}; use the model's own "
                         "tokenizer")
    if rows > vocab_size:
        bert.resize_token_embeddings(vocab_size)
    return bert


def set_dropout(bert: BertModel, p: float) -> None:
    """Dropout of the embeddings and of each sub-layer's output; what is saved later says so."""
    bert.config.hidden_dropout_prob = p
    outputs = [output for layer in bert.encoder.layer for output in (layer.attention.output, layer.output)]
    for part in (bert.embeddings, *outputs):
        part.dropout.p = p


def load_regressor(path: str | os.PathLike) -> tuple[Regressor, dict[str, Any]]:
    """Fine-tuned model and its cloud.json (vocabulary, task, mean and std of the target).

    Raises:
        FileNotFoundError: the folder holds no fine-tuned model.
    """
    path = Path(path)
    if not (path / HEAD_FILE).is_file():
        raise FileNotFoundError(f"expected a fine-tuned model with {HEAD_FILE} in {path}, found none; "
                                "run finetune, or give the folder <unit>/model")
    meta = io.read_json(path / META_FILE)
    model = Regressor(load_encoder(str(path)), **meta["head"])
    model.head.load_state_dict(load_file(path / HEAD_FILE))
    return model.eval(), meta


def weights_sha256(model_dir: str | os.PathLike) -> str:
    """Checksum of the weights in a model folder.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(Path(model_dir).glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"expected weights in {model_dir}, found none; run the pre-training first")
    return io.sha256(files[0])


def with_vocab(config: EncoderConfig, vocab_size: int) -> EncoderConfig:
    """`config` for a vocabulary.

    Raises:
        ValueError: it already names another size.
    """
    if config.vocab_size not in (None, vocab_size):
        raise ValueError(f"expected vocab_size {vocab_size} as in the data, found {config.vocab_size}; "
                         "leave it None")
    return dataclasses.replace(config, vocab_size=vocab_size)
