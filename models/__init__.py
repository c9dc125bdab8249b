"""The velocity networks: made from a configuration, filled from a checkpoint."""

from models.factory import (
    create_model,
    expand_heads,
    in_float32,
    init_params,
    network_identity,
    velocity_fn,
    weight_shapes,
)
from models.pytorch.checkpoint import export_torch, import_torch
from models.weights import Weights

__all__ = [
    "Weights",
    "create_model",
    "expand_heads",
    "export_torch",
    "import_torch",
    "in_float32",
    "init_params",
    "network_identity",
    "velocity_fn",
    "weight_shapes",
]
