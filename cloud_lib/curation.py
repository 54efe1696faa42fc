"""Structures -> symmetry strings over partitions, de-duplicated; task tables; packed tokens.

A partition is a few thousand crystals, worked on by one process and stored as one atomic Parquet file whose
name is a digest of its input, so a killed run continues where it stopped. The end result depends neither on
the order of the input nor on the number of workers or the size of the partitions.
"""

import gzip
import hashlib
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
from tqdm import tqdm

from . import io
from .representation import MAX_POSITIONS, STYLES, string
from .symmetry import Crystal, CrystalError, as_crystal, symmetry_record

FACTS = {"formula_reduced": pl.String, "space_group": pl.Int16, "volume_per_atom": pl.Float64,
         "n_sites": pl.Int32}
PAPER_KEY = ("formula_reduced", "space_group")  # CLOUD, section 4.1: same formula and space group = duplicates
Item = tuple[str, str, bytes]  # material_id ("": the record's own id), source, JSON of the structure


@dataclass(frozen=True)
class Settings:
    """How a crystal becomes strings; part of every partition's name. `symprec` in angstrom."""

    symprec: float = 0.01
    engine: str = "auto"
    generators: str = "corrected"
    styles: tuple[str, ...] = STYLES

    @property
    def schema(self) -> dict[str, Any]:
        texts = dict.fromkeys((*self.styles, "stage", "error"), pl.String)
        return {"material_id": pl.String, "source": pl.String, **FACTS, **texts}


# ------------------------------------------------------------------------------------------------ input
def read_lines(path: str | Path, source: str) -> Iterator[Item]:
    """Entries of an OPTIMADE JSON Lines file (.gz or plain), unparsed: the workers parse them.

    Raises:
        ValueError: the compressed file is truncated or damaged.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as lines:
            header = True  # "x-optimade" and "info" lines come first
            for line in lines:
                header = header and orjson.loads(line).get("type") != "structures"
                if not header and not line.isspace():
                    yield "", source, line
    except (EOFError, gzip.BadGzipFile, zlib.error, orjson.JSONDecodeError) as error:
        raise ValueError(f"expected OPTIMADE JSON Lines in {path}, found damage ({error}); fetch the file again"
                         ) from error


def corpus_items() -> Iterator[Item | tuple[str, str, Any]]:
    """All crystals of $CLOUD_DATA/corpus/*.jsonl.gz if there are any, else those of the package registry."""
    files = sorted((io.raw_dir() / "corpus").glob("*.jsonl*"))
    if not files:
        from .sources import embedded
        yield from embedded.corpus()
    for path in files:
        yield from read_lines(path, path.name.split(".")[0])


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
            yield base | {"stage": "length", "error": f"style {style}: expected at most {MAX_POSITIONS[style]} "
                                                      f"positions, found {length}"}


def process_partition(items: list[Item], settings: Settings, path: Path) -> None:
    _write_partition(rows(items, settings), settings, path)


def _write_partition(found: list[dict], settings: Settings, path: Path) -> None:
    with io.atomic_path(path) as temporary:
        pl.DataFrame(found, schema=settings.schema).write_parquet(temporary)


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
            one = hashlib.blake2b(b"\0".join((material_id.encode(), source.encode(), payload)), digest_size=16)
            whole.update(one.digest())
            self.n[source] += 1
            self.digest[source] = (self.digest[source] + int.from_bytes(one.digest())) % (1 << 128)
        return whole.hexdigest()

    def summary(self) -> dict:
        return {s: {"n": self.n[s], "digest": f"{self.digest[s]:032x}"} for s in sorted(self.n)}


def _partitions(crystals: Iterable, folder: Path, settings: Settings, n_workers: int, size: int,
                executor: Executor | None) -> tuple[list[Path], dict]:
    """Every crystal's rows in partition files below `folder`; those already there are not computed again."""
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


def _isolated(items: list[Item], settings: Settings) -> list[dict]:
    """Rows of a partition whose process died: halves in fresh processes, until the crystal that kills is alone."""
    try:
        with _processes(1) as pool:
            return pool.submit(rows, items, settings).result()
    except BrokenProcessPool:
        if len(items) > 1:
            middle = len(items) // 2
            return _isolated(items[:middle], settings) + _isolated(items[middle:], settings)
    material_id, source, payload = items[0]
    material_id = material_id or str(orjson.loads(payload).get("id"))
    return [{"material_id": material_id, "source": source, "stage": "crash",
             "error": "the worker process died on this crystal (native crash or out of memory)"}]


# -------------------------------------------------------------------------------------------------- corpus
def deduplicate(frame: pl.LazyFrame, key: tuple[str, ...] = PAPER_KEY) -> pl.LazyFrame:
    """One row per `key`: the smallest volume per atom, ties by material_id, then source; sorted by both."""
    order = [pl.col("volume_per_atom"), pl.col("material_id"), pl.col("source")]
    best = frame.group_by(key).agg(pl.all().sort_by(order).first())
    return best.select(frame.collect_schema().names()).sort("material_id", "source")


def curate(crystals: Iterable[tuple[str, str, Any]], out_dir: Path, symprec: float = 0.01, n_workers: int = 2,
           partition_size: int = 5000, styles: tuple[str, ...] = STYLES, engine: str = "auto",
           generators: str = "corrected", key: tuple[str, ...] = PAPER_KEY,
           executor: Executor | None = None) -> dict:
    """Corpus of distinct crystals with their symmetry strings; returns the manifest.

    crystals: (material_id, source, structure); a structure is what `symmetry.as_crystal` takes, or the bytes of
        an OPTIMADE entry. symprec in angstrom. key: columns that make two crystals duplicates.
    executor: any concurrent.futures executor with this file system, e.g. `dask.distributed.Client.get_executor()`.
    Writes corpus.parquet, rejects.parquet, manifest.json and partitions/ into `out_dir`.

    Raises:
        ValueError: an unknown style, no crystals, or not one usable.
    """
    settings = Settings(symprec, engine, generators, tuple(styles))
    _check_styles(settings.styles)
    out_dir = Path(out_dir)
    paths, inputs = _partitions(crystals, out_dir / "partitions", settings, n_workers, partition_size, executor)
    frame = _usable(paths, inputs)
    counts = _write_corpus(frame, out_dir, key, settings.styles)
    rejects = _write_rejects(paths, out_dir / "rejects.parquet")
    manifest = {"settings": settings, "key": list(key), "inputs": inputs, "counts": counts | {"rejects": rejects},
                "versions": {name: version(name) for name in ("spglib", "moyopy", "polars")},
                "outputs": {name: io.sha256(out_dir / name) for name in ("corpus.parquet", "rejects.parquet")}}
    _remove_stale(out_dir / "partitions", paths)
    io.write_json(out_dir / "manifest.json", manifest)
    return io.read_json(out_dir / "manifest.json")


def _check_styles(styles: tuple[str, ...]) -> None:
    if unknown := [style for style in styles if style not in MAX_POSITIONS]:
        raise ValueError(f"expected styles among {', '.join(MAX_POSITIONS)}, found {unknown[:3]}")


def _usable(paths: list[Path], inputs: dict) -> pl.LazyFrame:
    n = sum(source["n"] for source in inputs.values())
    if not n:
        raise ValueError("expected crystals to curate, found none; check the folder named by CLOUD_DATA")
    frame = pl.scan_parquet(paths).filter(pl.col("stage").is_null())
    if frame.head(1).collect().is_empty():
        examples = pl.scan_parquet(paths).head(3).collect()["error"].to_list()
        raise ValueError(f"expected usable crystals, found 0 of {n}, e.g. {examples}")
    return frame.drop("stage", "error")


def _write_corpus(frame: pl.LazyFrame, out_dir: Path, key: tuple[str, ...], styles: tuple[str, ...]) -> dict:
    every = deduplicate(frame, ("source", "material_id")).collect()
    corpus = deduplicate(every.lazy(), key).collect()
    with io.atomic_path(out_dir / "corpus.parquet") as temporary:
        corpus.write_parquet(temporary, row_group_size=100_000)
    n_read = frame.select(pl.len()).collect().item()
    keys = {"formula_space_group": PAPER_KEY} | {style: (style,) for style in styles}
    distinct = {name: every.lazy().select(columns).drop_nulls().unique().select(pl.len()).collect().item()
                for name, columns in keys.items()}
    return {"usable": n_read, "repeated_ids": n_read - every.height, "distinct": distinct,
            "removed": {name: every.height - n for name, n in distinct.items()}, "corpus": corpus.height}


def _write_rejects(paths: list[Path], target: Path) -> dict[str, int]:
    columns = ["material_id", "source", "stage", "error"]
    rejects = pl.scan_parquet(paths).filter(pl.col("stage").is_not_null()).select(columns)
    rejects = rejects.unique().sort(columns).collect()
    with io.atomic_path(target) as temporary:
        rejects.write_parquet(temporary)
    return dict(rejects.group_by("stage").len().sort("stage").iter_rows())


def _remove_stale(folder: Path, paths: list[Path]) -> None:
    for path in set(folder.glob("*.parquet")) - set(paths):
        path.unlink()


# --------------------------------------------------------------------------------------------------- tasks
def prepare_task(df, out_dir: Path, task: str, symprec: float = 0.01, n_workers: int = 2,
                 styles: tuple[str, ...] = STYLES, engine: str = "auto", generators: str = "corrected") -> dict:
    """Task table with strings from a `sources.load_task` frame; returns its accounting.

    df: pandas columns material_id, structure, target, fold, row. Writes <task>.parquet (usable rows, official
    order), <task>.rejects.parquet and <task>.json: of `n_official` rows, `n_available` were found and `n_usable`
    have a string.

    Raises:
        ValueError: a material_id occurs twice, or nothing is usable.
    """
    settings, out_dir = Settings(symprec, engine, generators, tuple(styles)), Path(out_dir)
    _check_styles(settings.styles)
    ids = [str(material_id) for material_id in df["material_id"]]
    if repeated := [name for name, k in Counter(ids).items() if k > 1]:
        raise ValueError(f"{task}: expected each material_id once, found {len(repeated)} repeated, e.g. "
                         f"{repeated[:3]}")
    crystals = ((name, task, structure) for name, structure in zip(ids, df["structure"], strict=True))
    paths, inputs = _partitions(crystals, out_dir / "partitions" / task, settings, n_workers, 1000, None)
    labels = pl.DataFrame({"material_id": ids, "row": df["row"].to_numpy().astype(np.int64),
                           "fold": df["fold"].to_numpy().astype(np.int8),
                           "target": df["target"].to_numpy().astype(np.float64)})
    strings = _usable(paths, inputs).drop("source").collect()
    table = labels.join(strings, on="material_id", validate="1:1").sort("row")
    with io.atomic_path(out_dir / f"{task}.parquet") as temporary:
        table.write_parquet(temporary)
    rejects = _write_rejects(paths, out_dir / f"{task}.rejects.parquet")
    accounting = {"task": task, **_attributes(df), "n_available": len(ids), "n_usable": table.height,
                  "rejects": rejects, "settings": settings, "inputs": inputs,
                  "sha256": io.sha256(out_dir / f"{task}.parquet")}
    io.write_json(out_dir / f"{task}.json", accounting)
    return io.read_json(out_dir / f"{task}.json")


def _attributes(df) -> dict:
    """What the source says about the frame (n_official, folds, ...), as far as JSON can hold it."""
    return {k: v for k, v in df.attrs.items() if isinstance(v, str | int | float)}


def exclusion_keys(task_tables: dict[str, Path]) -> pl.DataFrame:
    """(formula_reduced, space_group, canonical) of every crystal of the tasks: what leaves pre-training."""
    columns = [*PAPER_KEY, "canonical"]
    return pl.concat([pl.read_parquet(p, columns=columns) for p in task_tables.values()]).unique().sort(columns)


def overlap_report(corpus: Path, task_tables: dict[str, Path]):
    """Which test crystals occur in the corpus (pandas): task, fold, n, by formula + space group, by string."""
    known = pl.scan_parquet(corpus).select(*PAPER_KEY, "canonical").collect()
    formulas = known.select(PAPER_KEY).unique().with_columns(in_formula=True)
    strings = known.select("canonical").drop_nulls().unique().with_columns(in_string=True)
    found = []
    for task, path in task_tables.items():
        table = pl.read_parquet(path, columns=["fold", *PAPER_KEY, "canonical"])
        table = table.join(formulas, on=PAPER_KEY, how="left").join(strings, on="canonical", how="left")
        found.append(table.group_by("fold").agg(
            n=pl.len(), by_formula_space_group=pl.col("in_formula").fill_null(False).sum(),
            by_canonical=pl.col("in_string").fill_null(False).sum()).sort("fold").with_columns(task=pl.lit(task)))
    columns = ["task", "fold", "n", "by_formula_space_group", "by_canonical"]
    return pl.concat(found).select(columns).to_pandas()


def corpus_statistics(corpus: Path, styles: tuple[str, ...] = STYLES) -> dict:
    """Pandas frames: space_groups, elements, lengths (tokens per style), collisions (crystals sharing a string)."""
    frame = pl.scan_parquet(corpus)
    elements = pl.col("formula_reduced").str.extract_all("[A-Z][a-z]?").alias("element")
    lengths = [frame.group_by(pl.col(s).str.count_matches(r"\S+").alias("n_tokens")).len("n").drop_nulls()
               .select(pl.lit(s).alias("style"), "n_tokens", "n").sort("n_tokens").collect() for s in styles]
    tables = {"space_groups": frame.group_by("space_group").len("n").sort("space_group").collect(),
              "elements": frame.select(elements).explode("element").group_by("element").len("n")
              .sort("n", "element", descending=[True, False]).collect(),
              "lengths": pl.concat(lengths),
              "collisions": pl.DataFrame([_collisions(frame, style) for style in styles])}
    return {name: table.to_pandas() for name, table in tables.items()}


def _collisions(frame: pl.LazyFrame, style: str) -> dict:
    shared = frame.select(style).drop_nulls().group_by(style).len("n").filter(pl.col("n") > 1)
    sums = shared.select(pl.len().alias("strings"), pl.col("n").sum().alias("crystals")).collect()
    return {"style": style, "n": frame.select(pl.col(style).count()).collect().item(),
            "shared_strings": sums["strings"].item(), "crystals_sharing": sums["crystals"].item()}


# ------------------------------------------------------------------------------------------------ packing
def pack_corpus(corpus: Path, style: str, tokenizer, out_dir: Path, exclude: pl.DataFrame | None = None) -> dict:
    """Packed tokens of the corpus, one string per (formula, space group); returns the counts.

    Pre-training splits off its validation rows itself, so that equal strings never stand on both sides.
    exclude: keys from `exclusion_keys`; their crystals are left out.

    Raises:
        ValueError: no string of this style in the corpus.
    """
    everything = pl.read_parquet(corpus)
    kept = _excluded(everything, exclude)
    frame = kept.drop_nulls(style)
    if frame.is_empty():
        raise ValueError(f"expected strings of style {style} in {corpus}, found none")
    counts = {"n": frame.height, "n_distinct_strings": frame[style].n_unique(),
              "n_without_string": kept.height - frame.height, "n_excluded": everything.height - kept.height}
    _pack(frame[style].to_list(), style, tokenizer, Path(out_dir), counts)
    return counts


def _excluded(frame: pl.DataFrame, exclude: pl.DataFrame | None) -> pl.DataFrame:
    if exclude is None:
        return frame
    frame = frame.join(exclude.select(PAPER_KEY).unique(), on=PAPER_KEY, how="anti", maintain_order="left")
    return frame.join(exclude.select("canonical").drop_nulls().unique(), on="canonical", how="anti",
                      maintain_order="left")


def pack_task(task_table: Path, style: str, tokenizer, out_dir: Path) -> dict:
    """Packed tokens of a task with labels.npz (target, fold, row) and material_id.json; returns the counts."""
    table = pl.read_parquet(task_table)
    usable, out_dir = table.drop_nulls(style), Path(out_dir)
    counts = {"n": usable.height, "n_without_string": table.height - usable.height}
    _pack(usable[style].to_list(), style, tokenizer, out_dir, counts)
    with io.atomic_path(out_dir / "labels.npz") as temporary:
        np.savez(temporary, **{name: usable[name].to_numpy() for name in ("target", "fold", "row")})
    io.write_json(out_dir / "material_id.json", usable["material_id"].to_list())
    return counts


def _pack(strings: list[str], style: str, tokenizer, out_dir: Path, counts: dict) -> None:
    from .dataset import pack
    tokens, offsets = tokenizer.encode_many(strings)
    meta = {"style": style, "vocab_sha256": tokenizer.sha256, "vocab_version": tokenizer.version,
            "vocab_size": tokenizer.vocab_size, "mask_id": tokenizer.mask_id, "cls_id": tokenizer.cls_id,
            "sep_id": tokenizer.sep_id, "n_special": int((tokenizer.part_of_id == 0).sum()),
            "part_of_id": tokenizer.part_of_id.tolist(), "counts": counts}
    pack(tokens, offsets, out_dir, meta)
