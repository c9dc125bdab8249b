"""Networks from descriptions: the table of the network's options, fresh weights, heads copied."""

import functools
import numbers
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import ArrayLike
from jaxtyping import Array, Key, UInt32

import segments
from models.layers import NONLINEARITIES
from models.ncsnpp import NCSNpp
from utils import InputError

# The options of config.model; the first choice, or the default, is what a configuration without the key means.
CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "resblock_type": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "nonlinearity": tuple(NONLINEARITIES),
    "conditional": (True, False),
    "resamp_with_conv": (True, False),
    "fir": (False, True),
    "skip_rescale": (True, False),
    "scale_by_sigma": (False, True),
    "dtype": ("float32", "bfloat16"),
    "remat": (False, True),
}
# Options of the public code that have one value in this family: checked, then dropped.
CONSTANTS = {"name": ("ncsnpp",), "attention_type": ("ddpm",), "normalization": ("GroupNorm",), "conv_size": (3,)}
# name: (default, lowest, highest, type); a tuple as default: a list of such numbers
NUMBERS = {
    "nf": (128, 4, 65_536, int),
    "ch_mult": ((1, 2, 2, 2), 1, 1_000, int),
    "num_res_blocks": (4, 1, 1_000, int),
    "attn_resolutions": ((16,), 1, 65_536, int),
    "dropout": (0.0, 0.0, 0.999, float),
    "fourier_scale": (16, 0.0, 1e6, float),
    "fir_kernel": ((1, 3, 3, 1), -1e6, 1e6, float),
    "init_scale": (0.0, 0.0, 1e6, float),
    "sigma_min": (0.01, 1e-12, 1e12, float),
    "sigma_max": (50.0, 1e-12, 1e12, float),
}
# Options that change neither the parameters nor the function they define; left out when checkpoints are compared.
NOT_IDENTITY = ("dropout", "init_scale", "dtype", "remat")


def _choice(name: str, value, allowed: tuple):
    value = allowed[0] if value is None else value
    matches = [choice for choice in allowed if str(value).lower() == str(choice).lower()]
    if not matches or isinstance(allowed[0], bool) != isinstance(value, bool):
        raise InputError(f"config.{name} = {value!r}: use one of {', '.join(map(str, allowed))}")
    return matches[0]


def _number(name: str, value, default, lowest, highest, kind: type):
    value = default if value is None else value
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise InputError(f"config.{name} = {value!r}: use a list of numbers")
        return tuple(_number(name, item, None, lowest, highest, kind) for item in value)
    expected = numbers.Integral if kind is int else numbers.Real
    if not isinstance(value, expected) or isinstance(value, bool) or not lowest <= value <= highest:
        whole = "whole " if kind is int else ""
        raise InputError(f"config.{name} = {value!r}: use a {whole}number from {lowest:g} to {highest:g}")
    return kind(value)


def make_network(data: Any, model: Any, heads: int = 1) -> NCSNpp:
    """The network that the sections `data` and `model` of a configuration, or of a checkpoint's metadata, describe.

    Args:
      data: a mapping with image_size, num_channels, centered; further entries are not looked at.
      model: a mapping of the options; absent ones, or None, mean the defaults in this module.
      heads: k, the sets of time-embedding weights.

    Raises:
      InputError: a value that the family does not have; the message names the option and its allowed values.
    """
    for name, allowed in CONSTANTS.items():
        _choice(f"model.{name}", model.get(name), allowed)
    options = {name: _choice(f"model.{name}", model.get(name), allowed) for name, allowed in CHOICES.items()}
    options |= {name: _number(f"model.{name}", model.get(name), *limits) for name, limits in NUMBERS.items()}
    if sum(options["fir_kernel"]) == 0:
        raise InputError(f"config.model.fir_kernel = {options['fir_kernel']}: its sum must not be 0")
    if not options["ch_mult"]:
        raise InputError("config.model.ch_mult = (): use a list of at least 1 number")
    fir = options.pop("fir")
    return NCSNpp(
        **options | {"fir_kernel": options["fir_kernel"] if fir else None},
        image_size=_image_size(data.get("image_size"), len(options["ch_mult"]) - 1),
        channels=_number("data.num_channels", data.get("num_channels"), 3, 1, 65_536, int),
        centered=_choice("data.centered", data.get("centered"), (True, False)),
        heads=_number("training.reflow_t", heads, 1, 1, 65_536, int),
    )


def _image_size(value, halvings: int) -> int:
    size = _number("data.image_size", value, None, 1, 65_536, int)
    if size % 2**halvings:
        raise InputError(
            f"config.data.image_size = {size}: the {halvings + 1} resolutions of config.model.ch_mult halve it "
            f"{halvings} times, so use a multiple of {2**halvings}"
        )
    return size


def network_identity(network: NCSNpp) -> dict[str, dict[str, Any]]:
    """What makes two networks different, as checkpoints keep it: the arguments `data` and `model` of `make_network`.

    Without NOT_IDENTITY and heads, and with None for what this network does not use. Lists, as JSON has them.
    """
    names = [name for name in (*CHOICES, *NUMBERS) if name not in NOT_IDENTITY]
    model = {name: network.fir_kernel is not None if name == "fir" else getattr(network, name) for name in names}
    if not network.uses_sigma_table:
        model |= {"sigma_min": None, "sigma_max": None}
    model = {name: list(value) if isinstance(value, tuple) else value for name, value in model.items()}
    images = {"image_size": network.image_size, "num_channels": network.channels, "centered": network.centered}
    return {"data": images, "model": model}


def create_model(config: Any) -> NCSNpp:
    """The network that `config` describes, with `config.training.reflow_t` heads (1 where there is no such section).

    Args:
      config: sections `data`, `model` and perhaps `training`, as an ml_collections.ConfigDict or nested dicts.

    Raises:
      InputError: as `make_network`.
    """
    heads = (config.get("training") or {}).get("reflow_t", 1)
    return make_network(config["data"], config["model"], heads)


def init_params(
    model: NCSNpp, rng: Key[Array, ""] | UInt32[Array, "2"], image_shape: tuple[int, int, int]
) -> dict[str, Any]:
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


def expand_heads(params: Any, k: int) -> Any:
    """`params` with each one-head time-embedding weight [1, ...] copied to [k, ...]; already k heads: as it is.

    Every segment of the wider network computes what the one-head network did.

    Raises:
      ValueError: the weights have neither one head nor k.
    """

    def expanded(path: Any, leaf: Any) -> Any:
        if not path[-1].startswith("head_") or leaf.shape[0] == k:
            return leaf
        if leaf.shape[0] != 1:
            raise ValueError(f"weights with {leaf.shape[0]} time-embedding heads cannot become a network with {k}")
        return leaf.repeat(k, axis=0)

    return traverse_util.path_aware_map(expanded, params)


def in_float32(model: nn.Module) -> nn.Module:
    """`model` computing in float32: the step control of an adaptive solve takes bfloat16's rounding for curvature."""
    return model if getattr(model, "dtype", "float32") == "float32" else model.clone(dtype="float32")


def velocity_fn(model: nn.Module, params: Any) -> Callable:
    """velocity(x [B,H,W,C], t [B] in [0, 1], index [B] int32) -> dx/dtau [B,H,W,C], without dropout."""
    apply = _traced_once(model)

    def velocity(x: ArrayLike, t: ArrayLike, index: ArrayLike) -> Any:
        return apply(params, x, segments.label_of_t(t), index)

    return velocity


@functools.lru_cache(maxsize=32)
def _traced_once(model: nn.Module) -> Callable:
    """The network as a function of its parameters too, which is traced once for all programs of equal shapes."""
    return jax.jit(lambda params, x, labels, index: model.apply({"params": params}, x, labels, index))
