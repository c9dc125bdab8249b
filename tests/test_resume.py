"""Which settings may differ when a run is resumed."""

import json

import pytest

from configs.default import SETTINGS
from configs.rf.digits_rf_continuous import get_config
from configs.saved import START, check_resume, resolved
from configs.validation import stage_values
from utils import InputError


def settings(config):
    """As run.json of a 1-RF keeps them."""
    config.model.rf_phase = 1
    return resolved(config, stage_values(config), 1)


def check(saved, config, starts_alike=lambda: False, folder="1_rf"):
    check_resume(saved, settings(config), folder, starts_alike)


def saved():
    """As it comes back from a file."""
    return json.loads(json.dumps(settings(get_config())))


def test_paths_of_starting_weights_are_settings():
    assert SETTINGS.keys() >= START


def test_the_same_settings_go_on_and_those_of_an_older_version_had_their_defaults():
    older = saved()
    check(older, get_config())
    del older["training"]["t_distribution"]
    older["training"]["gone"] = 3
    check(older, get_config())
    config = get_config()
    config.training.t_distribution = "ushape"
    with pytest.raises(InputError, match="t_distribution was 'uniform' and is 'ushape'"):
        check(older, config)


def test_settings_that_change_the_result_are_named_with_both_values_unless_overridden():
    config = get_config()
    config.seed = 7
    config.optim.lr = 0.1
    config.model.ema_rates = (0.5,)
    config.training.update(log_freq=1, n_iters=9, snapshot_freq=5)  # these may differ
    with pytest.raises(InputError) as refused:
        check(saved(), config, folder="runs/a/1_rf")
    differing = "model.ema_rates was [] and is [0.5]; optim.lr was 0.001 and is 0.1; seed was 42 and is 7. Use"
    assert f"runs/a/1_rf was begun with other settings: {differing}" in str(refused.value)
    assert "override_resume=True" in str(refused.value)
    config.training.override_resume = True
    check(saved(), config, folder="runs/a/1_rf")


def test_a_schedule_that_ends_with_the_run_fixes_its_length():
    before, config = saved(), get_config()
    before["optim"]["schedule"] = config.optim.schedule = "cosine"
    check(before, config)
    config.training.n_iters = 1401
    with pytest.raises(InputError, match="n_iters was 1400 and is 1401"):
        check(before, config)


def test_starting_weights_may_have_another_path_where_they_are_the_same():
    config = get_config()
    config.training.import_flax = "/elsewhere/1_rf"
    check(saved(), config, starts_alike=lambda: True)
    with pytest.raises(InputError, match="import_flax was 'none' and is '/elsewhere/1_rf'"):
        check(saved(), config)
    config.seed = 7
    with pytest.raises(InputError, match=r"other settings: seed was 42 and is 7\. Use"):
        check(saved(), config, starts_alike=lambda: True)
