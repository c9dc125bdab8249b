"""All numbers of one checkpoint: distances between samples and data, straightness, truncation error.

Distances compare the features of a network (`features`), and every figure carries its name: 'fid', 'kid' and 'is' are
Inception's, 'fid_digits_classifier' and so on another network's (docs/method.md, section 11).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Float

import checkpoints
import datasets
import figures
import sampling
import utils
from distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_and_error,
    precision_recall,
)
from features import DataFeatures, real_features
from sampler import Cost, Sampler, check_finite

__all__ = [
    "Protocol",
    "TrajectoryMetrics",
    "evaluate_checkpoint",
    "feature_distances",
    "floor",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "kernel_distance_and_error",
    "precision_recall",
    "rms_to_reference",
    "sample_quality",
    "settings",
    "trajectory_metrics",
]

SHOWN_IMAGES = 64


# --- distances to the data --------------------------------------------------------------------------------------------


def feature_distances(
    network_name: str, real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"]
) -> dict[str, float]:
    """FID, KID and its error under their names in metrics.json. Errors as `frechet_distance`."""
    kernel, error = kernel_distance_and_error(real, fake)
    suffix = _suffix(network_name)
    return {f"fid{suffix}": frechet_distance(real, fake), f"kid{suffix}": kernel, f"kid_error{suffix}": error}


def floor(
    real: DataFeatures,
    data: ml_collections.ConfigDict,
    batch_size: int,
    count: int | None = None,
    cache_dir: epath.PathLike | None = None,
) -> tuple[dict[str, float], int]:
    """The distances of test images to the training images, which samples as good as the data would have.

    Args:
      real: the feature network and its features of the training images.
      data: `config.data`.
      count: test images to compare; None: all. The FID of few samples is larger, so floors compare at equal counts.
      cache_dir: as `features.feature_network`.

    Returns:
      The distances by name, and how many test images they are of.

    Raises:
      InputError: the data set has no test images.
    """
    test = datasets.image_source(data, "test")
    found = real_features(real.network, test, batch_size, cache_dir)[:count]
    return feature_distances(real.network.name, real.features, found), len(found)


def _suffix(network_name: str) -> str:
    return "" if network_name == "inception" else f"_{network_name}"


# --- numbers of a sampler with weights --------------------------------------------------------------------------------


def sample_quality(
    sampler: Sampler, params: Any, count: int, batch_size: int, *, real: DataFeatures, centered: bool
) -> tuple[dict[str, float | int], Float[np.ndarray, "n h w c"]]:
    """Distances between `count` samples and the data, and what the samples cost.

    Args:
      real: the feature network and its features of the data set.
      centered: whether the sampler's images are in [-1, 1] rather than [0, 1].

    Returns:
      The numbers by name, and the first batch of the samples, in [0, 1].

    Raises:
      InputError: the solver could not reach its tolerance.
    """
    cost, features, logits = Cost(), [], []
    shown: Any = None
    for x in sampler.samples(params, count, batch_size, cost):
        unit = datasets.unscale(x, centered)
        shown = unit if shown is None else shown
        batch_features, batch_logits = real.network.features_and_logits((255 * unit + 0.5).astype(np.uint8))
        features.append(batch_features)
        logits.append(batch_logits)
    name = real.network.name
    distances = feature_distances(name, real.features, np.concatenate(features))
    score = {f"is{_suffix(name)}": inception_score(np.concatenate(logits))}
    return {**distances, **score, **cost.summary()}, shown


@dataclasses.dataclass(frozen=True)
class TrajectoryMetrics:
    """Straightness over many noises (see `sampling.Straightness`), as NumPy values."""

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
        return sampling.straightness(solved.ts, solved.xs, boundaries)

    name = f"straightness over {' '.join(f'{b:.9g}' for b in boundaries)}"  # they are part of the program
    per_device = sampler.trajectories_per_device(min(batch_size, count))
    batches = [jax.device_get(r) for _, r, _ in sampler.map_noises(name, measure, params, count, per_device)]
    # Every batch and device has the same number of noises, so means of means are means.
    mean = jax.tree.map(lambda *parts: np.mean(np.stack(parts), axis=(0, 1)), *batches)
    check_finite(mean.total, sampler)
    return TrajectoryMetrics(
        straightness=float(mean.total),
        sequential_straightness=float(mean.sequential),
        ts=batches[0].ts[0],  # a mean of times would be a rounding error off the boundaries
        curve=mean.curve,
        sequential_curve=mean.sequential_curve,
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
    """What is measured of a checkpoint.

    Attributes:
      num_samples: behind the distances to the data.
      straightness_samples: noises behind straightness, truncation error and the distance to the teacher.
      batch_size: over all local devices.
      boundaries: [k + 1] in t, of the segments that sequential straightness is measured over.
      centered: whether images are in [-1, 1] rather than [0, 1].
      time_grid: of the fixed grid: 'uniform', or 'adaptive' to the weights.
      save_trajectory: whether to keep one batch's trajectory and its picture.
    """

    num_samples: int
    straightness_samples: int
    batch_size: int
    boundaries: Float[np.ndarray, "boundaries"]
    centered: bool
    time_grid: str = "uniform"
    save_trajectory: bool = False


def evaluate_checkpoint(
    sampler: Sampler,
    params: Any,
    protocol: Protocol,
    real: DataFeatures,
    folder: epath.Path,
    references: dict[str, Callable[[], list[Float[np.ndarray, "_ h w c"]]]],
) -> dict[str, float | int]:
    """The numbers of one checkpoint by their names in metrics.json; pictures and curves go into `folder`.

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
    quality, images = sample_quality(
        sampler, params, protocol.num_samples, batch_size, real=real, centered=protocol.centered
    )
    figures.draw_images(folder / "samples.png", images[:SHOWN_IMAGES])
    _keep_straightness(metrics, protocol.boundaries, folder)
    if protocol.save_trajectory:
        ts, xs = sampler.trajectory(params, min(batch_size, SHOWN_IMAGES))
        utils.write_arrays(folder / "trajectory.npz", ts=ts, xs=xs)
        figures.draw_trajectories(folder / "trajectory.png", ts, xs, lambda x: datasets.unscale(x, protocol.centered))
    straightness = {
        "straightness": metrics.straightness,
        "sequential_straightness": metrics.sequential_straightness,
    }
    return {**quality, **straightness, **errors}


def _keep_straightness(metrics: TrajectoryMetrics, boundaries, folder: epath.Path) -> None:
    curves = {"straightness": metrics.curve, "sequential straightness": metrics.sequential_curve}
    figures.draw_straightness(folder / "straightness.png", metrics.ts, curves, boundaries)
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

    found = {path.parent.name: utils.read_json(path, None) for path in folder.glob("step_*/metrics.json")}
    last = found[f"step_{step}"]
    fid = next(name for name in last if name.startswith("fid"))
    comparable = [e for e in found.values() if e and measured_as(e) == measured_as(last) and e[fid] is not None]
    if comparable:
        best = min(comparable, key=lambda entry: (entry[fid], entry["step"]))
        utils.write_json(folder / "best.json", {"step": best["step"], fid: best[fid], "among": len(comparable)})


def settings(
    sampler: Sampler, params: Any, protocol: Protocol, real: DataFeatures, *, sampling: dict[str, Any], data: str
) -> dict[str, Any]:
    """What the numbers of a checkpoint depend on: with equal settings another evaluation gives the same.

    Args:
      sampling: the configuration's settings of the sampler.
      data: the name of the data set.
    """
    return {
        "weights": checkpoints.fingerprint(params),
        "sampling": sampling,
        "boundaries": [float(b) for b in sampler.boundaries],
        "measured_boundaries": [float(b) for b in protocol.boundaries],
        "num_samples": protocol.num_samples,
        "straightness_samples": protocol.straightness_samples,
        "save_trajectory": protocol.save_trajectory,
        "seed": sampler.seed,
        "network": f"{real.network.name} {real.network.identity}",
        "data": data,
        # The adaptive solver shares its steps over a device's batch.
        "batch_size": protocol.batch_size,
        "devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
    }
