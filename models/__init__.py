"""The velocity networks: made from a configuration, filled from a checkpoint."""

from models.factory import create_model, expand_heads, init_params, velocity_fn

__all__ = ["create_model", "expand_heads", "init_params", "velocity_fn"]
