"""Curation: time and memory over the number of crystals, and de-duplication of millions of synthetic rows.

`CLOUD_DATA=... python benchmarks/bench_curation.py curve` curates the first 10,000 ... all crystals of the
corpus folder; `python benchmarks/bench_curation.py dedup --corpus corpus.parquet` multiplies a corpus to --rows
rows, about half of them duplicates, and de-duplicates them. Each measurement is a process of its own; results go
to benchmarks/results/curation_*.csv. Memory: largest resident set of the parent plus that of every worker.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cloud_lib import curation

RESULTS = Path(__file__).parent / "results"


def usage(started: float, n_workers: int) -> dict:
    """Wall and CPU seconds so far; peak memory in MB (an upper bound: every child counted as the largest)."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return {"wall_s": round(time.perf_counter() - started, 1), "cpu_s": round(cpu, 1),
            "peak_mb": round((own.ru_maxrss + n_workers * children.ru_maxrss) / 1024)}


def curate_once(n: int, n_workers: int, folder: Path) -> dict:
    started = time.perf_counter()
    manifest = curation.curate(islice(curation.corpus_items(), n or None), folder, n_workers=n_workers)
    counts = manifest["counts"]
    return {"crystals": sum(s["n"] for s in manifest["inputs"].values()), "corpus": counts["corpus"],
            "rejects": sum(counts["rejects"].values()), **usage(started, n_workers)}


def synthetic(corpus: Path, n: int, folder: Path, size: int = 5000) -> None:
    """Partition files of `n` rows: the corpus's rows with tags that leave about half of them distinct."""
    table, rng = pq.read_table(corpus), np.random.default_rng(0)
    numbers, n_tags = rng.permutation(n), max(1, n // len(table) // 2)
    for start in range(0, n, size):
        part = table.take(rng.integers(len(table), size=min(size, n - start)))
        tag = pa.array(rng.integers(n_tags, size=len(part)).astype(str))
        columns = {name: part[name] for name in part.column_names}
        columns["material_id"] = pa.array([f"s-{i}" for i in numbers[start:start + size]])
        columns["volume_per_atom"] = pa.array(rng.random(len(part)))
        columns |= {name: pc.binary_join_element_wise(part[name], tag, " ")
                    for name in ("formula_reduced", *curation.STYLES)}
        columns |= dict.fromkeys(("stage", "error"), pa.nulls(len(part), pa.string()))
        pq.write_table(pa.table(columns), folder / f"{start:09d}.parquet", compression="zstd")


def deduplicate_once(folder: Path, memory: str, n_threads: int) -> dict:
    started = time.perf_counter()
    paths = sorted(folder.glob("*.parquet"))
    n = duckdb.sql(f"SELECT count(*) FROM '{folder}/*.parquet'").fetchall()[0][0]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        with curation._database(paths, {"synthetic": {"n": n}}, Path(name), n_threads, memory) as db:
            counts = curation.deduplicate(db, Path(name) / "corpus.parquet")
    return {"rows": n, "corpus": counts["corpus"], "memory_limit": memory, **usage(started, 0)}


def separately(*arguments: str) -> dict:
    """One measurement in a fresh process."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], check=True, stdout=subprocess.PIPE,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    row = json.loads(done.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


def save(rows: list[dict], name: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(RESULTS / f"curation_{name}.csv", index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("curve", "dedup", "one-curate", "one-dedup"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 25_000, 50_000, 100_000, 0], help="0: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000_000])
    parser.add_argument("--corpus", type=Path, help="a corpus.parquet, for dedup")
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "one-curate":
        print(json.dumps(curate_once(args.sizes[0], args.workers, args.folder)))
    elif args.what == "one-dedup":
        print(json.dumps(deduplicate_once(args.folder, args.memory, args.workers)))
    elif args.what == "curve":
        rows = []
        for n in args.sizes:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(separately("one-curate", "--sizes", n, "--workers", args.workers, "--folder", folder))
        save(rows, "curve")
    else:
        rows = []
        for n in args.rows:
            with tempfile.TemporaryDirectory() as folder:
                synthetic(args.corpus, n, Path(folder))
                rows.append(separately("one-dedup", "--memory", args.memory, "--workers", args.workers,
                                       "--folder", folder))
        save(rows, "dedup")


if __name__ == "__main__":
    main()
