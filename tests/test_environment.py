"""One set of versions in three files; imports that point one way."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cloud_lib"

# Which modules of cloud_lib a module may import (STAGES: the way of the data; cli may import anything).
ARROWS = {
    "io": set(),
    "spacegroups": set(),
    "elements": set(),
    "crystal": {"elements"},
    "readers": {"crystal", "elements"},
    "symmetry": {"crystal", "readers", "elements", "spacegroups"},
    "representation": {"symmetry", "elements", "spacegroups"},
    "tokenizer_file": {"spacegroups"},
    "tokenizer": {"tokenizer_file", "elements", "spacegroups"},
    "sources": {"io", "sources", "symmetry"},
    "generate": {"io", "elements", "spacegroups", "symmetry", "representation"},
    "partitions": {"io", "symmetry", "representation", "sources"},
    "curation": {"io", "symmetry", "representation", "tokenizer", "dataset", "sources", "partitions"},
    "dataset": {"io"},
    "model": {"io"},
    "checkpoint": {"io", "model"},
    "sharding": set(),
    "runtime": {"io", "dataset", "model", "checkpoint", "sharding"},
    "loop": {"io", "dataset", "model", "checkpoint", "runtime", "sharding"},
    "train": {"io", "dataset", "model", "checkpoint", "runtime", "loop", "train"},
    "predict": {"io", "dataset", "model", "checkpoint", "runtime"},
    "model_card": set(),
    "calibration": set(),
    "bundle": {"io", "predict", "model_card"},
    "tabular": {"io", "readers", "symmetry"},
    "use": {"io", "symmetry", "representation", "tokenizer", "dataset", "predict", "bundle", "tabular"},
    "hub": {"io", "model", "tokenizer", "bundle"},
    "leaderboards": {"io", "metrics", "sources"},
    "metrics": set(),
    "powerlaw": set(),
    "grid": {"io"},
    "scaling": {"io", "powerlaw"},
    "scaling_checks": {"powerlaw", "scaling"},
    "report": {"io"},
    "figures": {"report"},
    "baselines": set(),
    "preparation": {"io", "symmetry", "representation", "tokenizer", "sources", "curation", "report"},
    "experiments": {"io", "tokenizer", "dataset", "train"},
    "scoring": {"sources", "metrics", "report", "experiments"},
    "discovery": {"io", "tokenizer", "sources", "curation", "train", "predict", "metrics", "report"},
    "forest": {"elements"},
    "ablations": {"io", "representation", "tokenizer", "curation", "train", "experiments"},
    "plan": {"io", "representation", "dataset", "model", "train", "notebook", "preparation", "experiments", "discovery",
             "grid", "scaling_tables", "ablations"},
    "remote": {"io", "train", "predict"},
    "transfer": {"io", "train", "checkpoint", "experiments", "plan", "remote"},
    "scaling_tables": {"io", "powerlaw", "scaling", "grid", "train", "report"},
    "explore": {"io", "preparation"},
    "site": {"io", "report", "explore"},
    "notebook": set(),
    "slurm": {"io"},
}
# A training node has torch, transformers, NumPy and the packed arrays, nothing else.
TRAINING = {"io", "dataset", "model", "checkpoint", "sharding", "runtime", "loop", "train", "predict", "remote"}
SAME = {"units": "train"}  # train's processes: each starts the other
TRAINING_NODE = {"numpy", "torch", "transformers", "safetensors", "tqdm"}
OPTIONAL = {"wandb", "tensorboard"}  # experiment trackers, used if they are there
USE_TORCH = {"model", "train", "loop", "predict", "checkpoint", "runtime", "sharding", "hub"}


def _lock() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _direct() -> list[Requirement]:
    """What `make all` and `make test` need: all but the cluster extra."""
    project = _project()["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "cluster"]
    return [Requirement(line) for group in (project["dependencies"], *extras) for line in group]


def test_every_version_in_the_lock_is_exact():
    assert all(re.fullmatch(r"==[0-9a-z.]+", str(pin.specifier)) for pin in _lock().values())
    assert str(_lock()["torch"].specifier) == "==2.13.0"  # without a local tag: one file for CPU and CUDA
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"nvidia|://|^--|--hash", text, re.M)


def test_pyproject_agrees_with_the_lock():
    lock = _lock()
    build = Requirement(_project()["build-system"]["requires"][0])  # installed, as the build is not isolated
    pins = {canonicalize_name(pin.name): pin for pin in [*_direct(), build]}
    assert {name: lock.get(name) for name in pins} == pins


def test_conda_installs_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert packages == {"pip": ["--requirement requirements.lock"]} and pip == "pip"
    version = tuple(map(int, python.removeprefix("python=").split(".")))
    assert _project()["project"]["requires-python"] == ">=3.11" and version >= (3, 11)


def test_the_lock_is_complete():
    """What the locked packages need on this platform is in the lock, at a version that suits all of them."""
    lock, gaps = _lock(), []
    for pin in lock.values():
        if pin.marker and not pin.marker.evaluate():
            continue
        for line in importlib.metadata.requires(pin.name) or []:
            need = Requirement(line)
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            found = lock.get(canonicalize_name(need.name))
            version = str(found.specifier)[2:] if found else None
            vendor = re.match(r"nvidia|cuda|triton", need.name)  # torch pins these itself, per platform
            if not vendor and (version is None or not need.specifier.contains(version, prereleases=True)):
                gaps.append(f"{pin} needs {need}, the lock has {version}")
    assert gaps == []


# -------------------------------------------------------------------------------------------- imports
def _module(file: Path) -> str:
    """Key in ARROWS: the first name below cloud_lib."""
    name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return SAME.get(name, name)


def _imports(file: Path) -> Iterator[tuple[str, str]]:
    """(top-level package, module of cloud_lib or "") of every import, also of those inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, file)
            names = [f"cloud_lib.{alias.name}" for alias in node.names] if module == "cloud_lib" else [module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield parts[0], parts[1] if parts[0] == "cloud_lib" and len(parts) > 1 else ""


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    """Name of the module that `from ... import` names, `.` and `..` resolved."""
    if not node.level:
        return node.module
    folder = file.relative_to(ROOT).parts[:-node.level]
    return ".".join([*folder, *filter(None, [node.module])])


FILES = sorted(file for file in PACKAGE.rglob("*.py") if _module(file) not in ("cli", "__init__", "__main__"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(file):
    module, imports = _module(file), set(_imports(file))
    assert module in ARROWS, f"say in ARROWS what {module} may import"
    own = {SAME.get(name, name) for package, name in imports if package == "cloud_lib"} - {"", "__version__"}
    assert own <= ARROWS[module]
    packages = {package for package, _ in imports}
    assert module in USE_TORCH or not packages & {"torch", "transformers"}
    if module in TRAINING:
        assert packages <= TRAINING_NODE | OPTIONAL | _standard_library() | {"cloud_lib"}


def test_what_is_imported_is_a_direct_dependency():
    """Nothing rests on a package that is there only because another one needs it."""
    providers = importlib.metadata.packages_distributions()
    cluster = map(Requirement, _project()["project"]["optional-dependencies"]["cluster"])
    direct = {canonicalize_name(pin.name) for pin in [*_direct(), *cluster]} | {"setuptools"}
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    own = {"cloud_lib", "benchmarks"} | {file.stem for file in sources}
    used = {package: file.name for file in sources for package, _ in _imports(file)}
    unnamed = {package: file for package, file in used.items()
               if package not in _standard_library() | OPTIONAL | own
               and not direct & {canonicalize_name(name) for name in providers.get(package, [package])}}
    assert unnamed == {}


def test_arrows_form_no_cycle():
    order: list[str] = []
    while rest := [m for m in ARROWS if m not in order]:
        free = [m for m in rest if ARROWS[m] - {m} <= set(order)]
        assert free, f"cycle among {rest}"
        order += free


def _standard_library() -> set[str]:
    return set(sys.stdlib_module_names)
