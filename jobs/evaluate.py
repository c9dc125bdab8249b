"""Evaluation: every checkpoint asked for, by every sampler asked for."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tqdm
from etils import epath

import distributed
import evaluation
import models
import runtime
import utils
from checkpointing import runs
from configs.default import is_given
from configs.validation import check_steps, sampler_configs
from jobs import stages
from jobs.builders import (
    Config,
    log_pictures,
    measured_boundaries,
    real_data_of,
    sampler_of,
    sampler_options,
    sampling_settings,
    tracker_of,
)
from jobs.stages import stage_of
from metrics import reference
from models.weights import fingerprint
from pairs import manifest as pairmanifest
from sampler import Sampler
from tracking import provenance
from tracking.tracker import Tracker

logger = logging.getLogger("seqrf")


def evaluate_checkpoints(config: Config, workdir: epath.Path, eval_folder: str, log_name: str) -> None:
    """Measures every checkpoint asked for, each into `<workdir>/<eval_folder>/step_<step>/`.

    With several samplers (`eval.samplers`) each has a folder `<eval_folder>_<sampler>` in its place. A checkpoint that
    was measured with the same settings is not measured again. `best.json` names the step of the lowest FID. Several
    hosts share the samples, and the first one writes.

    Raises:
      InputError: no checkpoint, no data, no feature network; a setting that cannot work.
    """
    stage = stage_of(config, config.eval.reflow_mode)
    found = stages.checkpoints_to_evaluate(config, workdir / stage.folder)
    config.training.reflow_t = stages.evaluated_segments(config, next(iter(found.values())))
    for each in sampler_configs(config).values() or [config]:
        check_steps(each, "eval")
    utils.check_writable((workdir / eval_folder).parent)  # not the workdir: figures can be measured elsewhere
    loaded = {step: source.load() for step, source in itertools.islice(found.items(), 1)}  # before features take long
    model = models.create_model(config)
    sampler_over = functools.cache(lambda *boundaries: sampler_of(config, model, boundaries))  # each compiled once
    teacher, judged_by = _teacher(config, workdir, sampler_over)
    real = real_data_of(config)
    name = stage.model_name.format(k=config.training.reflow_t) + _recipe_mark(config)
    parts = _measurements(config, workdir, eval_folder, log_name)
    with contextlib.closing(parts[0].tracker):
        for step, source in tqdm.tqdm(found.items(), desc=eval_folder, unit="checkpoint", disable=None):
            weights = loaded.pop(step, None) or source.load()
            step, params = int(weights.step) if step is None else step, weights.ema_params
            sampler = sampler_over(*stages.evaluated_boundaries(config, workdir, source).tolist())
            references = {"truncation_error": _reference(config, sampler, params)} | judged_by
            origin = {
                "workdir": os.fspath(utils.absolute(workdir)),
                "checkpoint": source.name,
                "pairs": _pair_sets(workdir, source),
            }
            checkpoint = _Measured(step, name, params, sampler, references, teacher, origin)
            for part in parts:
                _check_stop(f"before checkpoint {step} was measured")
                _measure(part, checkpoint, real)
    for part in parts:
        if distributed.is_first_host():
            evaluation.mark_best(part.folder, checkpoint.step)
        logger.info("metrics and pictures are in %s", part.folder)


@dataclasses.dataclass(frozen=True)
class _Measurement:
    """One sampler's part of an evaluation.

    Attributes:
      config: as if it were the only sampler.
      folder: of its results, in the workdir.
      tracker: of its numbers and pictures.
    """

    config: Config
    folder: epath.Path
    tracker: Tracker


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A checkpoint that is measured.

    Attributes:
      step: its update.
      model_name: as tables call it.
      params: its EMA.
      sampler: of its network and segments; every measurement has options of its own.
      references: as `evaluation.evaluate_checkpoint`, each computed once for all samplers.
      teacher: the fingerprint of the weights that samples are compared with; None: not compared.
      origin: where it was found, for the record in metrics.json.
    """

    step: int
    model_name: str
    params: Any
    sampler: Sampler
    references: dict[str, Callable[[], list[np.ndarray]]]
    teacher: str | None
    origin: dict[str, Any]


def _recipe_mark(config) -> str:
    return "" if config.recipe == "paper" else f", {config.recipe}"


def _check_stop(where: str):
    """Raises Preempted on every host if one of them has been asked to stop; all must call."""
    is_asked = runtime.preemption.requested is not None
    if distributed.gather(np.array([is_asked])).any():
        raise runtime.preemption.stopped(where)


def _measurements(config, workdir: epath.Path, eval_folder: str, log_name: str) -> list[_Measurement]:
    """One for each sampler, in one wandb run, which the first one's tracker closes."""
    named = {f"_{name}": each for name, each in sampler_configs(config).items()} or {"": config}
    parts: list[_Measurement] = []
    for suffix, each in named.items():
        folder, prefix = workdir / f"{eval_folder}{suffix}", f"{suffix[1:]}/" if suffix else ""
        if parts:
            tracker = parts[0].tracker.branch(folder, prefix)
        else:
            tracker = tracker_of(config, folder, workdir, f"{log_name}-{eval_folder}", prefix=prefix)
        parts.append(_Measurement(each, folder, tracker))
    return parts


def _reference(config, sampler: Sampler, params) -> Callable[[], list[np.ndarray]]:
    """The reference solves that samples are compared with, computed when they are first asked for."""
    count, batch_size = config.eval.straightness_samples, config.eval.batch_size
    return functools.cache(lambda: evaluation.reference_samples(sampler, params, count, batch_size))


def _teacher(config, workdir, sampler_over: Callable[..., Sampler]) -> tuple[str | None, dict[str, Callable]]:
    """(fingerprint, {'rms_to_teacher': its reference solves}) of the teacher; (None, {}): samples are not compared."""
    if not is_given(config.eval.teacher):
        return None, {}
    source = runs.checkpoint_at(config.eval.teacher, config)
    params, boundaries = source.load().ema_params, stages.evaluated_boundaries(config, workdir, source)
    reference = _reference(config, sampler_over(*boundaries.tolist()), params)
    return fingerprint(params), {"rms_to_teacher": reference}


def _measure(part: _Measurement, checkpoint: _Measured, real: reference.RealData) -> None:
    """Writes the numbers of a checkpoint to `<folder>/step_<step>/metrics.json`, unless they are there already."""
    config, folder = part.config, part.folder / f"step_{checkpoint.step}"
    sampler = dataclasses.replace(checkpoint.sampler, options=sampler_options(config))
    params, protocol = checkpoint.params, _protocol(config, sampler, real)
    settings = evaluation.settings(
        sampler,
        params,
        protocol,
        real,
        sampling=sampling_settings(config),
        data=f"{config.data.dataset} {config.data.category}".strip(),
    )
    if checkpoint.teacher:
        settings["teacher"] = checkpoint.teacher
    if distributed.agreed(utils.read_json(folder / "metrics.json", {}).get("settings") == settings):
        logger.info("%s is measured already", folder)
        return
    began = time.perf_counter()
    values = evaluation.evaluate_checkpoint(sampler, params, protocol, real, folder, checkpoint.references)
    record = provenance.of_process(config.to_dict()) | checkpoint.origin
    record |= {
        "weights": settings["weights"],
        "sampler": sampler.options,
        "nfe": values["nfe"],
        "ema_rate": config.eval.ema_rate or config.model.ema_rate,
        "num_samples": config.eval.num_samples,
        "network": settings["network"],
        "seconds": time.perf_counter() - began,
        "images_per_second": 1000 / values["seconds_per_1000"],
    }
    named = {"step": checkpoint.step, "model": checkpoint.model_name, "sampler": sampler.name}
    if distributed.is_first_host():
        utils.write_json(folder / "metrics.json", {**named, **values, "settings": settings, "provenance": record})
    part.tracker.log(checkpoint.step, values)
    log_pictures(part.tracker, checkpoint.step, folder)
    part.tracker.record(record)
    part.tracker.flush()


def _pair_sets(workdir, source: runs.CheckpointRef) -> dict[str, str]:
    """The hashes of the manifests of the workdir's pairs and trajectories, for a checkpoint trained on pairs."""
    if source.metadata.get("teacher") is None:
        return {}
    folders = stages.PAIRS, stages.TRAJECTORIES
    return provenance.file_hashes(utils.absolute(workdir) / folder / pairmanifest.MANIFEST for folder in folders)


def _protocol(config, sampler: Sampler, real: reference.RealData) -> evaluation.Protocol:
    return evaluation.Protocol(
        num_samples=config.eval.num_samples,
        straightness_samples=config.eval.straightness_samples,
        batch_size=config.eval.batch_size,
        boundaries=measured_boundaries(config, sampler),
        centered=config.data.centered,
        time_grid=config.sampling.time_grid,
        save_trajectory=config.eval.save_trajectory,
        precision_recall_samples=config.eval.precision_recall_samples,
        nearest_samples=config.eval.nearest_samples,
        floor=reference.floor(real, config.data, config.eval.batch_size, config.eval.num_samples)
        if config.eval.floor
        else None,
    )
