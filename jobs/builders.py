"""What several jobs make of the configuration: the narrow values that travel below."""

from typing import Any

import numpy as np
import optax
from etils import epath

import datasets
import distributed
import segments
import train_step
import utils
from configs.settings import Config
from configs.validation import StageValues
from metrics import reference
from sampling import SamplerOptions
from tracking import provenance
from tracking.tracker import Tracker


def data_options(config: Config) -> datasets.DataOptions:
    """The section data."""
    return datasets.DataOptions(**config.data)


def optimizer(config: Config, values: StageValues) -> optax.GradientTransformation:
    """The section optim, for the updates of the stage."""
    return train_step.optimizer(**config.optim, n_iters=values.n_iters)


def sampler_options(config: Config) -> SamplerOptions:
    """How the section sampling solves the ODE."""
    given = config.sampling
    if given.method == "pc":
        return SamplerOptions("pc", predictor=given.predictor, num_scales=config.model.num_scales)
    return SamplerOptions("ode", tol=given.tol, solver=given.solver, error_norm=given.error_norm)


def sampling_settings(config: Config) -> dict[str, Any]:
    """What the configuration says of sampling, as an evaluation's settings have it."""
    rounded = {} if config.model.dtype == "float32" else {"dtype": config.model.dtype}
    return config.sampling.to_dict() | {"num_scales": config.model.num_scales} | rounded


def reference_options(config: Config) -> reference.Options:
    """Which feature network and which real images samples are compared with."""
    given = config.eval
    return reference.Options(
        inception_path=given.inception_path,
        feature_backend=given.feature_backend,
        file=given.reference,
        max_real=given.max_real,
        network=given.feature_network,
    )


def measured_boundaries(config: Config, boundaries: np.ndarray) -> np.ndarray:
    """[k + 1] of sequential straightness: the model's own; of a 1-RF those of the segments it would be cut into."""
    if config.model.rf_phase == 2:
        return boundaries
    return segments.uniform_boundaries(config.eval.segments or config.training.reflow_t)


def tracker_of(settings: dict[str, Any], folder: epath.Path, workdir: epath.Path, name: str, **options: Any) -> Tracker:
    """The tracker of a job that writes into `folder`, and provenance.json there.

    Args:
      settings: `configs.saved.resolved`.
      options: as `Tracker`.
    """
    primary = distributed.is_first_host()
    record = provenance.of_process(settings)
    shown = record["config"] | {"provenance": {key: value for key, value in record.items() if key != "config"}}
    board = settings["tensorboard"]
    tracker = Tracker(folder, workdir=workdir, name=name, config=shown, primary=primary, tensorboard=board, **options)
    if primary:
        utils.write_json(folder / "provenance.json", record)
    return tracker


def log_pictures(tracker: Tracker, step: int, folder: epath.Path) -> None:
    """Logs every picture in a folder to wandb."""
    for picture in sorted(folder.glob("*.png")):
        tracker.picture(step, picture.stem, picture)
