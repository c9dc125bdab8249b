"""Readers of files that somebody else may have written: one line for what is damaged, soon, in little memory."""

import contextlib
import copy
import json
import os
import pathlib
import shutil
import signal
import struct

import damage
import jax
import numpy as np
import pytest
import torch
from etils import epath
from test_reference import DATA, network
from tiny_run import network_config, random_weights, tiny_config

import datasets
import models
import utils
from checkpointing import exported, runs
from checkpointing.checkpoint import checkpoint_at
from checkpointing.metadata import make_metadata
from configs.saved import check_resume
from configs.validation import stage_values
from metrics import feature_networks, reference
from models.pytorch import file as torch_file
from pairs.reader import PairSet
from report import page, results
from tracking.tracker import Tracker, read_history
from utils import InputError

CASES = int(os.environ.get("DAMAGED_FILES", 200))  # of each reader
MOST_MEMORY = 2**30
SECONDS = 120  # after which a case hangs


def peak_memory():
    """The most memory of this process since `bounded` began, and what it has now, in bytes, as Linux counts them."""
    lines = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return [2**10 * int(lines[name].split()[0]) for name in ("VmHWM", "VmRSS")]


@contextlib.contextmanager
def bounded(most=MOST_MEMORY):
    """Ends a case that hangs, and holds the memory that it takes against `most`."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is now
    _, before = peak_memory()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"a case takes more than {SECONDS} s"))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
    assert peak_memory()[0] - before < most


def refused(read, seeds=range(CASES)):
    """How many cases `read(random)` refuses; in one line, by InputError and nothing else."""
    lines = []
    for seed in seeds:
        with bounded():
            try:
                read(np.random.default_rng(seed))
            except InputError as error:
                lines.append(str(error))
            except Exception as error:
                raise AssertionError(f"case {seed}") from error
    assert not [line for line in lines if "\n" in line]
    return len(lines)


# --- references and caches --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), np.uint8)
    source = datasets.ArraySource("some 1.0", images)
    folder = tmp_path_factory.mktemp("statistics")
    real = reference.of_images(network(), source, 10, cache_dir=folder)
    reference.write_file(folder / "reference.npz", real)
    return folder / "reference.npz"


def test_references(statistics, tmp_path):
    arrays, whole = utils.read_arrays(statistics), statistics.read_bytes()
    record = json.loads(str(arrays["record"]))
    path = tmp_path / "damaged.npz"

    def read(random):
        kind = random.integers(4)
        if kind == 0:
            path.write_bytes(damage.content(random, whole))
        else:
            changed = (
                damage.arrays(random, arrays)
                if kind > 1
                else arrays | {"record": np.array(damage.text(random, record).decode("latin-1"))}
            )
            (np.savez if random.integers(2) else np.savez_compressed)(path, **changed)
        real = reference.read_file(path, network(), DATA)
        reference.feature_distances(real, np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32))

    assert refused(read) > CASES / 2


def test_a_small_reference_that_would_fill_the_memory(tmp_path):
    damage.write_bomb(tmp_path / "bomb.npz", "mu")
    assert (tmp_path / "bomb.npz").stat().st_size < 2**20
    with bounded(2**25), pytest.raises(InputError, match=r"bomb\.npz is damaged.*its array mu\.npy is 32 times larger"):
        reference.read_file(tmp_path / "bomb.npz", network(), DATA)


def test_caches_are_computed_again(tmp_path):
    arrays = {"a/kernel": np.arange(600.0).reshape(20, 30), "b": np.array(0.5)}
    feature_networks.cached("kept.npz", lambda: arrays, tmp_path)
    whole = (tmp_path / "kept.npz").read_bytes()

    def read(random):
        (tmp_path / "kept.npz").write_bytes(damage.content(random, whole))
        found = feature_networks.cached("kept.npz", lambda: arrays, tmp_path)
        jax.tree.map(np.testing.assert_array_equal, found, arrays)

    assert refused(read) == 0


# --- workdirs ---------------------------------------------------------------------------------------------------------


def test_manifests(whole_set, tmp_path):
    folder = shutil.copytree(whole_set, tmp_path / "pairs")
    manifest = json.loads((folder / "manifest.json").read_text())

    def read(random):
        (folder / "manifest.json").write_bytes(damage.text(random, manifest))
        with contextlib.closing(PairSet(folder, partial=bool(random.integers(2))).batches(4, 0)) as batches:
            next(batches)

    assert refused(read) > CASES / 2


def test_a_file_number_of_twenty_digits(whole_set, tmp_path):
    folder = shutil.copytree(whole_set, tmp_path / "pairs")
    shutil.copy(folder / "reflow_batch_1.npz", folder / f"reflow_batch_{'9' * 20}.npz")
    with bounded(), pytest.raises(InputError, match=r"9\.npz does not belong to this set"):
        PairSet(folder)
    (folder / "manifest.json").unlink()
    with bounded(), pytest.raises(InputError, match=r"has 6 of its 9{20} files, reflow_batch_6\.npz is missing"):
        PairSet(folder)


def test_settings_of_a_run(tmp_path):
    config = tiny_config()
    settings = json.loads(json.dumps(config.to_dict()))
    settings["training"]["n_iters"] = 6

    def read(random):
        (tmp_path / "run.json").write_bytes(damage.text(random, {"config": settings}))
        before = runs.read_settings(tmp_path)
        runs.planned_updates(tmp_path)
        stage_values(config, before)
        if before:
            check_resume(before, settings, tmp_path, lambda: False)

    assert refused(read) > CASES / 3


HISTORY = [{"step": 2 * n, "loss": 1 / (1 + n), "gradient_norm": None} for n in range(5)]


def test_numbers_of_a_run(tmp_path):
    def read(random):
        (tmp_path / "metrics.json").write_bytes(damage.text(random, HISTORY))
        any("loss" in line for line in read_history(tmp_path / "metrics.json"))
        tracker = Tracker(tmp_path, workdir=tmp_path, name="x", config={}, primary=False)
        tracker._primary = True
        tracker._open(epath.Path(tmp_path) / "metrics.json", "", 4)
        assert all(line["step"] <= 4 for line in tracker.history)

    assert refused(read) > CASES / 3


def test_numbers_of_evaluations(tmp_path):
    settings = {"num_samples": 16, "network": "digits_classifier", "sampling": {"method": "ode"}, "boundaries": [1, 0]}
    record = {"commit": "0f", "command": "main.py", "versions": {"jax": "1"}, "checkpoint": "1_rf/checkpoints/6"}
    metrics = {
        "step": 6, "model": "1-RF", "sampler": "ODE", "nfe": 14.0, "fid_digits_classifier": 0.5, "straightness": 0.1,
        "sequential_straightness": 0.1, "truncation_error": 0.1, "seconds_per_1000": 1.0, "settings": settings,
        "provenance": record,
    }  # fmt: skip
    for name in ("a", "b"):
        (tmp_path / name / "step_6").mkdir(parents=True)
        (tmp_path / name / "step_6" / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "1_rf").mkdir()
    shown = 0

    def read(random):
        nonlocal shown
        (tmp_path / "a" / "step_6" / "metrics.json").write_bytes(damage.text(random, metrics))
        (tmp_path / "1_rf" / "metrics.json").write_bytes(damage.text(random, HISTORY))
        found = results.read(tmp_path)
        shown += len(found.last)
        page._commands({}, found.last), page._floors(found), found.rows, page._claims(found)
        [page._how_measured(one) for one in found.last]
        page._stages(tmp_path)

    assert refused(read) == 0
    assert CASES < shown < 2 * CASES


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config, folder = network_config(k=2), tmp_path_factory.mktemp("model")
    described = make_metadata(models.create_model(config), "2_rf", (1, 0.7, 0), source="/home/me/1_rf", teacher="0f")
    exported.write_folder(folder, random_weights(config, count=7, step=30), described)
    return folder


def test_exported_models(model, tmp_path):
    whole = (model / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, numbers = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    described = json.loads(header["__metadata__"]["seqrf"])
    path = tmp_path / "damaged.safetensors"

    def read(random):
        kind, changed = random.integers(4), copy.deepcopy(header)
        if kind < 2:
            changed["__metadata__"]["seqrf"] = damage.text(random, described).decode("latin-1")
        elif kind == 2:
            changed = damage.value(random, header)
        text = json.dumps(changed).encode() if kind < 3 else damage.text(random, header)
        path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
        checkpoint_at(path).load()

    assert refused(read) > CASES / 2


def test_the_description_beside_an_exported_model(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())

    def read(random):
        (folder / "config.json").write_bytes(damage.text(random, described))
        exported.read_metadata(epath.Path(folder) / "model.safetensors")

    assert refused(read) > CASES / 3


def test_pytorch_files(tmp_path):
    path = epath.Path(tmp_path) / "whole.pth"
    torch.save({"model": {"a": torch.arange(300.0), "b": torch.ones(3, 4)}, "step": 3}, path)
    archive = path.read_bytes()
    torch.save({"model": {"a": torch.arange(300.0)}}, path, _use_new_zipfile_serialization=False)
    older = path.read_bytes()

    def read(random):
        path.write_bytes(damage.content(random, archive if random.integers(2) else older))
        torch_file.load(path)

    assert refused(read) > CASES / 2


# --- what is no file --------------------------------------------------------------------------------------------------


def test_pipes_are_not_read(whole_set, model, tmp_path):
    pairs = shutil.copytree(whole_set, tmp_path / "pairs")

    def refuses(path, read):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with bounded(), pytest.raises(InputError, match="is no plain file, but a pipe or a device; give a file"):
            read()
        path.unlink()

    manifest = (pairs / "manifest.json").read_bytes()
    refuses(pairs / "manifest.json", lambda: PairSet(pairs))
    (pairs / "manifest.json").write_bytes(manifest)
    refuses(pairs / "reflow_batch_2.npz", lambda: PairSet(pairs))
    refuses(tmp_path / "reference.npz", lambda: reference.read_file(tmp_path / "reference.npz", network(), DATA))
    refuses(tmp_path / "run.json", lambda: runs.read_settings(tmp_path))
    refuses(tmp_path / "metrics.json", lambda: read_history(tmp_path / "metrics.json"))
    refuses(tmp_path / "weights.pth", lambda: torch_file.load(epath.Path(tmp_path) / "weights.pth"))
    folder = pathlib.Path(shutil.copytree(model, tmp_path / "model"))
    refuses(folder / "config.json", lambda: checkpoint_at(folder))
    refuses(folder / "model.safetensors", lambda: checkpoint_at(folder))
    os.mkfifo(tmp_path / "kept.npz")
    with bounded():
        assert feature_networks.cached("kept.npz", lambda: {"a": np.zeros(2)}, tmp_path)["a"].shape == (2,)
