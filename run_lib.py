"""The jobs of main.py: each mode checks its configuration, plans its job and hands the plan to a module of `jobs`."""

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

import distributed
import runtime
from configs.settings import Config
from configs.validation import check_batches, check_config, generates_pairs
from jobs.evaluate import evaluate_checkpoints, evaluation_plan
from jobs.generate import generate_pairs, generation_plan
from jobs.lock import exclusive
from jobs.sample import sample_checkpoint, sample_plan
from jobs.stages import stage_in, stage_of
from jobs.train import train_plan, train_stage
from utils import InputError, absolute, user_path

logger = logging.getLogger("seqrf")


def train(config: Config, workdir: epath.PathLike, *, log_name: str = "seqrf", dry_run: bool = False) -> None:
    """--mode=train: trains 1-RF, generates pairs, trains k-SeqRF or distils it, as the configuration says.

    Args:
      dry_run: print what would be done, and from what into what, and do nothing.

    Raises:
      InputError: anything in the configuration, the data or the workdir that cannot work, before work is done.
    """
    workdir = user_path(workdir)
    _prepare(config, "train")
    if generates_pairs(config):
        # Several workers may make one set: they share its files, and nothing is locked.
        _run(generate_pairs, generation_plan(config, workdir, log_name), dry_run)
    else:
        stage = stage_of(config, config.training.reflow_mode)
        _run(train_stage, train_plan(config, workdir, stage, log_name), dry_run, held=[workdir / stage.folder])


def evaluate(
    config: Config, workdir: epath.PathLike, eval_folder: str, *, log_name: str = "seqrf", dry_run: bool = False
) -> None:
    """--mode=eval: measures every checkpoint asked for, as `jobs.evaluate.evaluate_checkpoints`."""
    workdir = _checked_folder(workdir, eval_folder)
    _prepare(config, "eval")
    plan = evaluation_plan(config, workdir, eval_folder, log_name)
    _run(evaluate_checkpoints, plan, dry_run, held=[part.folder for part in plan.samplers])


def sample(config: Config, workdir: epath.PathLike, eval_folder: str, *, dry_run: bool = False) -> None:
    """--mode=sample: samples of one checkpoint, as `jobs.sample.sample_checkpoint`."""
    workdir = _checked_folder(workdir, eval_folder)
    _prepare(config, "sample")
    _run(sample_checkpoint, sample_plan(config, workdir, eval_folder), dry_run, held=[workdir / eval_folder])


def _checked_folder(workdir: epath.PathLike, eval_folder: str) -> epath.Path:
    """The workdir. Raises InputError where results would lie among what other jobs write."""
    workdir = user_path(workdir)
    user_path(workdir / eval_folder)
    root = os.fspath(absolute(workdir))
    first = os.path.relpath(os.path.join(root, eval_folder), root).split(os.sep)[0]
    if stage_in(first) is not None or first in {"samples", "wandb"}:
        raise InputError(
            f"--eval_folder={eval_folder}: other jobs write into {first}; choose another name, such as eval"
        )
    return workdir


def _prepare(config: Config, mode: str) -> None:
    """Checks the configuration, joins the hosts of this job and sets up the cache of compiled programs.

    Raises:
      InputError: a setting that cannot work.
    """
    check_config(config, mode)
    distributed.check_jax_settings()
    distributed.start_hosts()
    distributed.check_devices()
    runtime.set_up_compilation_cache(runtime.cache_folder() / "compiled")
    check_batches(config, mode, devices=jax.device_count())
    logger.info("running on %s", distributed.description())
    if (line := distributed.unused_accelerator()) is not None:
        logger.warning(line)


def _run(job: Any, plan: Any, dry_run: bool, held: Sequence[epath.Path] = ()) -> None:
    """Does the job, alone in the folders `held`, or prints what it would do."""
    if not dry_run:
        with contextlib.ExitStack() as alone:
            for folder in held:
                alone.enter_context(exclusive(folder))
            job(plan)
    elif distributed.is_first_host():
        for name, value in (plan.summary() | {"devices": distributed.description()}).items():
            print(f"{name + ':':12} {value}")
