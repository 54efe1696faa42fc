"""Fine-tuned models at work: predictions, ensembles, [CLS] embeddings, attention maps."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cloud_lib import dataset, io, model as models, runtime
from cloud_lib.dataset import PackedTokens
from cloud_lib.model import Packed

TOKEN_BUDGET = 16_384  # tokens per forward pass


def predict(model_dir: str | os.PathLike, packed: PackedTokens, device: str = "auto", precision: str = "auto",
            token_budget: int = TOKEN_BUDGET) -> np.ndarray:
    """Predictions of one fine-tuned model in the target's unit, float64 (n,) in the order of `packed`.

    Args:
        model_dir: <out_dir>/model of a fine-tuning unit.
        precision: "auto" is bfloat16 where that is fast (the head is always float32); "fp32" is exact.
    Raises:
        FileNotFoundError: no such model.
        ValueError: the strings have another vocabulary, or are longer than the model's positions.
    """
    model, meta = models.load_regressor(model_dir)
    _require_fit(packed, meta, model.bert, model_dir)
    scaled = _forward(model, model, packed, device, precision, token_budget)
    return scaled.astype(np.float64) * meta["target_std"] + meta["target_mean"]


def predict_ensemble(model_dirs: Sequence[str | os.PathLike], packed: PackedTokens, device: str = "auto",
                     precision: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over several models (folds or seeds), each float64 (n,).

    Raises:
        ValueError: no models; otherwise as `predict`.
    """
    if not len(model_dirs):
        raise ValueError("expected at least one model folder, found none; run finetune first")
    each = np.stack([predict(path, packed, device, precision) for path in model_dirs])
    return each.mean(0), each.std(0)


def embeddings(model_dir: str | os.PathLike, packed: PackedTokens, device: str = "auto",
               precision: str = "auto", token_budget: int = TOKEN_BUDGET) -> np.ndarray:
    """[CLS] hidden states of a pre-trained or fine-tuned encoder, float32 (n, width).

    Raises: as `predict`.
    """
    bert = models.load_encoder(str(model_dir)).eval()
    _require_fit(packed, model_meta(model_dir), bert, model_dir)
    return _forward(bert, lambda batch: models.encode_cls(bert, batch).float(), packed, device, precision,
                    token_budget)


def attention(model_dir: str | os.PathLike, token_ids: Sequence[int]) -> np.ndarray:
    """Attention weights over one string, float32 (n_layers, n_heads, T, T); rows (queries) sum to 1.

    Computed by transformers' own eager attention. Raises: as `predict`.
    """
    bert = models.load_encoder(str(model_dir)).eval()
    if not 0 < len(token_ids) <= bert.config.max_position_embeddings:
        raise ValueError(f"expected 1 to {bert.config.max_position_embeddings} tokens, found {len(token_ids)}"
                         "; give the ids of one string")
    bert.set_attn_implementation("eager")
    with torch.inference_mode():
        layers = bert(torch.tensor([list(map(int, token_ids))]), output_attentions=True).attentions
    return torch.cat(layers).numpy()


def _forward(module: nn.Module, call: Callable[[Packed], Tensor], packed: PackedTokens, device: str,
             precision: str, token_budget: int) -> np.ndarray:
    """call(batch) for all strings, sorted by length so that a batch has few different lengths; (n, ...)."""
    chosen = runtime.choose_device(device)
    run = runtime.Run(chosen, runtime.choose_precision(precision, chosen))
    module.to(chosen)
    order = np.argsort(packed.lengths, kind="stable")
    cuts = np.flatnonzero(np.diff(np.cumsum(packed.lengths[order]) // token_budget)) + 1
    parts = []
    with torch.inference_mode(), run.autocast():
        for rows in np.split(order, cuts):
            parts.append(call(Packed.of(dataset.make_batch(packed, rows), chosen, run.varlen)))
    values = torch.cat(parts).cpu().numpy()
    out = np.empty_like(values)
    out[order] = values
    return out


def model_meta(model_dir: str | os.PathLike) -> dict:
    """What a model folder says about itself (vocabulary, style, task, scale); empty for a foreign model."""
    file = Path(model_dir) / models.META_FILE
    return io.read_json(file) if file.is_file() else {}


def _require_fit(packed: PackedTokens, meta: dict, bert: models.BertModel,
                 model_dir: str | os.PathLike) -> None:
    packed.require_length(bert.config.max_position_embeddings)
    expected, found = meta.get("vocab_sha256"), packed.meta["vocab_sha256"]
    if expected and expected != found:
        raise ValueError(f"expected strings with the model's vocabulary {expected[:12]}, found {found[:12]}; "
                         f"pack them with the tokenizer in {model_dir}")
    if "style" in meta and meta["style"] != packed.meta["style"]:
        raise ValueError(f'expected strings of style "{meta["style"]}" as in training, found '
                         f'"{packed.meta["style"]}"; make them in the model\'s style')
