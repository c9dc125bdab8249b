"""The training stages and what each has of its own: the one place where they differ."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from etils import epath

import losses
from checkpointing.checkpoint import CheckpointRef
from checkpointing.metadata import DISTILL, distill_folder, distill_steps
from configs.settings import Config
from jobs import inputs
from utils import InputError


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a training stage has of its own; everything else is the same for all.

    Attributes:
      folder: of its checkpoints, in the workdir; checkpoints name their stage by it.
      phase: the value of model.rf_phase that means it.
      title: what the paper calls its model, k to be filled in.
      parent: the folder of the stage whose weights it starts from, unless a checkpoint is given; None: random weights.
      data: (config, workdir) -> what it trains on.
      targets: config -> (keys, batch) -> `losses.Targets`.
      distills: whether its students may be of another teacher's model with the same segments.
      steps: m, the Euler steps a segment that it distils to.
    """

    folder: str
    phase: int
    title: str
    parent: str | None
    data: Callable[[Config, epath.Path], inputs.TrainingData]
    targets: Callable[[Config], Callable]
    distills: bool = False
    steps: int = 1

    def model_name(self, k: int) -> str:
        """The model of k segments, as tables call it."""
        return self.title.format(k=k)


def _times(config) -> dict[str, Any]:
    return {"t_distribution": config.training.t_distribution, "t_shape": config.training.t_shape}


# By the second half of training.reflow_mode and eval.reflow_mode; 1-RF has none.
STAGES = {
    "rf": Stage(
        folder="1_rf",
        phase=1,
        title="1-RF",
        parent=None,
        data=inputs.image_data,
        targets=lambda config: functools.partial(losses.rf_targets, **_times(config)),
    ),
    "reflow": Stage(
        folder="2_rf",
        phase=2,
        title="{k}-SeqRF",
        parent="1_rf",
        data=inputs.pair_data,
        targets=lambda config: functools.partial(losses.reflow_targets, **_times(config)),
    ),
    "distill": Stage(
        folder=DISTILL,
        phase=2,
        title="{k}-SeqRF-Distill",
        parent="2_rf",
        data=inputs.distillation_data,
        targets=lambda config: functools.partial(losses.distill_targets, steps=config.training.distill_steps),
        distills=True,
    ),
}


def stage_of(config: Config, reflow_mode: str) -> Stage:
    """The stage that `rf_phase` and a mode such as train_reflow or eval_distill mean."""
    stage = STAGES["rf" if config.model.rf_phase == 1 else reflow_mode.partition("_")[2]]
    return _distilled_to(stage, config.training.distill_steps) if stage.distills else stage


def stage_in(folder: str) -> Stage | None:
    """The stage whose checkpoints are in a workdir's folder of this name; None: it is no stage's."""
    stages = {stage.folder: stage for stage in STAGES.values()}
    steps = distill_steps(folder)
    return _distilled_to(STAGES["distill"], steps) if steps > 1 else stages.get(folder)


def _distilled_to(stage: Stage, steps: int) -> Stage:
    return dataclasses.replace(stage, folder=distill_folder(steps), steps=steps)


def evaluated_segments(config: Config, checkpoint: CheckpointRef) -> int:
    """k of an evaluation: training.reflow_t, or where that is 1, the checkpoint's.

    Raises:
      InputError: a reflow stage's checkpoint has another k than the run.
    """
    k, asked = checkpoint.k, config.training.reflow_t
    if config.model.rf_phase == 1:
        return 1
    stage = stage_in(checkpoint.stage)
    if asked != 1 and (stage is None or stage.phase == 1):
        return asked  # one head, to be copied
    if asked not in (1, k):
        raise InputError(f"{checkpoint.name} has k = {k} segments, this run has training.reflow_t={asked}; use {k}")
    return k
