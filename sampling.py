"""Samplers: dx/dtau = v(x, tau) from noise to data, segment by segment, on the device; and how straight they ran.

diffrax does the stepping. Ours are the segments, the exact count of network calls, the trajectories and the measures
of design.md section 5.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import ClassVar, NamedTuple

# diffrax checks the times of a trajectory, whose order ours have by construction, through the host: a round trip in
# every solve; and XLA keeps no program that has one in its compilation cache. The variable is read by the import.
os.environ.setdefault("EQX_ON_ERROR", "off")

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real

import segments
from utils import InputError


class Dopri5(diffrax.Dopri5):
    """Dormand-Prince 5(4) with the error estimate of their paper, which SciPy uses too: diffrax's is 2/3 of it."""

    tableau: ClassVar[diffrax.ButcherTableau] = dataclasses.replace(
        diffrax.Dopri5.tableau, b_error=1.5 * diffrax.Dopri5.tableau.b_error
    )


SOLVERS = {
    "dopri5": Dopri5,
    "tsit5": diffrax.Tsit5,
    "bosh3": diffrax.Bosh3,
    "heun": diffrax.Heun,
    "midpoint": diffrax.Midpoint,
    "ralston": diffrax.Ralston,
}
PREDICTORS = {"rf_solver": diffrax.Euler, "rf_solver_heun": diffrax.Heun} | SOLVERS
METHODS = ("ode", "pc")
ERROR_NORMS = ("batch", "sample")
# Where a step must become shorter than SMALLEST_STEP units in the last place of its time, as in SciPy, or a segment
# takes more than MAX_STEPS, the tolerance is out of float32's reach: the samples become NaN, for the caller to see.
SMALLEST_STEP = 10
MAX_STEPS = 16_384
SAFETY, MIN_FACTOR, MAX_FACTOR = 0.9, 0.2, 10.0  # of SciPy's step control
TRAJECTORY_POINTS = 128  # of an adaptive solve, at least, over all segments


class Samples(NamedTuple):
    """What a solve returns.

    Attributes:
      x: [B, ...] the state at the last boundary (t = 0: the samples). NaN where an adaptive solve could not reach
        its tolerance.
      nfe: integer scalar, the network calls made for this batch: rejected steps and the choice of the first step
        included.
      nfe_each: [B] the calls that each image asked for (`error_norm="sample"`: its own steps; else all equal nfe).
      ts: [n] the times of the trajectory, from 1 to 0; None unless saved.
      xs: [n, B, ...] its states; None unless saved. Of an adaptive solve they are the solver's own interpolation on
        times uniform in each segment, which costs no network call.
    """

    x: Float[Array, "b *image"]
    nfe: Int[Array, ""]
    nfe_each: Int[Array, "b"]
    ts: Float[Array, "n"] | None = None
    xs: Float[Array, "n b *image"] | None = None


def solve(
    velocity,
    x: Float[Array, "b *image"],
    boundaries,
    *,
    method: str,
    tol: float | None = None,
    num_scales: int | None = None,
    predictor: str | None = None,
    save_trajectory: bool = False,
    solver: str = "dopri5",
    error_norm: str = "batch",
    time_grid=None,
) -> Samples:
    """Carries noise x at t = 1 through every segment to t = 0 (design.md section 5). Works under jit and pmap.

    Args:
      velocity: (x [B, ...], t [B] in [0, 1], index [B] int32) -> dx/dtau [B, ...].
      x: the noise.
      boundaries: [k + 1] in t, falling from 1 to 0; like `time_grid` checked, unless it is traced.
      method: "ode", adaptive steps with rtol = atol = `tol` by `solver`, or "pc", `num_scales` fixed steps of
        `predictor` ("rf_solver" is Euler, "rf_solver_heun" is Heun, or a solver's name).
      save_trajectory: also return the states on the way.
      error_norm: "batch", one step size for all of x (SciPy's RK45 on the flattened batch), or "sample", one for
        each image.
      time_grid: [num_scales + 1] times for "pc" that contain the boundaries; None: uniform inside a segment.

    Raises:
      ValueError: an unknown name, a missing tol, predictor or num_scales, num_scales < k; boundaries or times that do
        not fall from 1 to 0, times that miss a boundary or are not num_scales + 1.
      InputError: a trajectory that would not fit into memory; the message has its size.
    """
    if not segments.is_traced(boundaries):
        boundaries = segments.checked_boundaries(boundaries)
    if method == "ode":
        return _solve_adaptive(
            velocity, x, jnp.asarray(boundaries, jnp.float32), tol, solver, error_norm, save_trajectory
        )
    if method != "pc":
        raise ValueError(f"unknown sampling method {method!r}; use one of {', '.join(METHODS)}")
    if num_scales is None:
        raise ValueError("method 'pc' needs num_scales, the number of its steps")
    if time_grid is None:
        grid = segments.step_grid(boundaries, num_scales)
    else:
        grid = segments.step_grid_of_times(boundaries, time_grid)
        if grid.head.size != num_scales:
            raise ValueError(
                f"time_grid has {grid.head.size + 1} times; num_scales = {num_scales} needs {num_scales + 1}"
            )
    return _solve_fixed(velocity, x, grid, _named(PREDICTORS, predictor or "rf_solver", "predictor"), save_trajectory)


def solve_segment(
    velocity,
    x: Float[Array, "b *image"],
    t_start: Real[ArrayLike, ""],
    t_end: Real[ArrayLike, ""],
    index: Int[ArrayLike, ""],
    *,
    tol: float,
    solver: str = "dopri5",
    error_norm: str = "batch",
) -> Samples:
    """Solves one segment adaptively, from t_start to t_end with the weights of segment `index`.

    t_end < t_start goes towards the data, as sampling does; t_end > t_start is the same ODE backwards, from data
    towards noise. The three scalars may be traced: one compiled program serves every segment and both directions.

    Args:
      velocity: (x [B, ...], t [B] in [0, 1], index [B] int32) -> dx/dtau [B, ...].
      x: the state at t_start.
      t_start, t_end: in [0, 1], not equal.
      index: the segment's number, from 0 at the noise.
      tol: rtol and atol.
      solver, error_norm: as in `solve`.

    Raises:
      ValueError: a missing tol or an unknown name.
    """
    times = jnp.stack([jnp.asarray(t_start, jnp.float32), jnp.asarray(t_end, jnp.float32)])
    adaptive = _adaptive_segment_solver(velocity, tol, solver, error_norm, points=None)
    x, (nfe, nfe_each, _) = adaptive(x, (times[0], times[1], jnp.asarray(index, jnp.int32)))
    return Samples(x=x, nfe=nfe, nfe_each=nfe_each)


def full_precision(function):
    """`function` (a velocity, say) with all of its float32 products really in float32, as adaptive solves are traced.

    JAX's default on GPUs (TensorFloat32) and TPUs (bfloat16) makes errors of 1e-3 in every network call. To the step
    control they look like a rough flow: it takes many times the steps, and the samples miss a small tolerance all the
    same. A fixed grid cannot be misled so, and keeps the faster default.
    """

    def precise(*arguments):
        with jax.default_matmul_precision("float32"):
            return function(*arguments)

    return precise


def _named(table, name, what):
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; use one of {', '.join(table)}")
    return table[name]()


def _ode_term(velocity, index):
    """The right-hand side for diffrax, in tau, with this segment's head."""

    def vector_field(tau, x, _):
        t = jnp.full(x.shape[:1], segments.t_of_tau(tau), jnp.float32)
        return velocity(x, t, jnp.full(x.shape[:1], index, jnp.int32))

    return diffrax.ODETerm(vector_field)


def _is_fsal(solver) -> bool:
    """Whether a step's last slope is the next step's first, and so costs nothing there."""
    return isinstance(solver, diffrax.AbstractRungeKutta) and solver.tableau.fsal


def _calls_per_step(solver) -> int:
    stages = solver.tableau.num_stages if isinstance(solver, diffrax.AbstractRungeKutta) else 1
    return stages - _is_fsal(solver)


# --- fixed grid -------------------------------------------------------------------------------------------------------


def _solve_fixed(velocity, x, grid: segments.StepGrid, solver, save_trajectory) -> Samples:
    if save_trajectory:
        _refuse_oversized_trajectory(grid.head.size + 1, x)

    def step(carry, now):
        x, solver_state = carry
        tau_from, tau_to = segments.tau_of_t(now.t_from), segments.tau_of_t(now.t_to)
        term = _ode_term(velocity, now.head)
        # A segment's first step is a jump for diffrax: the slope kept from the last segment had another head.
        x, _, _, solver_state, _ = solver.step(term, tau_from, tau_to, x, None, solver_state, now.opens)
        return (x, solver_state), (x if save_trajectory else None)

    first = solver.init(_ode_term(velocity, grid.head[0]), segments.EPS, 1.0, x, None)
    (end, _), states = jax.lax.scan(step, (x, first), grid)
    # Counted from shapes alone, so that it is right whatever the times are; the slope that an FSAL solver keeps is
    # computed anew once a segment.
    nfe = jnp.int32(_calls_per_step(solver) * grid.head.size) + _is_fsal(solver) * jnp.sum(grid.opens, dtype=jnp.int32)
    if not save_trajectory:
        return Samples(x=end, nfe=nfe, nfe_each=jnp.full(x.shape[:1], nfe))
    xs = jnp.concatenate([x[None], states])
    return Samples(x=end, nfe=nfe, nfe_each=jnp.full(x.shape[:1], nfe), ts=grid.ts, xs=xs)


# --- adaptive ---------------------------------------------------------------------------------------------------------


def _solve_adaptive(velocity, x, boundaries, tol, solver, error_norm, save_trajectory) -> Samples:
    k = boundaries.size - 1
    points = -(-TRAJECTORY_POINTS // k) if save_trajectory else None
    if save_trajectory:
        _refuse_oversized_trajectory(k * points + 1, x)
    segment_solver = _adaptive_segment_solver(velocity, tol, solver, error_norm, points)
    spans = (boundaries[:-1], boundaries[1:], jnp.arange(k, dtype=jnp.int32))
    end, (nfe, nfe_each, states) = jax.lax.scan(segment_solver, x, spans)
    samples = Samples(x=end, nfe=jnp.sum(nfe), nfe_each=jnp.sum(nfe_each, axis=0))
    if not save_trajectory:
        return samples
    xs = jnp.concatenate([x[None], states.reshape(k * points, *x.shape)])
    return samples._replace(ts=segments.step_grid(boundaries, k * points).ts, xs=xs)


def _adaptive_segment_solver(velocity, tol, solver, error_norm, points):
    """A scan body: (x, (t_start, t_end, index)) -> (x at t_end, (nfe, nfe_each, states [points, B, ...] or None))."""
    if tol is None or not tol > 0:
        raise ValueError(f"method 'ode' needs a tolerance tol > 0, got {tol}")
    if error_norm not in ERROR_NORMS:
        raise ValueError(f"unknown error_norm {error_norm!r}; use one of {', '.join(ERROR_NORMS)}")
    solver = _named(SOLVERS, solver, "solver")

    def batch(term, x, f0, taus):
        return _integrate(term, solver, x, f0, taus, tol)

    def each(term, x, f0, taus):
        # A batch of one image under vmap: the network still sees whole batches, the controller one image at a time.
        def one(x, f0):
            return _integrate(term, solver, x[None], f0[None], taus, tol)

        end, steps, states = jax.vmap(one)(x, f0)
        return end[:, 0], steps, (None if states is None else jnp.moveaxis(states[:, :, 0], 0, 1))

    def segment(x, span):
        t_start, t_end, index = span
        term = _ode_term(velocity, index)
        tau_start, tau_end = segments.tau_of_t(t_start), segments.tau_of_t(t_end)
        taus = (tau_start, tau_end, points)
        # The first slope chooses the first step's size, and an FSAL solver is handed it: left to itself it would
        # compute it anew at every rejected first step, and nobody could count the calls.
        f0 = term.vf(tau_start, x, None)
        end, steps, states = (each if error_norm == "sample" else batch)(term, x, f0, taus)
        # Two calls choose the first step's size.
        nfe_each = jnp.broadcast_to(2 + _calls_per_step(solver) * steps, x.shape[:1])
        return end, (jnp.max(nfe_each), nfe_each, states)

    return full_precision(segment)  # diffrax's interpolation multiplies too


def _root_mean_square(x):
    return jnp.sqrt(jnp.mean(x**2))


def _first_step(term, x, f0, span, tol, error_order):
    """The first step's length as SciPy's RK45 chooses it (Hairer, Norsett and Wanner, Solving ODEs I, II.4).

    One call beyond f0. diffrax 0.7's own choice (dt0=None) is always 0.01: it looks for an ODETerm, and diffeqsolve
    hands it a wrapped one.
    """
    start, end = span
    direction = jnp.where(start < end, 1, -1)
    length = direction * (end - start)

    def norm(change):
        return _root_mean_square(change / (tol + tol * jnp.abs(x)))

    d0, d1 = norm(x), norm(f0)
    h0 = jnp.minimum(jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1), length)
    d2 = norm(term.vf(start + direction * h0, x + direction * h0 * f0, None) - f0) / h0
    largest = jnp.maximum(d1, d2)
    h1 = jnp.where(largest <= 1e-15, jnp.maximum(1e-6, 1e-3 * h0), (0.01 / largest) ** (1 / error_order))
    return jnp.minimum(jnp.minimum(100 * h0, h1), length)


class _ScipyControl(diffrax.AbstractAdaptiveStepSizeController):
    """Step control exactly as SciPy's RK45 does it, starting with `first_step`.

    diffrax's PIDController never makes a step smaller after one that was accepted, and so runs nearer to the tolerance
    than SciPy. And `diffeqsolve(dt0=...)` would check its sign by a call of the host in every solve: a round trip, and
    XLA keeps no program that has one in its compilation cache.
    """

    rtol: float
    atol: float
    norm: Callable
    first_step: Float[Array, ""]

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        """The end of the first step; the state: whether the step before was rejected."""
        return t0 + jnp.maximum(self.first_step, _smallest_step(t0)), jnp.array(False)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state):
        """Keeps the step if its scaled error is below 1, and sizes the next by it: SAFETY error^(-1 / order)."""
        scale = self.atol + self.rtol * jnp.maximum(jnp.abs(y0), jnp.abs(y1_candidate))
        error = self.norm(y_error / scale)
        kept = error < 1  # false for NaN
        factor = jnp.nan_to_num(SAFETY * error ** (-1 / error_order), nan=0.0, posinf=MAX_FACTOR)
        most = jnp.where(controller_state, 1.0, MAX_FACTOR)
        factor = jnp.where(kept, jnp.minimum(factor, most), jnp.maximum(factor, MIN_FACTOR))
        start = jnp.where(kept, t1, t0)
        step, smallest = factor * (t1 - t0), _smallest_step(start)
        failed = ~kept & ~(step >= smallest)  # NaN too
        result = diffrax.RESULTS.where(failed, diffrax.RESULTS.dt_min_reached, diffrax.RESULTS.successful)
        return kept, start, start + jnp.maximum(step, smallest), False, ~kept, result


def _smallest_step(t):
    # diffrax runs a backward solve in -t, so that the next float is always above.
    return SMALLEST_STEP * (jnp.nextafter(t, jnp.inf) - t)


def _integrate(term, solver, x, f0, taus, tol):
    """One adaptive solve under SciPy RK45's step control: (end, number of steps, states at `points` times or None)."""
    tau_start, tau_end, points = taus
    saveat = diffrax.SaveAt(t1=True)
    if points is not None:
        inner = tau_start + (tau_end - tau_start) * (jnp.arange(1, points) / points)
        saveat = diffrax.SaveAt(ts=inner, t1=True)
    first_step = _first_step(term, x, f0, (tau_start, tau_end), tol, solver.error_order(term))
    solution = diffrax.diffeqsolve(
        term,
        solver,
        t0=tau_start,
        t1=tau_end,
        dt0=None,
        y0=x,
        saveat=saveat,
        solver_state=(jnp.array(False), f0) if _is_fsal(solver) else None,
        stepsize_controller=_ScipyControl(rtol=tol, atol=tol, norm=_root_mean_square, first_step=first_step),
        adjoint=diffrax.ForwardMode(),
        max_steps=MAX_STEPS,
        throw=False,
    )
    end = jnp.where(diffrax.is_successful(solution.result), solution.ys[-1], jnp.nan)
    return end, solution.stats["num_steps"], (None if points is None else solution.ys)


def trajectory_room() -> int:
    """Bytes that the states of a trajectory may take on one device: a quarter of its memory.

    They are there twice while they are put together; the other half is the network's.
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    if limit := statistics.get("bytes_limit"):
        return limit // 4
    # A CPU's devices share its memory.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // jax.local_device_count() // 4


def _refuse_oversized_trajectory(states: int, x):
    """Raises InputError, before anything is solved, when states x B x ... values are more than `trajectory_room`."""
    needed, room = states * x.size * x.dtype.itemsize, trajectory_room()
    if needed > room:
        raise InputError(
            f"a trajectory of {states} states of shape {tuple(x.shape)} takes {needed / 1e9:.1f} GB, more than the "
            f"{room / 1e9:.1f} GB that a device has for it; lower eval.batch_size or model.num_scales"
        )


# --- measures ---------------------------------------------------------------------------------------------------------


class Straightness(NamedTuple):
    """How far trajectories are from straight, as a mean over the batch of sums over pixels; 0 is straight.

    Attributes:
      total: S = integral over t in [0, 1] of E || (x_1 - x_0) - dx/dt ||^2 dt.
      sequential: the same with, in each segment, that segment's own displacement over its length in t.
      ts: [n] the n times between which the curves hold.
      curve, sequential_curve: [n - 1] the two integrands, constant between two times.
    """

    total: Float[Array, ""]
    sequential: Float[Array, ""]
    ts: Float[Array, "n"]
    curve: Float[Array, "n-1"]
    sequential_curve: Float[Array, "n-1"]


def straightness(ts: Float[Array, "n"], xs: Float[Array, "n b *image"], boundaries) -> Straightness:
    """Straightness of the piecewise linear trajectories through `xs` (design.md section 5), over any segments.

    Exact for Euler's trajectories, whose steps are straight; for an adaptive solve it is as fine as its states are
    dense. The boundaries need not be among `ts`.

    Args:
      ts: times falling from 1 to 0, not necessarily uniform.
      xs: the states at those times.
      boundaries: [k + 1] in t, of the segments to measure over.
    """
    boundaries = jnp.asarray(boundaries, jnp.float32)
    lengths = ts[:-1] - ts[1:]
    per_time = jax.vmap(lambda start, end, x_start, x_end: (x_start - x_end) / (start - end))
    chords = per_time(boundaries[:-1], boundaries[1:], *_between(ts, xs, boundaries))
    # overlap[n, i]: how long step n runs inside segment i. A step across a boundary belongs to both.
    overlap = jnp.minimum(ts[:-1, None], boundaries[:-1]) - jnp.maximum(ts[1:, None], boundaries[1:])
    overlap = jnp.maximum(overlap, 0.0)

    def mean_square(difference):
        return jnp.sum(difference**2) / xs.shape[1]

    def step(n):
        # The states are read where they are: slices of them as inputs of the loop would be two more copies of all.
        slope = (xs[n] - xs[n + 1]) / lengths[n]
        per_segment = jax.lax.map(lambda chord: mean_square(chord - slope), chords)
        return mean_square(xs[0] - xs[-1] - slope), jnp.sum(overlap[n] * per_segment) / lengths[n]

    curve, sequential_curve = jax.lax.map(step, jnp.arange(lengths.size))
    return Straightness(
        total=jnp.sum(curve * lengths),
        sequential=jnp.sum(sequential_curve * lengths),
        ts=ts,
        curve=curve,
        sequential_curve=sequential_curve,
    )


def _between(ts, xs, times):
    """The states at the starts and at the ends of the segments between `times`, on the piecewise linear path."""
    after = jnp.clip(jnp.searchsorted(-ts, -times), 1, ts.size - 1)
    share = (ts[after - 1] - times) / (ts[after - 1] - ts[after])
    share = share.reshape(-1, *[1] * (xs.ndim - 1))
    # Written so that a share of exactly 0 or 1 gives a saved state, bit for bit.
    states = (1 - share) * xs[after - 1] + share * xs[after]
    return states[:-1], states[1:]


def truncation_error(x: Float[Array, "b *image"], exact: Float[Array, "b *image"]) -> Float[Array, ""]:
    """Global truncation error: RMS over pixels and batch of a sample and the same noise solved at tolerance 1e-6."""
    return jnp.sqrt(jnp.mean((x - exact) ** 2))
