"""New crystals as strings: charge-balanced element substitutions into the corpus's Wyckoff prototypes.

A prototype is a space group with occupied Wyckoff positions, its elements forgotten. Elements are drawn for
it so that common oxidation states (pymatgen's) add up to zero and every cation is less electronegative than
every anion. No coordinates are made; whether such a crystal exists is not asked. Strings stream to Parquet, each
once and none that the corpus holds; memory grows by 8 bytes per string.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from math import gcd, nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from cloud_lib import io
from cloud_lib.elements import FORMULA_ORDER, RANKS
from cloud_lib.representation import parse, string
from cloud_lib.spacegroups import LETTERS, multiplicities, normalizer_permutations
from cloud_lib.symmetry import Orbit, SymmetryRecord

STYLES = ("canonical", "site")  # `paper` depends on a file's order of atoms, and there is none here
SCHEMA = pa.schema({"material_id": pa.string(), "source": pa.string(), "prototype": pa.string(),
                    "formula_reduced": pa.string(), "space_group": pa.int16(),
                    **dict.fromkeys(STYLES, pa.string())})
MAX_ELEMENTS = 5
BATCH = 200_000  # strings per round of de-duplication and per row group
DRAWS = 32  # per prototype and round
EXHAUSTED = 0.01  # stop when fewer of a batch's strings are new

Slots = tuple[tuple[tuple[int, int], ...], ...]  # per element: (index of the Wyckoff letter, orbits), sorted


class Prototype(NamedTuple):
    """Occupied Wyckoff positions without elements; `amounts` are the slots' smallest integer atom counts."""

    amounts: tuple[int, ...]
    space_group: int
    slots: Slots
    material_id: str  # of the first crystal of the corpus that shows it


def prototypes(corpus: Path) -> list[Prototype]:
    """Distinct prototypes of a corpus's site strings with 2 to MAX_ELEMENTS elements, sorted."""
    table = pq.read_table(corpus, columns=["material_id", "space_group", "site"])
    found: dict[tuple[int, Slots], str] = {}
    for material_id, group, text in zip(*(column.to_pylist() for column in table.columns), strict=True):
        slots = _slots(text) if text else ()
        if 2 <= len(slots) <= MAX_ELEMENTS:
            found.setdefault((group, _smallest(group, slots)), material_id)
    return sorted(Prototype(_amounts(group, slots), group, slots, first)
                  for (group, slots), first in found.items())


def _slots(text: str) -> Slots:
    slots = defaultdict(list)
    for (element, symbol), n in parse(text, "site").wyckoff.items():
        slots[element].append((LETTERS.index(symbol[-1]), n))
    return tuple(sorted(tuple(sorted(slot)) for slot in slots.values()))


@lru_cache(maxsize=100_000)
def _smallest(space_group: int, slots: Slots) -> Slots:
    """The smallest of the equivalent descriptions."""
    images = (tuple(sorted(tuple(sorted((LETTERS.index(p[i]), n) for i, n in slot)) for slot in slots))
              for p in normalizer_permutations(space_group))
    return min(images)


def _amounts(space_group: int, slots: Slots) -> tuple[int, ...]:
    sizes = multiplicities(space_group)
    amounts = [sum(sizes[LETTERS[i]] * n for i, n in slot) for slot in slots]
    divisor = gcd(*amounts)
    return tuple(amount // divisor for amount in amounts)


# ------------------------------------------------------------------------------------------------ elements
class Ions:
    """Elements by oxidation state, as arrays to draw from."""

    def __init__(self, states: dict[str, tuple[int, ...]]):
        self.charges = np.array(sorted({q for s in states.values() for q in s}))
        members = [sorted(RANKS[e] for e, s in states.items() if q in s) for q in self.charges]
        self.counts = np.array([len(m) for m in members])
        self.ranks = np.zeros((len(members), self.counts.max()), np.int64)
        for row, ranks in zip(self.ranks, members, strict=True):
            row[:len(ranks)] = ranks

    def balanced(self, amounts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Choices of charges, as indices (n, k), with amounts @ charges = 0; (n,) element choices of each."""
        grid = np.indices((len(self.charges),) * len(amounts), dtype=np.int8).reshape(len(amounts), -1)
        total = sum(amount * self.charges[row] for amount, row in zip(amounts, grid, strict=True))
        choices = grid[:, total == 0].T.astype(np.int64)
        choices = choices[(self.charges[choices] != 0).all(axis=1)]
        return choices, self.counts[choices].prod(axis=1)

    def draw(self, amounts: tuple[int, ...], n: int, rng: np.random.Generator) -> np.ndarray:
        """Ranks of elements (n, k), -1 where a rule is broken; every balanced choice is equally likely."""
        choices, weights = self.balanced(amounts)
        if not len(choices):
            return np.full((n, len(amounts)), -1)
        ends = np.cumsum(weights)
        picked = choices[np.searchsorted(ends, rng.integers(ends[-1], size=n), side="right")]
        ranks = self.ranks[picked, (rng.random(picked.shape) * self.counts[picked]).astype(np.int64)]
        cation = self.charges[picked] > 0
        ordered = np.where(cation, ranks, -1).max(axis=1) < np.where(cation, len(RANKS), ranks).min(axis=1)
        distinct = (np.diff(np.sort(ranks, axis=1), axis=1) > 0).all(axis=1)
        return np.where((ordered & distinct)[:, None], ranks, -1)


def oxidation_states(corpus: Path) -> dict[str, tuple[int, ...]]:
    """Common oxidation states, without 0, of the corpus's elements (pymatgen's table; D as H)."""
    from pymatgen.core import Element

    texts = pq.read_table(corpus, columns=["site"])["site"].drop_null().to_pylist()
    present = {word for text in texts for word in text.rpartition("|")[2].split()[::2]}
    states = {e: Element("H" if e == "D" else e).common_oxidation_states for e in sorted(present)}
    return {e: tuple(q for q in s if q) for e, s in states.items() if any(s)}


# ----------------------------------------------------------------------------------------------- strings
def _row(prototype: Prototype, elements: list[str]) -> dict:
    """Columns of one crystal, except its material_id."""
    sizes = multiplicities(prototype.space_group)
    orbits = tuple(Orbit(element, LETTERS[i], sizes[LETTERS[i]], "") for element, slot in
                   zip(elements, prototype.slots, strict=True) for i, n in slot for _ in range(n))
    amounts = dict(zip(elements, prototype.amounts, strict=True))
    record = SymmetryRecord(prototype.space_group, 0, "", orbits, amounts, nan, nan, "substitution")
    return {"source": "generated", "prototype": prototype.material_id,
            "formula_reduced": record.formula_reduced, "space_group": prototype.space_group,
            **{style: string(record, style) for style in STYLES}}


def candidates(found: list[Prototype], ions: Ions, rng: np.random.Generator) -> Iterator[dict]:
    """Endless rows, DRAWS per prototype in turn; the same crystal may come again."""
    while True:
        for amounts, group in groupby(found, key=lambda prototype: prototype.amounts):
            group = list(group)
            drawn = ions.draw(amounts, DRAWS * len(group), rng).tolist()
            for k, ranks in enumerate(drawn):
                if ranks[0] >= 0:
                    yield _row(group[k // DRAWS], [FORMULA_ORDER[rank] for rank in ranks])
        yield {}  # end of a round


class Seen:
    """64-bit digests of strings, sorted: 8 bytes each; two strings share one with probability n^2 / 2^65."""

    def __init__(self) -> None:
        self.digests = np.zeros(0, np.uint64)

    def new(self, texts: list[str]) -> np.ndarray:
        """Indices of the texts never seen before, in their order; they count as seen from now on."""
        packed = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
        digests, first = np.unique(np.frombuffer(packed, np.uint64), return_index=True)
        at = np.searchsorted(self.digests, digests)
        known = np.zeros(len(digests), bool)
        inside = at < len(self.digests)
        known[inside] = self.digests[at[inside]] == digests[inside]
        self.digests = np.insert(self.digests, at[~known], digests[~known])
        return np.sort(first[~known])


def write(corpus: Path, target: Path, n: int, seed: int = 0) -> dict:
    """Write up to `n` distinct new strings to a Parquet file (atomic, reproducible); returns counts.

    Ends early when the prototypes are exhausted: fewer than 1 % of the last batch were new.

    Raises:
        ValueError: the corpus has no prototype with 2 to 5 elements.
    """
    found = prototypes(corpus)
    if not found:
        raise ValueError(f"expected site strings with 2 to {MAX_ELEMENTS} elements in {corpus}, found none")
    seen, known = Seen(), pq.read_table(corpus, columns=["site"])["site"].drop_null().to_pylist()
    counts = {"n": 0, "n_prototypes": len(found), "n_candidates": 0, "n_corpus": len(seen.new(known))}
    rows = candidates(found, Ions(oxidation_states(corpus)), np.random.default_rng(seed))
    bar = tqdm(total=n, desc="generate", unit=" strings", unit_scale=True, disable=None)
    with io.atomic_path(target) as part, pq.ParquetWriter(part, SCHEMA, compression="zstd") as writer:
        while counts["n"] < n:
            batch = _take(rows)
            fresh = [batch[i] for i in seen.new([row["site"] for row in batch])][:n - counts["n"]]
            for number, row in enumerate(fresh, start=counts["n"]):
                row["material_id"] = f"generated-{number:09d}"
            writer.write_table(pa.Table.from_pylist(fresh, SCHEMA))
            counts["n"] += len(fresh)
            counts["n_candidates"] += len(batch)
            bar.update(len(fresh))
            if len(fresh) < EXHAUSTED * len(batch) or not batch:
                break
    bar.close()
    return counts


def _take(rows: Iterator[dict]) -> list[dict]:
    """The next BATCH rows; fewer when a whole round gave none."""
    batch, at_start = [], 0
    for row in rows:
        if row:
            batch.append(row)
        if len(batch) == BATCH:
            break
        if not row and len(batch) == at_start:
            break
        at_start = at_start if row else len(batch)
    return batch
