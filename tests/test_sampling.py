"""Behaviour of the samplers; their mathematics against closed forms and SciPy is in test_sampling_scipy.py."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import sampling
import segments
from benchmarks import bench_sampling
from configs.default import SETTINGS
from metrics.straightness import straightness
from utils import InputError

NOISE = jax.random.normal(jax.random.key(0), (4, 3, 3, 1))


def curved(x, t, index):
    """A flow whose every segment differs, so that a wrong head or time shows."""
    t = t[:, None, None, None]
    return jnp.cos(3 * t) * x + (1.0 + index[:, None, None, None])


def straight(x, t, index):
    return jnp.broadcast_to(jnp.float32([2.0, -1.0, 0.5, 3.0])[index][:, None, None, None], x.shape)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ode", {"tol": 1e-4}),
        ("ode", {"tol": 1e-4, "error_norm": "sample"}),
        ("pc", {"num_scales": 7, "predictor": "rf_solver"}),
        ("pc", {"num_scales": 7, "predictor": "rf_solver_heun"}),
        ("pc", {"num_scales": 7, "predictor": "rf_reinterpolate"}),
        ("pc", {"num_scales": 7, "predictor": "bosh3"}),
    ],
)
def test_trajectory_begins_with_the_noise_ends_with_the_sample_and_changes_nothing(method, options):
    boundaries = np.float32([1.0, 0.7, 0.2, 0.0])
    plain = sampling.solve(curved, NOISE, boundaries, method=method, **options)
    saved = sampling.solve(curved, NOISE, boundaries, method=method, save_trajectory=True, **options)
    assert plain.ts is None
    assert plain.xs is None
    np.testing.assert_array_equal(saved.xs[0], NOISE)
    np.testing.assert_allclose(saved.xs[-1], saved.x, atol=1e-6)
    np.testing.assert_allclose(saved.x, plain.x, atol=1e-6)
    assert int(saved.nfe) == int(plain.nfe)
    assert saved.xs.shape == (saved.ts.size, *NOISE.shape)
    assert saved.ts[0] == 1.0
    assert saved.ts[-1] == 0.0
    assert np.all(np.diff(saved.ts) < 0)
    assert np.isin(boundaries, np.asarray(saved.ts)).all()


def test_jit_and_pmap_give_what_eager_gives():
    def sampler(x):
        return sampling.solve(curved, x, segments.uniform_boundaries(2), method="ode", tol=1e-4)

    eager = sampler(NOISE)
    jitted = jax.jit(sampler)(NOISE)
    devices = jax.local_device_count()
    sharded = jax.pmap(sampler)(jnp.stack([NOISE] * devices))
    np.testing.assert_allclose(jitted.x, eager.x, atol=1e-5)
    for d in range(devices):
        np.testing.assert_allclose(sharded.x[d], eager.x, atol=1e-5)
        assert sharded.nfe[d] == eager.nfe


def test_euler_on_a_piecewise_straight_flow_is_exact():
    boundaries = np.float32([1.0, 0.6, 0.5, 0.1, 0.0])
    samples = sampling.solve(straight, NOISE, boundaries, method="pc", num_scales=4, save_trajectory=True)
    taus = segments.tau_of_t(boundaries.astype(np.float64))
    expected = np.asarray(NOISE) + np.dot([2.0, -1.0, 0.5, 3.0], np.diff(taus))
    np.testing.assert_allclose(samples.x, expected, atol=1e-6)
    measured = straightness(samples.ts, samples.xs, boundaries)
    assert measured.sequential < 1e-6
    assert measured.total > 0.1


def test_straightness_copies_no_trajectory():
    ts, xs = jax.ShapeDtypeStruct((129,), jnp.float32), jax.ShapeDtypeStruct((129, 16, 16, 16, 3), jnp.float32)
    program = jax.jit(straightness).lower(ts, xs, np.float32([1.0, 0.5, 0.0])).compile()
    assert program.memory_analysis().temp_size_in_bytes < xs.size * 4 / 10


def test_straightness_over_boundaries_that_fall_between_the_states():
    ts = jnp.float32([1.0, 0.8, 0.3, 0.0])
    xs = jnp.array([[[1.0]], [[0.8]], [[0.3]], [[0.0]]])
    measured = straightness(ts, xs, [1.0, 0.5, 0.0])
    assert measured.total < 1e-10
    assert measured.sequential < 1e-10
    kinked = xs.at[1].add(0.5)
    measured = straightness(ts, kinked, [1.0, 0.5, 0.0])
    slopes = np.diff(np.asarray(kinked)[:, 0, 0]) / np.diff(np.asarray(ts))
    lengths = -np.diff(np.asarray(ts))
    assert measured.total == pytest.approx(np.sum(lengths * (1.0 - slopes) ** 2), rel=1e-5)
    middle = 0.3 + (0.5 - 0.3) / 0.5 * (1.3 - 0.3)
    chords = np.array([(1.0 - middle) / 0.5, middle / 0.5])
    by_hand = 0.2 * (chords[0] - slopes[0]) ** 2 + 0.3 * (chords[0] - slopes[1]) ** 2
    by_hand += 0.2 * (chords[1] - slopes[1]) ** 2 + 0.3 * (chords[1] - slopes[2]) ** 2
    assert measured.sequential == pytest.approx(by_hand, rel=1e-4)


def test_each_image_controls_its_own_steps():
    # Under "sample" the network sees one image at a time, so its stiffness must come from the image itself.
    def stiff_by_size(x, t, index):
        return -jnp.mean(x**2, axis=(1, 2, 3), keepdims=True) * x

    noise = NOISE * jnp.float32([0.1, 6.0, 0.1, 0.1])[:, None, None, None]
    samples = sampling.solve(stiff_by_size, noise, [1.0, 0.0], method="ode", tol=1e-4, error_norm="sample")
    assert samples.nfe_each[1] > 2 * samples.nfe_each[0]
    assert samples.nfe == jnp.max(samples.nfe_each)
    alone = sampling.solve(stiff_by_size, noise[:1], [1.0, 0.0], method="ode", tol=1e-4)
    np.testing.assert_allclose(samples.x[:1], alone.x, atol=1e-6)
    assert samples.nfe_each[0] == alone.nfe


def test_time_grid_is_followed():
    grid = np.float32([1.0, 0.9, 0.5, 0.0])
    seen = sampling.solve(
        curved, NOISE, [1.0, 0.5, 0.0], method="pc", num_scales=3, time_grid=grid, save_trajectory=True
    )
    np.testing.assert_array_equal(seen.ts, grid)
    with pytest.raises(ValueError, match="lack the segment boundaries"):
        sampling.solve(curved, NOISE, [1.0, 0.4, 0.0], method="pc", num_scales=3, time_grid=grid)
    with pytest.raises(ValueError, match="4 times; num_scales = 5 needs 6"):
        sampling.solve(curved, NOISE, [1.0, 0.5, 0.0], method="pc", num_scales=5, time_grid=grid)


def test_times_may_be_arguments_of_a_compiled_program():
    boundaries, grid = np.float32([1.0, 0.5, 0.0]), np.float32([1.0, 0.9, 0.5, 0.0])

    def solve(boundaries, grid):
        return sampling.solve(curved, NOISE, boundaries, method="pc", num_scales=3, predictor="bosh3", time_grid=grid)

    traced, concrete = jax.jit(solve)(boundaries, grid), solve(boundaries, grid)
    np.testing.assert_allclose(traced.x, concrete.x, atol=1e-5)
    assert traced.nfe == concrete.nfe


@pytest.mark.parametrize("options", [{"method": "ode", "tol": 1e-3}, {"method": "pc", "num_scales": 4}], ids=str)
@pytest.mark.parametrize("wrong", [[0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0, 0.1]], ids=str)
def test_boundaries_that_do_not_decrease_from_one_to_zero_are_refused(options, wrong):
    with pytest.raises(ValueError, match="boundaries must decrease strictly from 1 to 0"):
        sampling.solve(curved, NOISE, wrong, **options)


def test_a_configuration_knows_every_solver():
    assert SETTINGS["sampling.predictor"].choices == tuple(sampling.PREDICTORS)
    assert SETTINGS["sampling.solver"].choices == tuple(sampling.SOLVERS)


@pytest.mark.parametrize("save_trajectory", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "ode", "tol": 1e-3},
        {"method": "ode", "tol": 1e-3, "error_norm": "sample"},
        {"method": "pc", "num_scales": 4},
    ],
    ids=str,
)
def test_a_solve_never_calls_the_host(options, save_trajectory):
    # A round trip in every solve; and XLA keeps no program that has one in its compilation cache.
    options = {**options, "save_trajectory": save_trajectory}
    program = jax.make_jaxpr(lambda x, boundaries: sampling.solve(curved, x, boundaries, **options))
    assert "callback" not in str(program(NOISE, np.float32([1.0, 0.5, 0.0])))


def mixed(x, t, index):
    """A velocity with a convolution and a matrix product."""
    kernel = jnp.ones((3, 3, 1, 1))
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(x.reshape(x.shape[0], -1) @ jnp.ones((9, 9))).reshape(x.shape)


def precisions(jaxpr, found):
    """The precisions of all products in a program and in the programs inside it, added to `found` by primitive."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.setdefault(equation.primitive.name, set()).add(equation.params["precision"])
        for inner in jaxprs_in_params(equation.params):
            precisions(inner, found)
    return found


HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def test_adaptive_solves_multiply_in_full_precision():
    def whole(x):
        return sampling.solve(mixed, x, [1.0, 0.5, 0.0], method="ode", tol=1e-3, save_trajectory=True)

    def sample(x):
        return sampling.solve(mixed, x, [1.0, 0.0], method="ode", tol=1e-3, error_norm="sample")

    def segment(x):
        return sampling.solve_segment(mixed, x, 1.0, 0.5, 0, tol=1e-3)

    def fixed(x):
        return sampling.solve(mixed, x, [1.0, 0.0], method="pc", num_scales=4)

    for solve in (whole, sample, segment):
        found = precisions(jax.make_jaxpr(solve)(NOISE).jaxpr, {})
        assert found == {"dot_general": {HIGHEST}, "conv_general_dilated": {HIGHEST}}
    found = precisions(jax.make_jaxpr(fixed)(NOISE).jaxpr, {})
    assert found["conv_general_dilated"] == {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "unknown sampling method 'magic'"),
        ({"method": "ode"}, "tolerance"),
        ({"method": "ode", "tol": 1e-3, "solver": "euler"}, "unknown solver 'euler'"),
        ({"method": "ode", "tol": 1e-3, "error_norm": "pixel"}, "unknown error_norm"),
        ({"method": "pc"}, "num_scales"),
        ({"method": "pc", "num_scales": 1}, "use num_scales >= 2"),
        ({"method": "pc", "num_scales": 4, "predictor": "rk4"}, "unknown predictor 'rk4'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sampling.solve(curved, NOISE, [1.0, 0.5, 0.0], **options)


@pytest.mark.parametrize("options", [{"method": "ode", "tol": 1e-3}, {"method": "pc", "num_scales": 100}], ids=str)
def test_a_trajectory_too_large_for_memory_is_refused_before_the_solve(options):
    def solve(x):
        return sampling.solve(curved, x, [1.0, 0.0], save_trajectory=True, **options)

    with pytest.raises(InputError, match=r"GB.*lower eval\.batch_size"):
        jax.eval_shape(solve, jax.ShapeDtypeStruct((1_000_000, 256, 256, 3), jnp.float32))
    # The devices share the memory, and the states are there twice.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    states = 129 if options["method"] == "ode" else 101
    half, eighth = (jax.ShapeDtypeStruct((int(memory * part / states / 4), 1), jnp.float32) for part in (1 / 2, 1 / 8))
    with pytest.raises(InputError, match="GB"):
        jax.eval_shape(lambda x: sampling.solve(still, x, [1.0, 0.0], save_trajectory=True, **options), half)
    jax.eval_shape(lambda x: sampling.solve(still, x, [1.0, 0.0], save_trajectory=True, **options), eighth)


def still(x, t, index):
    return jnp.zeros_like(x)


def explosive(x, t, index):
    return x**2 + 100.0


def overflowing(x, t, index):
    return jnp.full_like(x, 1e30)


def broken(x, t, index):
    return jnp.full_like(x, jnp.nan)


@pytest.mark.parametrize("velocity", [explosive, overflowing, broken])
def test_an_unreachable_tolerance_soon_gives_nan(velocity):
    samples = jax.jit(lambda x: sampling.solve(velocity, x, [1.0, 0.5, 0.0], method="ode", tol=1e-5))(NOISE)
    assert np.isnan(np.asarray(samples.x)).all()
    assert samples.nfe < 1000


def test_a_step_that_is_broken_on_the_way_ends_the_solve():
    def velocity(x, t, index):
        return jnp.where(t < 0.5, jnp.nan, 1.0)[:, None, None, None] * x

    samples = jax.jit(lambda x: sampling.solve(velocity, x, [1.0, 0.0], method="ode", tol=1e-4))(NOISE)
    assert np.isnan(np.asarray(samples.x)).all()
    assert samples.nfe < 300


def test_one_broken_image_with_its_own_steps_costs_the_others_nothing():
    noise = NOISE.at[1].set(jnp.nan)
    options = {"method": "ode", "tol": 1e-4, "error_norm": "sample"}
    samples = jax.jit(lambda x: sampling.solve(curved, x, [1.0, 0.5, 0.0], **options))(noise)
    whole = jax.jit(lambda x: sampling.solve(curved, x, [1.0, 0.5, 0.0], **options))(NOISE)
    good = np.array([0, 2, 3])
    assert np.isnan(np.asarray(samples.x)[1]).all()
    np.testing.assert_allclose(samples.x[good], whole.x[good], atol=1e-6)
    np.testing.assert_array_equal(samples.nfe_each[good], whole.nfe_each[good])
    assert samples.nfe == jnp.max(whole.nfe_each[good])


@pytest.mark.parametrize(("overheads", "status"), [([1.0, 1.05], 0), ([1.06, 1.0], 1)])
def test_the_benchmark_fails_where_a_solve_costs_more_than_its_calls(overheads, status, monkeypatch, capsys):
    rows = [bench_sampling.row(bench_sampling.CASES[0], "euler", 2, None, [(1.0, 2 * o, 0.0)]) for o in overheads]
    monkeypatch.setattr(bench_sampling, "measure", lambda case, rounds: rows)
    monkeypatch.setattr("sys.argv", ["bench_sampling.py"])
    assert bench_sampling.main() == status
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.endswith("MISSED") for line in lines] == [overhead > 1.05 for overhead in overheads]
