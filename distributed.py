"""Devices and hosts: the one place that knows how a batch is laid out over them.

Callers hand over a function of one device's part and get one of all devices' parts, stacked on a leading axis
[devices, ...]. `jax.pmap` does it today; nobody else knows.
"""

import collections
import dataclasses
import faulthandler
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Integer, Key

from runtime import HOST_SETTINGS
from utils import InputError

logger = logging.getLogger("seqrf")

AXIS = "devices"  # the name of the mapped axis, over the devices of all hosts
PREFETCH = 2  # batches on their way to the devices
MAX_IN_FLIGHT = 2  # calls of a program with collectives that are dispatched and not finished

# JAX_THREEFRY_PARTITIONABLE=0 would draw other numbers, and jax.random has no argument for it.
jax.config.update("jax_threefry_partitionable", True)

Item = TypeVar("Item")


def random_key(seed: int | Integer[jax.Array, ""]) -> Key[jax.Array, ""]:
    """The key of `seed` for `jax.random`, of one generator whatever JAX_DEFAULT_PRNG_IMPL says.

    With 'rbg' the numbers of an example would depend on the batch around it.
    """
    return jax.random.key(seed, impl="threefry2x32")


def check_jax_settings() -> None:
    """Raises InputError where JAX computes in float64, which changes every number and which no solve is made for."""
    if jnp.result_type(float) == np.float64:
        raise InputError("JAX_ENABLE_X64 is set, and float64 would change every number; unset it")


def check_devices() -> None:
    """Raises InputError where JAX has none of the devices that JAX_PLATFORMS asks for, or cannot use them."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without a CUDA jaxlib
        reason = (str(error).splitlines() or ["jaxlib was installed without its support"])[0]
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]
        raise InputError(
            f"JAX_PLATFORMS={asked}: {reason}; unset it, or install what it needs (scripts/requirements.sh)"
        ) from error


def description() -> str:
    """The devices of this job, such as '8 x NVIDIA H100, 2 hosts'."""
    hosts = f", {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{hosts}"


ACCELERATORS = {"cuda": ("/dev/nvidia0", "/dev/nvidiactl"), "tpu": ("/dev/accel0",)}  # their files on Linux


def unused_accelerator() -> str | None:
    """A line about an accelerator that is there and that JAX, running on the CPU, does not use; None: there is none."""
    if jax.default_backend() != "cpu" or "cpu" in (os.environ.get("JAX_PLATFORMS") or ""):
        return None
    for name, files in ACCELERATORS.items():
        if any(map(os.path.exists, files)):
            remedy = f"bash scripts/requirements.sh {name} installs what it needs"
            return f"this machine has an accelerator ({name}) that JAX does not use; {remedy}"
    return None


@dataclasses.dataclass(frozen=True)
class Host:
    """A host among those that share a job: `index` of `count`, each with `local_devices` devices."""

    index: int
    count: int
    local_devices: int

    def share(self, batch_size: int) -> int:
        """This host's images of a batch of `batch_size` over all hosts.

        Raises:
          InputError: the devices cannot share the batch equally.
        """
        devices = self.count * self.local_devices
        if batch_size < 1 or batch_size % devices:
            raise InputError(f"batch_size = {batch_size} cannot be shared by {devices} devices; use a multiple of it")
        return batch_size // self.count

    def items(self, items: Sequence[Item]) -> Sequence[Item]:
        """This host's items of those that all hosts share in turn."""
        return items[self.index :: self.count]


def this_host() -> Host:
    """The place that JAX gives this process."""
    return Host(jax.process_index(), jax.process_count(), jax.local_device_count())


def is_first_host() -> bool:
    """Whether this process is the one that logs, draws and measures."""
    return jax.process_index() == 0


def map_devices(
    function: Callable, *, all_hosts: bool = False, devices: Sequence[Any] | None = None, donate: tuple[int, ...] = ()
) -> Callable:
    """`function` of one device's arguments, for stacked arguments [devices, ...] of this host's devices.

    Args:
      function: what every device computes; it may call `device_index` and `mean_over_devices`.
      all_hosts: the devices of all hosts compute together, in step; else this host's alone.
      devices: the devices, where they are not all of this host's.
      donate: positions of the arguments whose memory the results may take.
    """
    if devices is None and not all_hosts:
        devices = jax.local_devices()
    return jax.pmap(function, axis_name=AXIS, devices=devices, donate_argnums=donate)


def device_index() -> jax.Array:
    """Inside `map_devices`: the number of this device among all, int32."""
    return jax.lax.axis_index(AXIS)


def mean_over_devices(tree: Any) -> Any:
    """Inside `map_devices`: the mean of every array over all devices."""
    return jax.lax.pmean(tree, AXIS)


def replicate(tree: Any, devices: Sequence[Any] | None = None) -> Any:
    """A copy of `tree` for each of this host's devices, laid out as `map_devices` returns it: it compiles once.

    By way of the host: stacked on a device, every shape of an array would be a small program to compile.
    """
    devices = devices or jax.local_devices()
    sharding = jax.NamedSharding(jax.sharding.Mesh(np.array(devices), (AXIS,)), jax.P(AXIS))
    return jax.tree.map(lambda a: jax.device_put(np.broadcast_to(a, (len(devices), *np.shape(a))), sharding), tree)


def split_rows(batches: np.ndarray) -> np.ndarray:
    """This host's batches [n, B, ...] with each laid out over its devices: [devices, n, B / devices, ...]."""
    n, devices = len(batches), jax.local_device_count()
    return batches.reshape(n, devices, -1, *batches.shape[2:]).swapaxes(0, 1)


def first_copy(tree: Any) -> Any:
    """The first device's copy of a replicated tree, NumPy arrays. Waits for it."""
    return jax.tree.map(local_copy, tree)


def local_copy(result: jax.Array) -> np.ndarray:
    """This host's first device's part of a result [devices, ...] of `map_devices`. Waits for it."""
    return np.asarray(result.addressable_shards[0].data).squeeze(0)


def gather(rows: Any) -> Any:
    """Every host's rows [n, ...], in host order: [hosts * n, ...], NumPy arrays, on every host.

    Args:
      rows: a tree of arrays of at most 32 bits a number, of the same shapes on all hosts; all hosts must call.
    """
    return multihost_utils.process_allgather(rows, tiled=True)


def agreed(answer: bool) -> bool:
    """The first host's answer, on every host; all hosts must call."""
    return bool(gather(np.array([answer]))[0])


def sync(name: str) -> None:
    """Waits until every host has reached the point of this name; all hosts must call. Nothing for one process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def prefetch(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches [devices, ...] of NumPy arrays, on the devices, PREFETCH of them ahead of use."""
    return flax.jax_utils.prefetch_to_device(batches, PREFETCH, devices=jax.local_devices(), axis_name=AXIS)


class RunAhead:
    """Bounds how far the host runs ahead of the devices: call `add` with a result of every dispatched call.

    Programs with an all-reduce need the bound on a CPU, whose devices share one pool of as many threads as cores. With
    nothing to wait for, calls pile up; where later calls of one device hold the threads, the last participant of an
    earlier all-reduce finds none, and XLA aborts the process after 40 seconds. (Inferred from which runs abort: those
    where the host never waits. XLA's flag xla_cpu_collective_call_terminate_timeout_seconds only postpones it.) On
    accelerators the bound saves memory and the time to stop.
    """

    def __init__(self, limit: int = MAX_IN_FLIGHT):
        """At most `limit` calls are in flight at any time."""
        self._limit = limit
        self._results = collections.deque()

    def add(self, result: Any):
        """Waits until fewer than `limit` calls are unfinished. `result` must not be donated to a later call."""
        self._results.append(result)
        if len(self._results) == self._limit:
            jax.block_until_ready(self._results.popleft())


class AnyHost:
    """Logical OR of a flag over hosts, without blocking. With several hosts the result lags one call."""

    def __init__(self) -> None:
        """No flag is raised."""
        self._program = map_devices(lambda flag: jax.lax.pmax(flag, AXIS), all_hosts=True)
        self._before: Any = None

    def __call__(self, flag: bool) -> bool:
        """This host's flag for any host's. All hosts must call, at the same places between the same programs."""
        if jax.process_count() == 1:
            return flag
        before, self._before = self._before, self._program(np.full(jax.local_device_count(), flag, np.int32))
        return before is not None and bool(local_copy(before))


HOSTS_WAIT_SECONDS = 24 * 3600  # at the end, for the first host, which alone draws snapshots


HEARTBEAT_SECONDS = 30  # of silence, after which a host counts as dead


JOIN_SECONDS = 300


def start_hosts() -> None:
    """Joins the hosts of this job, where the environment names them; else this process works alone.

    They are named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (main.py's flags of these names);
    what is not given comes from the cluster, as JAX finds it: a TPU pod, Slurm, Open MPI. JAX_NUM_PROCESSES=1 joins
    nobody. A host that does not come in JOIN_SECONDS, or is silent for HEARTBEAT_SECONDS later, ends the others: JAX's
    runtime says which one and aborts the process.

    Raises:
      InputError: values that cannot be, or some of the three missing.
    """
    import jax

    from utils import InputError

    given = _named_hosts()
    if jax.distributed.is_initialized() or given.get("num_processes") == 1:
        return
    cluster = _cluster()
    if not given and (cluster is None or cluster.get_process_count() == 1):
        return
    missing = [f"--{name}" for name in HOST_SETTINGS if name not in given]
    if missing and cluster is None:
        raise InputError(f"several hosts need {', '.join(missing)} too (or JAX_NUM_PROCESSES and so on)")
    where = cluster.name if cluster else given["coordinator_address"]
    logger.info("waiting for the hosts of this job (%s), up to %d s; --num_processes=1: alone", where, JOIN_SECONDS)
    faulthandler.disable()  # absl's: an abort would print the stacks of all threads after the line that matters
    try:
        jax.distributed.initialize(
            **given,
            cluster_detection_method=cluster.name if cluster else "deactivate",
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HOSTS_WAIT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the hosts of this job cannot be joined: {str(error).splitlines()[0]}") from error
    logger.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())


def _named_hosts() -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` that the environment holds."""
    from utils import InputError

    values = {name: value for name in HOST_SETTINGS if (value := os.environ.get(f"JAX_{name.upper()}"))}
    try:
        return {name: HOST_SETTINGS[name](value) for name, value in values.items()}
    except ValueError as error:
        raise InputError(f"--num_processes and --process_id are whole numbers: {error}") from error


def _cluster() -> Any:
    """The cluster that this process was started in, as JAX knows it; None: none that runs several processes."""
    from jax._src import clusters  # what jax.distributed.initialize asks, which has no public door

    known = (clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
    return next((cluster for cluster in known if cluster.is_env_present()), None)
