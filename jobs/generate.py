"""Generation of pairs and of trajectories, with the boundaries that they are made for."""

import contextlib
import dataclasses
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
from checkpointing.checkpoint import CheckpointRef, log_source
from configs.saved import resolved
from configs.settings import Config
from configs.validation import stage_values
from jobs import builders
from jobs.inputs import PAIRS, TRAJECTORIES, starting_checkpoint
from jobs.stages import STAGES
from models.weights import fingerprint
from pairs import manifest as pairmanifest
from pairs.plan import plan_pairs
from pairs.workers import worker_of
from sampler import Sampler
from sampling import REFERENCE
from tracking import plots

logger = logging.getLogger("seqrf")


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """All that a generation of pairs, or of trajectories, will do.

    Attributes:
      workdir: the set is in its folder `samples`.
      network: the teacher's, with k heads.
      teacher: the checkpoint that solves.
      data: the images to start from.
      is_trajectory: whether states at all boundaries are kept, rather than pairs.
      is_adaptive: whether boundaries are placed by the teacher's curvature.
      pair_options: the keywords of `pairs.plan.plan_pairs` that need neither images, boundaries nor weights.
      batch_size: images solved together on a host.
      worker: (i, n): which share of the files is made.
      settings: the configuration as it is recorded.
      log_name: of the run in wandb.
    """

    workdir: epath.Path
    network: models.NCSNpp
    teacher: CheckpointRef
    data: datasets.DataOptions
    is_trajectory: bool
    is_adaptive: bool
    pair_options: dict[str, Any]
    batch_size: int
    worker: tuple[int, int]
    settings: dict[str, Any]
    log_name: str

    @property
    def folder(self) -> epath.Path:
        """Of the set."""
        return self.workdir / (TRAJECTORIES if self.is_trajectory else PAIRS)

    @property
    def seed(self) -> int:
        """Of noises, flips and shuffles."""
        return self.pair_options["seed"]

    def summary(self) -> dict[str, Any]:
        """What --dry_run prints."""
        kind, k = "trajectories" if self.is_trajectory else "pairs", self.network.heads
        return {
            "job": f"generate {self.pair_options['pairs']} {kind} of {k} segments",
            "from": self.teacher.name,
            "images": self.data.name,
            "into": self.folder,
            "boundaries": "by the teacher's curvature" if self.is_adaptive else "uniform, or those of a set begun",
            "tolerance": self.pair_options["tol"],
            "worker": "{} of {}".format(*self.worker),
        }


def generation_plan(config: Config, workdir: epath.Path, log_name: str) -> GenerationPlan:
    """What the configuration means for a generation in this workdir. Needs no device.

    Raises:
      InputError: no teacher.
    """
    training, data, solving = config.training, config.data, config.sampling
    is_trajectory = training.reflow_pairs == "trajectory"
    network: Any = models.create_model(config)
    teacher: Any = starting_checkpoint(config, workdir / STAGES["rf"].folder)
    return GenerationPlan(
        workdir=workdir,
        network=network,
        teacher=teacher,
        data=builders.data_options(config),
        is_trajectory=is_trajectory,
        is_adaptive=training.adaptive_interval,
        pair_options={
            "pairs": training.n_reflow_data,
            "file_size": training.reflow_file_size,
            "dtype": training.reflow_dtype,
            "store_noise": training.reflow_store_noise,
            "image_shape": network.image_shape,
            "centered": data.centered,
            "flip": data.random_flip,
            "dequantize": data.uniform_dequantization,
            "seed": config.seed,
            "tol": solving.tol,
            "solver": solving.solver,
            "error_norm": solving.error_norm,
            "inverted_pairs": 0.0 if is_trajectory else training.inverted_pairs,
            "reflow_pairs": training.reflow_pairs,
        },
        batch_size=training.gen_reflow_size,
        worker=worker_of(training.gen_worker),
        settings=resolved(config, stage_values(config), network.heads),
        log_name=log_name,
    )


def generate_pairs(plan: GenerationPlan) -> None:
    """Makes the missing files of the planned set.

    Raises:
      InputError: no data; a set of other settings in the folder; as `reflow.generate`.
    """
    samples = plan.workdir / "samples"
    utils.check_writable(samples)
    images = datasets.image_source(plan.data)
    weights = plan.teacher.load(plan.network)
    log_source(plan.teacher.name, weights, centered=plan.network.centered)
    params = weights.ema_params
    boundaries, entries = _boundaries(plan, params)
    pairs = plan_pairs(
        folder=plan.folder,
        boundaries=boundaries,
        dataset=images.identity,
        dataset_size=images.size,
        teacher=fingerprint(params),
        **plan.pair_options,
    )
    index, workers = plan.worker
    # Workers that do not know each other share the folder.
    name = ("_trajectories" if plan.is_trajectory else "") + (f"_{index}_of_{workers}" if workers > 1 else "")
    run_name, file_name = f"{plan.log_name}-pairs{name}", f"metrics{name}.json"
    with contextlib.closing(
        builders.tracker_of(plan.settings, samples, plan.workdir, run_name, file_name=file_name)
    ) as tracker:
        summary = reflow.generate(
            pairs,
            images,
            functools.partial(models.velocity_fn, models.in_float32(plan.network)),
            params,
            batch_size=plan.batch_size,
            worker=plan.worker,
            extra=entries,
        )
        if summary.pairs:
            made = {"pairs": summary.pairs, "pairs_per_second": summary.pairs_per_second, "seconds": summary.seconds}
            made |= {f"nfe_segment_{i}": nfe for i, nfe in enumerate(summary.nfe)}
            existing = pairs.pairs - sum(map(pairs.count, pairmanifest.missing_files(pairs)))
            tracker.log(existing, made, shown=f"{existing} of {pairs.pairs} pairs")
            builders.log_pictures(tracker, existing, samples)
    logger.info("the %s are in %s", "trajectories" if plan.is_trajectory else "pairs", pairs.folder)


def _boundaries(plan: GenerationPlan, teacher: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """(boundaries, their entries in the manifest): of pairs or trajectories begun before, else as planned."""
    k = plan.network.heads
    for folder in (PAIRS, TRAJECTORIES):
        manifest = pairmanifest.read_manifest(plan.workdir / folder)
        if manifest is not None and (manifest["k"], manifest.get("adaptive")) == (k, plan.is_adaptive):
            names = {"adaptive", "cost_adaptive", "cost_uniform"} & manifest.keys()
            return np.asarray(manifest["boundaries"], np.float32), {name: manifest[name] for name in sorted(names)}
    uniform = segments.uniform_boundaries(k)
    if not plan.is_adaptive:
        return uniform, {"adaptive": False}
    sampler = Sampler(plan.network, uniform, plan.network.image_shape, REFERENCE, plan.seed)
    partition = adaptive.best_partition(sampler.fine_distances(teacher), k)
    costs = partition.cost, partition.uniform_cost
    logger.info("SeqRF-Ada: boundaries %s, cost %.4g (uniform %.4g)", partition.boundaries, *costs)
    plots.draw_partition(plan.workdir / "samples" / "division.png", partition)
    return partition.boundaries, {"adaptive": True, "cost_adaptive": costs[0], "cost_uniform": costs[1]}
