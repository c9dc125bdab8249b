"""Where a job's weights, pairs and boundaries come from (design.md section 6), and whether they fit together."""

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
import reflow
import segments
from configs.check import is_given
from utils import InputError

logger = logging.getLogger("seqrf")

PAIRS = epath.Path("samples") / "reflow_batch"
EVALUATED = {"eval_reflow": "2_rf", "eval_distill": "2_distill"}
TORCH_INFO = {"stage": "1_rf", "k": 1, "boundaries": [1.0, 0.0]}  # all that a PyTorch checkpoint can be


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that a job starts from or measures, not loaded yet.

    Attributes:
      name: where they are.
      info: what was noted beside them, `checkpoints.describe`: stage, k, boundaries, teacher.
      load: () -> `models.Weights` with the run's number of heads.
    """

    name: str
    info: dict[str, Any]
    load: Callable[[], models.Weights]

    @property
    def boundaries(self) -> Float[np.ndarray, "boundaries"]:
        """[k + 1] in t, of the segments that the weights were trained on."""
        return segments.checked_boundaries(self.info["boundaries"])


def starting_source(config, workdir, parent: str | None) -> Source | None:
    """What a job starts from: given by the user, else the last checkpoint of the stage before; None: random weights.

    Raises:
      InputError: nothing found; the message says where it looked.
    """
    given = _given_source(config)
    if given is not None or parent is None:
        return given
    if not checkpoints.steps_in(workdir / parent):
        raise InputError(
            f"no weights to start from: training.import_torch and training.import_flax are not given and "
            f"{workdir / parent / 'checkpoints'} has no checkpoint; train that stage first or give one"
        )
    return _our_source(workdir / parent, config)


def _given_source(config) -> Source | None:
    torch_path, flax_path = config.training.import_torch, config.training.import_flax
    if is_given(torch_path):
        return Source(str(torch_path), TORCH_INFO, lambda: models.import_torch(torch_path, config))
    return _our_source(flax_path, config) if is_given(flax_path) else None


def _our_source(path, config) -> Source:
    return Source(str(path), checkpoints.info_of(path), lambda: checkpoints.load_weights(path, config))


def sources_to_evaluate(config, workdir) -> dict[int | None, Source]:
    """The checkpoints that an evaluation was asked for, by step; what the user gave has the step None until loaded.

    Raises:
      InputError: there is none.
    """
    if (given := _given_source(config)) is not None:
        return {None: given}
    stage = "1_rf" if config.model.rf_phase == 1 else EVALUATED[config.eval.reflow_mode]
    there, wanted = checkpoints.steps_in(workdir / stage), config.eval
    steps = [
        step
        for step in there
        if wanted.begin_step <= step <= wanted.end_step and (step - wanted.begin_step) % wanted.interval_step == 0
    ]
    if not steps:
        raise InputError(
            f"no checkpoint to evaluate in {workdir / stage / 'checkpoints'}: it has {there or 'none'}, asked for are "
            f"eval.begin_step={wanted.begin_step} to end_step={wanted.end_step} by interval_step={wanted.interval_step}"
        )
    return {step: _our_source(workdir / stage / "checkpoints" / str(step), config) for step in steps}


def evaluated_segments(config, sources) -> int:
    """k of an evaluation: training.reflow_t, or where that is left at 1, as the checkpoints have it.

    Raises:
      InputError: a reflow stage's checkpoint has another k than the run says.
    """
    source = next(iter(sources.values()))
    k, asked = source.info["k"], config.training.reflow_t
    if config.model.rf_phase == 1 or (asked != 1 and source.info["stage"] not in EVALUATED.values()):
        return asked  # one head, to be copied
    if asked not in (1, k):
        raise InputError(f"{source.name} has k = {k} segments, this run says training.reflow_t={asked}; use {k}")
    return k


def evaluated_boundaries(config, workdir, source: Source) -> Float[np.ndarray, "boundaries"]:
    """The segments that a checkpoint is sampled on: its own; of one head that was copied, those of this workdir's pairs
    where they have as many, else uniform ones."""
    k = config.training.reflow_t
    if source.info["k"] == k:
        return source.boundaries
    manifest = reflow.read_manifest(workdir / PAIRS)
    if manifest is not None and manifest["k"] == k:
        return segments.checked_boundaries(manifest["boundaries"])
    return segments.uniform_boundaries(k)


def open_pairs(config, workdir) -> reflow.PairSet:
    """The pairs of this workdir, refused where they were made for another k, size or range."""
    expect = {
        "k": config.training.reflow_t,
        "image_shape": image_shape(config),
        "centered": config.data.centered,
    }
    if config.training.adaptive_interval:
        expect["adaptive"] = True
    folder = workdir / PAIRS
    manifest = reflow.read_manifest(folder)
    stores_noise = manifest is None or manifest["store_noise"]
    images = None if stores_noise else datasets.image_source(config.data)
    pairs = reflow.PairSet(folder, partial=config.training.reflow_partial, expect=expect, images=images)
    logger.info("%d pairs in %s, boundaries %s", len(pairs), folder, np.round(pairs.boundaries, 4).tolist())
    return pairs


def refuse_foreign_pairs(pairs: reflow.PairSet, source: Source, weights: models.Weights, *, distills: bool):
    """Raises InputError where the weights that a reflow stage starts from have nothing to do with its pairs.

    k-SeqRF starts from the teacher that made the pairs, or from a student of it; its distillation from any model with
    the pairs' segments but a student of another teacher.
    """
    if source.info["k"] == pairs.k and not np.allclose(source.boundaries, pairs.boundaries, rtol=0, atol=1e-6):
        raise InputError(
            f"{source.name} has the boundaries {source.info['boundaries']}, the pairs in {pairs.folder} "
            f"{pairs.boundaries.tolist()}; start from the model that was trained on them"
        )
    made_by, learned_from = pairs.manifest.get("teacher"), source.info.get("teacher")
    own = reflow.fingerprint(weights.ema_params)
    if made_by in (None, own, learned_from) or (distills and learned_from is None):
        return
    raise InputError(
        f"the pairs in {pairs.folder} were made by teacher {made_by}, this run starts from {learned_from or own} "
        f"({source.name}); start from the same checkpoint, or make new pairs in another workdir"
    )


def image_shape(config) -> tuple[int, int, int]:
    """(H, W, C) of the run's images."""
    return (config.data.image_size, config.data.image_size, config.data.num_channels)
