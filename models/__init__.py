"""The velocity networks: made from a configuration, filled from a checkpoint.

What takes a configuration (`create_model`, `import_torch`, `export_torch`) converts it to a network and calls on.
"""

import dataclasses
from typing import Any

from etils import epath

from models.factory import (
    create_model,
    expand_heads,
    in_float32,
    init_params,
    make_network,
    network_identity,
    velocity_fn,
    weight_shapes,
)
from models.ncsnpp import NCSNpp
from models.pytorch import checkpoint as torch_checkpoint
from models.weights import Weights

__all__ = [
    "NCSNpp",
    "Weights",
    "create_model",
    "expand_heads",
    "export_torch",
    "import_torch",
    "in_float32",
    "init_params",
    "make_network",
    "network_identity",
    "velocity_fn",
    "weight_shapes",
]


def import_torch(path: epath.PathLike, config: Any) -> Weights:
    """The PyTorch checkpoint at `path` for `create_model(config)`. Errors as `read_weights` there."""
    return torch_checkpoint.read_weights(path, create_model(config))


def export_torch(weights: Weights, config: Any, path: epath.PathLike) -> None:
    """Writes `weights` (k = 1) in PyTorch's format, with the settings of config.optim and config.model.ema_rate.

    Raises:
      InputError: as `models.pytorch.checkpoint.write_weights`.
    """
    given = {**(config.get("optim") or {}), "ema_rate": config["model"].get("ema_rate")}
    names = (field.name for field in dataclasses.fields(torch_checkpoint.TrainerSettings))
    settings = {name: float(given[name]) for name in names if given.get(name) is not None}
    torch_checkpoint.write_weights(path, weights, create_model(config), torch_checkpoint.TrainerSettings(**settings))
