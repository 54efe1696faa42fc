"""Training: it learns, it continues exactly where it was stopped, and it says what is wrong."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from toy_tokens import META, TINY, toy

from cloud_lib import checkpoint, dataset, io, loop, model as models, predict, runtime, train, units
from cloud_lib.train import EncoderConfig, FinetuneConfig, PretrainConfig, RunConfig, finetune, pretrain

RUN = RunConfig(device="cpu", precision="fp32", token_budget=200, log_every=5, progress=False)
PRETRAIN = PretrainConfig(encoder=TINY, n_steps=10, batch_size=16, lr=2e-3, n_evals=2, run=RUN)
LEARN = PretrainConfig(encoder=EncoderConfig(n_layers=1, n_heads=4, head_dim=16), n_steps=200, batch_size=64, lr=1e-2,
                       n_evals=1, run=replace(RUN, token_budget=4096))
FINETUNE = FinetuneConfig(encoder=TINY, epochs=2, batch_size=16, lr=2e-3, run=RUN)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("toy") / "corpus").path


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("toy") / "task", 200, seed=1, labels=True).path


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("run")
    pretrain(PRETRAIN, corpus, out_dir)
    return out_dir / "model"


def _weights(out_dir):
    return [file.read_bytes() for file in sorted((out_dir / "model").glob("*.safetensors"))]


def _rows(out_dir, split):
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def _with_run(config, **changes):
    return replace(config, run=replace(config.run, **changes))


def _at_call(monkeypatch, number, action):
    """Call `action` when the loop makes its step `number`."""
    step, calls = loop._step, []

    def counted(*arguments):
        calls.append(None)
        if len(calls) == number:
            action()
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", counted)


def _interrupt():
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------ learning
def test_one_batch_overfits(tmp_path):
    """20 strings whose masked tokens follow from their neighbours."""
    config = replace(LEARN, encoder=replace(LEARN.encoder, dropout=0.0), n_steps=150, batch_size=16, n_evals=1)
    pretrain(config, toy(tmp_path / "d", 25).path, tmp_path / "run")
    assert _rows(tmp_path / "run", "train")[-1]["loss"] < 1.0  # 4.1 without context


def test_loss_after_200_steps_lies_in_its_band(tmp_path):
    result = pretrain(LEARN, toy(tmp_path / "d", 1000).path, tmp_path / "run")
    assert 0.2 < result["val_loss"] < 1.8
    assert result["val_loss"] < min(bar["loss"] for bar in result["baselines"].values()) - 0.8
    assert result["accuracy"] > max(bar["accuracy"] for bar in result["baselines"].values()) + 0.2


def test_fine_tuning_beats_the_mean(tmp_path, task):
    config = replace(FINETUNE, epochs=40, lr=1e-2, n_hidden=2, hidden_width=8)
    result = finetune(config, task, tmp_path)
    with open(tmp_path / "predictions.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    test = np.array([[row["target"], row["prediction"]] for row in rows if row["split"] == "test"], float)
    assert len(test) == 40 and len(rows) == 40 + result["n_val"]
    assert result["mae_test"] == pytest.approx(np.abs(test[:, 0] - test[:, 1]).mean())
    assert result["mae_test"] < 0.7 * np.abs(test[:, 0] - result["target_mean"]).mean()
    best = min(_rows(tmp_path, "val"), key=lambda row: row["loss"])
    assert (best["loss"] * result["target_std"], best["step"]) == (pytest.approx(result["mae_val"], rel=1e-4), result["best_step"])


def test_joined_tasks_are_learned_together(tmp_path):
    """Two tasks on the same strings, one with few rows; nothing that is tested anywhere is trained on."""
    big, small = (toy(tmp_path / name, n, labels=True, task=name) for name, n in (("big", 300), ("small", 60)))
    flipped = small.labels() | {"target": 100 - 7 * small.labels()["target"]}
    small = dataset.pack(small.tokens, small.offsets, tmp_path / "flipped", small.meta, flipped, small.material_id())
    joint = dataset.join({"big": big.path, "small": small.path}, tmp_path / "joint")
    config = replace(FINETUNE, epochs=25, lr=1e-2, n_hidden=2, hidden_width=8, min_rows=150)
    rows, labels = train.task_rows(joint, config), joint.labels()
    groups = dataset.string_groups(joint, np.arange(len(joint)))
    for i in (0, 1):
        tested = groups[rows["test"][labels["task"][rows["test"]] == i]]
        others = np.concatenate([rows[split][labels["task"][rows[split]] != i] for split in ("train", "val")])
        assert len(tested) and not np.isin(groups[others], tested).any()
    result = finetune(config, joint.path, tmp_path / "run")
    with open(tmp_path / "run/predictions.csv", newline="") as handle:
        found = [row for row in csv.DictReader(handle) if row["split"] == "test"]
    for i, name in enumerate(("big", "small")):
        target, predicted = np.array([(row["target"], row["prediction"]) for row in found if row["task"] == name], float).T
        assert len(target) == {"big": 60, "small": 12}[name]
        assert result["mae_test"][i] == pytest.approx(np.abs(predicted - target).mean())
        assert result["mae_test"][i] < 0.8 * np.abs(target - result["target_mean"][i]).mean()
    meta = io.read_json(tmp_path / "run/model/cloud.json")
    assert meta["tasks"] == ["big", "small"] and meta["head"]["n_outputs"] == 2
    with pytest.raises(ValueError, match=r"expected a model of one task in .*, found \['big', 'small'\]"):
        predict.predict(tmp_path / "run/model", joint)


def test_tasks_of_different_styles_are_not_joined(tmp_path):
    one, two = toy(tmp_path / "one", labels=True), toy(tmp_path / "two", labels=True, style="site")
    with pytest.raises(ValueError, match=r"expected tasks of one vocabulary and style, found \['one', 'two'\]"):
        dataset.join({"one": one.path, "two": two.path}, tmp_path / "joint")


def test_the_result_counts_what_was_trained(tmp_path, corpus):
    result = pretrain(PRETRAIN, corpus, tmp_path)
    packed = dataset.PackedTokens.open(corpus)
    seen = [dataset.step_rows(dataset.split_rows(packed, 0.2, 0)[0], 16, 0, step) for step in range(10)]
    assert result["n_tokens_seen"] == packed.lengths[np.concatenate(seen)].sum()
    assert result["n_params_non_embedding"] == 2 * (4 * (32**2 + 32) + 8 * 32**2 + 5 * 32 + 4 * 32)
    assert result["train_flops"] == 6 * result["n_params_non_embedding"] * result["n_tokens_seen"]
    assert result["n_examples"] + result["n_val"] == len(packed) and result["n_examples_seen"] == 160
    assert set(result["accuracy_by_part"]) == {"generator", "wyckoff", "element", "fraction"}
    assert {"step", "loss", "lr", "crystals_per_s", "tokens_per_s", "mfu", "data_wait_share", "eta_s"} <= set(
        _rows(tmp_path, "train")[0])
    assert io.read_json(tmp_path / "result.json") == result == pretrain(PRETRAIN, corpus, tmp_path)


# ------------------------------------------------------------------------------------- stopping, continuing
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_ten_steps_are_five_and_five_more(tmp_path, monkeypatch, corpus, task, kind):
    """Dropout, masks and order included: the weights are the same to the bit."""
    function, config, data = {"pretrain": (pretrain, PRETRAIN, corpus), "finetune": (finetune, FINETUNE, task)}[kind]
    whole = function(config, data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _at_call(patch, 8, _interrupt)
        function(_with_run(config, checkpoint_every=5), data, tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step_00000005"]
    parts = function(config, data, tmp_path / "parts")
    assert _weights(tmp_path / "whole") == _weights(tmp_path / "parts")
    differing = {"wall_time_s", "config"}
    assert {k: v for k, v in whole.items() if k not in differing} == {
        k: v for k, v in parts.items() if k not in differing}
    logs = [[(row["step"], row["loss"]) for split in ("train", "val") for row in _rows(tmp_path / run, split)]
            for run in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_sigterm_saves_and_exits(tmp_path, monkeypatch, corpus, pretrained):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_status:
        _at_call(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        pretrain(PRETRAIN, corpus, tmp_path)
    assert exit_status.value.code == 143
    assert (tmp_path / "checkpoints" / "step_00000004").is_dir()
    pretrain(PRETRAIN, corpus, tmp_path)
    assert _weights(tmp_path) == _weights(pretrained.parent)


def test_killed_at_random_moments_the_result_is_the_same(tmp_path, corpus, pretrained):
    unit = {"kind": "pretrain", "config": io.plain(_with_run(PRETRAIN, checkpoint_every=1)),
            "data_dir": str(corpus), "out_dir": str(tmp_path / "run")}
    command = [sys.executable, "-m", "cloud_lib.train", str(io.write_json(tmp_path / "unit.json", unit))]
    rng, kills = np.random.default_rng(0), 0
    while kills < 2:
        child = subprocess.Popen(command, env=units._environment(1))
        while child.poll() is None and not (tmp_path / "run" / "log.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        child.kill()
        kills += 1
        if child.wait() == 0:
            break
    assert subprocess.run(command, env=units._environment(1)).returncode == 0
    assert _weights(tmp_path / "run") == _weights(pretrained.parent)


def test_a_truncated_checkpoint_gives_way_to_the_one_before(tmp_path, monkeypatch, corpus, pretrained, capsys):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _at_call(patch, 9, _interrupt)
        pretrain(_with_run(PRETRAIN, checkpoint_every=2), corpus, tmp_path)
    state = tmp_path / "checkpoints" / "step_00000008" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    pretrain(PRETRAIN, corpus, tmp_path)
    assert "step_00000008 is damaged (state.pt differs from its checksum)" in capsys.readouterr().out
    assert _weights(tmp_path) == _weights(pretrained.parent)


def test_only_damaged_checkpoints_stop_the_run(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, {"model": {}}, {"kind": "x"}, keep_last=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000003", "step_00000004"]
    assert checkpoint.latest(tmp_path, {"kind": "x"})[0] == 4
    (tmp_path / ".tmp-0-step_00000005").mkdir()
    for name in names:
        (tmp_path / name / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="expected a readable checkpoint in .*, all 2 are damaged"):
        checkpoint.latest(tmp_path, {"kind": "x"}, say=lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert checkpoint.latest(tmp_path / "none", {}) is None


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, corpus, pretrained):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full while writing .*step_00000006"):
        _at_call(patch, 6, lambda: patch.setattr(torch, "save", full))
        pretrain(_with_run(PRETRAIN, checkpoint_every=3), corpus, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    pretrain(PRETRAIN, corpus, tmp_path)
    assert _weights(tmp_path) == _weights(pretrained.parent)


def test_a_run_of_other_settings_data_or_vocabulary_is_refused(tmp_path, corpus):
    pretrain(PRETRAIN, corpus, tmp_path / "run")
    with pytest.raises(ValueError, match=r"belongs to another run: config.lr: expected 0.1, found 0.002\. Use"):
        pretrain(replace(PRETRAIN, lr=0.1), corpus, tmp_path / "run")
    other = toy(tmp_path / "other", 300, vocab_sha256="b" * 64).path
    with pytest.raises(ValueError, match="vocab_sha256: expected bbb.*found aaa"):
        pretrain(PRETRAIN, other, tmp_path / "run")
    more = toy(tmp_path / "more", 301).path
    with pytest.raises(ValueError, match="data_sha256: expected"):
        pretrain(PRETRAIN, more, tmp_path / "run")
    shorter = replace(PRETRAIN, n_steps=2)
    assert pretrain(shorter, more, tmp_path / "run", restart=True)["n_steps"] == 2
    assert len(_rows(tmp_path / "run", "train")) == 1


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {"model": {}}, {"config": {"lr": 1}}, keep_last=1)
    with pytest.raises(ValueError, match="step_00000001 belongs to another run: config.lr: expected 2, found 1"):
        checkpoint.latest(tmp_path, {"config": {"lr": 2}})


def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "LOCK_WAIT_S", 0)
    with runtime.process("cpu", "fp32", tmp_path):
        with pytest.raises(OSError, match="another process is training in"):
            with runtime.process("cpu", "fp32", tmp_path):
                pass


# ----------------------------------------------------------------------------------------- many processes
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_follow_the_loss_of_one(tmp_path, corpus, parallel):
    how = replace(RUN, log_every=1, parallel=parallel)
    config = replace(PRETRAIN, encoder=replace(TINY, dropout=0.0), run=how)
    unit = {"kind": "pretrain", "config": io.plain(config), "data_dir": str(corpus), "out_dir": str(tmp_path / "two")}
    one, two = pretrain(config, corpus, tmp_path / "one"), units.launch(unit, 2, threads_per_process=1)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    losses = [[row["loss"] for row in _rows(tmp_path / run, "train")] for run in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)
    assert two["n_tokens_seen"] == one["n_tokens_seen"] and two["n_masked"] == one["n_masked"]
    assert units.launch(unit, 2) == two  # finished: read, not run


def test_a_checkpoint_is_the_same_for_any_number_of_processes(tmp_path, monkeypatch, corpus):
    """One process, then two that share out the optimizer's state, then one: as one from start to end."""
    config = replace(PRETRAIN, encoder=replace(TINY, dropout=0.0), n_steps=300, n_evals=1)
    whole = pretrain(config, corpus, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _at_call(patch, 8, _interrupt)
        pretrain(_with_run(config, checkpoint_every=5), corpus, tmp_path / "parts")
    unit = {"kind": "pretrain", "config": io.plain(_with_run(config, parallel="fsdp", checkpoint_every=5)),
            "data_dir": str(corpus), "out_dir": str(tmp_path / "parts")}
    file, folder = io.write_json(tmp_path / "unit.json", unit), tmp_path / "parts" / "checkpoints"
    command = [sys.executable, "-m", "cloud_lib.units", "--standalone", "--nproc-per-node", "2", "-m", "cloud_lib.train"]
    with subprocess.Popen([*command, str(file)], env=units._environment(1), stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as child:
        while child.poll() is None and (folder / "step_00000005").exists():
            time.sleep(0.02)
        child.terminate()
    assert child.returncode != 0 and 5 < int(max(folder.iterdir()).name.removeprefix("step_")) < 300
    parts = pretrain(config, corpus, tmp_path / "parts")
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-4)
    losses = [[row["loss"] for row in _rows(tmp_path / run, "train")] for run in ("whole", "parts")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_unknown_ways_to_spread_a_model_are_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match='expected parallel "ddp" or "fsdp", found "tp"'):
        pretrain(_with_run(PRETRAIN, parallel="tp"), corpus, tmp_path)


def test_workers_take_turns_on_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(runtime.choose_device("auto")) == "cuda:1" and str(runtime.choose_device("cuda:0")) == "cuda:0"


def test_units_run_side_by_side_and_finished_ones_are_kept(tmp_path, task, pretrained):
    def unit(fold):
        settings = {"init": str(pretrained), "fold": fold, "epochs": 1, "batch_size": 16, "run": {"device": "cpu"}}
        return {"kind": "finetune", "config": settings, "data_dir": str(task),
                "out_dir": str(tmp_path / str(fold))}

    with pytest.raises(RuntimeError, match=r"(?s)1 of 3 units failed.*--- .*/9.*found fold 9; choose from \[0, 1"):
        units.run_units([unit(0), unit(9), unit(1)], n_workers=2, progress=False)
    first = (tmp_path / "0" / "result.json").stat().st_mtime_ns
    results = units.run_units([unit(0), unit(1), unit(2)], n_workers=1, progress=False)
    assert [result["fold"] for result in results] == [0, 1, 2]
    assert (tmp_path / "0" / "result.json").stat().st_mtime_ns == first


def test_a_failed_launch_shows_its_last_lines(tmp_path, monkeypatch, corpus):
    monkeypatch.setattr(sys, "executable", shutil.which("cat"))  # fails on torchrun's options, and says so
    unit = {"kind": "pretrain", "config": {}, "data_dir": str(corpus), "out_dir": str(tmp_path / "run")}
    with pytest.raises(RuntimeError, match="(?s)with 2 processes ended with status 1; last lines:.*cat: "):
        units.launch(unit, 2)


def test_malformed_units_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"found kind 'tune', missing \['config'\], unknown \['x'\]"):
        units.run_units([{"kind": "tune", "data_dir": "", "out_dir": "", "x": 1}], 1)
    with pytest.raises(ValueError, match=r"settings of FinetuneConfig, found unknown \['learning_rate'\]; choose"):
        train.from_dict(FinetuneConfig, {"learning_rate": 1})
    with pytest.raises(ValueError, match="settings of RunConfig, found unknown"):
        train.from_dict(FinetuneConfig, {"run": {"gpu": 1}})
    assert train.from_dict(PretrainConfig, io.plain(PRETRAIN)) == PRETRAIN
    with pytest.raises(SystemExit, match="2"):
        units.worker_main([])
    assert "usage: python -m cloud_lib.train" in capsys.readouterr().err


def test_workers_of_a_killed_parent_save_and_end(tmp_path, corpus):
    config = replace(PRETRAIN, n_steps=100_000, n_evals=1)
    unit = {"kind": "pretrain", "config": io.plain(config), "data_dir": str(corpus),
            "out_dir": str(tmp_path / "run")}
    code = f"import json; from cloud_lib import units; units.run_units([json.loads({json.dumps(unit)!r})], 1)"
    with subprocess.Popen([sys.executable, "-c", code], env=units._environment(1)) as parent:
        while parent.poll() is None and not (tmp_path / "run" / "log.jsonl").exists():
            time.sleep(0.05)
        parent.kill()
    with runtime.process("cpu", "fp32", tmp_path / "run"):  # waits for the worker to let the folder go
        assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_worker_whose_parent_died_before_it_could_ask_ends():
    with subprocess.Popen([sys.executable, "-m", "cloud_lib.train", "--worker"], stdin=subprocess.PIPE,
                          env=units._environment(1) | {units.PARENT: "999999999"}) as worker:
        assert worker.wait(60) == -signal.SIGTERM  # nothing to save yet


def test_a_dead_worker_is_a_failed_unit():
    with subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as worker:
        assert units._ask(worker, {}) == {"error": "the process ended with status -9 (negative: killed by that "
                                                   "signal)"}


# ---------------------------------------------------------------------------------- optimizer and schedule
def test_schedule_rises_then_falls_to_zero():
    factors = [runtime.learning_rate(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 10) and factors[10] == 1
    assert np.all(np.diff(factors[10:]) < 0) and factors[55] == pytest.approx(0.5) and factors[100] < 1e-12
    assert runtime.learning_rate(0, 1, 0.0) == 1


def test_layer_wise_decay_reaches_every_layer():
    model = models.Regressor(models.BertModel(models.with_vocab(TINY, 64).bert_config(), add_pooling_layer=False))
    optimizer = runtime.make_optimizer(model, lr=1.0, weight_decay=0.1, layer_decay=0.5, head_lr=3.0)
    peaks = {id(p): (group["peak"], group["weight_decay"]) for group in optimizer.param_groups
             for p in group["params"]}
    assert len(peaks) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        peak = 3.0 if name.startswith("head") else {"0": 0.25, "1": 0.5}.get(name.split(".")[3], 0.125)
        assert peaks[id(parameter)] == (peak, 0.1 if parameter.ndim == 2 else 0.0), name


def test_frozen_epochs_leave_the_encoder_alone(tmp_path, task, pretrained):
    config = replace(FINETUNE, encoder=None, init=str(pretrained), epochs=2)
    for frozen, out_dir in ((2.0, tmp_path / "all"), (1.0, tmp_path / "half")):
        finetune(replace(config, frozen_epochs=frozen), task, out_dir)
    before = models.load_encoder(str(pretrained)).state_dict()
    changed = {out_dir: [name for name, value in models.load_encoder(str(tmp_path / out_dir / "model")).state_dict()
                         .items() if not torch.equal(value, before[name])] for out_dir in ("all", "half")}
    assert not changed["all"] and changed["half"]


def test_early_stopping_ends_the_run(tmp_path, task):
    result = finetune(replace(FINETUNE, epochs=30, lr=0.0, patience=2), task, tmp_path)
    assert len(_rows(tmp_path, "val")) == 3 and result["epochs"] < 4


def test_rows_are_disjoint_grouped_and_depend_on_the_seed(task):
    packed = dataset.PackedTokens.open(task)
    rows = train.task_rows(packed, replace(FINETUNE, fold=2, val_fraction=0.2))
    assert np.array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(len(packed)))
    assert np.array_equal(rows["test"], np.arange(2, 200, 5))
    strings = [{packed.item(i).tobytes() for i in rows[split]} for split in ("train", "val")]
    assert not strings[0] & strings[1]
    other = train.task_rows(packed, replace(FINETUNE, fold=2, val_fraction=0.2, seed=1, grouped=False, n_train=50))
    assert not np.array_equal(rows["val"], other["val"]) and len(other["train"]) == 50 and len(other["val"]) == 32
    everything = train.task_rows(packed, replace(FINETUNE, fold=None))
    assert not len(everything["test"]) and len(everything["train"]) > 170


def test_extra_loggers_are_loaded_on_request(tmp_path, monkeypatch, corpus):
    board, wandb, written = ModuleType("torch.utils.tensorboard"), ModuleType("wandb"), []

    class Writer:
        def __init__(self, folder):
            self.add_scalar = lambda name, value, step: written.append((name, step))

    board.SummaryWriter = Writer
    wandb.init = lambda **options: type("Session", (), {"log": lambda self, row, step: written.append((*row, step))})()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    pretrain(_with_run(PRETRAIN, tensorboard=True, wandb_project="toy"), corpus, tmp_path)
    assert ("train/loss", 5) in written and any("val/loss" in row and row[-1] == 10 for row in written)


# -------------------------------------------------------------------------------------------------- bad input
def test_a_loss_that_is_not_finite_stops_with_step_and_rows(tmp_path, monkeypatch, corpus):
    def poison(model):
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))

    step = loop._step

    def spoiled(net, model, batch, plan, run, factor, number):
        if number == 7:
            poison(model)
        return step(net, model, batch, plan, run, factor, number)

    monkeypatch.setattr(loop, "_step", spoiled)
    with pytest.raises(FloatingPointError, match=r"found nan at step 7 \(batch of 16 rows, e.g. \[.*\]\); last good "
                                                 r"checkpoint: step_00000006"):
        pretrain(_with_run(PRETRAIN, checkpoint_every=3), corpus, tmp_path)


def test_out_of_memory_names_a_micro_batch_that_fits(tmp_path, monkeypatch, corpus):
    forward = models.MaskedLM.forward

    def small_device(self, batch):
        if len(batch.input_ids) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(models.MaskedLM, "forward", small_device)
    with pytest.raises(RuntimeError, match=r"micro-batches of 1\d\d tokens; not even 64 fit"):
        pretrain(PRETRAIN, corpus, tmp_path / "a")
    monkeypatch.setattr(models.MaskedLM, "forward", lambda self, batch: small_device(self, batch)
                        if len(batch.input_ids) > 110 else forward(self, batch))
    with pytest.raises(RuntimeError, match=r"out of memory at step 0 .* tokens; \d\d fit: set RunConfig\(token_budget="):
        pretrain(PRETRAIN, corpus, tmp_path / "b")


@pytest.mark.parametrize(("change", "message"), [
    ({"loss": "l2"}, 'expected loss "l1" or "huber", found "l2"'),
    ({"batch_size": 500}, r"expected a batch_size from 1 \(processes\) to 1\d\d \(training rows\), found 500"),
    ({"fold": 7}, r"found fold 7; choose from \[0, 1, 2, 3, 4\]"),
    ({"encoder": None}, "expected encoder=EncoderConfig"),
    ({"n_train": 1000}, "expected n_train from 1 to 1"),
    ({"val_fraction": 1.0}, "expected training rows"),
    ({"encoder": replace(TINY, max_positions=10)}, "more than max_positions = 10"),
    ({"run": replace(RUN, precision="fp8")}, 'expected precision "auto", "bf16" or "fp32", found "fp8"'),
])
def test_settings_that_cannot_be_are_refused(tmp_path, task, change, message):
    with pytest.raises(ValueError, match=message):
        finetune(replace(FINETUNE, **change), task, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match='expected a GPU for device="cuda", found none'):
        runtime.choose_device("cuda")


def test_tasks_that_cannot_be_are_refused(tmp_path, task):
    packed = dataset.PackedTokens.open(task)
    labels = packed.labels() | {"target": np.where(np.arange(200) % 50 == 3, np.nan, 1.0)}
    gaps = dataset.pack(packed.tokens, packed.offsets, tmp_path / "gaps", META, labels,
                        packed.material_id())
    with pytest.raises(ValueError, match=r"4 of 200 have none, e.g. \['m3', 'm53', 'm103'\]; drop"):
        finetune(FINETUNE, gaps.path, tmp_path / "run")
    few = toy(tmp_path / "few", 3, labels=True, n_folds=5)
    with pytest.raises(ValueError, match=r"expected at least as many rows as folds \(5\) in .*, found 3"):
        finetune(FINETUNE, few.path, tmp_path / "run")


def test_another_vocabulary_or_no_weights_stop_the_run(tmp_path, pretrained):
    other = toy(tmp_path / "other", 100, labels=True, vocab_sha256="b" * 64).path
    with pytest.raises(ValueError, match="data's vocabulary bbbbbbbbbbbb, found aaaaaaaaaaaa"):
        finetune(replace(FINETUNE, init=str(pretrained)), other, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="run the pre-training first"):
        finetune(replace(FINETUNE, init=str(tmp_path / "nowhere")), other, tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, corpus):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="expected a folder that can be written at .*file/run"):
        pretrain(PRETRAIN, corpus, tmp_path / "file" / "run")
