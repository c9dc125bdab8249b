"""Holds the full-size networks against their twin in plain PyTorch.

    python -m benchmarks.check_full_size_torch [--import]

The networks of CIFAR-10 (61.8 M weights), CelebA-64 (62.7 M) and LSUN church (65.6 M, images in [0, 1]) compute one
image with the same random weights here and in torch; the largest difference must be at most 1e-4. With --import the
CIFAR-10 twin is also saved as a whole checkpoint (weights, EMA, Adam's moments: about 1 GB in a temporary folder) and,
in processes of their own, imported and converted by import_torch.py: the import's time is held against 30 seconds, the
peak memory of each against 2.5 times the file. Takes a few minutes; exit status 1 if anything is off.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TOLERANCE = 1e-4
MOST_SECONDS = 30
MOST_MEMORY = 2.5  # times the file's size

# Run apart, so that the peak is the job's own; started from a process that has used no memory itself.
APART = """
import json, resource, sys, time
start = time.perf_counter()
{job}
seconds = time.perf_counter() - start  # a job may have started the clock again
print(json.dumps([seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""
IMPORT = """
import models
from configs.rf.cifar10_rf_continuous import get_config
config, start = get_config(), time.perf_counter()
weights = models.import_torch({path!r}, config)
assert (weights.step, weights.count) == (10, 1), (weights.step, weights.count)
"""
CONVERT = """
from scripts import convert_torch
config = {root!r} + "/configs/rf/cifar10_rf_continuous.py"
assert convert_torch.main([{path!r}, {path!r} + ".safetensors", "--config", config]) == 0
"""


def forward_difference(name: str) -> tuple[float, float]:
    """(largest difference, largest output) of the configuration `name` on one image."""
    import jax
    import numpy as np
    import torch
    from flax import traverse_util

    import models
    from benchmarks.torch_twin import Twin, randomized
    from models.pytorch.layout import entries_of

    config = importlib.import_module(f"configs.rf.{name}_rf_continuous").get_config()
    size = config.data.image_size
    torch.manual_seed(0)
    twin = randomized(Twin(config)).eval()
    x = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)
    # Near the noise, where scale_by_sigma divides by little and so hides nothing.
    labels = np.array([2.0], np.float32)
    with torch.no_grad():
        expected = twin(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(labels)).permute(0, 2, 3, 1).numpy()
    model, state = models.create_model(config), twin.state_dict()
    leaves = {entry.path: entry.to_flax(state[entry.name].numpy()) for entry in entries_of(model)}
    apply = jax.jit(model.apply)
    found = apply({"params": traverse_util.unflatten_dict(leaves)}, x, labels, np.zeros(1, np.int32))
    return float(np.abs(np.asarray(found) - expected).max()), float(np.abs(expected).max())


def check_forward(name: str) -> bool:
    """Prints how far both networks are apart; True if near enough."""
    difference, largest = forward_difference(name)
    print(f"{name}: largest difference {difference:.2e} (at most {TOLERANCE:g}), largest output {largest:.3g}")
    return difference <= TOLERANCE


def measured_apart(job: str, path: str) -> tuple[float, int]:
    """(seconds, peak memory in bytes) of `job`, which reads the checkpoint at `path`, in a process of its own."""
    script = APART.format(root=str(ROOT), job=job.format(root=str(ROOT), path=path))
    output = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak = json.loads(output.splitlines()[-1])
    return seconds, peak


def check_import() -> bool:
    """Prints seconds and peak memory of importing and of converting a whole CIFAR-10 checkpoint; True if in bounds."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "checkpoint.pth")
        subprocess.run([sys.executable, "-m", "benchmarks.check_full_size_torch", "--write", path], check=True)
        size = os.path.getsize(path)
        jobs = {"models.import_torch": (IMPORT, MOST_SECONDS), "scripts/convert_torch.py": (CONVERT, float("inf"))}
        found = {name: (*measured_apart(job, path), most) for name, (job, most) in jobs.items()}
    for name, (seconds, peak, most) in found.items():
        print(
            f"{name} of {size / 1e9:.2f} GB: {seconds:.1f} s (at most {most:g}), "
            f"peak memory {peak / 1e9:.2f} GB = {peak / size:.2f} times the file (at most {MOST_MEMORY})"
        )
    return all(seconds <= most and peak <= MOST_MEMORY * size for seconds, peak, most in found.values())


def write_checkpoint(path: str) -> None:
    """Saves what the public trainer would after one update of the CIFAR-10 network."""
    import torch

    from benchmarks.torch_twin import Twin, checkpoint

    config = importlib.import_module("configs.rf.cifar10_rf_continuous").get_config()
    torch.save(checkpoint(Twin(config), updates=1), path)


def main() -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--import", action="store_true", dest="whole", help="also time the import of a whole checkpoint"
    )
    parser.add_argument("--write", metavar="FILE", help="only write that whole checkpoint")
    options = parser.parse_args()
    if options.write:
        write_checkpoint(options.write)
        return 0
    passed = [check_import()] if options.whole else []
    passed += [check_forward(name) for name in ("cifar10", "celeba_64", "lsun_church_256")]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
