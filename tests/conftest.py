"""Shape checking for every test, and devices enough to test pmap on a laptop."""

import os

# Before jax starts: two devices on one CPU, so that every job's pmap really shards.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from jaxtyping import install_import_hook

CHECKED = [
    "adaptive", "checkpoints", "datasets", "evaluation", "losses", "models", "reflow", "sampling", "segments", "utils",
]  # fmt: skip

# The jaxtyping annotations of our public functions are checked at every call made in a test.
install_import_hook(CHECKED, "beartype.beartype")
