"""Train exported units on a machine that has torch, transformers and NumPy, as long as it is lent.

    python -m cloud_lib.remote EXPORT --work WORK --minutes 9 --out OUT

EXPORT is the folder of `python -m cloud_lib export`. Units run in its order, several side by side; when the time is
over they save and stop, and the next call goes on in the same WORK folder. What has finished is packed into OUT as
parts of one archive, for `python -m cloud_lib import-results OUT`.
"""

import argparse
import fnmatch
import os
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cloud_lib import io, units
from cloud_lib.predict import save_bfloat16

RESULTS = ("result.json", "identity.json", "predictions.csv", "log.jsonl")
ARCHIVE, REPORT, WEIGHTS = "results.tar.gz", "report.json", "weights"
PART_BYTES, N_PARTS = 15 * 2**20, 4  # of what goes back; with the report 5 files, below 64 MiB together


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, pack, say what was done; returns 0, or 1 if units failed."""
    args = _parser().parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes - args.reserve
    jobs = open_export(args.export, args.work)
    todo = [job for job in jobs if _wanted(job, args)]
    failures = train(todo, args.work, deadline, args.workers, args.threads, vars(args))
    done = [job for job in jobs if units.finished([job["unit"]])]
    earlier = _packed_before(args.work) if args.new else []
    report = pack([job for job in done if job["name"] not in earlier], args.work, args.out, args.weights)
    report |= {"failures": failures, "n_jobs": len(jobs), "versions": io.versions(), "device": io.device_name()}
    io.write_json(args.out / REPORT, report)
    io.write_json(args.work / "packed.json", sorted({*earlier, *report["packed"]}))
    print("\n".join([*_summary(jobs, done), *failures]))
    print(f"{len(done)} of {len(jobs)} units have finished, {len(report['packed'])} are in {args.out}"
          f"{', left out for size: ' + str(len(report['left_out'])) if report['left_out'] else ''}")
    return int(bool(failures))


def _packed_before(work: Path) -> list[str]:
    file = work / "packed.json"
    return io.read_json(file) if file.is_file() else []


def _summary(jobs: Sequence[dict[str, Any]], done: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line per folder of units: how many have finished, and their mean time, to plan the next call with."""
    for folder in dict.fromkeys(Path(job["name"]).parent.as_posix() for job in jobs):
        n = sum(Path(job["name"]).parent.as_posix() == folder for job in jobs)
        times = [io.read_json(Path(job["unit"]["out_dir"]) / "result.json")["wall_time_s"] for job in done
                 if Path(job["name"]).parent.as_posix() == folder]
        yield f"{folder}: {len(times)} of {n}" + (f", {sum(times) / len(times):.0f} s each" if times else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cloud_lib.remote", description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, metavar="EXPORT", help="folder of `python -m cloud_lib export`")
    parser.add_argument("--work", type=Path, default=Path("build/remote"), help="keeps data, checkpoints and results")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "remote_out")),
                        help="for what goes back (default: $OUT, else remote_out)")
    parser.add_argument("--minutes", type=float, default=9.0, help="end by then (default: %(default)s)")
    parser.add_argument("--reserve", type=float, default=45.0, metavar="S",
                        help="seconds of these for saving and packing (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="units side by side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile: worth its start for long units only")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN",
                        help="units to train, such as 'gpu/pretraining' 'gpu/matbench/jdft2d/*' (default: all)")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PATTERN", help="units not to train")
    parser.add_argument("--new", action="store_true", help="pack only what no earlier call in this WORK has packed")
    parser.add_argument("--weights", nargs="+", default=[], metavar="PATTERN",
                        help="fine-tuned models that go back, too, in bfloat16 (default: none; encoders always do)")
    return parser


def _wanted(job: dict[str, Any], args: argparse.Namespace) -> bool:
    return matches(job["name"], args.only) and not matches(job["name"], args.skip)


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


# ------------------------------------------------------------------------------------------------- what came
def open_export(export: Path, work: Path) -> list[dict[str, Any]]:
    """Jobs of an export with paths below `work`; its data are unpacked there once.

    A job has `name` (its folder below work/checkpoints), `wave`, `publish` (a folder or None) and `unit`.
    Raises:
        FileNotFoundError: no export there.
        ValueError: the data are not those that the export lists.
    """
    if not (export / "units.json").is_file():
        raise FileNotFoundError(f"expected units.json in {export}, found none; run python -m cloud_lib export first")
    listing, archive = io.read_json(export / "units.json"), export / "data.tar.xz"
    stamp = work / "data" / "sha256.json"
    if not stamp.is_file() or io.read_json(stamp) != listing["data_sha256"]:
        if (found := io.sha256(archive)) != listing["data_sha256"]:
            raise ValueError(f"expected {archive} with sha256 {listing['data_sha256'][:12]}, found {found[:12]}; copy the "
                             "export again")
        with io.atomic_path(work / "data") as temporary, tarfile.open(archive) as data:
            data.extractall(temporary, filter="data")
            io.write_json(temporary / "sha256.json", found)
    return [_placed(job, work.resolve()) for job in listing["jobs"]]


def _placed(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """The job with its relative paths below `work`."""
    unit, checkpoints = job["unit"], work / "checkpoints"
    config = dict(unit["config"])
    if job["starts_from_unit"]:
        came = work / "data" / WEIGHTS / config["init"]
        config["init"] = str(came if came.is_dir() else checkpoints / config["init"])
    placed = unit | {"config": config, "data_dir": str(work / "data" / unit["data_dir"]),
                     "out_dir": str(checkpoints / unit["out_dir"])}
    return job | {"name": unit["out_dir"], "unit": placed,
                  "publish": job["publish"] and checkpoints / job["publish"]}


# --------------------------------------------------------------------------------------------------- training
def train(jobs: Sequence[dict[str, Any]], work: Path, deadline: float, n_workers: int, threads: int,
          options: dict[str, Any]) -> list[str]:
    """Run jobs wave by wave until `deadline` (of time.monotonic); returns what failed.

    Args:
        options: `device` and `compile` of all units.
    """
    failures = []
    how = {"device": options["device"], "compile": options["compile"], "checkpoint_minutes": 2.0, "keep_last": 1,
           "progress": False}
    for job in jobs:
        job["unit"]["config"]["run"] = job["unit"]["config"]["run"] | how
    try:
        for wave in sorted({job["wave"] for job in jobs}):
            todo = [job["unit"] for job in jobs if job["wave"] == wave]
            print(f"wave {wave}: {len(todo)} units, {len(units.finished(todo))} of them finished before", flush=True)
            try:
                units.run_units(todo, n_workers, threads, progress=False, deadline=deadline)
            except RuntimeError as error:
                failures.append(str(error))
            publish(jobs)
    except units.TimeOver:
        print("the time is over; interrupted units have saved where they were", flush=True)
    publish(jobs)
    return failures


def publish(jobs: Sequence[dict[str, Any]]) -> None:
    """Copy finished encoders to where other units start from, in bfloat16: as they can be brought back."""
    for job in jobs:
        target = job["publish"]
        if target and units.finished([job["unit"]]):
            made_from = io.sha256(Path(job["unit"]["out_dir"]) / "model" / "model.safetensors")
            stamp = target / "made_from.json"
            if not stamp.is_file() or io.read_json(stamp) != made_from:
                with io.atomic_path(target) as temporary:
                    save_bfloat16(Path(job["unit"]["out_dir"]) / "model", temporary)
                    io.write_json(temporary / stamp.name, made_from)


# -------------------------------------------------------------------------------------------- what goes back
def pack(done: Sequence[dict[str, Any]], work: Path, out: Path, weights: Sequence[str]) -> dict[str, Any]:
    """Write the finished jobs, first ones first, as parts of one archive; what is too much is left out.

    A job whose weights are too large goes without them: its results, and those that started from it, still count.

    Returns:
        `packed` and `left_out` (names of jobs, or of their model folders), `parts` (file names in order) and the
        archive's `sha256`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stale in (out / REPORT, *out.glob(f"{ARCHIVE}.*")):
        stale.unlink(missing_ok=True)
    packed, left_out, archive = [], [], work / ARCHIVE
    with open(archive, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz", compresslevel=6) as tar:
        for job in done:
            files = dict(_files(job, work, weights))
            room = PART_BYTES * N_PARTS - 2**20 - raw.tell()
            if _size(files) > room:
                left_out.append(f"{job['name']}/model" if "model/config.json" in files else job["name"])
                files = {name: file for name, file in files.items() if not name.startswith("model/")}
            if _size(files) <= room:
                for name, file in files.items():
                    tar.add(file, f"{job['name']}/{name}")
                packed.append(job["name"])
    return {"packed": packed, "left_out": left_out, "parts": _split(archive, out), "sha256": io.sha256(archive)}


def _files(job: dict[str, Any], work: Path, weights: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(name in the archive, file) of one job: results, and the model if it is an encoder or asked for."""
    folder = Path(job["unit"]["out_dir"])
    yield from ((name, folder / name) for name in RESULTS if (folder / name).is_file())
    model = job["publish"]
    if model is None and matches(job["name"], weights):
        model = work / "packed_models" / job["name"]
        save_bfloat16(folder / "model", model)
    if model:
        yield from ((f"model/{file.name}", file) for file in sorted(model.iterdir()) if file.name != "made_from.json")


def _size(files: dict[str, Path]) -> int:
    return sum(file.stat().st_size for file in files.values())


def _split(archive: Path, out: Path) -> list[str]:
    names = []
    with open(archive, "rb") as handle:
        while chunk := handle.read(PART_BYTES):
            names.append(f"{ARCHIVE}.{len(names):02d}")
            (out / names[-1]).write_bytes(chunk)
    return names


if __name__ == "__main__":
    sys.exit(main())
