"""Batch jobs for Slurm: any command of this package on a node, or a job array with one task per training unit.

Slurm sends SIGTERM before a job's time ends or another job takes its place. The script passes it on and waits:
training saves, the job goes back into the queue under its number, and continues from the checkpoint.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cloud_lib import io

NOTICE_S = 120  # between SIGTERM and the end; a step, a checkpoint and the end of the kernel take less
EXPORTED = ("CLOUD_DATA", "CLOUD_ROOT", "PYTHONPATH")
SCRIPT = """\
#!/bin/bash
{directives}

cd {root} || exit
{exports}
{command} &
child=$!
stopped=
trap 'trap "" TERM; stopped=1; kill -TERM "$child"' TERM
wait "$child"
status=$?
if [ "$stopped" ]; then
  wait "$child"
  status=$?
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
  if [ "$status" -ne 0 ] && [ "$state" = RUNNING ]; then  # neither cancelled nor already in the queue again
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
"""


def command_script(name: str, command: Sequence[str], options: str = "", log_dir: Path | None = None) -> str:
    """Batch script that runs `command` in root(), with the environment variables that choose data and code.

    Args:
        name: of the job; its output goes to log_dir/NAME-JOB.out (default: where sbatch is called).
        options: further options of sbatch, as on its command line; they win over the script's own.
    """
    return _script(name, shlex.join(command), [], options, log_dir)


def units_script(units: Path, options: str = "", array: bool = True) -> str:
    """Batch script that trains the units of a JSON file: one task of a job array each, or all in turn in one job.

    A unit that has finished is not run again, so the same array may be submitted twice.
    Raises:
        ValueError: the file holds no list of units.
    """
    found = io.read_json(units)
    if not isinstance(found, list) or not found:
        raise ValueError(f"expected a list of training units in {units}, found {type(found).__name__} of length "
                         f"{len(found)}; a notebook with n_workers = 0 writes one")
    command = shlex.join([sys.executable, "-m", "cloud_lib.train", str(units.resolve())])
    own = []
    if array:
        own, command = [f"--array=0-{len(found) - 1}"], command + ' --index "$SLURM_ARRAY_TASK_ID"'
    return _script(units.stem, command, own, options, units.resolve().parent)


def _script(name: str, command: str, own: list[str], options: str, log_dir: Path | None) -> str:
    output = shlex.quote(str(Path(log_dir or ".") / f"%x-{'%A_%a' if own else '%j'}.out"))
    lines = [f"--job-name={name}", f"--output={output}", "--open-mode=append", "--requeue",
             f"--signal=B:TERM@{NOTICE_S}", *own, *([options] if options.strip() else [])]
    exports = [f"export {key}={shlex.quote(os.environ[key])}\n" for key in EXPORTED if os.environ.get(key)]
    return SCRIPT.format(directives="\n".join(f"#SBATCH {line}" for line in lines), exports="".join(exports),
                         root=shlex.quote(str(io.root())), command=command)


def write(script: str, file: Path) -> Path:
    """Write the script, atomically."""
    with io.atomic_path(file) as temporary:
        temporary.write_text(script, encoding="utf-8")
    return file


def submit(file: Path) -> str:
    """Hand a script to Slurm; the number of the job.

    Raises:
        FileNotFoundError: there is no Slurm here.
        ValueError: Slurm refuses the script; with its words.
    """
    if shutil.which("sbatch") is None:
        raise FileNotFoundError(f"expected Slurm's sbatch on the PATH to submit {file}, found none; submit it where "
                                "Slurm is, or only write it (--dry-run)")
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"Slurm refuses {file}: {done.stderr.strip()}")
    return done.stdout.strip()
