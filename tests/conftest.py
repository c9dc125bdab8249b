"""Shape checking for every test, two devices on one CPU, and nothing that reaches a network."""

import os
import pathlib

# Before jax starts: two devices on one CPU, so that work shared by devices really is.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from jaxtyping import install_import_hook

# Every module and package at the top level but main, which only reads flags.
ROOT = pathlib.Path(__file__).parents[1]
MODULES = [path.stem for path in ROOT.glob("*.py") if path.stem != "main"]
PACKAGES = [path.parent.name for path in ROOT.glob("*/__init__.py")]

# The jaxtyping annotations of these modules are checked at every call made in a test.
install_import_hook(MODULES + PACKAGES, "beartype.beartype")
