"""Predictions measured beside a plain loop: crystals per second from CIF files, and the time to the first one.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_predict CRYSTALS.jsonl.gz [--count 1000] [--heads 12 4]

The plain loop takes each file alone: `Structure.from_file`, the published string recipe, a padded forward of
transformers' BertModel of the same size in float32, a linear head. "batched loop" collects its strings and runs
the padded forward on 64 at once. Ours is `use.predict_files` on a bundle of one model. All sides take turns on the
same pieces of files; times are CPU times of one core. Weights are random: time does not depend on them. Start-up is
the wall time of `python -m cloud_lib predict FILE`, for one model and for 8 properties of 5 models each.
Results go to benchmarks/results/predict.csv.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import pandas as pd
import torch
from pymatgen.core import Structure
from pymatgen.io.cif import CifWriter
from transformers import BertModel

from benchmarks.bench_strings import RESULTS, published_recipe, sample
from cloud_lib import bundle, io, use
from cloud_lib.model import EncoderConfig, Regressor, save_model
from cloud_lib.symmetry import as_crystal
from cloud_lib.tokenizer import Tokenizer

LENGTH, BATCH, PIECE = 64, 64, 250  # padding of the published code; strings at once; files per turn


def write_files(source: Path, count: int, folder: Path) -> list[Path]:
    """`count` CIF files, every other one with symmetry."""
    files: list[Path] = []
    for index, line in enumerate(sample(source, 2 * count)):
        crystal = as_crystal(json.loads(line))
        structure = Structure(crystal.lattice, crystal.symbols, crystal.positions)
        try:
            CifWriter(structure, symprec=0.01 if index % 2 else None).write_file(folder / f"{index}.cif")
            published_recipe(Structure.from_file(folder / f"{index}.cif"))
        except (TypeError, ValueError, AttributeError, KeyError):  # cells that the plain loop cannot take
            (folder / f"{index}.cif").unlink(missing_ok=True)
            continue
        files.append(folder / f"{index}.cif")
        if len(files) == count:
            break
    return files


def write_bundle(folder: Path, n_layers: int, n_heads: int, n_properties: int, n_models: int) -> bundle.Bundle:
    """A bundle of random models."""
    tokenizer = Tokenizer.default()
    config = EncoderConfig(n_layers, n_heads, vocab_size=tokenizer.vocab_size)
    meta = {"vocab_sha256": tokenizer.sha256, "vocab_version": tokenizer.version, "style": "canonical",
            "target_mean": 0.0, "target_std": 1.0}
    recipe, properties = bundle.Recipe("canonical", 0.01, "corrected"), {}
    for number in range(n_properties):
        name, members = f"property{number}", []
        for fold in range(n_models):
            path = f"{name}/fold{fold}"
            bert = BertModel(config.bert_config(), add_pooling_layer=False)
            save_model(Regressor(bert), folder / path, meta | {"tasks": [name]})
            members.append(bundle.Member(path, path))
        pd.DataFrame(columns=bundle.HELD_OUT_COLUMNS).to_csv(folder / name / "predictions.csv", index=False)
        properties[name] = bundle.Property(name, "1", name, recipe, tuple(members), 1, 1, 1, 1, None, None)
    return bundle.write(bundle.Bundle(folder, properties, None, None, {}), folder / "bundle")


def plain(files: list[Path], bert: BertModel, head: torch.nn.Module, tokenizer: Tokenizer, batch: int) -> list[float]:
    """The opponent: strings one by one, padded to LENGTH, `batch` of them in one forward."""
    found: list[float] = []
    for start in range(0, len(files), batch):
        strings = [published_recipe(Structure.from_file(file)) for file in files[start:start + batch]]
        ids = [tokenizer.encode(text)[:LENGTH] for text in strings]
        padded = torch.tensor([i + [tokenizer.pad_id] * (LENGTH - len(i)) for i in ids])
        with torch.inference_mode():
            hidden = bert(padded, attention_mask=(padded != tokenizer.pad_id).long()).last_hidden_state
            found += head(hidden[:, 0])[:, 0].tolist()
    return found


def throughput(files: list[Path], folder: Path, n_layers: int, n_heads: int) -> list[dict]:
    """Crystals per second of the three sides, taking turns."""
    models, tokenizer = write_bundle(folder, n_layers, n_heads, 1, 1), Tokenizer.published()
    config = EncoderConfig(n_layers, n_heads, vocab_size=tokenizer.vocab_size).bert_config()
    bert, head = BertModel(config, add_pooling_layer=False).eval(), torch.nn.Linear(config.hidden_size, 1)
    sides = {"plain loop": lambda piece: plain(piece, bert, head, tokenizer, 1),
             "batched loop": lambda piece: plain(piece, bert, head, tokenizer, BATCH),
             "ours": lambda piece: [row for rows in use.predict_files(piece, models) for row in rows]}
    seconds: Counter = Counter()
    for side in sides.values():
        side(files[:20])  # fills caches
    for start in range(0, len(files), PIECE):
        for name, side in sides.items():
            started = time.process_time()
            answers = side(files[start:start + PIECE])
            seconds[name] += time.process_time() - started
            assert len(answers) == len(files[start:start + PIECE])
    return [{"what": name, "model": f"{n_layers} x {64 * n_heads}", "count": len(files),
             "crystals_per_second": round(len(files) / s, 1), "times_plain": round(seconds["plain loop"] / s, 2)}
            for name, s in seconds.items()]


def start_up(file: Path, folder: Path, n_layers: int, n_heads: int, n_properties: int, n_models: int) -> dict:
    """Wall seconds of the command line for one file, the best of three."""
    models = write_bundle(folder, n_layers, n_heads, n_properties, n_models)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cloud_lib", "predict", str(file), "--models", str(models.folder)],
                       check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return {"what": f"start-up, {n_properties} properties x {n_models} models", "model": f"{n_layers} x {64 * n_heads}",
            "count": 1, "seconds": round(min(times), 2),
            "megabytes": round(sum(f.stat().st_size for f in models.folder.rglob("*") if f.is_file()) / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="OPTIMADE JSON Lines")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--size", type=int, nargs=2, default=(12, 4), metavar=("LAYERS", "HEADS"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "cif").mkdir()
        files = write_files(args.file, args.count, root / "cif")
        rows = throughput(files, root / "one", *args.size)
        rows += [start_up(files[0], root / f"start{n}", *args.size, n, m) for n, m in ((1, 1), (8, 5))]
    import pandas as pd

    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    with io.atomic_path(RESULTS / "predict.csv") as temporary:
        table.to_csv(temporary, index=False)


if __name__ == "__main__":
    main()
