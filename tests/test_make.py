"""The build graph, run with the real Makefile and a stand-in for Python that only copies notebooks."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = ("01_data_curation", "02_pretraining", "03_matbench", "00_start_here", "04_discovery", "05_unconvbench",
         "06_scaling_law", "07_ablations")  # in the order in which make runs them
PYTHON = """#!/bin/sh
case "$3" in
  notebook) echo "run $4"; mkdir -p "$(dirname "$5")"; grep -q fail "$4" && exit 2; cp "$4" "$5" ;;
  slurm) echo "run $3 $4" ;;
  *) echo "run $3 $4"; [ -z "$4" ] || { mkdir -p "$4"; touch "$4/SYNTHETIC.txt"; } ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Run make in a copy of the repository's build files; returns the notebooks and commands that it ran."""
    for folder in ("notebooks", "params/demo", "params/smoke", "cloud_lib/sources", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / file).write_text((REPOSITORY / file).read_text())
    for name in NAMES:
        (tmp_path / f"notebooks/{name}.ipynb").write_text("ok")
        for profile in ("demo", "smoke"):
            (tmp_path / f"params/{profile}/{name}.yaml").touch()
    (tmp_path / "cloud_lib/sources/miniature.py").touch()
    (tmp_path / ".venv/bin/python").write_text(PYTHON)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / ".venv/.installed").touch()
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith(("MAKE", "MFLAGS", "CLOUD_", "PROFILE"))}

    def run(*arguments: str, status: int = 0) -> list[str]:
        done = subprocess.run(["make", *arguments], cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        run.stderr = done.stderr
        return [line.removeprefix("run ").removeprefix("notebooks/").removesuffix(".ipynb").strip()
                for line in done.stdout.splitlines() if line.startswith("run ")]

    run.root = tmp_path
    return run


def test_the_makefile_knows_every_notebook():
    ruled = set(re.findall(r"^\$\(BUILD\)/(\d\d_\w+)\.ipynb:", (REPOSITORY / "Makefile").read_text(), re.M))
    assert ruled == set(NAMES) == {file.stem for file in (REPOSITORY / "notebooks").glob("*.ipynb")}


def test_all_runs_everything_once(make):
    assert make("all") == ["data", *NAMES]
    started = time.monotonic()
    assert make("all") == []
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("touched, rerun", [
    ("notebooks/01_data_curation.ipynb", NAMES),
    ("params/demo/02_pretraining.yaml", NAMES[1:6]),
    ("notebooks/05_unconvbench.ipynb", ("05_unconvbench",)),
    ("params/smoke/03_matbench.yaml", ()),
    ("cloud_lib/sources/miniature.py", ()),
])
def test_a_touched_file_reruns_what_depends_on_it(make, touched, rerun):
    make("all")
    (make.root / touched).touch()
    assert make("all") == list(rerun)


@pytest.mark.parametrize("target", ["03", "matbench", "03_matbench"])
def test_one_notebook_by_number_or_name(make, target):
    assert make(target) == ["data", *NAMES[:3]]


def test_the_scaling_law_needs_only_the_strings(make):
    assert make("scaling_law") == ["data", NAMES[0], NAMES[6]]


def test_smoke_runs_on_the_miniature_whatever_the_data_folder(make):
    assert make("all", "PROFILE=smoke", "CLOUD_DATA=/elsewhere") == ["miniature data/miniature", *NAMES]
    assert (make.root / "build/smoke/input.txt").read_text() == f"input: {make.root}/data/miniature\n"
    assert make("all", "PROFILE=smoke") == []


def test_another_data_folder_reruns_from_stage_1(make):
    (make.root / "mine").mkdir()
    make("all")
    assert make("all", "CLOUD_DATA=mine") == list(NAMES)
    assert make("all", "CLOUD_DATA=mine") == []
    make("all", "CLOUD_DATA=absent", status=2)
    assert "CLOUD_DATA names no folder: 'absent'" in make.stderr


def test_failed_notebook_is_not_taken_for_finished(make):
    make("all")
    good = make.root / "build/demo/02_pretraining.ipynb"
    (make.root / "notebooks/02_pretraining.ipynb").write_text("fail")
    assert make("all", status=2) == ["02_pretraining"]
    assert good.read_text() == "ok"
    (make.root / "notebooks/02_pretraining.ipynb").write_text("mended")
    assert make("all") == list(NAMES[1:6])
    assert good.read_text() == "mended"


def test_tables_and_figures_are_restored_once(make):
    assert make("tables", "figures") == [name for name in NAMES if name != "00_start_here"]  # it has no products
    assert (make.root / "build/restored/demo/06_scaling_law.ipynb").exists()
    assert make("all") == ["data", *NAMES]  # a restored notebook is not taken for a run one


def test_slurm_runs_the_command_of_the_notebook_target(make):
    assert make("slurm", "NB=02_pretraining", "DRY=1") == ["slurm --script"]
    shown = [subprocess.run(["make", "-n", *arguments], cwd=make.root, capture_output=True, text=True).stdout
             for arguments in (["02"], ["slurm", "NB=02_pretraining", "SLURM_ARGS=--gpus=2 --time=08:00:00"])]
    command = shown[0].strip().splitlines()[-1]
    assert "02_pretraining" in command and shown[1].rstrip().endswith(f" -- {command}")
    assert "build/demo/slurm/02_pretraining.sbatch" in shown[1] and "'--gpus=2 --time=08:00:00'" in shown[1]
    make("slurm", "NB=2", status=2)
    assert "expected NB=NOTEBOOK, found '2'; choose one of: 00_start_here" in make.stderr


def test_unknown_profile_lists_the_profiles(make):
    make("all", "PROFILE=dmeo", status=2)
    assert "unknown PROFILE 'dmeo'; choose one of: demo smoke" in make.stderr


def test_clean_keeps_data_and_checkpoints(make):
    make("all")
    for folder in ("checkpoints/demo", "data/raw", "tables/demo"):
        (make.root / folder).mkdir(parents=True, exist_ok=True)
    make("clean")
    assert not (make.root / "build").exists()
    assert all((make.root / folder).is_dir() for folder in ("checkpoints/demo", "data/raw", "tables/demo"))


def test_help_lists_the_targets(make):
    shown = subprocess.run(["make", "help"], cwd=make.root, capture_output=True, text=True, check=True).stdout
    for target in ("all", "data", "lab", "test", "bench-gpu", "slurm", "clean", *NAMES):
        assert re.search(rf"\b{target}\b", shown)
