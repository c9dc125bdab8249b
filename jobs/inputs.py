"""Where a job's weights and training data come from, and whether they fit together."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

import datasets
import distributed
import models
import segments
from checkpointing import runs
from checkpointing.checkpoint import CheckpointRef, checkpoint_at, torch_file
from configs.default import is_given
from configs.settings import Config
from configs.validation import on_policy_rows
from jobs.builders import data_options
from models.weights import fingerprint
from pairs.manifest import read_manifest
from pairs.reader import PairSet, TrajectorySet, check_same_teacher
from utils import InputError

logger = logging.getLogger("seqrf")

PAIRS = epath.Path("samples") / "reflow_batch"
TRAJECTORIES = epath.Path("samples") / "trajectories"


# --- weights ----------------------------------------------------------------------------------------------------------


def given_checkpoint(config: Config, ema_rate: float = 0.0) -> CheckpointRef | None:
    """What the user gives as training.import_torch or else training.import_flax; None: neither."""
    torch_path, flax_path = config.training.import_torch, config.training.import_flax
    if is_given(torch_path):
        return torch_file(torch_path)
    return checkpoint_at(flax_path, ema_rate=ema_rate) if is_given(flax_path) else None


def starting_checkpoint(config: Config, parent: epath.Path | None) -> CheckpointRef | None:
    """What a stage starts from: given by the user, else the last snapshot of the stage before, in the folder `parent`.

    Without a parent, None where nothing is given.

    Raises:
      InputError: the parent has no snapshot, and the message says where it looked; or it is not finished.
    """
    given = given_checkpoint(config)
    if given is not None or parent is None:
        return given
    steps, planned = runs.steps_in(parent), runs.planned_updates(parent)
    if steps and steps[-1] < planned:
        raise InputError(
            f"{parent} is not finished: its last snapshot has {steps[-1]} of {planned} updates; resume it, or start "
            f"from that snapshot with --config.training.import_flax={parent / 'checkpoints' / str(steps[-1])}"
        )
    if not steps:
        raise InputError(
            f"no weights to start from: training.import_torch and training.import_flax are not given and "
            f"{parent / 'checkpoints'} has no checkpoint; train that stage first or give one"
        )
    return checkpoint_at(parent)


def checkpoints_to_evaluate(
    config: Config, stage_folder: epath.Path, ema_rate: float
) -> dict[int | None, CheckpointRef]:
    """The checkpoints that an evaluation was asked for, by step; one given by the user has the step None until loaded.

    Args:
      ema_rate: of the run's main EMA.

    Raises:
      InputError: there is none.
    """
    wanted = config.eval
    asked_rate = 0.0 if wanted.ema_rate == ema_rate else wanted.ema_rate
    if (given := given_checkpoint(config, asked_rate)) is not None:
        return {None: given}
    folder, saved = stage_folder / "checkpoints", runs.steps_in(stage_folder)
    steps = [
        step
        for step in saved
        if wanted.begin_step <= step <= wanted.end_step and (step - wanted.begin_step) % wanted.interval_step == 0
    ]
    if not steps:
        raise InputError(
            f"no checkpoint to evaluate in {folder}: it has {saved or 'none'}, asked for are "
            f"eval.begin_step={wanted.begin_step} to end_step={wanted.end_step} by interval_step={wanted.interval_step}"
        )
    return {step: checkpoint_at(folder / str(step), ema_rate=asked_rate) for step in steps}


def sampled_boundaries(checkpoint: CheckpointRef, k: int, workdir: epath.Path) -> Float[np.ndarray, "boundaries"]:
    """[k + 1]: boundaries for sampling a checkpoint. Its own; for a one-head checkpoint expanded to k heads, those of
    the workdir's pair set if it has k segments, else uniform ones."""
    if checkpoint.k == k:
        return checkpoint.boundaries
    manifest = read_manifest(workdir / PAIRS)
    if manifest is not None and manifest["k"] == k:
        return segments.validate_boundaries(manifest["boundaries"])
    return segments.uniform_boundaries(k)


# --- training data ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a stage trains on.

    Attributes:
      boundaries: [k + 1] in t.
      batches: first update -> endless iterator of batches [devices, n_jitted_steps, B, ...].
      teacher: the fingerprint of the weights that made the pairs; None for images.
      folder: of the pairs.
      on_policy: whether batches have "states", for `losses.on_policy_pairs`.
      count: the pairs and trajectories that it was opened with; None for images.
    """

    boundaries: Float[np.ndarray, "boundaries"]
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    teacher: str | None = None
    folder: epath.Path | None = None
    on_policy: bool = False
    count: int | None = None

    def check_fit(self, checkpoint: CheckpointRef, weights: models.Weights, *, distills: bool) -> None:
        """Checks that the weights that a reflow stage starts from belong to its pairs.

        k-SeqRF starts from the teacher that made the pairs, or from a student of it; its distillation from any model
        with the pairs' segments but a student of another teacher.

        Raises:
          InputError: they do not.
        """
        if checkpoint.k == len(self.boundaries) - 1 and not np.allclose(
            checkpoint.boundaries, self.boundaries, rtol=0, atol=1e-6
        ):
            raise InputError(
                f"{checkpoint.name} has the boundaries {checkpoint.boundaries.tolist()}, the pairs in {self.folder} "
                f"{self.boundaries.tolist()}; start from the model that was trained on them"
            )
        if self.teacher is None:
            return
        own, trained_on = fingerprint(weights.ema_params), checkpoint.teacher
        if self.teacher not in (own, trained_on) and not (distills and trained_on is None):
            raise InputError(
                f"the pairs in {self.folder} were made by teacher {self.teacher}, this run starts from "
                f"{trained_on or own} ({checkpoint.name}); start from the same checkpoint, or make new pairs in "
                "another workdir"
            )


def image_data(config: Config, workdir: epath.Path) -> TrainingData:
    """The images of the data set, for 1-RF. Raises InputError where it is missing."""
    data = data_options(config)
    datasets.image_source(data)
    batches = functools.partial(
        datasets.train_batches,
        data,
        seed=config.seed,
        batch_size=config.training.batch_size,
        n_jitted_steps=config.training.n_jitted_steps,
    )
    return TrainingData(segments.uniform_boundaries(1), lambda start: batches(start_step=start))


def pair_data(config: Config, workdir: epath.Path) -> TrainingData:
    """The pair set of this workdir. Raises InputError where there is none, or of another k, image size or range."""
    return _set_data(config, [(_open_pairs(config, workdir), config.training.batch_size)])


def distillation_data(config: Config, workdir: epath.Path) -> TrainingData:
    """The pair set and, for the share training.on_policy of a batch, the trajectory set, of the same teacher.

    Raises:
      InputError: one is missing, of another k, image size or range, or they are of different teachers.
    """
    on_policy = on_policy_rows(config)
    stored = config.training.batch_size - on_policy
    if not on_policy:
        return pair_data(config, workdir)
    trajectories = _open_set(TrajectorySet, "trajectories", config, workdir / TRAJECTORIES)
    if not stored:
        return _set_data(config, [(trajectories, on_policy)])
    pairs = _open_pairs(config, workdir)
    check_same_teacher(trajectories, pairs)
    return _set_data(config, [(pairs, stored), (trajectories, on_policy)])


def _open_pairs(config, workdir) -> PairSet:
    folder = workdir / PAIRS
    manifest = read_manifest(folder)
    stores_noise = manifest is None or manifest["store_noise"]
    images = None if stores_noise else datasets.image_source(data_options(config))
    return _open_set(PairSet, "pairs", config, folder, images=images)


def _open_set(kind, what: str, config, folder: epath.Path, **options):
    network = models.create_model(config)
    expect = {"k": network.heads, "image_shape": network.image_shape, "centered": network.centered}
    if config.training.adaptive_interval:
        expect["adaptive"] = True
    opened = kind(folder, partial=config.training.reflow_partial, expect=expect, **options)
    logger.info("%d %s in %s, boundaries %s", len(opened), what, folder, np.round(opened.boundaries, 4).tolist())
    return opened


def _set_data(config, sets: list[tuple[Any, int]]) -> TrainingData:
    """Batches with so many rows of each pair or trajectory set."""
    seed, updates = config.seed, config.training.n_jitted_steps

    def batches(start: int) -> Iterator[dict[str, np.ndarray]]:
        host = distributed.this_host()
        streams = [opened.batches(host.share(rows), seed=seed, start=start) for opened, rows in sets]
        merged = (
            {name: rows for part in parts for name, rows in part.items()} for parts in zip(*streams, strict=False)
        )
        while True:
            stack = list(itertools.islice(merged, updates))
            yield {name: distributed.split_rows(np.stack([batch[name] for batch in stack])) for name in stack[0]}

    (first, _), (last, _) = sets[0], sets[-1]
    on_policy = isinstance(last, TrajectorySet)
    count = sum(len(opened) for opened, _ in sets)
    return TrainingData(first.boundaries, batches, first.manifest.get("teacher"), first.folder, on_policy, count)
