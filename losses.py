"""What each stage learns (its targets), and the one weight update that all of them share (design.md section 4)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

import parallel
import segments


class Targets(NamedTuple):
    """What the network should answer where.

    Attributes:
      x: [B, H, W, C] the point x_u on the straight line of each pair.
      t: [B] its time t_u in [0, 1].
      index: [B] its segment.
      velocity: [B, H, W, C] (x_end - x_start) / (tau_end - tau_start), the line's velocity in tau.
    """

    x: Float[Array, "b h w c"]
    t: Float[Array, "b"]
    index: Int[Array, "b"]
    velocity: Float[Array, "b h w c"]


def rf_targets(keys: Key[Array, "b"], batch) -> Targets:
    """1-RF: images against fresh noise, tau ~ U(EPS, 1). The line starts at tau = 0, so v = data - noise.

    Args:
      keys: one for each example.
      batch: {"image": [B, H, W, C]} in the data's scaled range.
    """
    data = batch["image"]

    def draw(key):
        noise_key, time_key = jax.random.split(key)
        tau = jax.random.uniform(time_key, minval=segments.EPS, maxval=1.0)
        # Drawn flat: XLA on a CPU compiles a draw of several dimensions ten times longer.
        return jax.random.normal(noise_key, (math.prod(data.shape[1:]),)).reshape(data.shape[1:]), tau

    noise, tau = jax.vmap(draw)(keys)
    u = 1.0 - tau
    x = segments.noisy_image(data, noise, _per_image(1.0 - u))
    index = jnp.zeros(tau.shape, jnp.int32)
    return Targets(x=x, t=segments.t_of_tau(tau), index=index, velocity=data - noise)


def reflow_targets(keys: Key[Array, "b"], batch) -> Targets:
    """k-SeqRF: a point u ~ U(0, 1) of the line between each pair's ends.

    Args:
      keys: one for each example.
      batch: {"x0", "x1": [B, H, W, C], "t0", "t1": [B], "index": [B]}, a pair's end (0) and start (1).
    """
    return _pair_targets(jax.vmap(jax.random.uniform)(keys), batch)


def distill_targets(keys: Key[Array, "b"], batch) -> Targets:
    """k-SeqRF-Distill: u = 1, only the start of each segment. Arguments as `reflow_targets`."""
    return _pair_targets(jnp.ones(keys.shape), batch)


def _pair_targets(u, batch) -> Targets:
    taus = segments.tau_of_t(batch["t0"]) - segments.tau_of_t(batch["t1"])
    return Targets(
        x=_between(u, batch["x0"], batch["x1"]),
        t=(1.0 - u) * batch["t0"] + u * batch["t1"],
        index=batch["index"],
        velocity=(batch["x0"] - batch["x1"]) / _per_image(taus),
    )


def _between(u, x_end, x_start):
    """x_u = (1 - u) x_end + u x_start, one u for each image."""
    u = _per_image(u)
    return (1.0 - u) * x_end + u * x_start


def _per_image(values):
    """[B] as [B, 1, 1, 1], to broadcast over images."""
    return values[:, None, None, None]


def example_keys(seed: int, step: Int[Array, ""], places: Int[Array, "b"]) -> Key[Array, "b"]:
    """The random keys of examples at `places` of the global batch: the same however devices and hosts share it."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda place: jax.random.fold_in(step_key, place))(places)


def optimizer(*, lr: float, beta1: float, eps: float, warmup: int, grad_clip: float) -> optax.GradientTransformation:
    """Clipping, Adam, rate: linear warm-up over `warmup` updates (0: none), global-norm clipping (negative: off)."""
    rate = optax.linear_schedule(0.0, lr, warmup) if warmup > 0 else optax.constant_schedule(lr)
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip >= 0 else optax.identity()
    return optax.chain(clip, optax.scale_by_adam(b1=beta1, eps=eps), optax.scale_by_learning_rate(rate))


@struct.dataclass
class TrainState:
    """All that a run must keep to go on as if it had never stopped."""

    step: Any  # weight updates so far
    params: Any
    ema_params: Any
    opt_state: Any


def initial_state(weights, transformation: optax.GradientTransformation, step: int = 0) -> TrainState:
    """A stage's first state from `models.Weights`: its weights, EMA and Adam moments, at update `step`.

    Adam's count comes with its moments, because a count of 0 would correct warm moments for a bias that they do not
    have: the first updates would be about a third of their right size. The warm-up counts the
    stage's own updates, from `step`.
    """
    clip, adam, rate = transformation.init(weights.params)
    moments = {"mu": jax.tree.map(jnp.asarray, weights.mu), "nu": jax.tree.map(jnp.asarray, weights.nu)}
    adam = adam._replace(count=jnp.int32(weights.count), **moments)
    rate = rate._replace(count=jnp.int32(step))
    return TrainState(
        step=jnp.int32(step),
        params=jax.tree.map(jnp.asarray, weights.params),
        ema_params=jax.tree.map(jnp.asarray, weights.ema_params),
        opt_state=(clip, adam, rate),
    )


def loss(velocity: Float[Array, "b h w c"], target: Float[Array, "b h w c"], reduce_mean: bool) -> Float[Array, ""]:
    """The batch's mean squared error: mean over pixels, or (`reduce_mean=False`) half the sum over pixels."""
    square = (velocity - target) ** 2
    if reduce_mean:
        return jnp.mean(square)
    return 0.5 * jnp.mean(jnp.sum(square, axis=(1, 2, 3)))


def ema_rate_at(updates, ema_rate: float, variable: bool):
    """The EMA's decay after `updates` updates; `variable` caps it by (1 + n) / (10 + n)."""
    return jnp.minimum(ema_rate, (1.0 + updates) / (10.0 + updates)) if variable else ema_rate


def make_updates(model, targets, transformation, *, ema_rate, variable_ema_rate, reduce_mean, seed):
    """What each device runs in every training stage: (state, batches [n, B, ...]) -> (state, losses [n]), n updates.

    Args:
      model: the network, as `models.create_model` makes it.
      targets: a stage's (keys, batch) -> Targets.
      transformation: as `optimizer` makes it.
      seed: of noise, times and dropout.
    """

    def batch_loss(params, wanted: Targets, dropout_key):
        labels = segments.label_of_t(wanted.t)
        rngs = {"dropout": dropout_key}
        velocity = model.apply({"params": params}, wanted.x, labels, wanted.index, train=True, rngs=rngs)
        return loss(velocity, wanted.velocity, reduce_mean)

    def update(state: TrainState, batch):
        size = jax.tree.leaves(batch)[0].shape[0]
        device = parallel.device_index()
        wanted = targets(example_keys(seed, state.step, device * size + jnp.arange(size)), batch)
        # Dropout alone depends on how the batch is shared: its masks are drawn for a device's whole batch.
        dropout_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed + 1), state.step), device)
        value, gradient = jax.value_and_grad(batch_loss)(state.params, wanted, dropout_key)
        gradient = parallel.mean_over_devices(gradient)
        change, opt_state = transformation.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, change)
        rate = ema_rate_at(state.step + 1, ema_rate, variable_ema_rate)
        # In this form an EMA that equals the weights stays equal, bit for bit.
        ema_params = jax.tree.map(lambda e, p: e + (1.0 - rate) * (p - e), state.ema_params, params)
        state = TrainState(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state)
        return state, parallel.mean_over_devices(value)

    def updates(state: TrainState, batches):
        if jax.default_backend() != "cpu":
            return jax.lax.scan(update, state, batches)
        # On a CPU, XLA runs the gradient of a convolution ten times slower inside a loop, so this one is written out.
        values = []
        for n in range(jax.tree.leaves(batches)[0].shape[0]):
            state, value = update(state, jax.tree.map(lambda rows, n=n: rows[n], batches))
            values.append(value)
        return state, jnp.stack(values)

    return updates
