"""The jobs: train a flow, generate pairs, evaluate. `train` and `evaluate` are read from the top down."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
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
import reflow
import runtime
import segments
import sources
import tfgan_compat
import tracking
import utils
from configs.check import check_batches, check_config, check_steps, segments_of
from pairs import manifest as pairmanifest
from pairs.plan import plan_pairs
from pairs.reader import PairSet
from pairs.workers import worker_of
from sampler import Sampler
from utils import InputError

logger = logging.getLogger("seqrf")

SHOWN_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one training stage has of its own; everything else is the same for all.

    Attributes:
      name: its folder in the workdir.
      targets: what the network learns from a batch (`losses`).
      batches: (config, pairs or None, first update) -> iterator of batches [devices, n_jitted_steps, B, ...].
      parent: the stage whose weights it starts from, unless a checkpoint is given; None: random weights.
    """

    name: str
    targets: Callable
    batches: Callable
    parent: str | None


def _image_batches(config, pairs, start: int) -> Iterator[dict[str, np.ndarray]]:
    training = config.training
    return datasets.train_batches(
        config.data,
        seed=config.seed,
        batch_size=training.batch_size,
        n_jitted_steps=training.n_jitted_steps,
        start_step=start,
    )


def _pair_batches(config, pairs: PairSet, start: int) -> Iterator[dict[str, np.ndarray]]:
    updates, devices = config.training.n_jitted_steps, jax.local_device_count()
    size = config.training.batch_size // jax.process_count()
    stream = pairs.batches(size, seed=config.seed, start=start)

    def by_device(name, batches):
        stacked = np.stack([batch[name] for batch in batches])
        return stacked.reshape(updates, devices, -1, *stacked.shape[2:]).swapaxes(0, 1)

    for first in stream:
        batches = [first, *itertools.islice(stream, updates - 1)]
        yield {name: by_device(name, batches) for name in first}


STAGES = {
    "1_rf": Stage("1_rf", losses.rf_targets, _image_batches, parent=None),
    "train_reflow": Stage("2_rf", losses.reflow_targets, _pair_batches, parent="1_rf"),
    "train_distill": Stage("2_distill", losses.distill_targets, _pair_batches, parent="2_rf"),
}


def train(config, workdir, *, log_name: str = "seqrf"):
    """--mode=train: trains 1-RF, generates pairs, trains k-SeqRF or distils it, as the configuration says.

    Raises:
      InputError: anything in the configuration, the data or the workdir that cannot work, before work is done.
    """
    config = _prepare(config, "train")
    workdir = epath.Path(workdir)
    if config.model.rf_phase == 1:
        _train_stage(config, workdir, STAGES["1_rf"], log_name)
    elif config.training.reflow_mode == "gen_reflow":
        _generate_pairs(config, workdir, log_name)
    else:
        _train_stage(config, workdir, STAGES[config.training.reflow_mode], log_name)


def _prepare(config, mode: str):
    """Validates the configuration, starts the hosts and sets up the compilation cache; the configuration, k resolved.

    Raises:
      InputError: a setting that cannot work.
    """
    check_config(config, mode)
    config = _resolve_segments(config)
    if mode == "train":
        runtime.start_hosts()
    runtime.set_up_compilation_cache(features.cache_folder() / "compiled")
    check_batches(config, mode, devices=jax.device_count(), local_devices=jax.local_device_count())
    return config


def _resolve_segments(config):
    """A copy with k in training.reflow_t: 1 for a 1-RF, whose eval.segments keeps what was given."""
    config = config.copy_and_resolve_references()
    config.eval.segments = config.eval.segments or config.training.reflow_t
    config.training.reflow_t = segments_of(config)
    return config


# --- training ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Run:
    """What a training stage works with between its first and its last update."""

    config: Any
    folder: epath.Path
    model: Any
    sampler: Sampler
    info: dict
    kept: checkpoints.RunCheckpoints
    tracker: tracking.Tracker
    features: features.DataFeatures | None  # None where no snapshot is measured


def _train_stage(config, workdir, stage: Stage, log_name):
    if stage.parent is None:
        datasets.image_source(config.data)  # a data set that is missing is said before anything is compiled
    pairs = None if stage.parent is None else sources.open_pairs(config, workdir)
    boundaries = segments.uniform_boundaries(1) if pairs is None else pairs.boundaries
    model, folder = models.create_model(config), workdir / stage.name
    kept = checkpoints.RunCheckpoints(folder)
    with contextlib.closing(kept):
        state, info, is_new = _first_state(config, workdir, stage, pairs, model, kept)
        start = int(state.step)
        if start >= config.training.n_iters and not is_new and _is_shown(config, folder, start):
            logger.info("%s has its %d updates already", folder, start)
            return
        features = _data_features(config) if _measures_snapshots(config) else None
        tracker = _tracker(config, folder, workdir, f"{log_name}-{stage.name}", resume_step=start)
        with contextlib.closing(tracker):
            run = _Run(config, folder, model, _sampler(config, model, boundaries), info, kept, tracker, features)
            if is_new:
                _keep(run, state)
            elif start in checkpoints.steps_in(folder) and not _is_shown(config, folder, start):
                _show(run, state)  # it was killed after the checkpoint and before the pictures
            if start < config.training.n_iters:
                _update_until_done(run, stage, state, pairs)
            _draw_losses(run)


def _first_state(config, workdir, stage, pairs, model, kept) -> tuple[losses.TrainState, dict, bool]:
    """(where training goes on, what is noted beside its checkpoints, whether the run is new).

    A run's own latest state, else its starting weights. A 1-RF that is given weights goes on counting theirs; a reflow
    stage learns something new and counts from 0.
    """
    transformation = _optimizer(config)
    boundaries, teacher = [1, 0], None
    if pairs is not None:
        boundaries, teacher = pairs.boundaries, pairs.manifest.get("teacher")
    metadata = functools.partial(checkpoints.make_metadata, config, stage.name, boundaries, teacher=teacher)
    fresh = jax.eval_shape(lambda: losses.initial_state(_random_weights(config, model), transformation))
    state = kept.resume(fresh, metadata())
    if state is not None:
        logger.info("going on in %s from update %d", workdir / stage.name, state.step)
        return state, metadata(source=checkpoints.read_metadata(workdir / stage.name)["source"]), False
    if stage.parent is None:
        source = sources.given_checkpoint(config)
    else:
        source = sources.starting_checkpoint(config, workdir / stage.parent)
    if source is None:
        return losses.initial_state(_random_weights(config, model), transformation), metadata(source="random"), True
    weights = source.load()
    checkpoints.log_source(source.name, weights)
    if pairs is not None:
        distills = config.training.reflow_mode == "train_distill"
        sources.check_pairs_fit(pairs, source, weights, distills=distills)
    step = int(weights.step) if stage.parent is None else 0
    return losses.initial_state(weights, transformation, step=step), metadata(source=source.name), True


def _update_until_done(run: _Run, stage, state, pairs):
    training, model_settings = run.config.training, run.config.model
    train_step = losses.make_train_step(
        run.model,
        stage.targets,
        losses.make_loss(training.loss, reduce_mean=training.reduce_mean),
        _optimizer(run.config),
        ema_rate=model_settings.ema_rate,
        variable_ema_rate=model_settings.variable_ema_rate,
        seed=run.config.seed,
    )
    program = parallel.map_devices(train_step, all_hosts=True, donate=(0,))
    step, state = int(state.step), parallel.replicate(state)
    # Whole calls end at multiples of n_jitted_steps, where checkpoints are due, whatever update a run starts from.
    batches = stage.batches(run.config, pairs, step - step % training.n_jitted_steps)
    batches = parallel.prefetch(batches)
    bar = tqdm.tqdm(total=training.n_iters, initial=step, desc=stage.name, unit="update", disable=None)
    run_ahead = parallel.RunAhead()
    waiting = None  # the last logged losses, fetched one log later, when they are long there
    while step < training.n_iters:
        batch, first = next(batches), step % training.n_jitted_steps
        count = min(training.n_jitted_steps - first, training.n_iters - step)
        if count < training.n_jitted_steps:
            batch = {name: rows[:, first : first + count] for name, rows in batch.items()}
        state, loss = program(state, batch)
        run_ahead.add(loss)
        before, step = step, step + count
        bar.update(count)
        if step // training.log_freq > before // training.log_freq or step == training.n_iters:
            _log_loss(run, waiting)
            waiting = (step, loss)
        snapshot = step % training.snapshot_freq == 0 or step == training.n_iters
        if snapshot or step % training.snapshot_freq_for_preemption == 0:
            waiting = _log_loss(run, waiting)
            _refuse_not_finite(run, step, loss)
            whole = parallel.first_copy(state)
            _keep(run, whole) if snapshot else _keep_to_resume(run, whole)
    bar.close()


def _log_loss(run, waiting):
    """Logs (step, losses [devices, n]) and returns None. Raises InputError as `_refuse_not_finite`."""
    if waiting is not None:
        run.tracker.log(waiting[0], {"loss": _refuse_not_finite(run, *waiting)})


def _refuse_not_finite(run, step, loss) -> float:
    """The mean of losses [devices, n].

    Raises:
      InputError: it is not finite; what was kept before is not overwritten.
    """
    loss = float(np.mean(np.asarray(loss.addressable_shards[0].data)))
    if not np.isfinite(loss):
        raise InputError(
            f"the loss is {loss} by update {step}: lower optim.lr, or look at the data; the checkpoints before it "
            f"are in {run.folder}"
        )
    return loss


def _keep_to_resume(run: _Run, state: losses.TrainState):
    """Keeps a checkpoint only to resume from, with the losses up to it."""
    run.kept.save(state, run.info, keep=False)
    run.tracker.flush()


def _keep(run: _Run, state: losses.TrainState):
    """Keeps a checkpoint for good, with a picture of its samples and, where asked for, their distance to the data."""
    run.kept.save(state, run.info, keep=True)
    run.tracker.flush()
    _show(run, state)


def _measures_snapshots(config) -> bool:
    return bool(config.training.snapshot_sampling and config.training.snapshot_fid_sample) and not jax.process_index()


def _picture_of(folder, step):
    return folder / "samples" / f"step_{step}.png"


def _is_shown(config, folder, step) -> bool:
    return bool(jax.process_index()) or not config.training.snapshot_sampling or _picture_of(folder, step).exists()


def _show(run: _Run, state: losses.TrainState):
    """Measures and draws a kept checkpoint, on the first host; the picture comes last and tells that all is done."""
    config, step = run.config, int(state.step)
    if jax.process_index() or not config.training.snapshot_sampling:
        return
    params, centered = state.ema_params, config.data.centered
    sampler = run.sampler.with_time_grid(params, config.sampling.time_grid)
    if run.features:
        count, size = config.training.snapshot_fid_sample, config.eval.batch_size
        quality, images = evaluation.sample_quality(sampler, params, count, size, real=run.features, centered=centered)
        run.tracker.log(step, quality)
        run.tracker.flush()
    else:
        images = datasets.unscale(next(sampler.samples(params, SHOWN_IMAGES, SHOWN_IMAGES)), centered)
    figures.draw_images(_picture_of(run.folder, step), images[:SHOWN_IMAGES])
    run.tracker.picture(step, "samples", _picture_of(run.folder, step))


def _draw_losses(run):
    lines = [line for line in run.tracker.history if "loss" in line]
    if lines:
        figures.draw_loss(run.folder / "loss.png", [line["step"] for line in lines], [line["loss"] for line in lines])


def _optimizer(config):
    optim = config.optim
    return losses.optimizer(
        lr=optim.lr, beta1=optim.beta1, eps=optim.eps, warmup=optim.warmup, grad_clip=optim.grad_clip
    )


# --- weights and flows ------------------------------------------------------------------------------------------------


def _random_weights(config, model) -> models.Weights:
    params = models.init_params(model, jax.random.key(config.seed), sources.image_shape(config))
    zeros = jax.tree.map(np.zeros_like, params) if not _is_abstract(params) else params
    return models.Weights(params=params, ema_params=params, mu=zeros, nu=zeros, count=0, step=0)


def _is_abstract(tree):
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _sampler(config, model, boundaries) -> Sampler:
    """How the configuration's `sampling` section samples a network."""
    sampling_settings = config.sampling
    options = {"method": "ode", "tol": sampling_settings.tol, "solver": sampling_settings.solver}
    options["error_norm"] = sampling_settings.error_norm
    if sampling_settings.method == "pc":
        options = {"method": "pc", "predictor": sampling_settings.predictor, "num_scales": config.model.num_scales}
    return Sampler(
        model=model,
        boundaries=np.asarray(boundaries, np.float32),
        image_shape=sources.image_shape(config),
        options=options,
        seed=config.seed,
    )


def _data_features(config) -> features.DataFeatures:
    return features.data_features(config.data, config.eval.inception_path, config.eval.batch_size)


def _tracker(config, folder, workdir, name, **options):
    primary = jax.process_index() == 0
    return tracking.Tracker(folder, workdir=workdir, name=name, config=config.to_dict(), primary=primary, **options)


def _show_pictures(tracker, step: int, folder):
    """Shows every picture in a folder in wandb."""
    for picture in sorted(folder.glob("*.png")):
        tracker.picture(step, picture.stem, picture)


# --- pairs ------------------------------------------------------------------------------------------------------------


def _generate_pairs(config, workdir, log_name):
    training, data = config.training, config.data
    place, workers = worker = worker_of(training.gen_worker)
    images = datasets.image_source(data)
    source = sources.starting_checkpoint(config, workdir / "1_rf")
    weights = source.load()
    checkpoints.log_source(source.name, weights)
    model, teacher = models.create_model(config), weights.ema_params
    boundaries, extra = _pair_boundaries(config, workdir, model, teacher)
    plan = plan_pairs(
        folder=workdir / sources.PAIRS,
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
        tol=config.sampling.tol,
        solver=config.sampling.solver,
        error_norm=config.sampling.error_norm,
    )
    name = "" if workers == 1 else f"_{place}_of_{workers}"  # workers that do not know each other share the folder
    options = {"file_name": f"metrics{name}.json"}
    with contextlib.closing(
        _tracker(config, workdir / "samples", workdir, f"{log_name}-pairs{name}", **options)
    ) as tracker:
        summary = reflow.generate(
            plan,
            images,
            lambda params: models.velocity_fn(model, params),
            teacher,
            batch_size=training.gen_reflow_size,
            worker=worker,
            extra=extra,
        )
        if summary.pairs:
            made = {"pairs": summary.pairs, "pairs_per_second": summary.pairs_per_second, "seconds": summary.seconds}
            made |= {f"nfe_segment_{i}": nfe for i, nfe in enumerate(summary.nfe)}
            there = plan.pairs - sum(map(plan.count, pairmanifest.missing_files(plan)))
            tracker.log(there, made)
            _show_pictures(tracker, there, workdir / "samples")


def _pair_boundaries(config, workdir, model, teacher):
    """(boundaries, what the manifest says of them): those of pairs begun before, else SeqRF-Ada's, else uniform."""
    k, is_adaptive = config.training.reflow_t, config.training.adaptive_interval
    manifest = pairmanifest.read_manifest(workdir / sources.PAIRS)
    if manifest is not None and (manifest["k"], manifest.get("adaptive")) == (k, is_adaptive):
        return np.float32(manifest["boundaries"]), {}
    if not is_adaptive:
        return segments.uniform_boundaries(k), {"adaptive": False}
    sampler = _sampler(config, model, segments.uniform_boundaries(k))
    partition = adaptive.best_partition(sampler.fine_distances(teacher), k)
    logger.info(
        "SeqRF-Ada: boundaries %s, cost %.4g (uniform %.4g)",
        partition.boundaries,
        partition.cost,
        partition.uniform_cost,
    )
    figures.draw_partition(workdir / "samples" / "division.png", partition)
    return partition.boundaries, {
        "adaptive": True,
        "cost_adaptive": partition.cost,
        "cost_uniform": partition.uniform_cost,
    }


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(config, workdir, eval_folder: str, *, log_name: str = "seqrf"):
    """--mode=eval: measures every checkpoint asked for, each into `<workdir>/<eval_folder>/step_<step>/`.

    A checkpoint that was measured with the same settings is not measured again. In a run of several hosts the first
    one works alone, and the others leave at once.

    Raises:
      InputError: no checkpoint, no data, no feature network; a setting that cannot work.
    """
    if int(os.environ.get("JAX_PROCESS_ID") or 0):
        return
    config = _prepare(config, "eval")
    workdir = epath.Path(workdir)
    found = sources.checkpoints_to_evaluate(config, workdir / _evaluated_stage(config))
    config.training.reflow_t = sources.evaluated_segments(config, next(iter(found.values())))
    check_steps(config, "eval")
    loaded = {step: source.load() for step, source in itertools.islice(found.items(), 1)}  # before features take long
    real = _data_features(config)
    folder, model = workdir / eval_folder, models.create_model(config)
    samplers = {}  # by boundaries, which all checkpoints of a run share: what is compiled is compiled once
    with contextlib.closing(_tracker(config, folder, workdir, f"{log_name}-{eval_folder}")) as tracker:
        for step, source in tqdm.tqdm(found.items(), desc=eval_folder, unit="checkpoint", disable=None):
            weights = loaded.pop(step, None) or source.load()
            boundaries = sources.evaluated_boundaries(config, workdir, source)
            sampler = samplers.setdefault(str(boundaries), _sampler(config, model, boundaries))
            step = int(weights.step) if step is None else step
            _evaluate_checkpoint(config, sampler, weights.ema_params, step, real, folder / f"step_{step}", tracker)


def _evaluate_checkpoint(config, sampler, params, step: int, real, folder, tracker):
    protocol = _protocol(config, sampler)
    settings = evaluation.settings(
        sampler,
        params,
        protocol,
        real,
        sampling=config.sampling.to_dict() | {"num_scales": config.model.num_scales},
        data=f"{config.data.dataset} {config.data.category}".strip(),
    )
    if utils.read_json(folder / "metrics.json", {}).get("settings") == settings:
        logger.info("%s is measured already", folder)
        return
    tfgan_compat.import_in_background()  # while the samplers are compiled
    values = evaluation.evaluate_checkpoint(sampler, params, protocol, real, folder)
    named = {"step": step, "model": _model_name(config), "sampler": sampler.name}
    utils.write_json(folder / "metrics.json", {**named, **values, "settings": settings})
    tracker.log(step, values)
    _show_pictures(tracker, step, folder)


def _protocol(config, sampler: Sampler) -> evaluation.Protocol:
    # The sequential straightness of a 1-RF is measured over the segments that it would be cut into.
    is_segmented = config.model.rf_phase == 2
    return evaluation.Protocol(
        num_samples=config.eval.num_samples,
        straightness_samples=config.eval.straightness_samples,
        batch_size=config.eval.batch_size,
        boundaries=sampler.boundaries if is_segmented else segments.uniform_boundaries(config.eval.segments),
        centered=config.data.centered,
        time_grid=config.sampling.time_grid,
        save_trajectory=config.eval.save_trajectory,
    )


def _evaluated_stage(config) -> str:
    if config.model.rf_phase == 1:
        return STAGES["1_rf"].name
    return STAGES[config.eval.reflow_mode.replace("eval", "train")].name


def _model_name(config) -> str:
    """As the paper calls it: 1-RF, k-SeqRF or k-SeqRF-Distill."""
    if config.model.rf_phase == 1:
        return "1-RF"
    return f"{config.training.reflow_t}-SeqRF" + ("-Distill" if config.eval.reflow_mode == "eval_distill" else "")
