"""The wrapper around papermill: parameters are checked, a failed run is never taken for a finished one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from cloud_lib.cli import main
from cloud_lib.notebook import (
    NotebookError, check_parameters, missing_results, parameter_defaults, read_parameters, run_notebook,
)

DEFAULTS = {"profile": "demo", "learning_rate": 1e-4, "n_layers": 12, "tasks": ["dielectric"],
            "elements": ["Na"], "limit": None, "shuffle": True}


def _write(path: Path, *cells: str, parameters: str = "profile = 'demo'\nx = 1.0") -> Path:
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[tagged, *map(new_code_cell, cells)]), path)
    return path


def test_failed_run_keeps_the_last_good_product_and_a_traceback(tmp_path, capsys):
    source = _write(tmp_path / "01_a.ipynb", "print(profile, x)")
    target, file = tmp_path / "build" / "smoke" / "01_a.ipynb", tmp_path / "01_a.yaml"
    file.write_text("x: 2.5\n")
    arguments = ["notebook", str(source), str(target), "--file", str(file)]
    assert main(arguments) == 0
    good = target.read_bytes()
    assert b"smoke 2.5" in good

    _write(source, "print(profile)", "y = 1\n1 / (y - 1)")
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "failed in cell [4] `y = 1`: ZeroDivisionError: division by zero; traceback in" in message
    assert target.read_bytes() == good
    failed = target.with_suffix(".failed.ipynb")
    assert "ZeroDivisionError" in failed.read_text()
    assert sorted(target.parent.iterdir()) == sorted([failed, target])  # nothing hidden is left


def test_sigterm_lets_the_cell_save(tmp_path):
    saving = f"""import time
from pathlib import Path
Path("{tmp_path}/started").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(6)  # longer than Jupyter's own patience
    Path("{tmp_path}/saved").touch()"""
    source, target = _write(tmp_path / "01_a.ipynb", saving), tmp_path / "build" / "01_a.ipynb"
    command = [sys.executable, "-m", "cloud_lib", "notebook", str(source), str(target)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}) as child:
        while not (tmp_path / "started").exists():
            assert child.poll() is None
            time.sleep(0.1)
        child.terminate()
        assert "SIGTERM: interrupting the notebook" in child.stderr.read()
    assert child.returncode == 143 and (tmp_path / "saved").exists()
    assert list(target.parent.iterdir()) == []


def test_wrong_parameters_stop_before_a_kernel_starts(tmp_path):
    source = _write(tmp_path / "01_a.ipynb")
    with pytest.raises(NotebookError, match=r"unknown parameter\(s\).*\['xx'\]; did you mean `x`\?"):
        run_notebook(source, tmp_path / "demo" / "01_a.ipynb", overrides={"xx": "1"})
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("given, message", [
    ({"learning_rat": 1}, "did you mean `learning_rate`?"),
    ({"zzz": 1}, "known: profile, learning_rate"),
    ({"learning_rate": "1e-4"}, r"is a string in YAML 1.1; write .* 1.0e-04"),
    ({"limit": "1e3"}, "is a string in YAML 1.1"),
    ({"elements": ["N", False]}, "`elements` .* is False in YAML 1.1.*quote it"),
    ({"n_layers": 2.5}, r"expected int for `n_layers` .*\(default 12\), found float 2.5"),
    ({"n_layers": True}, "expected int for `n_layers`.*found bool True"),
    ({"tasks": "dielectric"}, "expected list for `tasks`"),
    ({"shuffle": 1}, "expected bool for `shuffle`"),
])
def test_refused_parameters(given, message):
    with pytest.raises(NotebookError, match=message):
        check_parameters(given, DEFAULTS, "params/demo/01_a.yaml")


def test_accepted_parameters():
    check_parameters({"learning_rate": 1, "tasks": [], "limit": 100, "n_layers": None}, DEFAULTS, "")


@pytest.mark.parametrize("parameters, message", [
    ("x = len('a')", "expected `name = literal`.*derive it in the next cell"),
    ("x = 1\nprint(x)", "expected `name = literal`"),
])
def test_parameters_cell_holds_literals_only(tmp_path, parameters, message):
    with pytest.raises(NotebookError, match=message):
        parameter_defaults(_write(tmp_path / "a.ipynb", parameters=parameters))
    nbformat.write(new_notebook(), tmp_path / "a.ipynb")
    with pytest.raises(NotebookError, match="expected one cell tagged `parameters` .* found 0"):
        parameter_defaults(tmp_path / "a.ipynb")


def test_parameter_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("# nothing\n")
    assert read_parameters(file) == {}
    file.write_text("- a\n")
    with pytest.raises(NotebookError, match="expected lines `name: value`.*found list"):
        read_parameters(file)
    file.write_text("a: [1\n")
    with pytest.raises(NotebookError, match="expected YAML in"):
        read_parameters(file)


def test_dead_kernel_is_named(tmp_path):
    source = _write(tmp_path / "01_a.ipynb", "import os\nos._exit(1)")
    with pytest.raises(NotebookError, match="01_a.ipynb: the kernel died"):
        run_notebook(source, tmp_path / "demo" / "01_a.ipynb")
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_notebook_without_kept_results_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path))
    target = tmp_path / "build/restored/cpu/06_scaling_law.ipynb"
    source = Path(__file__).parents[1] / "notebooks/06_scaling_law.ipynb"
    assert main(["notebook", str(source), str(target), "--restore"]) == 0
    assert capsys.readouterr().out.endswith("results/cpu/scaling_runs.csv is not there; run make 06 PROFILE=cpu\n")
    assert not target.exists()
    for file in missing_results(source, tmp_path / "results/cpu"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert missing_results(source, tmp_path / "results/cpu") == []
