"""Time: the two clocks, segment boundaries and step grids (docs/method.md, sections 1 and 2).

t in [0, 1] is the clock of files and logs: t = 0 is data, t = 1 is noise. tau = EPS + (1 - EPS)(1 - t) in [EPS, 1] is
the clock of the network and of the ODE dx/dtau = v(x, tau): tau = EPS is noise, tau = 1 is data. It is the clock of the
public PyTorch rectified-flow checkpoints, which integrate from 1e-3 to 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

EPS = 1e-3
LABEL_SCALE = 999.0
SHORTEST_SEGMENT = 0.01  # of an adaptive segment, as a share of all time (docs/method.md, section 7)
FINE_STEPS = 500  # M, the Euler steps of the trajectories that adaptive boundaries and step grids are found on

# NumPy arrays and numbers stay what they are, in their own precision; JAX arrays are traced.
Times = Real[ArrayLike, "*times"]
TimesLike = Real[ArrayLike, "..."] | Sequence  # times in t, one-dimensional


def tau_of_t(t: Times) -> Times:
    """The ODE's time tau = EPS + (1 - EPS)(1 - t), any shape; t in [0, 1] gives tau in [EPS, 1]."""
    return EPS + (1.0 - EPS) * (1.0 - t)


def t_of_tau(tau: Times) -> Times:
    """The inverse of `tau_of_t`: tau in [EPS, 1] gives t in [0, 1]."""
    return 1.0 - (tau - EPS) / (1.0 - EPS)


def noisy_image(
    data: Real[ArrayLike, "..."], noise: Real[ArrayLike, "..."], tau: Real[ArrayLike, "..."]
) -> Real[ArrayLike, "..."]:
    """x = tau data + (1 - tau) noise, the linear interpolation of arXiv 2209.03003; tau broadcasts against the images.

    The pure noise that sampling starts from is tau = 0.
    """
    return tau * data + (1.0 - tau) * noise


def label_of_t(t: Times) -> Times:
    """The network's time label 999 tau(t), in [0.999, 999]."""
    return LABEL_SCALE * tau_of_t(t)


def uniform_boundaries(k: int) -> Float[np.ndarray, "{k}+1"]:
    """Boundaries 1 = b_0 > b_1 > ... > b_k = 0 of k >= 1 equal segments, in t."""
    return np.linspace(1.0, 0.0, k + 1, dtype=np.float32)


def validate_boundaries(boundaries: TimesLike) -> Float[np.ndarray, "k_plus_1"]:
    """Returns `boundaries` as float32 if they decrease strictly from exactly 1 to exactly 0.

    Raises:
      ValueError: not one-dimensional, fewer than two, not strictly decreasing, or not from 1 to 0.
    """
    boundaries = np.asarray(boundaries, np.float32)
    if boundaries.ndim != 1 or boundaries.size < 2:
        raise ValueError(f"boundaries must be one-dimensional with at least two times, got shape {boundaries.shape}")
    if boundaries[0] != 1.0 or boundaries[-1] != 0.0 or not np.all(np.diff(boundaries) < 0):
        raise ValueError(f"boundaries must decrease strictly from 1 to 0, got {boundaries.tolist()}")
    return boundaries


def steps_per_segment(num_scales: int, k: int) -> list[int]:
    """The steps in each of k segments, N = `num_scales` in all: N // k, and one more in the first N % k (noise side).

    Raises:
      ValueError: N < k.
    """
    if num_scales < k:
        raise ValueError(f"num_scales = {num_scales} steps cannot cover k = {k} segments; use num_scales >= {k}")
    return [num_scales // k + (i < num_scales % k) for i in range(k)]


class StepGrid(NamedTuple):
    """The N steps of a fixed-grid sampler, from noise to data.

    Attributes:
      t_from, t_to: [N] start and end of each step, in t; `t_from[n] > t_to[n]`.
      segment: [N] the segment that the whole step belongs to: the `index` of its network calls.
      starts_segment: [N] True where a step is the first of its segment.
    """

    t_from: Float[Array, "n"]
    t_to: Float[Array, "n"]
    segment: Int[Array, "n"]
    starts_segment: Bool[Array, "n"]

    @property
    def ts(self) -> Float[Array, "n_plus_1"]:
        """The times of the N + 1 states, from 1 to 0."""
        return jnp.concatenate([self.t_from, self.t_to[-1:]])


def step_grid(boundaries: TimesLike, num_scales: int) -> StepGrid:
    """The default grid: `steps_per_segment` steps, uniform in t inside each segment (docs/method.md, section 2).

    Args:
      boundaries: [k + 1] in t, from 1 to 0; may be traced.
      num_scales: N, at least k.

    Raises:
      ValueError: `num_scales` < k.
    """
    boundaries = jnp.asarray(boundaries, jnp.float32)
    counts = steps_per_segment(num_scales, boundaries.size - 1)
    index = np.repeat(np.arange(len(counts)), counts)
    step = np.concatenate([np.arange(n) for n in counts])  # inside its segment
    steps = np.asarray(counts, np.float32)[index]
    start, length = boundaries[index], boundaries[index + 1] - boundaries[index]
    # The last step of a segment must end on the boundary itself, not a rounding error away from it.
    last = step + 1 == steps
    return StepGrid(
        t_from=start + length * (step / steps),
        t_to=jnp.where(last, boundaries[index + 1], start + length * ((step + 1) / steps)),
        segment=jnp.asarray(index, jnp.int32),
        starts_segment=jnp.asarray(step == 0),
    )


def step_grid_of_times(boundaries: TimesLike, ts: TimesLike) -> StepGrid:
    """The grid with the given N + 1 step times, which must contain every boundary. Either may be traced.

    Raises:
      ValueError: `ts` do not decrease strictly from 1 to 0 or lack a boundary (checked unless traced).
    """
    if not isinstance(ts, jax.core.Tracer):
        ts = validate_boundaries(ts)
        if not isinstance(boundaries, jax.core.Tracer):
            missing = sorted({*np.asarray(boundaries, np.float32).tolist()} - {*ts.tolist()})
            if missing:
                raise ValueError(f"the step times lack the segment boundaries {missing}")
    ts, boundaries = jnp.asarray(ts, jnp.float32), jnp.asarray(boundaries, jnp.float32)
    # Times of 0 behind the last step are of no segment.
    index = jnp.minimum(jnp.searchsorted(-boundaries, -ts[:-1], side="right") - 1, boundaries.size - 2)
    return StepGrid(
        t_from=ts[:-1],
        t_to=ts[1:],
        segment=index.astype(jnp.int32),
        starts_segment=jnp.isin(ts[:-1], boundaries),
    )
