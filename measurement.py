"""Sampling a network on all local devices, and what its flow is worth: quality, NFE, seconds, straightness, error."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.jax_utils
import jax
import numpy as np
import tqdm
from jaxtyping import Array, Float

import adaptive
import datasets
import evaluation
import models
import sampling
from utils import InputError

FINE_STEPS, FINE_NOISES = 500, 128  # of the trajectories that adaptive divisions are found on (design.md section 3)
# What global truncation error is measured against.
EXACT = {"method": "ode", "tol": 1e-6, "solver": "dopri5", "error_norm": "batch"}
TRAJECTORY_BYTES = 1 << 30  # of one device, for the states behind a straightness curve


@dataclasses.dataclass(frozen=True)
class Flow:
    """A network, without weights, and how it is sampled. What was compiled for it once serves all checkpoints.

    Attributes:
      model: as `models.create_model` makes it.
      boundaries: [k + 1] in t.
      image_shape: (H, W, C).
      options: the keywords of `sampling.solve`: method, tol, num_scales, predictor, ...
      seed: of the noises. Noise i is the same for every batch size and number of devices.
    """

    model: Any
    boundaries: np.ndarray
    image_shape: tuple[int, int, int]
    options: dict[str, Any]
    seed: int
    _programs: dict = dataclasses.field(default_factory=dict, repr=False)

    def noise(self, places) -> Float[Array, "b h w c"]:
        """Noises number `places` [B] of the endless sequence that `seed` names."""
        key = jax.random.key(self.seed)
        size = (math.prod(self.image_shape),)  # drawn flat, see `losses.rf_targets`
        flat = jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), size))(places)
        return flat.reshape(-1, *self.image_shape)

    def solve(self, params, noise, **changed) -> sampling.Samples:
        """`sampling.solve` with this flow's options, some of them `changed`."""
        return sampling.solve(models.velocity_fn(self.model, params), noise, self.boundaries, **self.options | changed)

    def program(self, name: str, function: Callable, params, per_device: int) -> Callable:
        """`function(params, places [per_device])` for all local devices, compiled: (first place) -> [devices, ...]."""
        devices = jax.local_devices()
        params = flax.jax_utils.replicate(params, devices)
        shape = (len(devices), per_device)
        places = np.arange(len(devices) * per_device, dtype=np.int32).reshape(shape)
        if (name, per_device) not in self._programs:
            compiled = jax.pmap(function, devices=devices).lower(params, places).compile()
            self._programs[name, per_device] = compiled
        return lambda first: self._programs[name, per_device](params, first + places)

    def changed(self, **options) -> "Flow":
        """The same network sampled otherwise."""
        return dataclasses.replace(self, options=self.options | options, _programs={})


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
    per_device = -(-min(batch_size, count) // jax.local_device_count())
    batch = flow.program("samples", lambda params, places: flow.solve(params, flow.noise(places)), params, per_device)
    size = per_device * jax.local_device_count()
    for first in _progress(range(0, count, size), "sampling"):
        start = time.perf_counter()
        done = jax.block_until_ready(batch(first))
        cost.add(done, size, time.perf_counter() - start)
        x = np.asarray(done.x).reshape(-1, *flow.image_shape)[: count - first]
        if not np.isfinite(x).all():
            raise InputError(
                f"samples are not finite with {flow.options}: raise sampling.tol, or the weights are damaged (NaN)"
            )
        yield x


def sample_quality(
    flow: Flow, params, count: int, batch_size: int, *, network, real, centered: bool
) -> tuple[dict[str, float | int], Float[np.ndarray, "n h w c"]]:
    """Distances between `count` samples and the data set in a feature network, with the samples' cost.

    Args:
      network: an `evaluation.FeatureNetwork`; real: [n, d] its features of the data set.
      centered: whether the flow's images are in [-1, 1] rather than [0, 1].

    Returns:
      The numbers by name, and the first batch of the samples, in [0, 1].
    """
    cost, features, logits, shown = Cost(), [], [], None
    for x in samples(flow, params, count, batch_size, cost):
        unit = datasets.unscale(x, centered)
        shown = unit if shown is None else shown
        images = (255 * unit + 0.5).astype(np.uint8)
        batch_features, batch_logits = network.features_and_logits(images)
        features.append(batch_features)
        logits.append(batch_logits)
    distances = evaluation.sample_distances(network.name, real, np.concatenate(features), np.concatenate(logits))
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

    Streams over batches; only curves leave the device.
    """
    states = max(sampling.TRAJECTORY_POINTS, flow.options.get("num_scales") or 0) + len(flow.boundaries)
    fits = TRAJECTORY_BYTES // (4 * states * int(np.prod(flow.image_shape)))
    devices = jax.local_device_count()
    per_device = int(np.clip(-(-min(batch_size, count) // devices), 1, max(1, fits)))

    def measure(params, places):
        solved = flow.solve(params, flow.noise(places), save_trajectory=True)
        return sampling.straightness(solved.ts, solved.xs, measured), solved.x

    def solve_exactly(params, places):
        return flow.solve(params, flow.noise(places), **EXACT).x

    # Two programs: the second is the same for every sampler, and so compiled once for all evaluations of a model.
    name = f"shape over {np.asarray(measured, np.float32).tolist()}"  # which are part of the program
    batch = flow.program(name, measure, params, per_device)
    exact = flow.program("exact", solve_exactly, params, per_device)
    batches = []
    for first in _progress(range(0, count, per_device * devices), "straightness"):
        shape, x = batch(first)
        errors = [sampling.truncation_error(*pair) ** 2 for pair in zip(x, exact(first), strict=True)]
        batches.append((jax.device_get(shape), np.asarray(errors)))
    # Every batch and device has the same number of noises, so means of means are means.
    shape, square = jax.tree.map(lambda *parts: np.mean(np.stack(parts), axis=(0, 1)), *batches)
    return FlowShape(
        straightness=float(shape.total),
        sequential_straightness=float(shape.sequential),
        truncation_error=float(np.sqrt(square)),
        ts=shape.ts,
        curve=shape.curve,
        sequential_curve=shape.sequential_curve,
    )


def trajectory(flow: Flow, params, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Times [n] and states [n, count, H, W, C] of the first `count` noises' way to their samples."""
    devices = jax.local_device_count()
    per_device = -(-count // devices)

    def solve(params, places):
        solved = flow.solve(params, flow.noise(places), save_trajectory=True)
        return solved.ts, solved.xs

    ts, xs = jax.device_get(flow.program("trajectory", solve, params, per_device)(0))
    return ts[0], np.concatenate(xs, axis=1)[:, :count]


def fine_distances(flow: Flow, params, batch_size: int = 16) -> Float[np.ndarray, "m m"]:
    """The matrix that adaptive divisions are found in, from the flow's own fine trajectories; see `adaptive`."""
    fine = dataclasses.replace(
        flow, options={"method": "pc", "predictor": "rf_solver", "num_scales": FINE_STEPS}, _programs={}
    )
    per_device = -(-batch_size // jax.local_device_count())
    size = per_device * jax.local_device_count()

    def solve(params, places):
        return fine.solve(params, fine.noise(places), save_trajectory=True).xs

    batch = fine.program("fine", solve, params, per_device)
    firsts = _progress(range(0, FINE_NOISES, size), "fine trajectories")
    return adaptive.squared_distances(np.concatenate(jax.device_get(batch(first)), axis=1) for first in firsts)


def with_time_grid(flow: Flow, params, time_grid: str) -> Flow:
    """`flow`, its fixed grid placed where `sampling.time_grid` says: 'uniform' or 'adaptive' (from these weights)."""
    if time_grid == "uniform" or flow.options["method"] != "pc":
        return flow
    times = adaptive.adaptive_times(fine_distances(flow, params), flow.boundaries, flow.options["num_scales"])
    return flow.changed(time_grid=times)
