"""Sampling of one checkpoint into pictures and arrays."""

from etils import epath

import checkpoints
import models
import sample_files
import sources
from configs.check import check_steps
from jobs.parts import Config, sampler_of, sampling_settings
from jobs.stages import stage_of


def sample_checkpoint(config: Config, workdir: epath.Path, eval_folder: str) -> None:
    """Writes samples of one checkpoint as pictures and arrays, into `<workdir>/<eval_folder>/`.

    The checkpoint is the last of those that `evaluate_checkpoints` would measure.

    Raises:
      InputError: no checkpoint; a setting that cannot work.
    """
    stage = stage_of(config, config.eval.reflow_mode)
    *_, source = sources.checkpoints_to_evaluate(config, workdir / stage.folder).values()
    config.training.reflow_t = sources.evaluated_segments(config, source)
    check_steps(config, "sample")
    weights, centered = source.load(), config.data.centered
    checkpoints.log_source(source.name, weights, centered=centered)
    params, boundaries = weights.ema_params, sources.evaluated_boundaries(config, workdir, source)
    sampler = sampler_of(config, models.create_model(config), boundaries)
    sampler = sampler.with_time_grid(params, config.sampling.time_grid)
    about = {
        "checkpoint": source.name,
        "step": int(weights.step),
        "weights": checkpoints.fingerprint(params),
        "boundaries": boundaries.tolist(),
        "sampling": sampling_settings(config),
    }
    wanted = sample_files.Wanted(**config.sample)
    sample_files.write_samples(workdir / eval_folder, sampler, params, wanted, centered=centered, about=about)
