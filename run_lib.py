"""The jobs: train a flow, generate pairs, evaluate, sample. `train` and `evaluate` are read from the top down."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from etils import epath

import adaptive
import checkpoints
import datasets
import evaluation
import features
import figures
import losses
import models
import parallel
import provenance
import real_data
import reflow
import runtime
import sample_files
import segments
import sources
import tracking
import updates
import utils
from configs.check import check_batches, check_config, check_steps, segments_of
from configs.default import is_given
from configs.resume import check_resume
from configs.samplers import sampler_configs
from evaluation import SHOWN_IMAGES
from pairs import manifest as pairmanifest
from pairs.plan import PairPlan, plan_pairs
from pairs.workers import worker_of
from sampler import Sampler

logger = logging.getLogger("seqrf")

Config: TypeAlias = ml_collections.ConfigDict


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


def _stage(config, reflow_mode: str) -> Stage:
    """The stage that `rf_phase` and a mode such as train_reflow or eval_distill mean."""
    stage = STAGES["rf" if config.model.rf_phase == 1 else reflow_mode.partition("_")[2]]
    steps = config.training.distill_steps
    is_many_step = stage is STAGES["distill"] and steps > 1
    return dataclasses.replace(stage, folder=f"{stage.folder}_{steps}") if is_many_step else stage


def train(config: Config, workdir: epath.PathLike, *, log_name: str = "seqrf") -> None:
    """--mode=train: trains 1-RF, generates pairs, trains k-SeqRF or distils it, as the configuration says.

    Raises:
      InputError: anything in the configuration, the data or the workdir that cannot work, before work is done.
    """
    config = _prepare(config, "train")
    workdir = epath.Path(workdir)
    if config.model.rf_phase == 2 and config.training.reflow_mode == "gen_reflow":
        _generate_pairs(config, workdir, log_name)
    else:
        _train_stage(config, workdir, _stage(config, config.training.reflow_mode), log_name)


def _prepare(config: Config, mode: str) -> Config:
    """Validates the configuration, starts the hosts and sets up the compilation cache; the configuration, k resolved.

    Raises:
      InputError: a setting that cannot work.
    """
    check_config(config, mode)
    config = _resolve_segments(config)
    runtime.start_hosts()
    runtime.set_up_compilation_cache(features.cache_folder() / "compiled")
    check_batches(config, mode, devices=jax.device_count())
    return config


def _resolve_segments(config: Config) -> Config:
    """A copy with k in training.reflow_t: 1 for a 1-RF, whose eval.segments keeps what was given."""
    config = config.copy_and_resolve_references()
    config.eval.segments = config.eval.segments or config.training.reflow_t
    config.training.reflow_t = segments_of(config)
    return config


# --- training ---------------------------------------------------------------------------------------------------------


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
    saved: checkpoints.RunCheckpoints
    tracker: tracking.Tracker
    real: real_data.RealData | None


def _train_stage(config, workdir, stage: Stage, log_name: str):
    data = stage.data(config, workdir)
    model, folder = models.create_model(config), workdir / stage.folder
    utils.check_writable(workdir, folder / "checkpoints", folder / "checkpoints-meta")
    with contextlib.closing(checkpoints.RunCheckpoints(folder, keep_snapshots=config.training.keep_snapshots)) as saved:
        state, metadata, is_new = _first_state(config, workdir, stage, data, model, saved)
        start, n_iters = int(state.step), config.training.n_iters
        if parallel.is_first_host():
            checkpoints.write_settings(folder, config)
        if start >= n_iters and start in checkpoints.steps_in(folder) and _is_drawn(config, folder, start):
            logger.info("%s has its %d updates already", folder, start)
            return
        saved.check_room(state)
        real = real_data_of(config) if _measures_snapshots(config) else None
        tracker = _tracker(config, folder, workdir, f"{log_name}-{stage.folder}", resume_step=start)
        with contextlib.closing(tracker):
            sampler = _sampler(config, model, data.boundaries)
            run = _Run(config, folder, model, sampler, metadata, saved, tracker, real)
            if is_new or (start >= n_iters and start not in checkpoints.steps_in(folder)):
                _save_snapshot(run, state)
            elif start in checkpoints.steps_in(folder) and not _is_drawn(config, folder, start):
                _draw_snapshot(run, state)  # killed after the checkpoint and before its picture
            if start < n_iters:
                _update_until_done(run, stage, data, state)
            _draw_losses(run)
    logger.info("checkpoints, samples and losses are in %s", folder)


def _first_state(config, workdir, stage: Stage, data, model, saved) -> tuple[losses.TrainState, dict[str, Any], bool]:
    """(the state that training starts from, the metadata of its checkpoints, whether the run is new).

    A run's own latest state, else its starting weights. A 1-RF that is given weights continues their count of updates;
    a reflow stage learns something new and counts from 0.
    """
    folder = workdir / stage.folder
    metadata = checkpoints.make_metadata(config, stage.folder, data.boundaries, teacher=data.teacher)
    random = functools.partial(_initial_state, config, step=0)
    like = jax.eval_shape(lambda: random(_random_weights(config, model)))
    if saved.latest_step() is not None and (settings := checkpoints.read_settings(folder)):
        check_resume(settings, config, folder)
    if (state := saved.resume(like, metadata)) is not None:
        logger.info("resuming %s from update %d", folder, state.step)
        return state, metadata | {"source": checkpoints.read_metadata(folder)["source"]}, False
    parent = None if stage.parent is None else workdir / stage.parent
    source = sources.starting_checkpoint(config, parent)
    if source is None:
        weights = _random_weights(config, model)
        checkpoints.log_source("random weights", weights, centered=config.data.centered)
        return random(weights), metadata | {"source": "random"}, True
    weights = source.load()
    checkpoints.log_source(source.name, weights, centered=config.data.centered)
    data.check_fit(source, weights, distills=stage.parent == "2_rf")
    step = int(weights.step) if stage.parent is None else 0
    return _initial_state(config, weights, step=step), metadata | {"source": source.name}, True


def _initial_state(config, weights, *, step: int) -> losses.TrainState:
    rates, from_ema = config.model.ema_rates, config.training.init_from_ema
    return losses.initial_state(weights, _optimizer(config), step=step, ema_rates=rates, from_ema=from_ema)


def _update_until_done(run: _Run, stage: Stage, data: sources.TrainingData, state: losses.TrainState):
    """Raises Preempted, with the state saved, if the process is asked to stop; InputError as `UpdateValues.check`."""
    training, step = run.config.training, int(state.step)
    program = parallel.map_devices(_train_step(run, stage, data), all_hosts=True, donate=(0,))
    state, seed = parallel.replicate((state, np.uint32(run.config.seed)))
    run_ahead, any_host, values = parallel.RunAhead(), parallel.AnyHost(), _update_values(run)
    rates, pace = _learning_rates(run.config), updates.Pace(training.batch_size)
    calls = _calls(training, data, step, pace)
    if training.profile and parallel.is_first_host():
        calls = updates.profiled(calls, run.folder / "profile")
    with tqdm.tqdm(total=training.n_iters, initial=step, desc=stage.folder, unit="update", disable=None) as progress:
        for batch, count in calls:
            state, computed = program(state, batch, seed)
            run_ahead.add(computed)
            before, step = step, step + count
            values.add(step, computed)
            pace.add(count)
            progress.update(count)
            if step // training.log_freq > before // training.log_freq or step == training.n_iters:
                run.saved.check()
                values.log(learning_rate=float(rates[step - 1]), **pace.summary())
            stops = any_host(runtime.preemption.requested is not None)
            is_snapshot = step % training.snapshot_freq == 0 or step == training.n_iters
            if is_snapshot or stops or step % training.snapshot_freq_for_preemption == 0:
                values.check()
                (_save_snapshot if is_snapshot else _save_preemption_checkpoint)(run, parallel.first_copy(state))
                pace.restart()
            if stops:
                run.saved.wait()
                raise runtime.preemption.stopped(f"after update {step} of {training.n_iters}")


def _update_values(run: _Run) -> updates.UpdateValues:
    drops = run.config.training.nan_policy == "skip"
    remedy = f"lower optim.lr, or look at the data; the checkpoints before it are in {run.folder}"
    if not drops:
        remedy = f"use training.nan_policy=skip to drop such updates, {remedy}"
    return updates.UpdateValues(run.tracker.log, drops=drops, remedy=remedy)


def _calls(
    training, data: sources.TrainingData, step: int, pace: updates.Pace
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """(batch [devices, updates, B, ...], updates) of every call of the training step, up to n_iters.

    Calls end at multiples of n_jitted_steps, where checkpoints are due, whatever update a run starts from.
    """
    whole = training.n_jitted_steps
    batches = parallel.prefetch(data.batches(step - step % whole))
    while step < training.n_iters:
        with pace.waiting():
            batch, first = next(batches), step % whole
        count = min(whole - first, training.n_iters - step)
        if count < whole:
            batch = {name: rows[:, first : first + count] for name, rows in batch.items()}
        yield batch, count
        step += count


def _train_step(run: _Run, stage: Stage, data: sources.TrainingData) -> Callable:
    config, training = run.config, run.config.training
    num_steps = (len(data.boundaries) - 1) * training.distill_steps
    return losses.make_train_step(
        run.model,
        stage.targets(config),
        losses.make_loss(training.loss, reduce_mean=training.reduce_mean, lpips=_lpips(config)),
        _optimizer(config),
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


def _save_preemption_checkpoint(run: _Run, state: losses.TrainState):
    """Saves a checkpoint to resume from, with the losses up to it."""
    run.saved.save(state, run.metadata, keep=False)
    run.tracker.flush()


def _save_snapshot(run: _Run, state: losses.TrainState):
    """Saves a checkpoint to keep, draws its samples and, where asked for, measures their distance to the data."""
    run.saved.save(state, run.metadata, keep=True)
    run.tracker.flush()
    _draw_snapshot(run, state)


def _measures_snapshots(config) -> bool:
    return config.training.snapshot_sampling and config.training.snapshot_fid_sample > 0


def _picture_of(folder: epath.Path, step: int) -> epath.Path:
    return folder / "samples" / f"step_{step}.png"


def _is_drawn(config, folder: epath.Path, step: int) -> bool:
    return parallel.agreed(not config.training.snapshot_sampling or _picture_of(folder, step).exists())


def _draw_snapshot(run: _Run, state: losses.TrainState):
    """Measures and draws a snapshot on all hosts; the picture comes last, as the mark of a finished one."""
    config, step = run.config, int(state.step)
    if not config.training.snapshot_sampling:
        return
    params, centered = state.ema_params, config.data.centered
    sampler = run.sampler.with_time_grid(params, config.sampling.time_grid)
    if run.real:
        count, size = config.training.snapshot_fid_sample, config.eval.batch_size
        quality, images = evaluation.sample_quality(sampler, params, count, size, real=run.real, centered=centered)
        boundaries, noises = _measured_boundaries(config, sampler), config.eval.straightness_samples
        straight = evaluation.trajectory_metrics(sampler, params, boundaries, noises, size)
        quality["straightness"] = straight.straightness
        quality["sequential_straightness"] = straight.sequential_straightness
        run.tracker.log(step, quality)
        run.tracker.flush()
    else:
        images = datasets.unscale(next(sampler.samples(params, SHOWN_IMAGES, SHOWN_IMAGES)), centered)
    if parallel.is_first_host():
        figures.draw_images(_picture_of(run.folder, step), images)
    run.tracker.picture(step, "samples", _picture_of(run.folder, step))


def _draw_losses(run: _Run):
    lines = [line for line in run.tracker.history if "loss" in line]
    if lines:
        figures.draw_loss(run.folder / "loss.png", [line["step"] for line in lines], [line["loss"] for line in lines])


# --- parts of several jobs, from the configuration --------------------------------------------------------------------


def _optimizer(config):
    return losses.optimizer(**config.optim, n_iters=config.training.n_iters)


def _learning_rates(config) -> np.ndarray:
    """[n_iters] of every update: computed before them, because later the devices are busy."""
    settings, n_iters = config.optim, config.training.n_iters
    rate = losses.learning_rate(settings.lr, settings.warmup, settings.schedule, n_iters)
    return np.broadcast_to(np.asarray(rate(np.arange(n_iters))), n_iters)


def _random_weights(config, model) -> models.Weights:
    params = models.init_params(model, jax.random.key(config.seed), sources.image_shape(config))
    zeros = jax.tree.map(jnp.zeros_like, params)
    return models.Weights(params=params, ema_params=params, mu=zeros, nu=zeros, count=0, step=0)


def _sampler(config, model, boundaries) -> Sampler:
    """How the section sampling samples a network."""
    return Sampler(
        model=model,
        boundaries=np.asarray(boundaries, np.float32),
        image_shape=sources.image_shape(config),
        options=_sampler_options(config),
        seed=config.seed,
    )


def _sampling_settings(config) -> dict[str, Any]:
    """What the configuration says of sampling, as an evaluation's settings have it."""
    rounded = {} if config.model.dtype == "float32" else {"dtype": config.model.dtype}
    return config.sampling.to_dict() | {"num_scales": config.model.num_scales} | rounded


def _sampler_options(config) -> dict[str, Any]:
    settings = config.sampling
    if settings.method == "pc":
        return {"method": "pc", "predictor": settings.predictor, "num_scales": config.model.num_scales}
    return {"method": "ode", "tol": settings.tol, "solver": settings.solver, "error_norm": settings.error_norm}


def real_data_options(config: Config) -> real_data.Options:
    """Which feature network and which real images `config.eval` asks for."""
    settings = config.eval
    return real_data.Options(
        inception_path=settings.inception_path,
        feature_backend=settings.feature_backend,
        file=settings.reference,
        max_real=settings.max_real,
        network=settings.feature_network,
    )


def real_data_of(config: Config) -> real_data.RealData:
    """What an evaluation with this configuration compares samples with. Errors as `real_data.of_config`."""
    return real_data.of_config(config.data, real_data_options(config), config.eval.batch_size)


def _measured_boundaries(config, sampler: Sampler) -> np.ndarray:
    """[k + 1] of sequential straightness; of a 1-RF those of the segments that it would be cut into."""
    return sampler.boundaries if config.model.rf_phase == 2 else segments.uniform_boundaries(config.eval.segments)


def _tracker(config, folder, workdir, name: str, **options) -> tracking.Tracker:
    primary = parallel.is_first_host()
    record = provenance.of_process(config.to_dict())
    shown = record["config"] | {"provenance": {key: value for key, value in record.items() if key != "config"}}
    tracker = tracking.Tracker(folder, workdir=workdir, name=name, config=shown, primary=primary, **options)
    if primary:
        utils.write_json(folder / "provenance.json", record)
    return tracker


def _log_pictures(tracker, step: int, folder: epath.Path):
    """Logs every picture in a folder to wandb."""
    for picture in sorted(folder.glob("*.png")):
        tracker.picture(step, picture.stem, picture)


# --- pairs ------------------------------------------------------------------------------------------------------------


def _generate_pairs(config, workdir: epath.Path, log_name: str):
    """Makes the missing files of the pair set, or of the trajectory set (`training.reflow_pairs`)."""
    utils.check_writable(workdir / "samples")
    images = datasets.image_source(config.data)
    source: Any = sources.starting_checkpoint(config, workdir / STAGES["rf"].folder)
    weights = source.load()
    checkpoints.log_source(source.name, weights, centered=config.data.centered)
    model, teacher = models.create_model(config), weights.ema_params
    boundaries, extra = _pair_boundaries(config, workdir, model, teacher)
    plan = _pair_plan(config, workdir, images, boundaries, teacher)
    index, workers = worker = worker_of(config.training.gen_worker)
    # Workers that do not know each other share the folder.
    name = ("_trajectories" if plan.is_trajectory else "") + (f"_{index}_of_{workers}" if workers > 1 else "")
    run_name, file_name = f"{log_name}-pairs{name}", f"metrics{name}.json"
    with contextlib.closing(_tracker(config, workdir / "samples", workdir, run_name, file_name=file_name)) as tracker:
        summary = reflow.generate(
            plan,
            images,
            functools.partial(models.velocity_fn, models.in_float32(model)),
            teacher,
            batch_size=config.training.gen_reflow_size,
            worker=worker,
            extra=extra,
        )
        if summary.pairs:
            made = {"pairs": summary.pairs, "pairs_per_second": summary.pairs_per_second, "seconds": summary.seconds}
            made |= {f"nfe_segment_{i}": nfe for i, nfe in enumerate(summary.nfe)}
            existing = plan.pairs - sum(map(plan.count, pairmanifest.missing_files(plan)))
            tracker.log(existing, made)
            _log_pictures(tracker, existing, workdir / "samples")
    logger.info("the %s are in %s", "trajectories" if plan.is_trajectory else "pairs", plan.folder)


def _pair_plan(config, workdir, images: datasets.ImageSource, boundaries, teacher) -> PairPlan:
    training, data, sampling = config.training, config.data, config.sampling
    is_trajectory = training.reflow_pairs == "trajectory"
    return plan_pairs(
        folder=workdir / (sources.TRAJECTORIES if is_trajectory else sources.PAIRS),
        boundaries=boundaries,
        pairs=training.n_reflow_data,
        file_size=training.reflow_file_size,
        dtype=training.reflow_dtype,
        store_noise=training.reflow_store_noise,
        image_shape=sources.image_shape(config),
        dataset=images.identity,
        dataset_size=images.size,
        centered=data.centered,
        flip=data.random_flip,
        dequantize=data.uniform_dequantization,
        seed=config.seed,
        teacher=checkpoints.fingerprint(teacher),
        tol=sampling.tol,
        solver=sampling.solver,
        error_norm=sampling.error_norm,
        inverted_pairs=0.0 if is_trajectory else training.inverted_pairs,
        reflow_pairs=training.reflow_pairs,
    )


def _pair_boundaries(config, workdir, model, teacher) -> tuple[np.ndarray, dict[str, Any]]:
    """(boundaries, their entries in the manifest): of pairs or trajectories begun before, else as configured."""
    k, is_adaptive = config.training.reflow_t, config.training.adaptive_interval
    for folder in (sources.PAIRS, sources.TRAJECTORIES):
        manifest = pairmanifest.read_manifest(workdir / folder)
        if manifest is not None and (manifest["k"], manifest.get("adaptive")) == (k, is_adaptive):
            names = {"adaptive", "cost_adaptive", "cost_uniform"} & manifest.keys()
            return np.asarray(manifest["boundaries"], np.float32), {name: manifest[name] for name in sorted(names)}
    if not is_adaptive:
        return segments.uniform_boundaries(k), {"adaptive": False}
    sampler = _sampler(config, model, segments.uniform_boundaries(k))
    partition = adaptive.best_partition(sampler.fine_distances(teacher), k)
    costs = partition.cost, partition.uniform_cost
    logger.info("SeqRF-Ada: boundaries %s, cost %.4g (uniform %.4g)", partition.boundaries, *costs)
    figures.draw_partition(workdir / "samples" / "division.png", partition)
    return partition.boundaries, {"adaptive": True, "cost_adaptive": costs[0], "cost_uniform": costs[1]}


# --- evaluation -------------------------------------------------------------------------------------------------------


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
    tracker: tracking.Tracker


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


def evaluate(config: Config, workdir: epath.PathLike, eval_folder: str, *, log_name: str = "seqrf") -> None:
    """--mode=eval: measures every checkpoint asked for, each into `<workdir>/<eval_folder>/step_<step>/`.

    With several samplers (`eval.samplers`) each has a folder `<eval_folder>_<sampler>` in its place. A checkpoint that
    was measured with the same settings is not measured again. `best.json` names the step of the lowest FID. Several
    hosts share the samples, and the first one writes.

    Raises:
      InputError: no checkpoint, no data, no feature network; a setting that cannot work.
    """
    config = _prepare(config, "eval")
    workdir, stage = epath.Path(workdir), _stage(config, config.eval.reflow_mode)
    found = sources.checkpoints_to_evaluate(config, workdir / stage.folder)
    config.training.reflow_t = sources.evaluated_segments(config, next(iter(found.values())))
    for each in sampler_configs(config).values() or [config]:
        check_steps(each, "eval")
    utils.check_writable(workdir)
    loaded = {step: source.load() for step, source in itertools.islice(found.items(), 1)}  # before features take long
    model = models.create_model(config)
    sampler_over = functools.cache(lambda *boundaries: _sampler(config, model, boundaries))  # each compiled once
    teacher, judged_by = _teacher(config, workdir, sampler_over)
    real = real_data_of(config)
    name = stage.model_name.format(k=config.training.reflow_t)
    parts = _measurements(config, workdir, eval_folder, log_name)
    with contextlib.closing(parts[0].tracker):
        for step, source in tqdm.tqdm(found.items(), desc=eval_folder, unit="checkpoint", disable=None):
            weights = loaded.pop(step, None) or source.load()
            step, params = int(weights.step) if step is None else step, weights.ema_params
            sampler = sampler_over(*sources.evaluated_boundaries(config, workdir, source).tolist())
            references = {"truncation_error": _reference(config, sampler, params)} | judged_by
            origin = {
                "workdir": os.fspath(workdir.absolute()),
                "checkpoint": source.name,
                "pairs": _pair_sets(workdir, source),
            }
            checkpoint = _Measured(step, name, params, sampler, references, teacher, origin)
            for part in parts:
                _check_stop(f"before checkpoint {step} was measured")
                _measure(part, checkpoint, real)
    for part in parts:
        if parallel.is_first_host():
            evaluation.mark_best(part.folder, checkpoint.step)
        logger.info("metrics and pictures are in %s", part.folder)


def _check_stop(where: str):
    """Raises Preempted on every host if one of them has been asked to stop; all must call."""
    is_asked = runtime.preemption.requested is not None
    if parallel.gather(np.array([is_asked])).any():
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
            tracker = _tracker(config, folder, workdir, f"{log_name}-{eval_folder}", prefix=prefix)
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
    source = sources.checkpoint_at(config.eval.teacher, config)
    params, boundaries = source.load().ema_params, sources.evaluated_boundaries(config, workdir, source)
    reference = _reference(config, sampler_over(*boundaries.tolist()), params)
    return checkpoints.fingerprint(params), {"rms_to_teacher": reference}


def _measure(part: _Measurement, checkpoint: _Measured, real: real_data.RealData) -> None:
    """Writes the numbers of a checkpoint to `<folder>/step_<step>/metrics.json`, unless they are there already."""
    config, folder = part.config, part.folder / f"step_{checkpoint.step}"
    sampler = dataclasses.replace(checkpoint.sampler, options=_sampler_options(config))
    params, protocol = checkpoint.params, _protocol(config, sampler, real)
    settings = evaluation.settings(
        sampler,
        params,
        protocol,
        real,
        sampling=_sampling_settings(config),
        data=f"{config.data.dataset} {config.data.category}".strip(),
    )
    if checkpoint.teacher:
        settings["teacher"] = checkpoint.teacher
    if parallel.agreed(utils.read_json(folder / "metrics.json", {}).get("settings") == settings):
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
    if parallel.is_first_host():
        utils.write_json(folder / "metrics.json", {**named, **values, "settings": settings, "provenance": record})
    part.tracker.log(checkpoint.step, values)
    _log_pictures(part.tracker, checkpoint.step, folder)
    part.tracker.record(record)
    part.tracker.flush()


def _pair_sets(workdir, source: sources.CheckpointRef) -> dict[str, str]:
    """The hashes of the manifests of the workdir's pairs and trajectories, for a checkpoint trained on pairs."""
    if source.metadata.get("teacher") is None:
        return {}
    folders = sources.PAIRS, sources.TRAJECTORIES
    return provenance.file_hashes(workdir / folder / pairmanifest.MANIFEST for folder in folders)


def _protocol(config, sampler: Sampler, real: real_data.RealData) -> evaluation.Protocol:
    return evaluation.Protocol(
        num_samples=config.eval.num_samples,
        straightness_samples=config.eval.straightness_samples,
        batch_size=config.eval.batch_size,
        boundaries=_measured_boundaries(config, sampler),
        centered=config.data.centered,
        time_grid=config.sampling.time_grid,
        save_trajectory=config.eval.save_trajectory,
        precision_recall_samples=config.eval.precision_recall_samples,
        nearest_samples=config.eval.nearest_samples,
        floor=evaluation.floor(real, config.data, config.eval.batch_size, config.eval.num_samples)
        if config.eval.floor
        else None,
    )


# --- samples ----------------------------------------------------------------------------------------------------------


def sample(config: Config, workdir: epath.PathLike, eval_folder: str) -> None:
    """--mode=sample: samples of one checkpoint as pictures and arrays, in `<workdir>/<eval_folder>/`.

    The checkpoint is the last of those that `evaluate` would measure.

    Raises:
      InputError: no checkpoint; a setting that cannot work.
    """
    config = _prepare(config, "sample")
    workdir, stage = epath.Path(workdir), _stage(config, config.eval.reflow_mode)
    *_, source = sources.checkpoints_to_evaluate(config, workdir / stage.folder).values()
    config.training.reflow_t = sources.evaluated_segments(config, source)
    check_steps(config, "sample")
    weights, centered = source.load(), config.data.centered
    checkpoints.log_source(source.name, weights, centered=centered)
    params, boundaries = weights.ema_params, sources.evaluated_boundaries(config, workdir, source)
    sampler = _sampler(config, models.create_model(config), boundaries)
    sampler = sampler.with_time_grid(params, config.sampling.time_grid)
    about = {
        "checkpoint": source.name,
        "step": int(weights.step),
        "weights": checkpoints.fingerprint(params),
        "boundaries": boundaries.tolist(),
        "sampling": config.sampling.to_dict() | {"num_scales": config.model.num_scales},
    }
    wanted = sample_files.Wanted(**config.sample)
    sample_files.write_samples(workdir / eval_folder, sampler, params, wanted, centered=centered, about=about)
