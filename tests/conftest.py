"""Shape checking for every test, two devices on one CPU, and nothing that reaches a network."""

import os

# Before jax starts: two devices on one CPU, so that every pmap really shares its batch.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from jaxtyping import install_import_hook

CHECKED = [
    "adaptive", "checkpoints", "datasets", "evaluation", "losses", "measurement", "models", "pairfiles", "pairplan",
    "pairs", "pictures", "reflow", "sampling", "segments", "sources", "tfgan_compat", "tracking", "utils",
]  # fmt: skip

# The jaxtyping annotations of our public functions are checked at every call made in a test.
install_import_hook(CHECKED, "beartype.beartype")
