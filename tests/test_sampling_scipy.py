"""The samplers' mathematics: closed-form flows, SciPy's RK45, quadrature, and a count of the calls themselves."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from scipy.integrate._ivp import rk

import adaptive
import sampling
import segments
from metrics.straightness import straightness

SHAPE = (16, 3, 2, 1)
MEAN = np.linspace(-1.0, 1.0, 6).reshape(SHAPE[1:])
SPREAD = np.linspace(0.25, 1.5, 6).reshape(SHAPE[1:])
BOUNDARIES = [(1, 0), (1, 0.5, 0), (1, 0.75, 0.5, 0.25, 0), (1, 0.7, 0), (1, 0.9, 0.55, 0.2, 0)]

over_boundaries = pytest.mark.parametrize("boundaries", BOUNDARIES, ids=str)


def noise(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- data N(m, s^2 I), noise N(0, I): x_tau is Gaussian, so the velocity E[data - noise | x_tau] is affine in x -------


def deviation(tau, s=SPREAD):
    """Standard deviation of x_tau. Along the exact flow (x - tau m) / deviation stays constant."""
    return np.sqrt((tau * s) ** 2 + (1 - tau) ** 2)


def gaussian_slope(x, tau, xp=np):
    """The exact velocity E[data - noise | x_tau = x], in NumPy or jax.numpy."""
    gain = (tau * SPREAD**2 - (1 - tau)) / ((tau * SPREAD) ** 2 + (1 - tau) ** 2)
    return xp.asarray(MEAN + gain * (x - tau * MEAN), x.dtype)


def gaussian_velocity(x, t, index):
    """The same as the samplers ask for it."""
    return gaussian_slope(x, segments.tau_of_t(t).reshape(-1, *[1] * (x.ndim - 1)), jnp)


def gaussian_flow(z, tau):
    """Where the exact flow carries z, given at tau = EPS."""
    return tau * MEAN + deviation(tau) / deviation(segments.EPS) * (z.astype(np.float64) - segments.EPS * MEAN)


@functools.cache
def compiled(velocity, **options):
    """`sampling.solve` as one program for all boundaries of as many segments."""
    return jax.jit(lambda z, boundaries: sampling.solve(velocity, z, boundaries, **options))


def solved(velocity, z, boundaries, **options):
    return compiled(velocity, **options)(z, np.asarray(boundaries, np.float32))


measured_straightness = jax.jit(straightness)


def rms(difference):
    return float(np.sqrt(np.mean(np.asarray(difference, np.float64) ** 2)))


@pytest.mark.parametrize(("predictor", "order"), [("rf_solver", 1), ("rf_solver_heun", 2)])
@over_boundaries
def test_order_of_the_fixed_grid_samplers(predictor, order, boundaries):
    z, counts = noise(), np.array([32, 64, 128])
    exact = gaussian_flow(z, 1.0)
    errors = [
        rms(solved(gaussian_velocity, z, boundaries, method="pc", num_scales=int(n), predictor=predictor).x - exact)
        for n in counts
    ]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.1), errors


def scipy_solve(slope, z, boundaries, tol, method="RK45"):
    """SciPy in float64 over the flattened batch, started anew in each segment: the end and the calls.

    `slope` is (x [B, ...], tau, segment) -> dx/dtau. `boundaries` that rise from 0 to 1 solve backwards.
    """
    x, nfe = z.astype(np.float64), 0
    taus = segments.tau_of_t(np.array(boundaries, np.float64))
    for i, span in enumerate(itertools.pairwise(taus)):

        def flat_slope(tau, y, i=i):
            return slope(y.reshape(z.shape), tau, i).ravel()

        solution = integrate.solve_ivp(flat_slope, span, x.ravel(), method=method, rtol=tol, atol=tol)
        x, nfe = solution.y[:, -1].reshape(z.shape), nfe + solution.nfev
    return x, nfe


@pytest.mark.parametrize("tol", [1e-3, 1e-4, 1e-5])
@over_boundaries
def test_adaptive_solver_beside_scipy(tol, boundaries):
    z = noise()
    exact = gaussian_flow(z, 1.0)
    ours = solved(gaussian_velocity, z, boundaries, method="ode", tol=tol)
    theirs, nfe = scipy_solve(lambda x, tau, i: gaussian_slope(x, tau), z, boundaries, tol)
    assert rms(ours.x - exact) <= 3 * rms(theirs - exact) + tol
    assert int(ours.nfe) <= 1.25 * nfe + 12 * (len(boundaries) - 1)
    # The same steps, but for one in a segment that is just kept here and just rejected there.
    assert abs(int(ours.nfe) - nfe) <= 6 * (len(boundaries) - 1)


@pytest.mark.parametrize(("error", "factor"), [(0.0, rk.MAX_FACTOR), (0.5, rk.SAFETY * 2**0.2), (1e9, rk.MIN_FACTOR)])
def test_a_step_grows_and_shrinks_as_scipys(error, factor):
    norm, states = lambda scaled: jnp.abs(scaled).max(), jnp.ones(2)
    control = sampling._ScipyControl(rtol=0.0, atol=1.0, norm=norm, first_step=jnp.array(0.1))
    step = control.adapt_step_size(0.3, 0.31, states, states, None, error * states, 5, jnp.array(False))
    kept, start, end = step[:3]
    assert bool(kept) == (error < 1)
    assert float(start) == pytest.approx(0.31 if kept else 0.3)
    assert float(end - start) == pytest.approx(factor * 0.01, rel=1e-3)


@over_boundaries
def test_the_tolerance_that_truncation_error_is_measured_against(boundaries):
    # Rounding makes our steps at 1e-6 others than SciPy's, which works in float64: hold both against the closed form.
    z = noise()
    ours = solved(gaussian_velocity, z, boundaries, method="ode", tol=1e-6)
    _, nfe = scipy_solve(lambda x, tau, i: gaussian_slope(x, tau), z, boundaries, 1e-6)
    assert rms(ours.x - gaussian_flow(z, 1.0)) < 1e-5
    assert int(ours.nfe) <= 1.25 * nfe + 12 * (len(boundaries) - 1)


SPANS = [(0, 1), (0, 0.5), (0.25, 0.5), (0.5, 1), (0.05, 0.7)]


@functools.cache
def compiled_segment(velocity, tol, error_norm="batch"):
    """`sampling.solve_segment` as one program for all times, forwards and backwards."""

    def solve(x, t_start, t_end, index):
        return sampling.solve_segment(velocity, x, t_start, t_end, index, tol=tol, error_norm=error_norm)

    return jax.jit(solve)


@pytest.mark.parametrize("tol", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_backward_segment_beside_scipy(tol, span):
    t_end, t_start = span
    tau_from, tau_to = segments.tau_of_t(t_end), segments.tau_of_t(t_start)
    z = noise()
    x = gaussian_flow(z, tau_from).astype(np.float32)
    ours = compiled_segment(gaussian_velocity, tol)(x, t_end, t_start, 0)
    theirs, nfe = scipy_solve(lambda x, tau, i: gaussian_slope(x, tau), x, span, tol)
    exact = gaussian_flow(z, tau_to)
    assert rms(ours.x - exact) <= 3 * rms(theirs - exact) + tol
    assert abs(int(ours.nfe) - nfe) <= 6


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_backward_then_forward_is_where_it_came_from(span):
    t_end, t_start = span
    x = gaussian_flow(noise(), segments.tau_of_t(t_end)).astype(np.float32)
    solve = compiled_segment(gaussian_velocity, 1e-5)
    start = solve(x, t_end, t_start, 0).x
    assert rms(start - x) > 0.05
    assert rms(solve(start, t_start, t_end, 0).x - x) < 1e-4


def test_backward_segment_uses_its_own_index_and_each_images_own_steps():
    def velocity(x, t, index):
        return gaussian_velocity(x, t, index) + index[:, None, None, None]

    z = noise() * np.array([0.1, 1, 3, 10] * 4, np.float32).reshape(-1, 1, 1, 1)
    together = compiled_segment(velocity, 1e-4, "sample")(z, 0.3, 0.8, 2)
    theirs, _ = scipy_solve(lambda x, tau, i: gaussian_slope(x, tau) + 2.0, z, (0.3, 0.8), 1e-9)
    assert rms((together.x - theirs) / np.maximum(1, np.abs(z))) < 1e-3
    for image in range(4):
        alone = compiled_segment(velocity, 1e-4)(z[image : image + 1], 0.3, 0.8, 2)
        assert abs(int(together.nfe_each[image]) - int(alone.nfe)) <= 6


@pytest.mark.parametrize("velocity", [lambda x, t, i: x**2 + 100.0, lambda x, t, i: jnp.full_like(x, jnp.nan)])
def test_an_unreachable_tolerance_backwards_soon_gives_nan(velocity):
    solved = compiled_segment(velocity, 1e-5)(-(noise()[:2] ** 2), 0.0, 1.0, 0)
    assert np.isnan(np.asarray(solved.x)).all()
    assert solved.nfe < 1000


def test_the_error_estimate_is_that_of_scipys_dormand_prince():
    tableau = sampling.Dopri5.tableau
    np.testing.assert_allclose(np.abs(tableau.b_error), np.abs(integrate.RK45.E), atol=1e-15)
    np.testing.assert_allclose(tableau.b_sol[:-1], integrate.RK45.B, atol=1e-15)


def test_every_image_with_its_own_steps_is_that_image_alone():
    z = noise() * np.array([0.1, 1, 3, 10] * 4, np.float32).reshape(-1, 1, 1, 1)
    options = {"method": "ode", "tol": 1e-4}
    together = solved(gaussian_velocity, z, (1, 0.7, 0), error_norm="sample", **options)
    for place in range(4):
        alone = solved(gaussian_velocity, z[place : place + 1], (1, 0.7, 0), **options)
        # One step more or less, where a step is just kept or just rejected, is worth a few times the tolerance.
        np.testing.assert_allclose(together.x[place], alone.x[0], rtol=5e-4, atol=5e-4)
        assert abs(int(together.nfe_each[place]) - int(alone.nfe)) <= 6
    assert rms((together.x - gaussian_flow(z, 1.0)) / np.maximum(1, np.abs(z))) < 1e-3


# --- rf_reinterpolate -------------------------------------------------------------------------------------------------


def numpy_reinterpolate(z, boundaries, times):
    """The sampler of arXiv 2405.20320 in float64, segment by segment as if each were the whole of time.

    With s the share of the segment done, every state is x_s + s m, m the current estimate of the whole displacement.
    """
    x = z.astype(np.float64)
    for i, (start, end) in enumerate(itertools.pairwise(boundaries)):
        inside = [t for t in times if end <= t <= start]
        x_start, length = x, segments.tau_of_t(end) - segments.tau_of_t(start)
        for t, t_next in itertools.pairwise(inside):
            done, next_done = (start - t) / (start - end), (start - t_next) / (start - end)
            displacement = x + (1 - done) * length * rough_slope(x, t, i) - x_start
            x = x_start + next_done * displacement
    return x


UNEVEN = (1, 0.97, 0.9, 0.8, 0.7, 0.6, 0.45, 0.4, 0.3, 0.21, 0.1, 0)


@pytest.mark.parametrize("grid", [None, UNEVEN], ids=["uniform", "given"])
@pytest.mark.parametrize("boundaries", [(1, 0), (1, 0.7, 0.3, 0)], ids=str)
def test_reinterpolation_equals_a_plain_loop_on_a_curved_flow(boundaries, grid):
    z, boundaries = noise(), np.float32(boundaries)
    times = segments.step_grid(boundaries, 11).ts if grid is None else np.float32(grid)
    options = {"method": "pc", "num_scales": 11, "predictor": "rf_reinterpolate", "time_grid": grid}
    run = solved(rough_velocity, z, boundaries, **options, save_trajectory=True)
    expected = numpy_reinterpolate(z, boundaries.astype(np.float64), np.asarray(times, np.float64))
    np.testing.assert_allclose(run.x, expected, atol=2e-5)
    np.testing.assert_array_equal(run.xs[-1], run.x)
    assert int(run.nfe) == 11


@pytest.mark.parametrize("steps", [1, 2, 3])
@over_boundaries
def test_reinterpolation_is_euler_up_to_two_steps_a_segment(steps, boundaries):
    z, options = noise(), {"method": "pc", "num_scales": steps * (len(boundaries) - 1)}
    euler = solved(gaussian_velocity, z, boundaries, **options, predictor="rf_solver").x
    difference = rms(solved(gaussian_velocity, z, boundaries, **options, predictor="rf_reinterpolate").x - euler)
    assert difference < 1e-6 if steps < 3 else difference > 1e-3


def test_reinterpolation_in_many_steps_is_one_implicit_euler_step():
    # Its limit is the state x whose own velocity leads to it from the start: x = z + L v(x), here with v = -2 x, where
    # the ODE ends at z exp(-2 L). It comes nearer like 1 / sqrt(N).
    z, length = noise(), 1 - segments.EPS
    options = {"method": "pc", "predictor": "rf_reinterpolate", "num_scales": 2000}
    run = solved(lambda x, t, index: -2 * x, z, (1, 0), **options)
    np.testing.assert_allclose(run.x, z / (1 + 2 * length), rtol=0.03)


# --- straightness -----------------------------------------------------------------------------------------------------


def quadrature_straightness(z, boundaries):
    """The straightness integral of the exact Gaussian flow over the given segments, for these very noises.

    With g = deviation(tau) / deviation(EPS), each pixel moves by m dtau + (z - EPS m) dg: only dg bends.
    """
    first = deviation(segments.EPS)
    weight = np.mean((z.astype(np.float64) - segments.EPS * MEAN) ** 2, axis=0)
    taus, total = segments.tau_of_t(np.array(boundaries, np.float64)), 0.0
    for start, end in itertools.pairwise(taus):
        chord = (deviation(end) - deviation(start)) / (end - start) / first

        def integrand(tau, chord=chord):
            slope = (tau * SPREAD**2 - (1 - tau)) / deviation(tau) / first
            return float(np.sum(weight * (slope - chord) ** 2))

        # dx/dt = -(1 - EPS) dx/dtau, squared, and dt = dtau / (1 - EPS).
        total += (1 - segments.EPS) * integrate.quad(integrand, start, end, epsabs=1e-10, epsrel=1e-8)[0]
    return total


@pytest.mark.parametrize(
    "options",
    [
        {"method": "pc", "num_scales": 400, "predictor": "rf_solver"},
        {"method": "pc", "num_scales": 200, "predictor": "rf_solver_heun"},
        {"method": "ode", "tol": 1e-5},
    ],
    ids=["euler", "heun", "ode"],
)
@over_boundaries
def test_straightness_matches_quadrature(options, boundaries):
    z = noise()
    run = solved(gaussian_velocity, z, boundaries, save_trajectory=True, **options)
    measured = measured_straightness(run.ts, run.xs, np.array(boundaries, np.float32))
    assert float(measured.total) == pytest.approx(quadrature_straightness(z, (1, 0)), rel=0.01)
    assert float(measured.sequential) == pytest.approx(quadrature_straightness(z, boundaries), rel=0.01)
    lengths = np.asarray(run.ts[:-1] - run.ts[1:])
    assert np.sum(measured.curve * lengths) == pytest.approx(float(measured.total), rel=1e-4)
    assert np.sum(measured.sequential_curve * lengths) == pytest.approx(float(measured.sequential), rel=1e-4)


def test_straightness_over_other_segments_than_the_trajectory_was_solved_in():
    z, other = noise(), (1, 0.777, 0.3141, 0)
    run = solved(gaussian_velocity, z, (1, 0.5, 0), save_trajectory=True, method="ode", tol=1e-5)
    measured = measured_straightness(run.ts, run.xs, np.array(other, np.float32))
    assert float(measured.sequential) == pytest.approx(quadrature_straightness(z, other), rel=0.01)


def test_straightness_is_the_cost_that_the_adaptive_partition_minimises():
    z = noise()
    run = solved(gaussian_velocity, z, (1, 0), save_trajectory=True, method="pc", num_scales=200)
    distances = adaptive.squared_distances([run.xs])
    partition = adaptive.best_partition(distances, 3)
    for boundaries, cost in [
        (partition.boundaries, partition.cost),
        (segments.uniform_boundaries(3), partition.uniform_cost),
    ]:
        measured = measured_straightness(run.ts, run.xs, boundaries)
        assert float(measured.sequential) == pytest.approx(cost, rel=1e-3)
    assert partition.cost < partition.uniform_cost
    assert quadrature_straightness(z, partition.boundaries) < quadrature_straightness(z, (1, 2 / 3, 1 / 3, 0))


# --- piecewise straight flows -----------------------------------------------------------------------------------------


SCALE = np.random.default_rng(7).uniform(0.5, 1.5, (4, *SHAPE[1:]))
SHIFT = np.random.default_rng(8).normal(size=(4, *SHAPE[1:]))


def bent_velocity(boundaries):
    """A flow that is straight in each segment, where it takes x_start to x_end = SCALE[i] x_start + SHIFT[i].

    Inside, x = (1 + u (SCALE - 1)) x_start + u SHIFT, with u the share of the segment done, so the velocity at x is
    that of the one line through x.
    """
    taus = segments.tau_of_t(boundaries)

    def velocity(x, t, index):
        spread = (-1,) + (1,) * (x.ndim - 1)
        grow, move = jnp.asarray(SCALE, x.dtype)[index] - 1, jnp.asarray(SHIFT, x.dtype)[index]
        done = ((boundaries[index] - t) / (boundaries[index] - boundaries[index + 1])).reshape(spread)
        start = (x - done * move) / (1 + done * grow)
        return (grow * start + move) / (taus[index + 1] - taus[index]).reshape(spread)

    return velocity


@functools.cache
def compiled_bent(**options):
    """One program for all boundaries of as many segments, with `save_trajectory`."""
    options["save_trajectory"] = True
    return jax.jit(lambda z, boundaries: sampling.solve(bent_velocity(boundaries), z, boundaries, **options))


def bent_flow(z, k):
    """The exact states at the boundaries."""
    states = [z.astype(np.float64)]
    for i in range(k):
        states.append(SCALE[i] * states[-1] + SHIFT[i])
    return states


@over_boundaries
def test_one_euler_step_a_segment_is_exact_on_a_piecewise_straight_flow(boundaries):
    z, k, boundaries = noise(), len(boundaries) - 1, np.array(boundaries, np.float32)
    run = compiled_bent(method="pc", num_scales=k, predictor="rf_solver")(z, boundaries)
    assert int(run.nfe) == k
    for state, exact in zip(run.xs, bent_flow(z, k), strict=True):
        assert rms(state - exact) < 1e-6
    np.testing.assert_array_equal(run.ts, boundaries)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "pc", "num_scales": 11, "predictor": "rf_solver"},
        {"method": "pc", "num_scales": 11, "predictor": "rf_solver_heun"},
        {"method": "pc", "num_scales": 11, "predictor": "rf_reinterpolate"},
        {"method": "ode", "tol": 1e-4},
    ],
    ids=["euler", "heun", "reinterpolate", "ode"],
)
@over_boundaries
def test_piecewise_straight_flow_has_no_sequential_straightness(options, boundaries):
    z, k, boundaries = noise(), len(boundaries) - 1, np.array(boundaries, np.float32)
    run = compiled_bent(**options)(z, boundaries)
    measured = measured_straightness(run.ts, run.xs, boundaries)
    assert float(measured.sequential) < 1e-6
    assert np.max(measured.sequential_curve) < 1e-5
    assert k == 1 or float(measured.total) > 1
    assert rms(run.x - bent_flow(z, k)[-1]) < 2e-6


# --- the calls themselves ---------------------------------------------------------------------------------------------


def rough_slope(x, t, index, xp=np):
    """dx/dtau with fast turns in the middle of time: an adaptive solver must reject steps there."""
    return 20 * xp.cos(40 * t) * xp.exp(-200 * (t - 0.4) ** 2) - x * (1 + index)


def rough_velocity(x, t, index):
    """The same as the samplers ask for it."""
    spread = (-1,) + (1,) * (x.ndim - 1)
    return rough_slope(x, t.reshape(spread), index.reshape(spread), jnp)


def counted_solve(z, boundaries, **options):
    """(samples, the times t at which the velocity really ran: once for each image where it is mapped over images)."""
    times = []

    def velocity(x, t, index):
        jax.debug.callback(lambda t: times.extend(t.tolist()), t, ordered=options.get("error_norm") != "sample")
        return rough_velocity(x, t, index)

    boundaries = np.asarray(boundaries, np.float32)
    run = jax.jit(lambda z: sampling.solve(velocity, z, boundaries, **options))(z)
    jax.block_until_ready(run)
    jax.effects_barrier()
    assert np.isfinite(run.x).all()
    return run, np.array(times)


@pytest.mark.parametrize("predictor", list(sampling.PREDICTORS))
@pytest.mark.parametrize("boundaries", [(1, 0), (1, 0.9, 0.55, 0.2, 0)], ids=str)
def test_nfe_is_the_calls_made_on_a_fixed_grid(predictor, boundaries):
    z = noise()[:2]
    run, times = counted_solve(z, boundaries, method="pc", num_scales=10, predictor=predictor)
    assert int(run.nfe) * len(z) == len(times)
    np.testing.assert_array_equal(run.nfe_each, run.nfe)
    if predictor.startswith("rf_"):
        assert run.nfe == 10 * (2 if predictor.endswith("heun") else 1)


@pytest.mark.parametrize("predictor", ["rf_solver", "rf_solver_heun", "rf_reinterpolate", "dopri5"])
def test_nfe_is_the_calls_made_on_a_given_grid(predictor):
    z, boundaries, grid = noise()[:2], (1, 0.9, 0.55, 0), np.array([1, 0.95, 0.9, 0.6, 0.55, 0.1, 0.01, 0], np.float32)
    run, times = counted_solve(z, boundaries, method="pc", num_scales=7, predictor=predictor, time_grid=grid)
    assert int(run.nfe) * len(z) == len(times)
    for t in grid[:-1]:
        assert np.min(np.abs(times - t)) < 1e-6


@pytest.mark.parametrize(
    ("solver", "save_trajectory"), [(solver, False) for solver in sampling.SOLVERS] + [("dopri5", True)]
)
def test_adaptive_solvers_reach_the_tolerance_and_nfe_is_the_calls_made(solver, save_trajectory):
    z, boundaries = noise()[:2], (1, 0.9, 0.55, 0.2, 0)
    options = {"tol": 1e-4, "solver": solver, "save_trajectory": save_trajectory}
    run, times = counted_solve(z, boundaries, method="ode", **options)
    exact, _ = scipy_solve(lambda x, tau, i: rough_slope(x, segments.t_of_tau(tau), i), z, boundaries, 1e-10, "DOP853")
    assert rms(run.x - exact) < 5e-4
    assert int(run.nfe) * len(z) == len(times)
    np.testing.assert_array_equal(run.nfe_each, run.nfe)


def test_rejected_steps_are_counted():
    z = noise()[:2]
    run, times = counted_solve(z, (1, 0), method="ode", tol=1e-4)
    assert int(run.nfe) * len(z) == len(times)
    # Two calls choose the first step's size, six make a step. A step after a rejected one begins where that one did.
    steps = times[:: len(z)][2:].reshape(-1, 6)
    starts = steps[:, 0] + (steps[:, 0] - steps[:, -1]) / 4  # stages at 0.2 and at 1 of the step
    ends = steps[:, -1]
    accepted = np.abs(starts[1:] - ends[:-1]) < 1e-5
    rejected = np.abs(starts[1:] - starts[:-1]) < 1e-5
    assert np.all(accepted ^ rejected)
    assert rejected.sum() >= 1


@pytest.mark.parametrize("solver", ["dopri5", "bosh3", "heun"])
def test_nfe_is_the_calls_made_when_every_image_has_its_own_steps(solver):
    z = noise()[:4] * np.array([0.1, 1, 10, 100], np.float32).reshape(-1, 1, 1, 1)
    run, times = counted_solve(z, (1, 0.55, 0), method="ode", tol=1e-3, solver=solver, error_norm="sample")
    assert int(run.nfe) * len(z) == len(times)
    assert int(run.nfe_each.max()) <= int(run.nfe)
    assert int(run.nfe_each.min()) < int(run.nfe)
