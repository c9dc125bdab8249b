import importlib
import pathlib

import pytest

from configs.default import get_default_config
from configs.recipes import RECIPES, apply_recipe
from utils import InputError


def test_paper_changes_nothing():
    assert apply_recipe(get_default_config(), "paper").to_json() == get_default_config().to_json()


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"paper"}))
def test_a_recipe_changes_values_of_known_settings_only(name):
    default, config = get_default_config(), apply_recipe(get_default_config(), name)
    assert config.to_json() != default.to_json()
    assert [set(config[section]) for section in ("training", "model", "optim")] == [
        set(default[section]) for section in ("training", "model", "optim")
    ]


def test_improved_reflow_takes_lpips_where_its_weights_are_given_and_an_override_wins():
    config = apply_recipe(get_default_config(), "2rf++")
    assert config.training.loss == "huber"
    config.training.lpips_path = "vgg16.pth"
    assert config.copy_and_resolve_references().training.loss == "lpips_huber"
    config.training.loss = "l2"
    assert config.copy_and_resolve_references().training.loss == "l2"


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"unknown recipe 'papre': use one of paper, 2rf\+\+, on_policy, best"):
        apply_recipe(get_default_config(), "papre")


CONFIGURATIONS = sorted(path.stem for path in (pathlib.Path(__file__).parents[1] / "configs/rf").glob("*_rf_*.py"))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_takes_a_recipe(name):
    get_config = importlib.import_module(f"configs.rf.{name}").get_config
    assert get_config().to_json() == get_config("paper").to_json()
    assert get_config("2rf++").training.t_distribution == "ushape"
