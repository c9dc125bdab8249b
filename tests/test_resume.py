"""Which settings may differ when a run is resumed."""

import functools
import json

import pytest

from configs.rf.digits_rf_continuous import get_config
from configs.saved import FREE, START, check_resume
from utils import InputError

check_resume = functools.partial(check_resume, starts_alike=lambda: False)


def saved():
    """As it comes back from a file."""
    return json.loads(json.dumps(get_config().to_dict()))


def test_every_free_setting_exists():
    config = get_config()
    for name in FREE | START:
        section, key = name.split(".")
        assert key in config[section], name


def test_the_same_settings_go_on_and_those_of_an_older_version_had_their_defaults():
    older = saved()
    check_resume(older, get_config(), "1_rf")
    del older["training"]["t_distribution"]
    older["training"]["gone"] = 3
    check_resume(older, get_config(), "1_rf")
    config = get_config()
    config.training.t_distribution = "ushape"
    with pytest.raises(InputError, match="t_distribution was 'uniform' and is 'ushape'"):
        check_resume(older, config, "1_rf")


def test_settings_that_change_the_result_are_named_with_both_values_unless_overridden():
    config = get_config()
    config.seed = 7
    config.optim.lr = 0.1
    config.model.ema_rates = (0.5,)
    config.training.update(log_freq=1, n_iters=9, snapshot_freq=5)  # these may differ
    with pytest.raises(InputError) as refused:
        check_resume(saved(), config, "runs/a/1_rf")
    differing = "model.ema_rates was [] and is [0.5]; optim.lr was 0.001 and is 0.1; seed was 42 and is 7. Use"
    assert f"runs/a/1_rf was begun with other settings: {differing}" in str(refused.value)
    assert "override_resume=True" in str(refused.value)
    config.training.override_resume = True
    check_resume(saved(), config, "runs/a/1_rf")


def test_a_schedule_that_ends_with_the_run_fixes_its_length():
    before, config = saved(), get_config()
    before["optim"]["schedule"] = config.optim.schedule = "cosine"
    check_resume(before, config, "1_rf")
    config.training.n_iters += 1
    with pytest.raises(InputError, match="n_iters was 1400 and is 1401"):
        check_resume(before, config, "1_rf")


def test_starting_weights_may_have_another_path_where_they_are_the_same():
    config = get_config()
    config.training.import_flax = "/elsewhere/1_rf"
    check_resume(saved(), config, "1_rf", starts_alike=lambda: True)
    with pytest.raises(InputError, match="import_flax was 'none' and is '/elsewhere/1_rf'"):
        check_resume(saved(), config, "1_rf")
    config.seed = 7
    with pytest.raises(InputError, match=r"other settings: seed was 42 and is 7\. Use"):
        check_resume(saved(), config, "1_rf", starts_alike=lambda: True)
