"""Checkpoints: one atomic folder per step with everything a run needs to continue.

A folder step_00001000/ holds state.pt (model, optimizer, best model so far) and meta.json (step, checksum of
state.pt, and the run's identity: configuration, data hash, vocabulary hash). There is no generator to save:
batches, masks and dropout are functions of (seed, step).
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cloud_lib import io


def save(folder: Path, step: int, state: dict[str, Any], identity: dict[str, Any], keep_last: int) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep_last`.

    Raises:
        OSError: the disk is full; older checkpoints are untouched.
    """
    with io.atomic_path(folder / f"step_{step:08d}") as target:
        target.mkdir()
        torch.save(state, target / "state.pt")
        stamp = {"step": step, "sha256": io.sha256(target / "state.pt")}
        io.write_json(target / "meta.json", stamp | identity)
    for old in _found(folder)[keep_last:]:
        shutil.rmtree(old)
    return folder / f"step_{step:08d}"


def latest(folder: Path, identity: dict[str, Any],
           say: Callable[[str], None] = print) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest readable checkpoint, or None if there is none at all.

    A damaged one (killed machine, full disk) is named and the one before it is used.
    Raises:
        ValueError: it belongs to another configuration, data or vocabulary; or all are damaged.
    """
    damaged = []
    for path in _found(folder):
        try:
            meta = io.read_json(path / "meta.json")
            if io.sha256(path / "state.pt") != meta["sha256"]:
                raise ValueError("state.pt differs from its checksum")
        except (OSError, ValueError, KeyError) as error:
            damaged.append(path.name)
            say(f"checkpoint {path} is damaged ({error}); trying the one before it")
            continue
        require_same(identity, meta, path)
        return meta["step"], torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if damaged:
        raise ValueError(f"expected a readable checkpoint in {folder}, all {len(damaged)} are damaged, "
                         f"e.g. {damaged[:3]}; delete the folder to train from the start")
    return None


def require_same(expected: dict[str, Any], found: dict[str, Any], where: os.PathLike) -> None:
    """Raise ValueError naming every difference between the identities of two runs."""
    if different := differences(expected, found):
        raise ValueError(f"{where} belongs to another run: " + "; ".join(different) +
                         ". Use the same settings and data, another out_dir, or restart=True to begin anew")


def differences(expected: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys of `expected` (nested ones too) whose value in `found` is another, as readable text."""
    lines = []
    for key, value in io.plain(expected).items():
        other = found.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            lines += differences(value, other, f"{prefix}{key}.")
        elif value != other:
            lines.append(f"{prefix}{key}: expected {value}, found {other}")
    return lines


def _found(folder: Path) -> list[Path]:
    """Checkpoints, newest first; what a killed process left half-written is removed."""
    if not folder.is_dir():
        return []
    for leftover in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    return sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)
