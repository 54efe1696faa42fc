"""Curation: the same bytes however it runs, rejects with reasons, de-duplication, tasks, overlap, packing."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

from cloud_lib import curation, io, partitions
from cloud_lib.dataset import PackedTokens
from cloud_lib.sources import DamagedFile
from cloud_lib.tokenizer import Tokenizer


def cubic(name, atoms, a=4.0):
    """OPTIMADE entry of a cubic cell [A]; atoms: (element, fractional position)."""
    symbols = [element for element, _ in atoms]
    species = [{"name": e, "chemical_symbols": [e], "concentration": [1.0]} for e in dict.fromkeys(symbols)]
    return {"type": "structures", "id": name, "attributes": {
        "lattice_vectors": [[a, 0, 0], [0, a, 0], [0, 0, a]], "species": species, "species_at_sites": symbols,
        "cartesian_site_positions": [[a * x for x in position] for _, position in atoms]}}


def perovskite(name, a_site, b_site, x_site="O", a=4.0):
    sites = [(a_site, (0, 0, 0)), (b_site, (.5, .5, .5)), (x_site, (.5, .5, 0)), (x_site, (.5, 0, .5)),
             (x_site, (0, .5, .5))]
    return cubic(name, sites, a)


def rock_salt(name, cation, anion, a=4.2):
    half = [(0, 0, 0), (0, .5, .5), (.5, 0, .5), (.5, .5, 0)]
    moved = [((x + .5) % 1, y, z) for x, y, z in half]
    return cubic(name, [(cation, p) for p in half] + [(anion, p) for p in moved], a)


def crystals():
    """About 60 distinct ones, two of them twice at other volumes, and three that are none."""
    found = [perovskite(f"p-{a}-{b}", a, b) for a in "Ca Sr Ba Pb K".split() for b in "Ti Zr Sn Nb".split()]
    found += [rock_salt(f"r-{c}-{x}", c, x) for c in "Li Na K Mg Ca Sr".split() for x in "F Cl O S".split()]
    found += [perovskite("a-larger", "Ba", "Ti", a=4.2), perovskite("z-smaller", "Sr", "Ti", a=3.9)]
    bad = cubic("bad-overlap", [("Na", (0, 0, 0)), ("Cl", (0, 0, .01))])
    disordered = rock_salt("bad-disorder", "Na", "Cl")
    disordered["attributes"]["species"][0] |= {"chemical_symbols": ["Na", "K"], "concentration": [.5, .5]}
    found += [bad, disordered, cubic("bad-element", [("Xx", (0, 0, 0))])]
    return [(entry["id"], "test", entry) for entry in found]


def read(path):
    return pd.read_parquet(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, curation.curate(crystals(), folder, n_workers=1)


def test_duplicates_keep_the_smallest_volume_per_atom(corpus):
    folder, manifest = corpus
    table = read(folder / "corpus.parquet").set_index("material_id")
    assert len(table) == manifest["counts"]["corpus"] == 44 and table.index.is_monotonic_increasing
    assert "p-Ba-Ti" in table.index and "a-larger" not in table.index
    assert "z-smaller" in table.index and "p-Sr-Ti" not in table.index
    row = table.loc["p-Ba-Ti"]
    assert (row.formula_reduced, row.space_group, row.n_sites) == ("BaTiO3", 221, 5)
    assert row.volume_per_atom == pytest.approx(64 / 5)
    assert manifest["counts"]["removed"] == {"formula_space_group": 2, "paper": 2, "canonical": 2, "site": 2}


def test_rejects_say_why(corpus):
    folder, manifest = corpus
    rejects = read(folder / "rejects.parquet").set_index("material_id")
    assert manifest["counts"]["rejects"] == rejects.groupby("stage").size().to_dict() and len(rejects) == 3
    assert "overlapping atoms" in rejects.error["bad-overlap"]
    assert "disordered" in rejects.error["bad-disorder"]
    assert "unknown species" in rejects.error["bad-element"]


def test_manifest_names_inputs_and_outputs(corpus):
    folder, manifest = corpus
    assert manifest["inputs"]["test"]["n"] == len(crystals())
    assert manifest["outputs"]["corpus.parquet"] == io.sha256(folder / "corpus.parquet")


def test_order_workers_partitions_and_engine_leave_the_bytes_alone(corpus, tmp_path):
    expected = corpus[1]
    mixed = crystals()
    random.Random(0).shuffle(mixed)
    with ThreadPoolExecutor(2) as pool:  # stands for a cluster's executor
        runs = [curation.curate(mixed, tmp_path / "a", n_workers=2, partition_size=7),
                curation.curate(mixed[::-1], tmp_path / "b", partition_size=1, executor=pool)]
    for run in runs:
        assert {k: run[k] for k in ("inputs", "counts", "outputs")} == {
            k: expected[k] for k in ("inputs", "counts", "outputs")}


def test_killed_run_continues(corpus, tmp_path):
    lines = tmp_path / "all.jsonl"
    lines.write_text("".join(json.dumps(entry) + "\n" for _, _, entry in crystals()))
    code = ("import sys, time; from pathlib import Path; from cloud_lib import curation, partitions\n"
            "real = partitions.process_partition\n"
            "def slow(*task): time.sleep(.05); real(*task)\n"
            "partitions.process_partition = slow\n"
            "curation.curate(curation.read_lines(Path(sys.argv[1]), 'test'), Path(sys.argv[2]), n_workers=1, "
            "partition_size=3)")
    out, made = tmp_path / "out", set()
    for n in (2, 9):
        process = subprocess.Popen([sys.executable, "-c", code, str(lines), str(out)])
        while len(made := set(out.glob("partitions/[!.]*.parquet"))) < n and process.poll() is None:
            time.sleep(.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    stamps = {path: path.stat().st_mtime_ns for path in made}
    manifest = curation.curate(curation.read_lines(lines, "test"), out, n_workers=1, partition_size=3)
    assert manifest["counts"] == corpus[1]["counts"] and manifest["outputs"] == corpus[1]["outputs"]
    assert stamps and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def deadly(items, settings):
    """Stands for `partitions.rows`: one crystal makes the native code crash."""
    if any(material_id == "p-K-Nb" for material_id, _, _ in items):
        os.kill(os.getpid(), signal.SIGKILL)
    return partitions.rows(items, settings)


def test_a_crystal_that_kills_its_process_is_one_reject():
    names = ("p-K-Ti", "p-K-Nb", "p-Sr-Ti")
    items = [(name, "test", json.dumps(entry).encode()) for name, _, entry in crystals() if name in names]
    found = partitions._isolated(items, partitions.Settings(), deadly)
    stages = {row["material_id"]: row.get("stage") for row in found}
    assert stages == dict.fromkeys(names) | {"p-K-Nb": "crash"}


def test_long_strings_are_null_and_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(partitions.MAX_POSITIONS, "site", 20)
    manifest = curation.curate(crystals()[:3], tmp_path, n_workers=1)
    table = read(tmp_path / "corpus.parquet")
    assert manifest["counts"]["rejects"] == {"length": 3} and table["site"].isna().all()
    assert table["canonical"].notna().all()
    assert "style site: expected at most 20 positions" in read(tmp_path / "rejects.parquet").error[0]
    with pytest.raises(ValueError, match="expected strings of style site"):
        curation.pack_corpus(tmp_path / "corpus.parquet", "site", Tokenizer.default(), tmp_path / "packed")


def test_repeated_material_id_counts_once(tmp_path):
    twice = [*crystals()[:5], ("p-Ca-Ti", "test", perovskite("p-Ca-Ti", "Ca", "Ti", a=3.8)),
             ("p-Ca-Ti", "test", perovskite("p-Ca-Ti", "Ca", "Zr", a=3.7))]
    manifest = curation.curate(twice, tmp_path, n_workers=1)
    assert manifest["counts"]["repeated_ids"] == 2
    table = read(tmp_path / "corpus.parquet")
    assert not table.duplicated(["source", "material_id"]).any()
    volume, = table.loc[table.material_id == "p-Ca-Ti", "volume_per_atom"]
    assert volume == pytest.approx(3.7**3 / 5)


def test_bad_input_ends_in_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="expected styles among paper, .* found"):
        curation.curate(crystals(), tmp_path, styles=("papper",))
    with pytest.raises(ValueError, match="expected crystals to curate, found none"):
        curation.curate([], tmp_path, n_workers=1)
    with pytest.raises(ValueError, match="expected usable crystals, found 0 of 3, e.g."):
        curation.curate(crystals()[-3:], tmp_path, n_workers=1)
    packed = gzip.compress(json.dumps(crystals()[0][2]).encode() * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(DamagedFile, match="cut short or damaged"):
        list(curation.read_lines(tmp_path / "cut.jsonl.gz", "cut"))


def test_unparsable_line_is_a_reject(tmp_path):
    items = [(name, source, json.dumps(entry).encode()) for name, source, entry in crystals()[:2]]
    manifest = curation.curate([*items, ("", "test", b'{"id": "half')], tmp_path, n_workers=1)
    assert manifest["counts"]["rejects"] == {"parse": 1}
    assert read(tmp_path / "rejects.parquet").material_id[0].startswith("sha256:")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    chosen = [c for c in crystals() if c[0].startswith("p-") or c[0] == "bad-overlap"]
    names, _, structures = zip(*chosen, strict=True)
    df = pd.DataFrame({"material_id": names, "structure": structures, "target": np.arange(len(names)) / 7.0,
                       "fold": np.arange(len(names)) % 5, "row": np.arange(len(names))[::-1]})
    df.attrs = {"rows": 21, "rows_official": 30, "folds": "official"}
    return folder, df, curation.prepare_task(df, folder, "toy", n_workers=1)


def test_task_table_keeps_the_account_of_its_rows(task):
    folder, df, account = task
    assert (account["rows_official"], account["n_available"], account["n_usable"]) == (30, 21, 20)
    assert account["rejects"] == {"symmetry": 1}
    table = read(folder / "toy.parquet")
    assert table["row"].is_monotonic_increasing
    joined = table.merge(df, on="material_id", validate="1:1")
    assert (joined.target_x == joined.target_y).all() and (joined.fold_x == joined.fold_y).all()
    with pytest.raises(ValueError, match="toy: expected each material_id once, found 1 repeated"):
        curation.prepare_task(pd.concat([df, df[:1]]), folder, "toy", n_workers=1)


def test_overlap_and_exclusion(corpus, task, tmp_path):
    tables = {"toy": task[0] / "toy.parquet"}
    half = duckdb.read_parquet(str(corpus[0] / "corpus.parquet"))
    half.filter("material_id LIKE 'p-Ba%' OR space_group = 225").write_parquet(str(tmp_path / "half.parquet"))
    report = curation.overlap_report(tmp_path / "half.parquet", tables)
    assert report["n"].tolist() == [4] * 5
    assert report["by_formula_space_group"].sum() == report["by_canonical"].sum() == 4  # Ba, Ti to Nb
    keys = curation.exclusion_keys(tables)
    assert len(keys) == 20
    tokenizer = Tokenizer.default()
    counts = curation.pack_corpus(tmp_path / "half.parquet", "canonical", tokenizer, tmp_path / "x", keys)
    assert (counts["n"], counts["n_excluded"]) == (24, 4)


def test_packed_tokens_decode_to_the_strings(corpus, task, tmp_path):
    tokenizer = Tokenizer.default()
    counts = curation.pack_corpus(corpus[0] / "corpus.parquet", "site", tokenizer, tmp_path / "corpus")
    packed, table = PackedTokens.open(tmp_path / "corpus"), read(corpus[0] / "corpus.parquet")
    assert counts["n"] == len(packed) == len(table)
    assert [tokenizer.decode(packed.item(i)) for i in range(len(packed))] == table["site"].tolist()
    counts = curation.pack_task(task[0] / "toy.parquet", "canonical", tokenizer, tmp_path / "toy")
    packed, table = PackedTokens.open(tmp_path / "toy"), read(task[0] / "toy.parquet")
    assert counts == {"n": 20, "n_without_string": 0}
    assert (packed.meta["task"], packed.meta["n_folds"]) == ("toy", table["fold"].max() + 1)
    assert packed.material_id() == table["material_id"].tolist()
    assert all((packed.labels()[name] == table[name]).all() for name in ("target", "fold", "row"))


@pytest.mark.parametrize("style, first", [("number", "sg221 | 1a 1b 3c | "), ("no_generator", "| 1a 1b 3c | "),
                                          ("number_no_wyckoff", "sg221 | | "), ("composition", "")])
def test_ablated_strings_are_made_from_the_canonical_ones(corpus, task, tmp_path, style, first):
    tokenizer = Tokenizer.default()
    n = curation.pack_corpus(corpus[0] / "corpus.parquet", style, tokenizer, tmp_path / "corpus")["n"]
    curation.pack_task(task[0] / "toy.parquet", style, tokenizer, tmp_path / "toy")
    assert n == len(read(corpus[0] / "corpus.parquet"))
    packed, table = PackedTokens.open(tmp_path / "toy"), read(task[0] / "toy.parquet")
    compositions = table["canonical"].str.rpartition("| ")[2]
    assert [tokenizer.decode(packed.item(i)) for i in range(len(packed))] == (first + compositions).tolist()


def test_statistics(corpus):
    table = curation.corpus_statistics(corpus[0] / "corpus.parquet").set_index("statistic")
    assert table.loc["space_groups", ["space_group", "n"]].to_numpy().tolist() == [[221, 20], [225, 24]]
    assert table.loc["elements"].set_index("element").n["O"] == 26
    assert (table.loc["lengths"].groupby("style").n.sum() == 44).all()


def test_string_statistics_know_the_crystals_that_the_file_order_splits(tmp_path):
    rows = [("A", "p1", "c1", "s1"), ("B", "p2", "c1", "s1"), ("C", "p2", "c1", "s2"), ("D", "p3", "c2", "s3")]
    folder = tmp_path / "partitions"
    folder.mkdir()
    pd.DataFrame(rows, columns=["material_id", "paper", "canonical", "site"]).to_parquet(folder / "1.parquet")
    found = curation.string_statistics(tmp_path).set_index("style")
    assert found["strings"].to_dict() == {"paper": 3, "canonical": 2, "site": 3} and (found["crystals"] == 3).all()
    assert found["crystals_sharing"].to_dict() == {"paper": 2, "canonical": 2, "site": 0}
    assert found["crystals_written_differently"].to_dict() == {"paper": 1, "canonical": 0, "site": 0}


def test_dask_gives_the_same_bytes_also_when_a_worker_is_lost(corpus, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs the extra 'cluster' (Dask)")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            victim = next(iter(client.run(os.getpid).values()))
            threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
            manifest = curation.curate(crystals(), tmp_path, partition_size=2, executor=client.get_executor())
    assert manifest["outputs"] == corpus[1]["outputs"]
