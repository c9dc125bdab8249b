"""How `eval.samplers` is read."""

import pytest

from configs.default import get_default_config
from configs.validation import sampler_configs
from utils import InputError


def configs_of(text):
    config = get_default_config()
    config.eval.samplers = text
    return sampler_configs(config)


def test_every_entry_is_a_configuration_of_its_own():
    found = configs_of("ode; euler:1,2 ;heun:4;reinterpolate:3;midpoint:2;ode:1e-3,1e-6;")
    sections = {name: (c.sampling, c.model) for name, c in found.items()}
    read = {name: (s.method, s.predictor, s.tol, m.num_scales) for name, (s, m) in sections.items()}
    assert read == {
        "ode": ("ode", "rf_solver", 1e-5, 1000),
        "euler_1": ("pc", "rf_solver", 1e-5, 1),
        "euler_2": ("pc", "rf_solver", 1e-5, 2),
        "heun_4": ("pc", "rf_solver_heun", 1e-5, 4),
        "reinterpolate_3": ("pc", "rf_reinterpolate", 1e-5, 3),
        "midpoint_2": ("pc", "midpoint", 1e-5, 2),
        "ode_1e-3": ("ode", "rf_solver", 1e-3, 1000),
        "ode_1e-6": ("ode", "rf_solver", 1e-6, 1000),
    }
    assert {c.eval.samplers for c in found.values()} == {""}
    assert configs_of("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eular:4", "cannot read 'eular:4'.*NAME of euler, heun, reinterpolate, rf_solver"),
        ("euler", "cannot read 'euler'"),
        ("heun:4.5", "'4.5' in 'heun:4.5' is not a number"),
        ("ode:../x", "'../x' in 'ode:../x' is not a number"),
        ("ode;euler:2;euler:1,2", "names euler_2 twice"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        configs_of(text)
