"""What a training update costs: python -m benchmarks.bench_train [--only PART ...] [--rounds N] [--json FILE].

Parts digits_64 and digits_256, the digits network at these batches, and, only if named, cifar10_8, the full CIFAR-10
network (many minutes on a CPU: give it few rounds): medians over rounds of

    forward, update   milliseconds of ours; torch/ours: above 1 is faster than the same network in plain torch.nn (the
                      tests' twin) on the same machine, with the same loss, clipping, Adam and EMA
    parts             the update over its convolutions and matrix products, each timed alone: 1 is an update that costs
                      these and nothing more
    peak              the share of this machine's measured matrix-product rate that the update's products and
                      convolutions reach

and parts for digits at batch 64,

    loop              the wall time of an update in a whole run, with input, logging and checkpoints, over the bare
                      program; above 1.05 the line ends in MISSED and the exit status is 1
    scaling           an update by 1 process on 1 core over one with twice the batch by 2 processes on 2 cores

Every round times all in turn, and ratios are taken within a round, so that a machine that slows down slows them alike.
--memory compiles the gradient of the full-size CIFAR-10 network with and without model.remat and prints what XLA sets
aside for activations (minutes on a CPU). Both frameworks use the cores that this process may use.
"""

import argparse
import collections
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ml_collections import ConfigDict

import distributed
import losses
import models
import run_lib
import train_step
from benchmarks.torch_twin import Twin, randomized
from configs.rf import cifar10_rf_continuous, digits_rf_continuous

CASES = {
    "digits_64": (digits_rf_continuous, 64),
    "digits_256": (digits_rf_continuous, 256),
    "cifar10_8": (cifar10_rf_continuous, 8),
}
PARTS = (*CASES, "loop", "scaling")
BY_DEFAULT = [part for part in PARTS if part != "cifar10_8"]
MAX_LOOP = 1.05
MEMORY_BATCH = 16
# On a CPU XLA merges what is computed again with the first computation, which accelerators do not.
APART = "--xla_disable_hlo_passes=cse,cse_barrier_expander"
WARM_UP = 10  # updates of a run before its time is taken
HEADER = "case          forward ms  torch/ours   update ms  torch/ours   parts   peak"
PRODUCTS = ("conv_general_dilated", "dot_general")


def first_flow(module: Any, **model: Any) -> ConfigDict:
    """A configuration of `module` as 1-RF, one head."""
    config = module.get_config()
    config.training.reflow_t, config.model.rf_phase = 1, 1
    config.model.update(model)
    return config


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(H, W, C) of the configuration's images."""
    return config.data.image_size, config.data.image_size, config.data.num_channels


def seconds(job: Callable, repeats: int = 1) -> float:
    """Mean wall seconds of a job, until its results are computed."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = job()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


# --- ours -------------------------------------------------------------------------------------------------------------


def training_update(config: ConfigDict) -> tuple[Callable, train_step.TrainState]:
    """(the update of 1-RF as training makes it, its first state)."""
    optimizer = train_step.optimizer(**config.optim, n_iters=config.training.n_iters)
    model = models.create_model(config)
    params = models.init_params(model, jax.random.key(0), image_shape(config))
    zeros = jax.tree.map(jnp.zeros_like, params)
    weights = models.Weights(params=params, ema_params=params, mu=zeros, nu=zeros, count=0, step=0)
    step = train_step.make_train_step(
        model,
        losses.rf_targets,
        losses.make_loss("l2"),
        optimizer,
        ema_rate=config.model.ema_rate,
        variable_ema_rate=True,
    )
    return step, train_step.initial_state(weights, optimizer)


class Ours:
    """The network and its update, compiled, on the first device."""

    def __init__(self, config: ConfigDict, batch: int):
        """Compiles both."""
        device = jax.local_devices()[:1]
        step, state = training_update(config)
        self.params = state.params
        self._state, self._seed = distributed.replicate((state, np.uint32(0)), device)
        self._update = distributed.map_devices(step, devices=device, donate=(0,))
        x = np.random.default_rng(0).uniform(-1, 1, (batch, *image_shape(config))).astype(np.float32)
        self._batch = distributed.replicate({"image": x[None]}, device)
        self.inputs = jnp.asarray(x), jnp.linspace(1.0, 999.0, batch), jnp.zeros(batch, jnp.int32)
        self._apply = jax.jit(models.create_model(config).apply)
        jax.block_until_ready((self.forward(), self.update()))

    def forward(self) -> jax.Array:
        """The velocity of a batch."""
        return self._apply({"params": self.params}, *self.inputs)

    def update(self) -> jax.Array:
        """The loss of one more update."""
        self._state, values = self._update(self._state, self._batch, self._seed)
        return values["loss"]


class Torchs:
    """The same network and update in plain PyTorch."""

    def __init__(self, config: ConfigDict, batch: int):
        """On a GPU, if PyTorch sees one."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = config
        self.twin = randomized(Twin(config)).to(self.device)
        self.trained = [weight for weight in self.twin.parameters() if weight.requires_grad]
        self.ema = [weight.detach().clone() for weight in self.trained]
        optim = config.optim
        self.adam = torch.optim.Adam(self.trained, lr=optim.lr, betas=(optim.beta1, 0.999), eps=optim.eps)
        size, _, channels = image_shape(config)
        self.images = torch.rand(batch, channels, size, size, device=self.device) * 2 - 1
        self.labels = torch.linspace(1.0, 999.0, batch, device=self.device)
        self.forward()
        self.update()

    def forward(self) -> None:
        """The velocity of a batch."""
        with torch.no_grad():
            self._finished(self.twin.eval()(self.images, self.labels))

    def update(self) -> None:
        """Noise and times, loss, gradient, clipping, Adam, EMA."""
        data, noise = self.images, torch.randn_like(self.images)
        tau = torch.rand(len(data), device=self.device) * 0.999 + 0.001
        x = tau[:, None, None, None] * data + (1 - tau[:, None, None, None]) * noise
        self.adam.zero_grad(set_to_none=True)
        loss = (self.twin.train()(x, 999 * tau) - (data - noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.grad_clip)
        self.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.trained, 1 - self.config.model.ema_rate)
        self._finished(loss)

    def _finished(self, result):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return result


# --- convolutions and matrix products alone ---------------------------------------------------------------------------


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


def products(config: ConfigDict, ours: Ours) -> dict[str, tuple[Any, int]]:
    """The distinct convolutions and products of an update's gradient: text -> (equation, how often)."""
    model = models.create_model(config)

    def loss(params):
        rngs = {"dropout": jax.random.key(0)}
        return jnp.mean(model.apply({"params": params}, *ours.inputs, train=True, rngs=rngs) ** 2)

    found = [e for e in equations(jax.make_jaxpr(jax.grad(loss))(ours.params).jaxpr) if e.primitive.name in PRODUCTS]
    names = [f"{[str(v.aval) for v in e.invars]} {e.params}" for e in found]
    counts = collections.Counter(names)
    return {name: (equation, counts[name]) for name, equation in zip(names, found, strict=True)}


def operations(equation: Any) -> float:
    """Multiplications and additions of a product, those with inserted zeros left out."""
    left, right = (v.aval.shape for v in equation.invars)
    out = np.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        return 2.0 * out * np.prod([left[axis] for axis in contracted])
    kernel = equation.params["dimension_numbers"].rhs_spec  # (out, in, height, width)
    window = np.prod([right[axis] for axis in kernel[1:]])
    return 2.0 * out * window / np.prod(equation.params["lhs_dilation"])


def product_jobs(found: dict[str, tuple[Any, int]]) -> list[tuple[Callable, int]]:
    """Each product alone, compiled, with random operands: [(job, how often)]."""

    def job(equation):
        operands = [jax.random.normal(jax.random.key(0), v.aval.shape, v.aval.dtype) for v in equation.invars]
        program = jax.jit(lambda *operands: equation.primitive.bind(*operands, **equation.params))
        jax.block_until_ready(program(*operands))
        return functools.partial(program, *operands)

    return [(job(equation), count) for equation, count in found.values()]


def peak_job(size: int = 1536) -> tuple[Callable, float]:
    """(a large matrix product, its operations): what this machine can do at most."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    program = jax.jit(jnp.matmul)
    jax.block_until_ready(program(a, a))
    return functools.partial(program, a, a), 2.0 * size**3


def measure(name: str, module: Any, batch: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds, by name."""
    config = first_flow(module)
    ours, torchs = Ours(config, batch), Torchs(config, batch)
    found = products(config, ours)
    jobs, total = product_jobs(found), sum(operations(equation) * count for equation, count in found.values())
    peak, peak_operations = peak_job()
    times = []
    for _ in range(rounds):
        times.append(
            {
                "forward": seconds(ours.forward),
                "torch_forward": seconds(torchs.forward),
                "update": seconds(ours.update),
                "torch_update": seconds(torchs.update),
                "parts": sum(seconds(job) * count for job, count in jobs),
                "peak": peak_operations / seconds(peak),
            }
        )

    def median(value: Callable) -> float:
        return statistics.median(map(value, times))

    return {
        "case": name,
        "forward_s": median(lambda t: t["forward"]),
        "forward_torch_over_ours": median(lambda t: t["torch_forward"] / t["forward"]),
        "update_s": median(lambda t: t["update"]),
        "update_torch_over_ours": median(lambda t: t["torch_update"] / t["update"]),
        "update_over_parts": median(lambda t: t["update"] / t["parts"]),
        "share_of_peak": median(lambda t: total / t["update"] / t["peak"]),
        "peak_gflops": median(lambda t: t["peak"]) / 1e9,
        "rounds": rounds,
    }


def line(found: dict[str, Any]) -> str:
    """A case as a line of the table under HEADER."""
    text = f"{found['case']:12}  {1e3 * found['forward_s']:10.1f}  {found['forward_torch_over_ours']:10.2f}"
    text += f"  {1e3 * found['update_s']:10.1f}  {found['update_torch_over_ours']:10.2f}"
    return f"{text}  {found['update_over_parts']:6.2f}  {found['share_of_peak']:5.0%}"


# --- a whole run, several processes, memory ---------------------------------------------------------------------------


def loop(updates: int) -> dict[str, float]:
    """The seconds of an update in a run with input, logging and checkpoints, of the bare program, and their ratio."""
    config = first_flow(digits_rf_continuous)
    config.training.update(n_iters=updates, log_freq=50, snapshot_sampling=False)
    config.training.update(snapshot_freq=updates, snapshot_freq_for_preemption=max(updates // 2, 1))
    ours = Ours(config, config.training.batch_size)
    bare = [seconds(ours.update) for _ in range(30)]
    moments: list[float] = []  # at which each call was waited for: after the first few, as fast as devices compute

    class Clock(distributed.RunAhead):
        def add(self, result: Any) -> None:
            super().add(result)
            moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(distributed, "RunAhead", Clock):
        run_lib.train(config, folder)
    bare += [seconds(ours.update) for _ in range(30)]
    per_update = (moments[-1] - moments[WARM_UP]) / (len(moments) - WARM_UP - 1)
    return {"run_s": per_update, "bare_s": statistics.median(bare), "loop": per_update / statistics.median(bare)}


def scaling(updates: int) -> dict[str, float]:
    """The seconds of an update by 1 process on 1 core and by 2 on 2 with twice the batch, and their ratio."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    found = []
    for hosts in (1, 2):
        named = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
        command = [sys.executable, "-m", "benchmarks.bench_train", "--worker", str(updates)]
        workers = [
            subprocess.Popen(command, env=os.environ | named | {"JAX_PROCESS_ID": str(host)}, stdout=subprocess.PIPE)
            for host in range(hosts)
        ]
        printed = [worker.communicate()[0].decode().split()[-1] for worker in workers]
        found.append(float(printed[0]))
    return {"one_process_s": found[0], "two_processes_s": found[1], "scaling": found[0] / found[1]}


def worker(updates: int) -> None:
    """A process of `scaling`, on a core of its own: prints its median seconds of an update of 64 images a process."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["JAX_PROCESS_ID"]) % len(cores)]})
    distributed.start_hosts()
    step, state = training_update(first_flow(digits_rf_continuous))
    program = distributed.map_devices(step, all_hosts=True, donate=(0,))
    state, seed = distributed.replicate((state, np.uint32(0)))
    images = np.random.default_rng(0).uniform(-1, 1, (1, 1, 64, 8, 8, 1)).astype(np.float32)
    times = []
    for _ in range(updates):
        start = time.perf_counter()
        state, values = program(state, {"image": images}, seed)
        jax.block_until_ready(values)
        times.append(time.perf_counter() - start)
    distributed.sync("measured")
    print(statistics.median(times[min(5, updates - 1) :]), flush=True)


def activation_memory(*, remat: bool) -> float:
    """Megabytes that XLA sets aside beside arguments and results for the full-size CIFAR-10 network's gradient."""
    model = models.create_model(config := first_flow(cifar10_rf_continuous, remat=remat))
    params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0), image_shape(config)))
    images = jax.ShapeDtypeStruct((MEMORY_BATCH, *image_shape(config)), jnp.float32)
    labels, index = (jax.ShapeDtypeStruct((MEMORY_BATCH,), kind) for kind in (jnp.float32, jnp.int32))

    def loss(params, images, labels, index):
        rngs = {"dropout": jax.random.key(0)}
        return jnp.mean(model.apply({"params": params}, images, labels, index, train=True, rngs=rngs) ** 2)

    program = jax.jit(jax.grad(loss)).lower(params, images, labels, index)
    # How buffers are shared does not depend on the level at which machine code is optimised.
    options: Any = {"xla_backend_optimization_level": 0}
    memory: Any = program.compile(compiler_options=options).memory_analysis()
    return memory.temp_size_in_bytes / 1e6


def compare_memory() -> int:
    """Prints `activation_memory` without and with remat; in a process of its own if XLA was not told APART."""
    if APART not in os.environ.get("XLA_FLAGS", ""):
        environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {APART}".strip()}
        return subprocess.call([sys.executable, "-m", "benchmarks.bench_train", "--memory"], env=environment)
    kept, recomputed = (activation_memory(remat=remat) for remat in (False, True))
    print(f"activations at batch {MEMORY_BATCH}: {kept:.0f} MB, with model.remat {recomputed:.0f} MB", flush=True)
    return 0


def main() -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=BY_DEFAULT, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--memory", action="store_true", help="only the memory with and without model.remat")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--updates", type=int, default=520, help="of the whole run (default 520)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return 0
    if arguments.memory:
        return compare_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "rows": []}
    if cases := [name for name in arguments.only if name in CASES]:
        print(HEADER, "-" * len(HEADER), sep="\n", flush=True)
    for name in cases:
        found["rows"].append(measure(name, *CASES[name], arguments.rounds))
        print(line(found["rows"][-1]), flush=True)
    if "loop" in arguments.only:
        found |= loop(arguments.updates)
        missed = "   MISSED" if found["loop"] > MAX_LOOP else ""
        print(f"loop     {found['loop']:.3f} of the bare program, {1e3 * found['run_s']:.1f} ms{missed}", flush=True)
    if "scaling" in arguments.only:
        found |= scaling(max(arguments.updates // 10, 2))
        print(f"scaling  {found['scaling']:.3f} from 1 process to 2, {1e3 * found['two_processes_s']:.1f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(found.get("loop", 0) > MAX_LOOP)


if __name__ == "__main__":
    sys.exit(main())
