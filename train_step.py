"""The training step that all stages share: optimiser, EMA, the state of a run, one update."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key, UInt32

import distributed
import models
import segments
from losses import Batch, OnPolicy, Targets, on_policy_pairs
from models.weights import ema_name


def learning_rate(lr: float, warmup: int, schedule: str = "constant", n_iters: int = 0) -> optax.Schedule:
    """The learning rate of an update, by the number of updates before it.

    Args:
      lr: the learning rate after the warm-up.
      warmup: updates of linear warm-up from 0; 0: none.
      schedule: "constant", or "cosine": from lr after the warm-up to 0 after `n_iters` updates.
      n_iters: updates of the whole run, more than `warmup`; of "cosine" alone.
    """
    if schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, lr, warmup, n_iters)
    return optax.linear_schedule(0.0, lr, warmup) if warmup > 0 else optax.constant_schedule(lr)


def optimizer(
    *,
    lr: float,
    beta1: float,
    eps: float,
    warmup: int,
    grad_clip: float,
    schedule: str = "constant",
    n_iters: int = 0,
) -> optax.GradientTransformation:
    """Adam with global-norm clipping and a learning-rate schedule.

    Args:
      lr, warmup, schedule, n_iters: as `learning_rate`.
      beta1, eps: Adam's.
      grad_clip: the largest global norm of a gradient; negative: no clipping.
    """
    rate = learning_rate(lr, warmup, schedule, n_iters)
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip >= 0 else optax.identity()
    return optax.chain(clip, optax.scale_by_adam(b1=beta1, eps=eps), optax.scale_by_learning_rate(rate))


@struct.dataclass
class TrainState:
    """All that a run must keep to go on as if it had never stopped.

    Attributes:
      step: weight updates so far, int32.
      params, ema_params: the weights and their EMA at `model.ema_rate`.
      opt_state: of `optimizer`.
      extra_ema: further EMAs of the weights by rate, as `ema_name` writes it (`model.ema_rates`).
    """

    step: Any
    params: Any
    ema_params: Any
    opt_state: Any
    extra_ema: dict[str, Any] = struct.field(default_factory=dict)


def initial_state(
    weights: models.Weights,
    transformation: optax.GradientTransformation,
    *,
    step: int = 0,
    ema_rates: Iterable[float] = (),
    from_ema: bool = False,
) -> TrainState:
    """A stage's first state: the weights, EMA and Adam moments of `weights`, at update `step`.

    Adam's count comes with its moments, because a count of 0 would correct warm moments for a bias that they do not
    have: the first updates would be about a third of their right size. The warm-up counts the stage's own updates,
    from `step`.

    Args:
      weights: what the stage starts from.
      transformation: as `optimizer` makes it.
      step: the updates that are counted already.
      ema_rates: of further EMAs, which start as the main one does.
      from_ema: start from the EMA instead of the weights, with Adam's moments and count at 0.
    """
    ema_params = jax.tree.map(jnp.asarray, weights.ema_params)
    params = ema_params if from_ema else jax.tree.map(jnp.asarray, weights.params)
    clip, adam, rate = transformation.init(params)
    if not from_ema:
        moments = {"mu": jax.tree.map(jnp.asarray, weights.mu), "nu": jax.tree.map(jnp.asarray, weights.nu)}
        adam = adam._replace(count=jnp.int32(weights.count), **moments)
    return TrainState(
        step=jnp.int32(step),
        params=params,
        ema_params=ema_params,
        opt_state=(clip, adam, rate._replace(count=jnp.int32(step))),
        extra_ema={ema_name(rate): ema_params for rate in ema_rates},
    )


def ema_rate_at(updates: int | Int[Array, ""], ema_rate: float, variable: bool) -> float | Float[Array, ""]:
    """The EMA's decay after `updates` = n updates; `variable` caps it by (1 + n) / (10 + n)."""
    return jnp.minimum(ema_rate, (1.0 + updates) / (10.0 + updates)) if variable else ema_rate


def example_keys(seed: int | UInt32[Array, ""], step: Int[Array, ""], positions: Int[Array, "b"]) -> Key[Array, "b"]:
    """The random keys of the examples at `positions` of the global batch, however devices and hosts share it."""
    step_key = jax.random.fold_in(distributed.random_key(seed), step)
    return jax.vmap(lambda position: jax.random.fold_in(step_key, position))(positions)


def make_train_step(
    model: nn.Module,
    targets: Callable,
    loss: Callable,
    transformation: optax.GradientTransformation,
    *,
    ema_rate: float,
    variable_ema_rate: bool,
    on_policy: OnPolicy | None = None,
    drop_nonfinite: bool = False,
    accumulate: int = 1,
) -> Callable:
    """What each device runs in every training stage: (state, batches [n, B, ...], seed) -> (state, values), n updates.

    The seed is that of noise, times and dropout: an argument, so that runs of other seeds share the compiled program.
    The values are {"loss": [n], "gradient_norm": [n], "parameter_norm": [n]}, over all devices: the mean loss of each
    update's batch, the global norm of its gradient before clipping, and that of the weights after it.

    Args:
      model: the network, as `models.create_model` makes it.
      targets: a stage's (keys, batch) -> Targets.
      loss: (velocity, Targets) -> scalar, as `make_loss` makes it.
      transformation: as `optimizer` makes it.
      ema_rate, variable_ema_rate: as `ema_rate_at`; `variable_ema_rate` holds for the further EMAs too.
      on_policy: for batches with "states".
      drop_nonfinite: an update with a value that is not finite changes nothing but the count of updates. That is
        `optax.apply_if_finite` without its counters, which would change what a checkpoint holds.
      accumulate: the parts of a device's batch whose gradients are computed one after another and averaged; they bound
        the memory, and what an example is does not depend on them. They divide its rows.
    """

    def batch_loss(params: Any, wanted: Targets, dropout_key: Array) -> Array:
        labels = segments.label_of_t(wanted.t)
        rngs = {"dropout": dropout_key}
        velocity = model.apply({"params": params}, wanted.x, labels, wanted.index, train=True, rngs=rngs)
        return loss(velocity, wanted)

    def update(seed: UInt32[Array, ""], state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        device = distributed.device_index()
        batch = _with_on_policy_pairs(models.velocity_fn(model, state.ema_params), batch, device, on_policy)
        wanted = targets(example_keys(seed, state.step, _positions(_stored_rows(batch), device)), batch)
        # Dropout alone depends on how the batch is shared: its masks are drawn for a device's whole batch.
        dropout_key = jax.random.fold_in(jax.random.fold_in(distributed.random_key(seed + 1), state.step), device)
        loss_and_gradient = functools.partial(jax.value_and_grad(batch_loss), state.params)
        value, gradient = _mean_over_parts(loss_and_gradient, wanted, dropout_key, accumulate)
        gradient = distributed.mean_over_devices(gradient)
        change, opt_state = transformation.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, change)
        updated = _updated_state(state, params, opt_state, ema_rate, variable_ema_rate)
        values = {
            "loss": distributed.mean_over_devices(value),
            "gradient_norm": optax.tree.norm(gradient),
            "parameter_norm": optax.tree.norm(params),
        }
        return (_finite_or_kept(updated, state, values) if drop_nonfinite else updated), values

    return lambda state, batches, seed: _scan(functools.partial(update, seed), state, batches)


def _updated_state(state: TrainState, params, opt_state, ema_rate: float, variable_ema_rate: bool) -> TrainState:
    """The state after an update, its EMAs moved towards the new weights."""

    def follow(average: Any, rate: Any) -> Any:
        rate = ema_rate_at(state.step + 1, rate, variable_ema_rate)
        # In this form an EMA that equals the weights stays equal, bit for bit.
        return jax.tree.map(lambda e, p: e + (1.0 - rate) * (p - e), average, params)

    return TrainState(
        step=state.step + 1,
        params=params,
        ema_params=follow(state.ema_params, ema_rate),
        opt_state=opt_state,
        extra_ema={name: follow(average, float(name)) for name, average in state.extra_ema.items()},
    )


def _finite_or_kept(updated: TrainState, state: TrainState, values: dict[str, Array]) -> TrainState:
    """`updated` where all values are finite, else `state` with the update counted."""
    is_finite = jnp.isfinite(jnp.stack(list(values.values()))).all()
    kept = dataclasses.replace(state, step=updated.step)
    return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, kept)


def _stored_rows(batch) -> int:
    """The rows of a batch that are not on-policy."""
    return len(batch.get("image", batch.get("x0", ())))


def _positions(rows: int, device) -> Int[Array, "b"]:
    """The positions in the global batch of the rows of one device."""
    return device * rows + jnp.arange(rows)


def _with_on_policy_pairs(velocity, batch, device, on_policy: OnPolicy | None):
    if on_policy is None:
        return batch
    states = batch["states"]
    positions = _positions(len(states), device)
    pairs = on_policy_pairs(velocity, states, positions, on_policy.boundaries, on_policy.num_steps)
    return {name: rows for name, rows in batch.items() if name != "states"} | {"on_policy": pairs}


def _mean_over_parts(function, wanted: Targets, dropout_key, parts: int):
    """The mean of `function` of (targets, dropout key) over equal parts of `wanted`, each with masks of its own."""
    if parts == 1:
        return function(wanted, dropout_key)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(*part)), None

    rows = jax.tree.map(lambda rows: rows.reshape(parts, -1, *rows.shape[1:]), wanted)
    keys = jax.random.split(dropout_key, parts)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, wanted, dropout_key))
    total, _ = _scan(add, zeros, (rows, keys))
    return jax.tree.map(lambda value: value / parts, total)


def _scan(function, carry, rows):
    """`jax.lax.scan` of (carry, row) -> (carry, value) over `rows`: (the last carry, the values stacked)."""
    if jax.default_backend() != "cpu":
        return jax.lax.scan(function, carry, rows)
    # On a CPU, XLA runs the gradient of a convolution ten times slower inside a loop, so this one is written out.
    values = []
    for n in range(len(jax.tree.leaves(rows)[0])):
        carry, value = function(carry, jax.tree.map(lambda row, n=n: row[n], rows))
        values.append(value)
    return carry, jax.tree.map(lambda *value: jnp.stack(value), *values)
