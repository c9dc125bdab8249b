"""The jobs of main.py: each mode checks its configuration, sets the process up and hands over to a module of `jobs`."""

import os
import re

import jax
from etils import epath

import distributed
import runtime
from configs.validation import check_batches, check_config, segments_of
from jobs.builders import Config
from jobs.evaluate import evaluate_checkpoints
from jobs.generate import generate_pairs
from jobs.sample import sample_checkpoint
from jobs.stages import STAGES, stage_of
from jobs.train import train_stage
from utils import InputError, absolute


def train(config: Config, workdir: epath.PathLike, *, log_name: str = "seqrf") -> None:
    """--mode=train: trains 1-RF, generates pairs, trains k-SeqRF or distils it, as the configuration says.

    Raises:
      InputError: anything in the configuration, the data or the workdir that cannot work, before work is done.
    """
    config = _prepare(config, "train")
    if config.model.rf_phase == 2 and config.training.reflow_mode == "gen_reflow":
        generate_pairs(config, epath.Path(workdir), log_name)
    else:
        train_stage(config, epath.Path(workdir), stage_of(config, config.training.reflow_mode), log_name)


def evaluate(config: Config, workdir: epath.PathLike, eval_folder: str, *, log_name: str = "seqrf") -> None:
    """--mode=eval: measures every checkpoint asked for, as `jobs.evaluate.evaluate_checkpoints`."""
    _check_folder(workdir, eval_folder)
    evaluate_checkpoints(_prepare(config, "eval"), epath.Path(workdir), eval_folder, log_name)


def sample(config: Config, workdir: epath.PathLike, eval_folder: str) -> None:
    """--mode=sample: samples of one checkpoint, as `jobs.sample.sample_checkpoint`."""
    _check_folder(workdir, eval_folder)
    sample_checkpoint(_prepare(config, "sample"), epath.Path(workdir), eval_folder)


def _check_folder(workdir: epath.PathLike, eval_folder: str) -> None:
    """Raises InputError where results would lie among what other jobs write."""
    root = os.fspath(absolute(workdir))
    first = os.path.relpath(os.path.join(root, eval_folder), root).split(os.sep)[0]
    is_many_step = re.fullmatch(rf"{STAGES['distill'].folder}_\d+", first)
    if is_many_step or first in {"samples", "wandb", *(stage.folder for stage in STAGES.values())}:
        raise InputError(
            f"--eval_folder={eval_folder}: other jobs write into {first}; choose another name, such as eval"
        )


def _prepare(config: Config, mode: str) -> Config:
    """Validates the configuration, starts the hosts and sets up the compilation cache; the configuration, k resolved.

    Raises:
      InputError: a setting that cannot work.
    """
    check_config(config, mode)
    config = _resolve_segments(config)
    distributed.start_hosts()
    runtime.set_up_compilation_cache(runtime.cache_folder() / "compiled")
    check_batches(config, mode, devices=jax.device_count())
    return config


def _resolve_segments(config: Config) -> Config:
    """A copy with k in training.reflow_t: 1 for a 1-RF, whose eval.segments keeps what was given."""
    config = config.copy_and_resolve_references()
    config.eval.segments = config.eval.segments or config.training.reflow_t
    config.training.reflow_t = segments_of(config)
    return config
