import json
import os
import pathlib
import socket
import subprocess
import sys
import unittest.mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xla
from tiny_run import tiny_config

import distributed
import losses
import models
import run_lib
import sampler
import train_step
from distributed import Host
from models import layers
from utils import InputError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_hosts_share_a_batch_and_items():
    hosts = [Host(index, 3, 2) for index in range(3)]
    assert [host.share(12) for host in hosts] == [4, 4, 4]
    assert [list(host.items(range(7))) for host in hosts] == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize("batch_size", [0, -6, 5, 9])
def test_a_batch_that_devices_cannot_share_is_refused(batch_size):
    with pytest.raises(InputError, match=f"batch_size = {batch_size} cannot be shared by 6 devices"):
        Host(0, 3, 2).share(batch_size)


DRAW = "import distributed, jax; print(jax.random.normal(distributed.random_key(3), (4, 2)).tolist())"


def test_random_numbers_are_the_same_whatever_jaxs_environment_says():
    settings = {"JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg", "JAX_THREEFRY_PARTITIONABLE": "0"}
    command, environment = [sys.executable, "-c", DRAW], os.environ | settings
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    ours = jax.random.normal(distributed.random_key(3), (4, 2))
    np.testing.assert_array_equal(np.float32(json.loads(done.stdout)), ours)


def test_float64_is_refused(tmp_path):
    with jax.enable_x64(True):
        with pytest.raises(InputError, match="JAX_ENABLE_X64 is set"):
            run_lib.train(tiny_config(), tmp_path)
        with pytest.raises(InputError, match="JAX_ENABLE_X64 is set"):
            sampler.load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_device_computes_its_part_and_knows_the_mean_over_all():
    devices = jax.local_device_count()
    assert devices > 1, "conftest.py makes two devices"

    def part(weight, rows):
        return weight * rows.sum(), distributed.device_index(), distributed.mean_over_devices({"mean": rows.mean()})

    rows = np.arange(devices * 3, dtype=np.float32).reshape(devices, 3)
    total, index, mean = distributed.map_devices(part)(distributed.replicate(jnp.float32(2)), rows)
    np.testing.assert_allclose(total, 2 * rows.sum(1))
    np.testing.assert_array_equal(index, np.arange(devices))
    np.testing.assert_allclose(mean["mean"], rows.mean())


def test_a_replicated_tree_comes_back_as_it_was():
    tree = {"a": np.arange(3.0, dtype=np.float32), "b": (np.int32(4),)}
    jax.tree.map(np.testing.assert_array_equal, distributed.first_copy(distributed.replicate(tree)), tree)


def test_a_program_that_is_given_its_own_results_is_compiled_once(caplog):
    program = distributed.map_devices(lambda state, rows: state + rows.sum())
    state = distributed.replicate(np.float32(2))
    batches = distributed.prefetch(iter([np.ones((jax.local_device_count(), 3), np.float32)] * 3))
    with jax.log_compiles():
        for rows in batches:
            state = program(state, rows)
    np.testing.assert_array_equal(state, 2 + 3 * 3)
    assert sum("Finished XLA compilation" in record.getMessage() for record in caplog.records) == 1


def test_one_process_gathers_its_own_rows_as_they_are():
    rows = {"features": np.arange(6.0, dtype=np.float32).reshape(3, 2), "index": np.arange(3)}
    jax.tree.map(np.testing.assert_array_equal, distributed.gather(rows), rows)
    distributed.sync("alone")


def test_prefetched_batches_come_in_their_order():
    devices = jax.local_device_count()
    batches = [{"x": np.full((devices, 2), number, np.float32)} for number in range(5)]
    for wanted, found in zip(batches, distributed.prefetch(iter(batches)), strict=True):
        np.testing.assert_array_equal(found["x"], wanted["x"])


def test_the_host_runs_ahead_of_the_devices_by_at_most_two_calls(monkeypatch):
    finished = []
    monkeypatch.setattr(jax, "block_until_ready", finished.append)
    run_ahead = distributed.RunAhead()
    unfinished = []
    for call in range(5):
        run_ahead.add(call)  # dispatched before it is added
        unfinished.append(call + 1 - len(finished))
    assert finished == [0, 1, 2, 3]  # in the order of dispatch
    assert max(unfinished) + 1 <= distributed.MAX_IN_FLIGHT  # with the next call, before it is added


STOPS = """
import os, signal, time
import runtime
runtime.set_environment()
with runtime.preemption.handled():
    import jax
    import distributed
    distributed.start_hosts()
    any_host = distributed.AnyHost()
    for call in range(1, 1000):
        if jax.process_index() == 1 and call == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            while not runtime.preemption.requested:
                time.sleep(0.01)
        if any_host(runtime.preemption.requested is not None):
            print("stopped at", call, runtime.preemption.stopped("now").agreed, flush=True)
            break
"""


@pytest.mark.parametrize(
    ("error", "reason"), [(AssertionError(), "installed without its support"), (RuntimeError("no\nTPU"), "no;")]
)
def test_devices_that_are_not_there_are_named(monkeypatch, error, reason):
    monkeypatch.setattr(jax, "devices", unittest.mock.Mock(side_effect=error))
    with pytest.raises(InputError, match=rf"^JAX_PLATFORMS=cpu: .*{reason}.* unset it, or install what it needs"):
        distributed.check_devices()


def test_an_accelerator_that_is_there_and_not_used_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "ACCELERATORS", {"cuda": (str(tmp_path / "nvidia0"),)})
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert distributed.unused_accelerator() is None
    (tmp_path / "nvidia0").touch()
    assert "(cuda) that JAX does not use; bash scripts/requirements.sh cuda" in distributed.unused_accelerator()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert distributed.unused_accelerator() is None
    assert distributed.description() == "2 x cpu"


def test_all_hosts_stop_at_the_same_call_where_one_is_signalled():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", STOPS],
            cwd=ROOT,
            env=hosts | {"JAX_PROCESS_ID": str(place)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in (0, 1)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [out.splitlines()[-1:] for out, _ in said] == [["stopped at 6 True"]] * 2, said


def shared_updates(path, devices, *ways, hosts=1):
    """What tests/shared_updates.py finds, in so many processes with so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    named = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts), "PYTHONPATH": str(ROOT)}
    environment = os.environ | {"XLA_FLAGS": xla.flags(devices)} | named
    command = [sys.executable, pathlib.Path(__file__).with_name("shared_updates.py"), path, *ways]
    started = [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(host)}) for host in range(hosts)]
    assert [process.wait(timeout=240) for process in started] == [0] * hosts
    return np.load(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The losses and gradients of fifty updates by 1 device, by 8, by 2 processes with 2 each, and in 4 parts."""
    folder = tmp_path_factory.mktemp("shared")
    one = shared_updates(folder / "one.npz", 8, "1:1", "8:1", "1:4")
    two = shared_updates(folder / "two.npz", 2, "4:1", hosts=2)
    return {**one, **two, "gathered": two["gathered"]}


@pytest.mark.parametrize("way", ["8:1", "4:1", "1:4"], ids=["8 devices", "2 processes x 2 devices", "4 parts"])
def test_updates_are_the_same_however_the_batch_is_shared(shared, way):
    expected, found = shared["gradient 1:1"], shared[f"gradient {way}"]
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    np.testing.assert_allclose(shared[f"losses {way}"], shared["losses 1:1"], rtol=1e-3)
    assert shared["losses 1:1"][-5:].mean() < 0.9 * shared["losses 1:1"][:5].mean()  # it learns meanwhile


def test_two_processes_gather_their_rows_in_their_order(shared):
    np.testing.assert_array_equal(shared["gathered"], [[0, 7], [1, 7]])


class Mask(nn.Module):
    """Dropout's mask times a weight for every pixel, whatever the image."""

    @nn.compact
    def __call__(self, x, labels, index, train=False):
        scale = self.param("scale", nn.initializers.ones, x.shape[1:])
        return layers.Dropout(0.5)(jnp.ones_like(x)) * scale


@pytest.mark.parametrize(("devices", "accumulate"), [(2, 1), (1, 2)])
def test_every_device_and_every_part_of_a_batch_draws_its_own_dropout_masks(devices, accumulate):
    pixels = (16, 16, 1)
    params = {"scale": jnp.ones(pixels)}
    weights = models.Weights(params=params, ema_params=params, mu=params, nu=params, count=0, step=0)
    optimizer = train_step.optimizer(lr=1e-3, beta1=0.0, eps=1e-8, warmup=0, grad_clip=-1.0)
    step = train_step.make_train_step(
        Mask(),
        losses.rf_targets,
        lambda velocity, targets: jnp.sum(velocity),
        optimizer,
        ema_rate=0.9,
        variable_ema_rate=False,
        accumulate=accumulate,
    )
    own = jax.devices()[:devices]
    state = distributed.replicate(train_step.initial_state(weights, optimizer, from_ema=True), own)
    images = np.zeros((devices, 1, 2 // devices, *pixels), np.float32)
    state, _ = distributed.map_devices(step, devices=own)(state, {"image": images}, np.zeros(devices, np.uint32))
    gradient = distributed.first_copy(state).opt_state[1].mu["scale"]  # 0, 2: both masks agree; 1: they do not
    values, counts = np.unique(np.round(gradient, 5), return_counts=True)
    np.testing.assert_array_equal(values, [0, 1, 2])
    np.testing.assert_allclose(counts / gradient.size, [0.25, 0.5, 0.25], atol=0.12)
