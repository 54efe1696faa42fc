"""Where things lie, and how they are written: folders, atomic writes, checksums, provenance.

Nothing here runs at import; no folder is made before something is written into it.
"""

import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERSIONED = ("numpy", "torch", "transformers", "pymatgen", "spglib", "moyopy", "pandas", "scikit-learn",
             "matbench-discovery")
PRODUCTS = ("tables", "figures", "results", "README.md")  # runs write these: they do not make the code dirty


# ---------------------------------------------------------------------------------------------- folders
def root() -> Path:
    """Folder that holds data, checkpoints and products.

    $CLOUD_ROOT if set; else the nearest parent of the working directory with a Makefile and cloud_lib/ (a
    notebook runs inside notebooks/); else the folder that contains the package.
    """
    if configured := os.environ.get("CLOUD_ROOT"):
        return Path(configured).expanduser().resolve()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "Makefile").is_file() and (folder / "cloud_lib").is_dir():
            return folder
    return Path(__file__).resolve().parents[1]


def raw_dir() -> Path:
    """Downloaded data, never changed: $CLOUD_DATA if set (may be read-only), else root()/data/raw."""
    if configured := os.environ.get("CLOUD_DATA"):
        return Path(configured).expanduser().resolve()
    return root() / "data" / "raw"


def embedded_dir() -> Path:
    """Members taken out of package index archives; below root(), as $CLOUD_DATA may be read-only."""
    return root() / "data" / "raw" / "embedded"


def processed_dir(profile: str) -> Path:
    return root() / "data" / "processed" / profile


def checkpoints_dir(profile: str) -> Path:
    return root() / "checkpoints" / profile


def tables_dir(profile: str) -> Path:
    return root() / "tables" / profile


def figures_dir(profile: str) -> Path:
    return root() / "figures" / profile


def results_dir() -> Path:
    return root() / "results"


# --------------------------------------------------------------------------------------- atomic writing
@contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `target` to write a file or a folder to; it becomes `target` on success.

    The temporary name ends like the target's, so that writers which look at the suffix work. Its content is
    flushed to disk before the rename. On any exception it is removed and `target` stays as it was.

    Raises:
        FileNotFoundError: the block wrote nothing.
        OSError: the disk is full (one message with the target and the free space).
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{target.name}")
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"expected something written to {temporary}, found nothing; "
                                    f"write to the path that atomic_path yields for {target}")
        _flush(temporary)
        _move(temporary, target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, f"disk full while writing {target}: {_free(target.parent)} left; nothing "
                                   "half-written was kept, free some space and run again") from error
    finally:
        _remove(temporary)


def _flush(path: Path) -> None:
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())


def _move(temporary: Path, target: Path) -> None:
    """Rename over `target`; a folder cannot be renamed over a full one, so that one steps aside first."""
    if not target.is_dir() or target.is_symlink():
        os.replace(temporary, target)
        return
    aside = target.with_name(f".old-{uuid.uuid4().hex[:12]}-{target.name}")
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------- JSON and hashes
def plain(obj: Any) -> Any:
    """`obj` in JSON's own types: dataclasses, NumPy values, paths and sets are converted, NaN is None.

    Raises:
        TypeError: a value of another type.
    """
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return plain(dataclasses.asdict(obj))
    if isinstance(obj, dict):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    if isinstance(obj, (set, frozenset)):
        return sorted(plain(value) for value in obj)
    if isinstance(obj, float):
        return None if math.isnan(obj) else float(obj)
    if obj is None or isinstance(obj, (bool, int, str)):
        return obj
    if isinstance(obj, os.PathLike):
        return Path(obj).as_posix()
    if hasattr(obj, "tolist"):  # NumPy scalars and arrays
        return plain(obj.tolist())
    raise TypeError(f"expected a value that JSON can hold, found {type(obj).__name__}: {obj!r:.80}")


def write_json(path: str | os.PathLike, obj: Any) -> Path:
    """Write `obj` atomically as indented JSON with sorted keys (so equal content is equal bytes)."""
    text = json.dumps(plain(obj), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def read_json(path: str | os.PathLike) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: the file is not JSON, for example cut short.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, found damage ({error}); delete it, run again") from error


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def config_hash(obj: Any) -> str:
    """First 12 hexadecimal digits of the SHA-256 of `obj` as canonical JSON (dataclasses allowed)."""
    text = json.dumps(plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------ provenance
def provenance(profile: str, seed: int, config: Any, inputs: Iterable[str | os.PathLike],
               started: float) -> dict[str, Any]:
    """What a product was made from, to be written beside it.

    Args:
        inputs: files, or folders (all their files); keys of the result are relative to root().
        started: time.time() at the start of the run [s].
    Raises:
        FileNotFoundError: an input does not exist.
    """
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _dirty(),
        "profile": profile,
        "seed": seed,
        "config": below_root(plain(config)),
        "inputs": {_display(file): sha256(file) for file in _files(inputs)},
        "versions": {"python": platform.python_version()} | versions(),
        "device": device_name(),
        "threads": _threads(),
        "wall_time_s": round(time.time() - started, 1),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def below_root(config: Any) -> Any:
    """Paths below root() relative to it, so that equal runs in different folders say the same."""
    return json.loads(json.dumps(config).replace(f"{root()}{os.sep}", ""))


def settings(config: Any) -> dict[str, Any]:
    """A training configuration as a notebook shows it: what it learns from and how, not where and how fast it runs."""
    return {name: value for name, value in below_root(plain(config)).items() if name != "run"}


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """Name of the GPU if torch is loaded and sees one, else of the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def _threads() -> int:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else int(os.environ.get("OMP_NUM_THREADS") or
                                                                 os.cpu_count() or 1)


def _files(inputs: Iterable[str | os.PathLike]) -> Iterator[Path]:
    for path in map(Path, inputs):
        if not path.exists():
            raise FileNotFoundError(f"expected the input {path}, found nothing; run the step that makes it")
        yield from sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]


def _display(file: Path) -> str:
    """Path relative to the repository or to the data folder: no address of one machine in a product."""
    file = file.resolve()
    for base, prefix in ((root(), ""), (raw_dir(), "$CLOUD_DATA/")):
        if file.is_relative_to(base):
            return prefix + file.relative_to(base).as_posix()
    return file.name


def _git(*arguments: str) -> str | None:
    """Answer of git, or None outside a repository or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _dirty() -> bool | None:
    """Whether a tracked file other than a product differs from the commit."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".",
                   *(f":(exclude){name}" for name in PRODUCTS))
    return None if changed is None else bool(changed)
