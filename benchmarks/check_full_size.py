"""Runs each full-size network once on this machine: a training update, a batch of pairs, an Euler sample, at batch 2.

    python -m benchmarks.check_full_size [cifar10] [celeba_64] [lsun_church_256] ...

The names are those of configs/rf/NAME_rf_continuous.py. Minutes each on a CPU: most of it is compiling.
"""

import importlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import distributed
import losses
import models
import sampling
import train_step
from jobs.builders import optimizer

BATCH = 2


def training_update(config, model, params):
    """The loss and the gradient's norm of one whole update: forward, backward, Adam, EMA."""
    transformation, settings = optimizer(config), config.model
    zeros = jax.tree.map(np.zeros_like, params)
    weights = models.Weights(params=params, ema_params=params, mu=zeros, nu=zeros, count=0, step=0)
    update = train_step.make_train_step(
        model,
        losses.rf_targets,
        losses.make_loss("l2"),
        transformation,
        ema_rate=settings.ema_rate,
        variable_ema_rate=settings.variable_ema_rate,
    )
    device = jax.local_devices()[:1]
    state = distributed.replicate(train_step.initial_state(weights, transformation), device)
    size, channels = config.data.image_size, config.data.num_channels
    batch = {"image": np.zeros((1, 1, BATCH, size, size, channels), np.float32)}
    program = distributed.map_devices(update, devices=device, donate=(0,))
    _, values = program(state, batch, np.zeros(1, np.uint32))
    return {name: float(value[0, 0]) for name, value in values.items()}


def pair_batch(config, model, params):
    """The network calls and the range of one batch of pairs, over the first of 4 segments, at tolerance 0.1."""
    noise = _noise(config)

    def solve(params, noise):
        return sampling.solve_segment(models.velocity_fn(model, params), noise, 1.0, 0.75, 0, tol=0.1)

    solved = jax.jit(solve)(params, noise)
    return {"nfe": int(solved.nfe), "largest": float(jnp.max(jnp.abs(solved.x)))}


def euler_sample(config, model, params):
    """The network calls and the range of a sample by one Euler step."""

    def solve(params, noise):
        return sampling.solve(models.velocity_fn(model, params), noise, [1.0, 0.0], method="pc", num_scales=1)

    solved = jax.jit(solve)(params, _noise(config))
    return {"nfe": int(solved.nfe), "largest": float(jnp.max(jnp.abs(solved.x)))}


def _noise(config):
    size = config.data.image_size
    return jax.random.normal(jax.random.key(1), (BATCH, size, size, config.data.num_channels))


def main():
    """The script: every job of every network named on the command line; ends with an error if a value is not finite."""
    for name in sys.argv[1:] or ["cifar10", "celeba_64", "lsun_church_256"]:
        config = importlib.import_module(f"configs.rf.{name}_rf_continuous").get_config()
        model = models.create_model(config)
        size = config.data.image_size
        params = models.init_params(model, jax.random.key(0), (size, size, config.data.num_channels))
        print(f"{name}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters", flush=True)
        for job in (euler_sample, pair_batch, training_update):
            start = time.perf_counter()
            found = job(config, model, params)
            if not np.all(np.isfinite(list(found.values()))):
                sys.exit(f"error: {name}: {job.__name__} gave {found}")
            print(f"  {job.__name__}: {found} in {time.perf_counter() - start:.0f} s with compiling", flush=True)


if __name__ == "__main__":
    main()
