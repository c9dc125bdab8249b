"""All numbers of one checkpoint: distances between samples and data, straightness, truncation error.

Distances compare the features of a network (`metrics.feature_networks`), and every figure carries its name: 'fid',
'kid' and 'is' are Inception's, 'fid_digits_classifier' and so on another network's (docs/method.md, section 11).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

import datasets
import distributed
import utils
from metrics import distances, reference, tfgan
from metrics.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from metrics.feature_networks import FeatureNetwork
from metrics.floor import Floor
from metrics.reference import RealData, feature_distances
from metrics.straightness import straightness
from models.weights import fingerprint
from sampler import Cost, Sampler, check_finite
from tracking import plots

__all__ = [
    "DrawnSamples",
    "Protocol",
    "TrajectoryMetrics",
    "draw_samples",
    "evaluate_checkpoint",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "rms_to_reference",
    "sample_quality",
    "settings",
    "trajectory_metrics",
]

SHOWN_IMAGES = 64
SHOWN_PAIRS = 16  # of samples and the training images nearest to them


# --- numbers of a sampler with weights --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DrawnSamples:
    """What is kept of samples: features and logits of all, the first of them as images, and what they cost."""

    features: Float[np.ndarray, "n d"]
    logits: Float[np.ndarray, "n classes"]
    images: UInt8[np.ndarray, "m h w c"]
    cost: Cost


def draw_samples(
    sampler: Sampler,
    params: Any,
    count: int,
    batch_size: int,
    *,
    network: FeatureNetwork,
    centered: bool,
    kept_images: int = SHOWN_IMAGES,
) -> DrawnSamples:
    """The features of exactly `count` samples, each once, made by all hosts together and the same on all of them.

    Samples are rounded to the 256 levels of a saved image. They stay on the devices; features leave them, and the first
    `kept_images` images.

    Args:
      batch_size: over the devices of all hosts.
      centered: whether the sampler's images are in [-1, 1] rather than [0, 1].

    Raises:
      InputError: the solver could not reach its tolerance.
    """
    cost, images = Cost(), []
    arrays: list[np.ndarray] = []
    for first, x in sampler.device_samples(params, count, batch_size, cost):
        levels = _levels_program(centered)(x)
        found = distributed.gather(network.measure(levels))
        arrays = arrays or [np.empty((count, part.shape[1]), np.float32) for part in found]
        for array, part in zip(arrays, found, strict=True):
            array[first : first + len(part)] = part[: count - first]
        if first < kept_images:
            images.append(distributed.gather(np.asarray(levels).reshape(-1, *sampler.image_shape)))
    features_of_all, logits = arrays
    return DrawnSamples(features_of_all, logits, np.concatenate(images)[: min(kept_images, count)], cost)


@functools.cache
def _levels_program(centered: bool):
    return distributed.map_devices(functools.partial(datasets.levels, centered=centered))


def sample_quality(
    sampler: Sampler, params: Any, count: int, batch_size: int, *, real: RealData, centered: bool
) -> tuple[dict[str, float], Float[np.ndarray, "n h w c"]]:
    """Distances between `count` samples and the data, and what the samples cost; as `draw_samples`.

    Args:
      real: what the samples are compared with.

    Returns:
      The numbers by name, and SHOWN_IMAGES of the samples, in [0, 1].

    Raises:
      InputError: the solver could not reach its tolerance.
    """
    samples = draw_samples(sampler, params, count, batch_size, network=real.network, centered=centered)
    return _quality(real, samples), samples.images / np.float32(255)


def _quality(real: RealData, samples: DrawnSamples) -> dict[str, float]:
    has_classes = samples.logits.shape[1] > 1
    score = {f"is{real.network.suffix}": inception_score(samples.logits)} if has_classes else {}
    return {**feature_distances(real, samples.features), **score, **samples.cost.summary()}


def _precision_recall(real: RealData, samples: DrawnSamples, count: int) -> dict[str, float]:
    """Precision and recall of at most `count` samples and as many images; nothing for 0."""
    if not count or real.features is None or min(len(real.features), len(samples.features)) <= reference.NEIGHBOURS:
        return {}
    images, radii = real.neighbourhood(count)
    fake = samples.features[reference.spread(len(samples.features), count)]
    found = precision_recall(images, fake, reference.NEIGHBOURS, real_radii=radii)
    return {f"{name}{real.network.suffix}": value for name, value in zip(("precision", "recall"), found, strict=True)}


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Distances of samples to the data set's images nearest to them, and the numbers of these."""

    distances: Float[np.ndarray, "n"]
    images: Int[np.ndarray, "n"]


def _nearest(real: RealData, samples: DrawnSamples, count: int) -> dict[str, Nearest]:
    """{'features': ..., 'pixels': ...} of the first `count` samples, of those that can be compared."""
    found = {}
    if count and real.features is not None:
        apart, rows = distances.nearest(samples.features[:count], distances.blocks(real.features))
        found["features"] = Nearest(apart, real.numbers[rows])
    if count and real.images is not None:
        flat = samples.images[:count].reshape(-1, math.prod(samples.images.shape[1:]))
        apart, rows = distances.nearest(flat, distances.blocks(real.images.reshape(-1, flat.shape[1])))
        found["pixels"] = Nearest(apart / (255 * math.sqrt(flat.shape[1])), rows)
    return found


def _nearest_metrics(real: RealData, found: dict[str, Nearest]) -> dict[str, float]:
    """Means over the samples, and the smallest: in pixels an RMS from 0 to 1."""
    names = {"features": f"nearest_features{real.network.suffix}", "pixels": "nearest_pixels"}
    means = {names[kind]: float(nearest.distances.mean()) for kind, nearest in found.items()}
    return means | {f"{names[kind]}_min": float(nearest.distances.min()) for kind, nearest in found.items()}


def _draw_nearest(path: epath.Path, real: RealData, samples: DrawnSamples, found: dict[str, Nearest]) -> None:
    """Draws the samples that are closest to images of the data set beside these."""
    if real.images is None or not found:
        return
    order = np.argsort(found["pixels"].distances)[:SHOWN_PAIRS]
    rows = {"sample": samples.images[order]}
    for kind, nearest in found.items():
        rows[f"nearest in {kind}"] = real.images[nearest.images[order]]
    plots.draw_rows(path, rows)


@dataclasses.dataclass(frozen=True)
class TrajectoryMetrics:
    """Straightness over many noises (see `metrics.straightness.Straightness`), as NumPy values."""

    straightness: float
    sequential_straightness: float
    ts: Float[np.ndarray, "n"]
    curve: Float[np.ndarray, "n-1"]
    sequential_curve: Float[np.ndarray, "n-1"]


def trajectory_metrics(
    sampler: Sampler, params: Any, boundaries: Any, count: int, batch_size: int
) -> TrajectoryMetrics:
    """Straightness over all of time, and over the segments between `boundaries` [k + 1].

    A mean over `count` noises or a few more: all batches are whole, and as large as `batch_size` and memory allow. Only
    curves leave the device.

    Raises:
      InputError: the solver could not reach its tolerance.
    """

    def measure(sampler: Sampler, params: Any, indices: jax.Array) -> Any:
        solved: Any = sampler.solve(params, sampler.noise(indices), save_trajectory=True)
        return straightness(solved.ts, solved.xs, boundaries)

    name = f"straightness over {' '.join(f'{b:.9g}' for b in boundaries)}"  # they are part of the program
    per_device = sampler.trajectories_per_device(min(batch_size, count))
    runs = sampler.map_noises(name, measure, params, count, per_device)
    batches = [distributed.gather(jax.device_get(curves)) for _, curves, _ in runs]
    # Every batch and device has the same number of noises, so means of means are means.
    mean = jax.tree.map(lambda *parts: np.mean(np.stack(parts), axis=(0, 1)), *batches)
    check_finite(np.isfinite(mean.total), sampler)
    ts = batches[0].ts[0, sampler.states]  # a mean of times would be a rounding error off the boundaries
    return TrajectoryMetrics(
        straightness=float(mean.total),
        sequential_straightness=float(mean.sequential),
        ts=ts,
        curve=mean.curve[: ts.size - 1],
        sequential_curve=mean.sequential_curve[: ts.size - 1],
    )


def reference_samples(sampler: Sampler, params: Any, count: int, batch_size: int) -> list[Float[np.ndarray, "_ h w c"]]:
    """The samples of the first `count` noises solved at tolerance 1e-6, whatever the sampler's options are, in batches.

    Raises:
      InputError: the solver could not reach its tolerance.
    """
    return list(sampler.reference().samples(params, count, batch_size))


def rms_to_reference(
    sampler: Sampler, params: Any, reference: Sequence[Float[np.ndarray, "_ h w c"]], batch_size: int
) -> float:
    """RMS over pixels and noises of (sample - `reference_samples` of the same noises, in batches of `batch_size`).

    To those of the sampler's own network and weights it is the global truncation error (docs/method.md, section 6); to
    its teacher's the distance to the teacher's own samples.

    Raises:
      InputError: the solver could not reach its tolerance.
    """
    count = sum(map(len, reference))
    samples = sampler.samples(params, count, batch_size)
    squares = sum(np.sum(np.square(x - y, dtype=np.float64)) for x, y in zip(samples, reference, strict=True))
    return float(np.sqrt(squares / (count * math.prod(sampler.image_shape))))


# --- one checkpoint ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Evaluation settings for one checkpoint.

    Attributes:
      num_samples: behind the distances to the data.
      straightness_samples: noises behind straightness, truncation error and the distance to the teacher.
      batch_size: over the devices of all hosts.
      boundaries: [k + 1] in t, of the segments that sequential straightness is measured over.
      centered: whether images are in [-1, 1] rather than [0, 1].
      time_grid: of the fixed grid: 'uniform', or 'adaptive' to the weights.
      save_trajectory: whether to keep one batch's trajectory and its picture.
      precision_recall_samples: at most so many samples and images behind precision and recall; 0: not measured.
      nearest_samples: samples whose nearest training images are searched; 0: none.
      floor: of the distances, where it is known.
    """

    num_samples: int
    straightness_samples: int
    batch_size: int
    boundaries: Float[np.ndarray, "boundaries"]
    centered: bool
    time_grid: str = "uniform"
    save_trajectory: bool = False
    precision_recall_samples: int = 0
    nearest_samples: int = 0
    floor: Floor | None = None


def evaluate_checkpoint(
    sampler: Sampler,
    params: Any,
    protocol: Protocol,
    real: RealData,
    folder: epath.Path,
    references: dict[str, Callable[[], list[Float[np.ndarray, "_ h w c"]]]],
) -> dict[str, float]:
    """The numbers of one checkpoint by their names in metrics.json; pictures and curves go into `folder`.

    All hosts measure together and return the same; the first one draws.

    Args:
      references: `reference_samples` of straightness_samples noises, by the name of the distance to them:
        'truncation_error' and, where there is a teacher, 'rms_to_teacher'. Several samplers share them.

    Raises:
      InputError: a solver could not reach its tolerance.
    """
    sampler = sampler.with_time_grid(params, protocol.time_grid)
    count, batch_size = protocol.straightness_samples, protocol.batch_size
    metrics = trajectory_metrics(sampler, params, protocol.boundaries, count, batch_size)
    errors = {name: rms_to_reference(sampler, params, exact(), batch_size) for name, exact in references.items()}
    samples = draw_samples(
        sampler,
        params,
        protocol.num_samples,
        batch_size,
        network=real.network,
        centered=protocol.centered,
        kept_images=max(SHOWN_IMAGES, protocol.nearest_samples),
    )
    quality = _quality(real, samples)
    if real.network.name == "inception" and real.features is not None and len(real.features) == real.count:
        quality |= tfgan.beside(quality, real.features, samples.features, samples.logits)
    nearest = _nearest(real, samples, protocol.nearest_samples)
    if distributed.is_first_host():
        plots.draw_images(folder / "samples.png", samples.images[:SHOWN_IMAGES] / np.float32(255))
        _draw_nearest(folder / "nearest.png", real, samples, nearest)
        _keep_straightness(metrics, protocol.boundaries, folder)
        if protocol.save_trajectory:
            _keep_trajectory(sampler, params, protocol, folder)
    straightness = {
        "straightness": metrics.straightness,
        "sequential_straightness": metrics.sequential_straightness,
    }
    return {
        **quality,
        **straightness,
        **errors,
        **_precision_recall(real, samples, protocol.precision_recall_samples),
        **_nearest_metrics(real, nearest),
        **(protocol.floor.metrics() if protocol.floor else {}),
    }


def _keep_trajectory(sampler: Sampler, params: Any, protocol: Protocol, folder: epath.Path) -> None:
    ts, xs = sampler.trajectory(params, min(protocol.batch_size, SHOWN_IMAGES))
    utils.write_arrays(folder / "trajectory.npz", ts=ts, xs=xs)
    plots.draw_trajectories(folder / "trajectory.png", ts, xs, lambda x: datasets.unscale(x, protocol.centered))


def _keep_straightness(metrics: TrajectoryMetrics, boundaries, folder: epath.Path) -> None:
    curves = {"straightness": metrics.curve, "sequential straightness": metrics.sequential_curve}
    plots.draw_straightness(folder / "straightness.png", metrics.ts, curves, boundaries)
    utils.write_arrays(
        folder / "straightness.npz",
        ts=metrics.ts,
        curve=metrics.curve,
        sequential_curve=metrics.sequential_curve,
        boundaries=boundaries,
    )


def mark_best(folder: epath.Path, step: int) -> None:
    """Writes `<folder>/best.json`: the lowest FID of `step_<step>/metrics.json`, its step and among how many it was.

    Compared are the steps that were measured as `step` was, with the same settings but other weights.
    """

    def measured_as(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entry["settings"].items() if name != "weights"}

    found = {path.parent.name: utils.valid_json(path, dict[str, Any]) for path in folder.glob("step_*/metrics.json")}
    last = found[f"step_{step}"]
    fid = next(name for name in last if name.startswith("fid"))
    comparable = [e for e in found.values() if e and measured_as(e) == measured_as(last) and e[fid] is not None]
    if comparable:
        best = min(comparable, key=lambda entry: (entry[fid], entry["step"]))
        utils.write_json(folder / "best.json", {"step": best["step"], fid: best[fid], "among": len(comparable)})


def settings(
    sampler: Sampler, params: Any, protocol: Protocol, real: RealData, *, sampling: dict[str, Any], data: str
) -> dict[str, Any]:
    """What the numbers of a checkpoint depend on: with equal settings another evaluation gives the same.

    Args:
      sampling: the configuration's settings of the sampler.
      data: the name of the data set.
    """
    return {
        "weights": fingerprint(params),
        "sampling": sampling,
        "boundaries": [float(b) for b in sampler.boundaries],
        "measured_boundaries": [float(b) for b in protocol.boundaries],
        "num_samples": protocol.num_samples,
        "straightness_samples": protocol.straightness_samples,
        "save_trajectory": protocol.save_trajectory,
        "seed": sampler.seed,
        "network": f"{real.network.name} {real.network.identity}",
        "reference": real.identity,
        "precision_recall_samples": protocol.precision_recall_samples,
        "nearest_samples": protocol.nearest_samples,
        "floor": protocol.floor and f"{protocol.floor.images}, {protocol.floor.samples} images",
        "data": data,
        # The adaptive solver shares its steps over a device's batch.
        "batch_size": protocol.batch_size,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
