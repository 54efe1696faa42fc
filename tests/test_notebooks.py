"""Every notebook is a thin page over the library, and every profile's parameters exist in it."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from cloud_lib.notebook import check_parameters, parameter_defaults, read_parameters

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FORBIDDEN = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Try, ast.While)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def _code(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def _lines(cell) -> int:
    """Lines of code, without comments and blank lines."""
    return sum(1 for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#"))


def test_stored_without_outputs(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert all(cell.outputs == [] and cell.execution_count is None for cell in _code(path))


def test_no_logic(path):
    for cell in _code(path):
        nodes = ast.walk(ast.parse(cell.source))  # also refuses % and ! magics
        assert [type(node).__name__ for node in nodes if isinstance(node, FORBIDDEN)] == [], cell.source
        assert "filterwarnings" not in cell.source and "/home" not in cell.source


def test_reads_like_a_page(path):
    first, *rest = nbformat.read(path, as_version=4).cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    sizes = [_lines(cell) for cell in _code(path) if "parameters" not in cell.metadata.get("tags", [])]
    assert max(sizes) < 15 and sum(sizes) < 150


def test_profile_is_a_parameter(path):
    assert parameter_defaults(path)["profile"] == "demo"  # what JupyterLab runs


@pytest.mark.parametrize("profile", sorted(p.name for p in (ROOT / "params").iterdir() if p.is_dir()))
def test_parameters_exist_in_the_notebook(path, profile):
    file = ROOT / "params" / profile / f"{path.stem}.yaml"
    check_parameters(read_parameters(file), parameter_defaults(path), f"{file} for {path.name}")


def test_no_parameter_file_without_a_notebook():
    stems = {path.stem for path in NOTEBOOKS}
    assert NOTEBOOKS and {file.stem for file in (ROOT / "params").glob("*/*.yaml")} == stems


def test_no_product_is_written_twice():
    written = re.findall(r'"((?:table|figure|summary)_?\w+)", profile', "\n".join(
        cell.source for path in NOTEBOOKS for cell in _code(path)))
    assert len(written) > 20 and len(set(written)) == len(written), sorted(written)
