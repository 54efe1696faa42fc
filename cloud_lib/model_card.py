"""What a bundle of models says about itself: its model card, and a line per property for the command line."""

from collections.abc import Iterable
from typing import Any

CARD = """---
license: mit
library_name: transformers
tags: [materials, crystals, symmetry, bert]
---
# CLOUD: properties of crystals from symmetry strings

A crystal becomes one line of text (space-group generators, Wyckoff positions, composition); a BERT encoder
pre-trained on such lines is fine-tuned on each property. {note}

| property | meaning | unit | held-out MAE | 68 % of errors within | held-out crystals | models | style, symprec (angstrom) |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

Held-out: each crystal is predicted by the model whose training did not see it (test folds). The stated uncertainty is
the root of the sum of squares of the 68 % error, of the standard deviation over the models, and, for an element
or a space group that no labelled crystal had, of the standard deviation of the training targets.

Intended use: screening ordered inorganic crystals before calculations. The models see symmetry and composition, never
distances: a strained cell of the same symmetry gets the same answer. Not for molecules, surfaces, disordered
crystals, or anything where an error of the size above would matter.

```
python -m cloud_lib predict crystal.cif
```

Weights are safetensors in bfloat16, heads float32; `models.json` has their checksums. The pre-trained encoder is
`AutoModel.from_pretrained("encoder")`, its tokenizer `AutoTokenizer.from_pretrained("encoder")`.
"""


def card(properties: Iterable[Any], note: str) -> str:
    """The model card: what is predicted, from which strings, how well, and what not to expect.

    Args:
        properties: of bundle.Property.
        note: a sentence on what the models were trained.
    """
    rows = "\n".join(f"| {p.name} | {p.description} | {p.unit} | {p.mae_test:.4g} | {p.error_68:.4g} | {p.n_test} "
                     f"| {len(p.members)} | {p.recipe.style}, {p.recipe.symprec} |" for p in properties)
    return CARD.format(note=note, rows=rows)


def listing(properties: Iterable[Any]) -> str:
    """One line per property: name, unit, held-out error, number of models, meaning."""
    return "\n".join(f"{p.name:14} {p.unit:14} MAE {p.mae_test:<10.4g} {len(p.members)} models  {p.description}"
                     for p in properties)
