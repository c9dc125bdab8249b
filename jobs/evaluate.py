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

import datasets
import distributed
import evaluation
import models
import runtime
import utils
from checkpointing import runs
from checkpointing.checkpoint import CheckpointRef, checkpoint_at
from configs.default import is_given
from configs.saved import resolved
from configs.settings import Config
from configs.validation import check_steps, sampler_configs, stage_values
from jobs import builders
from jobs.inputs import PAIRS, TRAJECTORIES, checkpoints_to_evaluate, sampled_boundaries
from jobs.stages import evaluated_segments, stage_of
from metrics import reference
from metrics.floor import floor
from models.weights import fingerprint
from pairs import manifest as pairmanifest
from sampler import Programs, Sampler
from sampling import SamplerOptions
from tracking import provenance
from tracking.tracker import Tracker

logger = logging.getLogger("seqrf")


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SamplerPlan:
    """One sampler of an evaluation.

    Attributes:
      suffix: of its folder's name; empty where it is the only one.
      folder: of its results, in the workdir.
      options: of the solve.
      sampling: the configuration's settings of it, for the record.
      time_grid: how its fixed grid is placed.
      settings: the configuration as metrics.json keeps it, as if this were the only sampler.
    """

    suffix: str
    folder: epath.Path
    options: SamplerOptions
    sampling: dict[str, Any]
    time_grid: str
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is measured of every checkpoint; see `evaluation.Protocol`.

    Attributes:
      num_samples, straightness_samples, batch_size, save_trajectory, precision_recall_samples, nearest_samples: there.
      boundaries: [k + 1] of sequential straightness; None: the model's own.
      floor: whether the floor of the distances is given too.
    """

    num_samples: int
    straightness_samples: int
    batch_size: int
    save_trajectory: bool
    precision_recall_samples: int
    nearest_samples: int
    boundaries: np.ndarray | None
    floor: bool


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """All that an evaluation will do.

    Attributes:
      workdir, eval_folder: of the results.
      network: with k heads.
      model_name: as tables call it.
      checkpoints: by step; one given by the user has the step None until it is loaded.
      boundaries: [k + 1] in t that each of them is sampled on.
      teacher, teacher_boundaries: whose samples of the same noises they are compared with; None: they are not.
      seed: of the noises.
      ema_rate: of the EMA that is evaluated.
      samplers: at least one.
      measured: of every checkpoint by every sampler.
      data, options: what the samples are compared with.
      settings: the configuration as it is recorded.
      log_name: of the run in wandb.
    """

    workdir: epath.Path
    eval_folder: str
    network: models.NCSNpp
    model_name: str
    checkpoints: dict[int | None, CheckpointRef]
    boundaries: dict[int | None, np.ndarray]
    teacher: CheckpointRef | None
    teacher_boundaries: np.ndarray | None
    seed: int
    ema_rate: float
    samplers: list[SamplerPlan]
    measured: Measured
    data: datasets.DataOptions
    options: reference.Options
    settings: dict[str, Any]
    log_name: str

    def summary(self) -> dict[str, Any]:
        """What --dry_run prints."""
        return {
            "job": f"evaluate {self.model_name}",
            "checkpoints": [checkpoint.name for checkpoint in self.checkpoints.values()],
            "samplers": [part.options.name for part in self.samplers],
            "into": [os.fspath(part.folder) for part in self.samplers],
            "boundaries": next(iter(self.boundaries.values())).tolist(),
            "samples": self.measured.num_samples,
            "data": self.data.name,
            "teacher": self.teacher.name if self.teacher else "none",
        }


def evaluation_plan(config: Config, workdir: epath.Path, eval_folder: str, log_name: str) -> EvaluationPlan:
    """What the configuration means for an evaluation in this workdir. Needs no device.

    Raises:
      InputError: no checkpoint; steps that cannot cover its segments.
    """
    stage = stage_of(config, config.eval.reflow_mode)
    values = stage_values(config, runs.read_settings(workdir / stage.folder))
    checkpoints = checkpoints_to_evaluate(config, workdir / stage.folder, values.ema_rate)
    k = evaluated_segments(config, next(iter(checkpoints.values())))
    named = {f"_{name}": each for name, each in sampler_configs(config).items()} or {"": config}
    for each in named.values():
        check_steps(each, "eval", k)
    teacher = checkpoint_at(config.eval.teacher) if is_given(config.eval.teacher) else None
    recipe = "" if config.recipe == "paper" else f", {config.recipe}"
    return EvaluationPlan(
        workdir=workdir,
        eval_folder=eval_folder,
        network=models.create_model(config).clone(heads=k),
        model_name=stage.model_name(k) + recipe,
        checkpoints=checkpoints,
        boundaries={step: sampled_boundaries(each, k, workdir) for step, each in checkpoints.items()},
        teacher=teacher,
        teacher_boundaries=sampled_boundaries(teacher, k, workdir) if teacher else None,
        seed=config.seed,
        ema_rate=config.eval.ema_rate or values.ema_rate,
        samplers=[
            SamplerPlan(
                suffix=suffix,
                folder=workdir / f"{eval_folder}{suffix}",
                options=builders.sampler_options(each),
                sampling=builders.sampling_settings(each),
                time_grid=each.sampling.time_grid,
                settings=resolved(each, values, k),
            )
            for suffix, each in named.items()
        ],
        measured=_measured(config),
        data=builders.data_options(config),
        options=builders.reference_options(config),
        settings=resolved(config, values, k),
        log_name=log_name,
    )


def _measured(config: Config) -> Measured:
    names = (field.name for field in dataclasses.fields(Measured) if field.name != "boundaries")
    boundaries = None if config.model.rf_phase == 2 else builders.measured_boundaries(config, np.empty(0))
    return Measured(**{name: config.eval[name] for name in names}, boundaries=boundaries)


# --- the run ----------------------------------------------------------------------------------------------------------


References = dict[str, Callable[[], list[np.ndarray]]]  # as `evaluation.evaluate_checkpoint` takes them


@dataclasses.dataclass(frozen=True)
class CheckpointUnderTest:
    """A loaded checkpoint and the reference samples shared by all samplers.

    Attributes:
      step: its update.
      params: its EMA.
      sampler: of its network and segments; every sampler of the evaluation has options of its own.
      references: each computed once for all samplers.
      teacher: the fingerprint of the weights that samples are compared with; None: not compared.
      origin: where it is, for the record in metrics.json.
    """

    step: int
    params: Any
    sampler: Sampler
    references: References
    teacher: str | None
    origin: dict[str, Any]


def evaluate_checkpoints(plan: EvaluationPlan) -> None:
    """Measures every checkpoint of the plan, each into `<folder of the sampler>/step_<step>/`.

    A checkpoint that was measured with the same settings is not measured again. `best.json` names the step of the
    lowest FID. Several hosts share the samples, and the first one writes.

    Raises:
      InputError: no data, no feature network; a tolerance out of reach.
    """
    utils.check_writable((plan.workdir / plan.eval_folder).parent)  # not the workdir: it may be another's, read-only
    first = {step: source.load(plan.network) for step, source in itertools.islice(plan.checkpoints.items(), 1)}
    programs: dict[tuple[float, ...], Programs] = {}  # boundaries are part of a program
    teacher, judged_by = _teacher(plan, programs)
    real = reference.real_data(plan.data, plan.options, plan.measured.batch_size)  # after weights that may be damaged
    trackers = _trackers(plan)
    with contextlib.closing(trackers[0]):
        for step, source in tqdm.tqdm(plan.checkpoints.items(), plan.eval_folder, unit="checkpoint", disable=None):
            weights = first.pop(step, None) or source.load(plan.network)
            sampler = _sampler(plan, plan.boundaries[step], programs)
            exact = {"truncation_error": _reference(plan, sampler, weights.ema_params)}
            if _is_teacher(plan, weights, sampler, teacher):
                exact = {"truncation_error": judged_by["rms_to_teacher"]}  # the same solves
            last = int(weights.step) if step is None else step
            checkpoint = CheckpointUnderTest(
                last, weights.ema_params, sampler, exact | judged_by, teacher, _origin(plan, source)
            )
            for part, tracker in zip(plan.samplers, trackers, strict=True):
                _check_stop(f"before checkpoint {last} was measured")
                _measure(plan, part, tracker, checkpoint, real)
    for part in plan.samplers:
        if distributed.is_first_host():
            evaluation.mark_best(part.folder, last)
        logger.info("metrics and pictures are in %s", part.folder)


def _sampler(plan: EvaluationPlan, boundaries: np.ndarray, programs: dict[tuple[float, ...], Programs]) -> Sampler:
    """The plan's network over these segments; samplers of the same ones share their programs."""
    shared = programs.setdefault(tuple(boundaries.tolist()), Programs())
    options, shape = plan.samplers[0].options, plan.network.image_shape
    return Sampler(plan.network, np.asarray(boundaries, np.float32), shape, options, plan.seed, programs=shared)


def _origin(plan: EvaluationPlan, source: CheckpointRef) -> dict[str, Any]:
    """Where a checkpoint is; of one trained on pairs, the hashes of the manifests of the workdir's pairs too."""
    folders = (PAIRS, TRAJECTORIES) if source.teacher is not None else ()
    workdir = utils.absolute(plan.workdir)
    pairs = provenance.file_hashes(workdir / folder / pairmanifest.MANIFEST for folder in folders)
    return {"workdir": os.fspath(workdir), "checkpoint": source.name, "pairs": pairs}


def _check_stop(where: str):
    """Raises Preempted on every host if one of them has been asked to stop; all must call."""
    is_asked = runtime.preemption.requested is not None
    if distributed.gather(np.array([is_asked])).any():
        raise runtime.preemption.stopped(where)


def _trackers(plan: EvaluationPlan) -> list[Tracker]:
    """One for each sampler, in one wandb run, which the first one closes."""
    trackers: list[Tracker] = []
    for part in plan.samplers:
        prefix = f"{part.suffix[1:]}/" if part.suffix else ""
        if trackers:
            trackers.append(trackers[0].branch(part.folder, prefix))
        else:
            name = f"{plan.log_name}-{plan.eval_folder}"
            trackers.append(builders.tracker_of(plan.settings, part.folder, plan.workdir, name, prefix=prefix))
    return trackers


def _reference(plan: EvaluationPlan, sampler: Sampler, params: Any) -> Callable[[], list[np.ndarray]]:
    """The reference solves that samples are compared with, computed when they are first asked for."""
    count, batch_size = plan.measured.straightness_samples, plan.measured.batch_size
    return functools.cache(lambda: evaluation.reference_samples(sampler, params, count, batch_size))


def _teacher(plan: EvaluationPlan, programs: dict[tuple[float, ...], Programs]) -> tuple[str | None, References]:
    """(fingerprint, {'rms_to_teacher': its reference solves}) of the teacher; (None, {}): samples are not compared."""
    if plan.teacher is None or plan.teacher_boundaries is None:
        return None, {}
    params = plan.teacher.load(plan.network).ema_params
    sampler = _sampler(plan, plan.teacher_boundaries, programs)
    return fingerprint(params), {"rms_to_teacher": _reference(plan, sampler, params)}


def _is_teacher(plan: EvaluationPlan, weights: models.Weights, sampler: Sampler, teacher: str | None) -> bool:
    """Whether the checkpoint that is measured is the teacher, on the same segments."""
    same_segments = np.array_equal(sampler.boundaries, np.asarray(plan.teacher_boundaries, np.float32))
    return teacher is not None and same_segments and teacher == fingerprint(weights.ema_params)


def _measure(
    plan: EvaluationPlan, part: SamplerPlan, tracker: Tracker, checkpoint: CheckpointUnderTest, real: reference.RealData
) -> None:
    """Writes the numbers of a checkpoint to `<folder>/step_<step>/metrics.json`, unless they are there already."""
    folder = part.folder / f"step_{checkpoint.step}"
    sampler = dataclasses.replace(checkpoint.sampler, options=part.options)
    protocol = _protocol(plan, part, sampler, real)
    settings = evaluation.settings(
        sampler, checkpoint.params, protocol, real, sampling=part.sampling, data=plan.data.name
    )
    if checkpoint.teacher:
        settings["teacher"] = checkpoint.teacher
    if distributed.agreed(utils.valid_json(folder / "metrics.json", dict[str, Any], {}).get("settings") == settings):
        logger.info("%s is measured already", folder)
        return
    began = time.perf_counter()
    values = evaluation.evaluate_checkpoint(sampler, checkpoint.params, protocol, real, folder, checkpoint.references)
    record = provenance.of_process(part.settings) | checkpoint.origin
    record |= {
        "weights": settings["weights"],
        "sampler": part.options.record(),
        "nfe": values["nfe"],
        "ema_rate": plan.ema_rate,
        "num_samples": plan.measured.num_samples,
        "network": settings["network"],
        "seconds": time.perf_counter() - began,
        "images_per_second": 1000 / values["seconds_per_1000"],
    }
    named = {"step": checkpoint.step, "model": plan.model_name, "sampler": sampler.name}
    tracker.log(checkpoint.step, values)
    builders.log_pictures(tracker, checkpoint.step, folder)
    tracker.record(record)
    tracker.flush()
    if distributed.is_first_host():  # last: it says that the checkpoint is measured, and its line is in the history
        utils.write_json(folder / "metrics.json", {**named, **values, "settings": settings, "provenance": record})


def _protocol(
    plan: EvaluationPlan, part: SamplerPlan, sampler: Sampler, real: reference.RealData
) -> evaluation.Protocol:
    measured = plan.measured
    found = floor(real, plan.data, measured.batch_size, measured.num_samples) if measured.floor else None
    return evaluation.Protocol(
        num_samples=measured.num_samples,
        straightness_samples=measured.straightness_samples,
        batch_size=measured.batch_size,
        boundaries=sampler.boundaries if measured.boundaries is None else measured.boundaries,
        centered=plan.network.centered,
        time_grid=part.time_grid,
        save_trajectory=measured.save_trajectory,
        precision_recall_samples=measured.precision_recall_samples,
        nearest_samples=measured.nearest_samples,
        floor=found,
    )
