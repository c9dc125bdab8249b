import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel
from parallel import Host
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


def test_every_device_computes_its_part_and_knows_the_mean_over_all():
    devices = jax.local_device_count()
    assert devices > 1, "conftest.py makes two devices"

    def part(weight, rows):
        return weight * rows.sum(), parallel.device_index(), parallel.mean_over_devices({"mean": rows.mean()})

    rows = np.arange(devices * 3, dtype=np.float32).reshape(devices, 3)
    total, index, mean = parallel.map_devices(part)(parallel.replicate(jnp.float32(2)), rows)
    np.testing.assert_allclose(total, 2 * rows.sum(1))
    np.testing.assert_array_equal(index, np.arange(devices))
    np.testing.assert_allclose(mean["mean"], rows.mean())


def test_a_replicated_tree_comes_back_as_it_was():
    tree = {"a": np.arange(3.0, dtype=np.float32), "b": (np.int32(4),)}
    jax.tree.map(np.testing.assert_array_equal, parallel.first_copy(parallel.replicate(tree)), tree)


def test_one_process_gathers_its_own_rows_as_they_are():
    rows = {"features": np.arange(6.0, dtype=np.float32).reshape(3, 2), "index": np.arange(3)}
    jax.tree.map(np.testing.assert_array_equal, parallel.gather(rows), rows)
    parallel.sync("alone")


def test_prefetched_batches_come_in_their_order():
    devices = jax.local_device_count()
    batches = [{"x": np.full((devices, 2), number, np.float32)} for number in range(5)]
    for wanted, found in zip(batches, parallel.prefetch(iter(batches)), strict=True):
        np.testing.assert_array_equal(found["x"], wanted["x"])


def test_the_host_runs_ahead_of_the_devices_by_at_most_two_calls(monkeypatch):
    finished = []
    monkeypatch.setattr(jax, "block_until_ready", finished.append)
    run_ahead = parallel.RunAhead()
    unfinished = []
    for call in range(5):
        run_ahead.add(call)  # dispatched before it is added
        unfinished.append(call + 1 - len(finished))
    assert finished == [0, 1, 2, 3]  # in the order of dispatch
    assert max(unfinished) + 1 <= parallel.MAX_IN_FLIGHT  # with the next call, before it is added


STOPS = """
import os, signal, time
import runtime
runtime.set_environment()
with runtime.preemption.handled():
    runtime.start_hosts()
    import jax
    import parallel
    any_host = parallel.AnyHost()
    for call in range(1, 1000):
        if jax.process_index() == 1 and call == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            while not runtime.preemption.requested:
                time.sleep(0.01)
        if any_host(runtime.preemption.requested is not None):
            print("stopped at", call, runtime.preemption.stopped("now").agreed, flush=True)
            break
"""


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
