"""Regression targets of each training stage, and the loss functions.

A stage is a function (keys, batch) -> `Targets`; a loss takes the network's velocities and the targets. The equations
are in docs/method.md, section 4.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

import segments

# --- targets ----------------------------------------------------------------------------------------------------------

Batch = dict[str, Any]
"""The arrays of one batch by name: {"image"} in 1-RF, else pairs {"x0", "x1", "t0", "t1", "index"}: the end (0) and
the start (1) of each, [B, H, W, C] and [B]. "states" and "on_policy" as in `OnPolicy`."""


class Targets(NamedTuple):
    """What the network should answer where: one point on the straight line of each pair.

    Attributes:
      x: [B, H, W, C] the point x_u = (1 - u) x_end + u x_start.
      t: [B] its time t_u in [0, 1].
      u: [B] where in its segment it lies, in [0, 1]: 1 at the noisy start, 0 at the end.
      t_end: [B] the time of the segment's end; 0 where the end is data.
      index: [B] the segment index.
      velocity: [B, H, W, C] v_target = (x_end - x_start) / (tau_end - tau_start).
    """

    x: Float[Array, "b h w c"]
    t: Float[Array, "b"]
    u: Float[Array, "b"]
    t_end: Float[Array, "b"]
    index: Int[Array, "b"]  # type: ignore[assignment]  # a tuple has a method of this name
    velocity: Float[Array, "b h w c"]


T_DISTRIBUTIONS: dict[str, Callable] = {
    "uniform": lambda r, a: r,
    # Both halves together have the density a cosh(a (u - 1/2)) / (2 sinh(a / 2)).
    "ushape": lambda r, a: 0.5 + jnp.arcsinh((2.0 * r - 1.0) * math.sinh(a / 2)) / a,
    "exponential": lambda r, a: jnp.log10(1.0 + 9.0 * r),
    "logitnormal": lambda r, a: jax.nn.sigmoid(jax.scipy.special.ndtri(r)),
}
"""u of a uniform r, by the inverse distribution function; a is `training.t_shape`."""


def draw_u(keys: Key[Array, "b"], t_distribution: str, *, shape: float = 4.0) -> Float[Array, "b"]:
    """One u in [0, 1] for each key, by inversion of the distribution function.

    Args:
      keys: one for each example.
      t_distribution: "uniform"; "ushape" (after arXiv 2405.20320): half of the draws have the density
        a e^(a u) / (e^a - 1), the other half are 1 minus such a draw; "exponential": density ln(10) 10^u / 9;
        "logitnormal": the sigmoid of a standard normal draw.
      shape: a > 0 of "ushape".
    """
    r = jax.vmap(jax.random.uniform)(keys)
    return jnp.clip(T_DISTRIBUTIONS[t_distribution](r, shape), 0.0, 1.0)


def rf_targets(
    keys: Key[Array, "b"], batch: Batch, *, t_distribution: str = "uniform", t_shape: float = 4.0
) -> Targets:
    """1-RF (arXiv 2209.03003): images against fresh noise. The line starts at tau = 0, so v_target = data - noise.

    Args:
      keys: one for each example.
      batch: {"image": [B, H, W, C]} in the data's scaled range.
      t_distribution, t_shape: of t, as `draw_u`.
    """
    data = batch["image"]
    noise_keys, time_keys = jax.vmap(jax.random.split)(keys).T
    # Drawn flat: XLA on a CPU compiles a draw of several dimensions ten times longer.
    noise = jax.vmap(lambda key: jax.random.normal(key, (math.prod(data.shape[1:]),)))(noise_keys).reshape(data.shape)
    tau = _draw_tau(time_keys, t_distribution, t_shape)
    u = 1.0 - tau
    return Targets(
        x=segments.noisy_image(data, noise, _per_image(1.0 - u)),
        t=segments.t_of_tau(tau),
        u=u,
        t_end=jnp.zeros_like(u),
        index=jnp.zeros(u.shape, jnp.int32),
        velocity=data - noise,
    )


def _draw_tau(keys, t_distribution, t_shape):
    if t_distribution == "uniform":  # uniform in t is uniform in tau, without the rounding of a change of clocks
        return jax.vmap(lambda key: jax.random.uniform(key, minval=segments.EPS, maxval=1.0))(keys)
    return segments.tau_of_t(draw_u(keys, t_distribution, shape=t_shape))


def reflow_targets(
    keys: Key[Array, "b"], batch: Batch, *, t_distribution: str = "uniform", t_shape: float = 4.0
) -> Targets:
    """k-SeqRF (arXiv 2402.06461): a point of the line between each pair's ends.

    Args:
      keys: one for each example.
      batch: pairs, see `Batch`.
      t_distribution, t_shape: of u, as `draw_u`.
    """
    return _pair_targets(draw_u(keys, t_distribution, shape=t_shape), batch)


def distill_targets(keys: Key[Array, "b"], batch: Batch, *, steps: int = 1) -> Targets:
    """k-SeqRF-Distill: the points that `steps` = m Euler steps a segment start from, u ~ U{1/m, 2/m, ..., 1}.

    m = 1 is the paper's: the start of each segment alone. The rows of "on_policy", if the batch has it, follow those
    of the stored pairs.

    Args:
      keys: one for each stored pair.
      batch: pairs, "on_policy" (`on_policy_pairs`), or both.
      steps: m >= 1.
    """
    parts = []
    if "x0" in batch:
        u = jax.vmap(lambda key: jax.random.randint(key, (), 1, steps + 1))(keys) / steps
        parts.append(_pair_targets(jnp.ones(keys.shape) if steps == 1 else u, batch))
    if "on_policy" in batch:
        pairs = batch["on_policy"]
        parts.append(_pair_targets(jnp.ones_like(pairs["u"]), pairs)._replace(u=pairs["u"]))
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts) if len(parts) > 1 else parts[0]


def _pair_targets(u, pairs) -> Targets:
    taus = segments.tau_of_t(pairs["t0"]) - segments.tau_of_t(pairs["t1"])
    return Targets(
        x=(1.0 - _per_image(u)) * pairs["x0"] + _per_image(u) * pairs["x1"],
        t=(1.0 - u) * pairs["t0"] + u * pairs["t1"],
        u=u,
        t_end=pairs["t0"],
        index=pairs["index"],
        velocity=(pairs["x0"] - pairs["x1"]) / _per_image(taus),
    )


def _per_image(values):
    """[B] as [B, 1, 1, 1], to broadcast over images."""
    return values[:, None, None, None]


# --- on-policy pairs --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """How the share of a batch is made whose starts are the student's own states (`training.on_policy`).

    A batch brings the teacher's "states" [B, k + 1, H, W, C] of one noise at all boundaries; the training step replaces
    them by "on_policy", the pairs that `on_policy_pairs` makes of them.

    Attributes:
      boundaries: [k + 1] in t, from 1 to 0.
      num_steps: N = m k Euler steps.
    """

    boundaries: tuple[float, ...]
    num_steps: int


def on_policy_pairs(
    velocity: Callable,
    states: Float[Array, "b k_plus_1 h w c"],
    positions: Int[Array, "b"],
    boundaries: Sequence[float] | np.ndarray,
    num_steps: int,
) -> Batch:
    """Pairs from the student's own states to the teacher's states of the same noise.

    The example at position p starts at step j = p mod N of N = `num_steps` Euler steps, in the state that the student
    reaches there; it ends in the teacher's state at the end of that step's segment. An example is carried no further
    than its own step: (N - 1) / 2 calls each, on the mean.

    Args:
      velocity: the student's, (x [B, H, W, C], t [B], index [B]) -> dx/dtau.
      states: the teacher's, at all boundaries; states[:, 0] is the noise.
      positions: consecutive numbers of the examples among all of the global batch.
      boundaries: [k + 1] in t, from 1 to 0.
      num_steps: N, a multiple of k.

    Returns:
      {"x0", "x1", "t0", "t1", "index"} as stored pairs, and "u" [B]: where in its segment x1 lies, 1 at the start.
    """
    grid = segments.step_grid(boundaries, num_steps)
    times = jnp.asarray(boundaries, jnp.float32)
    start = positions % num_steps
    # Sorted by start step, descending: the rows still to be advanced are a prefix, whose length is static under jit.
    order = jnp.argsort(-start)
    x, steps_to_take = states[order, 0], start[order]
    for step in range(num_steps - 1):
        count = _most_beyond(step, len(states), num_steps)
        x = x.at[:count].set(_euler_step(velocity, x[:count], grid, step, steps_to_take[:count] > step))
    index = grid.segment[start]
    t_start, t_end, t = times[index], times[index + 1], grid.t_from[start]
    return {
        "x0": jax.vmap(lambda rows, segment: rows[segment + 1])(states, index),
        "x1": x[jnp.argsort(order)],
        "t0": t_end,
        "t1": t,
        "index": index,
        "u": (t - t_end) / (t_start - t_end),
    }


def _most_beyond(step: int, n: int, num_steps: int) -> int:
    """The most of n consecutive positions whose remainder by `num_steps` is greater than `step`."""
    beyond = num_steps - 1 - step
    return n // num_steps * beyond + min(n % num_steps, beyond)


def _euler_step(velocity, x, grid, step, goes_on):
    tau, tau_next = segments.tau_of_t(grid.t_from[step]), segments.tau_of_t(grid.t_to[step])
    t = jnp.full(x.shape[:1], segments.t_of_tau(tau))  # the sampler's rounding
    moved = x + (tau_next - tau) * velocity(x, t, jnp.full(x.shape[:1], grid.segment[step]))
    return jnp.where(_per_image(goes_on), moved, x)


# --- losses -----------------------------------------------------------------------------------------------------------

HUBER_C = 0.00054  # times the number of pixels; of arXiv 2405.20320
SMALLEST_LPIPS_TIME = 0.01


Images = Float[Array | np.ndarray, "b h w c"]


def l2(velocity: Images, target: Images) -> Float[Array, "b"]:
    """The mean squared error over pixels."""
    return jnp.mean((velocity - target) ** 2, axis=(1, 2, 3))


def huber(velocity: Images, target: Images) -> Float[Array, "b"]:
    """The pseudo-Huber loss (sqrt(||v - v_target||^2 + c^2) - c) / d of arXiv 2405.20320, c = 0.00054 d, d pixels."""
    d = math.prod(velocity.shape[1:])
    c = HUBER_C * d
    return (jnp.sqrt(jnp.sum((velocity - target) ** 2, axis=(1, 2, 3)) + c**2) - c) / d


LOSSES = {"l2": l2, "huber": huber}
"""(velocity, v_target) -> [B], by the values of `training.loss` that need nothing else."""
LOSS_NAMES = (*LOSSES, "lpips_huber")


def lpips_huber(velocity: Images, targets: Targets, lpips: Callable) -> Float[Array, "b"]:
    """(1 - u) huber + lpips(x_end_hat, x_end) / max(u, 0.01) where the segment ends in data, elsewhere huber.

    The loss of arXiv 2405.20320, inside segments: x_end_hat = x_u + (tau_end - tau_u) v is where the velocity leads.

    Args:
      velocity: the network's.
      targets: what it should be.
      lpips: (x [B, H, W, C], y) -> [B], images in the data's scaled range.
    """
    smooth = huber(velocity, targets.velocity)
    left = _per_image(segments.tau_of_t(targets.t_end) - segments.tau_of_t(targets.t))
    distance = lpips(targets.x + left * velocity, targets.x + left * targets.velocity)
    perceptual = (1.0 - targets.u) * smooth + distance / jnp.maximum(targets.u, SMALLEST_LPIPS_TIME)
    return jnp.where(targets.t_end == 0, perceptual, smooth)


def make_loss(name: str, *, reduce_mean: bool = True, lpips: Callable | None = None) -> Callable:
    """(velocity [B, H, W, C], Targets) -> the mean loss of the batch, a scalar.

    Args:
      name: "l2", "huber" or "lpips_huber".
      reduce_mean: False: "l2" is half the sum over pixels instead of their mean.
      lpips: as in `lpips_huber`, which needs it.
    """

    if name == "lpips_huber" and lpips is not None:
        return lambda velocity, targets: jnp.mean(lpips_huber(velocity, targets, lpips))
    if name == "l2":
        return functools.partial(_mean_square, reduce_mean=reduce_mean)
    return lambda velocity, targets: jnp.mean(LOSSES[name](velocity, targets.velocity))


def _mean_square(velocity, targets: Targets, *, reduce_mean: bool):
    square = (velocity - targets.velocity) ** 2
    # Pixels and examples in one sum: its order decides the last digit of the loss.
    return jnp.mean(square) if reduce_mean else 0.5 * jnp.mean(jnp.sum(square, axis=(1, 2, 3)))


# --- optimiser and training state -------------------------------------------------------------------------------------


# --- the training step ------------------------------------------------------------------------------------------------
