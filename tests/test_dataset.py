"""Packed tokens: what is stored comes back; batches and masks are functions of (seed, step)."""

import numpy as np
import pytest
from toy_tokens import META, N_SPECIAL, VOCAB_SIZE, toy

from cloud_lib import dataset
from cloud_lib.dataset import PackedTokens


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("toy") / "data", 2000, labels=True)


def _equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_packed_comes_back(tmp_path):
    strings = [[1, 9, 2], [1, 8, 7, 6, 2], [1, 2]]
    offsets = np.cumsum([0, 3, 5, 2])
    labels = {"target": [0.5, 1.5, 2.5], "fold": [0, 1, -1], "row": [4, 5, 6]}
    dataset.pack(np.concatenate(strings).astype(np.uint16), offsets, tmp_path / "d", META, labels, ["x", "y", "z"])
    packed = PackedTokens.open(tmp_path / "d")
    assert [packed.item(i).tolist() for i in range(len(packed))] == strings
    assert packed.lengths.tolist() == [3, 5, 2] and packed.meta["max_length"] == 5
    assert {key: values.tolist() for key, values in packed.labels().items()} == labels | {"task": [0, 0, 0]}
    assert packed.material_id() == ["x", "y", "z"]


@pytest.mark.parametrize(("change", "message"), [
    ({"meta": {"style": "site"}}, "vocab_sha256, .* missing"),
    ({"tokens": np.array([1, 9, 2])}, "expected tokens as uint16"),
    ({"offsets": np.array([0, 2])}, "expected offsets from 0 to 3"),
    ({"offsets": np.array([0, 2, 3])}, r"1 of 2 have fewer than 2 tokens, e.g. rows \[1\]"),
    ({"tokens": np.array([1, VOCAB_SIZE, 2], np.uint16)}, "largest id 64"),
    ({"labels": {"target": [1.0], "fold": [0]}}, "row missing"),
    ({"labels": {"target": [1.0], "fold": [0], "row": [0, 1]}}, "expected 1 labels, one per string"),
    ({"material_id": ["a", "b"]}, "expected 1 material_id"),
])
def test_arrays_that_do_not_fit_are_refused(tmp_path, change, message):
    good = {"tokens": np.array([1, 9, 2], np.uint16), "offsets": np.array([0, 3]), "meta": META}
    with pytest.raises(ValueError, match=message):
        dataset.pack(**good | change, out_dir=tmp_path / "d")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("file", "message"), [
    ("tokens.npy", "expected tokens.npy and offsets.npy"), ("labels.npz", "expected labels"),
    ("meta.json", "expected JSON"), ("tokens.npy of others", "delete the folder and run make data")])
def test_damaged_files_are_noticed(tmp_path, file, message):
    toy(tmp_path / "d", 20, labels=True)
    path = tmp_path / "d" / file.split()[0]
    path.write_bytes(path.read_bytes()[:-60])
    if file.endswith("others"):
        np.save(path, np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match=message):
        PackedTokens.open(tmp_path / "d").labels()


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no meta.json; run make data"):
        PackedTokens.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="give a folder under tasks/"):
        toy(tmp_path / "d", 20).labels()


def test_strings_longer_than_the_positions_are_counted(packed):
    with pytest.raises(ValueError, match=r"\d+ of 2000 strings .* more than max_positions = 15 .* to 20"):
        packed.require_length(15)
    packed.require_length(20)


def test_split_keeps_equal_strings_together(packed):
    train, val = dataset.split_rows(packed, 0.2, seed=0)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(len(packed)))
    strings = [{packed.item(i).tobytes() for i in rows} for rows in (train, val)]
    assert not strings[0] & strings[1] and len(strings[0] | strings[1]) < len(packed)
    assert 0.15 < len(val) / len(packed) < 0.25
    assert _equal(dataset.split_rows(packed, 0.2, seed=0), (train, val))
    with pytest.raises(ValueError, match="expected training and validation rows, found 2000 and 0"):
        dataset.split_rows(packed, 0.0, seed=0)


def test_every_row_comes_once_per_epoch():
    rows = np.arange(100, 107)
    stream = np.concatenate([dataset.step_rows(rows, 3, seed=5, step=step) for step in range(7)])
    epochs = stream.reshape(3, 7)
    assert all(np.array_equal(np.sort(epoch), rows) for epoch in epochs) and len({*map(tuple, epochs)}) == 3
    assert np.array_equal(dataset.step_rows(rows, 3, seed=5, step=4), stream[12:15])


def test_masks_are_bert_s_and_depend_on_seed_and_step_alone(packed):
    batch = dataset.make_batch(packed, np.arange(len(packed)))
    masked = dataset.mask_batch(batch, packed.meta, 0.15, (3, 7))
    assert _equal(masked, dataset.mask_batch(batch, packed.meta, 0.15, (3, 7)))
    assert not np.array_equal(masked.masked, dataset.mask_batch(batch, packed.meta, 0.15, (3, 8)).masked)
    ordinary = (batch.input_ids >= N_SPECIAL).sum()
    new, old = masked.input_ids[masked.masked], masked.labels
    assert np.array_equal(old, batch.input_ids[masked.masked]) and old.min() >= N_SPECIAL
    assert len(old) / ordinary == pytest.approx(0.15, abs=0.01)
    assert (new == META["mask_id"]).mean() == pytest.approx(0.80, abs=0.02)
    replaced = (new != META["mask_id"]) & (new != old)
    assert replaced.mean() == pytest.approx(0.10 * (1 - 1 / (VOCAB_SIZE - N_SPECIAL)), abs=0.015)
    assert new[replaced].min() >= N_SPECIAL and len(set(new[replaced].tolist())) > 40
    untouched = np.setdiff1d(np.arange(len(batch.input_ids)), masked.masked)
    assert np.array_equal(masked.input_ids[untouched], batch.input_ids[untouched])


@pytest.mark.parametrize("world_size", [1, 3])
def test_micro_batches_partition_the_batch(packed, world_size):
    batch = dataset.training_batch(packed, np.arange(500), 64, 0.15, seed=1, step=2)
    pieces = [piece for rank in range(world_size) for piece in dataset.micro_batches(batch, 100, rank, world_size)]
    assert all(piece.lengths.sum() <= 100 and np.all(np.diff(piece.lengths) >= 0) for piece in pieces)
    assert sorted(np.concatenate([piece.rows for piece in pieces])) == sorted(batch.rows)
    assert sum(len(piece.masked) for piece in pieces) == len(batch.masked)
    for piece in pieces:
        strings = np.split(piece.input_ids, np.cumsum(piece.lengths)[:-1])
        whole = dict(zip(batch.rows.tolist(), np.split(batch.input_ids, np.cumsum(batch.lengths)[:-1])))
        assert all(np.array_equal(string, whole[row]) for row, string in zip(piece.rows.tolist(), strings))
        original = dataset.gather(packed, piece.rows)[0]
        assert np.array_equal(original[piece.masked], piece.labels)


def test_one_string_longer_than_the_budget_still_runs(packed):
    batch = dataset.make_batch(packed, np.arange(5))
    assert [len(piece.rows) for piece in dataset.micro_batches(batch, 1)] == [1] * 5


def test_frequency_baselines_on_a_known_case(tmp_path):
    strings = [[1, 10, 20, 2]] * 3 + [[1, 10, 21, 2]]
    packed = dataset.pack(np.concatenate(strings).astype(np.uint16), np.arange(5) * 4, tmp_path / "d", META)
    batch = dataset.make_batch(packed, np.arange(4))._replace(masked=np.array([1, 2]), labels=np.array([10, 20]))
    found = dataset.frequency_baselines(packed, np.arange(4), iter([batch]))
    ordinary = VOCAB_SIZE - N_SPECIAL
    assert found["unigram"]["accuracy"] == 0.5  # the most frequent token is 10 everywhere
    assert found["unigram"]["loss"] == pytest.approx(-np.log([5 / (8 + ordinary), 4 / (8 + ordinary)]).mean())
    assert found["position"]["accuracy"] == 1.0
    smooth = np.array([4 + 5 / (8 + ordinary), 3 + 4 / (8 + ordinary)]) / 5
    assert found["position"]["loss"] == pytest.approx(-np.log(smooth).mean())
