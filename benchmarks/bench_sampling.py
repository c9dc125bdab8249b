"""What a solve costs beyond its network calls: python -m benchmarks.bench_sampling [--full]

Times one compiled network call, whole solves by Euler, Heun and Dopri5, and the Dopri5 solve driven by SciPy's RK45
from the host (a flat float64 state, one round trip per network call), on the digits network and with --full also on the
full-size CIFAR-10 one. Every round times all of them in turn, so that a machine that slows down slows them alike; the
ratios are taken within a round, and medians over rounds are printed.

    overhead     solve / (NFE x network call): 1 is a solve that costs its network calls and nothing more
    host/device  SciPy's solve / ours, and the same for each network call

A line whose overhead is above 1.05 ends in MISSED, and the exit status is 1. A network call is timed in the precision
in which the solvers call it (`sampling.full_precision`).
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import integrate

import models
import sampling
import segments
from benchmarks.common import perturbed_weights, seconds
from configs.rf import cifar10_rf_continuous, digits_rf_continuous


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, and solver settings for which a solve takes a second or more on two CPU cores."""

    name: str
    config: ModuleType
    batch: int
    steps: int
    tol: float


CASES = [Case("digits", digits_rf_continuous, 256, 20, 1e-3), Case("cifar10", cifar10_rf_continuous, 2, 8, 1e-2)]
MAX_OVERHEAD = 1.05
HEADER = "network  batch  solver   NFE  call ms  solve s  overhead | SciPy NFE  solve s  host/device  per call"


def scipy_solve(
    network: Callable, z: Float[Array | np.ndarray, "b h w c"], boundaries: segments.TimesLike, tol: float
) -> tuple[np.ndarray, int]:
    """(end, network calls) of SciPy's RK45 from the host, as public implementations do it, restarted in each segment.

    The state is flat and in float64; every call is a round trip.
    """
    x, calls = np.asarray(z, np.float64), 0
    for i, span in enumerate(itertools.pairwise(segments.tau_of_t(np.asarray(boundaries, np.float64)))):

        def slope(tau, flat, i=i):
            t = jnp.full(len(z), segments.t_of_tau(tau), jnp.float32)
            v = network(jnp.asarray(flat.reshape(z.shape), jnp.float32), t, jnp.full(len(z), i, jnp.int32))
            return np.asarray(v, np.float64).ravel()

        solution = integrate.solve_ivp(slope, span, x.ravel(), method="RK45", rtol=tol, atol=tol)
        x, calls = solution.y[:, -1].reshape(z.shape), calls + solution.nfev
    return x, calls


def solvers(case: Case) -> dict[str, dict]:
    """The options of `sampling.solve` for each line of the table, with equal network calls for Euler and Heun."""
    fixed = {"method": "pc", "predictor": "rf_solver", "num_scales": case.steps}
    return {
        "euler": fixed,
        "heun": fixed | {"predictor": "rf_solver_heun", "num_scales": case.steps // 2},
        "dopri5": {"method": "ode", "tol": case.tol},
    }


def measure(case: Case, rounds: int) -> Iterator[dict]:
    """Yields a row for each solver: NFE, and medians over rounds of the times in seconds and of their ratios."""
    network = models.create_model(case.config.get_config())
    velocity = models.velocity_fn(network, perturbed_weights(network, 0.02))
    z = jax.random.normal(jax.random.key(2), (case.batch, *network.image_shape))
    inputs = z, jnp.full(case.batch, 0.5), jnp.zeros(case.batch, jnp.int32)
    boundaries = segments.uniform_boundaries(1)
    for name, options in solvers(case).items():
        adaptive = options["method"] == "ode"
        call = jax.jit(sampling.full_precision(velocity) if adaptive else velocity)
        jax.block_until_ready(call(*inputs))
        solve = jax.jit(lambda z, options=options: sampling.solve(velocity, z, boundaries, **options))
        nfe = int(solve(z).nfe)
        host = functools.partial(scipy_solve, call, z, boundaries, case.tol) if adaptive else None
        host_nfe = host()[1] if host else None
        timed = functools.partial(call, *inputs), functools.partial(solve, z), nfe, host
        times = [one_round(*timed) for _ in range(rounds)]
        yield row(case, name, nfe, host_nfe, times)


def one_round(network: Callable, solve: Callable, nfe: int, host: Callable | None) -> tuple[float, float, float]:
    """Seconds of one network call, of the solve and of SciPy's (NaN where there is none)."""
    # Half of the calls before and half after the solve, so that a change of the machine's load affects both.
    calls = [seconds(network) for _ in range(nfe // 2)]
    solved = seconds(solve)
    calls += [seconds(network) for _ in range(nfe - nfe // 2)]
    return statistics.mean(calls), solved, seconds(host) if host else float("nan")


def row(case: Case, solver: str, nfe: int, host_nfe: int | None, times: list[tuple[float, float, float]]) -> dict:
    """Medians over the rounds' (seconds of a call, of a solve, of SciPy's), by name."""
    call, solved, host = (statistics.median(column) for column in zip(*times, strict=True))
    found = {
        "network": case.name,
        "batch": case.batch,
        "solver": solver,
        "nfe": nfe,
        "call_s": call,
        "solve_s": solved,
        "overhead": statistics.median(solve / (nfe * call) for call, solve, _ in times),
        "rounds": len(times),
    }
    if host_nfe is None:
        return found
    return found | {
        "host_nfe": host_nfe,
        "host_s": host,
        "host_over_device": statistics.median(host / solve for _, solve, host in times),
        "host_over_device_per_call": statistics.median(host / host_nfe / (solve / nfe) for _, solve, host in times),
    }


def line(found: dict) -> str:
    """A row as a line of the table under HEADER."""
    text = f"{found['network']:8} {found['batch']:5}  {found['solver']:7} {found['nfe']:4}"
    text += f"  {1e3 * found['call_s']:7.1f}  {found['solve_s']:7.2f}  {found['overhead']:8.3f} |"
    if "host_s" in found:
        text += f" {found['host_nfe']:9}  {found['host_s']:7.2f}  {found['host_over_device']:11.3f}"
        text += f"  {found['host_over_device_per_call']:8.3f}"
    return text + ("" if held(found) else "   MISSED")


def held(found: dict) -> bool:
    """Whether a row's overhead is within MAX_OVERHEAD."""
    return found["overhead"] <= MAX_OVERHEAD


def main() -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also the full-size CIFAR-10 network (minutes on a CPU)")
    parser.add_argument("--rounds", type=int, default=7, help="timed solves of each kind (default 7)")
    arguments = parser.parse_args()
    print(HEADER, "-" * len(HEADER), sep="\n", flush=True)
    rows = []
    for case in CASES[: 1 + arguments.full]:
        for found in measure(case, arguments.rounds):
            print(line(found), flush=True)
            rows.append(found)
    return 0 if all(map(held, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
