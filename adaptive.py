"""SeqRF-Ada: the segment boundaries of the smallest summed curvature cost (docs/method.md, section 7).

Let x_0 ... x_M be the states of a fine trajectory, Euler steps uniform in t from noise (t = 1) to data (t = 0), and
D[a, b] = E ||x_a - x_b||^2, the sum over pixels averaged over noises. The curvature cost of a segment from fine step i
to fine step j is the straightness integral over it,

    cost(i, j) = integral over [t_j, t_i] of E ||(x_j - x_i) / (t_j - t_i) - dx/dt||^2 dt
               = sum over m from i to j - 1 of M D[m, m+1]  -  M D[i, j] / (j - i),

where the second line is the variance: mean square minus squared mean. More generally, for weights u that sum to zero
E ||sum_a u_a x_a||^2 = -u^T D u / 2, so that all velocities, chords and their differences follow from D. D is additive
over noises: trajectories are streamed and not kept.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

import sampling
import segments
import utils

COLUMNS = 1 << 14  # values of each state in one matrix product: 66 MB of float64 at M = 500


@dataclasses.dataclass(frozen=True)
class CostCurve:
    """The curvature cost of a partition as a density over time, constant between neighbouring times.

    Attributes:
      times: [n + 1] from 1 to 0, in t: the fine steps and the boundaries.
      density: [n] cost per unit of t, squared pixel values, at least 0.
    """

    times: Float[np.ndarray, "times"]
    density: Float[np.ndarray, "pieces"]

    @property
    def cost(self) -> float:
        """The integral of the density: the sequential straightness over the partition on this trajectory."""
        return float(np.sum(self.density * -np.diff(self.times)))


@dataclasses.dataclass(frozen=True)
class Partition:
    """A partition of time into k segments, with its cost and that of the uniform partition into k.

    Attributes:
      boundaries: [k + 1] float32 in t, from 1 to 0.
      curve, uniform_curve: the cost against time of these boundaries and of the uniform ones.
    """

    boundaries: Float[np.ndarray, "boundaries"]
    curve: CostCurve
    uniform_curve: CostCurve

    @property
    def cost(self) -> float:
        """The curvature cost of `boundaries`."""
        return self.curve.cost

    @property
    def uniform_cost(self) -> float:
        """The curvature cost of the uniform boundaries."""
        return self.uniform_curve.cost


def fine_trajectory(
    velocity: sampling.Velocity, x: Float[Array, "noises *image"], boundaries: segments.TimesLike
) -> Float[Array, "states noises *image"]:
    """States [M + 1, B, ...] of M = FINE_STEPS Euler steps, uniform in t, from noise x.

    A boundary of the velocity's own segments inside a step splits the step, since the segment index changes there. The
    state at such a boundary is not returned.

    Args:
      velocity: as in `sampling.solve`.
      x: the noise.
      boundaries: [k + 1] in t, of the velocity's segments.
    """
    uniform = segments.uniform_boundaries(segments.FINE_STEPS)
    times = np.union1d(uniform, np.asarray(boundaries, np.float32))[::-1]
    solved = sampling.solve(
        velocity, x, boundaries, method="pc", num_scales=times.size - 1, time_grid=times, save_trajectory=True
    )
    return solved.xs[np.isin(times, uniform)]  # type: ignore[index]  # saved


def squared_distances(
    batches: Iterable[Float[Array | np.ndarray, "states noises ..."]],
) -> Float[np.ndarray, "states states"]:
    """D [M + 1, M + 1] float64: E ||x_a - x_b||^2 over all noises of all batches, one batch in memory at a time.

    Summed in float64: cost(i, j) divides differences of sums of |x|^2 by times as short as 1 / M, and in float64 the
    amplified rounding stays below that of the float32 states themselves.

    Args:
      batches: at least one fine trajectory, each [M + 1, B, ...] from noise to data, uniform in t; M the same in all.

    Raises:
      ValueError: not a trajectory of at least two states.
      InputError: values that are not finite.
    """
    gram: Any = None
    noises = 0
    for xs in batches:
        xs = np.asarray(xs)
        if xs.ndim < 2 or xs.shape[0] < 2 or xs.size == 0:
            raise ValueError(f"a fine trajectory is [M + 1, B, ...] with M, B >= 1, got shape {xs.shape}")
        gram = np.zeros((len(xs), len(xs))) if gram is None else gram
        _add_gram(gram, xs.reshape(len(xs), -1))
        noises += xs.shape[1]
    gram /= noises
    norms = np.diagonal(gram)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0)


def _add_gram(gram: Float[np.ndarray, "states states"], states: Float[np.ndarray, "states values"]) -> None:
    """Adds the inner products of the states to `gram`, in place, a block of columns at a time."""
    for start in range(0, states.shape[1], COLUMNS):
        block = states[:, start : start + COLUMNS].astype(np.float64)
        if not np.isfinite(block).all():
            raise utils.InputError("the fine trajectory has values that are not finite: the weights are damaged (NaN)")
        # A common shift cancels in distances, and without it there is less to round.
        block -= block.mean(axis=0)
        gram += block @ block.T


def cost_matrix(distances: Float[np.ndarray, "states states"]) -> Float[np.ndarray, "states states"]:
    """cost[i, j] of a segment from fine step i to fine step j > i (module docstring); infinite where j <= i."""
    fine = len(distances) - 1
    speed = fine * np.concatenate([[0.0], np.cumsum(np.diagonal(distances, 1))])
    steps = np.arange(fine + 1)[None, :] - np.arange(fine + 1)[:, None]
    cost = speed[None, :] - speed[:, None] - fine * distances / np.maximum(steps, 1)
    return np.where(steps > 0, np.maximum(cost, 0.0), np.inf)


def cheapest_path(
    cost: Float[np.ndarray, "states states"], edges: int, shortest: int = 1
) -> Int[np.ndarray, "edges_plus_1"]:
    """The states 0 = p_0 < p_1 < ... < p_edges = M of the cheapest path with exactly `edges` edges.

    Dynamic programming over the number of edges, O(edges M^2).

    Args:
      cost: cost[i, j] of the edge from i to j > i, infinite elsewhere.
      edges: at least 1, and edges * shortest <= M.
      shortest: the fewest fine steps that an edge may cover.
    """
    last = len(cost) - 1
    steps = np.arange(last + 1)[None, :] - np.arange(last + 1)[:, None]
    allowed = np.where(steps >= shortest, cost, np.inf)
    best, previous = allowed[0], []
    for _ in range(edges - 1):
        total = best[:, None] + allowed
        previous.append(total.argmin(axis=0))
        best = total.min(axis=0)
    path = [last]
    for came_from in reversed(previous):
        path.append(int(came_from[path[-1]]))
    return np.array([0, *reversed(path)])


def cost_curve(
    distances: Float[np.ndarray, "states states"], boundaries: Float[Array | np.ndarray, "boundaries"]
) -> CostCurve:
    """The curvature cost against time over any boundaries, on the fine grid or between its steps.

    Between fine steps the trajectory is linear. Boundaries are float32 and are rounded to a thousandth of a fine step.

    Raises:
      ValueError: `boundaries` do not decrease from 1 to 0.
    """
    fine = len(distances) - 1
    cuts = np.round((1.0 - segments.validate_boundaries(boundaries).astype(np.float64)) * fine, 3)
    nodes = np.union1d(np.arange(fine + 1), cuts)
    velocity = np.diff(_state_weights(nodes, fine), axis=0) / (np.diff(nodes)[:, None] / fine)
    chord = np.diff(_state_weights(cuts, fine), axis=0) / (np.diff(cuts)[:, None] / fine)
    deviation = velocity - chord[np.searchsorted(cuts, nodes[:-1], side="right") - 1]
    density = np.maximum(-0.5 * np.sum(deviation @ distances * deviation, axis=1), 0.0)
    return CostCurve(times=1.0 - nodes / fine, density=density)


def _state_weights(positions: Float[np.ndarray, "n"], fine: int) -> Float[np.ndarray, "n states"]:
    """Weights of the fine states in the linear interpolation at `positions`, in fine steps from the noise."""
    return np.maximum(0.0, 1.0 - np.abs(positions[:, None] - np.arange(fine + 1)))


def best_partition(distances: Float[np.ndarray, "states states"], k: int) -> Partition:
    """The partition into k segments of the smallest cost, none shorter than `segments.SHORTEST_SEGMENT` (SeqRF-Ada).

    Raises:
      InputError: k < 1, or k segments of the shortest length do not fit.
    """
    fine = len(distances) - 1
    shortest = math.ceil(segments.SHORTEST_SEGMENT * fine - 1e-9)  # less what 0.01 lacks in binary
    if not 1 <= k <= fine // shortest:
        raise utils.InputError(
            f"k = {k} segments, none shorter than {segments.SHORTEST_SEGMENT:g} of the time, do not fit: "
            f"use training.reflow_t from 1 to {fine // shortest}, or training.adaptive_interval=False"
        )
    path = cheapest_path(cost_matrix(distances), k, shortest)
    boundaries = (1.0 - path / fine).astype(np.float32)
    return Partition(
        boundaries=boundaries,
        curve=cost_curve(distances, boundaries),
        uniform_curve=cost_curve(distances, segments.uniform_boundaries(k)),
    )


def adaptive_boundaries(xs: Float[Array | np.ndarray, "states noises ..."], k: int) -> Float[np.ndarray, "boundaries"]:
    """SeqRF-Ada's boundaries [k + 1] float32 in t, from 1 to 0.

    Args:
      xs: [M + 1, B, ...] a fine trajectory from noise to data, uniform in t.
      k: the number of segments.

    Raises:
      ValueError, InputError: as `squared_distances` and `best_partition`.
    """
    return best_partition(squared_distances([xs]), k).boundaries


def fine_step_spans(boundaries: segments.TimesLike, num_scales: int, fine: int) -> list[tuple[int, int, int]]:
    """(first fine step, last fine step, number of steps) of each segment, for `adaptive_times` on `fine` fine steps.

    Needs no trajectory, so that steps that do not fit are an error before one is solved.

    Raises:
      ValueError: `boundaries` do not decrease from 1 to 0, N < k.
      InputError: a segment has fewer fine steps than steps.
    """
    boundaries = segments.validate_boundaries(boundaries)
    counts = segments.steps_per_segment(num_scales, boundaries.size - 1)
    ends = np.rint((1.0 - boundaries.astype(np.float64)) * fine).astype(int).tolist()
    spans = list(zip(ends, ends[1:], counts, strict=False))
    for i, (start, end, count) in enumerate(spans):
        if count > end - start:
            raise utils.InputError(
                f"segment {i}'s {count} of num_scales = {num_scales} steps do not fit into its {end - start} of {fine} "
                "fine steps: lower model.num_scales, or use sampling.time_grid=uniform"
            )
    return spans


def adaptive_times(
    distances: Float[np.ndarray, "states states"],
    boundaries: Float[Array | np.ndarray, "boundaries"],
    num_scales: int,
) -> Float[np.ndarray, "times"]:
    """Times [N + 1] float32, from 1 to 0, of the N steps whose curvature cost inside the given segments is smallest.

    Each segment has `segments.steps_per_segment` steps, placed on fine steps by the same path search; a step may be as
    short as one fine step. For the search the boundaries are rounded to the fine grid; the returned times contain them
    unchanged.

    Raises:
      ValueError, InputError: as `fine_step_spans`.
    """
    fine = len(distances) - 1
    cost = cost_matrix(distances)
    times = []
    spans = fine_step_spans(boundaries, num_scales, fine)
    for boundary, (start, end, count) in zip(boundaries, spans, strict=False):
        path = start + cheapest_path(cost[start : end + 1, start : end + 1], count)
        times += [boundary, *(1.0 - path[1:-1] / fine)]
    return np.array([*times, boundaries[-1]], np.float32)
