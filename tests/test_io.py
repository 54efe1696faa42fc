"""Folders, atomic writes, JSON, hashes, provenance."""

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cloud_lib import io


@dataclass(frozen=True)
class Config:
    width: int = 768
    rate: float = 1e-4


def test_root_is_the_variable_then_the_nearest_repository_then_the_package(tmp_path, monkeypatch):
    monkeypatch.delenv("CLOUD_ROOT", raising=False)
    (tmp_path / "cloud_lib").mkdir()
    (tmp_path / "Makefile").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert io.root() == tmp_path
    (tmp_path / "Makefile").unlink()
    assert io.root() == Path(io.__file__).resolve().parents[1]
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path / "elsewhere"))
    assert io.root() == tmp_path / "elsewhere"


def test_folders(empty_root, monkeypatch):
    assert io.raw_dir() == empty_root / "data" / "raw"
    assert io.tables_dir("demo") == empty_root / "tables" / "demo"
    monkeypatch.setenv("CLOUD_DATA", "/some/folder")
    assert io.raw_dir() == Path("/some/folder")
    assert io.embedded_dir() == empty_root / "data" / "raw" / "embedded"
    assert not list(empty_root.iterdir()), "naming a folder must not make it"


def test_atomic_path_replaces_files_and_folders(tmp_path):
    for text in ("one", "two"):
        with io.atomic_path(tmp_path / "new" / "table.csv") as temporary:
            assert temporary.suffix == ".csv"
            temporary.write_text(text)
        with io.atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert (tmp_path / "new" / "table.csv").read_text() == "two"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model", "new", "table.csv", "two"]


def test_atomic_path_keeps_the_old_file_when_the_writer_fails(tmp_path):
    (tmp_path / "result.json").write_text("old")
    with pytest.raises(RuntimeError, match="writer"), io.atomic_path(tmp_path / "result.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError("writer")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


def test_atomic_path_says_that_the_disk_is_full(tmp_path):
    with pytest.raises(OSError, match="disk full while writing .*result.json.*nothing half-written"):
        with io.atomic_path(tmp_path / "result.json") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())
    with pytest.raises(PermissionError, match="other"), io.atomic_path(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "other errors pass")


def test_atomic_path_needs_something_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="found nothing"), io.atomic_path(tmp_path / "x"):
        pass


def test_json_round_trip_is_deterministic(tmp_path):
    obj = {"b": np.float64(0.5), "a": [np.int64(1), np.nan], "config": Config(), "path": Path("a") / "b",
           "set": {3, 1}, "array": np.eye(2)}
    io.write_json(tmp_path / "a.json", obj)
    io.write_json(tmp_path / "b.json", dict(reversed(obj.items())))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert io.read_json(tmp_path / "a.json") == {
        "a": [1, None], "array": [[1, 0], [0, 1]], "b": 0.5, "config": {"rate": 1e-4, "width": 768},
        "path": "a/b", "set": [1, 3]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        io.write_json(tmp_path / "c.json", {"x": np.inf})
    with pytest.raises(TypeError, match="found complex"):
        io.write_json(tmp_path / "c.json", {"x": 1j})
    assert not (tmp_path / "c.json").exists()


def test_read_json_names_the_damaged_file(tmp_path):
    (tmp_path / "meta.json").write_text('{"n": 1')
    with pytest.raises(ValueError, match=r"expected JSON in .*meta\.json, found damage.*delete it"):
        io.read_json(tmp_path / "meta.json")


def test_config_hash_depends_on_values_only():
    assert io.config_hash(Config()) == io.config_hash({"rate": 1e-4, "width": 768})
    assert io.config_hash(Config()) != io.config_hash(Config(width=512))
    assert len(io.config_hash(Config())) == 12


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert io.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_provenance_names_inputs_without_this_machines_paths(empty_root, tmp_path_factory, monkeypatch):
    data = tmp_path_factory.mktemp("outside")
    (data / "raw.csv").write_text("1")
    (empty_root / "corpus").mkdir()
    (empty_root / "corpus" / "part.parquet").write_text("2")
    monkeypatch.setenv("CLOUD_DATA", str(data))
    found = io.provenance("demo", 0, Config(), [data / "raw.csv", empty_root / "corpus"], time.time() - 2)
    assert list(found["inputs"]) == ["$CLOUD_DATA/raw.csv", "corpus/part.parquet"]
    assert found["commit"] is None and found["dirty"] is None, "no repository here"
    assert found["profile"] == "demo" and found["config"]["width"] == 768 and 2 <= found["wall_time_s"] < 60
    assert found["versions"]["numpy"] == np.__version__ and found["device"] and found["threads"] >= 1
    assert str(data) not in str(found) and str(empty_root) not in str(found)
    assert io.settings({"init": str(empty_root / "encoder"), "run": {"device": "cpu"}}) == {"init": "encoder"}
    with pytest.raises(FileNotFoundError, match="expected the input .*absent"):
        io.provenance("demo", 0, {}, [data / "absent"], 0.0)


def test_a_changed_product_does_not_make_the_code_dirty(empty_root):
    import subprocess

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=empty_root,
                       check=True, capture_output=True)

    for name in ("code.py", "tables/demo/summary.csv"):
        (empty_root / name).parent.mkdir(parents=True, exist_ok=True)
        (empty_root / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "start")
    (empty_root / "tables/demo/summary.csv").write_text("2")
    assert io.provenance("demo", 0, {}, [], 0.0)["dirty"] is False
    (empty_root / "code.py").write_text("2")
    assert io.provenance("demo", 0, {}, [], 0.0)["dirty"] is True
