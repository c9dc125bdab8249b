"""What a flow is worth, over devices and batches, against `sampling.solve` called directly and against closed forms."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive
import models
import sampler
import sampling
import segments
from utils import InputError

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


TRACED = []  # an entry whenever a program calls Pieces while it is compiled


class Pieces(nn.Module):
    """Straight between the times `kinks`, with a slope for each piece and head: slopes [pieces, heads, *SHAPE]."""

    kinks: tuple[float, ...]
    heads: int = 1

    @nn.compact
    def __call__(self, x, labels, index, train=False):
        TRACED.append(x.shape)
        slopes = self.param("slopes", nn.initializers.ones, (len(self.kinks) + 1, self.heads, *SHAPE))
        t = segments.t_of_tau(labels / segments.LABEL_SCALE)
        # A step that starts at a kink belongs to what follows.
        piece = jnp.sum(t[:, None] <= jnp.float32(self.kinks) + 1e-5, axis=1) if self.kinks else jnp.zeros(len(x), int)
        return jnp.asarray(slopes)[piece, index]


class Explosive(nn.Module):
    """Euler crosses it in one step; the exact flow is infinite by tau = 0.16."""

    @nn.compact
    def __call__(self, x, labels, index, train=False):
        return x**2 + 100.0


class Rough(nn.Module):
    """The larger an image, the smaller its steps."""

    @nn.compact
    def __call__(self, x, labels, index, train=False):
        return -self.param("rate", nn.initializers.ones, ()) * jnp.mean(x**2, axis=(1, 2, 3), keepdims=True) * x


def velocity_fn(model, params):
    """`models.velocity_fn`, whose annotation lets only real networks pass."""
    return lambda x, t, index: model.apply({"params": params}, x, segments.label_of_t(t), index)


@pytest.fixture(autouse=True)
def _any_model(monkeypatch):
    monkeypatch.setattr(models, "velocity_fn", velocity_fn)


def slopes(pieces, heads=1, seed=0):
    return {"slopes": np.float32(np.random.default_rng(seed).normal(size=(pieces, heads, *SHAPE)))}


def flow_of(model, options, boundaries=(1.0, 0.0)):
    return sampler.Flow(model=model, boundaries=np.float32(boundaries), image_shape=SHAPE, options=options, seed=3)


def direct(flow, params, **options):
    """`sampling.solve` itself, on one device: (numbers of the noises) -> samples."""
    velocity, options = velocity_fn(flow.model, params), flow.options | options
    program = jax.jit(lambda z: sampling.solve(velocity, z, flow.boundaries, **options))
    return lambda places: program(flow.noise(np.asarray(places)))


def sampled(flow, params, count, batch_size):
    cost = sampler.Cost()
    return list(sampler.samples(flow, params, count, batch_size, cost)), cost.summary()


def test_two_devices_share_every_batch_in_these_tests():
    assert jax.local_device_count() == 2


def test_a_noise_depends_on_nothing_but_its_number():
    flow = flow_of(Gaussian(), EULER)
    noises = flow.noise(np.arange(1000))
    np.testing.assert_array_equal(flow.noise(np.array([7, 2])), noises[np.array([7, 2])])
    assert np.mean(noises) == pytest.approx(0, abs=0.05)
    assert np.std(noises) == pytest.approx(1, abs=0.05)
    assert len(np.unique(noises[:9])) == noises[:9].size


SAMPLE = ODE | {"error_norm": "sample"}


@pytest.mark.parametrize(
    ("options", "count", "batch_size", "sizes"),
    [(EULER, 7, 4, [4, 3]), (EULER, 7, 3, [4, 3]), (EULER, 3, 64, [3]), (EULER, 1, 1, [1]), (SAMPLE, 7, 4, [4, 3])],
)
def test_samples_are_exactly_as_many_as_asked_for_and_those_of_their_noises(options, count, batch_size, sizes):
    flow = flow_of(Gaussian(), options, UNEVEN)
    batches, _ = sampled(flow, GAUSSIAN, count, batch_size)
    assert [len(batch) for batch in batches] == sizes
    np.testing.assert_allclose(np.concatenate(batches), direct(flow, GAUSSIAN)(range(count)).x, atol=2e-5)


def test_adaptive_samples_share_their_steps_on_a_device():
    flow = flow_of(Gaussian(), ODE, UNEVEN)
    batches, cost = sampled(flow, GAUSSIAN, 5, 4)
    runs = list(map(direct(flow, GAUSSIAN), ([0, 1], [2, 3], [4, 5], [6, 7])))
    np.testing.assert_allclose(np.concatenate(batches), np.concatenate([run.x for run in runs])[:5], atol=1e-5)
    assert cost["nfe"] == np.mean([run.nfe for run in runs])


def test_nfe_of_images_with_their_own_steps_is_their_mean_and_maximum():
    flow, rate = flow_of(Rough(), SAMPLE), {"rate": np.float32(30)}
    _, cost = sampled(flow, rate, 6, 4)
    each = np.asarray(direct(flow, rate)(range(8)).nfe_each)  # two whole batches
    assert len(set(each)) > 2
    assert cost["nfe_mean"] == pytest.approx(each.mean())
    assert cost["nfe_max"] == each.max()
    assert cost["nfe"] == pytest.approx(each.reshape(4, 2).max(axis=1).mean())  # what each device's batch took
    assert cost["seconds_per_1000"] > 0


def test_cost_adds_up_batches():
    cost = sampler.Cost()
    for nfe, seconds in (([4, 6], 1.0), ([8, 8], 2.0)):
        each = np.repeat(np.array(nfe)[:, None], 3, axis=1)
        cost.add(sampling.Samples(x=None, nfe=np.array(nfe), nfe_each=each), images=6, seconds=seconds)
    assert cost.summary() == {"nfe": 6.5, "nfe_mean": 6.5, "nfe_max": 8, "seconds_per_1000": 250.0}


def test_samples_that_are_not_finite_are_refused(monkeypatch):
    monkeypatch.setattr(sampler, "EXACT", EULER | {"num_scales": 16})  # compiles faster
    flow = flow_of(Gaussian(), EULER)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, GAUSSIAN)
    with pytest.raises(InputError, match=r"samples are not finite .*raise sampling\.tol"):
        sampled(flow, broken, 2, 2)
    with pytest.raises(InputError, match=r"samples are not finite .*raise sampling\.tol"):
        sampler.flow_shape(flow, broken, UNEVEN, 2, 2)


def exact_flow(z):
    """Where the Gaussian flow carries z from tau = EPS to 1."""
    mean, spread, eps = GAUSSIAN["mean"].astype(np.float64), GAUSSIAN["spread"].astype(np.float64), segments.EPS
    return mean + spread / np.sqrt((eps * spread) ** 2 + (1 - eps) ** 2) * (z - eps * mean)


@pytest.mark.parametrize("options", [EULER, ODE], ids=["euler", "ode"])
def test_flow_shape_is_that_of_direct_solves(options):
    # 9 noises in batches of 4, two on each device: three whole batches.
    flow, measured = flow_of(Gaussian(), options, UNEVEN), np.float32([1.0, 0.45, 0.0])
    shape = sampler.flow_shape(flow, GAUSSIAN, measured, count=9, batch_size=4)
    solve, straightness = direct(flow, GAUSSIAN, save_trajectory=True), jax.jit(sampling.straightness)
    runs = [solve([n, n + 1]) for n in range(0, 12, 2)]
    each = [straightness(run.ts, run.xs, measured) for run in runs]
    assert shape.straightness == pytest.approx(np.mean([one.total for one in each]), rel=1e-4)
    assert shape.sequential_straightness == pytest.approx(np.mean([one.sequential for one in each]), rel=1e-4)
    np.testing.assert_allclose(shape.curve, np.mean([one.curve for one in each], axis=0), rtol=2e-3, atol=1e-5)
    sequential = np.mean([one.sequential_curve for one in each], axis=0)
    np.testing.assert_allclose(shape.sequential_curve, sequential, rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(shape.ts, runs[0].ts)
    ends = exact_flow(np.asarray(flow.noise(np.arange(12)), np.float64))
    error = np.sqrt(np.mean((np.concatenate([run.x for run in runs]) - ends) ** 2))
    assert shape.truncation_error == pytest.approx(error, rel=1e-3, abs=5e-6)
    assert shape.truncation_error > (1e-2 if options is EULER else 0)


def test_flow_shape_in_small_pieces_of_memory_is_the_same(monkeypatch):
    monkeypatch.setattr(sampler, "EXACT", EULER | {"num_scales": 16})  # compiles faster
    flow = flow_of(Gaussian(), EULER, UNEVEN)
    whole = sampler.flow_shape(flow, GAUSSIAN, UNEVEN, count=8, batch_size=8)
    monkeypatch.setattr(sampler, "TRAJECTORY_BYTES", 1)
    pieces = sampler.flow_shape(flow, GAUSSIAN, UNEVEN, count=8, batch_size=8)
    assert pieces.straightness == pytest.approx(whole.straightness, rel=1e-5)
    assert pieces.truncation_error == pytest.approx(whole.truncation_error, rel=1e-4)


def test_a_flow_that_cannot_be_solved_exactly_is_told_with_the_remedy():
    flow = flow_of(Explosive(), EULER | {"num_scales": 1})
    with pytest.raises(InputError, match=r"truncation error cannot be measured.*evaluate a checkpoint"):
        sampler.flow_shape(flow, {}, [1.0, 0.0], 2, 2)


@pytest.mark.parametrize("options", [EULER, ODE], ids=["euler", "ode"])
def test_trajectory_is_that_of_a_direct_solve(options):
    flow = flow_of(Gaussian(), options, UNEVEN)
    ts, xs = sampler.trajectory(flow, GAUSSIAN, 3)
    run = direct(flow, GAUSSIAN, save_trajectory=True)(range(4))
    np.testing.assert_array_equal(ts, run.ts)
    assert xs.shape == (len(ts), 3, *SHAPE)
    np.testing.assert_allclose(xs, run.xs[:, :3], atol=5e-3 if options is ODE else 1e-5)
    np.testing.assert_array_equal(xs[0], flow.noise(np.arange(3)))


def test_trajectory_has_as_many_images_as_fit(monkeypatch):
    flow = flow_of(Gaussian(), EULER)
    _, xs = sampler.trajectory(flow, GAUSSIAN, 64)
    assert xs.shape == (9, 64, *SHAPE)
    states = sampling.TRAJECTORY_POINTS + 2
    monkeypatch.setattr(sampler, "TRAJECTORY_BYTES", 3 * 4 * states * math.prod(SHAPE))
    _, fewer = sampler.trajectory(flow, GAUSSIAN, 64)
    assert fewer.shape == (9, 6, *SHAPE)
    np.testing.assert_allclose(fewer, xs[:, :6], atol=1e-6)
    monkeypatch.setattr(sampler, "TRAJECTORY_BYTES", 1 << 40)
    monkeypatch.setattr(sampling, "trajectory_room", lambda: 1)
    with pytest.raises(InputError, match="GB"):  # not even one image
        sampler.trajectory(flow_of(Gaussian(), EULER), GAUSSIAN, 64)


# --- fine trajectories and time grids ---------------------------------------------------------------------------------


def test_a_kink_is_found_where_it_is_whatever_the_segments_are(monkeypatch):
    monkeypatch.setattr(sampler, "FINE_NOISES", 4)
    for boundaries in (UNEVEN, segments.uniform_boundaries(3), [1.0, 0.01, 0.0], [1.0, 0.0]):
        heads = len(boundaries) - 1
        flow = flow_of(Pieces((0.62,), heads), EULER, boundaries)
        params = {"slopes": np.repeat(slopes(2)["slopes"], heads, axis=1)}  # all heads alike
        distances = sampler.fine_distances(flow, params)
        assert distances.shape == (501, 501)
        division = adaptive.best_division(distances, 2)
        np.testing.assert_allclose(division.boundaries, [1.0, 0.62, 0.0], atol=1e-6)
        assert division.cost < 1e-6 < division.uniform_cost


def test_fine_states_are_uniform_in_time_and_every_segment_has_its_head(monkeypatch):
    # A third is on no fine step: its step is split, and its state is not among those compared.
    monkeypatch.setattr(sampler, "FINE_NOISES", 4)
    flow, params = flow_of(Pieces((), 3), ODE, UNEVEN), slopes(1, 3)
    t = np.linspace(1, 0, 501)[:, None]
    spent = np.clip(UNEVEN[:-1] - t, 0, UNEVEN[:-1] - UNEVEN[1:])  # of each segment, by each fine state
    moved = (1 - segments.EPS) * spent @ params["slopes"][0].reshape(3, -1)
    expected = ((moved[:, None] - moved) ** 2).sum(axis=-1)
    np.testing.assert_allclose(sampler.fine_distances(flow, params), expected, rtol=1e-3, atol=2e-6)


def test_fine_trajectories_in_small_pieces_of_memory_are_of_the_same_noises(monkeypatch):
    monkeypatch.setattr(sampler, "FINE_NOISES", 5)
    monkeypatch.setattr("segments.FINE_STEPS", 20)
    distances = {}
    for size, images in ((1 << 30, 8), (3 * 4 * 22 * math.prod(SHAPE), 3), (1, 1)):
        monkeypatch.setattr(sampler, "TRAJECTORY_BYTES", size)
        flow = flow_of(Gaussian(), EULER)
        distances[images] = sampler.fine_distances(flow, GAUSSIAN)
        assert [per_device for _, per_device, _ in flow._programs] == [images]
    xs = direct(flow, GAUSSIAN, num_scales=20, save_trajectory=True)(range(5)).xs
    for found in distances.values():
        np.testing.assert_allclose(found, adaptive.squared_distances([xs]), rtol=1e-4, atol=1e-5)


def test_adaptive_steps_are_placed_on_the_kinks_of_uneven_segments(monkeypatch):
    monkeypatch.setattr(sampler, "FINE_NOISES", 4)
    flow = flow_of(Pieces((0.8, 0.5, 0.1), 3), EULER | {"num_scales": 6}, UNEVEN)
    params = {"slopes": np.repeat(slopes(4)["slopes"], 3, axis=1)}
    gridded = sampler.with_time_grid(flow, params, "adaptive")
    times = gridded.time_grid.tolist()
    assert len(times) == 7
    assert {round(time, 3) for time in times} >= {1.0, 0.9, 0.333, 0.1, 0.0}
    assert 0.5 in times or 0.8 in times  # one step end inside that segment
    ts, xs = sampler.trajectory(gridded, params, 2)
    np.testing.assert_array_equal(ts, gridded.time_grid)
    run = direct(flow, params, time_grid=gridded.time_grid)(range(2))
    np.testing.assert_allclose(xs[-1], run.x, atol=1e-6)


def test_other_weights_and_their_time_grid_need_no_other_program(monkeypatch):
    monkeypatch.setattr(sampler, "FINE_NOISES", 4)
    flow, counts, grids = flow_of(Pieces((0.7, 0.2)), EULER | {"num_scales": 3}), [], []
    for seed in range(3):
        params = slopes(3, seed=seed)
        params["slopes"][seed % 2] = params["slopes"][seed % 2 + 1]  # one of the kinks is none
        gridded = sampler.with_time_grid(flow, params, "adaptive")
        batches, _ = sampled(gridded, params, 2, 2)
        run = direct(flow, params, time_grid=gridded.time_grid)(range(2))
        np.testing.assert_allclose(batches[0], run.x, atol=1e-6)
        sampler.flow_shape(gridded, params, [1.0, 0.0], 2, 2)
        counts.append(len(TRACED))
        grids.append(gridded.time_grid)
    assert not np.array_equal(grids[0], grids[1])
    direct_only = counts[2] - counts[1]
    assert counts[1] - counts[0] == direct_only
    assert direct_only < counts[0]
    assert len(flow._programs) == 4  # fine, samples, shape, exact


def test_a_uniform_grid_and_an_adaptive_solver_are_left_alone():
    flow = flow_of(Gaussian(), EULER)
    assert sampler.with_time_grid(flow, GAUSSIAN, "uniform") is flow
    flow = flow_of(Gaussian(), ODE)
    assert sampler.with_time_grid(flow, GAUSSIAN, "adaptive") is flow


@pytest.mark.parametrize(
    ("num_scales", "boundaries"), [(1000, [1.0, 0.0]), (40, [1.0, 0.7, 0.3, 0.01, 0.0]), (500, [1.0, 2 / 3, 1 / 3, 0])]
)
def test_steps_that_do_not_fit_are_told_before_any_trajectory(num_scales, boundaries, monkeypatch):
    flow = flow_of(Gaussian(), EULER | {"num_scales": num_scales}, boundaries)
    monkeypatch.setattr(sampler, "fine_distances", lambda *_: pytest.fail("computed"))
    with pytest.raises(InputError, match=r"do not fit.*lower model\.num_scales"):
        sampler.with_time_grid(flow, GAUSSIAN, "adaptive")
