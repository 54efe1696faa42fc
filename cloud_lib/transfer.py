"""Units of a profile to another machine, and their results back as if they had been trained here."""

import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cloud_lib import checkpoint, experiments, io, plan, units
from cloud_lib.remote import ARCHIVE, REPORT, WEIGHTS
from cloud_lib.train import unit_identity

PARTS = plan.PARTS[:-1]  # ablations on request: their strings in eight styles are as much data as all the rest


def export(profiles: Sequence[str], out: Path, parts: Sequence[str] = PARTS) -> pd.DataFrame:
    """Write the units of profiles, the most wanted first, with the packed tokens that they need.

    `out` gets units.json and data.tar.xz, all that `python -m cloud_lib.remote` reads. Units that have finished here
    are left out; weights of theirs that others start from go along, or are trained again where only the results came back.

    Returns:
        The number of units by profile, part and wave.
    Raises:
        FileNotFoundError, ValueError: see `plan.jobs`; also if everything has finished.
    """
    everything = plan.jobs(profiles, parts)
    source = {str(folder): job for job in everything for folder in (job.publish, _model(job)) if folder}
    done = units.finished([job.unit for job in everything])
    todo = [job for job in everything if job.unit not in done]
    if not todo:
        raise ValueError(f"expected units to export, found none left of {len(everything)}; all have finished here")
    needed = {name for job in todo if (name := job.unit["config"].get("init")) in source and source[name].unit in done}
    weights = {name for name in needed if Path(name).is_dir()}
    again = [source[name].unit for name in needed - weights]
    listed = [_relative(job, source) for job in everything if job in todo or job.unit in again]
    with io.atomic_path(out / "data.tar.xz") as temporary, tarfile.open(temporary, "w:xz", preset=4) as archive:
        for folder in sorted({job["unit"]["data_dir"] for job in listed}):
            archive.add(_data_root() / folder, folder)
        for name in sorted(weights):
            archive.add(name, f"{WEIGHTS}/{_from_root(name, _runs_root())}")
    io.write_json(out / "units.json", {"profiles": list(profiles), "data_sha256": io.sha256(out / "data.tar.xz"),
                                       "jobs": listed})
    rows = [(*Path(job["unit"]["out_dir"]).parts[:2], job["wave"]) for job in listed]
    return pd.DataFrame(rows, columns=["profile", "part", "wave"]).value_counts(sort=False).reset_index(name="units")


def _data_root() -> Path:
    return io.processed_dir("x").parent


def _runs_root() -> Path:
    return io.checkpoints_dir("x").parent


def _model(job: plan.Job) -> Path:
    return Path(job.unit["out_dir"]) / "model"


def _relative(job: plan.Job, source: dict[str, plan.Job]) -> dict[str, Any]:
    """The job with its folders relative to data/processed and checkpoints, the same on every machine."""
    unit, config = job.unit, dict(job.unit["config"])
    starts_from_unit = config.get("init") in source
    if starts_from_unit:
        config["init"] = _from_root(config["init"], _runs_root())
    placed = unit | {"config": config, "data_dir": _from_root(unit["data_dir"], _data_root()),
                     "out_dir": _from_root(unit["out_dir"], _runs_root())}
    publish = job.publish and _from_root(str(job.publish), _runs_root())
    return {"unit": placed, "wave": job.wave, "publish": publish, "starts_from_unit": starts_from_unit}


def _from_root(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix()


# --------------------------------------------------------------------------------------------------- and back
def import_results(folder: Path, profiles: Sequence[str], parts: Sequence[str] = PARTS) -> Counter:
    """Put what `cloud_lib.remote` packed into `folder` where the notebooks look for finished units.

    A result counts only if its settings, data and initial weights are those that the notebooks would use now.

    Returns:
        How many units were `imported`, `already here`, `of other profiles`.
    Raises:
        FileNotFoundError: a part of the archive is missing.
        ValueError: the archive is damaged, or results belong to other settings (the rest is imported before).
    """
    counts, refused = Counter(), []
    known = {_from_root(job.unit["out_dir"], _runs_root()): job for job in plan.jobs(profiles, parts)}
    with tempfile.TemporaryDirectory(dir=_made(_runs_root())) as temporary:
        names = _unpack(Path(folder), Path(temporary))
        for name in sorted(names, key=lambda name: known[name].wave if name in known else -1):
            if name not in known:
                counts["of other profiles"] += 1
            elif units.finished([known[name].unit]):
                counts["already here"] += 1
            elif different := _differences(known[name].unit, Path(temporary) / name):
                refused.append(f"{name}: {different[0]}")
            else:
                _install(known[name], Path(temporary) / name)
                counts["imported"] += 1
    if refused:
        raise ValueError(f"{len(refused)} of {len(names)} results belong to other settings or data than the notebooks "
                         f"would use now, e.g. {refused[:3]}; {counts['imported']} others were imported. Set the "
                         "parameters as they were at the export, or export again")
    return counts


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _unpack(folder: Path, target: Path) -> list[str]:
    """Unpack the parts in `folder`; names of the units, first ones first."""
    report = io.read_json(folder / REPORT)
    missing = [name for name in report["parts"] if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"expected {len(report['parts'])} parts of {ARCHIVE} in {folder}, {len(missing)} missing, "
                                f"e.g. {missing[:3]}; copy them again")
    with open(target / ARCHIVE, "wb") as archive:
        for name in report["parts"]:
            archive.write((folder / name).read_bytes())
    if io.sha256(target / ARCHIVE) != report["sha256"]:
        raise ValueError(f"expected parts of {ARCHIVE} with sha256 {report['sha256'][:12]} in {folder}, found damage; copy "
                         "them again")
    with tarfile.open(target / ARCHIVE) as archive:
        archive.extractall(target, filter="data")
    return report["packed"]


def _differences(unit: dict[str, Any], found: Path) -> list[str]:
    """What a result was made with that the unit is not; initial weights only where they are here."""
    identity, config = io.read_json(found / "identity.json"), dict(unit["config"])
    init = config.get("init", "scratch")
    unseen = init != "scratch" and not init.startswith("hub:") and not (Path(init) / "model.safetensors").is_file()
    expected = unit_identity(unit | {"config": config | {"init": "scratch"}} if unseen else unit)
    if unseen:
        expected["config"]["init"] = identity["config"]["init"]
    return checkpoint.differences(expected, identity)


def _install(job: plan.Job, found: Path) -> None:
    out_dir = Path(job.unit["out_dir"])
    with io.atomic_path(out_dir) as temporary:
        shutil.copytree(found, temporary)
    if job.publish and (out_dir / "model").is_dir():
        experiments.publish(out_dir, job.publish)
    io.write_json(out_dir / "unit_hash.json", units.unit_hash(job.unit))


def size_mib(folder: Path) -> float:
    """Size of a folder's files [MiB]."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 2**20
