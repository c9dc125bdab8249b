"""Validates configurations: the first invalid value is named before any work is done.

The tables below hold the choices and ranges of all settings but the network's, which are in models/factory.py.
"""

import ml_collections

import losses
import models
import sampling
import segments
from configs.default import is_given
from utils import InputError

CHOICES = {
    "model.rf_phase": (1, 2),
    "training.reflow_mode": ("gen_reflow", "train_reflow", "train_distill"),
    "training.reflow_dtype": ("float32", "float16"),
    "training.reflow_pairs": ("segments", "trajectory"),
    "training.loss": (*losses.LOSSES, "lpips_huber"),
    "training.t_distribution": tuple(losses.T_DISTRIBUTIONS),
    "training.nan_policy": ("stop", "skip"),
    "optim.schedule": ("constant", "cosine"),
    "eval.reflow_mode": ("eval_reflow", "eval_distill"),
    "eval.feature_network": ("auto", "pixels"),
    "eval.feature_backend": ("auto", "tensorflow", "jax"),
    "sampling.method": ("ode", "pc"),
    "sampling.solver": tuple(sampling.SOLVERS),
    "sampling.predictor": tuple(sampling.PREDICTORS),
    "sampling.error_norm": ("batch", "sample"),
    "sampling.time_grid": ("uniform", "adaptive"),
}
# Inclusive lower bounds; None: no bound above.
RANGES = {
    "seed": (0, 2**31 - 2),
    "model.num_scales": (1, None),
    "model.ema_rate": (0, 1),
    "training.reflow_t": (1, None),
    "training.batch_size": (1, None),
    "training.n_iters": (1, None),
    "training.n_jitted_steps": (1, None),
    "training.accumulate": (1, None),
    "training.log_freq": (1, None),
    "training.snapshot_freq": (1, None),
    "training.snapshot_freq_for_preemption": (1, None),
    "training.keep_snapshots": (0, None),
    "training.snapshot_fid_sample": (0, None),
    "training.n_reflow_data": (1, None),
    "training.gen_reflow_size": (1, None),
    "training.reflow_file_size": (1, None),
    "training.t_shape": (0.01, 80),  # e^a is a float32
    "training.distill_steps": (1, None),
    "training.on_policy": (0, 1),
    "training.inverted_pairs": (0, 1),
    "optim.lr": (0, None),
    "optim.beta1": (0, 1),
    "optim.eps": (0, None),
    "optim.warmup": (0, None),
    "sampling.tol": (1e-12, None),
    "eval.batch_size": (1, None),
    "eval.num_samples": (2, None),
    "eval.max_real": (0, None),
    "eval.precision_recall_samples": (0, None),
    "eval.nearest_samples": (0, None),
    "eval.begin_step": (0, None),
    "eval.end_step": (0, None),
    "eval.interval_step": (1, None),
    "eval.straightness_samples": (1, None),
    "eval.segments": (0, None),
    "eval.ema_rate": (0, 1),
    "sample.count": (1, None),
    "sample.batch_size": (1, None),
    "sample.frames": (2, 1_000),
}


def check_config(config, mode: str):
    """Raises InputError for the first value that cannot work in a job of `mode`: train, eval or sample."""
    for each in sampler_configs(config).values():
        check_config(each, mode)
    for name, allowed in CHOICES.items():
        if _value(config, name) not in allowed:
            raise InputError(f"--config.{name}={_value(config, name)}: use one of {', '.join(map(str, allowed))}")
    for name, (low, high) in RANGES.items():
        value = _value(config, name)
        if not low <= value or (high is not None and value > high):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise InputError(f"--config.{name}={value}: it must be {span}")
    models.create_model(config)
    check_steps(config, mode)
    check_options(config, mode)


def check_options(config, mode: str):
    """Raises InputError where two settings contradict each other or one lacks what it needs."""
    model, training = config.model, config.training
    for rate in model.ema_rates:
        if not isinstance(rate, float | int) or not 0 <= rate <= 1 or rate == model.ema_rate:
            raise InputError(f"--config.model.ema_rates={model.ema_rates}: use rates from 0 to 1 other than ema_rate")
    if len(set(model.ema_rates)) < len(model.ema_rates):
        raise InputError(f"--config.model.ema_rates={model.ema_rates} names a rate twice")
    if mode != "train" and config.eval.ema_rate not in (0, model.ema_rate, *model.ema_rates):
        rates = ", ".join(map(str, (model.ema_rate, *model.ema_rates)))
        raise InputError(f"--config.eval.ema_rate={config.eval.ema_rate}: use 0 or a rate of the run ({rates})")
    if mode == "train" and config.optim.schedule == "cosine" and training.n_iters <= config.optim.warmup:
        raise InputError(
            f"--config.optim.schedule=cosine falls after the warm-up: training.n_iters={training.n_iters} must be more "
            f"than optim.warmup={config.optim.warmup}"
        )
    if training.snapshot_fid_sample == 1:
        raise InputError("--config.training.snapshot_fid_sample=1: distances need 2 samples or more; use 0 for none")
    needs_lpips = mode == "train" and training.loss == "lpips_huber"
    if needs_lpips and not (is_given(training.lpips_path) and is_given(training.lpips_heads)):
        raise InputError(
            "--config.training.loss=lpips_huber needs the weights of VGG16 and of LPIPS: give training.lpips_path and "
            "training.lpips_heads, or use training.loss=huber"
        )
    if training.inverted_pairs and not training.reflow_store_noise:
        raise InputError(
            "--config.training.inverted_pairs needs the stored starting points: use training.reflow_store_noise=True"
        )


def on_policy_rows(config) -> int:
    """The examples of a batch of `train_distill` that start from the student's own states."""
    return round(config.training.on_policy * config.training.batch_size)


def segments_of(config) -> int:
    """k: a first rectified flow has one segment, whatever `training.reflow_t` says."""
    return 1 if config.model.rf_phase == 1 else config.training.reflow_t


def _value(config, name):
    for key in name.split("."):
        config = config[key]
    return config


def check_steps(config, mode: str):
    """Raises InputError where numbers of steps, segments and updates do not fit together."""
    training, k = config.training, segments_of(config)
    generates = mode == "train" and config.model.rf_phase == 2 and training.reflow_mode == "gen_reflow"
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


def check_batches(config, mode: str, *, devices: int):
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


# Short names beside those of `sampling.PREDICTORS`. 'heun' is rf_solver_heun: the fixed grid's own.
PREDICTOR_NAMES = {"euler": "rf_solver", "heun": "rf_solver_heun", "reinterpolate": "rf_reinterpolate"}


def sampler_configs(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The configuration of each sampler in eval.samplers, as if it were the only one, by its name, such as 'euler_4'.

    Empty where eval.samplers is: `config` alone then says how to sample.

    Raises:
      InputError: an entry that cannot be read, or one that is named twice.
    """
    found: dict[str, ml_collections.ConfigDict] = {}
    for entry in filter(None, (part.strip() for part in config.eval.samplers.split(";"))):
        for name, overrides in _entry_overrides(entry):
            if name in found:
                raise InputError(f"--config.eval.samplers={config.eval.samplers} names {name} twice")
            found[name] = config.copy_and_resolve_references()
            found[name].eval.samplers = ""
            found[name].update_from_flattened_dict(overrides)
    return found


def _entry_overrides(entry: str):
    """Yields (name, settings) of each sampler of an entry, such as 'euler:1,2'."""
    kind, _, given = (part.strip() for part in entry.partition(":"))
    values = [value.strip() for value in given.split(",")] if given else []
    if kind == "ode":
        for value in values or [""]:
            tolerance = {"sampling.tol": _number(float, entry, value)} if value else {}
            yield f"ode_{value}" if value else "ode", {"sampling.method": "ode", **tolerance}
        return
    predictor = PREDICTOR_NAMES.get(kind, kind)
    if predictor not in sampling.PREDICTORS or not values:
        names = ", ".join(dict.fromkeys([*PREDICTOR_NAMES, *sampling.PREDICTORS]))
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
