"""Parts of several jobs, from the configuration: optimiser, sampler, real data, tracker."""

from typing import Any, TypeAlias

import flax.linen as nn
import ml_collections
import numpy as np
import optax
from etils import epath

import datasets
import distributed
import segments
import train_step
import utils
from metrics import reference
from sampler import Sampler
from tracking import provenance
from tracking.tracker import Tracker

Config: TypeAlias = ml_collections.ConfigDict


def optimizer(config: Config) -> optax.GradientTransformation:
    """The section optim, for training.n_iters updates."""
    return train_step.optimizer(**config.optim, n_iters=config.training.n_iters)


def sampler_of(config: Config, model: nn.Module, boundaries: Any) -> Sampler:
    """A network over segments with these boundaries, [k + 1], sampled as the section sampling says."""
    return Sampler(
        model=model,
        boundaries=np.asarray(boundaries, np.float32),
        image_shape=datasets.image_shape(config),
        options=sampler_options(config),
        seed=config.seed,
    )


def sampling_settings(config: Config) -> dict[str, Any]:
    """What the configuration says of sampling, as an evaluation's settings have it."""
    rounded = {} if config.model.dtype == "float32" else {"dtype": config.model.dtype}
    return config.sampling.to_dict() | {"num_scales": config.model.num_scales} | rounded


def sampler_options(config: Config) -> dict[str, Any]:
    """The options of `sampler.Sampler` that the section sampling means."""
    settings = config.sampling
    if settings.method == "pc":
        return {"method": "pc", "predictor": settings.predictor, "num_scales": config.model.num_scales}
    return {"method": "ode", "tol": settings.tol, "solver": settings.solver, "error_norm": settings.error_norm}


def real_data_options(config: Config) -> reference.Options:
    """Which feature network and which real images `config.eval` asks for."""
    settings = config.eval
    return reference.Options(
        inception_path=settings.inception_path,
        feature_backend=settings.feature_backend,
        file=settings.reference,
        max_real=settings.max_real,
        network=settings.feature_network,
    )


def real_data_of(config: Config) -> reference.RealData:
    """What an evaluation with this configuration compares samples with. Errors as `metrics.reference.of_config`."""
    return reference.of_config(config.data, real_data_options(config), config.eval.batch_size)


def measured_boundaries(config: Config, sampler: Sampler) -> np.ndarray:
    """[k + 1] of sequential straightness; of a 1-RF those of the segments that it would be cut into."""
    return sampler.boundaries if config.model.rf_phase == 2 else segments.uniform_boundaries(config.eval.segments)


def tracker_of(config: Config, folder: epath.Path, workdir: epath.Path, name: str, **options: Any) -> Tracker:
    """The tracker of a job that writes into `folder`, and provenance.json there; options as `Tracker`."""
    primary = distributed.is_first_host()
    record = provenance.of_process(config.to_dict())
    shown = record["config"] | {"provenance": {key: value for key, value in record.items() if key != "config"}}
    tracker = Tracker(folder, workdir=workdir, name=name, config=shown, primary=primary, **options)
    if primary:
        utils.write_json(folder / "provenance.json", record)
    return tracker


def log_pictures(tracker: Tracker, step: int, folder: epath.Path) -> None:
    """Logs every picture in a folder to wandb."""
    for picture in sorted(folder.glob("*.png")):
        tracker.picture(step, picture.stem, picture)
