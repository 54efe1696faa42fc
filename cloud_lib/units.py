"""Training units as processes of their own: many small ones side by side, or one on several GPUs.

A unit is a dictionary {"kind": "pretrain" | "finetune", "config": {...}, "data_dir", "out_dir"} of plain JSON
values. Workers read units from standard input one after another, so that torch is imported once per worker
and not once per unit. Nothing here imports torch before a worker starts.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cloud_lib import io

KINDS = ("pretrain", "finetune")
UNIT_KEYS = {"kind", "config", "data_dir", "out_dir", "restart"}
ANSWER = "unit-result "  # start of a worker's answer line
PARENT = "CLOUD_PARENT_PID"  # who started a worker or launcher: it may be gone before the child can ask


class TimeOver(Exception):
    """The time that was asked for has passed; what was interrupted has saved where it was."""


def run_units(units: Sequence[dict[str, Any]], n_workers: int, threads_per_worker: int = 1,
              progress: bool = True, deadline: float = float("inf")) -> list[dict[str, Any]]:
    """Run units in `n_workers` processes and return their results in order.

    A unit that has finished with the same settings and data is not run again; an interrupted one continues. A
    folder that holds another unit's run is begun anew, unless the unit says "restart": false.

    Args:
        n_workers: 0 trains nothing: it writes the unfinished units to a file for a cluster, and says so.
        threads_per_worker: OMP_NUM_THREADS of each process; processes x threads should not exceed the cores.
        deadline: of time.monotonic(); then the workers save and stop.
    Raises:
        ValueError: a unit is malformed.
        TimeOver: at the deadline, if units are left.
        RuntimeError: units failed (after the others have finished); names each with its last lines. Or there are
            unfinished ones and no workers.
    """
    for unit in units:
        _check(unit)
    todo: queue.Queue[int] = queue.Queue()
    results: dict[int, dict[str, Any]] = {i: found for i, unit in enumerate(units) if (found := _done(unit))}
    for i in range(len(units)):
        if i not in results:
            todo.put(i)
    if n_workers == 0 and todo.qsize():
        raise RuntimeError(_left_to_others([unit for i, unit in enumerate(units) if i not in results]))
    failures: dict[int, str] = {}
    n_processes = min(n_workers, todo.qsize())
    bar = tqdm(total=len(units), initial=len(results), desc="units", disable=None if progress else True)
    with bar, _workers(n_processes, threads_per_worker) as workers:
        threads = [threading.Thread(target=_serve, args=(worker, units, todo, results, failures, bar),
                                    daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a join without limit would not see an interrupt
                if time.monotonic() > deadline:
                    raise TimeOver
                thread.join(0.2)
    if failures:
        lines = [f"--- {units[i]['out_dir']}\n{text}" for i, text in sorted(failures.items())[:3]]
        raise RuntimeError(f"{len(failures)} of {len(units)} units failed; the last lines of the first "
                           f"{len(lines)}:\n" + "\n".join(lines) +
                           "\nRun again to retry them; finished units are kept")
    return [results[i] for i in range(len(units))]


def _left_to_others(units: list[dict[str, Any]]) -> str:
    file = Path(os.path.commonpath([Path(unit["out_dir"]).resolve().parent for unit in units])) / "units.json"
    io.write_json(file, units)
    return (f"{len(units)} units are not finished and n_workers is 0; they are in {file}. Train them with `python -m "
            f"cloud_lib slurm --units {file} --array`, then run this again")


def launch(unit: dict[str, Any], n_processes: int, threads_per_process: int | None = None) -> dict[str, Any]:
    """Train one unit with several processes (one per GPU, or per share of the CPU's cores) through torchrun.

    Equal to `torchrun --standalone --nproc-per-node N -m cloud_lib.train UNIT.json` on the command line.
    Raises:
        ValueError: the unit is malformed.
        RuntimeError: it failed; with its last lines.
    """
    _check(unit)
    if found := _done(unit):
        return found
    file = io.write_json(Path(unit["out_dir"]) / "unit.json", unit)
    threads = threads_per_process or max(1, (os.cpu_count() or 1) // n_processes)
    command = [sys.executable, "-m", "cloud_lib.units", "--standalone", "--nproc-per-node", str(n_processes),
               "-m", "cloud_lib.train", str(file)]
    child = subprocess.Popen(command, env=_environment(threads), text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
    with _ended(child):
        lines = list(child.stdout)
        if child.wait() != 0:
            raise RuntimeError(f"training of {unit['out_dir']} with {n_processes} processes ended with "
                               f"status {child.returncode}; last lines:\n{''.join(lines[-15:])}")
    return io.read_json(Path(unit["out_dir"]) / "result.json")


def _check(unit: dict[str, Any]) -> None:
    missing, unknown = sorted(UNIT_KEYS - {"restart"} - set(unit)), sorted(set(unit) - UNIT_KEYS)
    if missing or unknown or unit["kind"] not in KINDS:
        raise ValueError(f"expected a unit with {sorted(UNIT_KEYS)} and kind {KINDS}, found kind "
                         f"{unit.get('kind')!r}, missing {missing}, unknown {unknown}")


def unit_hash(unit: dict[str, Any]) -> str:
    """What the unit's result depends on: its settings, the data's checksums and the initial weights."""
    config = {key: value for key, value in io.plain(unit["config"]).items() if key != "run"}
    inputs = [Path(unit["data_dir"]) / "meta.json"]
    if (init := config.get("init", "scratch")) != "scratch" and not init.startswith("hub:"):
        inputs.append(Path(init) / "model.safetensors")
    hashes = [io.sha256(file) if file.is_file() else None for file in inputs]
    return io.config_hash([unit["kind"], config, hashes])


def finished(units: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the units that have finished with the same settings and data."""
    return [unit for unit in units if _done(unit)]


def _done(unit: dict[str, Any]) -> dict[str, Any] | None:
    """Result of a unit that has finished exactly like this one."""
    out_dir = Path(unit["out_dir"])
    stamp, result = out_dir / "unit_hash.json", out_dir / "result.json"
    if stamp.is_file() and result.is_file() and io.read_json(stamp) == unit_hash(unit):
        return io.read_json(result)
    return None


# ---------------------------------------------------------------------------------- the parent's side
def _environment(threads: int) -> dict[str, str]:
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, PARENT: str(os.getpid())}


@contextlib.contextmanager
def _workers(n: int, threads: int) -> Iterator[list[subprocess.Popen]]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(_ended(subprocess.Popen(
            [sys.executable, "-m", "cloud_lib.train", "--worker"], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=_environment(threads) | {"LOCAL_RANK": str(i)}))) for i in range(n)]
        try:
            yield found
        except BaseException:
            for worker in found:  # all at once: they save side by side
                worker.terminate()
            raise


@contextlib.contextmanager
def _ended(child: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """The child has ended when the block is left; an exception (Ctrl-C) asks it to save and exit first."""
    try:
        yield child
    except BaseException:
        child.terminate()
        raise
    finally:
        if child.stdin:
            child.stdin.close()
        child.wait()
        child.stdout.close()


def _serve(worker: subprocess.Popen, units: Sequence[dict[str, Any]], todo: queue.Queue,
           results: dict[int, Any], failures: dict[int, str], bar: tqdm) -> None:
    """Give one worker unit after unit until none is left or the worker dies."""
    with contextlib.suppress(queue.Empty):
        while worker.poll() is None:
            i = todo.get_nowait()
            answer = _ask(worker, units[i])
            if "error" in answer:
                failures[i] = answer["error"]
            else:
                results[i] = answer["result"]
            bar.update(1)


def _ask(worker: subprocess.Popen, unit: dict[str, Any]) -> dict[str, Any]:
    try:
        worker.stdin.write(json.dumps(io.plain(unit)) + "\n")
        worker.stdin.flush()
        for line in worker.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
    except (BrokenPipeError, ValueError):
        pass
    return {"error": f"the process ended with status {worker.wait()} (negative: killed by that signal)"}


# ----------------------------------------------------------------------------------- the worker's side
def worker_main(arguments: Sequence[str]) -> int:
    """`python -m cloud_lib.train UNIT.json | UNITS.json [--index I] | --worker`; returns the exit status."""
    if list(arguments) == ["--worker"]:
        return _work()
    parser = argparse.ArgumentParser(prog="python -m cloud_lib.train")
    parser.add_argument("file", metavar="UNITS.json", help="a unit, or a list of units")
    parser.add_argument("--index", type=int, metavar="I", help="only this one of the list, from 0")
    args = parser.parse_args(arguments)
    content = io.read_json(args.file)
    found = content if isinstance(content, list) else [content]
    if args.index is not None and not 0 <= args.index < len(found):
        raise ValueError(f"expected an --index from 0 to {len(found) - 1} ({args.file}), found {args.index}")
    for unit in found if args.index is None else [found[args.index]]:
        _check(unit)
        _run_one(unit)
    return 0


def _run_one(unit: dict[str, Any]) -> dict[str, Any]:
    from cloud_lib import train

    config_class, function = {"pretrain": (train.PretrainConfig, train.pretrain),
                              "finetune": (train.FinetuneConfig, train.finetune)}[unit["kind"]]
    stamp = unit_hash(unit)
    result = function(train.from_dict(config_class, unit["config"]), unit["data_dir"], unit["out_dir"],
                      restart=unit.get("restart", True))
    if int(os.environ.get("RANK", 0)) == 0:
        io.write_json(Path(unit["out_dir"]) / "unit_hash.json", stamp)
    return result


def _work() -> int:
    """Run the units that arrive on standard input, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which sends SIGTERM
    _end_with_parent()
    for line in sys.stdin:
        try:
            answer = {"result": _run_one(json.loads(line))}
        except Exception:  # whatever a unit dies of is the parent's to report
            answer = {"error": "".join(traceback.format_exc().splitlines(keepends=True)[-12:])}
        print(ANSWER + json.dumps(io.plain(answer)), flush=True)
    return 0


def _end_with_parent() -> None:
    """When the parent is gone (killed), save and exit as after SIGTERM instead of training on unseen."""
    parent = int(os.environ[PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _launcher_main(arguments: Sequence[str]) -> None:
    """torchrun, ended with its parent."""
    from torch.distributed import run

    _end_with_parent()
    run.main(list(arguments))


if __name__ == "__main__":
    _launcher_main(sys.argv[1:])
