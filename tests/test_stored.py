"""Configurations that come back from JSON."""

import json

import pytest

from configs.rf import digits_rf_continuous
from configs.saved import config_from
from utils import InputError


def test_a_configuration_survives_json():
    config = digits_rf_continuous.get_config("on_policy")
    config.model.ema_rates = (0.9, 0.99)
    stored = json.loads(json.dumps(config.to_dict()))
    assert config_from(stored).to_dict() == config.to_dict()
    del stored["optim"]["schedule"]  # of a version that did not have it
    assert config_from(stored).optim.schedule == "constant"


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ({"model": {"no_such": 3}}, "model.no_such=3"),
        ({"no_such": 3}, "no_such=3"),
        ({"no_such": {"a": 3}}, "no_such.a=3"),
        ({"data": 3}, "data=3"),
        ({"model": {"nf": "wide"}}, "model.nf='wide'"),
        ({"model": {"dropout": None}}, "model.dropout=None"),
    ],
)
def test_what_is_no_setting_is_refused(stored, name):
    with pytest.raises(InputError, match=f"unknown or mistyped setting in the stored configuration: {name}"):
        config_from(stored)
