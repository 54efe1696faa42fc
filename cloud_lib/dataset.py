"""Packed token ids: on disk as one memory-mapped array, in memory as batches without padding.

A data folder holds tokens.npy (uint16, every string end to end), offsets.npy (int64), meta.json (vocabulary,
style, counts, checksums) and, for a property task, labels.npz and material_id.json. Batches, order and masks
are functions of (seed, step) alone, so an interrupted run needs no saved generator to continue.
"""

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cloud_lib import io

PARTS = ("special", "generator", "wyckoff", "element", "fraction")  # meanings of meta["part_of_id"]
META_KEYS = ("vocab_sha256", "vocab_version", "vocab_size", "mask_id", "cls_id", "sep_id", "n_special",
             "part_of_id", "style")
LABEL_KEYS = ("target", "fold", "row")
KEEP, RANDOM, EVALUATION = 0.1, 0.1, 2**31  # shares of the masked tokens; stream of the fixed masks


# --------------------------------------------------------------------------------------------- on disk
def pack(tokens: np.ndarray, offsets: np.ndarray, out_dir: str | os.PathLike, meta: dict[str, Any],
         labels: dict[str, np.ndarray] | None = None,
         material_id: Sequence[str] | None = None) -> "PackedTokens":
    """Write a data folder atomically and open it.

    Args:
        tokens: uint16 (n_tokens,), the strings end to end, each with [CLS] and [SEP].
        offsets: int64 (n + 1,), string i is tokens[offsets[i]:offsets[i + 1]].
        meta: at least META_KEYS; part_of_id is an index into PARTS per token id. More keys are kept.
        labels: target (float64, the task's unit), fold (int, test fold 0..k-1, -1 = never a test row) and row
            (int, official row number), each of length n; of joined tasks also task (int, index into
            meta["tasks"]).
        material_id: n names that predictions are written under.
    Raises:
        ValueError: arrays, ids, labels or meta do not fit together.
    """
    tokens, offsets = np.asarray(tokens), np.asarray(offsets)
    _check_arrays(tokens, offsets, meta)
    n = len(offsets) - 1
    labels = _checked_labels(labels, n)
    if material_id is not None and len(material_id) != n:
        raise ValueError(f"expected {n} material_id, one per string, found {len(material_id)}")
    with io.atomic_path(out_dir) as folder:
        folder.mkdir()
        np.save(folder / "tokens.npy", tokens)
        np.save(folder / "offsets.npy", offsets.astype(np.int64))
        if labels is not None:
            np.savez(folder / "labels.npz", **labels)
        if material_id is not None:
            io.write_json(folder / "material_id.json", list(map(str, material_id)))
        names = sorted(file.name for file in folder.iterdir())
        counts = {"n": n, "n_tokens": len(tokens), "max_length": int(np.diff(offsets).max(initial=0)),
                  "sha256": {name: io.sha256(folder / name) for name in names}}
        io.write_json(folder / "meta.json", dict(meta) | counts)
    return PackedTokens.open(out_dir)


def join(tasks: Mapping[str, str | os.PathLike], out_dir: str | os.PathLike,
         without: Sequence[str | os.PathLike] = ()) -> "PackedTokens":
    """Write the rows of several tasks, name -> data folder, as one that is fine-tuned jointly (atomic).

    Args:
        without: data folders; rows whose string occurs in any of them are left out (meta: n_left_out).
    Raises:
        ValueError: no tasks, or of different vocabularies or styles, or no row is left.
    """
    parts, others = ([PackedTokens.open(folder) for folder in folders] for folders in (tasks.values(), without))
    if len({(part.meta["vocab_sha256"], part.meta["style"]) for part in (*parts, *others)}) != 1:
        raise ValueError(f"expected tasks of one vocabulary and style, found {[*tasks]} with "
                         f"{sorted({part.meta['style'] for part in parts})}; pack them alike")
    kept = [np.arange(len(part)) for part in parts]
    if others:
        unwanted = np.concatenate([string_hashes(other, np.arange(len(other))) for other in others])
        kept = [rows[~np.isin(string_hashes(part, rows), unwanted)] for part, rows in zip(parts, kept)]
    if not sum(map(len, kept)):
        raise ValueError(f"expected rows of {[*tasks]} that are not in {[*map(str, without)]}, found none; name fewer")
    pieces = [gather(part, rows) for part, rows in zip(parts, kept) if len(rows)]
    labels = [{key: values[rows] for key, values in part.labels().items()} | {"task": np.full(len(rows), i)}
              for i, (part, rows) in enumerate(zip(parts, kept))]
    meta = {key: parts[0].meta[key] for key in META_KEYS} | {"task": "joint", "tasks": [*tasks]}
    if without:
        meta["n_left_out"] = sum(map(len, parts)) - sum(map(len, kept))
    names = [np.asarray(part.material_id())[rows] for part, rows in zip(parts, kept)]
    return pack(np.concatenate([tokens for tokens, _ in pieces]),
                np.concatenate([[0], np.cumsum(np.concatenate([lengths for _, lengths in pieces]))]), out_dir, meta,
                {key: np.concatenate([one[key] for one in labels]) for key in labels[0]}, np.concatenate(names))


def _check_arrays(tokens: np.ndarray, offsets: np.ndarray, meta: dict[str, Any]) -> None:
    if missing := [key for key in META_KEYS if key not in meta]:
        raise ValueError(f"expected {', '.join(META_KEYS)} in meta, {', '.join(missing)} missing")
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise ValueError(f"expected tokens as uint16 (n_tokens,), found {tokens.dtype} {tokens.shape}")
    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(tokens):
        raise ValueError(f"expected offsets from 0 to {len(tokens)} for at least one string, "
                         f"found {offsets[:1]}..{offsets[-1:]} ({len(offsets)} values)")
    short = np.flatnonzero(np.diff(offsets) < 2)
    if len(short):
        raise ValueError(f"expected [CLS] ... [SEP] in every string, {len(short)} of {len(offsets) - 1} have "
                         f"fewer than 2 tokens, e.g. rows {short[:3].tolist()}")
    if len(meta["part_of_id"]) != meta["vocab_size"] or int(tokens.max()) >= meta["vocab_size"]:
        raise ValueError(f"expected token ids and part_of_id for vocab_size {meta['vocab_size']}, found "
                         f"largest id {int(tokens.max())} and {len(meta['part_of_id'])} parts; take meta "
                         "from the tokenizer")


def _checked_labels(labels: dict[str, np.ndarray] | None, n: int) -> dict[str, np.ndarray] | None:
    if labels is None:
        return None
    if missing := [key for key in LABEL_KEYS if key not in labels]:
        raise ValueError(f"expected labels {', '.join(LABEL_KEYS)}, {', '.join(missing)} missing")
    arrays = {key: np.asarray(values, dtype=np.float64 if key == "target" else np.int64)
              for key, values in labels.items() if key in (*LABEL_KEYS, "task")}
    if wrong := {key: len(values) for key, values in arrays.items() if len(values) != n}:
        raise ValueError(f"expected {n} labels, one per string, found {wrong}")
    return arrays


class PackedTokens:
    """A data folder, opened: tokens stay on disk until a batch reads them."""

    def __init__(self, path: Path, tokens: np.ndarray, offsets: np.ndarray, meta: dict[str, Any]):
        self.path, self.tokens, self.offsets, self.meta = path, tokens, offsets, meta

    @classmethod
    def open(cls, path: str | os.PathLike) -> "PackedTokens":
        """Open a folder written by `pack`.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: a file is cut short or does not fit the others.
        """
        path = Path(path)
        if not (path / "meta.json").is_file():
            raise FileNotFoundError(f"expected packed tokens in {path}, found no meta.json; run make data")
        meta = io.read_json(path / "meta.json")
        try:
            tokens = np.load(path / "tokens.npy", mmap_mode="r")
            offsets = np.load(path / "offsets.npy")
        except (OSError, ValueError) as error:
            raise ValueError(f"expected tokens.npy and offsets.npy in {path}, found damage: {error}; "
                             "delete the folder and run make data") from error
        if len(tokens) != meta["n_tokens"] or len(offsets) != meta["n"] + 1:
            raise ValueError(f"expected {meta['n']} strings and {meta['n_tokens']} tokens in {path}, found "
                             f"{len(offsets) - 1} and {len(tokens)}; delete the folder and run make data")
        return cls(path, tokens, offsets, meta)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per string, int64 (n,)."""
        return np.diff(self.offsets)

    @property
    def data_sha256(self) -> str:
        """One checksum for everything in the folder."""
        return io.config_hash(self.meta["sha256"])

    def item(self, i: int) -> np.ndarray:
        """Token ids of string i, uint16."""
        return np.asarray(self.tokens[self.offsets[i]:self.offsets[i + 1]])

    def labels(self) -> dict[str, np.ndarray]:
        """target, fold, row and task (all 0, unless tasks were joined) of a property task, each (n,).

        Raises:
            FileNotFoundError: the folder holds no task.
            ValueError: the file is cut short.
        """
        file = self.path / "labels.npz"
        if not file.is_file():
            raise FileNotFoundError(f"expected a task's labels in {file}, found none; give a folder under "
                                    "tasks/")
        try:
            with open(file, "rb") as handle, np.load(handle) as stored:
                task = {"task": stored["task"] if "task" in stored else np.zeros(len(self), np.int64)}
                return {key: stored[key] for key in LABEL_KEYS} | task
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise ValueError(f"expected labels in {file}, found damage: {error}; run make data") from error

    def material_id(self) -> list[str]:
        """Names of the rows; their numbers where the folder holds none."""
        file = self.path / "material_id.json"
        return io.read_json(file) if file.is_file() else [str(i) for i in range(len(self))]

    def require_length(self, max_positions: int) -> None:
        """Raise ValueError if a string is longer than the model's positions."""
        long = np.flatnonzero(self.lengths > max_positions)
        if len(long):
            raise ValueError(
                f"{len(long)} of {len(self)} strings in {self.path} have more than max_positions = "
                f"{max_positions} tokens, e.g. rows {long[:3].tolist()} with "
                f"{self.lengths[long[:3]].tolist()}; raise max_positions to "
                f"{int(self.lengths.max())} or reject them during curation")


# --------------------------------------------------------------------------------------- rows of a step
def split_rows(packed: PackedTokens, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation rows (sorted); equal strings always fall on the same side.

    Raises:
        ValueError: a side would be empty.
    """
    groups = string_groups(packed, np.arange(len(packed)))
    n_groups = int(groups.max()) + 1
    order = np.random.default_rng([seed, n_groups]).permutation(n_groups)
    is_val = np.zeros(n_groups, bool)
    is_val[order[:round(val_fraction * n_groups)]] = True
    rows = is_val[groups]
    if not 0 < rows.sum() < len(rows):
        raise ValueError(f"expected training and validation rows, found {int((~rows).sum())} and "
                         f"{int(rows.sum())} of {len(packed)} at val_fraction {val_fraction}; change it "
                         "or add data")
    return np.flatnonzero(~rows), np.flatnonzero(rows)


def string_groups(packed: PackedTokens, rows: np.ndarray) -> np.ndarray:
    """Number of the distinct string of every row, int64 (len(rows),): equal strings, equal numbers."""
    return np.unique(string_hashes(packed, rows), return_inverse=True)[1]


def string_hashes(packed: PackedTokens, rows: np.ndarray) -> np.ndarray:
    """64-bit hash of the string of every row, uint64 (len(rows),), the same in every data folder.

    Two different ones of n strings share a hash with probability below n^2 / 2^65.
    """
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 2**63, (2, 65_536), dtype=np.uint64) | np.uint64(1)
    hashes = []
    for chunk in np.array_split(rows, max(1, len(rows) // 100_000)):
        tokens, lengths = gather(packed, chunk)
        terms = factors[0][tokens] * factors[1][_ranges(lengths) % 65_536]
        hashes.append(np.add.reduceat(terms, np.concatenate([[0], np.cumsum(lengths)[:-1]])))
    return np.concatenate(hashes)


def step_rows(rows: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Rows of optimizer step `step`: every row once per epoch, in an order that (seed, epoch) fixes."""
    n = len(rows)
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: epoch_order(n, seed, epoch) for epoch in np.unique(places // n).tolist()}
    return np.concatenate([rows[order[places[places // n == epoch] % n]] for epoch, order in orders.items()])


@lru_cache(maxsize=2)  # a step asks for its epoch's order, at an epoch's end for the next one's too
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of range(n)."""
    return np.random.default_rng([seed, epoch, n]).permutation(n)


def gather(packed: PackedTokens, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of `rows` end to end (uint16) and their lengths (int64)."""
    starts, lengths = packed.offsets[rows], packed.offsets[rows + 1] - packed.offsets[rows]
    return packed.tokens[np.repeat(starts, lengths) + _ranges(lengths)], lengths


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0..l-1 for every l in `lengths`, end to end."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


# ---------------------------------------------------------------------------------------------- batches
class Batch(NamedTuple):
    """Strings end to end, shortest first. N tokens, B strings, M masked tokens; all int64 unless noted."""

    rows: np.ndarray        # (B,) row of each string in the data folder
    lengths: np.ndarray     # (B,) ascending
    input_ids: np.ndarray   # (N,) after masking
    masked: np.ndarray      # (M,) places among the N tokens where a loss is taken; empty without masking
    labels: np.ndarray      # (M,) true ids there

    def position_ids(self) -> np.ndarray:
        """Position of each token in its own string, (N,)."""
        return _ranges(self.lengths)


def make_batch(packed: PackedTokens, rows: np.ndarray) -> Batch:
    """Batch of `rows` without masks, sorted by length (so that a batch has few runs of equal length)."""
    rows = rows[np.argsort(packed.offsets[rows + 1] - packed.offsets[rows], kind="stable")]
    tokens, lengths = gather(packed, rows)
    empty = np.empty(0, np.int64)
    return Batch(rows, lengths, tokens.astype(np.int64), empty, empty)


def mask_batch(batch: Batch, meta: dict[str, Any], mask_prob: float, seed: Sequence[int]) -> Batch:
    """Mask tokens for MLM (BERT: 80 % [MASK], 10 % random, 10 % kept); special tokens never take part.

    Args:
        mask_prob: probability of each ordinary token; the paper uses 0.15.
        seed: e.g. (seed, step); the masks depend on nothing else.
    """
    rng, is_ordinary = np.random.default_rng(seed), np.asarray(meta["part_of_id"]) > 0
    chosen, kind = rng.random((2, len(batch.input_ids)))
    masked = np.flatnonzero((chosen < mask_prob) & is_ordinary[batch.input_ids])
    labels, kind = batch.input_ids[masked], kind[masked]
    ordinary = np.flatnonzero(is_ordinary)
    random_ids = ordinary[rng.integers(len(ordinary), size=len(masked))]
    input_ids = batch.input_ids.copy()
    changed = np.where(kind < KEEP + RANDOM, random_ids, meta["mask_id"])
    input_ids[masked] = np.where(kind < KEEP, labels, changed)
    return batch._replace(input_ids=input_ids, masked=masked, labels=labels)


def training_batch(packed: PackedTokens, rows: np.ndarray, batch_size: int, mask_prob: float, seed: int,
                   step: int) -> Batch:
    """Masked global batch of one optimizer step."""
    return mask_batch(make_batch(packed, step_rows(rows, batch_size, seed, step)), packed.meta, mask_prob,
                      (seed, step, 1))


def evaluation_batches(packed: PackedTokens, rows: np.ndarray, mask_prob: float, seed: int,
                       size: int = 4096) -> Iterator[Batch]:
    """Masked batches of `rows`, the same at every call: the masks of a row do not depend on the model."""
    for first in range(0, len(rows), size):
        yield mask_batch(make_batch(packed, rows[first:first + size]), packed.meta, mask_prob,
                         (seed, first, EVALUATION))


def micro_batches(batch: Batch, token_budget: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """This rank's share of a batch, cut into pieces of at most `token_budget` tokens (at least one string).

    Rank r takes strings r, r + world_size, ...: the batch is sorted by length, so all ranks get equal work.
    """
    ends = np.cumsum(batch.lengths)
    mine = np.arange(rank, len(batch.rows), world_size)
    pieces, filled = np.zeros(len(mine), np.int64), 0
    for i, length in enumerate(batch.lengths[mine]):
        filled += int(length)
        new = i > 0 and filled > token_budget
        pieces[i] = pieces[i - 1] + new if i else 0
        filled = int(length) if new else filled
    owner = np.full(len(batch.rows), -1)
    owner[mine] = pieces
    token_owner = np.repeat(owner, batch.lengths)
    return [_piece(batch, owner == piece, token_owner == piece, ends) for piece in np.unique(pieces)]


def _piece(batch: Batch, strings: np.ndarray, tokens: np.ndarray, ends: np.ndarray) -> Batch:
    place = np.cumsum(tokens) - 1
    inside = tokens[batch.masked]
    return Batch(batch.rows[strings], batch.lengths[strings], batch.input_ids[tokens],
                 place[batch.masked[inside]], batch.labels[inside])


# -------------------------------------------------------------------------------------------- baselines
def frequency_baselines(packed: PackedTokens, train_rows: np.ndarray,
                        val_batches: Iterator[Batch]) -> dict[str, dict[str, float]]:
    """What guessing by frequency reaches on masked tokens: the bar that a language model has to clear.

    "unigram": frequencies of the training tokens; "position": frequencies at the same position of a string,
    smoothed with the unigram; special tokens are never predicted. Returns {name: {"loss" [nats], "accuracy",
    "accuracy_by_part"}}.
    """
    vocab_size, part_of_id = packed.meta["vocab_size"], np.asarray(packed.meta["part_of_id"])
    counts = np.zeros((packed.meta["max_length"], vocab_size))
    for chunk in np.array_split(train_rows, max(1, len(train_rows) // 100_000)):
        tokens, lengths = gather(packed, chunk)
        cells = _ranges(lengths) * vocab_size + tokens
        counts += np.bincount(cells, minlength=counts.size).reshape(counts.shape)
    counts[:, part_of_id == 0] = 0
    unigram = counts.sum(0) + (part_of_id > 0)
    unigram /= unigram.sum()
    by_position = (counts + unigram) / (counts.sum(1, keepdims=True) + 1)
    labels, positions = [], []
    for batch in val_batches:
        labels.append(batch.labels)
        positions.append(batch.position_ids()[batch.masked])
    label, position = np.concatenate(labels), np.concatenate(positions)
    part = part_of_id[label]
    scores = {"unigram": np.broadcast_to(unigram, counts.shape), "position": by_position}
    return {name: {"loss": float(-np.log(p[position, label]).mean()),
                   **_accuracies(p.argmax(1)[position] == label, part)}
            for name, p in scores.items()}


def _accuracies(right: np.ndarray, part: np.ndarray) -> dict[str, Any]:
    """Share of right tokens: of all, and per part of the string (None where there are none)."""
    return {"accuracy": float(right.mean()),
            "accuracy_by_part": {name: float(right[part == i].mean()) if (part == i).any() else None
                                 for i, name in enumerate(PARTS) if i}}
