"""SeqRF-Ada: where to cut time so that the pieces of a flow are as straight as they can be (design.md section 3).

Everything here follows from one small matrix. Let x_0 ... x_M be the states of a fine trajectory, from noise (t = 1)
to data (t = 0), uniform in t, joined by straight Euler steps, and let D[a, b] = E ||x_a - x_b||^2, the sum over pixels
averaged over noises. For weights u that sum to zero, E ||sum_a u_a x_a||^2 = -u^T D u / 2, so every velocity, chord and
their difference is known from D alone. D is additive over noises, so trajectories can be streamed and thrown away.

The curvature cost of a piece is the straightness integral over it,

    cost(i, j) = integral over [t_i, t_j] of E ||(x_j - x_i) / (t_j - t_i) - dx/dt||^2 dt
               = sum over its steps of M D[m, m+1] - M D[i, j] / (j - i),

where the second line is the variance formula: mean square less squared mean.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Array, Float, Int

import segments
import utils

COLUMNS = 1 << 14  # numbers of a state handled at once: 66 MB of float64 at M = 500


@dataclasses.dataclass(frozen=True)
class CostCurve:
    """How the curvature cost of a division is spread over time: constant between neighbouring times.

    Attributes:
      times: [n + 1] from 1 to 0, in t: the fine steps and the boundaries.
      density: [n] cost per unit of t, squared pixel values, at least 0.
    """

    times: Float[np.ndarray, "times"]
    density: Float[np.ndarray, "pieces"]

    @property
    def cost(self) -> float:
        """The integral of the density: the sequential straightness of the division on this trajectory."""
        return float(np.sum(self.density * -np.diff(self.times)))


@dataclasses.dataclass(frozen=True)
class Division:
    """The best division of time found, beside the uniform one of as many segments.

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


def squared_distances(
    batches: Iterable[Float[Array | np.ndarray, "states noises ..."]],
) -> Float[np.ndarray, "states states"]:
    """D [M + 1, M + 1] float64: E ||x_a - x_b||^2 over all noises of all batches, one batch in memory at a time.

    The products are summed in float64: cost(i, j) divides by times as short as 1 / M what is left of |x|^2 after
    subtraction, and in float64 what that amplifies stays below the rounding of the float32 states themselves.

    Args:
      batches: fine trajectories, each [M + 1, B, ...] from noise to data, uniform in t; M the same in all.

    Raises:
      ValueError: no batch, fewer than two states, no noise, no pixel or differing M.
      InputError: values that are not finite.
    """
    gram, noises = None, 0
    for xs in batches:
        xs = np.asarray(xs)
        if xs.ndim < 2 or xs.shape[0] < 2 or xs.size == 0:
            raise ValueError(f"a fine trajectory is [M + 1, B, ...] with M, B >= 1, got shape {xs.shape}")
        gram = np.zeros((len(xs), len(xs))) if gram is None else gram
        if len(xs) != len(gram):
            raise ValueError(f"trajectories of {len(xs) - 1} and of {len(gram) - 1} fine steps cannot be averaged")
        _add_gram(gram, xs.reshape(len(xs), -1))
        noises += xs.shape[1]
    if gram is None:
        raise ValueError("no trajectory to measure curvature on")
    gram /= noises
    norms = np.diagonal(gram)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0)


def _add_gram(gram: Float[np.ndarray, "states states"], states: Float[np.ndarray, "states numbers"]) -> None:
    """Adds all inner products of the states to `gram`, in place, a block of columns at a time."""
    for start in range(0, states.shape[1], COLUMNS):
        block = states[:, start : start + COLUMNS].astype(np.float64)
        if not np.isfinite(block).all():
            raise utils.InputError("the fine trajectory has values that are not finite: the weights are damaged (NaN)")
        # Distances do not see a common shift, and rounding is relative to what remains after it.
        block -= block.mean(axis=0)
        gram += block @ block.T


def cost_matrix(distances: Float[np.ndarray, "states states"]) -> Float[np.ndarray, "states states"]:
    """cost[i, j] of one piece from fine step i to fine step j > i (module docstring); infinite where j <= i."""
    fine = len(distances) - 1
    spent = fine * np.concatenate([[0.0], np.cumsum(np.diagonal(distances, 1))])
    steps = np.arange(fine + 1)[None, :] - np.arange(fine + 1)[:, None]
    cost = spent[None, :] - spent[:, None] - fine * distances / np.maximum(steps, 1)
    return np.where(steps > 0, np.maximum(cost, 0.0), np.inf)


def cheapest_path(
    cost: Float[np.ndarray, "states states"], edges: int, shortest: int = 1
) -> Int[np.ndarray, "edges_and_one"]:
    """The states 0 = p_0 < p_1 < ... < p_edges = last of the cheapest path with exactly `edges` edges.

    Dynamic programming over the number of edges, O(edges M^2). Of equally cheap paths any is returned.

    Args:
      cost: cost[i, j] of the edge from i to j > i, infinite elsewhere.
      edges: how many, at least 1.
      shortest: the fewest fine steps that an edge may cover.

    Raises:
      ValueError: no such path: `edges` < 1, or `edges` edges of `shortest` steps do not fit.
    """
    last = len(cost) - 1
    if edges < 1 or edges * shortest > last:
        raise ValueError(f"{edges} pieces of at least {shortest} fine steps do not fit into {last} fine steps")
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
    """The curvature cost against time of any division, on the fine grid or off it.

    Off the grid the trajectory is where its straight Euler step is. Boundaries are float32, so they are read to a
    thousandth of a fine step.

    Raises:
      ValueError: `boundaries` do not fall from 1 to 0.
    """
    fine = len(distances) - 1
    places = np.round((1.0 - segments.validate_boundaries(boundaries).astype(np.float64)) * fine, 3)
    nodes = np.union1d(np.arange(fine + 1), places)
    velocity = np.diff(_state_weights(nodes, fine), axis=0) / (np.diff(nodes)[:, None] / fine)
    chord = np.diff(_state_weights(places, fine), axis=0) / (np.diff(places)[:, None] / fine)
    bend = velocity - chord[np.searchsorted(places, nodes[:-1], side="right") - 1]
    density = np.maximum(-0.5 * np.sum(bend @ distances * bend, axis=1), 0.0)
    return CostCurve(times=1.0 - nodes / fine, density=density)


def _state_weights(places: Float[np.ndarray, "n"], fine: int) -> Float[np.ndarray, "n states"]:
    """Weights of the fine states whose sum is the trajectory at `places`, in fine steps from the noise."""
    return np.maximum(0.0, 1.0 - np.abs(places[:, None] - np.arange(fine + 1)))


def best_division(distances: Float[np.ndarray, "states states"], k: int) -> Division:
    """The division into k segments, none shorter than `segments.SHORTEST_SEGMENT`, of the smallest cost (SeqRF-Ada).

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
    return Division(
        boundaries=boundaries,
        curve=cost_curve(distances, boundaries),
        uniform_curve=cost_curve(distances, segments.uniform_boundaries(k)),
    )


def adaptive_boundaries(xs: Float[Array | np.ndarray, "states noises ..."], k: int) -> Float[np.ndarray, "boundaries"]:
    """Boundaries [k + 1] float32 in t, from 1 to 0, of the SeqRF-Ada division (design.md section 9).

    Args:
      xs: [M + 1, B, ...] a fine trajectory from noise to data, uniform in t.
      k: the number of segments.

    Raises:
      ValueError: as `squared_distances` and `best_division`.
    """
    return best_division(squared_distances([xs]), k).boundaries


def shares_of_steps(boundaries, num_scales: int, fine: int) -> list[tuple[int, int, int]]:
    """(first fine step, last fine step, number of steps) of each segment, for `adaptive_times` on `fine` fine steps.

    Cheap: it tells before any fine trajectory is computed whether `num_scales` steps can be placed at all.

    Raises:
      ValueError: `boundaries` do not fall from 1 to 0, N < k.
      InputError: a segment has fewer fine steps than steps.
    """
    boundaries = segments.validate_boundaries(boundaries)
    counts = segments.steps_per_segment(num_scales, boundaries.size - 1)
    ends = np.rint((1.0 - boundaries.astype(np.float64)) * fine).astype(int).tolist()
    shares = list(zip(ends, ends[1:], counts, strict=False))
    for i, (start, end, count) in enumerate(shares):
        if count > end - start:
            raise utils.InputError(
                f"segment {i}'s {count} of num_scales = {num_scales} steps do not fit into its {end - start} of {fine} "
                "fine steps: lower model.num_scales, or use sampling.time_grid=uniform"
            )
    return shares


def adaptive_times(
    distances: Float[np.ndarray, "states states"],
    boundaries: Float[Array | np.ndarray, "boundaries"],
    num_scales: int,
) -> Float[np.ndarray, "times"]:
    """Times [N + 1] float32, from 1 to 0, of the N steps whose curvature cost inside the given segments is smallest.

    Each segment takes its share of the steps (`segments.steps_per_segment`), placed on fine steps by the same path
    search; a step may be as short as one fine step. The boundaries, which need not be on the fine grid, are moved to
    it for the search and are among the times exactly as given.

    Raises:
      ValueError, InputError: as `shares_of_steps`.
    """
    fine = len(distances) - 1
    cost = cost_matrix(distances)
    times = []
    shares = shares_of_steps(boundaries, num_scales, fine)
    for boundary, (start, end, count) in zip(boundaries, shares, strict=False):
        path = start + cheapest_path(cost[start : end + 1, start : end + 1], count)
        times += [boundary, *(1.0 - path[1:-1] / fine)]
    return np.array([*times, boundaries[-1]], np.float32)


def draw_division(path, division: Division) -> None:
    """Writes a PNG: the curvature cost against t of the adaptive and of the uniform division, with their boundaries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    k = division.boundaries.size - 1
    curves = [
        ("uniform", division.uniform_curve, segments.uniform_boundaries(k), "tab:gray", 0.8, ":"),
        ("adaptive", division.curve, division.boundaries, "tab:blue", 1.6, "-"),
    ]
    for name, curve, boundaries, colour, width, dashes in curves:
        label = f"{name}, cost {curve.cost:.4g}"
        axes.stairs(curve.density[::-1], curve.times[::-1], color=colour, linewidth=width, label=label)
        for boundary in boundaries:
            axes.axvline(boundary, color=colour, linewidth=width / 2, linestyle=dashes)
    axes.set(xlim=(1, 0), xlabel="t  (noise 1, data 0)", ylabel="cost per unit of t", ylim=(0, None))
    axes.set_title(f"{k} segments: curvature cost {division.cost:.4g}, uniform {division.uniform_cost:.4g}")
    axes.legend()
    with utils.atomic_path(path) as temporary, temporary.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
