"""Networks from configurations: every option checked, weights made, heads copied."""

import functools
import numbers
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import traverse_util

import segments
from models.layers import NONLINEARITIES
from models.ncsnpp import NCSNpp
from utils import InputError

# Options of config.model that take one of a few values; the first is what a configuration without the key means.
CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "resblock_type": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "nonlinearity": tuple(NONLINEARITIES),
}
# What other families of the public code vary and this one does not: checked, then dropped.
CONSTANTS = {
    "name": ("ncsnpp",),
    "attention_type": ("ddpm",),
    "normalization": ("GroupNorm",),
    "conv_size": (3,),
}
FLAGS = {
    "conditional": True,
    "resamp_with_conv": True,
    "fir": False,
    "skip_rescale": True,
    "scale_by_sigma": False,
}
# name: (default, lowest, highest, whole numbers only)
NUMBERS = {
    "nf": (128, 4, 65_536, True),
    "num_res_blocks": (4, 1, 1_000, True),
    "dropout": (0.0, 0.0, 0.999, False),
    "fourier_scale": (16, 0.0, 1e6, False),
    "init_scale": (0.0, 0.0, 1e6, False),
    "sigma_min": (0.01, 1e-12, 1e12, False),
    "sigma_max": (50.0, 1e-12, 1e12, False),
}


def _choice(options, name: str, allowed: tuple):
    value = options.get(name, allowed[0])
    matches = [choice for choice in allowed if str(value).lower() == str(choice).lower()]
    if not matches:
        raise InputError(f"config.model.{name} = {value!r}: use one of {', '.join(map(str, allowed))}")
    return matches[0]


def _flag(options, name: str, default: bool, section: str = "model") -> bool:
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"config.{section}.{name} = {value!r}: use True or False")
    return value


def _number(value, name: str, lowest, highest, whole: bool):
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool) or not lowest <= value <= highest:
        raise InputError(
            f"config.{name} = {value!r}: use a {'whole ' if whole else ''}number from {lowest:g} to {highest:g}"
        )
    return int(value) if whole else float(value)


def _numbers(values, name: str, lowest, highest, whole: bool, fewest: int = 1) -> tuple:
    if not isinstance(values, list | tuple) or len(values) < fewest:
        raise InputError(f"config.{name} = {values!r}: use a list of at least {fewest} number(s)")
    return tuple(_number(value, name, lowest, highest, whole) for value in values)


def model_options(config) -> dict:
    """The fields of `NCSNpp` that `config` asks for, all checked.

    Args:
      config: with the sections data and model and perhaps training (absent: one head); absent keys of model mean the
        defaults in this module.

    Raises:
      InputError: a value that the family does not have; the message names the option and what it may be.
    """
    model, data = config.model, config.data
    for name, allowed in CONSTANTS.items():
        _choice(model, name, allowed)
    choices = {name: _choice(model, name, allowed) for name, allowed in CHOICES.items()}
    flags = {name: _flag(model, name, default) for name, default in FLAGS.items()}
    sizes = {
        name: _number(model.get(name, default), f"model.{name}", *limits)
        for name, (default, *limits) in NUMBERS.items()
    }
    fir_kernel = _numbers(model.get("fir_kernel", (1, 3, 3, 1)), "model.fir_kernel", -1e6, 1e6, False)
    resolutions = model.get("attn_resolutions", (16,))
    if sum(fir_kernel) == 0:
        raise InputError(f"config.model.fir_kernel = {fir_kernel!r}: its sum must not be 0")
    ch_mult = _numbers(model.get("ch_mult", (1, 2, 2, 2)), "model.ch_mult", 1, 1_000, True)
    training = config.get("training") or {}
    return {
        **choices,
        **{name: value for name, value in flags.items() if name != "fir"},
        **sizes,
        "fir_kernel": fir_kernel if flags["fir"] else None,
        "ch_mult": ch_mult,
        "attn_resolutions": _numbers(resolutions, "model.attn_resolutions", 1, 65_536, True, fewest=0),
        "image_size": _image_size(data, levels=len(ch_mult)),
        "channels": _number(data.get("num_channels", 3), "data.num_channels", 1, 65_536, True),
        "centered": _flag(data, "centered", True, "data"),
        "heads": _number(training.get("reflow_t", 1), "training.reflow_t", 1, 65_536, True),
    }


def _image_size(data, levels: int) -> int:
    size = _number(data.image_size, "data.image_size", 1, 65_536, True)
    if size % 2 ** (levels - 1):
        raise InputError(
            f"config.data.image_size = {size}: the {levels} resolutions of config.model.ch_mult halve it {levels - 1} "
            f"times, so use a multiple of {2 ** (levels - 1)}"
        )
    return size


def create_model(config) -> NCSNpp:
    """The network that `config` describes, with `config.training.reflow_t` heads (1 where there is no such section).

    Raises:
      InputError: a value that the family does not have.
    """
    return NCSNpp(**model_options(config))


def init_params(model: NCSNpp, rng, image_shape: tuple[int, int, int]):
    """Fresh weights for images of shape (height, width, channels): the tree for `model.apply({"params": ...}, ...)`.

    Lazily, so that nothing but the weights is computed, and weights of one shape share one small program: hundreds of
    draws in one program take the CPU compiler minutes.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    label, index = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return model.lazy_init(rng, image, label, index)["params"]


@functools.lru_cache(maxsize=32)  # tracing takes seconds, and every checkpoint of a run asks again
def weight_shapes(model: NCSNpp) -> Mapping[tuple[str, ...], tuple[int, ...]]:
    """The shape of every weight of `model` by its path in the tree. Nothing is allocated."""
    image_shape = (model.image_size, model.image_size, model.channels)
    tree = jax.eval_shape(lambda: init_params(model, jax.random.key(0), image_shape))
    shapes = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(tree).items()}
    return types.MappingProxyType(shapes)


def expand_heads(params, k: int):
    """`params` with each one-head time-embedding weight [1, ...] copied to [k, ...]; already k heads: as it is.

    Every segment of the wider network computes what the one-head network did.

    Raises:
      ValueError: the weights have neither one head nor k.
    """

    def expanded(path, leaf):
        if not path[-1].startswith("head_") or leaf.shape[0] == k:
            return leaf
        if leaf.shape[0] != 1:
            raise ValueError(f"weights with {leaf.shape[0]} time-embedding heads cannot become a network with {k}")
        return leaf.repeat(k, axis=0)

    return traverse_util.path_aware_map(expanded, params)


def velocity_fn(model: NCSNpp, params):
    """velocity(x [B,H,W,C], t [B] in [0, 1], index [B] int32) -> dx/dtau [B,H,W,C], without dropout."""

    def velocity(x, t, index):
        return model.apply({"params": params}, x, segments.label_of_t(t), index)

    return velocity
