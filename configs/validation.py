"""Validates configurations: the first invalid value is named before any work is done.

What a single setting may be is declared with it, in configs/default.py and models/factory.py; here is what several of
them mean together.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import models
import sampling
import segments
from configs.default import SETTINGS, is_given
from configs.settings import Config, check_values
from utils import InputError

MOST_FILES = 1_000_000  # of a pair set: all are listed, opened and checked


@dataclasses.dataclass(frozen=True)
class StageValues:
    """The settings whose defaults depend on the stage."""

    n_iters: int
    ema_rate: float
    variable_ema_rate: bool


def stage_values(config: Config, recorded: dict[str, Any] | None = None) -> StageValues:
    """What the configuration says for its stage, else what its run was begun with, else the stage's defaults.

    Args:
      recorded: the settings in the run.json of the stage; None: it is new.
    """
    defaults = config.rf if config.model.rf_phase == 1 else config.reflow
    values = {}
    for section, name in (("training", "n_iters"), ("model", "ema_rate"), ("model", "variable_ema_rate")):
        candidates = (config[section][name], (recorded or {}).get(section, {}).get(name), defaults[name])
        values[name] = next(value for value in candidates if value is not None)
    return StageValues(**values)


def check_config(config: Config, mode: str) -> None:
    """Raises InputError for the first value that cannot work in a job of `mode`: train, eval or sample."""
    for each in sampler_configs(config).values():
        check_config(each, mode)
    check_values(config, SETTINGS)
    models.create_model(config)
    check_steps(config, mode, segments_of(config))
    _check_emas(config, mode)
    _check_training(config, mode)


def _check_emas(config: Config, mode: str):
    """Raises InputError where the EMA rates are none, or an evaluation asks for one that the run does not keep."""
    rates, ema_rate = config.model.ema_rates, stage_values(config).ema_rate
    for rate in rates:
        if not isinstance(rate, float | int) or not 0 <= rate <= 1 or rate == ema_rate:
            raise InputError(f"--config.model.ema_rates={rates}: use rates from 0 to 1 other than ema_rate")
    if len(set(rates)) < len(rates):
        raise InputError(f"--config.model.ema_rates={rates} names a rate twice")
    if mode != "train" and config.eval.ema_rate not in (0, ema_rate, *rates):
        known = ", ".join(map(str, (ema_rate, *rates)))
        raise InputError(f"--config.eval.ema_rate={config.eval.ema_rate}: use 0 or a rate of the run ({known})")


def _check_training(config: Config, mode: str):
    """Raises InputError where two settings of training contradict each other or one lacks what it needs."""
    training, n_iters = config.training, stage_values(config).n_iters
    if mode == "train" and config.optim.schedule == "cosine" and n_iters <= config.optim.warmup:
        raise InputError(
            f"--config.optim.schedule=cosine falls after the warm-up: training.n_iters={n_iters} must be more than "
            f"optim.warmup={config.optim.warmup}"
        )
    needs_lpips = mode == "train" and training.loss == "lpips_huber"
    if needs_lpips and not (is_given(training.lpips_path) and is_given(training.lpips_heads)):
        raise InputError(
            "--config.training.loss=lpips_huber needs the weights of VGG16 and of LPIPS: give training.lpips_path and "
            "training.lpips_heads, or use training.loss=huber"
        )
    files = -(-training.n_reflow_data // training.reflow_file_size)
    if mode == "train" and files > MOST_FILES:
        raise InputError(
            f"--config.training.n_reflow_data={training.n_reflow_data} pairs in files of training.reflow_file_size="
            f"{training.reflow_file_size} are {files} files; use at most {MOST_FILES}"
        )
    if training.inverted_pairs and not training.reflow_store_noise:
        raise InputError(
            "--config.training.inverted_pairs needs the stored starting points: use training.reflow_store_noise=True"
        )


def on_policy_rows(config: Config) -> int:
    """The examples of a batch of `train_distill` that start from the student's own states."""
    return round(config.training.on_policy * config.training.batch_size)


def segments_of(config: Config) -> int:
    """k: a first rectified flow has one segment, whatever `training.reflow_t` says."""
    return 1 if config.model.rf_phase == 1 else config.training.reflow_t


def generates_pairs(config: Config) -> bool:
    """Whether --mode=train makes pairs rather than trains."""
    return config.model.rf_phase == 2 and config.training.reflow_mode == "gen_reflow"


def check_steps(config: Config, mode: str, k: int) -> None:
    """Raises InputError where numbers of steps, k segments and updates do not fit together."""
    training, generates = config.training, mode == "train" and generates_pairs(config)
    if config.sampling.method == "pc" and config.model.num_scales < k:
        raise InputError(
            f"--config.model.num_scales={config.model.num_scales} steps cannot cover training.reflow_t={k} segments; "
            f"use at least {k}"
        )
    placed = config.sampling.method == "pc" and config.sampling.time_grid == "adaptive"
    if placed and config.model.num_scales > segments.FINE_STEPS:
        raise InputError(
            f"--config.model.num_scales={config.model.num_scales}: adaptive steps are placed on {segments.FINE_STEPS} "
            "fine ones; use at most as many, or sampling.time_grid=uniform"
        )
    if generates and config.sampling.method != "ode":
        raise InputError("pairs are solved with adaptive steps; use --config.sampling.method=ode")
    if generates and training.adaptive_interval and k * segments.SHORTEST_SEGMENT > 1:
        raise InputError(
            f"--config.training.reflow_t={k}: no adaptive segment is shorter than {segments.SHORTEST_SEGMENT:.0%} of "
            f"the time; use at most {round(1 / segments.SHORTEST_SEGMENT)}, or training.adaptive_interval=False"
        )
    if mode != "train" or generates:
        return
    for name in ("snapshot_freq", "snapshot_freq_for_preemption"):
        if training[name] % training.n_jitted_steps:
            raise InputError(
                f"--config.training.{name}={training[name]} is not a multiple of n_jitted_steps="
                f"{training.n_jitted_steps}; a checkpoint can only be kept between two compiled calls"
            )


def check_batches(config: Config, mode: str, *, devices: int) -> None:
    """Raises InputError where a batch cannot be shared evenly by the devices of all hosts."""
    if mode != "sample":
        _check_shared("eval.batch_size", config.eval.batch_size, devices)
    if mode != "train":
        return
    size, rows = config.training.batch_size, on_policy_rows(config)
    _check_shared("training.batch_size", size, devices, parts=config.training.accumulate)
    if rows % devices:
        shares = " or ".join(f"{n / size:g}" for n in _nearest(rows, devices))
        raise InputError(
            f"--config.training.on_policy={config.training.on_policy}: {rows} of {size} examples cannot be shared by "
            f"{devices} devices; use {shares}"
        )


def _check_shared(name: str, size: int, devices: int, *, parts: int = 1):
    if size % (devices * parts):
        each = f", each of which goes through its own in training.accumulate={parts} parts" if parts > 1 else ""
        nearest = " or ".join(map(str, _nearest(size, devices * parts)))
        raise InputError(f"--config.{name}={size} cannot be shared by {devices} devices{each}; use {nearest}")


def _nearest(size: int, unit: int) -> list[int]:
    """The positive multiples of `unit` next to `size`."""
    below = size - size % unit
    return [multiple for multiple in (below, below + unit) if multiple]


def sampler_configs(config: Config) -> dict[str, Config]:
    """The configuration of each sampler in eval.samplers, as if it were the only one, by its name, such as 'euler_4'.

    Entries such as 'ode;euler:1,2,4,8;heun:4;ode:1e-3,1e-5' are separated by semicolons: a name, and after a colon the
    steps N of a fixed grid, or tolerances of 'ode'. Empty where eval.samplers is: `config` then says how to sample.

    Raises:
      InputError: an entry that cannot be read, or one that is named twice.
    """
    found: dict[str, Config] = {}
    for entry in filter(None, (part.strip() for part in config.eval.samplers.split(";"))):
        for name, overrides in _entry_overrides(entry):
            if name in found:
                raise InputError(f"--config.eval.samplers={config.eval.samplers} names {name} twice")
            found[name] = config.copy_and_resolve_references()
            found[name].eval.samplers = ""
            found[name].update_from_flattened_dict(overrides)
    return found


def _entry_overrides(entry: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, settings) of each sampler of an entry, such as 'euler:1,2'."""
    kind, _, given = (part.strip() for part in entry.partition(":"))
    values = [value.strip() for value in given.split(",")] if given else []
    if kind == "ode":
        for value in values or [""]:
            tolerance = {"sampling.tol": _number(float, entry, value)} if value else {}
            yield f"ode_{value}" if value else "ode", {"sampling.method": "ode", **tolerance}
        return
    predictor = sampling.SHORT_NAMES.get(kind, kind)
    if predictor not in sampling.PREDICTORS or not values:
        names = ", ".join(dict.fromkeys([*sampling.SHORT_NAMES, *sampling.PREDICTORS]))
        raise InputError(
            f"--config.eval.samplers: cannot read {entry!r}; an entry is ode, ode:TOL,... or NAME:N,... (N steps), "
            f"a NAME of {names}"
        )
    for value in values:
        steps = _number(int, entry, value)
        grid = {"sampling.method": "pc", "sampling.predictor": predictor, "model.num_scales": steps}
        yield f"{kind}_{steps}", grid


def _number(kind: type, entry: str, value: str) -> float | int:
    try:
        return kind(value)
    except ValueError:
        raise InputError(f"--config.eval.samplers: {value!r} in {entry!r} is not a number of the kind needed") from None
