"""Run one notebook with the parameters of a profile.

The notebook is executed to a hidden file that takes its final name after the last cell, so that a name in
build/<profile>/ always means a finished run. Papermill only warns about a parameter that the notebook does
not have, and reads YAML 1.1, where `1e-4` is a string and `No` is false; here each of these is an error.
"""

import ast
import contextlib
import difflib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient.exceptions import DeadKernelError
from papermill import PapermillExecutionError, execute_notebook
from traitlets.config import Config

START_TIMEOUT_S = 300  # a loaded machine needs more than papermill's 60 s to start a kernel
KEPT = re.compile(r'kept\(results / "([^"]+)"')
SHUTDOWN_WAIT_S = 200.0  # half of it for an interrupted kernel to save


class NotebookError(ValueError):
    """A notebook without a usable parameters cell, a parameter it does not have, or a cell that failed."""


def run_notebook(source: Path, target: Path, file: Path | None = None,
                 overrides: dict[str, str] | None = None, *, profile: str | None = None) -> Path:
    """Execute `source` into `target`.

    Args:
        source: a notebook with one cell tagged `parameters` that assigns literals, `profile` among them.
        target: where the executed notebook goes; its folder's name is the profile unless `profile` is given.
        file: YAML file of overrides (may be empty).
        overrides: further overrides, values in YAML; they win over `file`.
    Raises:
        NotebookError: a wrong parameter, or a failed cell. A failed run leaves NN.failed.ipynb with the
            traceback beside `target`; an earlier `target` stays as it was.
    """
    given = read_parameters(file) if file else {}
    given |= {key: yaml.safe_load(value) for key, value in (overrides or {}).items()}
    given["profile"] = profile or target.parent.name
    check_parameters(given, parameter_defaults(source), origin=f"{file or 'command line'} for {source}")
    started = time.monotonic()
    _execute(source, target, given)
    print(f"{source.stem}: {time.monotonic() - started:.0f} s", flush=True)
    return target


def missing_results(source: Path, folder: Path) -> list[Path]:
    """Files that the notebook keeps its results in, `kept(results / "NAME", ...)`, and that `folder` lacks."""
    code = "\n".join(cell.source for cell in nbformat.read(source, as_version=4).cells if cell.cell_type == "code")
    return [folder / name for name in KEPT.findall(code) if not (folder / name).is_file()]


def _execute(source: Path, target: Path, parameters: dict[str, Any]) -> None:
    hidden, failed = target.with_name(f".{target.name}"), target.with_suffix(".failed.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # its own reading of the parameters cell stumbles
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this environment
    try:
        with _sigterm_ends(), tempfile.TemporaryDirectory(prefix="cloud-") as sockets:
            execute_notebook(source, hidden, parameters=parameters, kernel_name="python3", language="python",
                             start_timeout=START_TIMEOUT_S, progress_bar=sys.stderr.isatty(),
                             config=_kernel(sockets))
        hidden.replace(target)
        failed.unlink(missing_ok=True)
    except PapermillExecutionError as error:
        hidden.replace(failed)
        raise NotebookError(f"{source} failed in cell [{error.exec_count}] `{_first_line(error.source)}`: "
                            f"{error.ename}: {_last_line(error.evalue)}; traceback in {failed}") from error
    except DeadKernelError as error:
        raise NotebookError(f"{source}: the kernel died ({error}), most often for want of memory") from error
    finally:
        hidden.unlink(missing_ok=True)


def _kernel(sockets: str) -> Config:
    """Sockets are files in a folder of their own: parallel kernels cannot collide on TCP ports."""
    return Config({"KernelManager": {"transport": "ipc", "ip": str(Path(sockets) / "kernel"),
                                     "shutdown_wait_time": SHUTDOWN_WAIT_S}})


@contextlib.contextmanager
def _sigterm_ends() -> Iterator[None]:
    """SIGTERM, as a cluster sends before the end, interrupts the cell, so that training saves; status 143."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        print("SIGTERM: interrupting the notebook; run it again to continue", file=sys.stderr, flush=True)
        raise SystemExit(143)  # on its way out papermill interrupts the kernel and waits for it

    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handler
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def _last_line(text: str) -> str:
    return next(iter(text.strip().splitlines()[::-1]), "")


def read_parameters(file: Path) -> dict[str, Any]:
    """Overrides in a YAML file; an empty file means none.

    Raises:
        NotebookError: the file is not a YAML mapping.
    """
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise NotebookError(f"expected YAML in {file}: {error}") from error
    if not isinstance(given, dict | None):
        raise NotebookError(f"expected lines `name: value` in {file}, found {type(given).__name__}")
    return given or {}


def parameter_defaults(source: Path) -> dict[str, Any]:
    """Names and default values in the cell tagged `parameters`.

    Raises:
        NotebookError: not exactly one such cell, or it holds something other than `name = literal`.
    """
    cells = nbformat.read(source, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise NotebookError(f"expected one cell tagged `parameters` in {source}, found {len(tagged)}")
    defaults = {}
    for statement in ast.parse(tagged[0].source).body:
        try:
            (name,) = statement.targets if isinstance(statement, ast.Assign) else (statement.target,)
            defaults[name.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError) as error:
            raise NotebookError(f"expected `name = literal` in the parameters cell of {source}, found "
                                f"`{ast.unparse(statement)}`; derive it in the next cell") from error
    return defaults


def check_parameters(given: dict[str, Any], defaults: dict[str, Any], origin: str) -> None:
    """Refuse unknown names and values of another kind than the default's.

    Raises:
        NotebookError: with the closest name, or with the way to write the value in YAML 1.1.
    """
    unknown = [key for key in given if key not in defaults]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), defaults, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(defaults)}"
        raise NotebookError(f"{len(unknown)} unknown parameter(s) in {origin}, e.g. {unknown[:3]}{hint}")
    for key, value in given.items():
        _check_value(key, value, defaults[key], origin)


def _check_value(key: str, value: Any, default: Any, origin: str) -> None:
    if isinstance(value, list):
        examples = default if isinstance(default, (list, tuple)) and default else [None]
        for item in value:
            _check_value(key, item, examples[0], origin)
        if default is None or isinstance(default, (list, tuple)):
            return
    if isinstance(value, str) and not isinstance(default, str) and _is_number(value):
        raise NotebookError(f"`{key}: {value}` in {origin} is a string in YAML 1.1; "
                            f"write a decimal point and a signed exponent: {float(value):.1e}")
    if isinstance(value, bool) and isinstance(default, str):
        raise NotebookError(f"`{key}` in {origin} is {value} in YAML 1.1, where No, Yes, On and Off are "
                            "booleans; quote it")
    if value is not None and default is not None and _kind(value) not in _accepted(default):
        raise NotebookError(f"expected {_kind(default)} for `{key}` in {origin} (default {default!r}), "
                            f"found {_kind(value)} {value!r}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(value: Any) -> str:
    return "list" if isinstance(value, tuple) else type(value).__name__


def _accepted(default: Any) -> tuple[str, ...]:
    """Kinds that may replace a default: an int may stand for a float, nothing else changes kind."""
    return ("float", "int") if isinstance(default, float) else (_kind(default),)
