"""Broken CIF files and OPTIMADE records: each must end as a string or as a reject with a one-line reason.

    python -m benchmarks.bench_fuzz [--count 2000]        writes results/fuzz.csv, one row per kind of damage
"""

import argparse
import copy
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.random_crystals import random_crystal
from cloud_lib.representation import describe

RESULTS = Path(__file__).parent / "results"
WEIRD = ("nan", "inf", "-1e308", "1e999", "?", ".", "", "abc", "0", "-0.5", "1e9", "\x00", "½", "'", ";", "(",
         "0.5(")
VALUES = (None, float("nan"), float("inf"), -1e308, 1e9, 0, "abc", [], {}, [[]], True, 10**400, "Xx", -3)


def mutated_cif(text: str, rng: random.Random) -> tuple[str, bytes]:
    """(file name, damaged content) of one CIF."""
    lines = text.splitlines()
    kind = rng.choice(["cut", "token", "token", "line", "swap", "bytes", "many", "operator"])
    if kind == "cut":
        return "cut.cif", text[: rng.randrange(len(text))].encode()
    if kind == "token":
        i = rng.randrange(len(lines))
        words = lines[i].split(" ")
        words[rng.randrange(len(words))] = rng.choice(WEIRD)
        lines[i] = " ".join(words)
    elif kind == "line":
        del lines[rng.randrange(len(lines))]
    elif kind == "swap":
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == "bytes":
        data = bytearray(text.encode())
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return "bytes.cif", bytes(data)
    elif kind == "many":
        atoms = 10 ** rng.choice([2, 4, 5])
        words = lines[-1].split()
        first = next(k for k, word in enumerate(words) if "." in word)  # column of x
        for _ in range(atoms):
            words[first : first + 3] = [f"{rng.random():.5f}" for _ in range(3)]
            lines.append(" ".join(words))
    else:
        weird = rng.choice(["2x,y,z", "x,x,x", "x,y", "0,0,0", "x+1/0,y,z", "x*y,z,z", "-x,-y,z+0.31", "y,x,z",
                            "x,y,z'\n 1 '-x,y,z" * 5000])
        old = "'x, y, z'"
        if old not in text:
            return "operator.cif", f"{text}\nloop_\n_symmetry_equiv_pos_as_xyz\n'{weird}'\n".encode()
        return "operator.cif", text.replace(old, f"'{weird}'", 1).encode()
    return f"{kind}.cif", "\n".join(lines).encode("utf-8", "replace")


def mutated_optimade(record: dict, rng: random.Random) -> tuple[str, bytes]:
    """(file name, damaged content) of one OPTIMADE entry."""
    kind = rng.choice(["cut", "value", "value", "number", "number", "drop", "many", "close", "flat"])
    entry = copy.deepcopy(record)
    attributes = entry["attributes"]
    key = rng.choice(["lattice_vectors", "cartesian_site_positions", "species", "species_at_sites"])
    if kind == "value":
        attributes[key] = rng.choice(VALUES)
    elif kind == "number":
        rows = attributes[rng.choice(["lattice_vectors", "cartesian_site_positions"])]
        rows[rng.randrange(len(rows))][rng.randrange(3)] = rng.choice(VALUES)
    elif kind == "drop":
        del attributes[key]
    elif kind == "many":
        n = 10 ** rng.choice([3, 5])
        attributes["cartesian_site_positions"] = [[rng.random() * 50 for _ in range(3)] for _ in range(n)]
        attributes["species_at_sites"] = [attributes["species_at_sites"][0]] * n
    elif kind == "close":
        rows = attributes["cartesian_site_positions"]
        rows[0] = [x + rng.choice([0, 1e-9, 0.01, 0.3]) for x in rows[-1]]
    elif kind == "flat":
        factor = rng.choice([0, 1e-6, 1e-2])
        attributes["lattice_vectors"][0] = [factor * x for x in attributes["lattice_vectors"][0]]
    text = json.dumps(entry)
    return f"{kind}.json", (text[: rng.randrange(len(text))] if kind == "cut" else text).encode()


def outcome(path: Path, content: bytes) -> dict:
    """Kind of damage, what came of it ("string", a reason, or "crash"), seconds."""
    path.write_bytes(content)
    started = time.perf_counter()
    try:
        rows = list(describe(path))
        reasons = [r["error"] for r in rows if r["error"] is not None]
        error = reasons[0] if reasons else "string" if rows else "no entry"
        crash = next(("reason has several lines" for reason in reasons if "\n" in reason), None)
    except BaseException as problem:  # also a panic of the search's Rust code, which is no Exception
        if isinstance(problem, KeyboardInterrupt):
            raise
        error, crash = "crash", f"{type(problem).__name__}: {problem}"
    return {"kind": path.name, "error": "crash" if crash else error, "crash": crash,
            "seconds": time.perf_counter() - started}


def samples(rng: random.Random):
    """Endless (CIF text, OPTIMADE entry) pairs of random crystals."""
    from pymatgen.core import Structure
    from pymatgen.io.cif import CifWriter

    numpy_rng = np.random.default_rng(rng.randrange(2**32))
    while True:
        c = random_crystal(int(numpy_rng.integers(1, 231)), numpy_rng)
        text = str(CifWriter(Structure(c.lattice, c.symbols, c.positions), symprec=rng.choice([None, 0.01])))
        names = sorted(set(c.symbols))
        species = [{"name": n, "chemical_symbols": [n], "concentration": [1.0]} for n in names]
        yield text, {"id": "random", "type": "structures", "attributes": {
            "lattice_vectors": c.lattice.tolist(), "species": species, "species_at_sites": list(c.symbols),
            "cartesian_site_positions": (c.positions @ c.lattice).tolist()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for index, (cif, record) in zip(range(args.count), samples(rng)):
            name, content = mutated_cif(cif, rng) if index % 2 else mutated_optimade(record, rng)
            results.append(outcome(Path(folder) / name, content))
    table = ["damage,n_cases,n_strings,n_rejects,n_crashes,slowest_s"]
    for kind in sorted({r["kind"] for r in results}):
        found = [r for r in results if r["kind"] == kind]
        strings, crashes = (sum(r["error"] == what for r in found) for what in ("string", "crash"))
        table.append(f"{kind},{len(found)},{strings},{len(found) - strings - crashes},{crashes},"
                     f"{max(r['seconds'] for r in found):.2f}")
    (RESULTS / "fuzz.csv").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    print(Counter(r["error"].split(":")[0][:50] for r in results).most_common(25))
    print("crashes:", [r for r in results if r["crash"]][:5])


if __name__ == "__main__":
    main()
