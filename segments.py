"""Time: the two clocks, the segments and the step grids. Imports nothing of ours.

t in [0, 1] is the clock of files and logs: t = 0 is data, t = 1 is noise. tau in [EPS, 1] is the clock of the
network and of the ODE dx/dtau = v(x, tau): tau = EPS is noise, tau = 1 is data. It is the clock of the public PyTorch
rectified-flow checkpoints, which integrate from 1e-3 to 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

EPS = 1e-3
LABEL_SCALE = 999.0
SHORTEST_SEGMENT = 0.01  # of the whole time; no adaptive segment is shorter
FINE_STEPS = 500  # of the trajectories that adaptive divisions and grids are found on (M of design.md section 3)


def tau_of_t(t):
    """tau = EPS + (1 - EPS)(1 - t), any shape; t in [0, 1] gives tau in [EPS, 1]."""
    return EPS + (1.0 - EPS) * (1.0 - t)


def t_of_tau(tau):
    """The inverse of `tau_of_t`: tau in [EPS, 1] gives t in [0, 1]."""
    return 1.0 - (tau - EPS) / (1.0 - EPS)


def noisy_image(data, noise, tau):
    """x = tau data + (1 - tau) noise, the linear interpolation of arXiv 2209.03003; tau broadcasts against the images.

    The pure noise that sampling starts from is tau = 0.
    """
    return tau * data + (1.0 - tau) * noise


def label_of_t(t):
    """What the network is told instead of the time: 999 tau(t), in [0.999, 999]."""
    return LABEL_SCALE * tau_of_t(t)


def uniform_boundaries(k: int) -> Float[np.ndarray, "{k}+1"]:
    """Boundaries 1 = b_0 > b_1 > ... > b_k = 0 of k equal segments, in t.

    Raises:
      ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"a flow has at least one segment, got k = {k}")
    return np.linspace(1.0, 0.0, k + 1, dtype=np.float32)


def checked_boundaries(boundaries) -> Float[np.ndarray, "k_plus_1"]:
    """`boundaries` as float32, once it is known that they fall from exactly 1 to exactly 0.

    Raises:
      ValueError: not one-dimensional, fewer than two, not strictly decreasing, or not from 1 to 0.
    """
    boundaries = np.asarray(boundaries, np.float32)
    if boundaries.ndim != 1 or boundaries.size < 2:
        raise ValueError(f"boundaries must be a list of at least two times, got shape {boundaries.shape}")
    if boundaries[0] != 1.0 or boundaries[-1] != 0.0 or not np.all(np.diff(boundaries) < 0):
        raise ValueError(f"boundaries must fall strictly from 1 to 0, got {boundaries.tolist()}")
    return boundaries


def is_traced(times) -> bool:
    """Whether `times` (an array or a sequence) has no values yet, being an argument of a program under compilation."""
    return any(isinstance(time, jax.core.Tracer) for time in jax.tree.leaves(times))


def steps_per_segment(num_scales: int, k: int) -> list[int]:
    """How `num_scales` = N steps are shared by k segments: N // k each, one more in the first N % k (noise side).

    Raises:
      ValueError: N < k, a segment would get no step.
    """
    if num_scales < k:
        raise ValueError(f"num_scales = {num_scales} steps cannot cover k = {k} segments; use num_scales >= {k}")
    return [num_scales // k + (i < num_scales % k) for i in range(k)]


class StepGrid(NamedTuple):
    """The N steps of a fixed-grid sampler, from noise to data.

    Attributes:
      t_from, t_to: [N] start and end of each step, in t; `t_from[n] > t_to[n]`.
      head: [N] the segment, and so the time-embedding head, that the whole step belongs to.
      opens: [N] True where a step is the first of its segment.
    """

    t_from: Float[Array, "n"]
    t_to: Float[Array, "n"]
    head: Int[Array, "n"]
    opens: Bool[Array, "n"]

    @property
    def ts(self) -> Float[Array, "n_plus_1"]:
        """The times of the N + 1 states, from 1 to 0."""
        return jnp.concatenate([self.t_from, self.t_to[-1:]])


def step_grid(boundaries, num_scales: int) -> StepGrid:
    """The steps of design.md section 3: `steps_per_segment`, uniform inside a segment; `boundaries` [k + 1] in t.

    Raises:
      ValueError: `num_scales` < k.
    """
    boundaries = jnp.asarray(boundaries, jnp.float32)
    counts = steps_per_segment(num_scales, boundaries.size - 1)
    index = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(n) for n in counts])
    share = np.asarray(counts, np.float32)[index]
    start, length = boundaries[index], boundaries[index + 1] - boundaries[index]
    # The last step of a segment must end on the boundary itself, not a rounding error away from it.
    last = place + 1 == share
    return StepGrid(
        t_from=start + length * (place / share),
        t_to=jnp.where(last, boundaries[index + 1], start + length * ((place + 1) / share)),
        head=jnp.asarray(index, jnp.int32),
        opens=jnp.asarray(place == 0),
    )


def step_grid_of_times(boundaries, ts) -> StepGrid:
    """The grid with the given N + 1 step times, which must contain every boundary. Either may be traced.

    Raises:
      ValueError: `ts` do not fall strictly from 1 to 0 or miss a boundary (seen unless traced).
    """
    if not is_traced([ts, boundaries]):
        ts, boundaries = checked_boundaries(ts), checked_boundaries(boundaries)
        missed = [b for b in boundaries.tolist() if not np.any(ts == np.float32(b))]
        if missed:
            raise ValueError(f"the step times miss the segment boundaries {missed}")
    ts, boundaries = jnp.asarray(ts, jnp.float32), jnp.asarray(boundaries, jnp.float32)
    index = jnp.searchsorted(-boundaries, -ts[:-1], side="right") - 1
    return StepGrid(
        t_from=ts[:-1],
        t_to=ts[1:],
        head=index.astype(jnp.int32),
        opens=jnp.isin(ts[:-1], boundaries),
    )
