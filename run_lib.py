"""The jobs: train a flow, generate pairs, evaluate. `train` and `evaluate` are read from the top down."""

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import flax.jax_utils
import jax
import numpy as np
import tqdm
from etils import epath

import adaptive
import checkpoints
import datasets
import evaluation
import losses
import measurement
import models
import pictures
import reflow
import segments
import tfgan_compat
import tracking
from configs.check import check_batches, check_config, is_given, segments_of
from utils import InputError

logger = logging.getLogger("seqrf")

PAIRS = epath.Path("samples") / "reflow_batch"
SHOWN_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one training stage has of its own; everything else is the same for all.

    Attributes:
      name: its folder in the workdir.
      targets: what the network learns from a batch (`losses`).
      batches: (config, workdir, pairs or None, first update) -> iterator of batches [devices, n_jitted_steps, B, ...].
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


def _pair_batches(config, pairs: reflow.PairSet, start: int) -> Iterator[dict[str, np.ndarray]]:
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
EVALUATED = {"eval_reflow": "2_rf", "eval_distill": "2_distill"}


def train(config, workdir, *, log_name: str = "seqrf"):
    """--mode=train: trains 1-RF, generates pairs, trains k-SeqRF or distils it, as the configuration says.

    Raises:
      InputError: anything in the configuration, the data or the workdir that cannot work, before work is done.
    """
    config = _checked(config, "train")
    workdir = epath.Path(workdir)
    if config.model.rf_phase == 1:
        _train_stage(config, workdir, STAGES["1_rf"], log_name)
    elif config.training.reflow_mode == "gen_reflow":
        _generate_pairs(config, workdir, log_name)
    else:
        _train_stage(config, workdir, STAGES[config.training.reflow_mode], log_name)


def _checked(config, mode):
    """The configuration, checked, its k settled; the devices and the folder of compiled programs made ready."""
    check_config(config, mode)
    config = config.copy_and_resolve_references()
    config.eval.segments = config.eval.segments or config.training.reflow_t
    config.training.reflow_t = segments_of(config)
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized():
        hosts = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
        jax.distributed.initialize(**{name: int(value) for name, value in hosts.items() if value})
    if not jax.config.jax_compilation_cache_dir:
        cache = epath.Path(os.environ.get("SEQRF_CACHE") or "~/.cache/seqrf").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
        # All of them: a threshold in seconds would keep other programs on a busy day than on a calm one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    check_batches(config, mode, devices=jax.device_count(), local_devices=jax.local_device_count())
    return config


# --- training ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Run:
    """What a training stage works with between its first and its last update."""

    config: Any
    folder: epath.Path
    model: Any
    flow: measurement.Flow
    info: dict
    kept: checkpoints.RunCheckpoints
    tracker: tracking.Tracker


def _train_stage(config, workdir, stage: Stage, log_name):
    if stage.parent is None:
        datasets.image_source(config.data)  # a data set that is missing is said before anything is compiled
    pairs = None if stage.parent is None else _pair_set(config, workdir)
    boundaries = segments.uniform_boundaries(1) if pairs is None else pairs.boundaries
    model = models.create_model(config)
    kept = checkpoints.RunCheckpoints(workdir / stage.name)
    info = checkpoints.describe(config, stage.name, boundaries, "")
    state = _first_state(config, workdir, stage, pairs, model, kept, info)
    start = int(state.step)
    if start >= config.training.n_iters:
        logger.info("%s has its %d updates already", workdir / stage.name, start)
        kept.close()
        return
    batches = stage.batches(config, pairs, start)
    tracker = _tracker(config, workdir / stage.name, workdir, f"{log_name}-{stage.name}", resume_step=start)
    with contextlib.closing(tracker), contextlib.closing(kept):
        run = _Run(config, workdir / stage.name, model, _flow(config, model, boundaries), info, kept, tracker)
        if start == 0:
            _keep(run, state)
        _update_until_done(run, stage, state, batches)


def _first_state(config, workdir, stage, pairs, model, kept, info) -> losses.TrainState:
    """Where training goes on: the run's own latest state, else its starting weights."""
    transformation = _optimizer(config)
    fresh = jax.eval_shape(lambda: losses.initial_state(_random_weights(config, model), transformation))
    state = kept.resume(fresh, info)
    if state is not None:
        logger.info("going on in %s from update %d", workdir / stage.name, state.step)
        return state
    weights = _starting_weights(config, workdir, stage.parent)
    if weights is None:
        return losses.initial_state(_random_weights(config, model), transformation)
    if pairs is not None and config.training.reflow_mode == "train_reflow":
        _refuse_other_teacher(pairs, weights)
    # A 1-RF that is given weights goes on counting theirs; a reflow stage learns something new and counts from 0.
    return losses.initial_state(weights, transformation, step=int(weights.step) if stage.parent is None else 0)


def _update_until_done(run: _Run, stage, state, batches):
    training, model_settings = run.config.training, run.config.model
    updates = losses.make_updates(
        run.model,
        stage.targets,
        _optimizer(run.config),
        ema_rate=model_settings.ema_rate,
        variable_ema_rate=model_settings.variable_ema_rate,
        reduce_mean=training.reduce_mean,
        seed=run.config.seed,
    )
    program = jax.pmap(updates, axis_name=losses.AXIS, donate_argnums=0)
    step, state = int(state.step), flax.jax_utils.replicate(state)
    batches = flax.jax_utils.prefetch_to_device(batches, 2, devices=jax.local_devices())
    bar = tqdm.tqdm(total=training.n_iters, initial=step, desc=stage.name, unit="update", disable=None)
    waiting = None  # the last logged losses, fetched one log later, when they are long there
    while step < training.n_iters:
        batch, count = next(batches), min(training.n_jitted_steps, training.n_iters - step)
        if count < training.n_jitted_steps:
            batch = {name: rows[:, :count] for name, rows in batch.items()}
        state, loss = program(state, batch)
        before, step = step, step + count
        bar.update(count)
        if step // training.log_freq > before // training.log_freq or step == training.n_iters:
            _log_loss(run, waiting)
            waiting = (step, loss)
        if step % training.snapshot_freq == 0 or step == training.n_iters:
            waiting = _log_loss(run, waiting)
            _keep(run, flax.jax_utils.unreplicate(state))
        elif step % training.snapshot_freq_for_preemption == 0:
            waiting = _log_loss(run, waiting)
            run.kept.save(flax.jax_utils.unreplicate(state), run.info, keep=False)
    bar.close()
    _draw_losses(run)


def _log_loss(run, waiting):
    """Logs (step, losses [devices, n]) and returns None.

    Raises:
      InputError: the loss is not finite; what was kept before is not overwritten.
    """
    if waiting is not None:
        step, loss = waiting
        loss = float(np.mean(np.asarray(loss.addressable_shards[0].data)))
        if not np.isfinite(loss):
            raise InputError(
                f"the loss is {loss} by update {step}: lower optim.lr, or look at the data; the checkpoints before it "
                f"are in {run.folder}"
            )
        run.tracker.log(step, {"loss": loss})


def _keep(run: _Run, state: losses.TrainState):
    """Keeps a checkpoint for good, with a picture of its samples and, where asked for, their distance to the data."""
    config, step = run.config, int(state.step)
    run.kept.save(state, run.info, keep=True)
    run.tracker.flush()
    if jax.process_index() or not config.training.snapshot_sampling:
        return
    flow, params = run.flow, state.ema_params
    path = run.folder / "samples" / f"step_{step}.png"
    _draw_samples(flow, params, config.data.centered, path)
    run.tracker.picture(step, "samples", path)
    if config.training.snapshot_fid_sample:
        network, real = _features(config)
        quality, _ = measurement.sample_quality(
            flow,
            params,
            config.training.snapshot_fid_sample,
            config.eval.batch_size,
            network=network,
            real=real,
            centered=config.data.centered,
        )
        run.tracker.log(step, quality)


def _draw_samples(flow, params, centered, path):
    batches = measurement.samples(flow, params, SHOWN_IMAGES, SHOWN_IMAGES, measurement.Cost())
    pictures.draw_images(path, datasets.unscale(np.concatenate(list(batches)), centered))


def _draw_losses(run):
    lines = [line for line in run.tracker.history if "loss" in line]
    if lines:
        pictures.draw_loss(run.folder / "loss.png", [line["step"] for line in lines], [line["loss"] for line in lines])


def _optimizer(config):
    optim = config.optim
    return losses.optimizer(
        lr=optim.lr, beta1=optim.beta1, eps=optim.eps, warmup=optim.warmup, grad_clip=optim.grad_clip
    )


# --- weights, pairs, flows --------------------------------------------------------------------------------------------


def _image_shape(config) -> tuple[int, int, int]:
    return (config.data.image_size, config.data.image_size, config.data.num_channels)


def _random_weights(config, model) -> models.Weights:
    params = models.init_params(model, jax.random.key(config.seed), _image_shape(config))
    zeros = jax.tree.map(np.zeros_like, params) if not _is_abstract(params) else params
    return models.Weights(params=params, ema_params=params, mu=zeros, nu=zeros, count=0, step=0)


def _is_abstract(tree):
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _starting_weights(config, workdir, parent: str | None) -> models.Weights | None:
    """The weights that a job starts from, by design.md section 6: given by the user, else the stage before.

    None for a 1-RF that nothing was given.

    Raises:
      InputError: nothing found; the message says where it looked.
    """
    training = config.training
    if is_given(training.import_torch):
        weights, source = models.import_torch(training.import_torch, config), training.import_torch
    elif is_given(training.import_flax):
        weights, source = checkpoints.load_weights(training.import_flax, config), training.import_flax
    elif parent is None:
        return None
    elif checkpoints.steps_in(workdir / parent):
        source = workdir / parent
        weights = checkpoints.load_weights(source, config)
    else:
        raise InputError(
            f"no weights to start from: training.import_torch and training.import_flax are not given and "
            f"{workdir / parent / 'checkpoints'} has no checkpoint; train that stage first or give one"
        )
    checkpoints.log_found(str(source), weights)
    return weights


def _pair_set(config, workdir) -> reflow.PairSet:
    """The pairs of this workdir, refused where they were made for another k, size or range."""
    expect = {
        "k": config.training.reflow_t,
        "image_shape": _image_shape(config),
        "centered": config.data.centered,
    }
    if config.training.adaptive_interval:
        expect["adaptive"] = True
    folder = workdir / PAIRS
    manifest = reflow.read_manifest(folder)
    stores_noise = manifest is None or manifest["store_noise"]
    images = None if stores_noise else datasets.image_source(config.data)
    return reflow.PairSet(folder, partial=config.training.reflow_partial, expect=expect, images=images)


def _refuse_other_teacher(pairs, weights):
    teacher, given = pairs.manifest.get("teacher"), reflow.fingerprint(weights.ema_params)
    if teacher is not None and teacher != given:
        raise InputError(
            f"the pairs in {pairs.folder} were made by teacher {teacher}, this run starts from {given}; start from the "
            "same checkpoint, or make new pairs in another workdir"
        )


def _flow(config, model, boundaries) -> measurement.Flow:
    """How the configuration's `sampling` section samples a network."""
    sampling_settings = config.sampling
    options = {"method": "ode", "tol": sampling_settings.tol, "solver": sampling_settings.solver}
    options["error_norm"] = sampling_settings.error_norm
    if sampling_settings.method == "pc":
        options = {"method": "pc", "predictor": sampling_settings.predictor, "num_scales": config.model.num_scales}
    return measurement.Flow(
        model=model,
        boundaries=np.asarray(boundaries, np.float32),
        image_shape=_image_shape(config),
        options=options,
        seed=config.seed,
    )


def _features(config):
    """The feature network of the data set and its features of all real images."""
    network = evaluation.feature_network(config.data, config.eval.inception_path)
    source = datasets.image_source(config.data)
    return network, evaluation.real_features(network, source, config.eval.batch_size)


def _tracker(config, folder, workdir, name, resume_step=None):
    settings = config.to_dict()
    primary = jax.process_index() == 0
    return tracking.Tracker(
        folder, workdir=workdir, name=name, config=settings, primary=primary, resume_step=resume_step
    )


# --- pairs ------------------------------------------------------------------------------------------------------------


def _generate_pairs(config, workdir, log_name):
    training, data = config.training, config.data
    worker = reflow.worker_of(training.gen_worker)
    images = datasets.image_source(data)
    weights = _starting_weights(config, workdir, "1_rf")
    model = models.create_model(config)
    teacher = weights.ema_params
    boundaries, extra = _pair_boundaries(config, workdir, model, teacher)
    plan = reflow.plan_pairs(
        folder=workdir / PAIRS,
        boundaries=boundaries,
        pairs=training.n_reflow_data,
        file_size=training.reflow_file_size,
        dtype=training.reflow_dtype,
        store_noise=training.reflow_store_noise,
        image_shape=_image_shape(config),
        dataset=images.identity,
        dataset_size=images.size,
        centered=data.centered,
        flip=data.random_flip,
        dequantize=data.uniform_dequantization,
        seed=config.seed,
        teacher=reflow.fingerprint(teacher),
        tol=config.sampling.tol,
        solver=config.sampling.solver,
        error_norm=config.sampling.error_norm,
    )
    tracker = _tracker(config, workdir / "samples", workdir, f"{log_name}-pairs")
    summary = reflow.generate(
        plan,
        images,
        lambda params: models.velocity_fn(model, params),
        teacher,
        batch_size=training.gen_reflow_size,
        worker=worker,
        extra=extra,
    )
    made = {"pairs": summary.pairs, "pairs_per_second": summary.pairs_per_second, "seconds": summary.seconds}
    tracker.log(0, made | {f"nfe_segment_{i}": nfe for i, nfe in enumerate(summary.nfe)})
    tracker.close()


def _pair_boundaries(config, workdir, model, teacher):
    """(boundaries, what the manifest says of them): those of pairs begun before, else SeqRF-Ada's, else uniform."""
    k = config.training.reflow_t
    if (begun := _begun_boundaries(config, workdir)) is not None:
        return begun, {}
    if not config.training.adaptive_interval:
        return segments.uniform_boundaries(k), {"adaptive": False}
    flow = _flow(config, model, segments.uniform_boundaries(k))
    division = adaptive.best_division(measurement.fine_distances(flow, teacher), k)
    if (begun := _begun_boundaries(config, workdir)) is not None:
        return begun, {}  # another worker, perhaps with other hardware, was first: its division is the set's
    logger.info(
        "SeqRF-Ada: boundaries %s, cost %.4g (uniform %.4g)", division.boundaries, division.cost, division.uniform_cost
    )
    adaptive.draw_division(workdir / "samples" / "division.png", division)
    return division.boundaries, {
        "adaptive": True,
        "cost_adaptive": division.cost,
        "cost_uniform": division.uniform_cost,
    }


def _begun_boundaries(config, workdir):
    """The boundaries of the pairs that are begun in this workdir; None if there are none of this kind."""
    manifest = reflow.read_manifest(workdir / PAIRS)
    kind = (config.training.reflow_t, config.training.adaptive_interval)
    if manifest is None or (manifest["k"], manifest.get("adaptive")) != kind:
        return None
    return np.float32(manifest["boundaries"])


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(config, workdir, eval_folder: str, *, log_name: str = "seqrf"):
    """--mode=eval: measures every checkpoint asked for, each into `<workdir>/<eval_folder>/step_<step>/`.

    A checkpoint that was measured with the same settings is not measured again. In a run of several hosts the first
    one works alone.

    Raises:
      InputError: no checkpoint, no data, no feature network; a setting that cannot work.
    """
    config = _checked(config, "eval")
    if jax.process_index():
        return
    workdir = epath.Path(workdir)
    found = _evaluated_weights(config, workdir)
    network, real = _features(config)
    folder, model = workdir / eval_folder, models.create_model(config)
    tracker = _tracker(config, folder, workdir, f"{log_name}-{eval_folder}")
    flows = {}  # by boundaries, which all checkpoints of a run share: what is compiled is compiled once
    for step, (load, boundaries) in tqdm.tqdm(found.items(), desc=eval_folder, unit="checkpoint", disable=None):
        params = load().ema_params
        flow = flows.setdefault(str(boundaries), _flow(config, model, boundaries))
        settings = _settings(config, flow, params, network.name)
        target = folder / f"step_{step}"
        if tracking.read_json(target / "metrics.json", {}).get("settings") == settings:
            logger.info("%s is measured already", target)
            continue
        tfgan_compat.import_in_background()  # while the samplers are compiled
        values = _measure(config, flow, params, network, real, target)
        named = {"step": step, "model": _model_name(config), "sampler": _sampler_name(config)}
        tracking.write_json(target / "metrics.json", {**named, **values, "settings": settings})
        tracker.log(step, values)
        for picture in sorted(target.glob("*.png")):
            tracker.picture(step, picture.stem, picture)
    tracker.close()


def _evaluated_weights(config, workdir) -> dict[int, tuple[Callable, np.ndarray]]:
    """The weights to measure by step: (a function that loads them, their boundaries)."""
    uniform = segments.uniform_boundaries(config.training.reflow_t)
    if is_given(config.training.import_torch) or is_given(config.training.import_flax):
        weights = _starting_weights(config, workdir, None)
        manifest = reflow.read_manifest(workdir / PAIRS) if config.model.rf_phase == 2 else None
        return {int(weights.step): (lambda: weights, uniform if manifest is None else manifest["boundaries"])}
    stage = "1_rf" if config.model.rf_phase == 1 else EVALUATED[config.eval.reflow_mode]
    there, wanted = checkpoints.steps_in(workdir / stage), config.eval
    steps = [
        step
        for step in there
        if wanted.begin_step <= step <= wanted.end_step and (step - wanted.begin_step) % wanted.interval_step == 0
    ]
    if not steps:
        raise InputError(
            f"no checkpoint to evaluate in {workdir / stage / 'checkpoints'}: it has {there or 'none'}, asked for are "
            f"eval.begin_step={wanted.begin_step} to end_step={wanted.end_step} by interval_step={wanted.interval_step}"
        )
    folders = {step: workdir / stage / "checkpoints" / str(step) for step in steps}
    return {
        step: (lambda folder=folder: checkpoints.load_weights(folder, config), checkpoints.boundaries_of(folder))
        for step, folder in folders.items()
    }


def _settings(config, flow, params, network_name) -> dict:
    """What a measurement depends on: where all of it is the same, measuring again gives the same."""
    return {
        "weights": reflow.fingerprint(params),
        "sampling": config.sampling.to_dict() | {"num_scales": config.model.num_scales},
        "boundaries": [float(b) for b in flow.boundaries],
        "measured_boundaries": [float(b) for b in _measured_boundaries(config, flow)],
        "num_samples": config.eval.num_samples,
        "straightness_samples": config.eval.straightness_samples,
        "save_trajectory": config.eval.save_trajectory,
        "seed": config.seed,
        "network": network_name,
    }


def _model_name(config) -> str:
    """As the paper calls it: 1-RF, k-SeqRF or k-SeqRF-Distill."""
    if config.model.rf_phase == 1:
        return "1-RF"
    distilled = EVALUATED[config.eval.reflow_mode] == "2_distill"
    return f"{config.training.reflow_t}-SeqRF" + ("-Distill" if distilled else "")


def _sampler_name(config) -> str:
    if config.sampling.method == "ode":
        return "ODE"
    names = {"rf_solver": "Euler", "rf_solver_heun": "Heun"}
    return f"{names.get(config.sampling.predictor, config.sampling.predictor)} {config.model.num_scales}"


def _measured_boundaries(config, flow):
    """The segments that sequential straightness is measured over: of a 1-RF, those that it would be cut into."""
    if config.model.rf_phase == 2:
        return flow.boundaries
    return segments.uniform_boundaries(config.eval.segments)


def _measure(config, flow, params, network, real, folder) -> dict[str, float]:
    """All numbers of one checkpoint; its pictures and curves go into `folder`."""
    centered = config.data.centered
    flow = measurement.with_time_grid(flow, params, config.sampling.time_grid)
    batch_size = config.eval.batch_size
    measured = _measured_boundaries(config, flow)
    shape = measurement.flow_shape(flow, params, measured, config.eval.straightness_samples, batch_size)
    quality, images = measurement.sample_quality(
        flow, params, config.eval.num_samples, batch_size, network=network, real=real, centered=centered
    )
    pictures.draw_images(folder / "samples.png", images[:SHOWN_IMAGES])
    curves = {"straightness": shape.curve, "sequential straightness": shape.sequential_curve}
    pictures.draw_straightness(folder / "straightness.png", shape.ts, curves, measured)
    tracking.write_arrays(
        folder / "straightness.npz",
        ts=shape.ts,
        curve=shape.curve,
        sequential_curve=shape.sequential_curve,
        boundaries=measured,
    )
    if config.eval.save_trajectory:
        ts, xs = measurement.trajectory(flow, params, min(batch_size, SHOWN_IMAGES))
        tracking.write_arrays(folder / "trajectory.npz", ts=ts, xs=xs)
        pictures.draw_trajectories(folder / "trajectory.png", ts, xs, lambda x: datasets.unscale(x, centered))
    return {
        **quality,
        "straightness": shape.straightness,
        "sequential_straightness": shape.sequential_straightness,
        "truncation_error": shape.truncation_error,
    }
