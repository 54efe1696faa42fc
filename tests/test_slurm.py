"""Batch scripts: what is in them, how they answer SIGTERM, and, where Slurm is installed, that it runs them."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from toy_tokens import TINY, toy

from cloud_lib import cli, io, slurm, units

UNIT = {"kind": "pretrain", "config": {}, "data_dir": "d", "out_dir": "runs/a"}
NEED = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Write stand-ins for Slurm's programs into a folder at the head of the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def add(name, body):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)

    return add


def _lint(file):
    subprocess.run(["bash", "-n", str(file)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(file)], check=True)


# -------------------------------------------------------------------------------------------------- scripts
def test_the_script_of_a_command(empty_root, monkeypatch):
    monkeypatch.setenv("CLOUD_DATA", "/data/of the group")
    command = ["python", "-m", "cloud_lib", "notebook", "a b.ipynb"]
    text = slurm.command_script("02_pretraining", command, "--gpus=2 -t 60", empty_root / "logs")
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert directives == ["--job-name=02_pretraining", f"--output={empty_root}/logs/%x-%j.out", "--open-mode=append",
                          "--requeue", "--signal=B:TERM@120", "--gpus=2 -t 60"]
    assert f"\ncd {empty_root} || exit\n" in text and "export CLOUD_DATA='/data/of the group'\n" in text
    assert "\npython -m cloud_lib notebook 'a b.ipynb' &\n" in text
    _lint(slurm.write(text, empty_root / "deep" / "a.sbatch"))


def test_the_script_of_units(tmp_path, empty_root):
    file = io.write_json(tmp_path / "units.json", [UNIT] * 40)
    text = slurm.units_script(file, "--array=0-39%8")
    assert "#SBATCH --array=0-39\n" in text and text.index("--array=0-39\n") < text.index("--array=0-39%8")
    assert f'-m cloud_lib.train {file} --index "$SLURM_ARRAY_TASK_ID" &\n' in text
    assert f"--output={tmp_path}/%x-%A_%a.out" in text
    _lint(slurm.write(text, tmp_path / "a.sbatch"))
    assert "--array" not in slurm.units_script(file, array=False)
    with pytest.raises(ValueError, match="expected a list of training units in .*, found dict of length 4"):
        slurm.units_script(io.write_json(tmp_path / "one.json", UNIT))


def test_only_the_unit_of_the_index_is_trained(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(units, "_run_one", trained.append)
    file = io.write_json(tmp_path / "units.json", [UNIT | {"out_dir": name} for name in "abc"])
    assert units.worker_main([str(file), "--index", "1"]) == 0
    assert [unit["out_dir"] for unit in trained] == ["b"]
    with pytest.raises(ValueError, match="expected an --index from 0 to 2 .*, found 3"):
        units.worker_main([str(file), "--index", "3"])


def test_without_workers_the_unfinished_units_are_written_down(tmp_path):
    some = [UNIT | {"out_dir": str(tmp_path / task / f"fold{fold}")} for task in "ab" for fold in range(2)]
    io.write_json(tmp_path / "a" / "fold1" / "result.json", {"kind": "pretrain"})
    io.write_json(tmp_path / "a" / "fold1" / "unit_hash.json", units.unit_hash(some[1]))
    with pytest.raises(RuntimeError, match=f"3 units are not finished .* {tmp_path}/units.json. Train them with"):
        units.run_units(some, n_workers=0)
    assert io.read_json(tmp_path / "units.json") == [some[0], *some[2:]]
    assert units.run_units([some[1]], n_workers=0) == [{"kind": "pretrain"}]


# --------------------------------------------------------------------------------------------- command line
def test_a_dry_run_submits_nothing(empty_root, capsys, programs):
    programs("sbatch", f"touch {empty_root}/submitted")
    script = empty_root / "slurm" / "job.sbatch"
    assert cli.main(["slurm", "--script", str(script), "--dry-run", "--options=-n 2", "--", "echo", "--file", "x"]) == 0
    assert capsys.readouterr().out == script.read_text() + "\n"
    assert "\necho --file x &\n" in script.read_text() and not (empty_root / "submitted").exists()


def test_submitting(empty_root, capsys, programs, monkeypatch):
    programs("sbatch", 'echo 17; test "$1" = --parsable && test -f "$2"')
    file = io.write_json(empty_root / "units.json", [UNIT])
    assert cli.main(["slurm", "--units", str(file), "--array"]) == 0
    assert capsys.readouterr().out == f"job 17 from {empty_root}/units.sbatch\n"
    programs("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(ValueError, match=r"Slurm refuses .*/units.sbatch: sbatch: error: invalid partition"):
        slurm.submit(empty_root / "units.sbatch")
    monkeypatch.setenv("PATH", str(empty_root))
    with pytest.raises(FileNotFoundError, match="expected Slurm's sbatch on the PATH to submit .*--dry-run"):
        slurm.submit(empty_root / "units.sbatch")
    assert cli.main(["slurm", "--units", str(file), "--", "echo"]) == 2
    assert "expected either --units UNITS.json or -- COMMAND, found both or neither" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- notice before the end
@pytest.mark.parametrize("state, command_status, requeued", [
    ("RUNNING", 143, True), ("COMPLETING", 143, False), ("RUNNING", 0, False)])
def test_sigterm_is_passed_on_and_the_job_requeued(tmp_path, empty_root, programs, monkeypatch, state, command_status,
                                                   requeued):
    programs("squeue", f"echo {state}")
    programs("scontrol", f'echo "$*" > {tmp_path}/scontrol')
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    body = (f"trap 'sleep 0.3; touch {tmp_path}/saved; exit {command_status}' TERM; touch {tmp_path}/started; "
            "while true; do sleep 0.05; done")
    script = slurm.write(slurm.command_script("a", ["bash", "-c", body]), tmp_path / "a.sbatch")
    with subprocess.Popen(["bash", str(script)]) as child:
        _wait_for(lambda: (tmp_path / "started").exists(), child)
        child.terminate()
    assert child.returncode == command_status and (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").exists() == requeued
    assert not requeued or (tmp_path / "scontrol").read_text() == "requeue 17\n"


def test_the_status_is_that_of_the_command(tmp_path, empty_root):
    script = slurm.write(slurm.command_script("a", ["bash", "-c", "exit 3"]), tmp_path / "a.sbatch")
    assert subprocess.run(["bash", str(script)]).returncode == 3


def _wait_for(happened, child=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline and (child is None or child.poll() is None)
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------- a real controller
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes={host} Default=YES
"""


@pytest.fixture
def controller(tmp_path, monkeypatch):
    """A Slurm controller and one node of two cores on this machine, for the time of a test."""
    if missing := [name for name in NEED if shutil.which(name) is None]:
        pytest.skip(f"needs Slurm (Debian: slurm-wlm), {missing[0]} is not on the PATH")
    host, sockets = socket.gethostname().split(".")[0], [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONF.format(host=host, user=getpass.getuser(), ports=ports, folder=folder))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    daemons = []
    try:
        for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
            daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        state = ["sinfo", "--noheader", "--format=%T"]
        _wait_for(lambda: b"idle" in subprocess.run(state, capture_output=True).stdout, seconds=30)
        yield
    finally:
        subprocess.run(["scancel", "--full", f"--user={getpass.getuser()}"], capture_output=True)
        _wait_for(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True).stdout, seconds=30)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def test_slurm_runs_an_array_and_continues_a_stopped_task(tmp_path, controller, monkeypatch):
    """Two units; the first gets SIGTERM as before a time limit, returns to the queue and ends as if undisturbed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    data = toy(tmp_path / "data").path
    config = {"encoder": io.plain(TINY), "n_steps": 600, "batch_size": 16, "n_evals": 1,
              "run": {"device": "cpu", "precision": "fp32", "log_every": 5}}
    made = [{"kind": "pretrain", "config": config, "data_dir": str(data), "out_dir": str(tmp_path / name)}
            for name in ("stopped", "undisturbed")]
    file = io.write_json(tmp_path / "units.json", made)
    job = slurm.submit(slurm.write(slurm.units_script(file), tmp_path / "units.sbatch"))
    log = tmp_path / "stopped" / "log.jsonl"
    _wait_for(log.exists)
    subprocess.run(["scancel", "--batch", "--signal=TERM", f"{job}_0"], check=True)
    _wait_for(lambda: "PENDING" in _show(job))
    assert re.search(r"SIGTERM: saved after step \d{1,3} ", (tmp_path / f"units-{job}_0.out").read_text())
    _wait_for(lambda: all((tmp_path / name / "unit_hash.json").exists() for name in ("stopped", "undisturbed")))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("stopped", "undisturbed")]
    assert weights[0] == weights[1]


def _show(job):
    return subprocess.run(["scontrol", "show", f"job={job}_0"], capture_output=True, text=True).stdout
