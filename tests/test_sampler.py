"""Samples, trajectories and fine trajectories over devices and batches, against `sampling.solve` and closed forms."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_flows import EULER, GAUSSIAN, ODE, SHAPE, UNEVEN, Gaussian, direct, sampler_of, velocity_fn

import adaptive
import evaluation
import models
import sampler
import sampling
import segments
from metrics.straightness import straightness
from utils import InputError

SAMPLE = ODE | {"error_norm": "sample"}


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


class Rough(nn.Module):
    """The larger an image, the smaller its steps."""

    @nn.compact
    def __call__(self, x, labels, index, train=False):
        return -self.param("rate", nn.initializers.ones, ()) * jnp.mean(x**2, axis=(1, 2, 3), keepdims=True) * x


@pytest.fixture(autouse=True)
def _any_model(monkeypatch):
    monkeypatch.setattr(models, "velocity_fn", velocity_fn)


def slopes(pieces, heads=1, seed=0):
    return {"slopes": np.float32(np.random.default_rng(seed).normal(size=(pieces, heads, *SHAPE)))}


def sampled(tested, params, count, batch_size):
    cost = sampler.Cost()
    return list(tested.samples(params, count, batch_size, cost)), cost.summary()


def test_two_devices_share_every_batch_in_these_tests():
    assert jax.local_device_count() == 2


def test_a_noise_depends_only_on_its_index():
    tested = sampler_of(Gaussian(), EULER)
    noises = tested.noise(np.arange(1000))
    np.testing.assert_array_equal(tested.noise(np.array([7, 2])), noises[np.array([7, 2])])
    assert np.mean(noises) == pytest.approx(0, abs=0.05)
    assert np.std(noises) == pytest.approx(1, abs=0.05)
    assert len(np.unique(noises[:9])) == noises[:9].size


@pytest.mark.parametrize(
    ("options", "count", "batch_size", "sizes"),
    [(EULER, 7, 4, [4, 3]), (EULER, 7, 3, [4, 3]), (EULER, 3, 64, [3]), (EULER, 1, 1, [1]), (SAMPLE, 7, 4, [4, 3])],
)
def test_samples_are_exactly_as_many_as_asked_for_and_those_of_their_noises(options, count, batch_size, sizes):
    tested = sampler_of(Gaussian(), options, UNEVEN)
    batches, _ = sampled(tested, GAUSSIAN, count, batch_size)
    assert [len(batch) for batch in batches] == sizes
    np.testing.assert_allclose(np.concatenate(batches), direct(tested, GAUSSIAN)(range(count)).x, atol=2e-5)


def test_adaptive_samples_share_their_steps_on_a_device():
    tested = sampler_of(Gaussian(), ODE, UNEVEN)
    batches, cost = sampled(tested, GAUSSIAN, 5, 4)
    runs = list(map(direct(tested, GAUSSIAN), ([0, 1], [2, 3], [4, 5], [6, 7])))
    np.testing.assert_allclose(np.concatenate(batches), np.concatenate([run.x for run in runs])[:5], atol=1e-5)
    assert cost["nfe"] == np.mean([run.nfe for run in runs])


def test_nfe_of_images_with_their_own_steps_is_their_mean_and_maximum():
    tested, rate = sampler_of(Rough(), SAMPLE), {"rate": np.float32(30)}
    _, cost = sampled(tested, rate, 6, 4)
    each = np.asarray(direct(tested, rate)(range(8)).nfe_each)  # two whole batches
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


def test_samples_that_are_not_finite_are_an_error():
    tested = sampler_of(Gaussian(), EULER)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, GAUSSIAN)
    with pytest.raises(InputError, match=r"samples are not finite .*raise sampling\.tol"):
        sampled(tested, broken, 2, 2)
    with pytest.raises(InputError, match=r"samples are not finite .*raise sampling\.tol"):
        evaluation.trajectory_metrics(tested, broken, UNEVEN, 2, 2)


@pytest.mark.parametrize("options", [EULER, ODE], ids=["euler", "ode"])
def test_trajectory_is_that_of_a_direct_solve(options):
    tested = sampler_of(Gaussian(), options, UNEVEN)
    ts, xs = tested.trajectory(GAUSSIAN, 3)
    run = direct(tested, GAUSSIAN, save_trajectory=True)(range(4))
    np.testing.assert_array_equal(ts, run.ts)
    assert xs.shape == (len(ts), 3, *SHAPE)
    np.testing.assert_allclose(xs, run.xs[:, :3], atol=5e-3 if options is ODE else 1e-5)
    np.testing.assert_array_equal(xs[0], tested.noise(np.arange(3)))


def test_trajectory_has_as_many_images_as_fit(monkeypatch):
    tested = sampler_of(Gaussian(), EULER)
    _, xs = tested.trajectory(GAUSSIAN, 64)
    assert xs.shape == (9, 64, *SHAPE)
    states = sampling.TRAJECTORY_POINTS + 2
    monkeypatch.setattr(sampler, "TRAJECTORY_BYTES", 3 * 4 * states * math.prod(SHAPE))
    _, fewer = tested.trajectory(GAUSSIAN, 64)
    assert fewer.shape == (9, 6, *SHAPE)
    np.testing.assert_allclose(fewer, xs[:, :6], atol=1e-6)
    monkeypatch.setattr(sampler, "TRAJECTORY_BYTES", 1 << 40)
    monkeypatch.setattr(sampling, "trajectory_memory", lambda: 1)
    with pytest.raises(InputError, match="GB"):  # not even one image
        sampler_of(Gaussian(), EULER).trajectory(GAUSSIAN, 64)


# --- fine trajectories and time grids ---------------------------------------------------------------------------------


def test_a_kink_is_found_where_it_is_whatever_the_segments_are(monkeypatch):
    monkeypatch.setattr(sampler, "FINE_NOISES", 4)
    for boundaries in (UNEVEN, segments.uniform_boundaries(3), [1.0, 0.01, 0.0], [1.0, 0.0]):
        heads = len(boundaries) - 1
        tested = sampler_of(Pieces((0.62,), heads), EULER, boundaries)
        params = {"slopes": np.repeat(slopes(2)["slopes"], heads, axis=1)}  # all heads alike
        distances = tested.fine_distances(params)
        assert distances.shape == (501, 501)
        partition = adaptive.best_partition(distances, 2)
        np.testing.assert_allclose(partition.boundaries, [1.0, 0.62, 0.0], atol=1e-6)
        assert partition.cost < 1e-6 < partition.uniform_cost


def test_fine_states_are_uniform_in_time_and_every_segment_has_its_head(monkeypatch):
    # A third is on no fine step: its step is split, and its state is not among those compared.
    monkeypatch.setattr(sampler, "FINE_NOISES", 4)
    tested, params = sampler_of(Pieces((), 3), ODE, UNEVEN), slopes(1, 3)
    t = np.linspace(1, 0, 501)[:, None]
    spent = np.clip(UNEVEN[:-1] - t, 0, UNEVEN[:-1] - UNEVEN[1:])  # of each segment, by each fine state
    moved = (1 - segments.EPS) * spent @ params["slopes"][0].reshape(3, -1)
    expected = ((moved[:, None] - moved) ** 2).sum(axis=-1)
    np.testing.assert_allclose(tested.fine_distances(params), expected, rtol=1e-3, atol=2e-6)


def test_fine_trajectories_in_small_pieces_of_memory_are_of_the_same_noises(monkeypatch):
    monkeypatch.setattr(sampler, "FINE_NOISES", 5)
    monkeypatch.setattr("segments.FINE_STEPS", 20)
    distances = {}
    for size, images in ((1 << 30, 8), (3 * 4 * 22 * math.prod(SHAPE), 3), (1, 1)):
        monkeypatch.setattr(sampler, "TRAJECTORY_BYTES", size)
        tested = sampler_of(Gaussian(), EULER)
        distances[images] = tested.fine_distances(GAUSSIAN)
        assert [shape[1] for _, shape, *_ in tested.programs._compiled] == [images]
    xs = direct(tested, GAUSSIAN, num_scales=20, save_trajectory=True)(range(5)).xs
    for found in distances.values():
        np.testing.assert_allclose(found, adaptive.squared_distances([xs]), rtol=1e-4, atol=1e-5)


def test_adaptive_steps_are_placed_on_the_kinks_of_uneven_segments(monkeypatch):
    monkeypatch.setattr(sampler, "FINE_NOISES", 4)
    tested = sampler_of(Pieces((0.8, 0.5, 0.1), 3), EULER | {"num_scales": 6}, UNEVEN)
    params = {"slopes": np.repeat(slopes(4)["slopes"], 3, axis=1)}
    gridded = tested.with_time_grid(params, "adaptive")
    times = gridded.time_grid.tolist()
    assert len(times) == 7
    assert {round(time, 3) for time in times} >= {1.0, 0.9, 0.333, 0.1, 0.0}
    assert 0.5 in times or 0.8 in times  # one step end inside that segment
    ts, xs = gridded.trajectory(params, 2)
    np.testing.assert_array_equal(ts, gridded.time_grid)
    run = direct(tested, params, time_grid=gridded.time_grid)(range(2))
    np.testing.assert_allclose(xs[-1], run.x, atol=1e-6)


def test_other_weights_and_their_time_grid_need_no_other_program(monkeypatch):
    monkeypatch.setattr(sampler, "FINE_NOISES", 4)
    tested, counts, grids = sampler_of(Pieces((0.7, 0.2)), EULER | {"num_scales": 3}), [], []
    for seed in range(3):
        params = slopes(3, seed=seed)
        params["slopes"][seed % 2] = params["slopes"][seed % 2 + 1]  # one of the kinks is none
        gridded = tested.with_time_grid(params, "adaptive")
        batches, _ = sampled(gridded, params, 2, 2)
        run = direct(tested, params, time_grid=gridded.time_grid)(range(2))
        np.testing.assert_allclose(batches[0], run.x, atol=1e-6)
        evaluation.trajectory_metrics(gridded, params, np.float32([1, 0]), 2, 2)
        counts.append(len(TRACED))
        grids.append(gridded.time_grid)
    assert not np.array_equal(grids[0], grids[1])
    direct_only = counts[2] - counts[1]
    assert counts[1] - counts[0] == direct_only
    assert direct_only < counts[0]
    assert len(tested.programs._compiled) == 3  # fine trajectories, samples, straightness


@pytest.mark.parametrize("predictor", ["rf_solver", "rf_solver_heun", "bosh3", "rf_reinterpolate"])
def test_all_numbers_of_steps_share_a_program(predictor):
    first, counts = sampler_of(Pieces((0.7, 0.2), 2), EULER | {"predictor": predictor}, [1.0, 0.4, 0.0]), []
    params = slopes(3, 2)
    for steps in (2, 3, 8, 16):
        options = dataclasses.replace(first.options, num_scales=steps)
        tested = dataclasses.replace(first, options=options)
        batches, cost = sampled(tested, params, 4, 4)
        run = direct(tested, params, save_trajectory=True)(range(4))
        np.testing.assert_allclose(batches[0], run.x, atol=1e-6)
        assert cost["nfe"] == run.nfe
        ts, xs = tested.trajectory(params, 4)
        np.testing.assert_array_equal(ts, run.ts)
        np.testing.assert_allclose(xs, run.xs, atol=1e-6)
        found = evaluation.trajectory_metrics(tested, params, np.float32([1, 0.4, 0]), 4, 4)
        expected = straightness(run.ts, run.xs, [1, 0.4, 0])
        for name in ("ts", "curve", "sequential_curve"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.sequential_straightness, expected.sequential, rtol=1e-4, atol=1e-6)
        counts.append(len(tested.programs._compiled))
    assert counts == [3, 3, 3, 3]
    tested = dataclasses.replace(first, options=dataclasses.replace(first.options, num_scales=17))
    np.testing.assert_allclose(sampled(tested, params, 4, 4)[0][0], direct(tested, params)(range(4)).x, atol=1e-6)


def test_a_uniform_grid_and_an_adaptive_solver_are_left_alone():
    tested = sampler_of(Gaussian(), EULER)
    assert tested.with_time_grid(GAUSSIAN, "uniform") is tested
    tested = sampler_of(Gaussian(), ODE)
    assert tested.with_time_grid(GAUSSIAN, "adaptive") is tested


@pytest.mark.parametrize(
    ("num_scales", "boundaries"), [(1000, [1.0, 0.0]), (40, [1.0, 0.7, 0.3, 0.01, 0.0]), (500, [1.0, 2 / 3, 1 / 3, 0])]
)
def test_steps_that_do_not_fit_are_an_error_before_any_trajectory(num_scales, boundaries, monkeypatch):
    tested = sampler_of(Gaussian(), EULER | {"num_scales": num_scales}, boundaries)
    monkeypatch.setattr(sampler.Sampler, "fine_distances", lambda *_: pytest.fail("computed"))
    with pytest.raises(InputError, match=r"do not fit.*lower model\.num_scales"):
        tested.with_time_grid(GAUSSIAN, "adaptive")


def test_names_of_samplers():
    options = {"method": "pc", "predictor": "rf_solver_heun", "num_scales": 4}
    named = [ODE, EULER, options, options | {"predictor": "bosh3"}]
    assert [sampler_of(Gaussian(), o).name for o in named] == ["ODE", "Euler 8", "Heun 4", "bosh3 4"]
