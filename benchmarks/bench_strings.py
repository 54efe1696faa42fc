"""Strings measured on real crystals: speed beside the published recipe, lengths, collisions, engines.

    python -m benchmarks.bench_strings speed CRYSTALS.jsonl.gz [--count 400]
    python -m benchmarks.bench_strings corpus CRYSTALS.jsonl.gz... [--every 1]
    python -m benchmarks.bench_strings engines CRYSTALS.jsonl.gz [--count 3000]

The files are OPTIMADE JSON Lines. Results go to benchmarks/results/strings_<what>.csv. The published recipe
is `Structure.from_file`, `SpacegroupAnalyzer`, letters and fractions in the order of the file; all times are
CPU times of one core, the two sides taking turns crystal by crystal.
"""

import argparse
import csv
import gc
import gzip
import itertools
import json
import random
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import moyopy
import numpy as np
from pymatgen.core import Structure
from pymatgen.io.cif import CifWriter
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from cloud_lib.elements import NUMBERS
from cloud_lib.representation import MAX_POSITIONS, STYLES, string
from cloud_lib.spacegroups import generator, multiplicities
from cloud_lib.symmetry import CrystalError, as_crystal, read_crystals, symmetry_record
from cloud_lib.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"


def lines(path: Path, every: int = 1):
    """The structure entries of an OPTIMADE JSON Lines file, as text."""
    with gzip.open(path, "rt") as file:
        entries = (line for line in file if '"type":"structures"' in line[:80] or '"lattice_vectors"' in line)
        yield from itertools.islice(entries, 0, None, every)


def sample(path: Path, count: int) -> list[str]:
    """`count` random entries."""
    found = list(lines(path))
    return random.Random(0).sample(found, min(count, len(found)))


def published_recipe(structure: Structure) -> str:
    """What the published code does with a structure, in its own steps."""
    analyzer = SpacegroupAnalyzer(structure)
    letters = analyzer.get_symmetry_dataset().wyckoffs
    number = analyzer.get_space_group_number()
    symbols = []
    for letter in letters:
        symbol = f"{multiplicities(number)[letter]}{letter}"
        if symbol not in symbols:
            symbols.append(symbol)
    fractions = structure.composition.fractional_composition.get_el_amt_dict()
    words = [word for e, x in fractions.items() for word in (e, str(np.round(x, 2)))]
    return f"{' '.join(generator(number, 'published'))} | {' '.join(symbols)} | {' '.join(words)}"


class Clock:
    """CPU seconds per named step, the steps taking turns on the same crystals."""

    def __init__(self) -> None:
        self.seconds = Counter()

    def __call__(self, name: str, function, *args):
        started = time.process_time()
        result = function(*args)
        self.seconds[name] += time.process_time() - started
        return result


def speed(path: Path, count: int) -> list[dict]:
    """Crystals per second of one core: published recipe, ours from CIF and from OPTIMADE records."""
    clock, kept, made = Clock(), 0, []
    with tempfile.TemporaryDirectory() as folder:
        for index, line in enumerate(sample(path, count)):
            crystal = as_crystal(json.loads(line))
            structure = Structure(crystal.lattice, crystal.symbols, crystal.positions)
            file = Path(folder) / f"{index}.cif"
            try:
                CifWriter(structure, symprec=0.01 if index % 2 else None).write_file(file)
            except TypeError:  # pymatgen's writer on cells that spglib refuses
                continue
            one_crystal(clock, file, line, warm=index < 20)
            kept += index >= 20
            made.append(string(symmetry_record(crystal)))
    return rates(clock.seconds, kept) + overhead(path, 10 * count) + tokenizing(made)


def rates(seconds: dict[str, float], count: int) -> list[dict]:
    """One row per step."""
    return [{"what": name, "crystals_per_second": round(count / s, 1),
             "microseconds": round(1e6 * s / count, 1)} for name, s in seconds.items()]


def overhead(path: Path, count: int) -> list[dict]:
    """From OPTIMADE record to string in a long run: time inside moyo's search, and all other time."""
    records = [json.loads(line) for line in sample(path, count)]
    for record in records:
        string(symmetry_record(record))  # a long run has filled its caches
    gc.collect()
    gc.freeze()
    inside, search = Clock(), moyopy.MoyoDataset
    moyopy.MoyoDataset = lambda *args, **options: inside("search", lambda: search(*args, **options))
    started = time.process_time()
    for record in records:
        string(symmetry_record(record))
    total, moyopy.MoyoDataset = time.process_time() - started, search
    parts = {"long run: total": total, "long run: inside moyo's search": inside.seconds["search"],
             "long run: own overhead": total - inside.seconds["search"]}
    return rates(parts, len(records))


def one_crystal(clock: Clock, file: Path, line: str, warm: bool) -> None:
    """All steps once; a warm-up run fills caches and is not counted."""
    clock = Clock() if warm else clock
    published = clock("published recipe, from CIF", lambda: published_recipe(Structure.from_file(file)))
    ours = clock("ours, from CIF", lambda: [string(symmetry_record(c)) for _, c in read_crystals(file)])
    clock("ours, from OPTIMADE JSON", lambda: string(symmetry_record(json.loads(line))))
    record = json.loads(line)
    clock("ours, from an OPTIMADE record", lambda: string(symmetry_record(record)))
    crystal = as_crystal(record)
    numbers = [NUMBERS[s] for s in crystal.symbols]
    clock("moyo's search alone", lambda: moyopy.MoyoDataset(
        moyopy.Cell(crystal.lattice.tolist(), crystal.positions.tolist(), numbers), symprec=0.01))
    assert published and ours


def tokenizing(strings: list[str]) -> list[dict]:
    """Strings per second of encode_many, best of five."""
    tokenizer, many, best = Tokenizer.default(), strings * (200_000 // len(strings)), 0.0
    for _ in range(5):
        started = time.process_time()
        tokenizer.encode_many(many)
        best = max(best, len(many) / (time.process_time() - started))
    return [{"what": "tokenizing", "crystals_per_second": round(best), "microseconds": round(1e6 / best, 2)}]


def corpus(path: Path, every: int) -> list[dict]:
    """Per style: token lengths, and how many crystals share a string."""
    tokenizer = Tokenizer.default()
    lengths = {style: [] for style in STYLES}
    formulas, sites = ({style: defaultdict(Counter) for style in STYLES} for _ in range(2))
    rejects, n = Counter(), 0
    for line in lines(path, every):
        try:
            record = symmetry_record(json.loads(line))
        except CrystalError as error:
            rejects[str(error)[:30]] += 1
            continue
        n += 1
        made = {style: string(record, style) for style in STYLES}
        for style, text in made.items():
            lengths[style].append(len(tokenizer.encode(text)))
            formulas[style][text][record.formula_reduced] += 1
            sites[style][text][made["site"]] += 1
    return [{"file": path.name.split(".")[0], "style": style, "n_crystals": n, "n_rejects": rejects.total(),
             "n_strings": len(formulas[style]),
             "n_crystals_sharing": sum(c.total() for c in formulas[style].values() if c.total() > 1),
             "n_strings_of_several_formulas": sum(len(c) > 1 for c in formulas[style].values()),
             "n_strings_of_several_sites": sum(len(c) > 1 for c in sites[style].values()),
             "tokens_mean": round(float(np.mean(lengths[style])), 2)}
            | {f"tokens_p{q}": int(np.percentile(lengths[style], q)) for q in (50, 99)}
            | {"tokens_max": max(lengths[style]), "max_positions": MAX_POSITIONS[style],
               "n_too_long": sum(x > MAX_POSITIONS[style] for x in lengths[style])} for style in STYLES]


def engines(path: Path, count: int) -> list[dict]:
    """Where moyo and spglib agree: space group, then the strings of each style."""
    same, n = Counter(), 0
    for line in sample(path, count):
        crystal = as_crystal(json.loads(line))
        try:
            one, other = (symmetry_record(crystal, engine=e) for e in ("moyopy", "spglib"))
        except CrystalError:
            same["failed"] += 1
            continue
        n += 1
        if one.space_group == other.space_group:
            same["space group"] += 1
            for style in STYLES:
                same[style] += string(one, style) == string(other, style)
    styles = {f"n_same_{style}": same[style] for style in STYLES}
    return [{"file": path.name.split(".")[0], "n_crystals": n, "n_failed": same["failed"],
             "n_same_space_group": same["space group"]} | styles]


def write(name: str, rows: list[dict]) -> None:
    """Print the rows, and write them as benchmarks/results/strings_<name>.csv."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"strings_{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "corpus", "engines"))
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--every", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.what == "corpus":
        write("corpus", [row for file in args.files for row in corpus(file, args.every)])
    else:
        function = {"speed": speed, "engines": engines}[args.what]
        write(args.what, [row for file in args.files for row in function(file, args.count)])


if __name__ == "__main__":
    main()
