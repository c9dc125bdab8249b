"""The configurations: the published networks' sizes and settings, and what every file has in common."""

import importlib
import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

import datasets
import models
from configs.default import get_default_config
from configs.validation import check_config
from utils import InputError

FOLDER = Path(__file__).parents[1] / "configs/rf"
NAMES = sorted(path.stem.removesuffix("_rf_continuous") for path in FOLDER.glob("*_rf_continuous.py"))
# Of the public checkpoints and the method's authors; Fashion-MNIST's are chosen in this project.
PARAMETERS = {
    "cifar10": 61_804_419,
    "celeba_64": 62_693_251,
    "imagenet_64": 62_693_251,
    "lsun_church_256": 65_574_549,
    "lsun_bedroom_256": 65_574_549,
    "celebahq_256": 65_574_549,
    "afhq_cat_256": 65_574_549,
    "fashion_mnist_14": 422_353,
    "small_32": 710_979,
}
# (data set, side, centered, sigma_max, batch), as published.
PUBLISHED = {
    "cifar10": ("CIFAR10", 32, True, 50, 128),
    "celeba_64": ("CELEBA", 64, True, 50, 128),
    "imagenet_64": ("IMAGENET", 64, True, 50, 128),
    "lsun_church_256": ("LSUN", 256, False, 380, 64),
    "lsun_bedroom_256": ("LSUN", 256, False, 378, 64),
    "celebahq_256": ("CELEBAHQ", 256, True, 378, 64),
    "afhq_cat_256": ("IMAGES", 256, True, 378, 64),
}


def configuration(name, *recipe):
    return importlib.import_module(f"configs.rf.{name}_rf_continuous").get_config(*recipe)


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_the_published_number_of_parameters(name):
    config = configuration(name)
    assert sum(map(math.prod, models.weight_shapes(models.create_model(config)).values())) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["cifar10", "lsun_church_256"])
def test_networks_return_images_of_their_size(name):
    config = configuration(name)
    model, size, channels = models.create_model(config), config.data.image_size, config.data.num_channels
    image = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    params = traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in models.weight_shapes(model).items()}
    )
    out = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x, jnp.ones(2), jnp.zeros(2, jnp.int32)), params, image
    )
    assert out.shape == image.shape


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_ranges_and_batches_are_the_published_ones(name):
    config = configuration(name)
    data = config.data
    found = (data.dataset, data.image_size, data.centered, config.model.sigma_max, config.training.batch_size)
    assert found == PUBLISHED[name]
    assert data.random_flip
    assert (config.optim.lr, config.optim.warmup, config.optim.grad_clip) == (2e-4, 5000, 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_is_complete_and_valid(name):
    config = configuration(name)
    assert config.data.dataset in ("digits", *datasets.TFDS_SETS)
    default = get_default_config()
    for section in default:
        if hasattr(default[section], "items"):
            assert set(config[section]) == set(default[section])
    for mode in ("train", "eval"):
        check_config(config, mode)
    module = importlib.import_module(f"configs.rf.{name}_rf_continuous")
    assert f"configs/rf/{name}_rf_continuous.py" in inspect.getdoc(module) or name == "digits"


@pytest.mark.parametrize("name", NAMES)
def test_recipes_apply_to_every_configuration(name):
    assert configuration(name, "paper").to_json() == configuration(name).to_json()
    assert configuration(name, "on_policy").training.on_policy == 1
    with pytest.raises(InputError, match="unknown recipe 'papers'"):
        configuration(name, "papers")


def test_every_configuration_is_tested_or_made_here():
    assert set(NAMES) == {*PUBLISHED, "digits", "fashion_mnist", "fashion_mnist_14", "small_32"}
