"""The standard `tokenizer.json` of a `Tokenizer`, which the `tokenizers` and `transformers` libraries load.

A word's meaning depends on its field, so normalizer rules first give the words of the generator field their
prefixes (a word belongs to it if two bars follow), then words are looked up one by one. A word that the
vocabulary lacks is an error there, too.
"""

from typing import Any

from cloud_lib.spacegroups import TRANSLATIONS

_IN_GENERATOR = r"(?= [^|]*\|[^|]*\|)"  # two bars follow


def document(tokenizer: Any) -> dict:
    """Content of tokenizer.json."""
    published = tokenizer.version.startswith("published")
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100} if published else {"type": "WordLevel", "unk_token": "[UNK]"}
    base = {t: i for t, i in tokenizer.vocab.items() if not (published and _is_fraction(t))}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(t, i, t.startswith("[")) for t, i in tokenizer.vocab.items()
                         if t.startswith("[") or t not in base],
        "normalizer": None if published else {"type": "Sequence", "normalizers": list(_rules())},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": _template(tokenizer),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"Regex": "^(flag|count|tr|tail):"}, "content": ""},
            {"type": "WordPiece", "prefix": "##", "cleanup": False}]},
        "model": model | {"vocab": base},
    }


def config(tokenizer: Any) -> dict:
    """Content of tokenizer_config.json; the two `cloud_` entries are ours, others ignore them."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "cloud_version": tokenizer.version,
        "cloud_sha256": tokenizer.sha256, "clean_up_tokenization_spaces": False, "pad_token": "[PAD]",
        "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
    } | ({"unk_token": "[UNK]"} if "[UNK]" in tokenizer.vocab else {})


def _is_fraction(token: str) -> bool:
    return token[:2] in ("0.", "1.")


def _added(token: str, token_id: int, special: bool) -> dict:
    return {"id": token_id, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special}


def _rules() -> list[dict]:
    rules = [(rf"^{n}(?= [0-9])", f"flag:{n}") for n in (0, 1)]
    rules += [(rf"(?<=flag:[01] ){n}(?= )", f"count:{n}") for n in range(8)]
    rules += [(rf"(?<= ){n}{_IN_GENERATOR}", f"tail:{n}") for n in (0, 1)]
    rules += [(rf"(?<= ){c}{_IN_GENERATOR}", f"tr:{c}") for c in TRANSLATIONS]
    return [{"type": "Replace", "pattern": {"Regex": pattern}, "content": text} for pattern, text in rules]


def _template(tokenizer: Any) -> dict:
    pieces = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    ends = (("[CLS]", tokenizer.cls_id), ("[SEP]", tokenizer.sep_id))
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces,
            "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in ends}}
