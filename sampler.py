"""A network with segments and a sampler: samples, trajectories and fine trajectories, on all local devices."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tqdm
from jaxtyping import Array, Float, Int

import adaptive
import models
import parallel
import sampling
import segments
from utils import InputError

FINE_NOISES = 128  # of the fine trajectories, see `segments.FINE_STEPS`
TRAJECTORY_BYTES = 1 << 30  # most memory of one device for the states of trajectories
PREDICTOR_NAMES = {"rf_solver": "Euler", "rf_solver_heun": "Heun", "rf_reinterpolate": "Reinterpolate"}


@dataclasses.dataclass
class Cost:
    """Network calls and seconds of a run of samples; `summary` is what metrics.json holds."""

    images: int = 0
    seconds: float = 0.0
    nfe: list[np.ndarray] = dataclasses.field(default_factory=list)
    nfe_each: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(self, samples: sampling.Samples, images: int, seconds: float) -> None:
        """Counts one batch; the arrays of `samples` have a leading axis of devices."""
        self.images += images
        self.seconds += seconds
        self.nfe.append(np.asarray(samples.nfe))
        self.nfe_each.append(np.asarray(samples.nfe_each).ravel())

    def summary(self) -> dict[str, float | int]:
        """Mean NFE of a batch, mean and maximum NFE of an image, seconds for 1000 samples."""
        each = np.concatenate(self.nfe_each)
        return {
            "nfe": float(np.mean(self.nfe)),
            "nfe_mean": float(each.mean()),
            "nfe_max": int(each.max()),
            "seconds_per_1000": 1000 * self.seconds / self.images,
        }


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A network without its weights, its segments, and how it is sampled; compiled once for all checkpoints.

    Attributes:
      model: as `models.create_model` makes it.
      boundaries: [k + 1] in t.
      image_shape: (H, W, C).
      options: the keywords of `sampling.solve`: method, tol, num_scales, predictor, ...
      seed: of the noises. Noise i is the same for every batch size and number of devices.
      time_grid: [num_scales + 1] times in t for method "pc"; None: uniform inside each segment. It is an argument of
        the compiled programs, since every checkpoint may have its own.
    """

    model: nn.Module
    boundaries: Float[np.ndarray, "boundaries"]
    image_shape: tuple[int, int, int]
    options: dict[str, Any]
    seed: int
    time_grid: Float[Array | np.ndarray, "times"] | None = None
    _programs: dict = dataclasses.field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The sampler as tables call it: 'ODE', or the predictor and its steps, such as 'Euler 8'."""
        if self.options["method"] == "ode":
            return "ODE"
        predictor = self.options["predictor"]
        return f"{PREDICTOR_NAMES.get(predictor, predictor)} {self.options['num_scales']}"

    def reference(self) -> "Sampler":
        """This network with the reference solve, on the same segments and noises."""
        return dataclasses.replace(self, options=sampling.REFERENCE, time_grid=None)

    def noise(self, indices: Int[Array | np.ndarray, "b"]) -> Float[Array, "b h w c"]:
        """The noises number `indices` of the endless sequence that `seed` defines."""
        key = jax.random.key(self.seed)
        size = (math.prod(self.image_shape),)  # drawn flat, see `losses.rf_targets`
        flat = jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), size))(indices)
        return flat.reshape(-1, *self.image_shape)

    def solve(self, params: Any, noise: Float[Array, "b h w c"], **options: Any) -> sampling.Samples:
        """`sampling.solve` from `noise` with this sampler's options, some of them replaced by `options`."""
        options = {"time_grid": self.time_grid} | self.options | options
        return sampling.solve(models.velocity_fn(self.model, params), noise, self.boundaries, **options)

    def map_noises(
        self, name: str, function: Callable, params: Any, count: int, per_device: int
    ) -> Iterator[tuple[int, Any, float]]:
        """Maps a function over the first `count` noises in batches of `per_device` on each local device.

        Compiled once for all weights and time grids, before the first batch.

        Args:
          name: of the program, for the progress bar and the cache of programs.
          function: (sampler, params, indices [per_device]) -> a tree of arrays.
          count: noises; the last batch is whole all the same.

        Returns:
          An iterator of (index of the batch's first noise, results [devices, ...], seconds).
        """
        devices = jax.local_device_count()
        arguments = parallel.replicate((params, self.time_grid))
        indices = np.arange(devices * per_device, dtype=np.int32).reshape(devices, per_device)

        def on_device(arguments: Any, indices: Array) -> Any:
            params, time_grid = arguments
            return function(dataclasses.replace(self, time_grid=time_grid), params, indices)

        key = name, per_device, self.time_grid is None, tuple(sorted(self.options.items()))
        if key not in self._programs:
            program: Any = parallel.map_devices(on_device)
            self._programs[key] = program.lower(arguments, indices).compile()
        starts = range(0, count, indices.size)

        def batches():
            for first in tqdm.tqdm(starts, desc=name, unit="batch", leave=False, disable=None):
                began = time.perf_counter()
                results = jax.block_until_ready(self._programs[key](arguments, first + indices))
                yield first, results, time.perf_counter() - began

        return batches()

    def samples(
        self, params: Any, count: int, batch_size: int, cost: Cost | None = None
    ) -> Iterator[Float[np.ndarray, "b h w c"]]:
        """Yields `count` samples in batches of `batch_size` over all local devices, in the data's scaled range.

        `cost` counts NFE and seconds, compilation excluded.

        Raises:
          InputError: the solver could not reach its tolerance.
        """

        def solve(sampler: Sampler, params: Any, indices: Array) -> Any:
            return sampler.solve(params, sampler.noise(indices))

        per_device = _images_per_device(min(batch_size, count))
        for first, solved, seconds in self.map_noises("sampling", solve, params, count, per_device):
            x = np.asarray(solved.x).reshape(-1, *self.image_shape)
            if cost is not None:
                cost.add(solved, len(x), seconds)
            check_finite(x, self)
            yield x[: count - first]

    def trajectory(self, params: Any, count: int) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n images h w c"]]:
        """Times [n] and states [n, images, H, W, C] of the trajectories of the first noises.

        `count` images, or as many as fit into TRAJECTORY_BYTES and the memory of the devices.
        """

        def solve(sampler: Sampler, params: Any, indices: Array) -> Any:
            solved = sampler.solve(params, sampler.noise(indices), save_trajectory=True)
            return solved.ts, solved.xs

        per_device = self.trajectories_per_device(count)
        _, results, _ = next(self.map_noises("trajectory", solve, params, 1, per_device))
        ts, xs = jax.device_get(results)
        return ts[0], np.concatenate(xs, axis=1)[:, :count]

    def trajectories_per_device(self, count: int, states: int | None = None) -> int:
        """Images of each device for a batch of `count`, or as many, at least one, as there is memory for.

        Args:
          states: saved of each image; None: those of a solve with `save_trajectory`.
        """
        if states is None:
            states = max(sampling.TRAJECTORY_POINTS, self.options.get("num_scales") or 0) + len(self.boundaries)
        room = min(TRAJECTORY_BYTES, sampling.trajectory_memory())
        return max(1, min(_images_per_device(count), room // (4 * states * math.prod(self.image_shape))))

    def fine_distances(self, params: Any, batch_size: int = 16) -> Float[np.ndarray, "m m"]:
        """Squared distances between the states of the fine trajectories, from which `adaptive` finds boundaries.

        Raises:
          InputError: states that are not finite.
        """

        def solve(sampler: Sampler, params: Any, indices: Array) -> Any:
            velocity = models.velocity_fn(sampler.model, params)
            return adaptive.fine_trajectory(velocity, sampler.noise(indices), sampler.boundaries)

        per_device = self.trajectories_per_device(batch_size, states=segments.FINE_STEPS + len(self.boundaries))
        batches = self.map_noises("fine trajectories", solve, params, FINE_NOISES, per_device)
        # Exactly FINE_NOISES, so that neither memory nor the number of devices changes the result.
        return adaptive.squared_distances(
            xs[:, : FINE_NOISES - start]
            for first, results, _ in batches
            for start, xs in zip(range(first, FINE_NOISES, per_device), jax.device_get(results), strict=False)
        )

    def with_time_grid(self, params: Any, time_grid: str) -> "Sampler":
        """This sampler with its fixed grid placed as `sampling.time_grid` says: 'uniform', or 'adaptive' to `params`.

        Raises:
          InputError: more steps in a segment than can be placed there.
        """
        if time_grid == "uniform" or self.options["method"] != "pc":
            return self
        num_scales = self.options["num_scales"]
        # Raises here rather than after the trajectories.
        adaptive.fine_step_spans(self.boundaries, num_scales, segments.FINE_STEPS)
        times = adaptive.adaptive_times(self.fine_distances(params), self.boundaries, num_scales)
        return dataclasses.replace(self, time_grid=times)


def check_finite(values: Any, sampler: Sampler) -> None:
    """Raises InputError if `values`, computed by `sampler`, are not all finite."""
    if not np.isfinite(values).all():
        raise InputError(
            f"samples are not finite with {sampler.options}: the tolerance is out of reach, or the weights are damaged "
            "(NaN); raise sampling.tol, or use a checkpoint that was trained longer"
        )


def _images_per_device(count: int) -> int:
    return -(-count // jax.local_device_count())
