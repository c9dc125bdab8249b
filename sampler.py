"""Sampling a network on all local devices, and what its flow is worth: quality, NFE, seconds, straightness, error."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from jaxtyping import Array, Float

import adaptive
import datasets
import features
import models
import parallel
import sampling
import segments
from utils import InputError

FINE_NOISES = 128  # of the fine trajectories, see `segments.FINE_STEPS`
# What global truncation error is measured against.
EXACT = {"method": "ode", "tol": 1e-6, "solver": "dopri5", "error_norm": "batch"}
TRAJECTORY_BYTES = 1 << 30  # at most, of one device, for the states behind a curve, a division or a picture


@dataclasses.dataclass(frozen=True)
class Flow:
    """A network, without weights, and how it is sampled. What was compiled for it once serves all checkpoints.

    Attributes:
      model: as `models.create_model` makes it.
      boundaries: [k + 1] in t.
      image_shape: (H, W, C).
      options: the keywords of `sampling.solve`: method, tol, num_scales, predictor, ...
      seed: of the noises. Noise i is the same for every batch size and number of devices.
      time_grid: [num_scales + 1] times for method "pc"; None: uniform inside a segment. An argument of the compiled
        programs, since every checkpoint may have its own.
    """

    model: Any
    boundaries: np.ndarray
    image_shape: tuple[int, int, int]
    options: dict[str, Any]
    seed: int
    time_grid: Float[Array | np.ndarray, "times"] | None = None
    _programs: dict = dataclasses.field(default_factory=dict, repr=False)

    def noise(self, places) -> Float[Array, "b h w c"]:
        """Noises number `places` [B] of the endless sequence that `seed` names."""
        key = jax.random.key(self.seed)
        size = (math.prod(self.image_shape),)  # drawn flat, see `losses.rf_targets`
        flat = jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), size))(places)
        return flat.reshape(-1, *self.image_shape)

    def solve(self, params, noise, **changed) -> sampling.Samples:
        """`sampling.solve` with this flow's options, some of them `changed`."""
        options = {"time_grid": self.time_grid} | self.options | changed
        return sampling.solve(models.velocity_fn(self.model, params), noise, self.boundaries, **options)

    def program(self, name: str, function: Callable, params, per_device: int) -> Callable:
        """`function(flow, params, places [per_device])` for all local devices: (first place) -> [devices, ...].

        Compiled once for all weights and time grids, for each `name`.
        """
        devices = jax.local_devices()
        given = parallel.replicate((params, self.time_grid))
        places = np.arange(len(devices) * per_device, dtype=np.int32).reshape(len(devices), per_device)

        def run(given, places):
            params, time_grid = given
            return function(dataclasses.replace(self, time_grid=time_grid), params, places)

        key = name, per_device, self.time_grid is None
        if key not in self._programs:
            self._programs[key] = parallel.map_devices(run).lower(given, places).compile()
        return lambda first: self._programs[key](given, first + places)


def _on_each_device(count: int) -> int:
    """How many of `count` images a device takes, the last ones perhaps for nothing."""
    return -(-count // jax.local_device_count())


def _that_fit(flow: Flow, per_device: int, states: int) -> int:
    """`per_device` images or, down to one, as many as have room on a device with `states` states of each."""
    room = min(TRAJECTORY_BYTES, sampling.trajectory_room())
    return max(1, min(per_device, room // (4 * states * math.prod(flow.image_shape))))


def _saved_states(flow: Flow) -> int:
    """The states of a trajectory that this flow's solver saves, or a few more."""
    return max(sampling.TRAJECTORY_POINTS, flow.options.get("num_scales") or 0) + len(flow.boundaries)


def _progress(firsts: range, what: str):
    return tqdm.tqdm(firsts, desc=what, unit="batch", leave=False, disable=None)


@dataclasses.dataclass
class Cost:
    """What a run of samples has cost so far; `summary` is what goes into metrics.json."""

    images: int = 0
    seconds: float = 0.0
    nfe: list = dataclasses.field(default_factory=list)
    nfe_each: list = dataclasses.field(default_factory=list)

    def add(self, samples: sampling.Samples, images: int, seconds: float):
        """Counts one batch; `samples` with a leading axis of devices."""
        self.images += images
        self.seconds += seconds
        self.nfe.append(np.asarray(samples.nfe))
        self.nfe_each.append(np.asarray(samples.nfe_each).ravel())

    def summary(self) -> dict[str, float | int]:
        """Mean network calls of a batch, of an image (mean and maximum), and seconds for 1000 samples."""
        each = np.concatenate(self.nfe_each)
        return {
            "nfe": float(np.mean(self.nfe)),
            "nfe_mean": float(each.mean()),
            "nfe_max": int(each.max()),
            "seconds_per_1000": 1000 * self.seconds / self.images,
        }


def samples(flow: Flow, params, count: int, batch_size: int, cost: Cost) -> Iterator[np.ndarray]:
    """Yields `count` samples in batches [B, H, W, C], in the data's scaled range, noting in `cost` what they took.

    Compiling is not part of the seconds.

    Raises:
      InputError: the solver could not reach its tolerance.
    """

    def solve(flow, params, places):
        return flow.solve(params, flow.noise(places))

    per_device = _on_each_device(min(batch_size, count))
    batch = flow.program("samples", solve, params, per_device)
    size = per_device * jax.local_device_count()
    for first in _progress(range(0, count, size), "sampling"):
        start = time.perf_counter()
        done = jax.block_until_ready(batch(first))
        cost.add(done, size, time.perf_counter() - start)
        x = np.asarray(done.x).reshape(-1, *flow.image_shape)[: count - first]
        _refuse_if_not_finite(flow, x)
        yield x


def _refuse_if_not_finite(flow, values):
    if not np.isfinite(values).all():
        raise InputError(
            f"samples are not finite with {flow.options}: raise sampling.tol, or the weights are damaged (NaN)"
        )


def sample_quality(
    flow: Flow, params, count: int, batch_size: int, *, network, real, centered: bool
) -> tuple[dict[str, float | int], Float[np.ndarray, "n h w c"]]:
    """Distances between `count` samples and the data set in a feature network, with the samples' cost.

    Args:
      network: a `features.FeatureNetwork`; real: [n, d] its features of the data set.
      centered: whether the flow's images are in [-1, 1] rather than [0, 1].

    Returns:
      The numbers by name, and the first batch of the samples, in [0, 1].
    """
    cost, found, logits, shown = Cost(), [], [], None
    for x in samples(flow, params, count, batch_size, cost):
        unit = datasets.unscale(x, centered)
        shown = unit if shown is None else shown
        images = (255 * unit + 0.5).astype(np.uint8)
        batch_features, batch_logits = network.features_and_logits(images)
        found.append(batch_features)
        logits.append(batch_logits)
    distances = features.sample_distances(network.name, real, np.concatenate(found), np.concatenate(logits))
    return {**distances, **cost.summary()}, shown


@dataclasses.dataclass(frozen=True)
class FlowShape:
    """Straightness and error of a flow over many noises (see `sampling.Straightness`), as NumPy values."""

    straightness: float
    sequential_straightness: float
    truncation_error: float
    ts: np.ndarray
    curve: np.ndarray
    sequential_curve: np.ndarray


def flow_shape(flow: Flow, params, measured, count: int, batch_size: int) -> FlowShape:
    """Straightness over all of time and over the segments between `measured` [k + 1], and global truncation error.

    Over at least `count` noises: all batches are whole, and as large as `batch_size` and memory allow. Streams over
    them; only curves leave the device.

    Raises:
      InputError: this flow's solver, or the exact solve that it is compared with, could not reach its tolerance.
    """
    devices = jax.local_devices()
    per_device = _that_fit(flow, _on_each_device(min(batch_size, count)), _saved_states(flow))

    def measure(flow, params, places):
        solved = flow.solve(params, flow.noise(places), save_trajectory=True)
        return sampling.straightness(solved.ts, solved.xs, measured), solved.x

    def solve_exactly(flow, params, places):
        return flow.solve(params, flow.noise(places), **EXACT).x

    # Two programs: the second is the same for every sampler, and so compiled once for all evaluations of a model.
    name = f"shape over {np.asarray(measured, np.float32).tolist()}"  # which are part of the program
    batch = flow.program(name, measure, params, per_device)
    exact = flow.program("exact", solve_exactly, params, per_device)
    truncation_error = parallel.map_devices(sampling.truncation_error)
    batches = []
    for first in _progress(range(0, count, per_device * len(devices)), "straightness"):
        shape, x = batch(first)
        shape, error = jax.device_get((shape, truncation_error(x, exact(first))))
        _refuse_if_not_finite(flow, shape.total)
        _refuse_if_not_solved(error)
        batches.append((shape, error**2))
    # Every batch and device has the same number of noises, so means of means are means.
    shape, square = jax.tree.map(lambda *parts: np.mean(np.stack(parts), axis=(0, 1)), *batches)
    return FlowShape(
        straightness=float(shape.total),
        sequential_straightness=float(shape.sequential),
        truncation_error=float(np.sqrt(square)),
        ts=batches[0][0].ts[0],  # a mean of times would be a rounding error off the boundaries
        curve=shape.curve,
        sequential_curve=shape.sequential_curve,
    )


def _refuse_if_not_solved(error):
    if not np.isfinite(error).all():
        raise InputError(
            f"truncation error cannot be measured, since this flow cannot be solved at tolerance {EXACT['tol']:g}: "
            "evaluate a checkpoint that was trained longer (eval.begin_step, eval.end_step)"
        )


def trajectory(flow: Flow, params, count: int) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n images h w c"]]:
    """Times [n] and states [n, images, H, W, C] of the first noises' way to their samples.

    `count` images, or as many as fit into TRAJECTORY_BYTES and the memory of the devices: a picture of fewer is better
    than none at the end of an evaluation.
    """

    def solve(flow, params, places):
        solved = flow.solve(params, flow.noise(places), save_trajectory=True)
        return solved.ts, solved.xs

    per_device = _that_fit(flow, _on_each_device(count), _saved_states(flow))
    ts, xs = jax.device_get(flow.program("trajectory", solve, params, per_device)(0))
    return ts[0], np.concatenate(xs, axis=1)[:, :count]


def fine_distances(flow: Flow, params, batch_size: int = 16) -> Float[np.ndarray, "m m"]:
    """The matrix that adaptive divisions are found in, from the flow's own fine trajectories; see `adaptive`.

    Euler's steps are uniform in t whatever the segments are. A boundary on the way of one splits it, since the network
    has another head behind it; the state there is not among those that are compared.

    Raises:
      InputError: the weights give states that are not finite.
    """
    uniform = np.linspace(1.0, 0.0, segments.FINE_STEPS + 1, dtype=np.float32)
    times = np.union1d(uniform, np.float32(flow.boundaries))[::-1]
    fine = {"method": "pc", "predictor": "rf_solver", "num_scales": times.size - 1, "time_grid": times}

    def solve(flow, params, places):
        xs = flow.solve(params, flow.noise(places), save_trajectory=True, **fine).xs
        return xs[np.isin(times, uniform)]

    per_device = _that_fit(flow, _on_each_device(batch_size), times.size)
    batch = flow.program("fine", solve, params, per_device)
    firsts = _progress(range(0, FINE_NOISES, per_device * jax.local_device_count()), "fine trajectories")
    # Exactly FINE_NOISES, so that neither memory nor the number of devices decides what is measured.
    return adaptive.squared_distances(
        xs[:, : FINE_NOISES - place]
        for first in firsts
        for place, xs in zip(range(first, FINE_NOISES, per_device), jax.device_get(batch(first)), strict=False)
    )


def with_time_grid(flow: Flow, params, time_grid: str) -> Flow:
    """`flow`, its fixed grid placed where `sampling.time_grid` says: 'uniform' or 'adaptive' (from these weights).

    Raises:
      InputError: more steps in a segment than can be placed there.
    """
    if time_grid == "uniform" or flow.options["method"] != "pc":
        return flow
    num_scales = flow.options["num_scales"]
    # An error now, not after the trajectories.
    adaptive.shares_of_steps(flow.boundaries, num_scales, segments.FINE_STEPS)
    times = adaptive.adaptive_times(fine_distances(flow, params), flow.boundaries, num_scales)
    return dataclasses.replace(flow, time_grid=times)
