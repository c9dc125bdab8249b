"""Straightness of trajectories: how far they are from the straight lines that one Euler step follows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import segments


class Straightness(NamedTuple):
    """Straightness of trajectories: means over the batch of sums over pixels; 0 is straight.

    Attributes:
      total: S = integral over t in [0, 1] of E || (x_1 - x_0) - dx/dt ||^2 dt.
      sequential: the same with, in each segment, that segment's own displacement over its length in t.
      ts: [n] the n times between which the curves hold.
      curve, sequential_curve: [n - 1] the two integrands, constant between two times.
    """

    total: Float[Array, ""]
    sequential: Float[Array, ""]
    ts: Float[Array, "n"]
    curve: Float[Array, "n-1"]
    sequential_curve: Float[Array, "n-1"]


def straightness(
    ts: Float[Array, "n"],
    xs: Float[Array, "n b *image"],
    boundaries: segments.TimesLike,
) -> Straightness:
    """Straightness of the piecewise linear trajectories through `xs`, in total and over the given segments.

    Exact for Euler's trajectories, whose steps are straight; an adaptive solve's is resolved as finely as its saved
    states. The boundaries need not be among `ts`. docs/method.md, section 6.

    Args:
      ts: times decreasing from 1 to 0, not necessarily uniform; more times of 0 behind them count for nothing.
      xs: the states at those times; the last one is that of time 0.
      boundaries: [k + 1] in t, of the segments to measure over.
    """
    boundaries = jnp.asarray(boundaries, jnp.float32)
    lengths = ts[:-1] - ts[1:]
    per_time = jax.vmap(lambda start, end, x_start, x_end: (x_start - x_end) / (start - end))
    chords = per_time(boundaries[:-1], boundaries[1:], *_boundary_states(ts, xs, boundaries))
    # overlap[n, i]: the time that step n spends in segment i. A step across a boundary belongs to both.
    overlap = jnp.minimum(ts[:-1, None], boundaries[:-1]) - jnp.maximum(ts[1:, None], boundaries[1:])
    overlap = jnp.maximum(overlap, 0.0)

    def mean_square(difference: Array) -> Array:
        return jnp.sum(difference**2) / xs.shape[1]

    def step(n: Array) -> tuple:
        # Indexed inside the loop: slices as the loop's inputs would be two more copies of all states.
        length = jnp.where(lengths[n] > 0, lengths[n], 1.0)  # of no length are what follows the last step
        slope = (xs[n] - xs[n + 1]) / length
        per_segment = jax.lax.map(lambda chord: mean_square(chord - slope), chords)
        return mean_square(xs[0] - xs[-1] - slope), jnp.sum(overlap[n] * per_segment) / length

    curve, sequential_curve = jax.lax.map(step, jnp.arange(lengths.size))
    return Straightness(
        total=jnp.sum(curve * lengths),
        sequential=jnp.sum(sequential_curve * lengths),
        ts=ts,
        curve=curve,
        sequential_curve=sequential_curve,
    )


def _boundary_states(ts, xs, boundaries):
    """The states at the segments' starts and at their ends, interpolated linearly."""
    after = jnp.clip(jnp.searchsorted(-ts, -boundaries), 1, ts.size - 1)
    weight = (ts[after - 1] - boundaries) / (ts[after - 1] - ts[after])
    weight = weight.reshape(-1, *[1] * (xs.ndim - 1))
    # Written so that a weight of exactly 0 or 1 gives a saved state, bit for bit.
    states = (1 - weight) * xs[after - 1] + weight * xs[after]
    return states[:-1], states[1:]
