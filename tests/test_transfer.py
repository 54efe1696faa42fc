"""Units leave for another machine, are interrupted there, go on, and come back as if trained here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cloud_lib import curation, io, notebook, plan, preparation, remote, transfer

REPOSITORY = Path(__file__).resolve().parents[1]
PARAMETERS = {  # of a profile that trains in seconds
    "01_data_curation": {"style": "site"},
    "02_pretraining": {"n_layers": 1, "n_heads": 1, "epochs": 40, "batch_size": 32, "n_processes": 1},
    "03_matbench": {"tasks": ["jdft2d"], "folds": [0, 1], "epochs": 2, "batch_size": 16, "n_trees": 5,
                    "settings_by_task": {"jdft2d": {"epochs": 3}}, "baseline_styles": ["composition"],
                    "intermediate": {"tasks": ["dielectric"], "epochs": 1}},
    "04_discovery": {"seeds": [0], "epochs": 2, "batch_size": 16, "n_workers": 1},
    "05_unconvbench": {"tasks": ["supercon"], "folds": [0], "epochs": 2, "batch_size": 16},
    "06_scaling_law": {"layers": [1], "heads": [1], "n_examples": [40, 80], "epochs": 1, "batch_size": 16,
                       "finetune_task": "jdft2d", "folds": [0], "finetune_epochs": 1, "seeds": [0]},
    "07_ablations": {"styles": ["number"], "tasks": ["jdft2d"], "n_layers": 1, "n_heads": 1, "n_pretrain": 0,
                     "pretrain_batch_size": 16, "n_train": 0, "batch_size": 16},
}


@pytest.fixture(scope="module")
def root(miniature, tmp_path_factory):
    """A repository with a profile `tiny` whose notebook 1 has run."""
    folder = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD_ROOT", str(folder))
        patch.setenv("CLOUD_DATA", str(miniature))
        (folder / "notebooks").symlink_to(REPOSITORY / "notebooks")
        (folder / "params" / "tiny").mkdir(parents=True)
        for name, given in PARAMETERS.items():
            (folder / "params" / "tiny" / f"{name}.yaml").write_text(yaml.safe_dump(given))
        data, results = io.processed_dir("tiny"), io.results_dir() / "tiny"
        curation.curate(curation.corpus_items(), data, n_workers=1)
        benchmarks = preparation.prepare_benchmarks(["jdft2d", "dielectric", "supercon"], data / "tasks", 0.01, {}, 1)
        results.mkdir(parents=True)
        benchmarks.to_csv(results / "benchmarks.csv", index=False)
        tables = {task: data / "tasks" / f"{task}.parquet" for task in ("jdft2d", "dielectric", "supercon")}
        packed = preparation.pack(tables, "site", data, False)
        io.write_json(results / "curation.json", {"style": "site", "symprec": 0.01, "symprec_by_task": {}, "packed": packed,
                                                  "exclude_test_crystals": False, "synthetic": True})
        yield folder


@pytest.fixture(scope="module")
def returned(root):
    """What came back after two calls, the first of which is over before the work is."""
    transfer.export(["tiny"], root / "export")
    call = [str(root / "export"), "--work", str(root / "work"), "--out", str(root / "out"), "--reserve", "0",
            "--workers", "1", "--device", "cpu"]
    statuses = [remote.main([*call, "--minutes", "0.1"])]
    first = io.read_json(root / "out" / "report.json")
    statuses.append(remote.main([*call, "--minutes", "5", "--weights", "tiny/matbench/jdft2d/CLOUD/fold0-*"]))
    statuses.append(remote.main([*call, "--minutes", "1", "--out", str(root / "rest"), "--new"]))
    assert statuses == [0, 0, 0] and len(first["packed"]) < first["n_jobs"]
    assert io.read_json(root / "rest" / "report.json")["packed"] == []
    return root / "out"


def test_an_interrupted_machine_goes_on_to_the_end(root, returned):
    report, jobs = io.read_json(returned / "report.json"), plan.jobs(["tiny"])
    assert len(report["packed"]) == report["n_jobs"] == len(jobs) - 2  # ablations only on request
    assert report["left_out"] == report["failures"] == []
    assert {path.name for path in (root / "export").iterdir()} == {"units.json", "data.tar.xz"}
    assert {path.name for path in returned.iterdir()} == {"report.json", "results.tar.gz.00"}


def test_results_of_other_settings_are_refused(root, returned):
    file = root / "params" / "tiny" / "02_pretraining.yaml"
    kept = file.read_text()
    file.write_text(kept.replace("epochs: 40", "epochs: 41"))
    with pytest.raises(ValueError, match=r"1 of \d+ results belong to other settings .*epochs: expected 41, found 40"):
        transfer.import_results(returned, ["tiny"], ("pretraining",))
    file.write_text(kept)


def test_notebooks_find_imported_units_done(root, returned):
    n = len(io.read_json(returned / "report.json")["packed"])
    assert transfer.import_results(returned, ["tiny"]) == {"imported": n}
    assert transfer.import_results(returned, ["tiny"]) == {"already here": n}
    assert (io.checkpoints_dir("tiny") / "matbench/jdft2d/CLOUD/fold0-seed0/model/head.safetensors").is_file()
    with pytest.raises(ValueError, match="expected units to export, found none left"):
        transfer.export(["tiny"], root / "again", ("pretraining", "matbench"))
    before = {file: file.stat().st_mtime_ns for file in io.checkpoints_dir("tiny").rglob("result.json")}
    for name in ("02_pretraining", "03_matbench"):
        notebook.run_notebook(root / "notebooks" / f"{name}.ipynb", root / "build" / "tiny" / f"{name}.ipynb",
                              root / "params" / "tiny" / f"{name}.yaml")
    after = {file: file.stat().st_mtime_ns for file in io.checkpoints_dir("tiny").rglob("result.json")}
    assert after == before and "random forest" in (root / "tables" / "tiny" / "table1.csv").read_text()


def test_the_next_machine_starts_from_weights_that_came_back(root, returned):
    transfer.import_results(returned, ["tiny"])
    shutil.rmtree(io.checkpoints_dir("tiny") / "matbench")
    transfer.export(["tiny"], root / "next", ("pretraining", "matbench"))
    jobs = remote.open_export(root / "next", root / "elsewhere")
    init = Path(jobs[0]["unit"]["config"]["init"])
    assert init.is_relative_to(root / "elsewhere" / "data" / "weights")
    assert io.sha256(init / "model.safetensors") == io.sha256(io.checkpoints_dir("tiny") / "encoder" / "model.safetensors")


def test_weights_that_stayed_there_are_trained_again(root, returned):
    """The encoder after the intermediate tasks is not sent back; who starts from it needs it on the next machine."""
    transfer.import_results(returned, ["tiny"])
    shutil.rmtree(io.checkpoints_dir("tiny") / "matbench/jdft2d/CLOUD (intermediate)/fold1-seed0")
    transfer.export(["tiny"], root / "again", ("pretraining", "matbench"))
    names = [Path(job["unit"]["out_dir"]).relative_to("tiny").as_posix() for job in io.read_json(root / "again/units.json")["jobs"]]
    assert names == ["matbench/intermediate/CLOUD/seed0", "matbench/jdft2d/CLOUD (intermediate)/fold1-seed0"]


def test_damage_is_named(root, returned, tmp_path):
    shutil.copytree(returned, tmp_path / "out")
    part = tmp_path / "out" / "results.tar.gz.00"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(ValueError, match="expected parts of results.tar.gz with sha256 .* found damage"):
        transfer.import_results(tmp_path / "out", ["tiny"])
    part.unlink()
    with pytest.raises(FileNotFoundError, match="expected 1 parts of results.tar.gz in .*, 1 missing"):
        transfer.import_results(tmp_path / "out", ["tiny"])
    with pytest.raises(FileNotFoundError, match="expected units.json in .*, found none"):
        remote.open_export(tmp_path, tmp_path / "work")
    shutil.copytree(root / "export", tmp_path / "export")
    (tmp_path / "export" / "data.tar.xz").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="expected .*data.tar.xz with sha256 .*; copy the export again"):
        remote.open_export(tmp_path / "export", tmp_path / "work")


def test_wishes_that_cannot_be_met(root):
    with pytest.raises(ValueError, match="expected parts of .*, found ..poems"):
        plan.jobs(["tiny"], ["poems"])
    with pytest.raises(FileNotFoundError, match="expected the parameters .*; choose one of the profiles"):
        plan.jobs(["huge"])


def test_the_other_machine_needs_torch_and_numpy_only():
    code = ("import sys\nfor name in 'pandas pymatgen spglib moyopy duckdb pyarrow sklearn nbformat'.split():\n"
            "    sys.modules[name] = None\nfrom cloud_lib.remote import main\nmain(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and "--minutes" in done.stdout, done.stderr


def test_what_is_too_much_is_left_out(root, returned, tmp_path, monkeypatch):
    """First the weights: what was trained from them counts without them, too."""
    monkeypatch.setattr(remote, "PART_BYTES", 290_000)
    report = remote.pack(remote.open_export(root / "export", root / "work"), root / "work", tmp_path, [])
    assert report["left_out"][0] == "tiny/pretraining/model" and report["packed"][0] == "tiny/pretraining"
    assert len(report["parts"]) <= remote.N_PARTS
    io.write_json(tmp_path / "report.json", report)
    for folder in (io.checkpoints_dir("tiny"), root / "build"):
        shutil.rmtree(folder, ignore_errors=True)
    counts = transfer.import_results(tmp_path, ["tiny"])
    assert counts["imported"] == len(report["packed"]) and not (io.checkpoints_dir("tiny") / "encoder").exists()
