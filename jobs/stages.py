"""The training stages and what each has of its own: the one place where they differ."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from etils import epath

import losses
import sources
from jobs.parts import Config


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
    data: Callable[[Config, epath.Path], sources.TrainingData]
    targets: Callable[[Config], Callable]


def _times(config) -> dict[str, Any]:
    return {"t_distribution": config.training.t_distribution, "t_shape": config.training.t_shape}


STAGES = {
    "rf": Stage(
        folder="1_rf",
        model_name="1-RF",
        parent=None,
        data=sources.image_data,
        targets=lambda config: functools.partial(losses.rf_targets, **_times(config)),
    ),
    "reflow": Stage(
        folder="2_rf",
        model_name="{k}-SeqRF",
        parent="1_rf",
        data=sources.pair_data,
        targets=lambda config: functools.partial(losses.reflow_targets, **_times(config)),
    ),
    "distill": Stage(
        folder="2_distill",
        model_name="{k}-SeqRF-Distill",
        parent="2_rf",
        data=sources.distillation_data,
        targets=lambda config: functools.partial(losses.distill_targets, steps=config.training.distill_steps),
    ),
}


def stage_of(config: Config, reflow_mode: str) -> Stage:
    """The stage that `rf_phase` and a mode such as train_reflow or eval_distill mean."""
    stage = STAGES["rf" if config.model.rf_phase == 1 else reflow_mode.partition("_")[2]]
    steps = config.training.distill_steps
    is_many_step = stage is STAGES["distill"] and steps > 1
    return dataclasses.replace(stage, folder=f"{stage.folder}_{steps}") if is_many_step else stage
