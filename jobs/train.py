"""Training of a stage: from its first state, by updates, to snapshots and the curve of losses."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

import datasets
import distributed
import evaluation
import losses
import models
import runtime
import train_step
import utils
from checkpointing import runs
from configs.saved import check_resume
from evaluation import SHOWN_IMAGES
from jobs import progress, stages
from jobs.builders import Config, measured_boundaries, optimizer, real_data_of, sampler_of, tracker_of
from jobs.stages import Stage
from metrics import reference
from models.weights import start_fingerprint
from sampler import Sampler
from tracking import plots
from tracking.tracker import Tracker

logger = logging.getLogger("seqrf")


@dataclasses.dataclass(frozen=True)
class _Run:
    """A training stage in progress.

    Attributes:
      config: with k resolved.
      folder: of the stage, in the workdir.
      model: the network, without weights.
      sampler: of snapshots.
      metadata: saved beside every checkpoint.
      saved: the checkpoints.
      tracker: of losses, metrics and pictures.
      real: what snapshots are compared with; None where they are not measured.
    """

    config: Config
    folder: epath.Path
    model: nn.Module
    sampler: Sampler
    metadata: dict[str, Any]
    saved: runs.RunCheckpoints
    tracker: Tracker
    real: reference.RealData | None


def train_stage(config: Config, workdir: epath.Path, stage: Stage, log_name: str) -> None:
    """Trains a stage up to `training.n_iters` updates, from its latest checkpoint if there is one.

    Raises:
      InputError: no parent, pairs or data that fit; a value that is not finite.
      Preempted: the process was asked to stop; the state is saved.
    """
    data = stage.data(config, workdir)
    model, folder = models.create_model(config), workdir / stage.folder
    utils.check_writable(workdir, folder / "checkpoints", folder / "checkpoints-meta")
    with contextlib.closing(runs.RunCheckpoints(folder, keep_snapshots=config.training.keep_snapshots)) as saved:
        state, metadata, is_new = _first_state(config, workdir, stage, data, model, saved)
        start, n_iters = int(state.step), config.training.n_iters
        if distributed.is_first_host():
            runs.write_settings(folder, config)
        if start >= n_iters and start in runs.steps_in(folder) and _is_drawn(config, folder, start):
            logger.info("%s has its %d updates already", folder, start)
            return
        saved.check_room(state)
        real = real_data_of(config) if _measures_snapshots(config) else None
        tracker = tracker_of(config, folder, workdir, f"{log_name}-{stage.folder}", resume_step=start)
        with contextlib.closing(tracker):
            sampler = sampler_of(config, model, data.boundaries)
            run = _Run(config, folder, model, sampler, metadata, saved, tracker, real)
            if is_new or (start >= n_iters and start not in runs.steps_in(folder)):
                _save_snapshot(run, state)
            elif start in runs.steps_in(folder) and not _is_drawn(config, folder, start):
                _draw_snapshot(run, state)  # killed after the checkpoint and before its picture
            if start < n_iters:
                _update_until_done(run, stage, data, state)
            _draw_losses(run)
    logger.info("checkpoints, samples and losses are in %s", folder)


def _first_state(
    config, workdir, stage: Stage, data, model, saved
) -> tuple[train_step.TrainState, dict[str, Any], bool]:
    """(the state that training starts from, the metadata of its checkpoints, whether the run is new).

    A run's own latest state, else its starting weights. A 1-RF that is given weights continues their count of updates;
    a reflow stage learns something new and counts from 0.
    """
    folder = workdir / stage.folder
    metadata = runs.make_metadata(config, stage.folder, data.boundaries, teacher=data.teacher)
    random = functools.partial(_initial_state, config, step=0)
    like = jax.eval_shape(lambda: random(_random_weights(config, model)))
    starting_weights = functools.partial(_starting_weights, config, workdir, stage, model)
    if saved.latest_step() is not None and (settings := runs.read_settings(folder)):
        check_resume(settings, config, folder, lambda: _began_with(folder, starting_weights()[1]))
    if (state := saved.resume(like, metadata)) is not None:
        logger.info("resuming %s from update %d", folder, state.step)
        begun = runs.read_metadata(folder)
        return state, metadata | {name: begun[name] for name in ("source", "start") if name in begun}, False
    source, weights = starting_weights()
    name = source.name if source else "random"
    metadata |= {"source": name, "start": start_fingerprint(weights)}
    runs.log_source(name if source else "random weights", weights, centered=config.data.centered)
    if source:
        data.check_fit(source, weights, distills=stage.parent == "2_rf")
    return _initial_state(config, weights, step=0 if stage.parent else int(weights.step)), metadata, True


def _starting_weights(config, workdir, stage: Stage, model) -> tuple[runs.CheckpointRef | None, models.Weights]:
    """(what a stage starts from, its weights); None and random weights for a 1-RF that is given nothing."""
    source = stages.starting_checkpoint(config, workdir / stage.parent if stage.parent else None)
    return source, source.load() if source else _random_weights(config, model)


def _began_with(folder: epath.Path, weights: models.Weights) -> bool:
    """Whether a run began with these weights; False for one of a version that did not keep which."""
    return runs.read_metadata(folder).get("start") == start_fingerprint(weights)


def _initial_state(config, weights, *, step: int) -> train_step.TrainState:
    rates, from_ema = config.model.ema_rates, config.training.init_from_ema
    return train_step.initial_state(weights, optimizer(config), step=step, ema_rates=rates, from_ema=from_ema)


def _update_until_done(run: _Run, stage: Stage, data: stages.TrainingData, state: train_step.TrainState):
    """Raises Preempted, with the state saved, if the process is asked to stop; InputError as `UpdateValues.check`."""
    training, step = run.config.training, int(state.step)
    program = distributed.map_devices(_train_step(run, stage, data), all_hosts=True, donate=(0,))
    state, seed = distributed.replicate((state, np.uint32(run.config.seed)))
    run_ahead, any_host, values = distributed.RunAhead(), distributed.AnyHost(), _update_values(run)
    rates, pace = _learning_rates(run.config), progress.Pace(training.batch_size)
    calls = _calls(training, data, step, pace)
    if training.profile and distributed.is_first_host():
        calls = progress.profiled(calls, run.folder / "profile")
    with tqdm.tqdm(total=training.n_iters, initial=step, desc=stage.folder, unit="update", disable=None) as bar:
        for batch, count in calls:
            state, computed = program(state, batch, seed)
            run_ahead.add(computed)
            before, step = step, step + count
            values.add(step, computed)
            pace.add(count)
            bar.update(count)
            if step // training.log_freq > before // training.log_freq or step == training.n_iters:
                run.saved.check()
                values.log(learning_rate=float(rates[step - 1]), **pace.summary())
            stops = any_host(runtime.preemption.requested is not None)
            is_snapshot = step % training.snapshot_freq == 0 or step == training.n_iters
            if is_snapshot or stops or step % training.snapshot_freq_for_preemption == 0:
                values.check()
                (_save_snapshot if is_snapshot else _save_preemption_checkpoint)(run, distributed.first_copy(state))
                pace.restart()
            if stops:
                run.saved.wait()
                raise runtime.preemption.stopped(f"after update {step} of {training.n_iters}")


def _update_values(run: _Run) -> progress.UpdateValues:
    drops = run.config.training.nan_policy == "skip"
    remedy = f"lower optim.lr, or look at the data; the checkpoints before it are in {run.folder}"
    if not drops:
        remedy = f"use training.nan_policy=skip to drop such updates, {remedy}"
    return progress.UpdateValues(run.tracker.log, drops=drops, remedy=remedy)


def _calls(
    training, data: stages.TrainingData, step: int, pace: progress.Pace
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """(batch [devices, updates, B, ...], updates) of every call of the training step, up to n_iters.

    Calls end at multiples of n_jitted_steps, where checkpoints are due, whatever update a run starts from.
    """
    whole = training.n_jitted_steps
    batches = distributed.prefetch(data.batches(step - step % whole))
    while step < training.n_iters:
        with pace.waiting():
            batch, first = next(batches), step % whole
        count = min(whole - first, training.n_iters - step)
        if count < whole:
            batch = {name: rows[:, first : first + count] for name, rows in batch.items()}
        yield batch, count
        step += count


def _train_step(run: _Run, stage: Stage, data: stages.TrainingData) -> Callable:
    config, training = run.config, run.config.training
    num_steps = (len(data.boundaries) - 1) * training.distill_steps
    return train_step.make_train_step(
        run.model,
        stage.targets(config),
        losses.make_loss(training.loss, reduce_mean=training.reduce_mean, lpips=_lpips(config)),
        optimizer(config),
        ema_rate=config.model.ema_rate,
        variable_ema_rate=config.model.variable_ema_rate,
        on_policy=losses.OnPolicy(tuple(data.boundaries.tolist()), num_steps) if data.on_policy else None,
        drop_nonfinite=training.nan_policy == "skip",
        accumulate=training.accumulate,
    )


def _lpips(config) -> Callable | None:
    if config.training.loss != "lpips_huber":
        return None
    from models.lpips import load_lpips

    return load_lpips(config.training.lpips_path, config.training.lpips_heads, centered=config.data.centered)


def _save_preemption_checkpoint(run: _Run, state: train_step.TrainState):
    """Saves a checkpoint to resume from, with the losses up to it."""
    run.saved.save(state, run.metadata, keep=False)
    run.tracker.flush()


def _save_snapshot(run: _Run, state: train_step.TrainState):
    """Saves a checkpoint to keep, draws its samples and, where asked for, measures their distance to the data."""
    run.saved.save(state, run.metadata, keep=True)
    run.tracker.flush()
    _draw_snapshot(run, state)


def _measures_snapshots(config) -> bool:
    return config.training.snapshot_sampling and config.training.snapshot_fid_sample > 0


def _picture_of(folder: epath.Path, step: int) -> epath.Path:
    return folder / "samples" / f"step_{step}.png"


def _is_drawn(config, folder: epath.Path, step: int) -> bool:
    return distributed.agreed(not config.training.snapshot_sampling or _picture_of(folder, step).exists())


def _draw_snapshot(run: _Run, state: train_step.TrainState):
    """Measures and draws a snapshot on all hosts; the picture comes last, as the mark of a finished one."""
    config, step = run.config, int(state.step)
    if not config.training.snapshot_sampling:
        return
    params, centered = state.ema_params, config.data.centered
    sampler = run.sampler.with_time_grid(params, config.sampling.time_grid)
    if run.real:
        count, size = config.training.snapshot_fid_sample, config.eval.batch_size
        quality, images = evaluation.sample_quality(sampler, params, count, size, real=run.real, centered=centered)
        boundaries, noises = measured_boundaries(config, sampler), config.eval.straightness_samples
        straight = evaluation.trajectory_metrics(sampler, params, boundaries, noises, size)
        quality["straightness"] = straight.straightness
        quality["sequential_straightness"] = straight.sequential_straightness
        run.tracker.log(step, quality)
        run.tracker.flush()
    else:
        images = datasets.unscale(next(sampler.samples(params, SHOWN_IMAGES, SHOWN_IMAGES)), centered)
    if distributed.is_first_host():
        plots.draw_images(_picture_of(run.folder, step), images)
    run.tracker.picture(step, "samples", _picture_of(run.folder, step))


def _draw_losses(run: _Run):
    lines = [line for line in run.tracker.history if "loss" in line]
    if lines:
        plots.draw_loss(run.folder / "loss.png", [line["step"] for line in lines], [line["loss"] for line in lines])


def _learning_rates(config) -> np.ndarray:
    """[n_iters] of every update: computed before them, because later the devices are busy."""
    settings, n_iters = config.optim, config.training.n_iters
    rate = train_step.learning_rate(settings.lr, settings.warmup, settings.schedule, n_iters)
    return np.broadcast_to(np.asarray(rate(np.arange(n_iters))), n_iters)


def _random_weights(config, model) -> models.Weights:
    params = models.init_params(model, jax.random.key(config.seed), datasets.image_shape(config))
    zeros = jax.tree.map(jnp.zeros_like, params)
    return models.Weights(params=params, ema_params=params, mu=zeros, nu=zeros, count=0, step=0)
