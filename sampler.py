"""A network with segments and a sampler: samples, trajectories and fine trajectories, on all devices of all hosts."""

import dataclasses
import math
import numbers
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from jaxtyping import Array, Float, Int, UInt32

import adaptive
import datasets
import distributed
import models
import runtime
import sampling
import segments
from checkpointing.checkpoint import checkpoint_at
from sampling import SamplerOptions
from utils import InputError

FINE_NOISES = 128  # of the fine trajectories, see `segments.FINE_STEPS`
SAMPLE_BATCH = 64  # images that are solved together where nobody says otherwise
LEAST_STEPS = 16  # that a program of a fixed grid has room for
TRAJECTORY_BYTES = 1 << 30  # most memory of one device for the states of trajectories


@dataclasses.dataclass
class Cost:
    """Accumulates NFE and wall time over batches; `summary` returns the entries of metrics.json."""

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

    def summary(self) -> dict[str, float]:
        """Mean NFE of a batch, mean and maximum NFE of an image, seconds for 1000 samples; of all hosts together."""
        nfe, each = (distributed.gather(np.concatenate(x).astype(np.float32)) for x in (self.nfe, self.nfe_each))
        images, seconds = distributed.gather(np.array([[self.images, self.seconds]], np.float32)).T
        return {
            "nfe": float(np.mean(nfe, dtype=np.float64)),
            "nfe_mean": float(np.mean(each, dtype=np.float64)),
            "nfe_max": int(each.max()),
            "seconds_per_1000": 1000 * float(seconds.max() / images.sum()),
        }


class Programs:
    """Compiled programs by what they compute: each is built once, for all weights, time grids and seeds."""

    def __init__(self) -> None:
        """Holds none."""
        self._compiled: dict[Any, Any] = {}

    def get(self, key: Any, build: Callable[[], Any]) -> Any:
        """The program of this key; built, and kept, where it is new."""
        if key not in self._compiled:
            self._compiled[key] = build()
        return self._compiled[key]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A network without its weights, its segments, and how it is sampled.

    Attributes:
      model: as `models.create_model` makes it.
      boundaries: [k + 1] in t.
      image_shape: (H, W, C).
      options: of the solve.
      seed: of the noises. Noise i is the same for every batch size and number of devices. Like the time grid an
        argument of the compiled programs.
      time_grid: [num_scales + 1] times in t for method "pc"; None: uniform inside each segment. It is an argument of
        the compiled programs, which serve all numbers of steps; there it has times of 0 behind it.
      steps: num_scales as an argument of the compiled programs; None: that of the options.
      programs: shared by samplers of this network and these segments, which `dataclasses.replace` makes of one another.
    """

    model: nn.Module
    boundaries: Float[np.ndarray, "boundaries"]
    image_shape: tuple[int, int, int]
    options: SamplerOptions
    seed: int | UInt32[Array, ""]
    time_grid: Float[Array | np.ndarray, "times"] | None = None
    steps: Int[Array, ""] | None = None
    programs: Programs = dataclasses.field(default_factory=Programs, repr=False, compare=False)

    @property
    def name(self) -> str:
        """As tables call it, such as 'Euler 8'."""
        return self.options.name

    def reference(self) -> "Sampler":
        """This network with the reference solve, on the same segments and noises."""
        return dataclasses.replace(self, options=sampling.REFERENCE, time_grid=None)

    def noise(self, indices: Int[Array | np.ndarray, "b"]) -> Float[Array, "b h w c"]:
        """The noises number `indices` of the endless sequence that `seed` defines."""
        key = distributed.random_key(self.seed)
        size = (math.prod(self.image_shape),)  # drawn flat, see `losses.rf_targets`
        flat = jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), size))(indices)
        return flat.reshape(-1, *self.image_shape)

    def solve(self, params: Any, noise: Float[Array, "b h w c"], *, save_trajectory: bool = False) -> sampling.Samples:
        """`sampling.solve` from `noise`, as this sampler says. Adaptive steps are taken in float32."""
        model = models.in_float32(self.model) if self.options.is_adaptive else self.model
        velocity, options = models.velocity_fn(model, params), self.options.record()
        options |= {} if self.steps is None else {"num_scales": self.steps}
        return sampling.solve(
            velocity, noise, self.boundaries, time_grid=self.time_grid, save_trajectory=save_trajectory, **options
        )

    def program(self, name: str, function: Callable, arguments: tuple[Any, Any]) -> Any:
        """The compiled program that maps `function` over this host's devices.

        Args:
          name: of what `function` computes; programs of one name and one shape of `arguments` are the same.
          function: (sampler, params, indices [b]) -> a tree of arrays.
          arguments: ((params, *`grid_argument`, seed), indices), a copy for each device, as `map_noises` makes them.
        """

        def on_device(arguments: Any, indices: Array) -> Any:
            params, time_grid, steps, seed = arguments
            traced = dataclasses.replace(self, time_grid=time_grid, steps=steps, seed=seed)
            return function(traced, params, indices)

        def build() -> Any:
            mapped: Any = distributed.map_devices(on_device)
            return mapped.lower(*arguments).compile()

        options = dataclasses.replace(self.options, num_scales=None)
        return self.programs.get((name, arguments[1].shape, np.shape(arguments[0][1]), options), build)

    def grid_argument(self) -> tuple[Float[np.ndarray, "times"] | None, Int[np.ndarray, ""] | None]:
        """The times of a fixed grid, as many times of 0 behind them as programs have, and the number of steps."""
        n = self.options.num_scales
        if self.options.is_adaptive or n is None:
            return None, None
        times = segments.step_grid(self.boundaries, n).ts if self.time_grid is None else self.time_grid
        if len(times) != n + 1:
            raise ValueError(f"time_grid has {len(times)} times; num_scales = {n} needs {n + 1}")
        return np.pad(np.asarray(times, np.float32), (0, _most_steps(n) - n)), np.asarray(n, np.int32)

    @property
    def states(self) -> slice:
        """Of the states of a trajectory in a compiled program those up to the last step."""
        steps = self.options.num_scales
        return slice(None) if self.options.is_adaptive or steps is None else slice(steps + 1)

    def map_noises(
        self, name: str, function: Callable, params: Any, count: int, per_device: int, *, all_hosts: bool = True
    ) -> Iterator[tuple[int, Any, float]]:
        """Maps a function over the first `count` noises in batches of `per_device` on each device.

        Compiled before the first batch.

        Args:
          name: of the program, as in `program`, and for the progress bar.
          function: (sampler, params, indices [per_device]) -> a tree of arrays.
          count: noises; the last batch is whole all the same.
          all_hosts: the hosts share every batch, in their order; else this host's devices do it alone.

        Returns:
          An iterator of (index of the batch's first noise, results [local devices, ...], seconds).
        """
        devices = jax.local_device_count()
        host = distributed.this_host() if all_hosts else distributed.Host(0, 1, devices)
        arguments = distributed.replicate((params, *self.grid_argument(), np.asarray(self.seed, np.uint32)))
        share = np.arange(devices * per_device, dtype=np.int32).reshape(devices, per_device)
        indices = share + host.index * share.size
        program = self.program(name, function, (arguments, indices))
        starts = range(0, count, host.count * share.size)

        def batches():
            for first in tqdm.tqdm(starts, desc=name, unit="batch", leave=False, disable=None):
                if jax.process_count() == 1:  # hosts that share samples stop together, between checkpoints
                    runtime.preemption.check()
                began = time.perf_counter()
                results = jax.block_until_ready(program(arguments, first + indices))
                yield first, results, time.perf_counter() - began

        return batches()

    def device_samples(
        self,
        params: Any,
        count: int,
        batch_size: int,
        cost: Cost | None = None,
        *,
        name: str = "sampling",
        noise: Callable | None = None,
    ) -> Iterator[tuple[int, Float[Array, "devices b h w c"]]]:
        """Yields the first noise's index of every batch and this host's samples of it, on its devices.

        All batches are whole, so that the last one has samples beyond `count`. `cost` counts NFE and seconds,
        compilation excluded.

        Args:
          batch_size: over the devices of all hosts.
          name, noise: (sampler, indices) -> the noises to solve from, and a name for it; default: `Sampler.noise`.

        Raises:
          InputError: the solver could not reach its tolerance.
        """

        def solve(sampler: Sampler, params: Any, indices: Array) -> Any:
            solved = sampler.solve(params, (noise or Sampler.noise)(sampler, indices))
            return solved, jnp.isfinite(solved.x).all()

        per_device = _images_per_device(min(batch_size, count), jax.device_count())
        for first, (solved, is_finite), seconds in self.map_noises(name, solve, params, count, per_device):
            if cost is not None:
                cost.add(solved, jax.local_device_count() * per_device, seconds)
            check_finite(is_finite, self)
            yield first, solved.x

    def samples(
        self, params: Any, count: int, batch_size: int, cost: Cost | None = None, **noises: Any
    ) -> Iterator[Float[np.ndarray, "b h w c"]]:
        """Yields exactly `count` samples in the data's scaled range, in batches, all of them on every host.

        Arguments and errors as `device_samples`; the samples of all hosts are gathered, so all must call.
        """
        for first, x in self.device_samples(params, count, batch_size, cost, **noises):
            yield distributed.gather(np.asarray(x).reshape(-1, *self.image_shape))[: count - first]

    def trajectory(self, params: Any, count: int) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n images h w c"]]:
        """Times [n] and states [n, images, H, W, C] of the trajectories of the first noises.

        `count` images, or as many as fit into TRAJECTORY_BYTES and the memory of the devices.
        """

        def solve(sampler: Sampler, params: Any, indices: Array) -> Any:
            solved = sampler.solve(params, sampler.noise(indices), save_trajectory=True)
            return solved.ts, solved.xs

        per_device = self.trajectories_per_device(count, all_hosts=False)
        _, results, _ = next(self.map_noises("trajectory", solve, params, 1, per_device, all_hosts=False))
        ts, xs = jax.device_get(results)
        return ts[0, self.states], np.concatenate(xs, axis=1)[self.states, :count]

    def trajectories_per_device(self, count: int, states: int | None = None, *, all_hosts: bool = True) -> int:
        """Images of each device for a batch of `count`, or as many, at least one, as there is memory for.

        Args:
          states: saved of each image; None: those of a solve with `save_trajectory`.
          all_hosts: whether the devices of all hosts share the batch.
        """
        if states is None:
            states = max(sampling.TRAJECTORY_POINTS, _most_steps(self.options.num_scales or 1)) + len(self.boundaries)
        room = min(TRAJECTORY_BYTES, sampling.trajectory_memory())
        devices = jax.device_count() if all_hosts else jax.local_device_count()
        return max(1, min(_images_per_device(count, devices), room // (4 * states * math.prod(self.image_shape))))

    def fine_distances(self, params: Any, batch_size: int = 16) -> Float[np.ndarray, "m m"]:
        """Squared distances between the states of the fine trajectories, from which `adaptive` finds boundaries.

        Raises:
          InputError: states that are not finite.
        """

        def solve(sampler: Sampler, params: Any, indices: Array) -> Any:
            velocity = models.velocity_fn(models.in_float32(sampler.model), params)
            return adaptive.fine_trajectory(velocity, sampler.noise(indices), sampler.boundaries)

        states = segments.FINE_STEPS + len(self.boundaries)
        per_device = self.trajectories_per_device(batch_size, states, all_hosts=False)
        batches = self.map_noises("fine trajectories", solve, params, FINE_NOISES, per_device, all_hosts=False)
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
        num_scales = self.options.num_scales
        if time_grid == "uniform" or num_scales is None:
            return self
        # Raises here rather than after the trajectories.
        adaptive.fine_step_spans(self.boundaries, num_scales, segments.FINE_STEPS)
        times = adaptive.adaptive_times(self.fine_distances(params), self.boundaries, num_scales)
        return dataclasses.replace(self, time_grid=times)


def _most_steps(num_scales: int) -> int:
    """The steps that a program has room for which takes `num_scales`: a power of two, so that few programs do."""
    return max(LEAST_STEPS, 1 << (num_scales - 1).bit_length())


def check_finite(is_finite: Any, sampler: Sampler) -> None:
    """Raises InputError unless all of `is_finite` is true, of values that `sampler` computed."""
    if not np.all(is_finite):
        raise InputError(
            f"samples are not finite with {sampler.options.record()}: the tolerance is out of reach, or the weights "
            "are damaged (NaN); raise sampling.tol, or use a checkpoint that was trained longer"
        )


# --- a trained model by itself ----------------------------------------------------------------------------------------


def sampler_options(
    k: int, *, num_scales: int | None = None, tol: float | None = None, predictor: str = "rf_solver"
) -> SamplerOptions:
    """The options of a `Sampler` of k segments: adaptive steps to `tol`, or `num_scales` of `predictor`.

    Raises:
      InputError: both are given, or one that cannot work.
    """
    if tol is not None and num_scales is not None:
        raise InputError("give num_scales for fixed steps or tol for adaptive ones, not both")
    if tol is not None:
        if not isinstance(tol, numbers.Real) or not 1e-12 <= tol < math.inf:
            raise InputError(f"tol = {tol!r}: use a number from 1e-12, such as 1e-3")
        return SamplerOptions("ode", tol=float(tol))
    if predictor not in sampling.PREDICTORS:
        raise InputError(f"predictor = {predictor!r}: use one of {', '.join(sampling.PREDICTORS)}")
    if not isinstance(num_scales, numbers.Integral) or num_scales < k:
        raise InputError(f"num_scales = {num_scales!r}: use a whole number of steps, at least {k}, one a segment")
    return SamplerOptions("pc", predictor=predictor, num_scales=int(num_scales))


@dataclasses.dataclass
class TrainedSampler:
    """A trained model that samples by itself, on all local devices; `load` makes it.

    Attributes:
      network: the network with its segments; what it is sampled by is given to each call.
      params: the EMA of the weights.
      centered: whether the network's images are in [-1, 1] rather than [0, 1].
      steps: the default number of Euler steps: k, or m k for a model distilled to m steps a segment.
      batch_size: the most images that are solved together. A program is compiled for each size of batch once.
      nfe: network calls for an image in the last call of `sample`; of adaptive steps the mean over batches.
    """

    network: Sampler
    params: Any
    centered: bool
    steps: int
    batch_size: int = SAMPLE_BATCH
    nfe: float | None = None

    @property
    def boundaries(self) -> Float[np.ndarray, "boundaries"]:
        """[k + 1] in t, from 1 to 0: the segments that the model was trained on."""
        return self.network.boundaries

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.network.image_shape

    def sampler(
        self,
        *,
        seed: int = 0,
        num_scales: int | None = None,
        tol: float | None = None,
        predictor: str = "rf_solver",
    ) -> Sampler:
        """The network with noises of `seed` and the steps that `sampler_options` takes. It shares compiled programs.

        Raises:
          InputError: steps or a seed that cannot work.
        """
        if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**31:
            raise InputError(f"seed = {seed!r}: use a whole number from 0 to 2147483647")
        if num_scales is None and tol is None:
            num_scales = self.steps
        options = sampler_options(len(self.boundaries) - 1, num_scales=num_scales, tol=tol, predictor=predictor)
        return dataclasses.replace(self.network, seed=int(seed), options=options)

    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        num_scales: int | None = None,
        tol: float | None = None,
        predictor: str = "rf_solver",
    ) -> Float[np.ndarray, "count h w c"]:
        """`count` images in [0, 1], from the noises 0 to count - 1 of `seed`: those of `--mode=sample` with that seed.

        Args:
          num_scales: fixed steps in all, default: `steps`.
          tol: take adaptive steps to this tolerance instead.
          predictor: of the fixed steps, one of `sampling.PREDICTORS`.

        Raises:
          InputError: an argument that cannot work, or samples that are not finite.
        """
        if not isinstance(count, numbers.Integral) or count < 1:
            raise InputError(f"count = {count!r}: use a whole number of images, at least 1")
        cost, sampler = Cost(), self.sampler(seed=seed, num_scales=num_scales, tol=tol, predictor=predictor)
        batches = sampler.samples(self.params, int(count), self.batch_size, cost)
        images = np.concatenate([datasets.unscale(x, self.centered) for x in batches])
        self.nfe = cost.summary()["nfe"]
        return images


def load(path: epath.PathLike, *, batch_size: int = SAMPLE_BATCH) -> TrainedSampler:
    """The sampler of a trained model, without configuration or flags.

    Args:
      path: as in `checkpoint_at`: an exported model, or a run's folder, stage or checkpoint.
      batch_size: the most images that are solved together, on all local devices.

    Raises:
      InputError: nothing there, or a damaged or foreign file; JAX computes in float64.
    """
    distributed.check_jax_settings()
    if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise InputError(f"batch_size = {batch_size!r}: use a whole number of images, at least 1")
    checkpoint = checkpoint_at(path)
    network = checkpoint.network
    weights = checkpoint.load(network)
    boundaries, steps = checkpoint.boundaries, checkpoint.k * checkpoint.distill_steps
    options = sampler_options(checkpoint.k, num_scales=steps)
    drawn = Sampler(network, boundaries, network.image_shape, options, seed=0)
    return TrainedSampler(drawn, weights.ema_params, network.centered, steps, int(batch_size))


def _images_per_device(count: int, devices: int) -> int:
    return -(-count // devices)
