"""Sampling of one checkpoint: a grid, single PNGs and an .npz, strips between noises, trajectories to data."""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from jaxtyping import Array, Float, Int

import datasets
import distributed
import models
import runtime
import utils
from checkpointing import runs
from checkpointing.checkpoint import CheckpointRef, log_source
from configs.settings import Config
from configs.validation import check_steps, stage_values
from jobs import builders
from jobs.inputs import checkpoints_to_evaluate, sampled_boundaries
from jobs.stages import evaluated_segments, stage_of
from models.weights import fingerprint
from sampler import Cost, Sampler
from tracking import plots

logger = logging.getLogger("seqrf")

STRIPS = 8  # interpolations, and trajectories in the strip
ANIMATED = 64  # trajectories in the animation
SHOWN = 400  # samples in the grid


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The section `sample` of the configuration.

    Attributes:
      count: of samples.
      batch_size: solved together at most, over all local devices.
      interpolate: also strips between pairs of noises.
      trajectory: also the way from noise to image.
      frames: of a strip and of the animation.
    """

    count: int
    batch_size: int
    interpolate: bool
    trajectory: bool
    frames: int


@dataclasses.dataclass(frozen=True)
class SamplePlan:
    """All that --mode=sample will do.

    Attributes:
      folder: of the files.
      network: with k heads.
      checkpoint: whose EMA is sampled.
      sampler: how; its fixed grid is placed as `time_grid` says.
      sampling: the configuration's settings of it, for the record.
      wanted: how many, and what else.
    """

    folder: epath.Path
    network: models.NCSNpp
    checkpoint: CheckpointRef
    sampler: Sampler
    time_grid: str
    sampling: dict[str, Any]
    wanted: Wanted

    def summary(self) -> dict[str, Any]:
        """What --dry_run prints."""
        return {
            "job": f"draw {self.wanted.count} samples",
            "from": self.checkpoint.name,
            "into": self.folder,
            "sampler": self.sampler.name,
            "boundaries": self.sampler.boundaries.tolist(),
            "seed": self.sampler.seed,
        }


def sample_plan(config: Config, workdir: epath.Path, eval_folder: str) -> SamplePlan:
    """What the configuration means for samples in this workdir. Needs no device.

    The checkpoint is the last of those that an evaluation would measure.

    Raises:
      InputError: no checkpoint; steps that cannot cover its segments.
    """
    stage = stage_of(config, config.eval.reflow_mode)
    values = stage_values(config, runs.read_settings(workdir / stage.folder))
    *_, checkpoint = checkpoints_to_evaluate(config, workdir / stage.folder, values.ema_rate).values()
    k = evaluated_segments(config, checkpoint)
    check_steps(config, "sample", k)
    network = models.create_model(config).clone(heads=k)
    boundaries = np.asarray(sampled_boundaries(checkpoint, k, workdir), np.float32)
    return SamplePlan(
        folder=workdir / eval_folder,
        network=network,
        checkpoint=checkpoint,
        sampler=Sampler(network, boundaries, network.image_shape, builders.sampler_options(config), config.seed),
        time_grid=config.sampling.time_grid,
        sampling=builders.sampling_settings(config),
        wanted=Wanted(**config.sample),
    )


def sample_checkpoint(plan: SamplePlan) -> None:
    """Writes samples as pictures and arrays. Raises InputError where a tolerance is out of reach."""
    weights, centered = plan.checkpoint.load(plan.network), plan.network.centered
    log_source(plan.checkpoint.name, weights, centered=centered)
    params = weights.ema_params
    about = {
        "checkpoint": plan.checkpoint.name,
        "step": int(weights.step),
        "weights": fingerprint(params),
        "boundaries": plan.sampler.boundaries.tolist(),
        "sampling": plan.sampling,
    }
    sampler = plan.sampler.with_time_grid(params, plan.time_grid)
    write_samples(plan.folder, sampler, params, plan.wanted, centered=centered, about=about)


def write_samples(
    folder: epath.Path, sampler: Sampler, params: Any, wanted: Wanted, *, centered: bool, about: dict[str, Any]
) -> None:
    """Samples and writes everything into `folder`; samples.json, written last, says what it is and what it cost.

    Args:
      centered: whether the sampler's images are in [-1, 1] rather than [0, 1].
      about: what samples.json says beside the seed, the sampler and the cost.

    Raises:
      InputError: the solver could not reach its tolerance.
    """
    cost, is_first = Cost(), distributed.is_first_host()
    images = _unscaled(sampler.samples(params, wanted.count, wanted.batch_size, cost), centered)
    summary = {**about, "sampler": sampler.name, "seed": int(sampler.seed), "count": wanted.count, **cost.summary()}
    if is_first:
        _write_images(folder, images)
    if wanted.interpolate:
        strips = interpolations(sampler, params, wanted, centered)
        if is_first:
            utils.write_arrays(folder / "interpolation.npz", images=strips)
            _draw_strips(folder / "interpolation.png", strips)
    if wanted.trajectory:
        ts, xs = sampler.trajectory(params, min(wanted.count, ANIMATED))
        times = np.linspace(1, 0, wanted.frames)
        frames = datasets.unscale(states_at(ts, xs, times), centered)
        if is_first:
            utils.write_arrays(folder / "trajectory.npz", images=frames, t=times)
            plots.draw_animation(folder / "trajectory.gif", frames)
            _draw_strips(folder / "trajectory.png", frames[:, :STRIPS].swapaxes(0, 1))
    if is_first:
        utils.write_json(folder / "samples.json", {**summary, "devices": f"{jax.local_device_count()} x {_kind()}"})
    logger.info(
        "%d samples, %s: %.4g network calls an image, %.2f s (%.3g s for 1000), compilation excluded; they are in %s",
        *(wanted.count, sampler.name, summary["nfe"], cost.seconds, summary["seconds_per_1000"], folder),
    )


def _kind() -> str:
    return jax.devices()[0].device_kind


def _unscaled(batches: Iterable[np.ndarray], centered: bool) -> Float[np.ndarray, "n h w c"]:
    images = []
    for x in batches:
        runtime.preemption.check()
        images.append(datasets.unscale(x, centered))
    return np.concatenate(images)


def _write_images(folder: epath.Path, images: Float[np.ndarray, "n h w c"]) -> None:
    """The grid, images/<number>.png and samples.npz. Removes the single images of an earlier, larger number."""
    utils.write_arrays(folder / "samples.npz", images=images)
    plots.draw_images(folder / "samples.png", images[:SHOWN])
    names = [f"{number:06d}.png" for number in range(len(images))]
    for name, image in zip(tqdm.tqdm(names, desc="writing", unit="image", leave=False, disable=None), images):  # noqa: B905
        plots.write_image(folder / "images" / name, image)
    for path in set(folder.glob("images/*.png")) - {folder / "images" / name for name in names}:
        if path.stem.isdigit():
            path.unlink()


def _draw_strips(path: epath.Path, strips: Float[np.ndarray, "strips frames h w c"]) -> None:
    plots.draw_images(path, strips.reshape(-1, *strips.shape[2:]), columns=strips.shape[1], size=1024)


def spherical(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"], u: Float[Array, "b"]) -> Float[Array, "b h w c"]:
    """The point at share u of the arc from a to b: (sin((1 - u) w) a + sin(u w) b) / sin(w), w the angle between them.

    (Shoemake, SIGGRAPH 1985.) Unlike points of the straight line, those between two normal noises are as long as a
    normal noise is.
    """
    flat_a, flat_b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    lengths = jnp.linalg.norm(flat_a, axis=1) * jnp.linalg.norm(flat_b, axis=1)
    angle = jnp.arccos(jnp.clip(jnp.sum(flat_a * flat_b, axis=1) / lengths, -1 + 1e-6, 1 - 1e-6))
    weight_a, weight_b = (jnp.sin(share * angle) / jnp.sin(angle) for share in (1 - u, u))
    return weight_a[:, None, None, None] * a + weight_b[:, None, None, None] * b


def interpolations(
    sampler: Sampler, params: Any, wanted: Wanted, centered: bool
) -> Float[np.ndarray, "strips frames h w c"]:
    """Images in [0, 1] of noises on the arcs from noise 0 to 1, 2 to 3, ...

    Raises:
      InputError: the solver could not reach its tolerance.
    """
    frames = wanted.frames

    def noise(sampler: Sampler, indices: Int[Array, "b"]) -> Float[Array, "b h w c"]:
        pair, share = 2 * (indices // frames), (indices % frames) / (frames - 1)
        return spherical(sampler.noise(pair), sampler.noise(pair + 1), share)

    name = f"interpolation in {frames} frames"  # they are part of the program
    batches = sampler.samples(params, STRIPS * frames, wanted.batch_size, noise=noise, name=name)
    return _unscaled(batches, centered).reshape(STRIPS, frames, *sampler.image_shape)


def states_at(
    ts: Float[np.ndarray, "n"], xs: Float[np.ndarray, "n b h w c"], times: Float[np.ndarray, "m"]
) -> Float[np.ndarray, "m b h w c"]:
    """The states at `times` in [0, 1], linear between the saved ones at `ts` (from 1 to 0): exact for Euler's steps."""
    after = np.clip(np.searchsorted(-ts, -times), 1, len(ts) - 1)
    share = (ts[after - 1] - times) / (ts[after - 1] - ts[after])
    share = share.astype(np.float32).reshape(-1, *[1] * (xs.ndim - 1))
    return (1 - share) * xs[after - 1] + share * xs[after]
