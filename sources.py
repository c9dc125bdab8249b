"""Where a job's weights, pairs and boundaries come from, and whether they fit together."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

import checkpoints
import datasets
import models
import segments
from configs.default import is_given
from pairs.manifest import read_manifest
from pairs.reader import PairSet
from utils import InputError

logger = logging.getLogger("seqrf")

PAIRS = epath.Path("samples") / "reflow_batch"
TORCH_METADATA = {"stage": "1_rf", "k": 1, "boundaries": [1.0, 0.0]}  # a PyTorch checkpoint is a 1-RF


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that a job starts from or evaluates, not loaded yet.

    Attributes:
      name: its path.
      metadata: `checkpoints.make_metadata`: stage, k, boundaries, teacher.
      load: () -> `models.Weights` with the run's number of heads.
    """

    name: str
    metadata: dict[str, Any]
    load: Callable[[], models.Weights]

    @property
    def boundaries(self) -> Float[np.ndarray, "boundaries"]:
        """[k + 1] in t, of the segments that the weights were trained on."""
        return segments.validate_boundaries(self.metadata["boundaries"])


def checkpoint_at(path, config) -> CheckpointRef:
    """The checkpoint at `path`, as `checkpoints.load_weights` takes it. Raises InputError where there is none."""
    return CheckpointRef(str(path), checkpoints.read_metadata(path), lambda: checkpoints.load_weights(path, config))


def given_checkpoint(config) -> CheckpointRef | None:
    """What the user gives as training.import_torch or else training.import_flax; None: neither."""
    torch_path, flax_path = config.training.import_torch, config.training.import_flax
    if is_given(torch_path):
        return CheckpointRef(str(torch_path), TORCH_METADATA, lambda: models.import_torch(torch_path, config))
    return checkpoint_at(flax_path, config) if is_given(flax_path) else None


def starting_checkpoint(config, parent: epath.Path) -> CheckpointRef:
    """What a stage starts from: given by the user, else the last snapshot of the stage before, in the folder `parent`.

    Raises:
      InputError: nothing found; the message says where it looked.
    """
    if (given := given_checkpoint(config)) is not None:
        return given
    if not checkpoints.steps_in(parent):
        raise InputError(
            f"no weights to start from: training.import_torch and training.import_flax are not given and "
            f"{parent / 'checkpoints'} has no checkpoint; train that stage first or give one"
        )
    return checkpoint_at(parent, config)


def checkpoints_to_evaluate(config, stage_folder: epath.Path) -> dict[int | None, CheckpointRef]:
    """The checkpoints that an evaluation was asked for, by step; one given by the user has the step None until loaded.

    Raises:
      InputError: there is none.
    """
    if (given := given_checkpoint(config)) is not None:
        return {None: given}
    folder, wanted = stage_folder / "checkpoints", config.eval
    found = checkpoints.steps_in(stage_folder)
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
    return {step: checkpoint_at(folder / str(step), config) for step in steps}


def evaluated_segments(config, checkpoint: CheckpointRef) -> int:
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


def evaluated_boundaries(config, workdir, checkpoint: CheckpointRef) -> Float[np.ndarray, "boundaries"]:
    """The segments that a checkpoint is sampled on: its own; of one head that was copied, those of this workdir's pairs
    where they have as many, else uniform ones."""
    k = config.training.reflow_t
    if checkpoint.metadata["k"] == k:
        return checkpoint.boundaries
    manifest = read_manifest(workdir / PAIRS)
    if manifest is not None and manifest["k"] == k:
        return segments.validate_boundaries(manifest["boundaries"])
    return segments.uniform_boundaries(k)


def open_pairs(config, workdir) -> PairSet:
    """The pair set of this workdir.

    Raises:
      InputError: there is none, or it was made for another k, image size or range.
    """
    expect = {"k": config.training.reflow_t, "image_shape": image_shape(config), "centered": config.data.centered}
    if config.training.adaptive_interval:
        expect["adaptive"] = True
    folder = workdir / PAIRS
    manifest = read_manifest(folder)
    stores_noise = manifest is None or manifest["store_noise"]
    images = None if stores_noise else datasets.image_source(config.data)
    pairs = PairSet(folder, partial=config.training.reflow_partial, expect=expect, images=images)
    logger.info("%d pairs in %s, boundaries %s", len(pairs), folder, np.round(pairs.boundaries, 4).tolist())
    return pairs


def check_pairs_fit(pairs: PairSet, checkpoint: CheckpointRef, weights: models.Weights, *, distills: bool):
    """Raises InputError where the weights that a reflow stage starts from do not belong to its pairs.

    k-SeqRF starts from the teacher that made the pairs, or from a student of it; its distillation from any model with
    the pairs' segments but a student of another teacher.
    """
    metadata = checkpoint.metadata
    if metadata["k"] == pairs.k and not np.allclose(checkpoint.boundaries, pairs.boundaries, rtol=0, atol=1e-6):
        raise InputError(
            f"{checkpoint.name} has the boundaries {metadata['boundaries']}, the pairs in {pairs.folder} "
            f"{pairs.boundaries.tolist()}; start from the model that was trained on them"
        )
    teacher, trained_on = pairs.manifest.get("teacher"), metadata.get("teacher")
    own = checkpoints.fingerprint(weights.ema_params)
    if teacher in (None, own, trained_on) or (distills and trained_on is None):
        return
    raise InputError(
        f"the pairs in {pairs.folder} were made by teacher {teacher}, this run starts from {trained_on or own} "
        f"({checkpoint.name}); start from the same checkpoint, or make new pairs in another workdir"
    )


def image_shape(config) -> tuple[int, int, int]:
    """(H, W, C) of the run's images."""
    return (config.data.image_size, config.data.image_size, config.data.num_channels)
