"""Samplers: solves of dx/dtau = v(x, tau, segment), segment by segment on the device, and measures of trajectories.

diffrax steps. This module adds the segments, SciPy's step control, the exact number of network calls (NFE), saved
trajectories (docs/method.md, section 5), straightness and the global truncation error (section 6).
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

# diffrax checks the times of a trajectory, whose order ours have by construction, through the host: a round trip in
# every solve; and XLA keeps no program that has one in its compilation cache. The variable is read by the import.
os.environ.setdefault("EQX_ON_ERROR", "off")

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

import segments
from utils import InputError

Time = Real[ArrayLike, ""]  # a scalar, perhaps traced
State = Float[Array, "b *image"]


class Dopri5(diffrax.Dopri5):
    """Dormand-Prince 5(4) with the error estimate of their paper, as in SciPy; diffrax's is 2/3 of it."""

    tableau: ClassVar[diffrax.ButcherTableau] = dataclasses.replace(
        diffrax.Dopri5.tableau, b_error=1.5 * diffrax.Dopri5.tableau.b_error
    )


class Reinterpolate(diffrax.AbstractSolver):
    """The sampler of arXiv 2405.20320 inside one segment, from (tau_s, x_s) to tau_e, which are the step's `args`.

    A step from (tau, x) to tau' predicts the segment's end and goes to the point of the line from there to x_s at tau':

        x_e = x + (tau_e - tau) v(x, tau),   u = (tau_e - tau') / (tau_e - tau_s),   x' = (1 - u) x_e + u x_s.

    The state is x_s. A segment's first and last steps are Euler's, so the two samplers differ from three steps a
    segment on. Exact on a straight segment. On a curved one it does not converge to the ODE's solution as N grows.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """Of convergence, as diffrax asks; the first step's."""
        return 1

    def init(self, terms: diffrax.AbstractTerm, t0: Time, t1: Time, y0: State, args: Any) -> State:
        """The state before the first step: the segment's start."""
        return y0

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: Time,
        t1: Time,
        y0: State,
        args: tuple[Time, Time],
        solver_state: State,
        made_jump: Bool[ArrayLike, ""],
    ) -> tuple[State, None, dict[str, State], State, Any]:
        """One step; `made_jump`: it is the segment's first."""
        tau_start, tau_end = args
        x_start = jnp.where(made_jump, y0, solver_state)
        x_end = y0 + (tau_end - t0) * terms.vf(t0, y0, None)
        u = (tau_end - t1) / (tau_end - tau_start)
        y1 = (1 - u) * x_end + u * x_start
        return y1, None, {"y0": y0, "y1": y1}, x_start, diffrax.RESULTS.successful  # type: ignore[return-value]

    def func(self, terms: diffrax.AbstractTerm, t0: Time, y0: State, args: Any) -> State:
        """The velocity."""
        return terms.vf(t0, y0, None)


SOLVERS = {
    "dopri5": Dopri5,
    "tsit5": diffrax.Tsit5,
    "bosh3": diffrax.Bosh3,
    "heun": diffrax.Heun,
    "midpoint": diffrax.Midpoint,
    "ralston": diffrax.Ralston,
}
PREDICTORS = {
    "rf_solver": diffrax.Euler,
    "rf_solver_heun": diffrax.Heun,
    "rf_reinterpolate": Reinterpolate,
    **SOLVERS,
}
# What people call the fixed grid's own predictors; tables capitalise it.
SHORT_NAMES = {"euler": "rf_solver", "heun": "rf_solver_heun", "reinterpolate": "rf_reinterpolate"}
METHODS, ERROR_NORMS, TIME_GRIDS = ("ode", "pc"), ("batch", "sample"), ("uniform", "adaptive")
# A step shorter than SMALLEST_STEP units in the last place of its time (SciPy's limit), or more than MAX_STEPS steps in
# a segment: the tolerance cannot be reached in float32, and the state becomes NaN.
SMALLEST_STEP = 10
MAX_STEPS = 16_384
SAFETY, MIN_FACTOR, MAX_FACTOR = 0.9, 0.2, 10.0  # of SciPy's step control
TRAJECTORY_POINTS = 128  # states saved by an adaptive solve, at least, over all segments


# (x [B, ...], t [B] in [0, 1], segment index [B] int32) -> dx/dtau [B, ...]
Velocity = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How the ODE is solved; the keywords of `solve`, with docs in `solve`.

    Attributes:
      method: "ode": adaptive steps of `solver` to `tol`; "pc": `num_scales` fixed steps of `predictor`.
      tol, solver, error_norm: of "ode".
      predictor, num_scales: of "pc".
    """

    method: str
    tol: float | None = None
    solver: str = "dopri5"
    error_norm: str = "batch"
    predictor: str = "rf_solver"
    num_scales: int | None = None

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver chooses its steps."""
        return self.method == "ode"

    def record(self) -> dict[str, Any]:
        """The options that this method has, by name: the keywords of `solve`, and what files keep."""
        names = ("tol", "solver", "error_norm") if self.is_adaptive else ("predictor", "num_scales")
        return {"method": self.method} | {name: getattr(self, name) for name in names}

    @property
    def name(self) -> str:
        """As tables call it: 'ODE', or the predictor and its steps, such as 'Euler 8'."""
        if self.is_adaptive:
            return "ODE"
        short = next((short for short, name in SHORT_NAMES.items() if name == self.predictor), None)
        return f"{short.capitalize() if short else self.predictor} {self.num_scales}"


# The solve that global truncation error is measured against.
REFERENCE = SamplerOptions("ode", tol=1e-6)


class Samples(NamedTuple):
    """The result of a solve.

    Attributes:
      x: [B, ...] the final state (after `solve`: the samples, at t = 0). NaN where an adaptive solve could not reach
        its tolerance.
      nfe: integer scalar, the network calls made for this batch, including rejected steps and the choice of the first
        step's size.
      nfe_each: [B] the calls that each image needed (`error_norm="sample"`: its own steps; else all equal nfe).
      ts: [n] the times of the trajectory, from 1 to 0; None unless saved.
      xs: [n, B, ...] its states; None unless saved. An adaptive solve's are the solver's dense output at times uniform
        in each segment, which costs no network call.
    """

    x: State
    nfe: Int[Array, ""]
    nfe_each: Int[Array, "b"]
    ts: Float[Array, "n"] | None = None
    xs: Float[Array, "n b *image"] | None = None


def solve(
    velocity: Velocity,
    x: State,
    boundaries: segments.TimesLike,
    *,
    method: str,
    tol: float | None = None,
    num_scales: Int[ArrayLike, ""] | None = None,
    predictor: str | None = None,
    save_trajectory: bool = False,
    solver: str = "dopri5",
    error_norm: str = "batch",
    time_grid: segments.TimesLike | None = None,
) -> Samples:
    """Solves from noise x at t = 1 through every segment to t = 0. Works under jit and pmap.

    Args:
      velocity: (x [B, ...], t [B] in [0, 1], index [B] int32) -> dx/dtau [B, ...].
      x: the noise.
      boundaries: [k + 1] in t, decreasing from 1 to 0; may be traced, as may `time_grid`.
      method: "ode": adaptive steps of `solver` with rtol = atol = `tol`. "pc": `num_scales` fixed steps of `predictor`.
      tol: of "ode", above 0.
      num_scales: N of "pc", at least k. May be traced where there is a `time_grid`: one program then serves many N.
      predictor: of "pc", a name in PREDICTORS; "rf_solver" (Euler, the default), "rf_solver_heun" (Heun),
        "rf_reinterpolate" (`Reinterpolate`) or a Runge-Kutta method's name.
      save_trajectory: also return the intermediate states.
      solver: of "ode", a name in SOLVERS.
      error_norm: of "ode", "batch": one step size for all of x (SciPy's RK45 on the flattened batch), or "sample": one
        for each image.
      time_grid: of "pc", [N + 1] times that contain the boundaries; None: uniform inside each segment. Where N is
        traced more times may follow, all 0: a trajectory has as many states, and its last one is the sample.

    Raises:
      ValueError: an unknown name, a missing tol or num_scales, num_scales < k; boundaries or times that do not decrease
        from 1 to 0, times that lack a boundary or are not N + 1.
      InputError: a trajectory that would not fit into memory.
    """
    if not isinstance(boundaries, jax.core.Tracer):
        boundaries = segments.validate_boundaries(boundaries)
    boundaries = jnp.asarray(boundaries, jnp.float32)
    if method == "ode":
        return _solve_adaptive(velocity, x, boundaries, tol, solver, error_norm, save_trajectory)
    if method != "pc":
        raise ValueError(f"unknown sampling method {method!r}; use 'ode' or 'pc'")
    if num_scales is None:
        raise ValueError("method 'pc' needs num_scales, the number of steps")
    if time_grid is None:
        grid = segments.step_grid(boundaries, int(num_scales))
    else:
        grid = segments.step_grid_of_times(boundaries, time_grid)
        steps = grid.segment.size
        if not isinstance(num_scales, jax.core.Tracer) and steps != num_scales:
            raise ValueError(f"time_grid has {steps + 1} times; num_scales = {num_scales} needs {num_scales + 1}")
    predictor = _make_solver(PREDICTORS, predictor or "rf_solver", "predictor")
    return _solve_fixed(velocity, x, boundaries, grid, num_scales, predictor, save_trajectory)


def solve_segment(
    velocity: Velocity,
    x: State,
    t_start: Time,
    t_end: Time,
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


def full_precision(function: Callable) -> Callable:
    """`function` (a velocity, say) with all float32 products computed in float32, as in adaptive solves.

    JAX's default on GPUs (TensorFloat32) and TPUs (bfloat16) makes errors of 1e-3 in every network call. The step
    control takes them for a rough velocity: it makes many times the steps and still misses a small tolerance. A fixed
    grid has no step control and keeps the faster default.
    """

    def precise(*arguments):
        with jax.default_matmul_precision("float32"):
            return function(*arguments)

    return precise


def _make_solver(table, name, setting):
    if name not in table:
        raise ValueError(f"unknown {setting} {name!r}; use one of {', '.join(table)}")
    return table[name]()


def _ode_term(velocity, index):
    """The right-hand side for diffrax, in tau, with the weights of segment `index`."""

    def vector_field(tau: Time, x: State, _: Any) -> Any:
        t = jnp.full(x.shape[:1], segments.t_of_tau(tau), jnp.float32)
        return velocity(x, t, jnp.full(x.shape[:1], index, jnp.int32))

    return diffrax.ODETerm(vector_field)


def _is_fsal(solver) -> bool:
    """Whether a step's last slope is the next step's first, and so costs nothing there."""
    return isinstance(solver, diffrax.AbstractRungeKutta) and solver.tableau.fsal  # type: ignore[union-attr]


def _calls_per_step(solver) -> int:
    stages = solver.tableau.num_stages if isinstance(solver, diffrax.AbstractRungeKutta) else 1  # type: ignore[union-attr]
    return stages - _is_fsal(solver)


# --- fixed grid -------------------------------------------------------------------------------------------------------


def _solve_fixed(velocity, x, boundaries, grid: segments.StepGrid, steps, solver, save_trajectory) -> Samples:
    """The first `steps` steps of the grid: all of them where the number is not traced."""
    most = grid.segment.size
    if save_trajectory:
        _check_trajectory_memory(most + 1, x)
    taus = segments.tau_of_t(boundaries)

    def step(n: Array, carry: tuple) -> tuple:
        x, solver_state, states = carry
        now = jax.tree.map(lambda values: values[n], grid)
        tau_from, tau_to = segments.tau_of_t(now.t_from), segments.tau_of_t(now.t_to)
        term, span = _ode_term(velocity, now.segment), (taus[now.segment], taus[now.segment + 1])
        # A segment's first step is a jump for diffrax: a slope kept from the segment before had other weights.
        x, _, _, solver_state, _ = solver.step(term, tau_from, tau_to, x, span, solver_state, now.starts_segment)
        return x, solver_state, (states.at[n + 1].set(x) if save_trajectory else None)

    first = solver.init(_ode_term(velocity, grid.segment[0]), segments.EPS, 1.0, x, None)
    states = jnp.zeros((most + 1, *x.shape), x.dtype).at[0].set(x) if save_trajectory else None
    end, _, states = jax.lax.fori_loop(0, steps, step, (x, first, states))
    # An FSAL solver computes the slope that it keeps anew once a segment.
    starts = jnp.sum(grid.starts_segment & (jnp.arange(most) < steps), dtype=jnp.int32)
    nfe = jnp.asarray(_calls_per_step(solver) * steps + _is_fsal(solver) * starts, jnp.int32)
    samples = Samples(x=end, nfe=nfe, nfe_each=jnp.full(x.shape[:1], nfe))
    return samples._replace(ts=grid.ts, xs=states.at[-1].set(end)) if save_trajectory else samples


# --- adaptive ---------------------------------------------------------------------------------------------------------


def _solve_adaptive(velocity, x, boundaries, tol, solver, error_norm, save_trajectory) -> Samples:
    k = boundaries.size - 1
    points = -(-TRAJECTORY_POINTS // k) if save_trajectory else None
    if save_trajectory:
        _check_trajectory_memory(k * points + 1, x)
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
    solver = _make_solver(SOLVERS, solver, "solver")
    velocity = jax.jit(velocity)  # traced once here, not at each of the solver's uses: half the time before compiling

    def batch(term: diffrax.AbstractTerm, x: State, f0: State, taus: tuple) -> tuple:
        return _integrate(term, solver, x, f0, taus, tol)

    def each(term: diffrax.AbstractTerm, x: State, f0: State, taus: tuple) -> tuple:
        # A batch of one image under vmap: the network is still called with whole batches.
        def one(x: Any, f0: Any) -> tuple:
            return _integrate(term, solver, x[None], f0[None], taus, tol)

        end, steps, states = jax.vmap(one)(x, f0)
        return end[:, 0], steps, (None if states is None else jnp.moveaxis(states[:, :, 0], 0, 1))

    def segment(x: State, span: tuple) -> tuple:
        t_start, t_end, index = span
        term = _ode_term(velocity, index)
        tau_start, tau_end = segments.tau_of_t(t_start), segments.tau_of_t(t_end)
        taus = (tau_start, tau_end, points)
        # The first slope chooses the first step's size and is passed on to an FSAL solver, which would compute it
        # anew at every rejected first step, uncounted.
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

    def norm(change: Array) -> Array:
        return _root_mean_square(change / (tol + tol * jnp.abs(x)))

    d0, d1 = norm(x), norm(f0)
    h0 = jnp.minimum(jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1), length)
    d2 = norm(term.vf(start + direction * h0, x + direction * h0 * f0, None) - f0) / h0
    largest = jnp.maximum(d1, d2)
    h1 = jnp.where(largest <= 1e-15, jnp.maximum(1e-6, 1e-3 * h0), (0.01 / largest) ** (1 / error_order))
    return jnp.minimum(jnp.minimum(100 * h0, h1), length)


class _ScipyControl(diffrax.AbstractAdaptiveStepSizeController):
    """Step control exactly as SciPy's RK45 does it, starting with `first_step`.

    diffrax's PIDController does not shrink a step after an accepted one, and so runs nearer to the tolerance than
    SciPy. And `diffeqsolve(dt0=...)` would check its sign by a call of the host in every solve: a round trip, and XLA
    keeps no program that has one in its compilation cache.
    """

    rtol: float
    atol: float
    norm: Callable
    first_step: Float[Array, ""]

    def wrap(self, direction: Any) -> "_ScipyControl":
        """This controller: its lengths hold in either direction."""
        return self

    def init(
        self,
        terms: Any,
        t0: Time,
        t1: Time,
        y0: State,
        dt0: None,
        args: Any,
        func: Callable,
        error_order: Time,
    ) -> tuple[Time, Bool[Array, ""]]:
        """The first step's end, and the state: whether the previous step was rejected."""
        return t0 + jnp.maximum(self.first_step, _smallest_step(t0)), jnp.array(False)

    def adapt_step_size(
        self,
        t0: Time,
        t1: Time,
        y0: State,
        y1_candidate: State,
        args: Any,
        y_error: State | Any,
        error_order: Time,
        controller_state: Bool[Array, ""],
    ) -> tuple[Bool[Array, ""], Time, Time, bool, Bool[Array, ""], diffrax.RESULTS]:
        """Keeps the step if its scaled error is below 1; the next is SAFETY error^(-1 / order) times as long."""
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


def trajectory_memory() -> int:
    """Bytes that the states of a trajectory may take on one device: a quarter of its memory.

    They exist twice while they are concatenated; the other half is left to the network.
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    if limit := statistics.get("bytes_limit"):
        return limit // 4
    # CPU devices share one memory.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // jax.local_device_count() // 4


def _check_trajectory_memory(states: int, x):
    """Raises InputError, before any solve, if `states` states like x take more than `trajectory_memory`."""
    needed, available = states * x.size * x.dtype.itemsize, trajectory_memory()
    if needed > available:
        raise InputError(
            f"a trajectory of {states} states of shape {tuple(x.shape)} takes {needed / 1e9:.1f} GB, more than the "
            f"{available / 1e9:.1f} GB that a device has for it; lower eval.batch_size or model.num_scales"
        )


# --- measures ---------------------------------------------------------------------------------------------------------
