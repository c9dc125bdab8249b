"""Reproducibility record: command, configuration, commit, library versions, hardware."""

import functools
import hashlib
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import jax
from etils import epath

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy", "scipy", "tensorflow",
    "tensorflow-datasets",
)  # fmt: skip
GIT_SECONDS = 10  # to wait for git, on a slow disk


def of_process(config: dict[str, Any]) -> dict[str, Any]:
    """What is the same for everything that this process computes.

    Args:
      config: the whole configuration.

    Returns:
      'command', 'folder' (where it was given), 'config', 'seed', 'commit' and 'dirty' (None outside a clone),
      'versions', 'xla_flags', 'jax_settings' (its environment variables), and the machine: 'device', 'devices' and
      'processes' of the whole job, and 'cpu'.
    """
    script = [os.path.relpath(sys.argv[0])] if sys.argv[0] else []  # none at Python's prompt
    return {
        "command": shlex.join(["python", *script, *sys.argv[1:]]),
        "folder": os.getcwd(),
        "config": config,
        "seed": config["seed"],
        **_code(),
        "versions": _versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax_settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("JAX_")},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": _cpu(),
    }


def file_hashes(paths: Iterable[epath.Path]) -> dict[str, str]:
    """The SHA-256 of each file that exists, by its path."""
    return {os.fspath(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The entries that differ, as {name: (one's, the other's)}; 'outer.inner' for those of inner records."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(one.keys() | other.keys()):
        first, second = one.get(name), other.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            found |= {f"{name}.{inner}": pair for inner, pair in differences(first, second).items()}
        elif first != second:
            found[name] = first, second
    return found


@functools.cache
def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


@functools.cache
def _code() -> dict[str, Any]:
    """The commit of this clone, and whether code was changed or added since."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or pathlib.Path(top).resolve() != ROOT:
        return {"commit": None, "dirty": None}
    changes = _git("status", "--porcelain", "--", "*.py", "requirements.txt")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    """What git says; None where there is no git, or no clone."""
    command = ["git", "-C", os.fspath(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _cpu() -> str:
    """The model of this host's CPU: compiled programs, and so the last bits of figures, differ between models."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
