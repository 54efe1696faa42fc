"""Hugging Face: push a folder of models, and read the authors' published weights.

A model folder (train.py, bundle.py) is already what `AutoModel.from_pretrained` and `AutoTokenizer` load. The
published weights are a 12 x 768 BERT with masked-language head, whose embedding has 30,522 rows of which the
564-token vocabulary uses the first; `convert_published` makes a model folder of ours from them, which
`finetune(init=...)`, `predict.embeddings` and the command line then take. Only safetensors are read: a pickle
(pytorch_model.bin) can run any program when it is opened.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from cloud_lib import io
from cloud_lib.bundle import MANIFEST
from cloud_lib.model import META_FILE, WEIGHTS_FILE
from cloud_lib.tokenizer import Tokenizer

PUBLISHED = "ChangwenXu/CLOUD/ckpt"
PUBLISHED_ROWS = 30_522  # of the published embedding
WORDS, DECODER, DECODER_BIAS, BIAS = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight",
                                      "cls.predictions.decoder.bias", "cls.predictions.bias")
OPTIONAL = {DECODER, DECODER_BIAS, "bert.embeddings.position_ids", "bert.pooler.dense.weight",
            "bert.pooler.dense.bias"}  # a tied decoder is not stored; the pooler is not used
Weights = dict[str, torch.Tensor]


# --------------------------------------------------------------------------------------------------- pushing
def push(folder: str | Path, repo_id: str, private: bool = True, api: Any = None) -> str:
    """Upload a bundle or a model folder to the Hub as one commit; the address of the commit.

    The token is that of `hf auth login` or of the variable HF_TOKEN.

    Args:
        repo_id: "OWNER/NAME", made if it does not exist.
        api: huggingface_hub.HfApi to use, for another endpoint.
    Raises:
        FileNotFoundError: the folder holds no models.
        ValueError: the folder holds pickled weights, or the Hub refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(folder)
    if not any((folder / name).is_file() for name in (MANIFEST, "config.json")):
        raise FileNotFoundError(f"expected {MANIFEST} or config.json in {folder}, found neither; name a bundle "
                                "(python -m cloud_lib bundle) or a model folder")
    if pickles := sorted(file.name for kind in ("*.bin", "*.pt", "*.pkl") for file in folder.rglob(kind)):
        raise ValueError(f"expected safetensors only in {folder}, found {pickles[:3]}; remove them")
    api = api or HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload models").commit_url)
    except HfHubHTTPError as error:
        raise ValueError(f"expected the Hub to take {repo_id}, found: {str(error).splitlines()[0][:200]}; log in with "
                         "hf auth login, with the right to write") from error


# ----------------------------------------------------------------------------------------- published weights
def convert_published(source: str | Path = PUBLISHED, out_dir: str | Path = "checkpoints/published") -> Path:
    """Write the published weights as a model folder of ours, cropped to the published vocabulary's 564 tokens.

    The folder has the encoder and the masked-language head (AutoModelForMaskedLM), the published tokenizer and
    the style `paper`. Its strings need `generators="published"`, as three of the published lines deviate.

    Args:
        source: a local folder, or OWNER/NAME[/SUBFOLDER] on the Hub.
    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a pickle, damage, or another layout; the message names the difference.
    """
    folder, tokenizer = _local(str(source)), Tokenizer.published()
    config, weights = _read(folder)
    if vocab := _foreign_vocabulary(folder, tokenizer):
        raise ValueError(f"expected the published vocabulary in {folder}, found {vocab}")
    check_layout(config, weights, tokenizer.vocab_size)
    cropped = crop(weights, tokenizer.vocab_size)
    tied = DECODER not in cropped or torch.equal(cropped[DECODER], cropped[WORDS])
    config.vocab_size, config.tie_word_embeddings = tokenizer.vocab_size, tied
    config.architectures = ["BertForMaskedLM"]
    if tied:
        cropped = {name: value for name, value in cropped.items() if name not in (DECODER, DECODER_BIAS)}
    with io.atomic_path(out_dir) as made:
        made.mkdir()
        config.save_pretrained(made)
        save_file(cropped, made / WEIGHTS_FILE, metadata={"format": "pt"})
        (made / WEIGHTS_FILE).chmod(0o644)
        tokenizer.save(made)
        io.write_json(made / META_FILE, {
            "kind": "published", "source": str(source), "style": "paper", "generators": "published",
            "vocab_version": tokenizer.version, "vocab_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size,
            "n_special": 5, "mask_id": tokenizer.mask_id, "cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id,
            "part_of_id": tokenizer.part_of_id.tolist(), "tied": tied})
    return Path(out_dir)


def _local(source: str) -> Path:
    """The source as a local folder; a Hub repository is downloaded without its pickles."""
    if Path(source).is_dir():
        return Path(source)
    owner, name, *rest = source.split("/") if source.count("/") else (source, "")
    if not name or source.startswith((".", "/")):
        raise FileNotFoundError(f"expected a folder or OWNER/NAME[/SUBFOLDER], found {source!r}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(f"{owner}/{name}", allow_patterns=["*.json", "*.txt", "*.safetensors"])
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"expected {source} on the Hub, found: {str(error).splitlines()[0][:200]}; download it "
                                "elsewhere and name its folder") from error
    return Path(found, *rest)


def _read(folder: Path) -> tuple[BertConfig, Weights]:
    for name in ("config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            pickled = sorted(file.name for file in folder.glob("*.bin"))
            hint = (f"; {pickled[0]} is a pickle, which is never opened: save it as safetensors where you trust it"
                    if pickled and name == WEIGHTS_FILE else "; name the folder with the weights")
            raise FileNotFoundError(f"expected {name} in {folder}, found none{hint}")
    if (kind := io.read_json(folder / "config.json").get("model_type")) != "bert":
        raise ValueError(f"expected model_type bert in {folder}, found {kind!r}; these are not the published weights")
    try:
        return BertConfig.from_pretrained(folder), load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"expected readable weights in {folder}, found damage: {error}; download them again") from error


def _foreign_vocabulary(folder: Path, tokenizer: Tokenizer) -> str:
    """How a vocab.txt beside the weights differs from the published vocabulary's first 463 words; "" = not."""
    file = folder / "vocab.txt"
    words = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    wrong = [(i, word, tokenizer.tokens[i]) for i, word in enumerate(words[:tokenizer.vocab_size])
             if word != tokenizer.tokens[i]]
    return f"{len(wrong)} other words in vocab.txt, e.g. line {wrong[0][0]}: {wrong[0][1]!r}, expected " \
           f"{wrong[0][2]!r}" if wrong else ""


def check_layout(config: BertConfig, weights: Weights, vocab_size: int) -> None:
    """Raise ValueError unless the weights are those of a BertForMaskedLM of this configuration.

    The embedding, the decoder and its bias may have any common number of rows from `vocab_size` up.
    """
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in BertForMaskedLM(config).state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if missing := sorted(set(expected) - OPTIONAL - set(found)):
        raise ValueError(f"expected the weights of a BertForMaskedLM, {len(missing)} are missing, e.g. {missing[:3]}")
    if extra := sorted(set(found) - OPTIONAL - set(expected)):
        raise ValueError(f"expected the weights of a BertForMaskedLM, found {len(extra)} others, e.g. {extra[:3]}")
    rows = found[WORDS][0]
    if rows < vocab_size:
        raise ValueError(f"expected at least {vocab_size} rows in {WORDS} (published: {PUBLISHED_ROWS}), found {rows}")
    by_rows = {WORDS, DECODER, DECODER_BIAS, BIAS}
    shapes = {name: (rows, *shape[1:]) if name in by_rows else shape for name, shape in expected.items()}
    if wrong := [(name, shapes[name], found[name]) for name in shapes if name in found and shapes[name] != found[name]]:
        name, want, have = wrong[0]
        raise ValueError(f"expected {name} with shape {want}, found {have} ({len(wrong)} of {len(found)} differ)")


def crop(weights: Weights, rows: int) -> Weights:
    """The first `rows` rows of everything that has one row per token; the rest unchanged, without the pooler.

    Row 0, [CLS], is a zero vector in the published weights (it was the padding index) and stays one.
    """
    cut = {WORDS, DECODER, DECODER_BIAS, BIAS}
    return {name: (value[:rows] if name in cut else value).clone().contiguous() for name, value in weights.items()
            if not name.startswith("bert.pooler") and name != "bert.embeddings.position_ids"}
