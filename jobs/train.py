"""Training of a stage: its plan, its first state, its updates, its snapshots and the curve of losses."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from checkpointing.checkpoint import CheckpointRef, checkpoint_at, log_source
from checkpointing.metadata import make_metadata
from configs.saved import check_resume, resolved
from configs.settings import Config
from configs.validation import StageValues, segments_of, stage_values
from evaluation import SHOWN_IMAGES
from jobs import builders, progress
from jobs.inputs import TrainingData, starting_checkpoint
from jobs.stages import Stage
from metrics import reference
from models.weights import start_fingerprint
from sampler import Sampler
from tracking import plots
from tracking.tracker import Tracker, read_history

logger = logging.getLogger("seqrf")

LOSSES = "loss.png"  # the picture of all losses, in a stage's folder


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class UpdatePlan:
    """What one update computes.

    Attributes:
      targets: (keys, batch) -> `losses.Targets`, the stage's.
      optimizer, rate: Adam, and its learning rate by the number of updates before.
      loss, reduce_mean: as `losses.make_loss`.
      lpips: the files of VGG16 and of LPIPS' heads, for the loss "lpips_huber".
      on_policy: None: all pairs are stored ones.
      drops_nonfinite: whether an update that is not finite is dropped.
      accumulate: parts of a batch that go through one after another.
      ema_rates: of further EMAs.
      from_ema: whether a new run starts from its source's EMA.
    """

    targets: Callable
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    loss: str
    reduce_mean: bool
    lpips: tuple[str, str]
    on_policy: losses.OnPolicy | None
    drops_nonfinite: bool
    accumulate: int
    ema_rates: tuple[float, ...]
    from_ema: bool


@dataclasses.dataclass(frozen=True)
class Cadence:
    """After how many updates a stage logs, keeps a checkpoint, saves one to resume from; and updates in one call."""

    log: int
    snapshot: int
    preemption: int
    call: int


@dataclasses.dataclass(frozen=True)
class SnapshotPlan:
    """What is drawn and measured of every kept checkpoint.

    Attributes:
      is_drawn: whether anything is.
      sampler: of the samples.
      time_grid: how its fixed grid is placed.
      samples: compared with the data; 0: none, and what follows is not used.
      noises: behind straightness.
      boundaries: [k + 1] in t, of sequential straightness.
      batch_size: over the devices of all hosts.
      data, options: what the samples are compared with.
    """

    is_drawn: bool
    sampler: Sampler
    time_grid: str
    samples: int
    noises: int
    boundaries: np.ndarray
    batch_size: int
    data: datasets.DataOptions
    options: reference.Options


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """All that a training stage will do.

    Attributes:
      stage: which it is.
      workdir, folder: of the run, and of the stage in it.
      network: without weights.
      data: what it trains on.
      start: () -> the checkpoint that a new run starts from; None: random weights.
      values: the number of updates and the EMA's rate.
      seed: of weights, noise and times.
      batch_size: over the devices of all hosts.
      keep_snapshots: the most recent ones that are kept; 0: all.
      profile: whether a profiler's trace is written.
      settings: the configuration as run.json keeps it.
      log_name: of the run in wandb.
    """

    stage: Stage
    workdir: epath.Path
    folder: epath.Path
    network: models.NCSNpp
    data: TrainingData
    start: Callable[[], CheckpointRef | None]
    values: StageValues
    update: UpdatePlan
    cadence: Cadence
    snapshots: SnapshotPlan
    seed: int
    batch_size: int
    keep_snapshots: int
    profile: bool
    settings: dict[str, Any]
    log_name: str

    def summary(self) -> dict[str, Any]:
        """What --dry_run prints."""
        begun = runs.latest_step(self.folder)
        source = self.start() if begun is None else None
        return {
            "job": f"train {self.stage.model_name(self.network.heads)}",
            "from": f"its update {begun}" if begun is not None else source.name if source else "random weights",
            "on": self.data.folder or self.snapshots.data.name,
            "into": self.folder,
            "boundaries": self.data.boundaries.tolist(),
            "updates": self.values.n_iters,
            "batch size": self.batch_size,
            "EMA": f"{self.values.ema_rate}{', capped at first' if self.values.variable_ema_rate else ''}",
            "samples": self.snapshots.sampler.name,
        }


def train_plan(config: Config, workdir: epath.Path, stage: Stage, log_name: str) -> TrainPlan:
    """What the configuration means for a stage in this workdir. Needs no device.

    Raises:
      InputError: no data, or data of another kind.
    """
    folder, training = workdir / stage.folder, config.training
    begun = runs.latest_step(folder) is not None
    values = stage_values(config, runs.read_settings(folder) if begun else None)
    network = models.create_model(config).clone(heads=segments_of(config))
    data = stage.data(config, workdir)
    return TrainPlan(
        stage=stage,
        workdir=workdir,
        folder=folder,
        network=network,
        data=data,
        start=functools.partial(starting_checkpoint, config, workdir / stage.parent if stage.parent else None),
        values=values,
        update=_update_plan(config, stage, data, values),
        cadence=Cadence(
            training.log_freq,
            training.snapshot_freq,
            training.snapshot_freq_for_preemption,
            training.n_jitted_steps,
        ),
        snapshots=_snapshot_plan(config, network, data.boundaries),
        seed=config.seed,
        batch_size=training.batch_size,
        keep_snapshots=training.keep_snapshots,
        profile=training.profile,
        settings=resolved(config, values, network.heads),
        log_name=log_name,
    )


def _update_plan(config: Config, stage: Stage, data: TrainingData, values: StageValues) -> UpdatePlan:
    training, optim = config.training, config.optim
    num_steps = (len(data.boundaries) - 1) * stage.steps
    return UpdatePlan(
        targets=stage.targets(config),
        optimizer=builders.optimizer(config, values),
        rate=train_step.learning_rate(optim.lr, optim.warmup, optim.schedule, values.n_iters),
        loss=training.loss,
        reduce_mean=training.reduce_mean,
        lpips=(training.lpips_path, training.lpips_heads),
        on_policy=losses.OnPolicy(tuple(data.boundaries.tolist()), num_steps) if data.on_policy else None,
        drops_nonfinite=training.nan_policy == "skip",
        accumulate=training.accumulate,
        ema_rates=config.model.ema_rates,
        from_ema=training.init_from_ema,
    )


def _snapshot_plan(config: Config, network: models.NCSNpp, boundaries: np.ndarray) -> SnapshotPlan:
    return SnapshotPlan(
        is_drawn=config.training.snapshot_sampling,
        sampler=Sampler(network, boundaries, network.image_shape, builders.sampler_options(config), config.seed),
        time_grid=config.sampling.time_grid,
        samples=config.training.snapshot_fid_sample,
        noises=config.eval.straightness_samples,
        boundaries=builders.measured_boundaries(config, boundaries),
        batch_size=config.eval.batch_size,
        data=builders.data_options(config),
        options=builders.reference_options(config),
    )


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Run:
    """A training stage in progress.

    Attributes:
      metadata: saved beside every checkpoint.
      saved: the checkpoints.
      tracker: of losses, metrics and pictures.
      real: what snapshots are compared with; None where they are not measured.
    """

    plan: TrainPlan
    metadata: dict[str, Any]
    saved: runs.RunCheckpoints
    tracker: Tracker
    real: reference.RealData | None


def train_stage(plan: TrainPlan) -> None:
    """Trains a stage up to its number of updates, from its latest checkpoint if there is one.

    Raises:
      InputError: no parent or pairs that fit; a value that is not finite.
      Preempted: the process was asked to stop; the state is saved.
    """
    folder = plan.folder
    utils.check_writable(plan.workdir, folder / "checkpoints", folder / "checkpoints-meta")
    with contextlib.closing(runs.RunCheckpoints(folder, keep_snapshots=plan.keep_snapshots)) as saved:
        state, metadata, is_new = _first_state(plan, saved)
        start, n_iters = int(state.step), plan.values.n_iters
        if distributed.is_first_host():
            runs.write_settings(folder, plan.settings)
        has_snapshot = start in runs.steps_in(folder)
        if start >= n_iters and has_snapshot and _is_drawn(plan, start) and _has_loss_picture(folder):
            logger.info("%s has its %d updates already", folder, start)
            return
        saved.check_room(state)
        real = _real_data(plan.snapshots)
        name = f"{plan.log_name}-{plan.stage.folder}"
        with contextlib.closing(
            builders.tracker_of(plan.settings, folder, plan.workdir, name, resume_step=start)
        ) as tracker:
            run = _Run(plan, metadata, saved, tracker, real)
            if is_new or (start >= n_iters and not has_snapshot):
                _save_snapshot(run, state)
            elif has_snapshot and not _is_drawn(plan, start):
                _draw_snapshot(run, state)  # killed after the checkpoint and before its picture
            if start < n_iters:
                _update_until_done(run, state)
            _draw_losses(run)
    logger.info("checkpoints, samples and losses are in %s", folder)


def _real_data(snapshots: SnapshotPlan) -> reference.RealData | None:
    if not snapshots.is_drawn or not snapshots.samples:
        return None
    return reference.real_data(snapshots.data, snapshots.options, snapshots.batch_size)


def _first_state(plan: TrainPlan, saved: runs.RunCheckpoints) -> tuple[train_step.TrainState, dict[str, Any], bool]:
    """(the state that training starts from, the metadata of its checkpoints, whether the run is new).

    A run's own latest state, else its starting weights. A 1-RF that is given weights continues their count of updates;
    a reflow stage learns something new and counts from 0.
    """
    folder, network, stage, data = plan.folder, plan.network, plan.stage, plan.data
    metadata = make_metadata(network, stage.folder, data.boundaries, teacher=data.teacher)
    metadata |= {} if data.count is None else {"pairs": data.count}
    if saved.latest_step() is not None and (settings := runs.read_settings(folder)):
        check_resume(settings, plan.settings, folder, lambda: _began_with(folder, _starting_weights(plan)[1]))
    like = jax.eval_shape(lambda: _initial_state(plan, random_weights(network, plan.seed), step=0))
    if (state := saved.resume(like, metadata)) is not None:
        logger.info("resuming %s from update %d", folder, state.step)
        begun = checkpoint_at(folder).metadata
        return state, metadata | {name: begun[name] for name in ("source", "start") if name in begun}, False
    source, weights = _starting_weights(plan)
    name = source.name if source else "random"
    metadata |= {"source": name, "start": start_fingerprint(weights)}
    log_source(name if source else "random weights", weights, centered=network.centered)
    if source:
        data.check_fit(source, weights, distills=stage.distills)
    return _initial_state(plan, weights, step=0 if stage.parent else int(weights.step)), metadata, True


def _starting_weights(plan: TrainPlan) -> tuple[CheckpointRef | None, models.Weights]:
    """(what a stage starts from, its weights); None and random weights for a 1-RF that is given nothing."""
    source = plan.start()
    return source, source.load(plan.network) if source else random_weights(plan.network, plan.seed)


def random_weights(network: models.NCSNpp, seed: int) -> models.Weights:
    """Fresh weights, their EMA a copy, Adam's moments zero."""
    params = models.init_params(network, distributed.random_key(seed), network.image_shape)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return models.Weights(params=params, ema_params=params, mu=zeros, nu=zeros, count=0, step=0)


def _began_with(folder: epath.Path, weights: models.Weights) -> bool:
    """Whether a run began with these weights; False for one of a version that did not keep which."""
    return checkpoint_at(folder).metadata.get("start") == start_fingerprint(weights)


def _initial_state(plan: TrainPlan, weights: models.Weights, *, step: int) -> train_step.TrainState:
    update = plan.update
    return train_step.initial_state(
        weights, update.optimizer, step=step, ema_rates=update.ema_rates, from_ema=update.from_ema
    )


# --- updates ----------------------------------------------------------------------------------------------------------


def update_program(plan: TrainPlan) -> Callable:
    """The program of all devices: (state, batches [devices, n, B, ...], seed) -> (state, values).

    It takes the state's memory for the new one. `train_step.make_train_step` says what it computes.
    """
    update = plan.update
    loss = losses.make_loss(update.loss, reduce_mean=update.reduce_mean, lpips=_lpips(plan))
    step = train_step.make_train_step(
        plan.network,
        update.targets,
        loss,
        update.optimizer,
        ema_rate=plan.values.ema_rate,
        variable_ema_rate=plan.values.variable_ema_rate,
        on_policy=update.on_policy,
        drop_nonfinite=update.drops_nonfinite,
        accumulate=update.accumulate,
    )
    return distributed.map_devices(step, all_hosts=True, donate=(0,))


def _lpips(plan: TrainPlan) -> Callable | None:
    if plan.update.loss != "lpips_huber":
        return None
    from models.lpips import load_lpips

    return load_lpips(*plan.update.lpips, centered=plan.network.centered)


def _update_until_done(run: _Run, state: train_step.TrainState):
    """Raises Preempted, with the state saved, if the process is asked to stop; InputError as `UpdateMetrics.check`."""
    plan, cadence, n_iters, step = run.plan, run.plan.cadence, run.plan.values.n_iters, int(state.step)
    program = progress.announced(update_program(plan), "the training step")
    state, seed = distributed.replicate((state, np.uint32(plan.seed)))
    run_ahead, any_host, metrics = distributed.RunAhead(), distributed.AnyHost(), _update_metrics(run)
    rates, pace = _learning_rates(plan), progress.Pace(plan.batch_size)
    calls = _calls(plan, step, pace)
    if plan.profile and distributed.is_first_host():
        calls = progress.profiled(calls, plan.folder / "profile")
    with tqdm.tqdm(total=n_iters, initial=step, desc=plan.stage.folder, unit="update", disable=None) as bar:
        for batch, count in calls:
            state, computed = program(state, batch, seed)
            run_ahead.add(computed)
            before, step = step, step + count
            metrics.add(step, computed)
            if pace.add(count):
                bar.unpause()  # its clock did not run while the step was compiled
            bar.update(count)
            if step // cadence.log > before // cadence.log or step == n_iters:
                run.saved.check()
                metrics.log(learning_rate=float(rates[step - 1]), **pace.summary())
            stops = any_host(runtime.preemption.requested is not None)
            is_snapshot = step % cadence.snapshot == 0 or step == n_iters
            if is_snapshot or stops or step % cadence.preemption == 0:
                metrics.check()
                (_save_snapshot if is_snapshot else _save_preemption_checkpoint)(run, distributed.first_copy(state))
                pace.restart()
            if stops:
                run.saved.wait()
                raise runtime.preemption.stopped(f"after update {step} of {n_iters}")


def _update_metrics(run: _Run) -> progress.UpdateMetrics:
    drops = run.plan.update.drops_nonfinite
    remedy = f"lower optim.lr, or look at the data; the checkpoints before it are in {run.plan.folder}"
    if not drops:
        remedy = f"use training.nan_policy=skip to drop such updates, {remedy}"

    def log(step: int, values: dict[str, Any]) -> None:
        run.tracker.log(step, values, shown=_place(run.plan, step, values))

    return progress.UpdateMetrics(log, drops=drops, remedy=remedy)


def _place(plan: TrainPlan, step: int, values: dict[str, Any]) -> str:
    """Where a stage is, for its lines of log, such as 'update 50 of 1400, 01:20 left, 11.2 GiB'."""
    parts = [f"update {step} of {plan.values.n_iters}"]
    if pace := values.get("images_per_second"):
        parts.append(f"{tqdm.tqdm.format_interval((plan.values.n_iters - step) * plan.batch_size / pace)} left")
    if memory := (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):  # not known of a CPU
        parts.append(f"{memory / 2**30:.1f} GiB")
    return ", ".join(parts)


def _calls(plan: TrainPlan, step: int, pace: progress.Pace) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """(batch [devices, updates, B, ...], updates) of every call of the program, up to the last update.

    Calls end at multiples of `cadence.call`, where checkpoints are due, whatever update a run starts from.
    """
    whole, n_iters = plan.cadence.call, plan.values.n_iters
    batches = distributed.prefetch(plan.data.batches(step - step % whole))
    while step < n_iters:
        with pace.waiting():
            batch, first = next(batches), step % whole
        count = min(whole - first, n_iters - step)
        if count < whole:
            batch = {name: rows[:, first : first + count] for name, rows in batch.items()}
        yield batch, count
        step += count


def _learning_rates(plan: TrainPlan) -> np.ndarray:
    """[n_iters] of every update: computed before them, because later the devices are busy."""
    n_iters = plan.values.n_iters
    return np.broadcast_to(np.asarray(plan.update.rate(np.arange(n_iters))), n_iters)


# --- snapshots --------------------------------------------------------------------------------------------------------


def _save_preemption_checkpoint(run: _Run, state: train_step.TrainState):
    """Saves a checkpoint to resume from, with the losses up to it."""
    run.saved.save(state, run.metadata, keep=False)
    run.tracker.flush()


def _save_snapshot(run: _Run, state: train_step.TrainState):
    """Saves a checkpoint to keep, draws its samples and, where asked for, measures their distance to the data."""
    run.saved.save(state, run.metadata, keep=True)
    run.tracker.flush()
    _draw_snapshot(run, state)


def _picture_of(folder: epath.Path, step: int) -> epath.Path:
    return folder / "samples" / f"step_{step}.png"


def _is_drawn(plan: TrainPlan, step: int) -> bool:
    return distributed.agreed(not plan.snapshots.is_drawn or _picture_of(plan.folder, step).exists())


def _has_loss_picture(folder: epath.Path) -> bool:
    """Whether nothing is left to draw of the losses, on every host."""
    logged = any("loss" in line for line in read_history(folder / "metrics.json"))
    return distributed.agreed((folder / LOSSES).exists() or not logged)


def _draw_snapshot(run: _Run, state: train_step.TrainState):
    """Measures and draws a snapshot on all hosts; the picture comes last, as the mark of a finished one."""
    plan, wanted, step = run.plan, run.plan.snapshots, int(state.step)
    if not wanted.is_drawn:
        return
    params, centered = state.ema_params, plan.network.centered
    sampler = wanted.sampler.with_time_grid(params, wanted.time_grid)
    if run.real:
        size = wanted.batch_size
        quality, images = evaluation.sample_quality(
            sampler, params, wanted.samples, size, real=run.real, centered=centered
        )
        straight = evaluation.trajectory_metrics(sampler, params, wanted.boundaries, wanted.noises, size)
        quality["straightness"] = straight.straightness
        quality["sequential_straightness"] = straight.sequential_straightness
        run.tracker.log(step, quality)
        run.tracker.flush()
    else:
        images = datasets.unscale(next(sampler.samples(params, SHOWN_IMAGES, SHOWN_IMAGES)), centered)
    picture = _picture_of(plan.folder, step)
    if distributed.is_first_host():
        plots.draw_images(picture, images)
    run.tracker.picture(step, "samples", picture)


def _draw_losses(run: _Run):
    lines = [line for line in run.tracker.history if "loss" in line]
    if lines:
        steps, values = [line["step"] for line in lines], [line["loss"] for line in lines]
        plots.draw_loss(run.plan.folder / LOSSES, steps, values)
