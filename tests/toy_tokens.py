"""Random strings with something to learn: data for the tests of training."""

from pathlib import Path
from typing import Any

import numpy as np

from cloud_lib import dataset
from cloud_lib.dataset import PackedTokens
from cloud_lib.model import EncoderConfig

VOCAB_SIZE, N_SPECIAL = 64, 4
META = {"vocab_sha256": "a" * 64, "vocab_version": "toy", "vocab_size": VOCAB_SIZE, "mask_id": 3, "cls_id": 1,
        "sep_id": 2, "n_special": N_SPECIAL, "part_of_id": [0] * 4 + [1] * 15 + [2] * 15 + [3] * 15 + [4] * 15,
        "style": "canonical", "task": "toy"}
TINY = EncoderConfig(n_layers=2, n_heads=2, head_dim=16)


def toy(path: Path, n: int = 300, seed: int = 0, labels: bool = False, **meta: Any) -> PackedTokens:
    """Strings of 8 to 20 tokens of 12 kinds, each counting upwards in steps of 3; the target tells the kind."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, 21, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    first = 5 * rng.integers(0, 12, n)
    tokens = np.concatenate([[1, *(N_SPECIAL + (a + 3 * np.arange(length - 2)) % (VOCAB_SIZE - N_SPECIAL)), 2]
                             for a, length in zip(first, lengths)]).astype(np.uint16)
    values = {"target": first / 10, "fold": np.arange(n) % 5, "row": np.arange(n)} if labels else None
    return dataset.pack(tokens, offsets, path, META | meta, values, [f"m{i}" for i in range(n)])
