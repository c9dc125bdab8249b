"""Holds the samplers against SciPy, and adaptive segments against uniform ones, on a trained 1-RF.

python -m benchmarks.check_samplers [WORKDIR]           (default runs/digits, where the quickstart trains one; minutes)

Adaptive solves beside SciPy's RK45, which steps the same network from the host: both errors are root mean squares over
pixels against SciPy's solve at tolerance 1e-7. Ours may be at most three times SciPy's plus the tolerance, and its
network calls at most 1.25 times SciPy's plus 12 a segment.

SeqRF-Ada's boundaries are found on some noises; sequential straightness over them and over uniform ones is then
measured on others, with the adaptive solver's trajectories. The exit status is 1 if a line ends in MISSED.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

import adaptive
import evaluation
import models
import sampling
import segments
from benchmarks.bench_sampling import scipy_solve
from checkpointing.checkpoint import checkpoint_at
from sampler import Sampler
from sampling import SamplerOptions
from utils import InputError

IMAGES = 64  # solved together, whose steps they share
SEED = 42  # of the noises
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
REFERENCE = 1e-7
NOISES = 128  # that sequential straightness is averaged over


def root_mean_square(difference: Float[Array | np.ndarray, "..."]) -> float:
    """Over all pixels and images."""
    return float(np.sqrt(np.mean(np.square(difference))))


def check_solver(velocity: sampling.Velocity, z: Float[np.ndarray, "b h w c"], k: int) -> bool:
    """Prints a line for each tolerance; True if all are within their bounds."""
    network, boundaries, good = jax.jit(sampling.full_precision(velocity)), segments.uniform_boundaries(k), True
    exact, _ = scipy_solve(network, z, boundaries, REFERENCE)
    for tol in TOLERANCES:
        ours = jax.jit(lambda z, tol=tol: sampling.solve(velocity, z, boundaries, method="ode", tol=tol))(z)
        theirs, calls = scipy_solve(network, z, boundaries, tol)
        error, their_error = root_mean_square(ours.x - exact), root_mean_square(theirs - exact)
        held = error <= 3 * their_error + tol and int(ours.nfe) <= 1.25 * calls + 12 * k
        good &= held
        print(
            f"k = {k}, tol {tol:g}: error {error:.2e}, SciPy {their_error:.2e}; NFE {int(ours.nfe)}, SciPy {calls}"
            + ("" if held else "   MISSED"),
            flush=True,
        )
    return good


def check_adaptive(sampler: Sampler, params: Any, distances: Float[np.ndarray, "m m"], k: int) -> bool:
    """Prints both sequential straightnesses on noises that the boundaries were not chosen on; True if it fell."""
    partition = adaptive.best_partition(distances, k)
    others = Sampler(sampler.model, sampler.boundaries, sampler.image_shape, sampler.options, sampler.seed + 1)
    measured = {
        name: evaluation.trajectory_metrics(others, params, boundaries, NOISES, NOISES).sequential_straightness
        for name, boundaries in (("uniform", segments.uniform_boundaries(k)), ("adaptive", partition.boundaries))
    }
    good = measured["adaptive"] <= measured["uniform"]
    print(
        f"k = {k}: sequential straightness uniform {measured['uniform']:.4g}, adaptive {measured['adaptive']:.4g} with "
        f"boundaries {np.round(partition.boundaries.astype(float), 3).tolist()}" + ("" if good else "   MISSED"),
        flush=True,
    )
    return good


def main() -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", nargs="?", default="runs/digits")
    workdir = parser.parse_args().workdir
    try:
        first = checkpoint_at(Path(workdir) / "1_rf")
    except InputError as error:
        sys.exit(f"error: {error}; bash scripts/quickstart.sh trains one")
    network, params = first.network, first.load().ema_params
    z = np.random.default_rng(0).standard_normal((IMAGES, *network.image_shape), np.float32)
    good = [check_solver(models.velocity_fn(network, params), z, 1)]
    options = SamplerOptions("ode", tol=1e-4)
    sampler = Sampler(network, segments.uniform_boundaries(1), network.image_shape, options, seed=SEED)
    distances = sampler.fine_distances(params)
    good += [check_adaptive(sampler, params, distances, k) for k in (2, 4)]
    # The same weights in every segment of a network with two heads: segments change where the solver starts anew.
    two = network.clone(heads=2)
    good.append(check_solver(models.velocity_fn(two, first.load(two).ema_params), z, 2))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
