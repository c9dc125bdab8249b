import contextlib
import errno
import json
import pathlib
import resource
import shutil
import types

import jax
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from pair_maker import mount_bucket
from safetensors.numpy import load_file, save_file
from tiny_run import export_file, load_weights, network_config, random_weights, restore

import models
import run_lib
import train_step
import utils
from checkpointing import runs
from checkpointing.checkpoint import checkpoint_at
from checkpointing.metadata import make_metadata
from models.weights import fingerprint
from utils import InputError


@pytest.fixture(scope="module")
def weights():
    return random_weights(network_config(), count=7, step=30)


def state_of(weights, step):
    transformation = train_step.optimizer(lr=1e-3, beta1=0.9, eps=1e-8, warmup=5, grad_clip=1.0)
    return train_step.initial_state(weights, transformation, step=step)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def metadata(config, stage="1_rf"):
    return make_metadata(models.create_model(config), stage, np.linspace(1, 0, config.training.reflow_t + 1))


def saved(folder, config, weights, *steps, keep=True):
    kept = runs.RunCheckpoints(folder)
    for step in steps:
        kept.save(state_of(weights, step), metadata(config), keep=keep)
    kept.close()


def test_a_kill_while_a_snapshot_is_removed_leaves_no_half_of_one(tmp_path, weights, monkeypatch):
    def killed(folder, **_):
        if folder.exists():
            next(path for path in pathlib.Path(folder).rglob("*") if path.is_file()).unlink()
            raise KeyboardInterrupt

    stage, config, rmtree = tmp_path / "1_rf", network_config(), shutil.rmtree
    kept = runs.RunCheckpoints(stage, keep_snapshots=1)
    monkeypatch.setattr(runs.shutil, "rmtree", killed)
    for step in (1, 2):
        kept.save(state_of(weights, step), metadata(config), keep=True)
    with pytest.raises(KeyboardInterrupt):
        kept.wait()
    for step in runs.steps_in(stage):
        assert restore(stage / "checkpoints" / str(step))[0].step == step
    monkeypatch.setattr(runs.shutil, "rmtree", rmtree)
    again = runs.RunCheckpoints(stage, keep_snapshots=1)
    again.save(state_of(weights, 4), metadata(config), keep=True)
    again.close()
    assert [path.name for path in (stage / "checkpoints").iterdir()] == ["4"]


@pytest.mark.parametrize("name", ["run[1]", "a*", "a\\b"])
def test_a_folder_that_reads_as_a_pattern_is_refused_before_any_work(name, tmp_path):
    with pytest.raises(InputError, match="rename the folder"):
        run_lib.train(network_config(), tmp_path / name)
    with pytest.raises(InputError, match="rename the folder"):
        run_lib.evaluate(network_config(), tmp_path / "run", name)
    assert not list(tmp_path.iterdir())


def test_the_home_folder_is_known_in_every_path(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export_file(tmp_path / "tiny.safetensors", weights, network_config())
    assert checkpoint_at("~/tiny.safetensors").path == epath.Path(tmp_path) / "tiny.safetensors"
    assert utils.user_path("~/run") == epath.Path(tmp_path) / "run"


def test_a_state_comes_back_bit_for_bit_and_the_latest_counts(tmp_path, weights):
    config = network_config()
    saved(tmp_path / "1_rf", config, weights, 0, 10)
    saved(tmp_path / "1_rf", config, weights, 5, 15, keep=False)
    assert runs.steps_in(tmp_path / "1_rf") == [0, 10]
    kept = runs.RunCheckpoints(tmp_path / "1_rf")
    like = jax.eval_shape(lambda: state_of(weights, 0))
    state = kept.resume(like, metadata(config))
    kept.close()
    same(state, state_of(weights, 15))
    assert not (tmp_path / "1_rf" / "checkpoints-meta" / "5").exists()


def test_another_network_is_not_resumed(tmp_path, weights):
    saved(tmp_path / "1_rf", network_config(), weights, 0)
    kept = runs.RunCheckpoints(tmp_path / "1_rf")
    other = network_config()
    other.model.nf = 8
    with pytest.raises(InputError, match="another --workdir"):
        kept.resume(jax.eval_shape(lambda: state_of(weights, 0)), metadata(other))
    kept.close()


@pytest.mark.parametrize("place", ["", "1_rf", "1_rf/checkpoints", "1_rf/checkpoints/10"])
def test_weights_load_from_any_folder_of_a_run_with_their_head_copied(tmp_path, weights, place):
    saved(tmp_path / "1_rf", network_config(), weights, 0, 10)
    loaded = load_weights(tmp_path / place, network_config(k=3))
    assert loaded.step == 10
    same(loaded.ema_params, models.expand_heads(weights.ema_params, 3))
    same(loaded.nu, models.expand_heads(weights.nu, 3))


def test_an_exported_file_comes_back_bit_for_bit(tmp_path, weights):
    path = tmp_path / "exported.safetensors"
    export_file(path, weights, network_config())
    (tmp_path / "another").touch()
    assert path.stat().st_mode == (tmp_path / "another").stat().st_mode
    loaded = load_weights(path, network_config())
    same(loaded.params, weights.params)
    same(loaded.mu, weights.mu)
    assert (loaded.step, loaded.count) == (30, 7)


def test_what_is_no_checkpoint_of_this_network_is_named(tmp_path, weights):
    config = network_config()
    with pytest.raises(InputError, match="no checkpoint at"):
        load_weights(tmp_path / "nowhere", config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_weights(tmp_path / "empty", config)
    path = tmp_path / "exported.safetensors"
    export_file(path, weights, config)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a file that SeqRF exported"):
        load_weights(path, config)
    path.write_bytes(whole)
    other = network_config()
    other.model.fir = True
    with pytest.raises(InputError, match=r"model\.fir = False"):
        load_weights(path, other)


def test_a_damaged_checkpoint_folder_is_named(tmp_path, weights):
    config = network_config()
    saved(tmp_path / "1_rf", config, weights, 10)
    folder = tmp_path / "1_rf" / "checkpoints" / "10"
    (folder / "state" / "manifest.ocdbt").write_bytes(b"broken")
    with pytest.raises(InputError, match="incomplete or corrupt checkpoint"):
        load_weights(folder, config)


def test_a_checkpoint_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    def unreachable(path):
        raise OSError(errno.EREMOTEIO, "Could not resolve host")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "exists", unreachable)
    with pytest.raises(InputError, match="run cannot be read: Could not resolve host"):
        load_weights(tmp_path / "run", network_config())


def test_a_workdir_of_several_stages_asks_which(tmp_path, weights):
    saved(tmp_path / "1_rf", network_config(), weights, 10)
    saved(tmp_path / "2_rf", network_config(), weights, 10)
    with pytest.raises(InputError, match="several stages"):
        load_weights(tmp_path, network_config())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of asyncio
def test_a_save_that_fails_is_one_line_and_leaves_earlier_checkpoints(tmp_path, weights):
    kept = runs.RunCheckpoints(tmp_path / "1_rf")
    kept.save(state_of(weights, 10), metadata(network_config()), keep=True)
    kept.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # longer files fail as on a full disk
    try:
        kept.save(state_of(weights, 20), metadata(network_config()), keep=True)
        with pytest.raises(InputError, match="1_rf: File too large; those before it are complete"):
            kept.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with contextlib.suppress(InputError):
        kept.close()
    assert runs.steps_in(tmp_path / "1_rf") == [10]
    same(load_weights(tmp_path / "1_rf", network_config()).params, weights.params)


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path, weights, monkeypatch):
    kept = runs.RunCheckpoints(tmp_path / "1_rf")
    state = state_of(weights, 0)
    stored = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))  # weights, EMA, two moments, counts
    for free in (stored, stored - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        refused = pytest.raises(InputError, match=f"{free:,} bytes free, a checkpoint needs {stored:,}")
        with refused if free < stored else contextlib.nullcontext():
            kept.check_room(jax.eval_shape(lambda: state))
    kept.close()


UNEVEN = [1.0, 0.7, 0.0]


def learned(folder, weights, **more):
    """A stage's folder with one checkpoint of two uneven segments."""
    noted = make_metadata(models.create_model(network_config(k=2)), "2_rf", UNEVEN, source="runs/a", teacher="0f")
    kept = runs.RunCheckpoints(folder)
    kept.save(state_of(expanded(weights, 2), 10), {**noted, **more}, keep=True)
    kept.close()


def expanded(weights, k):
    trees = {name: models.expand_heads(getattr(weights, name), k) for name in ("params", "ema_params", "mu", "nu")}
    return weights.replace(**trees)


@pytest.mark.parametrize("place", ["", "2_rf", "2_rf/checkpoints", "2_rf/checkpoints/10"])
def test_what_was_noted_is_read_without_the_weights(tmp_path, weights, place):
    learned(tmp_path / "2_rf", weights)
    (tmp_path / "2_rf" / "checkpoints" / "10" / "state" / "manifest.ocdbt").write_bytes(b"broken")
    noted = checkpoint_at(tmp_path / place).metadata
    assert (noted["stage"], noted["k"], noted["boundaries"]) == ("2_rf", 2, UNEVEN)
    assert (noted["source"], noted["teacher"]) == ("runs/a", "0f")


def test_an_exported_file_keeps_uneven_boundaries(tmp_path, weights):
    path = tmp_path / "exported.safetensors"
    export_file(path, expanded(weights, 2), network_config(k=2), UNEVEN, teacher="0f")
    assert checkpoint_at(path).metadata["boundaries"] == UNEVEN
    assert checkpoint_at(path).metadata["teacher"] == "0f"
    export_file(path, expanded(weights, 2), network_config(k=2))
    assert checkpoint_at(path).metadata["boundaries"] == [1.0, 0.5, 0.0]
    assert checkpoint_at(path).metadata["teacher"] is None


def without(description, *path):
    *sections, key = path
    for section in sections:
        description = description[section]
    del description[key]


def rewritten(path, change):
    """The exported file `path` with its description changed by change(description)."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    description = json.loads(header["__metadata__"]["seqrf"])
    change(description)
    save_file(load_file(path), path, {"seqrf": json.dumps(description)})


def test_metadata_without_an_entry_is_corrupt(tmp_path, weights):
    path, config = tmp_path / "exported.safetensors", network_config()
    export_file(path, weights, config)
    rewritten(path, lambda d: d["model"].update(nf="many"))
    with pytest.raises(InputError, match=r"exported .*: config\.model\.nf = 'many'"):
        load_weights(path, config)
    rewritten(path, lambda d: without(d, "model"))
    with pytest.raises(InputError, match=r"exported .*: its metadata has model = None"):
        load_weights(path, config)
    rewritten(path, lambda d: d.update(model={}, k=3))
    with pytest.raises(InputError, match="k = 3 and 2 boundaries"):
        checkpoint_at(path)


def test_metadata_written_before_the_options_were_normalised_names_the_same_network(tmp_path, weights):
    path, config = tmp_path / "exported.safetensors", network_config()
    export_file(path, weights, config)
    raw = {"fir_kernel": [1, 3, 3, 1], "fourier_scale": 16, "sigma_min": None, "nonlinearity": "Swish"}
    rewritten(path, lambda d: d["model"].update(raw))
    same(load_weights(path, config).params, weights.params)


def test_noise_levels_matter_where_the_network_uses_them(tmp_path, weights):
    path, config = tmp_path / "exported.safetensors", network_config()
    other = network_config()
    other.model.sigma_max = 30.0
    export_file(path, weights, config)
    load_weights(path, other)
    config.model.scale_by_sigma = other.model.scale_by_sigma = True
    export_file(path, weights, config)
    load_weights(path, config)
    with pytest.raises(InputError, match=r"model\.sigma_max = 50\.0, the configuration has 30\.0"):
        load_weights(path, other)


def spoilt(weights, change):
    """`weights` with change(leaves of one of its trees by path) made to the moments."""
    leaves = traverse_util.flatten_dict(weights.mu)
    change(leaves)
    return weights.replace(mu=traverse_util.unflatten_dict(leaves))


HEAD = ("all_modules_0", "head_bias")
CHANGES = {
    "missing": (lambda leaves: leaves.pop(HEAD), r"mu/all_modules_0/head_bias has shape none: it is missing"),
    "extra": (
        lambda leaves: leaves.update({("more",): np.zeros(3)}),
        r"mu/more has shape \(3,\), the network's is none",
    ),
    "heads": (
        lambda leaves: leaves.update({HEAD: np.zeros((3, 16))}),
        r"mu/all_modules_0/head_bias has shape \(3, 16\), the network's is \(1, 16\)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_weights_that_are_not_the_networks_are_named(tmp_path, weights, kind, name):
    change, expected = CHANGES[name]
    path = tmp_path / kind
    if kind == "file":
        export_file(path, spoilt(weights, change), network_config())
    else:
        saved(path, network_config(), spoilt(weights, change), 10)
    with pytest.raises(InputError, match=expected):
        load_weights(path, network_config(k=2))


def test_other_heads_are_named(tmp_path, weights):
    learned(tmp_path, weights)
    with pytest.raises(InputError, match=r"2 time-embedding heads, this run has k = 3; set training\.reflow_t to 2"):
        load_weights(tmp_path, network_config(k=3))


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    for content in (b"", b"PK\x03\x04 and more than eight", (2).to_bytes(8, "little") + b"{}"):
        path = tmp_path / "file"
        path.write_bytes(content)
        for read in (checkpoint_at, restore):
            with pytest.raises(InputError, match="not a file that SeqRF exported"):
                read(path)


def test_remote_files_are_written_and_read(tmp_path, weights, monkeypatch):
    mount_bucket(monkeypatch, tmp_path)
    path = epath.Path("gs://bucket/exported.safetensors")
    export_file(path, weights, network_config())
    export_file(tmp_path / "local", weights, network_config())
    loaded = load_weights(path, network_config())
    same((loaded.params, loaded.nu), (weights.params, weights.nu))
    assert load_weights(tmp_path / "local", network_config()).step == loaded.step == 30
    assert {entry.name for entry in tmp_path.iterdir()} == {"exported.safetensors", "local"}


def test_a_bucket_is_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        runs.ocp, "CheckpointManager", lambda directory, options: types.SimpleNamespace(directory=directory)
    )
    for path in ("gs://bucket/run", epath.Path("gs://bucket/run")):
        assert str(runs._manager(path, max_to_keep=1).directory) == "gs://bucket/run"
    assert str(runs._manager("run", max_to_keep=1).directory) == str(tmp_path / "run")


def test_a_snapshot_in_a_bucket_counts_when_it_is_complete(tmp_path, monkeypatch):
    mount_bucket(monkeypatch, tmp_path)
    for step in (10, 20):
        (tmp_path / "1_rf" / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "1_rf" / "checkpoints" / "10" / "commit_success.txt").touch()
    assert runs.steps_in("gs://bucket/1_rf") == [10]
    assert runs.steps_in("gs://bucket/2_rf") == []


def test_a_bucket_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    def refused(directory, options):
        raise type("Forbidden", (Exception,), {"__module__": "google.api_core.exceptions"})("403 GET: no access")

    monkeypatch.setattr(runs.ocp, "CheckpointManager", refused)
    with pytest.raises(InputError, match=r"opened in .*1_rf: 403 GET: no access; give this machine credentials"):
        runs.RunCheckpoints(tmp_path / "1_rf")


def test_tensorstore_gives_a_bucket_up():
    spec = runs.ts_utils.get_ts_context(use_ocdbt=True).spec.to_json()
    assert spec["gcs_request_retries"] == {"max_retries": 4}


def test_fingerprint_tells_weights_apart():
    params = {"a": jax.numpy.ones((2, 3)), "b": {"c": jax.numpy.zeros(4)}}
    same = {"b": {"c": np.zeros(4, np.float32)}, "a": np.ones((2, 3), np.float32)}
    assert fingerprint(params) == fingerprint(same)
    for other in ({"a": params["a"]}, params | {"a": params["a"].at[1, 2].set(1.001)}, params | {"a": params["a"].T}):
        assert fingerprint(other) != fingerprint(params)
