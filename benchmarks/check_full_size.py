"""Runs each full-size network once on this machine: a training update, a batch of pairs, an Euler sample, at batch 2.

    python -m benchmarks.check_full_size [cifar10] [celeba_64] [lsun_church_256] ...

The names are those of configs/rf/NAME_rf_continuous.py. Minutes each on a CPU: most of it is compiling.
"""

import importlib
import math
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import distributed
import models
import sampling
from benchmarks.common import first_update
from configs.settings import Config
from jobs.train import random_weights

BATCH = 2


def training_update(config: Config) -> dict[str, float]:
    """The loss and the gradient's norm of one whole update: forward, backward, Adam, EMA."""
    network, update, state = first_update(config)
    device = jax.local_devices()[:1]
    batch = {"image": np.zeros((1, 1, BATCH, *network.image_shape), np.float32)}
    program = distributed.map_devices(update, devices=device, donate=(0,))
    _, values = program(distributed.replicate(state, device), batch, np.zeros(1, np.uint32))
    return {name: float(value[0, 0]) for name, value in values.items()}


def pair_batch(config: Config) -> dict[str, float]:
    """The network calls and the range of one batch of pairs, over the first of 4 segments, at tolerance 0.1."""
    return _solved(config, lambda velocity, noise: sampling.solve_segment(velocity, noise, 1.0, 0.75, 0, tol=0.1))


def euler_sample(config: Config) -> dict[str, float]:
    """The network calls and the range of a sample by one Euler step."""
    return _solved(config, lambda velocity, noise: sampling.solve(velocity, noise, [1, 0], method="pc", num_scales=1))


def _solved(config: Config, solve: Callable) -> dict[str, float]:
    network = models.create_model(config)
    noise = jax.random.normal(jax.random.key(1), (BATCH, *network.image_shape))
    params = random_weights(network, 0).params
    solved = jax.jit(lambda params, noise: solve(models.velocity_fn(network, params), noise))(params, noise)
    return {"nfe": int(solved.nfe), "largest": float(jnp.max(jnp.abs(solved.x)))}


def main() -> None:
    """The script: every job of every network named on the command line; ends with an error if a value is not finite."""
    for name in sys.argv[1:] or ["cifar10", "celeba_64", "lsun_church_256"]:
        config = importlib.import_module(f"configs.rf.{name}_rf_continuous").get_config()
        shapes = models.weight_shapes(models.create_model(config)).values()
        print(f"{name}: {sum(map(math.prod, shapes)):,} parameters", flush=True)
        for job in (euler_sample, pair_batch, training_update):
            start = time.perf_counter()
            found = job(config)
            if not np.all(np.isfinite(list(found.values()))):
                sys.exit(f"error: {name}: {job.__name__} gave {found}")
            print(f"  {job.__name__}: {found} in {time.perf_counter() - start:.0f} s with compiling", flush=True)


if __name__ == "__main__":
    main()
