"""Velocities with flows in closed form, tiny samplers of them, and the same solves without a sampler."""

import flax.linen as nn
import jax
import numpy as np

import sampling
import segments
from sampler import Sampler
from sampling import SamplerOptions

SHAPE = (2, 2, 1)
UNEVEN = np.float32([1.0, 0.9, 1 / 3, 0.0])
EULER = {"method": "pc", "predictor": "rf_solver", "num_scales": 8}
ODE = {"method": "ode", "tol": 1e-4, "solver": "dopri5", "error_norm": "batch"}


class Gaussian(nn.Module):
    """The exact velocity for data N(mean, spread^2) and noise N(0, 1)."""

    @nn.compact
    def __call__(self, x, labels, index, train=False):
        mean, spread = (self.param(name, nn.initializers.ones, SHAPE) for name in ("mean", "spread"))
        tau = (labels / segments.LABEL_SCALE)[:, None, None, None]
        gain = (tau * spread**2 - (1 - tau)) / ((tau * spread) ** 2 + (1 - tau) ** 2)
        return mean + gain * (x - tau * mean)


GAUSSIAN = {"mean": np.linspace(-1, 1, 4).reshape(SHAPE), "spread": np.linspace(0.25, 1.5, 4).reshape(SHAPE)}
GAUSSIAN = jax.tree.map(np.float32, GAUSSIAN)


class Explosive(nn.Module):
    """Euler crosses it in one step; the exact flow is infinite by tau = 0.16."""

    @nn.compact
    def __call__(self, x, labels, index, train=False):
        return x**2 + 100.0


def exact_end(z, params=GAUSSIAN):
    """Where the Gaussian flow carries z from tau = EPS to 1, in double precision."""
    mean, spread, eps = params["mean"].astype(np.float64), params["spread"].astype(np.float64), segments.EPS
    return mean + spread / np.sqrt((eps * spread) ** 2 + (1 - eps) ** 2) * (np.asarray(z, np.float64) - eps * mean)


def velocity_fn(model, params):
    """`models.velocity_fn`, whose annotation accepts only the project's networks."""
    return lambda x, t, index: model.apply({"params": params}, x, segments.label_of_t(t), index)


def sampler_of(model, options, boundaries=(1.0, 0.0), seed=3):
    """A sampler of images of SHAPE."""
    return Sampler(model, np.float32(boundaries), SHAPE, SamplerOptions(**options), seed)


def direct(sampler, params, **options):
    """`sampling.solve` itself, on one device: (indices of the noises) -> samples."""
    velocity, options = velocity_fn(sampler.model, params), sampler.options.record() | options
    program = jax.jit(lambda z: sampling.solve(velocity, z, sampler.boundaries, **options))
    return lambda indices: program(sampler.noise(np.asarray(indices)))
