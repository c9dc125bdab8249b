"""What a training update costs: python -m benchmarks.bench_train [--only PART ...] [--rounds N]

digits_64, digits_256   the digits network at these batches: milliseconds of a forward pass and of an update, and the
cifar10_8               time of the same network in plain torch.nn, with the same loss, clipping, Adam and EMA, over
                        ours: above 1 ours is faster. Medians over rounds. The full CIFAR-10 network only if named: many
                        minutes on a CPU, give it few rounds
loop                    the wall time of an update in a whole run of digits, with input, logging and checkpoints, over
                        the bare program; above 1.05 the line ends in MISSED and the exit status is 1
memory                  only if named: what XLA sets aside for the activations of the full-size CIFAR-10 network's
                        gradient, without and with model.remat (minutes on a CPU)

Every round times all in turn, and ratios are taken within a round, so that a machine that slows down slows them alike.
Both frameworks use the cores that this process may use.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import distributed
import models
import run_lib
from benchmarks.common import first_update, seconds
from benchmarks.torch_twin import Twin, randomized
from configs.rf import cifar10_rf_continuous, digits_rf_continuous
from configs.settings import Config
from configs.validation import stage_values

CASES = {
    "digits_64": (digits_rf_continuous, 64),
    "digits_256": (digits_rf_continuous, 256),
    "cifar10_8": (cifar10_rf_continuous, 8),
}
PARTS = (*CASES, "loop", "memory")
BY_DEFAULT = ["digits_64", "digits_256", "loop"]
MAX_LOOP = 1.05
MEMORY_BATCH = 16
# On a CPU XLA merges what is computed again with the first computation, which accelerators do not.
APART = "--xla_disable_hlo_passes=cse,cse_barrier_expander"
WARM_UP = 10  # updates of a run before its time is taken
HEADER = "case          forward ms  torch/ours   update ms  torch/ours"


def first_flow(module: ModuleType, **model: Any) -> Config:
    """The configuration of `module` for 1-RF, with settings of its section model."""
    config = module.get_config()
    config.model.update(rf_phase=1, **model)
    return config


# --- beside PyTorch ---------------------------------------------------------------------------------------------------


class Ours:
    """The network and its update, compiled, on the first device."""

    def __init__(self, config: Config, batch: int):
        """Compiles both."""
        device = jax.local_devices()[:1]
        network, step, state = first_update(config)
        self._params = state.params
        self._state, self._seed = distributed.replicate((state, np.uint32(0)), device)
        self._update = distributed.map_devices(step, devices=device, donate=(0,))
        x = np.random.default_rng(0).uniform(-1, 1, (batch, *network.image_shape)).astype(np.float32)
        self._batch = distributed.replicate({"image": x[None]}, device)
        self._inputs = jnp.asarray(x), jnp.linspace(1.0, 999.0, batch), jnp.zeros(batch, jnp.int32)
        self._apply = jax.jit(network.apply)
        jax.block_until_ready((self.forward(), self.update()))

    def forward(self) -> Any:
        """The velocity of a batch."""
        return self._apply({"params": self._params}, *self._inputs)

    def update(self) -> jax.Array:
        """The loss of one more update."""
        self._state, values = self._update(self._state, self._batch, self._seed)
        return values["loss"]


class Torchs:
    """The same network and update in plain PyTorch."""

    def __init__(self, config: Config, batch: int):
        """On a GPU, if PyTorch sees one."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.twin = randomized(Twin(config)).to(self.device)
        self.trained = [weight for weight in self.twin.parameters() if weight.requires_grad]
        self.ema = [weight.detach().clone() for weight in self.trained]
        self.ema_rate, self.optim = stage_values(config).ema_rate, config.optim
        betas = self.optim.beta1, 0.999
        self.adam = torch.optim.Adam(self.trained, lr=self.optim.lr, betas=betas, eps=self.optim.eps)
        size, channels = config.data.image_size, config.data.num_channels
        self.images = torch.rand(batch, channels, size, size, device=self.device) * 2 - 1
        self.labels = torch.linspace(1.0, 999.0, batch, device=self.device)
        self.forward()
        self.update()

    def forward(self) -> None:
        """The velocity of a batch."""
        with torch.no_grad():
            self.twin.eval()(self.images, self.labels)
        self._finish()

    def update(self) -> None:
        """Noise and times, loss, gradient, clipping, Adam, EMA."""
        data, noise = self.images, torch.randn_like(self.images)
        tau = torch.rand(len(data), device=self.device) * 0.999 + 0.001
        x = tau[:, None, None, None] * data + (1 - tau[:, None, None, None]) * noise
        self.adam.zero_grad(set_to_none=True)
        loss = (self.twin.train()(x, 999 * tau) - (data - noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.optim.grad_clip)
        self.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.trained, 1 - self.ema_rate)
        self._finish()

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def case_line(name: str, rounds: int) -> str:
    """Measures a case: its line under HEADER."""
    module, batch = CASES[name]
    config = first_flow(module)
    ours, torchs = Ours(config, batch), Torchs(config, batch)
    jobs = ours.forward, torchs.forward, ours.update, torchs.update
    times = np.array([[seconds(job) for job in jobs] for _ in range(rounds)])  # [rounds, 4]
    forward, _, update, _ = 1e3 * np.median(times, axis=0)
    forward_ratio, update_ratio = np.median(times[:, 1::2] / times[:, ::2], axis=0)
    return f"{name:12}  {forward:10.1f}  {forward_ratio:10.2f}  {update:10.1f}  {update_ratio:10.2f}"


# --- a whole run, memory ----------------------------------------------------------------------------------------------


def loop(updates: int) -> tuple[float, float]:
    """(seconds of an update in a run with input, logging and checkpoints, those over the bare program's)."""
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
    return per_update, per_update / statistics.median(bare)


def activation_memory(*, remat: bool) -> float:
    """Megabytes that XLA sets aside beside arguments and results for the full-size CIFAR-10 network's gradient."""
    network = models.create_model(first_flow(cifar10_rf_continuous, remat=remat))
    params = jax.eval_shape(lambda: models.init_params(network, jax.random.key(0), network.image_shape))
    images = jax.ShapeDtypeStruct((MEMORY_BATCH, *network.image_shape), jnp.float32)
    labels, index = (jax.ShapeDtypeStruct((MEMORY_BATCH,), kind) for kind in (jnp.float32, jnp.int32))

    def loss(params, images, labels, index):
        rngs = {"dropout": jax.random.key(0)}
        return jnp.mean(network.apply({"params": params}, images, labels, index, train=True, rngs=rngs) ** 2)

    program = jax.jit(jax.grad(loss)).lower(params, images, labels, index)
    # How buffers are shared does not depend on the level at which machine code is optimised.
    options: Any = {"xla_backend_optimization_level": 0}
    memory: Any = program.compile(compiler_options=options).memory_analysis()
    return memory.temp_size_in_bytes / 1e6


def print_memory() -> None:
    """Prints `activation_memory` without and with remat; in a process of its own if XLA was not told APART."""
    if APART not in os.environ.get("XLA_FLAGS", ""):
        environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {APART}".strip()}
        subprocess.run(
            [sys.executable, "-m", "benchmarks.bench_train", "--only", "memory"], env=environment, check=True
        )
        return
    kept, recomputed = (activation_memory(remat=remat) for remat in (False, True))
    print(f"activations at batch {MEMORY_BATCH}: {kept:.0f} MB, with model.remat {recomputed:.0f} MB", flush=True)


def main() -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=BY_DEFAULT, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--updates", type=int, default=520, help="of the whole run (default 520)")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if cases := [name for name in CASES if name in arguments.only]:
        print(HEADER, "-" * len(HEADER), sep="\n", flush=True)
    for name in cases:
        print(case_line(name, arguments.rounds), flush=True)
    if "memory" in arguments.only:
        print_memory()
    if "loop" not in arguments.only:
        return 0
    per_update, ratio = loop(arguments.updates)
    missed = ratio > MAX_LOOP
    print(f"loop     {ratio:.3f} of the bare program, {1e3 * per_update:.1f} ms{'   MISSED' if missed else ''}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
