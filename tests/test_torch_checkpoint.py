"""PyTorch checkpoints: the public implementation's own (golden), the twin's, and many that must be refused."""

import copy
import functools
import json
import os
import pathlib
import pickle
import pickletools
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
from etils import epath
from flax import traverse_util
from test_models import FAMILY, output, quick_jit, random_inputs, tiny_config, twin_output
from tiny_run import export_file

import models
import sampling
import segments
from benchmarks.torch_twin import LEARNING_RATE, Twin, checkpoint, randomized
from models.pytorch import checkpoint as torch_checkpoint
from models.pytorch import file as torch_file
from models.pytorch import layout as torch_layout
from scripts import convert_torch
from utils import InputError

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = pathlib.Path(os.environ.get("SEQRF_GOLDEN", ROOT.parent / "shared" / "golden"))
golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden checkpoints in {GOLDEN}; SEQRF_GOLDEN may name another folder"
)
# The largest error of a velocity, images in [0, 1] being doubled at the network's input.
TOLERANCES = {"ddpmpp_positional": 2e-5, "ncsnpp_fourier": 2e-5, "ncsnpp_uncentered": 5e-5}
NAMES = tuple(TOLERANCES)


def golden_config(name, k=1):
    config = ml_collections.ConfigDict(json.loads((GOLDEN / f"{name}_config.json").read_text()))
    config.training = ml_collections.ConfigDict({"reflow_t": k})
    if name == "ncsnpp_uncentered":  # its learning rate, which only the file says
        config.optim = ml_collections.ConfigDict({"lr": 1e-3})
    return config


def golden_arrays(name):
    """What the public implementation computed; images in our layout."""
    with np.load(GOLDEN / f"{name}_expected.npz") as arrays:
        return {key: array.transpose(0, 2, 3, 1) if array.ndim == 4 else array for key, array in arrays.items()}


def opened(path):
    """A golden checkpoint as the importer opens it: nothing but tensors and plain numbers, even here."""
    return torch_checkpoint._opened(epath.Path(path))


# --- against the public implementation --------------------------------------------------------------------------------


@golden
@pytest.mark.parametrize("name", NAMES)
def test_golden_velocity_with_the_models_and_the_emas_weights_in_every_segment(name):
    config, expected = golden_config(name, k=4), golden_arrays(name)
    weights = models.import_torch(GOLDEN / f"{name}.pth", config)
    apply = quick_jit(models.create_model(config).apply)
    for params, kind in ((weights.params, "velocity_model"), (weights.ema_params, "velocity_ema")):
        for segment in range(4):
            index = jnp.full(len(expected["x"]), segment)
            found = apply({"params": params}, expected["x"], 999 * expected["tau"], index)
            np.testing.assert_allclose(found, expected[kind], rtol=0, atol=TOLERANCES[name])
    assert (weights.step, weights.count) == ((3, 3) if name == "ncsnpp_uncentered" else (6005, 5))


@golden
@pytest.mark.parametrize("name", NAMES)
def test_golden_sampling_is_as_accurate_as_scipys(name):
    config, expected = golden_config(name), golden_arrays(name)
    weights = models.import_torch(GOLDEN / f"{name}.pth", config)
    velocity = models.velocity_fn(models.create_model(config), weights.ema_params)
    exact = expected["rk45_1e-06"]

    def distance(x):
        return np.sqrt(np.mean((np.asarray(x) - exact) ** 2))

    solve = functools.partial(quick_jit(sampling.solve, static_argnums=0, static_argnames=("method", "tol")), velocity)
    for tol, key in ((1e-3, "0.001"), (1e-4, "0.0001")):
        samples = solve(expected["z"], segments.uniform_boundaries(1), method="ode", tol=tol)
        assert distance(samples.x) <= 3 * distance(expected[f"rk45_{key}"]) + tol
        assert int(samples.nfe) <= 1.25 * int(expected[f"rk45_nfe_{key}"]) + 12


@golden
@pytest.mark.parametrize("name", NAMES)
def test_the_twin_is_the_public_implementation(name):
    config, expected = golden_config(name), golden_arrays(name)
    twin = Twin(config)
    state = opened(GOLDEN / f"{name}.pth")["model"]
    twin.load_state_dict({key.removeprefix("module."): tensor for key, tensor in state.items()})
    found = twin_output(twin, expected["x"], 999 * expected["tau"])
    np.testing.assert_allclose(found, expected["velocity_model"], rtol=0, atol=TOLERANCES[name])


@golden
def test_images_in_the_other_range_give_another_velocity():
    config, expected = golden_config("ncsnpp_uncentered"), golden_arrays("ncsnpp_uncentered")
    params = models.import_torch(GOLDEN / "ncsnpp_uncentered.pth", config).ema_params
    config.data.centered = True
    found = output(config, params, expected["x"], 999 * expected["tau"])
    assert np.abs(found - expected["velocity_ema"]).max() > 2.5


@golden
@pytest.mark.parametrize("name", NAMES)
def test_golden_files_survive_the_way_there_and_back(name, tmp_path):
    config = golden_config(name)
    models.export_torch(models.import_torch(GOLDEN / f"{name}.pth", config), config, tmp_path / "back.pth")
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True), opened(GOLDEN / f"{name}.pth"))


# --- against the twin -------------------------------------------------------------------------------------------------


@functools.cache
def made_once(name, updates):
    config = tiny_config(**FAMILY[name])
    config.optim.lr = LEARNING_RATE
    torch.manual_seed(0)
    twin = randomized(Twin(config))
    return config, twin, checkpoint(twin, updates=updates)


def made(name="ddpm++", updates=3):
    """(config, twin, checkpoint) of a tiny network of the family after a few updates; copies, to be spoilt."""
    return copy.deepcopy(made_once(name, updates))


def saved(contents, folder, **how):
    path = folder / "checkpoint.pth"
    torch.save(contents, path, **how)
    return path


def assert_same(found, expected, where=""):
    """Two checkpoints are equal: every tensor bit for bit, with its type, and every key in its order."""
    if isinstance(expected, dict):
        # Optimisers of other versions of torch have other settings.
        keys = [key for key in expected if "param_groups" not in where or key in found]
        assert [key for key in found if key in expected] == keys, where
        for key in keys:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


SOME = ("ddpm++", "ncsn++", "ddpm blocks, fir, residual", "pyramids, cat, fir, 3 levels", "fourier without time")


@pytest.mark.parametrize("name", SOME)
def test_weights_ema_and_moments_arrive_and_return(name, tmp_path):
    config, twin, contents = made(name)
    weights = models.import_torch(saved(contents, tmp_path), config)
    x, labels = random_inputs(config)
    expected = twin_output(twin, x, labels)
    np.testing.assert_allclose(output(config, weights.params, x, labels), expected, rtol=0, atol=2e-5)
    trainable = [weight for weight in twin.parameters() if weight.requires_grad]
    for weight, kept in zip(trainable, contents["ema"]["shadow_params"], strict=True):
        weight.data.copy_(kept)
    expected = twin_output(twin, x, labels)
    np.testing.assert_allclose(output(config, weights.ema_params, x, labels), expected, rtol=0, atol=2e-5)
    assert (weights.step, weights.count) == (10, 3)
    models.export_torch(weights, config, tmp_path / "back.pth")
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True), contents)


def test_each_moment_lands_on_its_own_weight(tmp_path):
    config, twin, contents = made("ncsn++")
    weights = models.import_torch(saved(contents, tmp_path), config)
    names = [name for name, weight in twin.named_parameters() if weight.requires_grad]
    slots = {name: contents["optimizer"]["state"][i] for i, name in enumerate(names, start=1)}
    for entry in torch_layout.entries_of(models.create_model(config)):
        for tree, key in ((weights.mu, "exp_avg"), (weights.nu, "exp_avg_sq")):
            found = traverse_util.flatten_dict(tree)[entry.path]
            expected = slots[entry.name][key].numpy() if entry.trainable else np.zeros(entry.shape)
            np.testing.assert_array_equal(entry.to_torch(found), expected)


def test_one_head_becomes_k_everywhere(tmp_path):
    config, _, contents = made()
    path = saved(contents, tmp_path)
    one = models.import_torch(path, config)
    config.training.reflow_t = 3
    three = models.import_torch(path, config)
    for name in ("params", "ema_params", "mu", "nu"):
        leaves = traverse_util.flatten_dict(getattr(three, name))
        for leaf_path, leaf in traverse_util.flatten_dict(getattr(one, name)).items():
            expected = leaf.repeat(3, axis=0) if leaf_path[-1].startswith("head_") else leaf
            np.testing.assert_array_equal(leaves[leaf_path], expected)
    with pytest.raises(InputError, match="one time-embedding head, these weights have 3"):
        models.export_torch(three, config, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_the_ways_in_which_other_trainers_save_are_taken(tmp_path):
    config, _, contents = made()
    expected = models.import_torch(saved(contents, tmp_path), config)
    plain = {name.removeprefix("module."): value for name, value in contents["model"].items()}
    for prefix in ("", "_orig_mod.", "module._orig_mod.", "module.module.", "_orig_mod.module."):
        contents["model"] = {prefix + name: value for name, value in plain.items()}
        found = models.import_torch(saved(contents, tmp_path), config)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected)), prefix
    for slot in contents["optimizer"]["state"].values():
        slot["step"] = 3
    contents["optimizer"]["param_groups"][0]["lr"] = np.float64(1e-4)
    contents["step"] = torch.tensor(10)
    contents["ema"]["shadow_params"] = [torch.nn.Parameter(t) for t in contents["ema"]["shadow_params"]]
    for zipped in (True, False):
        path = saved(contents, tmp_path, _use_new_zipfile_serialization=zipped)
        found = models.import_torch(path, config)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_saved_on_a_gpu_is_read_without_one(zipped, tmp_path, monkeypatch):
    config, _, contents = made()
    expected = models.import_torch(saved(contents, tmp_path), config)
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = saved(contents, tmp_path, _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in path.read_bytes()
    found = models.import_torch(path, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_the_optimisers_own_numbers_say_whose_moments_they_are(tmp_path):
    config, _, contents = made()
    expected = models.import_torch(saved(contents, tmp_path), config)
    state, group = contents["optimizer"]["state"], contents["optimizer"]["param_groups"][0]
    group["params"] = group["params"][::-1]
    contents["optimizer"]["state"] = {group["params"][i]: slot for i, slot in state.items()}
    found = models.import_torch(saved(contents, tmp_path), config)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.parametrize("optimizer", ["missing", None, {}, {"state": {}, "param_groups": []}], ids=str)
def test_without_optimiser_the_moments_are_zero_and_a_line_says_so(optimizer, tmp_path, caplog):
    config, _, contents = made()
    contents["optimizer"] = optimizer
    if optimizer == "missing":
        del contents["optimizer"]
    weights = models.import_torch(saved(contents, tmp_path), config)
    assert weights.count == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((weights.mu, weights.nu)))
    assert "Adam's moments start at zero" in caplog.text
    models.export_torch(weights, config, tmp_path / "back.pth")
    assert torch.load(tmp_path / "back.pth", weights_only=True)["optimizer"]["state"] == {}


def test_weights_that_were_never_in_pytorch_are_exported_too(tmp_path):
    config = tiny_config()
    config.model.ema_rate = 0.99
    params = models.init_params(models.create_model(config), jax.random.key(0), (8, 8, 3))
    zeros = jax.tree.map(jnp.zeros_like, params)
    weights = models.Weights(params=params, ema_params=params, mu=zeros, nu=zeros, count=7, step=5)
    models.export_torch(weights, config, tmp_path / "out.pth")
    contents = torch.load(tmp_path / "out.pth", weights_only=True)
    twin = Twin(config)
    twin.load_state_dict({name.removeprefix("module."): value for name, value in contents["model"].items()})
    torch.optim.Adam(twin.parameters()).load_state_dict(contents["optimizer"])
    assert contents["ema"]["decay"] == 0.99
    assert contents["ema"]["num_updates"] == contents["step"] == 5
    assert contents["optimizer"]["state"][0]["step"] == 7
    with pytest.raises(InputError, match="not of the configuration's network"):
        models.export_torch(weights, tiny_config(nf=16), tmp_path / "other.pth")


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(contents, config, folder):
    """The one line that `import_torch` says of a checkpoint with these contents."""
    return refusal_of(saved(contents, folder), config)


def refusal_of(path, config):
    with pytest.raises(InputError) as caught:
        models.import_torch(path, config)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


DENSE = "all_modules.0.weight"
DAMAGES = {
    "no model": (lambda c: c.pop("model"), "misses 'model'"),
    "no ema": (lambda c: c.pop("ema"), "misses 'ema'"),
    "no step": (lambda c: c.pop("step"), "misses 'step'"),
    "model is a list": (lambda c: c.update(model=[1]), "'model' is not a state dict"),
    "weight missing": (lambda c: c["model"].pop(f"module.{DENSE}"), f"misses model['module.{DENSE}']"),
    "sigmas missing": (lambda c: c["model"].pop("module.sigmas"), "misses model['module.sigmas']"),
    "a weight of a block missing": (
        lambda c: c["model"].pop("module.all_modules.3.Conv_1.weight"),
        "misses model['module.all_modules.3.Conv_1.weight']",
    ),
    "a weight too many": (
        lambda c: c["model"].update({"module.extra": torch.zeros(1)}),
        "has model['module.extra'], which this configuration has not",
    ),
    "wrong shape": (
        lambda c: c["model"].update({f"module.{DENSE}": torch.zeros(32, 9)}),
        f"model['module.{DENSE}'] has shape (32, 9), this configuration needs (32, 8)",
    ),
    "whole numbers": (
        lambda c: c["model"].update({f"module.{DENSE}": torch.zeros(32, 8, dtype=torch.int64)}),
        f"model['module.{DENSE}'] is not a tensor of float16, float32 or float64 but of int64",
    ),
    "bfloat16": (
        lambda c: c["model"].update({f"module.{DENSE}": torch.zeros(32, 8, dtype=torch.bfloat16)}),
        f"model['module.{DENSE}'] is not a tensor of float16, float32 or float64 but of bfloat16",
    ),
    "no tensor": (
        lambda c: c["model"].update({f"module.{DENSE}": "weight"}),
        f"model['module.{DENSE}'] is not a tensor",
    ),
    "a sparse tensor": (
        lambda c: c["model"].update({f"module.{DENSE}": torch.zeros(32, 8).to_sparse()}),
        f"model['module.{DENSE}'] is not a tensor",
    ),
    "one number said to be many": (
        lambda c: c["model"].update({"module.sigmas": torch.zeros(1, dtype=torch.float64).expand(10**12)}),
        "model['module.sigmas'] claims more numbers than the file holds",
    ),
    "noise levels without end": (
        lambda c: c["model"].update({"module.sigmas": torch.zeros(100_001, dtype=torch.float64)}),
        "model['module.sigmas'] has shape (100001,): not a list of up to 100,000 noise levels",
    ),
    "a weight twice": (
        lambda c: c["model"].update({DENSE: torch.zeros(32, 8)}),
        f"has both model['module.{DENSE}'] and model['{DENSE}']",
    ),
    "a weight missing where there is no prefix": (
        lambda c: c.update(model={k.removeprefix("module."): v for k, v in c["model"].items() if DENSE not in k}),
        f"misses model['{DENSE}']",
    ),
    "a weight that is not finite": (
        lambda c: c["model"][f"module.{DENSE}"].fill_(float("nan")),
        f"model of {DENSE} has a number that is not finite",
    ),
    "a weight too large for 32 bits": (
        lambda c: c["model"].update({f"module.{DENSE}": torch.full((32, 8), 1e300, dtype=torch.float64)}),
        f"model of {DENSE} has a number that is not finite",
    ),
    "noise levels that are not finite": (
        lambda c: c["model"]["module.sigmas"].fill_(float("inf")),
        "model of sigmas has a number that is not finite",
    ),
    "an average that is not finite": (
        lambda c: c["ema"]["shadow_params"][1].fill_(float("-inf")),
        "ema of all_modules.0.bias has a number that is not finite",
    ),
    "a first moment that is not finite": (
        lambda c: c["optimizer"]["state"][1]["exp_avg"].fill_(float("nan")),
        "exp_avg of all_modules.0.bias has a number that is not finite",
    ),
    "a negative second moment": (
        lambda c: c["optimizer"]["state"][1]["exp_avg_sq"].neg_(),
        "exp_avg_sq of all_modules.0.bias has a negative number",
    ),
    "ema too short": (
        lambda c: c["ema"]["shadow_params"].pop(),
        "ema['shadow_params'] has {n} tensors, this configuration trains",
    ),
    "ema too long": (
        lambda c: c["ema"]["shadow_params"].append(torch.zeros(1)),
        "ema['shadow_params'] has {n} tensors, this configuration trains",
    ),
    "ema of a wrong shape": (
        lambda c: c["ema"]["shadow_params"].__setitem__(1, torch.zeros(3)),
        "ema['shadow_params'][1] (all_modules.0.bias) has shape (3,), this configuration needs (32,)",
    ),
    "ema without list": (lambda c: c["ema"].pop("shadow_params"), "misses ema['shadow_params']"),
    "ema without decay": (lambda c: c["ema"].pop("decay"), "ema['decay'] is not a number"),
    "ema's decay is a word": (lambda c: c["ema"].update(decay="0.999"), "ema['decay'] is not a number"),
    "ema's decay is not finite": (lambda c: c["ema"].update(decay=float("nan")), "ema['decay'] is not a number"),
    "ema's decay is too large": (lambda c: c["ema"].update(decay=10**400), "ema['decay'] is not a number"),
    "step is too large": (lambda c: c.update(step=10**400), "step is not a number"),
    "step is a word": (lambda c: c.update(step="ten"), "step is not a number"),
    "step is negative": (lambda c: c.update(step=-1), "step = -1 is not a number of updates"),
    "a moment missing": (
        lambda c: c["optimizer"]["state"][1].pop("exp_avg_sq"),
        "misses optimizer['state'][1]['exp_avg_sq'] (all_modules.0.bias)",
    ),
    "moments of a weight missing": (
        lambda c: c["optimizer"]["state"].pop(4),
        "misses optimizer['state'][4] (all_modules.2.weight)",
    ),
    "a moment of a wrong shape": (
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(2)),
        "optimizer['state'][0]['exp_avg'] (all_modules.0.weight) has shape (2,)",
    ),
    "moments of different ages": (
        lambda c: c["optimizer"]["state"][0].update(step=99),
        "optimizer['state'] has weights after 3 and after 99 updates",
    ),
    "Adam's step is too large": (
        lambda c: c["optimizer"]["state"][0].update(step=10**400),
        "optimizer['state'][0]['step'] is not a number",
    ),
    "optimizer is a tensor": (lambda c: c.update(optimizer=torch.ones(3)), "optimizer['state'] is not a dict"),
    "its state is a tensor": (
        lambda c: c["optimizer"].update(state=torch.ones(3)),
        "optimizer['state'] is not a dict",
    ),
    "its groups are tensors": (
        lambda c: c["optimizer"].update(param_groups=[torch.ones(3)]),
        "misses optimizer['param_groups']",
    ),
    "its numbers are lists": (
        lambda c: c["optimizer"]["param_groups"][0].update(params=[[0]] * 9),
        "optimizer['param_groups'] does not number every weight once",
    ),
    "its numbers repeat": (
        lambda c: c["optimizer"]["param_groups"][0]["params"].__setitem__(1, 0),
        "optimizer['param_groups'] does not number every weight once",
    ),
    "a nested tensor": (
        lambda c: c["model"].update({f"module.{DENSE}": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}),
        "holds something that no training run saves (RuntimeError while reading it)",
    ),
    "a tensor to be negated": (
        lambda c: c["model"].update({f"module.{DENSE}": torch._neg_view(torch.ones(32, 8))}),
        "holds something that no training run saves (RuntimeError while reading it)",
    ),
    "an optimiser of something else": (
        lambda c: (c["optimizer"]["param_groups"][0]["params"].pop(), c["optimizer"]["state"].pop(0)),
        "optimizer has",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_first_thing_wrong_is_named(name, tmp_path):
    config, _, contents = made()
    damage, expected = DAMAGES[name]
    damage(contents)
    n = len(contents["ema"]["shadow_params"]) if "ema too" in name else 0
    assert expected.format(n=n) in refusal(contents, config, tmp_path)


class Malice:
    """Unpickled without care, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(zipped, tmp_path):
    config, _, contents = made(updates=1)
    contents["model"]["module.sigmas"] = Malice(tmp_path / "harm")
    path = saved(contents, tmp_path, _use_new_zipfile_serialization=zipped)
    assert "carries code ('posix.system'), which is never run" in refusal_of(path, config)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_memory_that_a_checkpoint_asks_for_is_refused(zipped, tmp_path):
    class Large:
        def __reduce__(self):
            return bytearray, (8 << 30,)

    path = tmp_path / "large.pth"
    torch.save({"model": {}, "note": Large()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"carries code \('builtins.bytearray'\), which is never run"):
        torch_file.load(epath.Path(path))


@pytest.mark.parametrize("value", [np.array([object()])[0], np.str_("x"), np.datetime64("2020-01-01"), np.zeros(3)])
def test_of_numpy_only_plain_numbers_are_taken(value, tmp_path):
    config, _, contents = made(updates=1)
    contents["note"] = value
    assert "carries code" in (line := refusal(contents, config, tmp_path)) or "not a checkpoint" in line


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    config, _, contents = made(updates=1)
    assert "there is no such file" in refusal_of(tmp_path / "nothing.pth", config)
    assert "there is no such file" in refusal_of(tmp_path, config)
    for name, content in (("empty", b""), ("text", b"hello\n" * 99), ("pickle", pickle.dumps({"model": 1}))):
        path = tmp_path / name
        path.write_bytes(content)
        assert "not a checkpoint that torch.save wrote" in refusal_of(path, config)
    assert "holds a Tensor, not the dict of a training run" in refusal(torch.zeros(3), config, tmp_path)
    whole = saved(contents, tmp_path).read_bytes()
    for share in (0.1, 0.5, 0.99):
        path = tmp_path / "part.pth"
        path.write_bytes(whole[: int(share * len(whole))])
        assert "truncated" in refusal_of(path, config)
    legacy = saved(contents, tmp_path, _use_new_zipfile_serialization=False).read_bytes()
    (tmp_path / "part.pth").write_bytes(legacy[: len(legacy) // 2])
    assert "truncated" in refusal_of(tmp_path / "part.pth", config)


def test_an_archive_that_grows_when_read_is_refused(tmp_path):
    config, _, contents = made(updates=1)
    path, bomb = saved(contents, tmp_path), tmp_path / "bomb.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    assert "is a damaged archive: it is compressed" in refusal_of(bomb, config)


def test_an_archive_of_a_version_yet_to_come_is_refused(tmp_path):
    config, _, contents = made(updates=1)
    path = saved(contents, tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"PK\x01\x02") + 6] = 99  # of the directory's first entry: "version needed to extract"
    path.write_bytes(damaged)
    assert "is a damaged archive" in refusal_of(path, config)


def test_numbers_that_an_old_file_claims_and_never_lists_are_refused(tmp_path):
    config, _, contents = made(updates=1)
    for slot in contents["optimizer"]["state"].values():
        slot["step"] = 1
    path = saved(contents, tmp_path, _use_new_zipfile_serialization=False)
    with path.open("rb") as stream:
        for _ in range(4):  # magic number, version, machine, contents; then the list of what follows
            list(pickletools.genops(stream))
        head = path.read_bytes()[: stream.tell()]
    path.write_bytes(head + pickle.dumps([], protocol=2))
    assert "claims more numbers than the file holds" in refusal_of(path, config)


def test_one_flipped_bit_of_a_weight_is_refused(tmp_path):
    config, _, contents = made(updates=0)
    path = saved(contents, tmp_path)
    with zipfile.ZipFile(path) as archive:
        member = max((m for m in archive.infolist() if "/data/" in m.filename), key=lambda m: m.file_size)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(zipfile.ZipFile(path).read(member))] ^= 1  # the least of a float's bits
    path.write_bytes(damaged)
    assert "is a damaged archive: the checksum of" in refusal_of(path, config)


# Options of the configuration that are not the file's, and what the first difference says.
OTHERS = {
    "nf": ({"nf": 16}, "has shape (32, 8), this configuration needs (64, 16)"),
    "ch_mult": ({"ch_mult": (1, 2, 2)}, "this configuration"),
    "num_res_blocks": ({"num_res_blocks": 2}, "this configuration needs"),
    "embedding_type": ({"embedding_type": "fourier"}, "this configuration needs"),
    "conditional": ({"conditional": False}, "this configuration needs"),
    "attn_resolutions": ({"attn_resolutions": (8, 4)}, "this configuration needs"),
    "progressive": ({"progressive": "residual"}, "this configuration needs"),
    "num_channels": ({"num_channels": 1}, "this configuration needs"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_configuration_is_refused_by_what_differs_first(name, tmp_path):
    _, _, contents = made(updates=0)
    options, expected = OTHERS[name]
    assert expected in refusal(contents, tiny_config(**options), tmp_path)


def test_noise_levels_matter_where_the_network_uses_them(tmp_path, caplog):
    config, _, contents = made("positional, by sigma", updates=0)
    config.model.sigma_max = 30.0
    assert "1000 noise levels from 20 to 0.5" in refusal(contents, config, tmp_path)
    config, _, contents = made("ncsn++", updates=0)
    assert config.model.scale_by_sigma
    models.import_torch(saved(contents, tmp_path), config)
    assert "noise levels" not in caplog.text
    config.model.sigma_max = 30.0
    assert models.import_torch(saved(contents, tmp_path), config).extras["sigmas"][0] == pytest.approx(50)
    assert "1000 noise levels from 50 to 0.01, config.model.sigma_max and sigma_min mean 1000 from 30" in caplog.text


# --- scripts, and what needs no torch ---------------------------------------------------------------------------------


CONFIG = """
from test_models import tiny_config
def get_config():
    config = tiny_config()
    config.optim.lr = 1e-4
    return config
"""


def convert(*arguments):
    return convert_torch.main([str(argument) for argument in arguments])


def test_scripts_convert_there_and_back(tmp_path, capsys):
    _, _, contents = made()
    config_file = tmp_path / "config.py"
    config_file.write_text(CONFIG)
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    assert convert(saved(contents, tmp_path), ours, "--config", config_file) == 0
    assert convert(ours, back, "--config", config_file) == 0
    assert "step 10, Adam after 3 updates" in capsys.readouterr().out
    found = torch.load(back, weights_only=True)
    assert_same(found, contents)


def test_scripts_end_in_one_line(tmp_path, capsys):
    config_file = tmp_path / "config.py"
    config_file.write_text(CONFIG)
    out = tmp_path / "out"
    assert convert(tmp_path / "none.pth", out, "--config", config_file) == 2
    assert convert(tmp_path / "none.pth", out, "--config", tmp_path / "none.py") == 2
    assert convert(tmp_path / "no", tmp_path / "out.pth", "--config", config_file) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)
    assert not out.exists()


@pytest.mark.parametrize(
    ("k", "options", "expected"),
    [
        (2, {}, "a PyTorch checkpoint has one time-embedding head, these weights have 2"),
        (
            1,
            {"nf": 16},
            "holds a network with model.nf = 16, the configuration has 8; choose another checkpoint or the",
        ),
    ],
)
def test_what_the_script_cannot_export_is_said_in_its_own_terms(k, options, expected, tmp_path, monkeypatch, capsys):
    config_file, ours, out = tmp_path / "config.py", tmp_path / "ours.safetensors", tmp_path / "out.pth"
    config_file.write_text(CONFIG)
    config = tiny_config(k=k, **options)
    leaves = {
        path: np.zeros(shape, np.float32) for path, shape in models.weight_shapes(models.create_model(config)).items()
    }
    tree = traverse_util.unflatten_dict(leaves)
    export_file(ours, models.Weights(tree, tree, tree, tree, count=0, step=0), config)
    assert convert(ours, out, "--config", config_file) == 2
    line = capsys.readouterr().err
    assert expected in line
    assert "--config." not in line
    assert not out.exists()


WITHOUT_TORCH = """
import json, sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent)
import run_lib
import models
from checkpointing.checkpoint import checkpoint_at
import ml_collections
config = ml_collections.ConfigDict(json.loads(sys.argv[2]))
weights = checkpoint_at(sys.argv[1]).load(models.create_model(config))
assert (weights.step, weights.count) == (10, 3)
"""


def test_a_converted_checkpoint_needs_no_torch(tmp_path):
    config, _, contents = made()
    config_file, ours = tmp_path / "config.py", tmp_path / "ours.safetensors"
    config_file.write_text(CONFIG)
    assert convert(saved(contents, tmp_path), ours, "--config", config_file) == 0
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(ours), config.to_json()], cwd=ROOT, check=True)
