"""What several benchmarks need: seconds of a job, and networks and updates of configurations as the jobs make them."""

import time
from collections.abc import Callable
from typing import Any

import jax

import losses
import models
import train_step
from configs.settings import Config
from configs.validation import stage_values
from jobs import builders
from jobs.stages import STAGES
from jobs.train import random_weights


def seconds(job: Callable[[], Any]) -> float:
    """Wall seconds of a job, until its results are computed."""
    start = time.perf_counter()
    jax.block_until_ready(job())
    return time.perf_counter() - start


def perturbed_weights(network: models.NCSNpp, spread: float) -> Any:
    """Fresh weights moved by noise of standard deviation `spread`: the last layers, and so the velocity, start at 0."""
    leaves, tree = jax.tree.flatten(random_weights(network, 0).params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + spread * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def first_update(config: Config) -> tuple[models.NCSNpp, Callable, train_step.TrainState]:
    """(1-RF's network, the update that its training computes, see `train_step.make_train_step`, its first state)."""
    values, training = stage_values(config), config.training
    network, optimizer = models.create_model(config), builders.optimizer(config, values)
    step = train_step.make_train_step(
        network,
        STAGES["rf"].targets(config),
        losses.make_loss(training.loss, reduce_mean=training.reduce_mean),
        optimizer,
        ema_rate=values.ema_rate,
        variable_ema_rate=values.variable_ema_rate,
    )
    return network, step, train_step.initial_state(random_weights(network, 0), optimizer)
