"""Notebooks run in a real JupyterLab by a headless Chromium, as after `make lab`: open, Run All Cells, wait, look.

    python -m benchmarks.drive_jupyterlab notebooks/00_start_here.ipynb [...] [--minutes 10] [--screenshots DIR]

They run with the parameters that stand in them; JupyterLab may save their outputs, so run it in a copy of the
repository. The exit status is 1 if a cell failed. Needs Chromium.
"""

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.browser import Browser

PORT = 8931
URL = f"http://127.0.0.1:{PORT}"
PANEL = "jupyterapp.shell.currentWidget"
IDLE = f"{PANEL}?.sessionContext?.session?.kernel?.status === 'idle'"
CELLS = f"[...{PANEL}.content.model.cells].filter(cell => cell.type === 'code' && cell.sharedModel.source.trim())"
OUTPUTS = f"{CELLS}.flatMap(cell => cell.outputs.toJSON())"
COUNTS = {"cells": f"{CELLS}.length", "run": f"{CELLS}.filter(cell => cell.executionCount).length",
          "errors": f"{OUTPUTS}.filter(output => output.output_type === 'error').length"}
COUNTS |= {name: f"{PANEL}.node.querySelectorAll('.jp-OutputArea-output {selector}').length" for name, selector in
           {"pictures": "img", "tables": "table", "bars": ".widget-hprogress"}.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--minutes", type=float, default=10, help="for each notebook (default: %(default)s)")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="a folder that exists")
    args, token = parser.parse_args(), secrets.token_hex()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folders = {f"JUPYTER_{name}_DIR": f"{scratch}/{name}" for name in ("CONFIG", "DATA", "RUNTIME")}
        folders |= {f"JUPYTERLAB_{name}_DIR": f"{scratch}/{name}" for name in ("SETTINGS", "WORKSPACES")}
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
                                   f"--ServerApp.port={PORT}", "--ServerApp.port_retries=0", "--log-level=ERROR",
                                   f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"],
                                  env=os.environ | folders)
        try:
            httpx.Client(transport=httpx.HTTPTransport(retries=9)).get(f"{URL}/api?token={token}").raise_for_status()
            good = [drive(Path(scratch), notebook, token, args.minutes * 60, args.screenshots)
                    for notebook in args.notebooks]
        finally:
            server.terminate()
            server.wait()
    return int(not all(good))


def drive(scratch: Path, notebook: Path, token: str, timeout_s: float, screenshots: Path | None) -> bool:
    """Run all cells of a notebook in a browser of its own; whether all ran without an error."""
    with Browser(scratch / notebook.stem) as browser:
        browser.open(f"{URL}/lab/tree/{notebook.as_posix()}?token={token}&reset", 1400, 1000)
        browser.wait_for(f"window.jupyterapp && {IDLE}", 120)
        started = time.monotonic()
        for menu, label in (("MenuBar", "Run"), ("Menu", "Run All Cells")):
            labels = f"[...document.querySelectorAll('.lm-{menu}-itemLabel')]"
            _click(browser, f"{labels}.find(item => item.textContent === '{label}')")
        browser.wait_for(f"{COUNTS['errors']} || {IDLE} && {COUNTS['run']} === {COUNTS['cells']}", timeout_s)
        found = {name: browser.ask(expression) for name, expression in COUNTS.items()}
        print(f"{notebook.name}: {time.monotonic() - started:.0f} s, {found}, {browser.complaints}", flush=True)
        if screenshots:
            browser.screenshot(screenshots / f"{notebook.stem}.png")
    return found["errors"] == 0 and found["run"] == found["cells"]


def _click(browser: Browser, element: str) -> None:
    """A real click on the middle of an element, as soon as it is there."""
    middle = "(box => box && [box.x + box.width / 2, box.y + box.height / 2])"
    x, y = browser.wait_for(f"{middle}({element}?.getBoundingClientRect())")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


if __name__ == "__main__":
    sys.exit(main())
