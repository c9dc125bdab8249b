"""Generation of pairs and of trajectories, with the boundaries that they are made for."""

import contextlib
import functools
import logging
from typing import Any

import numpy as np
from etils import epath

import adaptive
import datasets
import models
import reflow
import segments
import utils
from checkpointing import runs
from jobs import stages
from jobs.builders import Config, log_pictures, sampler_of, tracker_of
from jobs.stages import STAGES
from models.weights import fingerprint
from pairs import manifest as pairmanifest
from pairs.plan import PairPlan, plan_pairs
from pairs.workers import worker_of
from tracking import plots

logger = logging.getLogger("seqrf")


def generate_pairs(config: Config, workdir: epath.Path, log_name: str) -> None:
    """Makes the missing files of the pair set, or of the trajectory set (`training.reflow_pairs`).

    Raises:
      InputError: no teacher or no data; a set of other settings in the folder.
    """
    utils.check_writable(workdir / "samples")
    images = datasets.image_source(config.data)
    source: Any = stages.starting_checkpoint(config, workdir / STAGES["rf"].folder)
    weights = source.load()
    runs.log_source(source.name, weights, centered=config.data.centered)
    model, teacher = models.create_model(config), weights.ema_params
    boundaries, extra = _pair_boundaries(config, workdir, model, teacher)
    plan = _pair_plan(config, workdir, images, boundaries, teacher)
    index, workers = worker = worker_of(config.training.gen_worker)
    # Workers that do not know each other share the folder.
    name = ("_trajectories" if plan.is_trajectory else "") + (f"_{index}_of_{workers}" if workers > 1 else "")
    run_name, file_name = f"{log_name}-pairs{name}", f"metrics{name}.json"
    with contextlib.closing(tracker_of(config, workdir / "samples", workdir, run_name, file_name=file_name)) as tracker:
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
            log_pictures(tracker, existing, workdir / "samples")
    logger.info("the %s are in %s", "trajectories" if plan.is_trajectory else "pairs", plan.folder)


def _pair_plan(config, workdir, images: datasets.ImageSource, boundaries, teacher) -> PairPlan:
    training, data, sampling = config.training, config.data, config.sampling
    is_trajectory = training.reflow_pairs == "trajectory"
    return plan_pairs(
        folder=workdir / (stages.TRAJECTORIES if is_trajectory else stages.PAIRS),
        boundaries=boundaries,
        pairs=training.n_reflow_data,
        file_size=training.reflow_file_size,
        dtype=training.reflow_dtype,
        store_noise=training.reflow_store_noise,
        image_shape=datasets.image_shape(config),
        dataset=images.identity,
        dataset_size=images.size,
        centered=data.centered,
        flip=data.random_flip,
        dequantize=data.uniform_dequantization,
        seed=config.seed,
        teacher=fingerprint(teacher),
        tol=sampling.tol,
        solver=sampling.solver,
        error_norm=sampling.error_norm,
        inverted_pairs=0.0 if is_trajectory else training.inverted_pairs,
        reflow_pairs=training.reflow_pairs,
    )


def _pair_boundaries(config, workdir, model, teacher) -> tuple[np.ndarray, dict[str, Any]]:
    """(boundaries, their entries in the manifest): of pairs or trajectories begun before, else as configured."""
    k, is_adaptive = config.training.reflow_t, config.training.adaptive_interval
    for folder in (stages.PAIRS, stages.TRAJECTORIES):
        manifest = pairmanifest.read_manifest(workdir / folder)
        if manifest is not None and (manifest["k"], manifest.get("adaptive")) == (k, is_adaptive):
            names = {"adaptive", "cost_adaptive", "cost_uniform"} & manifest.keys()
            return np.asarray(manifest["boundaries"], np.float32), {name: manifest[name] for name in sorted(names)}
    if not is_adaptive:
        return segments.uniform_boundaries(k), {"adaptive": False}
    sampler = sampler_of(config, model, segments.uniform_boundaries(k))
    partition = adaptive.best_partition(sampler.fine_distances(teacher), k)
    costs = partition.cost, partition.uniform_cost
    logger.info("SeqRF-Ada: boundaries %s, cost %.4g (uniform %.4g)", partition.boundaries, *costs)
    plots.draw_partition(workdir / "samples" / "division.png", partition)
    return partition.boundaries, {"adaptive": True, "cost_adaptive": costs[0], "cost_uniform": costs[1]}
