"""The corpus and the task tables: distinct crystals with their strings, counted, compared and packed.

De-duplication and statistics are SQL on Parquet (DuckDB): more rows than memory go through the disk, and the
corpus depends neither on the order of the input nor on the number of workers or the size of the partitions.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import orjson

from cloud_lib import io
from cloud_lib.partitions import FACTS, Item, Settings, run_partitions
from cloud_lib.representation import ABLATION_STYLES, STYLES, ablate
from cloud_lib.sources import corpus_files, embedded, optimade, records
from cloud_lib.symmetry import read_crystals

if TYPE_CHECKING:
    import pandas as pd

    from cloud_lib.tokenizer import Tokenizer

PAPER_KEY = ("formula_reduced", "space_group")  # CLOUD, section 4.1: equal in both = duplicates
ROW_GROUP = 100_000


# ------------------------------------------------------------------------------------------------ input
def read_lines(path: Path, source: str) -> Iterator[Item]:
    """Entries of an OPTIMADE JSON Lines file (.gz or plain), unparsed: the workers parse them.

    Raises:
        DamagedFile: the file is cut short or damaged.
    """
    with records.checked(path), records.open_bytes(path) as lines:
        header = True  # "x-optimade" and "info" lines come first
        for line in lines:
            header = header and orjson.loads(line).get("type") != "structures"
            if not header and not line.isspace():
                yield "", source, line


def corpus_items() -> Iterator[tuple[str, str, Any]]:
    """Every crystal of raw_dir()/corpus (OPTIMADE files) and raw_dir()/optimade (harvested pages).

    Without either, the crystals of the package registry.
    """
    files, harvested = corpus_files(), io.raw_dir() / "optimade"
    yield from path_items(files)
    yield from optimade.iter_structures(harvested)
    if not files and not list(harvested.glob("*/index.jsonl")):
        yield from embedded.corpus()


def path_items(paths: Iterable[Path]) -> Iterator[tuple[str, str, Any]]:
    """Every crystal of harvest folders, OPTIMADE JSON Lines files, or whatever `read_crystals` reads.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    for path in map(Path, paths):
        if list(path.glob("*/index.jsonl")):
            yield from optimade.iter_structures(path)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from read_lines(path, path.name.split(".")[0])
        else:
            for material_id, crystal in read_crystals(path):
                yield material_id, path.stem, crystal


# -------------------------------------------------------------------------------------------------- corpus
def curate(crystals: Iterable[tuple[str, str, Any]], out_dir: Path, symprec: float = 0.01, n_workers: int = 2,
           partition_size: int = 5000, styles: tuple[str, ...] = STYLES, engine: str = "auto",
           generators: str = "corrected", key: tuple[str, ...] = PAPER_KEY, executor: Executor | None = None,
           memory: str = "2GB") -> dict:
    """Corpus of distinct crystals with their symmetry strings; returns the manifest.

    Writes corpus.parquet, rejects.parquet, manifest.json and partitions/ into `out_dir`.

    Args:
        crystals: (material_id, source, structure); a structure is what `symmetry.as_crystal` takes, or the
            bytes of an OPTIMADE entry.
        symprec: tolerance of the symmetry search [A].
        key: columns that make two crystals duplicates.
        executor: any concurrent.futures executor whose workers see `out_dir`, for example that of a Dask
            client, `client.get_executor()`; default: `n_workers` local processes.
        memory: what the de-duplication may hold before it goes through the disk.

    Raises:
        ValueError: an unknown style, no crystals, or not one usable.
    """
    settings, out_dir = Settings(symprec, engine, generators, tuple(styles)), Path(out_dir)
    paths, inputs = run_partitions(crystals, out_dir / "partitions", settings, n_workers, partition_size,
                                   executor)
    with _database(paths, inputs, out_dir, n_workers, memory) as db:
        counts = deduplicate(db, out_dir / "corpus.parquet", settings.styles, key)
        counts["rejects"] = _write_rejects(db, out_dir / "rejects.parquet")
    outputs = {name: io.sha256(out_dir / name) for name in ("corpus.parquet", "rejects.parquet")}
    versions = {name: version(name) for name in ("spglib", "moyopy", "duckdb")}
    manifest = {"settings": settings, "key": list(key), "inputs": inputs, "counts": counts,
                "versions": versions, "outputs": outputs}
    for stale in set((out_dir / "partitions").glob("*.parquet")) - set(paths):
        stale.unlink()
    io.write_json(out_dir / "manifest.json", manifest)
    return io.read_json(out_dir / "manifest.json")


@contextmanager
def _database(paths: list[Path], inputs: dict, folder: Path, n_threads: int, memory: str
              ) -> Iterator[duckdb.DuckDBPyConnection]:
    """Views over partition files: `everything`, and `usable` without the rejects.

    Raises:
        ValueError: there are no crystals, or all are rejects.
    """
    n = sum(source["n"] for source in inputs.values())
    if not n:
        raise ValueError("expected crystals to curate, found none; run make data, or check the input")
    settings = {"threads": max(1, n_threads), "memory_limit": memory,
                "temp_directory": str(folder / ".spill"),
                "disabled_optimizers": "statistics_propagation"}  # else partitions decide what is nullable
    with duckdb.connect(config=settings) as db:
        db.read_parquet([str(path) for path in paths]).create_view("everything")
        db.sql("SELECT * EXCLUDE (stage, error) FROM everything WHERE stage IS NULL").create_view("usable")
        if not db.sql("SELECT 1 FROM usable LIMIT 1").fetchall():
            examples = db.sql("SELECT error FROM everything ORDER BY material_id LIMIT 3").fetchall()
            raise ValueError(f"expected usable crystals, found 0 of {n}, e.g. {[e for e, in examples]}")
        yield db


def deduplicate(db: duckdb.DuckDBPyConnection, target: Path, styles: tuple[str, ...] = STYLES,
                key: tuple[str, ...] = PAPER_KEY) -> dict:
    """Write one row per `key` of the view `usable`: the smallest volume per atom, then the first material_id.

    Rows are sorted by material_id and source. A material_id that a source repeats counts once. Returns counts:
    usable, repeated_ids, corpus, and per key the distinct crystals and how many de-duplication by it removes.
    """
    n_usable = _count(db, "usable")
    n_once = _count(db, "(SELECT DISTINCT source, material_id FROM usable)")
    order = "volume_per_atom, material_id, source"
    first = "SELECT * FROM usable" if n_once == n_usable else (
        "SELECT * FROM usable QUALIFY row_number() OVER (PARTITION BY source, material_id "
        f"ORDER BY volume_per_atom, {', '.join(FACTS)}, {', '.join(styles)}) = 1")
    db.sql(first).create_view("once", replace=True)
    _copy(db, "SELECT * FROM once QUALIFY row_number() OVER "
              f"(PARTITION BY {', '.join(key)} ORDER BY {order}) = 1 ORDER BY material_id, source", target)
    keys = {"formula_space_group": PAPER_KEY} | {style: (style,) for style in styles}
    present = {name: f"(SELECT {', '.join(k)} FROM once WHERE {k[0]} IS NOT NULL)" for name, k in keys.items()}
    distinct = {name: _count(db, f"(SELECT DISTINCT * FROM {table})") for name, table in present.items()}
    removed = {name: _count(db, table) - distinct[name] for name, table in present.items()}
    return {"usable": n_usable, "repeated_ids": n_usable - n_once, "distinct": distinct, "removed": removed,
            "corpus": _count(db, f"read_parquet('{_quoted(target)}')")}


def _count(db: duckdb.DuckDBPyConnection, table: str) -> int:
    return db.sql(f"SELECT count(*) FROM {table}").fetchall()[0][0]


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _copy(db: duckdb.DuckDBPyConnection, query: str, target: Path) -> None:
    with io.atomic_path(target) as temporary:
        db.execute(f"COPY ({query}) TO '{_quoted(temporary)}' (FORMAT parquet, COMPRESSION zstd, "
                   f"ROW_GROUP_SIZE {ROW_GROUP})").fetchall()


def _write_rejects(db: duckdb.DuckDBPyConnection, target: Path) -> dict[str, int]:
    rejects = "SELECT DISTINCT material_id, source, stage, error FROM everything WHERE stage IS NOT NULL"
    _copy(db, f"{rejects} ORDER BY ALL", target)
    return dict(db.sql(f"SELECT stage, count(*) FROM ({rejects}) GROUP BY stage ORDER BY stage").fetchall())


# --------------------------------------------------------------------------------------------------- tasks
def prepare_task(df: "pd.DataFrame", out_dir: Path, task: str, symprec: float = 0.01, n_workers: int = 2,
                 styles: tuple[str, ...] = STYLES, engine: str = "auto", generators: str = "corrected"
                 ) -> dict:
    """Task table with strings from a `sources.load_task` frame; returns its accounting.

    Writes <task>.parquet (usable rows, in the official order), <task>.rejects.parquet and <task>.json: the
    frame's attributes (rows of rows_official), `n_available` rows read, of which `n_usable` have strings.

    Args:
        df: columns material_id, structure, target, fold, row.

    Raises:
        ValueError: a material_id occurs twice, or nothing is usable.
    """
    settings, out_dir = Settings(symprec, engine, generators, tuple(styles)), Path(out_dir)
    ids = [str(material_id) for material_id in df["material_id"]]
    if repeated := [name for name, k in Counter(ids).items() if k > 1]:
        raise ValueError(f"{task}: expected each material_id once, found {len(repeated)} repeated, e.g. "
                         f"{repeated[:3]}")
    crystals = ((name, task, structure) for name, structure in zip(ids, df["structure"], strict=True))
    paths, inputs = run_partitions(crystals, out_dir / "partitions" / task, settings, n_workers, 1000)
    labels = df[["row", "fold", "target"]].astype({"row": "int64", "fold": "int8", "target": "float64"})
    with _database(paths, inputs, out_dir, n_workers, "2GB") as db:
        db.register("labels", labels.assign(material_id=ids))
        columns = ", ".join(["material_id", "row", "fold", "target", *FACTS, *settings.styles])
        _copy(db, f"SELECT {columns} FROM usable JOIN labels USING (material_id) ORDER BY row",
              out_dir / f"{task}.parquet")
        accounting = {"task": task, **_attributes(df), "n_available": len(ids),
                      "n_usable": _count(db, "usable"),
                      "rejects": _write_rejects(db, out_dir / f"{task}.rejects.parquet")}
    accounting |= {"settings": settings, "inputs": inputs, "sha256": io.sha256(out_dir / f"{task}.parquet")}
    io.write_json(out_dir / f"{task}.json", accounting)
    return io.read_json(out_dir / f"{task}.json")


def _attributes(df: "pd.DataFrame") -> dict:
    """What the source says about the frame (rows_official, folds, ...), as far as JSON can hold it."""
    return {name: value for name, value in df.attrs.items() if isinstance(value, str | int | float)}


# ------------------------------------------------------------------------------------------------- reports
def exclusion_keys(task_tables: dict[str, Path]) -> "pd.DataFrame":
    """formula_reduced, space_group and canonical of every crystal of the tasks: what leaves pre-training."""
    tables = [str(path) for path in task_tables.values()]
    return duckdb.read_parquet(tables).select("formula_reduced", "space_group", "canonical").distinct().order(
        "ALL").df()


def overlap_report(corpus: Path, task_tables: dict[str, Path]) -> "pd.DataFrame":
    """Test crystals that the corpus holds: task, fold, and counts n, by_formula_space_group, by_canonical."""
    import pandas as pd

    found = []
    with duckdb.connect() as db:
        db.read_parquet(str(corpus)).create_view("corpus")
        for task, path in task_tables.items():
            db.read_parquet(str(path)).create_view("task", replace=True)
            found.append(db.sql("""
                SELECT fold, count(*) AS n, count(formulas.formula_reduced) AS by_formula_space_group,
                    count(strings.canonical) AS by_canonical
                FROM task
                LEFT JOIN (SELECT DISTINCT formula_reduced, space_group FROM corpus) AS formulas
                    USING (formula_reduced, space_group)
                LEFT JOIN (SELECT DISTINCT canonical FROM corpus) AS strings USING (canonical)
                GROUP BY fold ORDER BY fold""").df().assign(task=task))
    columns = ["task", "fold", "n", "by_formula_space_group", "by_canonical"]
    return pd.concat(found, ignore_index=True)[columns]


def corpus_statistics(corpus: Path, styles: tuple[str, ...] = STYLES) -> "pd.DataFrame":
    """Counts `n` of crystals per `space_group`, per `element`, and per `style` and `n_tokens` of its strings.

    One long table; `statistic` says which of the three a line is: space_groups, elements or lengths.
    """
    import pandas as pd

    elements = "unnest(list_distinct(regexp_extract_all(formula_reduced, '[A-Z][a-z]?')))"
    lengths = [f"SELECT '{s}' AS style, len(string_split({s}, ' ')) AS n_tokens, count(*) AS n FROM corpus "
               f"WHERE {s} IS NOT NULL GROUP BY n_tokens" for s in styles]
    queries = {
        "space_groups": "SELECT space_group, count(*) AS n FROM corpus GROUP BY space_group "
                        "ORDER BY space_group",
        "elements": f"SELECT element, count(*) AS n FROM (SELECT {elements} AS element FROM corpus) "
                    "GROUP BY element ORDER BY n DESC, element",
        "lengths": f"{' UNION ALL '.join(lengths)} ORDER BY style, n_tokens"}
    with duckdb.connect() as db:
        db.read_parquet(str(corpus)).create_view("corpus")
        found = {name: db.sql(query).df() for name, query in queries.items()}
    return pd.concat(found, names=["statistic", None]).reset_index("statistic")


def string_statistics(out_dir: Path, styles: tuple[str, ...] = STYLES) -> "pd.DataFrame":
    """What each style can tell apart among all curated crystals, before de-duplication (a line per style).

    Crystals count as different if their `site` strings differ. Columns: `style`, `strings`, `crystals`,
    `strings_of_several` (shared by different crystals), `crystals_sharing`, and `crystals_written_differently` (one
    crystal, several strings: the style depends on how the file lists the atoms).
    """
    query = """
        WITH pairs AS (SELECT DISTINCT {s} AS text, site FROM crystals WHERE {s} IS NOT NULL AND site IS NOT NULL),
             by_text AS (SELECT count(*) AS k FROM pairs GROUP BY text),
             by_site AS (SELECT count(*) AS k FROM pairs GROUP BY site)
        SELECT '{s}' AS style, (SELECT count(*) FROM by_text) AS strings, (SELECT count(*) FROM by_site) AS crystals,
               (SELECT count(*) FILTER (k > 1) FROM by_text) AS strings_of_several,
               (SELECT coalesce(sum(k) FILTER (k > 1), 0)::BIGINT FROM by_text) AS crystals_sharing,
               (SELECT count(*) FILTER (k > 1) FROM by_site) AS crystals_written_differently"""
    with duckdb.connect() as db:
        db.read_parquet(f"{out_dir / 'partitions'}/*.parquet").create_view("crystals")
        return db.sql(" UNION ALL ".join(f"({query.format(s=s)})" for s in styles)).df()


# ------------------------------------------------------------------------------------------------ packing
def pack_corpus(corpus: Path, style: str, tokenizer: "Tokenizer", out_dir: Path,
                exclude: "pd.DataFrame | None" = None) -> dict:
    """Packed tokens of the corpus, one string per (formula, space group); returns the counts.

    An ablation style is made from the canonical strings. Pre-training splits off its validation rows itself, so
    that equal strings never stand on both sides.

    Args:
        exclude: keys from `exclusion_keys`; their crystals are left out.

    Raises:
        ValueError: no string of this style in the corpus.
    """
    with duckdb.connect() as db:
        db.read_parquet(str(corpus)).create_view("corpus")
        kept = "corpus"
        if exclude is not None:
            db.register("exclude", exclude)
            kept = ("(SELECT corpus.* FROM corpus ANTI JOIN exclude USING (formula_reduced, space_group) "
                    "WHERE canonical IS NULL OR canonical NOT IN "
                    "(SELECT canonical FROM exclude WHERE canonical IS NOT NULL))")
        n_all, n_kept = _count(db, "corpus"), _count(db, kept)
        written = _written(style)
        found = db.sql(f"SELECT space_group, {written} FROM {kept} WHERE {written} IS NOT NULL "
                       "ORDER BY material_id, source").fetchnumpy()
    strings = _strings(found[written], found["space_group"], style)
    if not len(strings):
        raise ValueError(f"expected strings of style {style} in {corpus}, found none")
    counts = {"n": len(strings), "n_distinct_strings": len(set(strings)),
              "n_without_string": n_kept - len(strings), "n_excluded": n_all - n_kept}
    _pack(strings, style, tokenizer, Path(out_dir), {"counts": counts})
    return counts


def pack_task(task_table: Path, style: str, tokenizer: "Tokenizer", out_dir: Path) -> dict:
    """Packed tokens of a task with labels (target, fold, row) and material_id; returns the counts.

    An ablation style is made from the canonical strings. The packed meta names the task and its number of folds.
    """
    import pandas as pd

    table = pd.read_parquet(task_table)
    usable = table.dropna(subset=[_written(style)])
    counts = {"n": len(usable), "n_without_string": len(table) - len(usable)}
    labels = {name: usable[name].to_numpy() for name in ("target", "fold", "row")}
    names = usable["material_id"].tolist()
    strings = _strings(usable[_written(style)], usable["space_group"], style)
    about = {"task": task_table.stem, "n_folds": int(table["fold"].max()) + 1}
    _pack(strings, style, tokenizer, Path(out_dir), about | {"counts": counts}, labels, names)
    return counts


def _written(style: str) -> str:
    """Column of the tables that strings of `style` are made from."""
    return "canonical" if style in ABLATION_STYLES else style


def _strings(written: Iterable[str], space_groups: Iterable[int], style: str) -> list[str]:
    if style not in ABLATION_STYLES:
        return list(written)
    return [ablate(text, int(group), style) for text, group in zip(written, space_groups, strict=True)]


def _pack(strings: Iterable[str], style: str, tokenizer: "Tokenizer", out_dir: Path, about: dict,
          labels: dict[str, np.ndarray] | None = None, material_id: list[str] | None = None) -> None:
    from cloud_lib.dataset import pack

    tokens, offsets = tokenizer.encode_many(strings)
    meta = {"style": style, "vocab_sha256": tokenizer.sha256, "vocab_version": tokenizer.version,
            "vocab_size": tokenizer.vocab_size, "mask_id": tokenizer.mask_id, "cls_id": tokenizer.cls_id,
            "sep_id": tokenizer.sep_id, "n_special": int((tokenizer.part_of_id == 0).sum()),
            "part_of_id": tokenizer.part_of_id.tolist()} | about
    pack(tokens, offsets, out_dir, meta, labels, material_id)
