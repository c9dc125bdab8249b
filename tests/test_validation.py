"""Which configurations are refused before any work is done, and with what words."""

import dataclasses
import math

import pytest

import train_step
from configs.default import SETTINGS, get_default_config
from configs.validation import StageValues, check_batches, check_config, stage_values
from utils import InputError


def config_with(**settings):
    config = get_default_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in settings.items()})
    return config


def test_the_defaults_pass():
    for mode in ("train", "eval"):
        check_config(get_default_config(), mode)


def wrong_values(setting):
    """Values outside what a setting may be."""
    if setting.choices:
        return ["no such value" if isinstance(setting.choices[0], str) else -3]
    number = setting.kind or type(setting.default)
    if number not in (int, float):
        return []
    beyond = [] if setting.least is None and setting.above is None else [number(-3)]
    beyond += [setting.least - 1] if setting.or_zero else []
    beyond += [2**31, 10**12] if number is int and setting.most is None else []
    beyond += [number(setting.most + 1)] if setting.most is not None else []
    return beyond + ([float("inf"), float("nan")] if number is float else [])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_refused_outside_its_values(name):
    for wrong in wrong_values(SETTINGS[name]):
        if name.startswith("model.") and SETTINGS[name].least is None and not SETTINGS[name].choices:
            continue  # the network's options are refused in words of their own
        with pytest.raises(InputError, match=f"--config.{name}={wrong}: "):
            check_config(config_with(**{name.replace(".", "__"): wrong}), "train")


@pytest.mark.parametrize(
    ("mode", "settings", "message"),
    [
        ("train", {"training__loss": "lpips_huber"}, "give training.lpips_path and training.lpips_heads"),
        ("train", {"training__snapshot_fid_sample": 1}, "it must be 0 or at least 2"),
        ("train", {"training__inverted_pairs": 0.5, "training__reflow_store_noise": False}, "reflow_store_noise=True"),
        ("train", {"model__ema_rates": (0.9, 1.5)}, "rates from 0 to 1"),
        ("train", {"model__ema_rates": (0.9999,)}, "other than ema_rate"),
        ("train", {"model__ema_rates": (0.9, 0.9)}, "names a rate twice"),
        ("eval", {"model__ema_rates": (0.9,), "eval__ema_rate": 0.99}, r"a rate of the run \(0.9999, 0.9\)"),
        (
            "train",
            {"optim__schedule": "cosine", "optim__warmup": 10, "training__n_iters": 10},
            "more than optim.warmup",
        ),
        ("train", {"sampling__method": "pc", "model__num_scales": 3, "training__reflow_t": 4}, "use at least 4"),
        ("train", {"training__n_jitted_steps": 3}, "not a multiple of n_jitted_steps"),
        ("eval", {"eval__samplers": "ode;euler:1,4", "training__reflow_t": 2}, "num_scales=1 steps cannot cover"),
        ("eval", {"eval__samplers": "ode:1e-3,0"}, "--config.sampling.tol=0.0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(mode, settings, message):
    with pytest.raises(InputError, match=message):
        check_config(config_with(**settings), mode)


@pytest.mark.parametrize(
    ("devices", "settings", "message"),
    [
        (3, {"eval__batch_size": 1024}, r"eval.batch_size=1024 cannot be shared by 3 devices; use 1023 or 1026$"),
        (8, {"training__batch_size": 4}, r"training.batch_size=4 cannot be shared by 8 devices; use 8$"),
        (8, {"training__accumulate": 3}, r"512 cannot be shared by 8 devices, .*accumulate=3 parts; use 504 or 528$"),
        (
            8,
            {"training__on_policy": 0.3},
            r"154 of 512 examples cannot be shared by 8 devices; use 0.296875 or 0.3125$",
        ),
    ],
)
def test_a_batch_that_the_devices_cannot_share_is_refused_with_the_nearest_that_they_can(devices, settings, message):
    with pytest.raises(InputError, match=message):
        check_batches(config_with(**settings), "train", devices=devices)
    check_batches(config_with(), "train", devices=8)


@pytest.mark.parametrize(("phase", "expected"), [(1, (400_001, 0.999999, True)), (2, (100_001, 0.9999, False))])
def test_a_stage_takes_what_is_given_else_what_it_began_with_else_its_own_defaults(phase, expected):
    config = config_with(model__rf_phase=phase)
    assert dataclasses.astuple(stage_values(config)) == expected
    recorded = {"training": {"n_iters": 7}, "model": {"ema_rate": 0.5, "variable_ema_rate": not expected[2]}}
    assert stage_values(config, recorded) == StageValues(7, 0.5, not expected[2])
    config.training.n_iters = 9
    config.model.variable_ema_rate = expected[2]
    assert stage_values(config, recorded) == StageValues(9, 0.5, expected[2])


def test_reflow_keeps_the_teachers_ema_and_a_capped_rate_would_not():
    """The share of the source's EMA that is left after ten updates."""
    for capped, left in ((False, 0.999), (True, 6e-5)):
        values = stage_values(config_with(**({"model__variable_ema_rate": True} if capped else {})))
        rates = [train_step.ema_rate_at(n, values.ema_rate, values.variable_ema_rate) for n in range(1, 11)]
        assert math.prod(map(float, rates)) == pytest.approx(left, rel=0.05)
