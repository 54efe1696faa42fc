"""Fine-tuned models at work: predictions, ensembles, [CLS] embeddings, attention maps, half-size copies."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig
from transformers.initialization import no_init_weights

from cloud_lib import dataset, io, model as models, runtime
from cloud_lib.dataset import PackedTokens
from cloud_lib.model import Packed

TOKEN_BUDGET = 16_384  # tokens per forward pass


def predict(model_dir: str | os.PathLike, packed: PackedTokens, device: str = "auto", precision: str = "auto",
            token_budget: int = TOKEN_BUDGET) -> np.ndarray:
    """Predictions of a model fine-tuned on one task in the target's unit, float64 (n,) in the order of `packed`.

    Args:
        model_dir: <out_dir>/model of a fine-tuning unit.
        precision: "auto" is bfloat16 where that is fast (the head is always float32); "fp32" is exact.
    Raises:
        FileNotFoundError: no such model.
        ValueError: the strings have another vocabulary, or are longer than the model's positions; or the model
            was fine-tuned on several tasks (see `apply_head`).
    """
    model, meta = models.load_regressor(model_dir)
    if model.head_config["n_outputs"] > 1:
        raise ValueError(f"expected a model of one task in {model_dir}, found {meta['tasks']}; use embeddings and "
                         "apply_head")
    _require_fit(packed, meta, model.bert, model_dir)
    scaled = _forward(model, model, packed, device, precision, token_budget)
    return scaled.astype(np.float64) * meta["target_std"] + meta["target_mean"]


def embeddings(model_dir: str | os.PathLike, packed: PackedTokens, device: str = "auto",
               precision: str = "auto", token_budget: int = TOKEN_BUDGET) -> np.ndarray:
    """[CLS] hidden states of a pre-trained or fine-tuned encoder, float32 (n, width).

    Raises: as `predict`.
    """
    with no_init_weights():  # 0.15 s per model spent on random numbers that the file replaces
        bert = models.load_encoder(str(model_dir)).eval()
    _require_fit(packed, model_meta(model_dir), bert, model_dir)
    return _forward(bert, lambda batch: models.encode_cls(bert, batch).float(), packed, device, precision,
                    token_budget)


def apply_head(model_dir: str | os.PathLike, cls: np.ndarray, task: str) -> np.ndarray:
    """Predictions of a fine-tuned model's head in the target's unit, float64 (n,).

    Args:
        cls: `embeddings` of the model's encoder, (n, width); several heads may share an encoder.
        task: which of the tasks that the model was fine-tuned on.
    Raises:
        FileNotFoundError: no head there.
        ValueError: it cannot be read, or was not trained on the task.
    """
    file, meta = Path(model_dir) / models.HEAD_FILE, model_meta(model_dir)
    if not file.is_file():
        raise FileNotFoundError(f"expected {models.HEAD_FILE} in {model_dir}, found none; run finetune")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"expected readable weights in {file}, found damage: {error}; fetch them again") from error
    if task not in (tasks := meta.get("tasks", [])):
        raise ValueError(f"expected a task of {tasks} for {model_dir}, found {task!r}")
    *hidden, last = sorted({int(name.split(".")[0]) for name in state})
    x = torch.from_numpy(cls).float()
    for layer in hidden:
        x = F.silu(F.linear(x, state[f"{layer}.weight"], state[f"{layer}.bias"]))
    i = tasks.index(task)
    scaled = F.linear(x, state[f"{last}.weight"], state[f"{last}.bias"])[:, i].double().numpy()
    return scaled * np.atleast_1d(meta["target_std"])[i] + np.atleast_1d(meta["target_mean"])[i]


def save_bfloat16(model_dir: str | os.PathLike, out_dir: str | os.PathLike) -> Path:
    """Copy of a model folder with its encoder in bfloat16 and without MLM head: half the size.

    The head of a fine-tuned model stays float32. What transformers loads from the copy is a BertModel.
    Raises: as `embeddings`.
    """
    model_dir = Path(model_dir)
    bert = models.load_encoder(str(model_dir))
    with io.atomic_path(out_dir) as folder:
        folder.mkdir()
        config = BertConfig.from_pretrained(model_dir)
        config.architectures, config.dtype = ["BertModel"], "bfloat16"
        config.save_pretrained(folder)
        state = {name: value.detach().bfloat16().contiguous() for name, value in bert.state_dict().items()}
        save_file(state, folder / models.WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / models.WEIGHTS_FILE).chmod(0o644)  # safetensors writes files that only their owner can read
        for name in (models.META_FILE, models.HEAD_FILE, "tokenizer.json", "tokenizer_config.json"):
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, folder / name)
    return Path(out_dir)


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
