"""The training stages and what each has of its own: the one place where they differ."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Float

import datasets
import distributed
import losses
import models
import segments
from checkpointing import runs
from checkpointing.runs import TORCH_METADATA, CheckpointRef, checkpoint_at
from configs.default import is_given
from configs.validation import on_policy_rows
from datasets import image_shape
from jobs.builders import Config
from models.weights import fingerprint
from pairs.manifest import read_manifest
from pairs.reader import PairSet, TrajectorySet, check_same_teacher
from utils import InputError

logger = logging.getLogger("seqrf")


PAIRS = epath.Path("samples") / "reflow_batch"


TRAJECTORIES = epath.Path("samples") / "trajectories"


def given_checkpoint(config: ml_collections.ConfigDict, ema_rate: float = 0.0) -> CheckpointRef | None:
    """What the user gives as training.import_torch or else training.import_flax; None: neither."""
    torch_path, flax_path = config.training.import_torch, config.training.import_flax
    if is_given(torch_path):
        return CheckpointRef(str(torch_path), TORCH_METADATA, lambda: models.import_torch(torch_path, config))
    return checkpoint_at(flax_path, config, ema_rate) if is_given(flax_path) else None


def starting_checkpoint(config: ml_collections.ConfigDict, parent: epath.Path | None) -> CheckpointRef | None:
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
    return checkpoint_at(parent, config)


def checkpoints_to_evaluate(
    config: ml_collections.ConfigDict, stage_folder: epath.Path
) -> dict[int | None, CheckpointRef]:
    """The checkpoints that an evaluation was asked for, by step; one given by the user has the step None until loaded.

    Raises:
      InputError: there is none.
    """
    ema_rate = config.eval.ema_rate if config.eval.ema_rate != config.model.ema_rate else 0.0
    if (given := given_checkpoint(config, ema_rate)) is not None:
        return {None: given}
    folder, wanted = stage_folder / "checkpoints", config.eval
    found = runs.steps_in(stage_folder)
    steps = [
        step
        for step in found
        if wanted.begin_step <= step <= wanted.end_step and (step - wanted.begin_step) % wanted.interval_step == 0
    ]
    if not steps:
        raise InputError(
            f"no checkpoint to evaluate in {folder}: it has {found or 'none'}, asked for are "
            f"eval.begin_step={wanted.begin_step} to end_step={wanted.end_step} by interval_step={wanted.interval_step}"
        )
    return {step: checkpoint_at(folder / str(step), config, ema_rate) for step in steps}


def evaluated_segments(config: ml_collections.ConfigDict, checkpoint: CheckpointRef) -> int:
    """k of an evaluation: training.reflow_t, or where that is 1, the checkpoint's.

    Raises:
      InputError: a reflow stage's checkpoint has another k than the run.
    """
    k, asked = checkpoint.metadata["k"], config.training.reflow_t
    if config.model.rf_phase == 1 or (asked != 1 and not checkpoint.metadata["stage"].startswith("2_")):
        return asked  # one head, to be copied
    if asked not in (1, k):
        raise InputError(f"{checkpoint.name} has k = {k} segments, this run has training.reflow_t={asked}; use {k}")
    return k


def evaluated_boundaries(
    config: ml_collections.ConfigDict, workdir: epath.Path, checkpoint: CheckpointRef
) -> Float[np.ndarray, "boundaries"]:
    """The segments that a checkpoint is sampled on: its own; of one head that was copied, those of this workdir's pairs
    where they have as many, else uniform ones."""
    k = config.training.reflow_t
    if checkpoint.metadata["k"] == k:
        return checkpoint.boundaries
    manifest = read_manifest(workdir / PAIRS)
    if manifest is not None and manifest["k"] == k:
        return segments.validate_boundaries(manifest["boundaries"])
    return segments.uniform_boundaries(k)


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a stage trains on.

    Attributes:
      boundaries: [k + 1] in t.
      batches: first update -> endless iterator of batches [devices, n_jitted_steps, B, ...].
      teacher: the fingerprint of the weights that made the pairs; None for images.
      folder: of the pairs.
      on_policy: whether batches have "states", for `losses.on_policy_pairs`.
    """

    boundaries: Float[np.ndarray, "boundaries"]
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    teacher: str | None = None
    folder: epath.Path | None = None
    on_policy: bool = False

    def check_fit(self, checkpoint: CheckpointRef, weights: models.Weights, *, distills: bool) -> None:
        """Checks that the weights that a reflow stage starts from belong to its pairs.

        k-SeqRF starts from the teacher that made the pairs, or from a student of it; its distillation from any model
        with the pairs' segments but a student of another teacher.

        Raises:
          InputError: they do not.
        """
        metadata, k = checkpoint.metadata, len(self.boundaries) - 1
        if metadata["k"] == k and not np.allclose(checkpoint.boundaries, self.boundaries, rtol=0, atol=1e-6):
            raise InputError(
                f"{checkpoint.name} has the boundaries {metadata['boundaries']}, the pairs in {self.folder} "
                f"{self.boundaries.tolist()}; start from the model that was trained on them"
            )
        if self.teacher is None:
            return
        own, trained_on = fingerprint(weights.ema_params), metadata.get("teacher")
        if self.teacher not in (own, trained_on) and not (distills and trained_on is None):
            raise InputError(
                f"the pairs in {self.folder} were made by teacher {self.teacher}, this run starts from "
                f"{trained_on or own} ({checkpoint.name}); start from the same checkpoint, or make new pairs in "
                "another workdir"
            )


def image_data(config: ml_collections.ConfigDict, workdir: epath.Path) -> TrainingData:
    """The images of the data set, for 1-RF. Raises InputError where it is missing."""
    datasets.image_source(config.data)
    batches = functools.partial(
        datasets.train_batches,
        config.data,
        seed=config.seed,
        batch_size=config.training.batch_size,
        n_jitted_steps=config.training.n_jitted_steps,
    )
    return TrainingData(segments.uniform_boundaries(1), lambda start: batches(start_step=start))


def pair_data(config: ml_collections.ConfigDict, workdir: epath.Path) -> TrainingData:
    """The pair set of this workdir. Raises InputError where there is none, or of another k, image size or range."""
    return _set_data(config, [(_open_pairs(config, workdir), config.training.batch_size)])


def distillation_data(config: ml_collections.ConfigDict, workdir: epath.Path) -> TrainingData:
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
    images = None if stores_noise else datasets.image_source(config.data)
    return _open_set(PairSet, "pairs", config, folder, images=images)


def _open_set(kind, what: str, config, folder: epath.Path, **options):
    expect = {"k": config.training.reflow_t, "image_shape": image_shape(config), "centered": config.data.centered}
    if config.training.adaptive_interval:
        expect["adaptive"] = True
    opened = kind(folder, partial=config.training.reflow_partial, expect=expect, **options)
    logger.info("%d %s in %s, boundaries %s", len(opened), what, folder, np.round(opened.boundaries, 4).tolist())
    return opened


def _set_data(config, sets: list[tuple[Any, int]]) -> TrainingData:
    """Batches with so many rows of each pair or trajectory set."""

    def batches(start: int) -> Iterator[dict[str, np.ndarray]]:
        host, updates = distributed.this_host(), config.training.n_jitted_steps
        streams = [opened.batches(host.share(rows), seed=config.seed, start=start) for opened, rows in sets]
        merged = (
            {name: rows for part in parts for name, rows in part.items()} for parts in zip(*streams, strict=False)
        )
        while True:
            stack = list(itertools.islice(merged, updates))
            yield {name: distributed.split_rows(np.stack([batch[name] for batch in stack])) for name in stack[0]}

    (first, _), (last, _) = sets[0], sets[-1]
    on_policy = isinstance(last, TrajectorySet)
    return TrainingData(first.boundaries, batches, first.manifest.get("teacher"), first.folder, on_policy)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a training stage has of its own; everything else is the same for all.

    Attributes:
      folder: of its checkpoints, in the workdir.
      model_name: what the paper calls its model, k to be filled in.
      parent: the folder of the stage whose weights it starts from, unless a checkpoint is given; None: random weights.
      data: (config, workdir) -> what it trains on.
      targets: config -> (keys, batch) -> `losses.Targets`.
    """

    folder: str
    model_name: str
    parent: str | None
    data: Callable[[Config, epath.Path], TrainingData]
    targets: Callable[[Config], Callable]


def _times(config) -> dict[str, Any]:
    return {"t_distribution": config.training.t_distribution, "t_shape": config.training.t_shape}


STAGES = {
    "rf": Stage(
        folder="1_rf",
        model_name="1-RF",
        parent=None,
        data=image_data,
        targets=lambda config: functools.partial(losses.rf_targets, **_times(config)),
    ),
    "reflow": Stage(
        folder="2_rf",
        model_name="{k}-SeqRF",
        parent="1_rf",
        data=pair_data,
        targets=lambda config: functools.partial(losses.reflow_targets, **_times(config)),
    ),
    "distill": Stage(
        folder="2_distill",
        model_name="{k}-SeqRF-Distill",
        parent="2_rf",
        data=distillation_data,
        targets=lambda config: functools.partial(losses.distill_targets, steps=config.training.distill_steps),
    ),
}


def stage_of(config: Config, reflow_mode: str) -> Stage:
    """The stage that `rf_phase` and a mode such as train_reflow or eval_distill mean."""
    stage = STAGES["rf" if config.model.rf_phase == 1 else reflow_mode.partition("_")[2]]
    steps = config.training.distill_steps
    is_many_step = stage is STAGES["distill"] and steps > 1
    return dataclasses.replace(stage, folder=f"{stage.folder}_{steps}") if is_many_step else stage
