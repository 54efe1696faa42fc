"""Crystals -> rows of symmetry strings, in partitions: parallel, resumable, the same bytes every time.

A partition is a few thousand crystals, worked on by one process and stored as one atomic Parquet file whose
name is a digest of its input, so a killed run continues where it stopped.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from cloud_lib import io
from cloud_lib.representation import MAX_POSITIONS, STYLES, string
from cloud_lib.symmetry import Crystal, CrystalError, as_crystal, symmetry_record

FACTS = {"formula_reduced": pa.string(), "space_group": pa.int16(), "volume_per_atom": pa.float64(),
         "n_sites": pa.int32()}
Item = tuple[str, str, bytes]  # material_id ("": the record's own id), source, JSON of the structure


@dataclass(frozen=True)
class Settings:
    """How a crystal becomes strings; part of every partition's name. `symprec` in angstrom.

    Raises:
        ValueError: an unknown style.
    """

    symprec: float = 0.01
    engine: str = "auto"
    generators: str = "corrected"
    styles: tuple[str, ...] = STYLES

    def __post_init__(self) -> None:
        if unknown := [style for style in self.styles if style not in MAX_POSITIONS]:
            raise ValueError(f"expected styles among {', '.join(MAX_POSITIONS)}, found {unknown[:3]}")

    @property
    def schema(self) -> pa.Schema:
        texts = dict.fromkeys((*self.styles, "stage", "error"), pa.string())
        return pa.schema({"material_id": pa.string(), "source": pa.string()} | FACTS | texts)


# ------------------------------------------------------------------------------------------------ input
def _payload(structure: Any) -> bytes:
    """One crystal as JSON: small to send, the same bytes in every run."""
    if isinstance(structure, bytes):
        return structure
    if isinstance(structure, dict):
        return orjson.dumps(structure, option=orjson.OPT_SERIALIZE_NUMPY)
    try:
        if isinstance(structure, CrystalError):
            raise structure
        crystal = as_crystal(structure)
    except CrystalError as error:
        return orjson.dumps({"error": str(error)})
    parts = {"lattice": crystal.lattice, "symbols": crystal.symbols, "positions": crystal.positions}
    return orjson.dumps(parts, option=orjson.OPT_SERIALIZE_NUMPY)


def _crystal(record: dict) -> Crystal:
    if "error" in record:
        raise CrystalError(record["error"])
    if record.keys() == {"lattice", "symbols", "positions"}:
        return Crystal(np.array(record["lattice"], float).reshape(3, 3), tuple(record["symbols"]),
                       np.array(record["positions"], float).reshape(-1, 3))
    return as_crystal(record)


def _chunks(crystals: Iterable[tuple[str, str, Any]], size: int) -> Iterator[list[Item]]:
    """Chunks of one source each, so that a source added later leaves the others' partitions valid."""
    chunk: list[Item] = []
    for material_id, source, structure in crystals:
        if chunk and (len(chunk) == size or chunk[0][1] != source):
            yield chunk
            chunk = []
        chunk.append((str(material_id), source, _payload(structure)))
    if chunk:
        yield chunk


# ------------------------------------------------------------------------------------------- one partition
def rows(items: list[Item], settings: Settings) -> list[dict]:
    """Rows of one partition: a crystal gives one row of facts and strings, a reject one with stage and error.

    A string longer than the model's positions is null, and its crystal has a reject row of stage "length".
    """
    found = []
    for material_id, source, payload in items:
        found += _crystal_rows({"material_id": material_id, "source": source}, payload, settings)
    return found


def _crystal_rows(base: dict, payload: bytes, settings: Settings) -> list[dict]:
    stage = "parse"
    try:
        record = orjson.loads(payload)
        base["material_id"] = base["material_id"] or str(record["id"])
        stage = "structure"
        crystal = _crystal(record)
        stage = "symmetry"
        facts = symmetry_record(crystal, symprec=settings.symprec, engine=settings.engine)
        stage = "representation"
        row = base | {name: getattr(facts, name) for name in FACTS}
        row |= {style: string(facts, style, settings.generators) for style in settings.styles}
    except Exception as error:  # noqa: BLE001  one bad crystal among millions must not end the run
        base["material_id"] = base["material_id"] or f"sha256:{hashlib.sha256(payload).hexdigest()[:16]}"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return [base | {"stage": stage, "error": kind + str(error).partition("\n")[0]}]
    return [row, *_too_long(base, row, settings.styles)]


def _too_long(base: dict, row: dict, styles: tuple[str, ...]) -> Iterator[dict]:
    for style in styles:
        length = len(row[style].split()) + 2  # [CLS] and [SEP]
        if length > MAX_POSITIONS[style]:
            row[style] = None
            error = f"style {style}: expected at most {MAX_POSITIONS[style]} positions, found {length}"
            yield base | {"stage": "length", "error": error}


def process_partition(items: list[Item], settings: Settings, path: Path) -> None:
    _write_partition(rows(items, settings), settings, path)


def _write_partition(found: list[dict], settings: Settings, path: Path) -> None:
    with io.atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(found, settings.schema), temporary, compression="zstd")


# --------------------------------------------------------------------------------------------- all partitions
@dataclass
class _Input:
    """What went in: per source the number of crystals and an order-independent digest of their bytes."""

    n: Counter = field(default_factory=Counter)
    digest: defaultdict = field(default_factory=lambda: defaultdict(int))

    def add(self, items: list[Item]) -> str:
        """Count one chunk; returns the chunk's own digest."""
        whole = hashlib.blake2b(digest_size=12)
        for material_id, source, payload in items:
            content = b"\0".join((material_id.encode(), source.encode(), payload))
            one = hashlib.blake2b(content, digest_size=16)
            whole.update(one.digest())
            self.n[source] += 1
            self.digest[source] = (self.digest[source] + int.from_bytes(one.digest())) % (1 << 128)
        return whole.hexdigest()

    def summary(self) -> dict:
        return {s: {"n": self.n[s], "digest": f"{self.digest[s]:032x}"} for s in sorted(self.n)}


def run_partitions(crystals: Iterable[tuple[str, str, Any]], folder: Path, settings: Settings, n_workers: int,
                   size: int, executor: Executor | None = None) -> tuple[list[Path], dict]:
    """Every crystal's rows in partition files below `folder`; those already there are not computed again.

    Returns the files, and per source the number of crystals with a digest of them that ignores their order.
    """
    seen, paths, waiting = _Input(), [], {}
    prefix = io.config_hash(settings)
    bar = tqdm(desc="curation", unit=" crystals", unit_scale=True, disable=None)
    with _pool(n_workers, executor) as submit:
        for items in _chunks(crystals, size):
            path = folder / f"{prefix}-{seen.add(items)}.parquet"
            paths.append(path)
            if path.exists():
                bar.update(len(items))
                continue
            if len(waiting) > 2 * n_workers:  # bounds the memory
                _finish(waiting, settings, bar)
            waiting[submit(process_partition, items, settings, path)] = (items, path)
        while waiting:
            _finish(waiting, settings, bar)
    bar.close()
    return sorted(set(paths)), seen.summary()


@contextmanager
def _pool(n_workers: int, executor: Executor | None) -> Iterator[Callable]:
    """`submit` of the given executor (for example a Dask client's), of local processes, or of this process.

    After a worker died the local pool is replaced, so the partitions behind it go on.
    """
    if executor is not None:
        yield executor.submit
        return
    if n_workers <= 1:
        yield _submit_here
        return
    pools = [_processes(n_workers)]

    def submit(*task) -> Future:
        try:
            return pools[-1].submit(*task)
        except BrokenProcessPool:
            pools.append(_processes(n_workers))
            return pools[-1].submit(*task)

    try:
        yield submit
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _processes(n_workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(n_workers, mp_context=get_context("spawn"))  # fork is unsafe under threads


def _submit_here(function: Callable, *arguments) -> Future:
    future: Future = Future()
    future.set_result(function(*arguments))
    return future


def _finish(waiting: dict, settings: Settings, bar: tqdm) -> None:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        items, path = waiting.pop(future)
        try:
            future.result()
        except BrokenProcessPool:
            _write_partition(_isolated(items, settings), settings, path)
        bar.update(len(items))


def _isolated(items: list[Item], settings: Settings, work: Callable = rows) -> list[dict]:
    """Rows of a partition whose process died: halves in fresh processes until the culprit is alone."""
    try:
        with _processes(1) as pool:
            return pool.submit(work, items, settings).result()
    except BrokenProcessPool:
        if len(items) > 1:
            middle = len(items) // 2
            return _isolated(items[:middle], settings, work) + _isolated(items[middle:], settings, work)
    material_id, source, payload = items[0]
    material_id = material_id or str(orjson.loads(payload).get("id"))
    return [{"material_id": material_id, "source": source, "stage": "crash",
             "error": "the worker process died on this crystal (native crash or out of memory)"}]
