"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # results are equal to the bit only for equal numbers of threads
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # `make test` must not speak into the makes that are tested
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def cloud_data() -> Path:
    """The folder named by CLOUD_DATA with the real data files."""
    folder = os.environ.get("CLOUD_DATA")
    if not folder:
        pytest.skip("needs the real data files: set CLOUD_DATA to their folder")
    if (Path(folder) / "SYNTHETIC.txt").exists():
        pytest.skip("needs the real data files: CLOUD_DATA names the synthetic miniature")
    return Path(folder)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of synthetic data in the real layout."""
    from cloud_lib.sources.miniature import write_miniature

    return write_miniature(tmp_path_factory.mktemp("data") / "miniature")


@pytest.fixture
def empty_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as root() and without CLOUD_DATA: nothing is read from or written to the repository."""
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path))
    monkeypatch.delenv("CLOUD_DATA", raising=False)
    return tmp_path


@pytest.fixture
def miniature_root(empty_root: Path, miniature: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As empty_root, with CLOUD_DATA naming the miniature."""
    monkeypatch.setenv("CLOUD_DATA", str(miniature))
    return empty_root
