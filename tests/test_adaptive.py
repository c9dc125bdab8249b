"""SeqRF-Ada against partitions known by construction, brute force over all partitions, and direct sums over pixels."""

import itertools
import tracemalloc

import jax
import numpy as np
import pytest

import adaptive
import segments
from utils import InputError


def kinked(kinks, fine, noises=3, shape=(4, 4, 2), seed=0):
    """A trajectory [fine + 1, noises, *shape] that is straight except at the given fine steps."""
    rng = np.random.default_rng(seed)
    corners = rng.normal(size=(len(kinks) + 2, noises, *shape))
    nodes = [0, *kinks, fine]
    path = [corners[0]]
    for left, right, a, b in zip(nodes, nodes[1:], corners, corners[1:], strict=False):
        path += [a + (b - a) * (n / (right - left)) for n in range(1, right - left + 1)]
    return np.stack(path).astype(np.float32)


def wandering(fine, noises=5, shape=(3, 2, 1), seed=0):
    """A random walk, [fine + 1, noises, *shape] float32."""
    return np.cumsum(np.random.default_rng(seed).normal(size=(fine + 1, noises, *shape)), axis=0).astype(np.float32)


def piece_cost(xs, i, j):
    """cost(i, j) straight from its definition: chord against velocity, pixel by pixel."""
    xs, fine = xs.astype(np.float64), len(xs) - 1
    velocity = np.diff(xs[i : j + 1], axis=0) * fine
    chord = (xs[j] - xs[i]) * fine / (j - i)
    per_noise = ((velocity - chord) ** 2).reshape(j - i, xs.shape[1], -1).sum(axis=-1)
    return per_noise.mean(axis=1).sum() / fine


def brute_force(xs, k, shortest):
    """The smallest cost over every partition into k pieces of at least `shortest` steps."""
    fine = len(xs) - 1
    cost = {(i, j): piece_cost(xs, i, j) for i in range(fine) for j in range(i + shortest, fine + 1)}
    partitions = ((0, *inner, fine) for inner in itertools.combinations(range(1, fine), k - 1))
    return min(sum(cost.get(edge, np.inf) for edge in itertools.pairwise(path)) for path in partitions)


@pytest.mark.parametrize("boundaries", [(1, 0), (1, 0.5, 0), (1, 0.7003, 0.3331, 0)], ids=str)
def test_fine_trajectory_is_500_euler_steps_split_at_the_boundaries(boundaries):
    boundaries = np.float32(boundaries)

    def slope(x, t, index):
        return np.float32(2) * x * np.float32(t) - 3 * index

    def velocity(x, t, index):
        return 2 * x * t[:, None] - 3 * index[:, None].astype(x.dtype)

    z = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    xs = np.asarray(jax.jit(lambda z: adaptive.fine_trajectory(velocity, z, boundaries))(z))
    assert xs.shape == (501, 4, 3)
    x, states = z.astype(np.float64), [z]
    for t, t_next in itertools.pairwise(np.linspace(1, 0, 501)):
        cuts = [t, *(b for b in boundaries.tolist() if t_next + 1e-6 < b < t - 1e-6), t_next]
        for start, end in itertools.pairwise(cuts):
            index = np.searchsorted(-boundaries, -(start - 1e-6)) - 1
            x = x + (1 - segments.EPS) * (start - end) * slope(x, start, index)
        states.append(x)
    np.testing.assert_allclose(xs, states, atol=1e-4)


@pytest.mark.parametrize("kinks", [(37,), (20, 173), (9, 30, 141)])
def test_kinks_at_uneven_times_become_the_boundaries(kinks):
    fine = 200
    xs = kinked(kinks, fine)
    k = len(kinks) + 1
    boundaries = adaptive.adaptive_boundaries(xs, k)
    expected = (1 - np.array([0, *kinks, fine]) / fine).astype(np.float32)
    assert boundaries.dtype == np.float32
    np.testing.assert_array_equal(boundaries, expected)
    partition = adaptive.best_partition(adaptive.squared_distances([xs]), k)
    assert partition.cost < 1e-6 < 1 < partition.uniform_cost


def test_cost_matrix_is_the_definition():
    xs = wandering(12)
    cost = adaptive.cost_matrix(adaptive.squared_distances([xs]))
    for i, j in itertools.combinations(range(13), 2):
        assert cost[i, j] == pytest.approx(piece_cost(xs, i, j), rel=1e-10, abs=1e-9)
    assert np.all(np.isinf(cost[np.tril_indices(13)]))


@pytest.mark.parametrize(("fine", "k"), [(8, 1), (17, 2), (24, 3), (24, 4), (15, 5), (9, 9)])
def test_equals_brute_force_over_all_partitions(fine, k):
    for seed in range(3):
        xs = wandering(fine, seed=seed)
        partition = adaptive.best_partition(adaptive.squared_distances([xs]), k)
        assert partition.cost == pytest.approx(brute_force(xs, k, 1), rel=1e-9, abs=1e-9)
        path = np.rint((1 - partition.boundaries) * fine).astype(int)
        chosen = sum(piece_cost(xs, i, j) for i, j in itertools.pairwise(path))
        assert chosen == pytest.approx(partition.cost, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shortest", [2, 4, 6])
def test_path_with_a_shortest_edge_equals_brute_force(shortest):
    xs = wandering(20, seed=shortest)
    cost = adaptive.cost_matrix(adaptive.squared_distances([xs]))
    path = adaptive.cheapest_path(cost, 3, shortest)
    assert np.diff(path).min() >= shortest
    found = sum(cost[i, j] for i, j in itertools.pairwise(path))
    assert found == pytest.approx(brute_force(xs, 3, shortest), rel=1e-9)


def test_no_segment_is_shorter_than_one_percent():
    # Both kinks lie within 1 % of the time: the best free partition would cut at 2 and at 4 of 500.
    xs = kinked((2, 4), 500)
    path = np.rint((1 - adaptive.adaptive_boundaries(xs, 3)) * 500).astype(int)
    assert np.diff(path).min() == 5
    # 700 x 0.01 is a little over 7 in binary; seven steps are allowed all the same.
    xs = kinked((7, 300), 700)
    np.testing.assert_array_equal(np.rint((1 - adaptive.adaptive_boundaries(xs, 3)) * 700), [0, 7, 300, 700])


def test_streaming_equals_one_shot():
    xs = wandering(30, noises=7)
    whole = adaptive.squared_distances([xs])
    streamed = adaptive.squared_distances(xs[:, part] for part in (slice(0, 1), slice(1, 5), slice(5, 7)))
    np.testing.assert_allclose(streamed, whole, rtol=1e-12, atol=1e-10)
    direct = ((xs[:, None].astype(np.float64) - xs[None]) ** 2).reshape(31, 31, 7, -1).sum(-1).mean(-1)
    np.testing.assert_allclose(whole, direct, rtol=1e-10, atol=1e-9)


def test_nearly_straight_trajectory_far_from_zero_keeps_its_cost():
    # What float32 states hold of a bend of 1e-2 beside pixels of size 100 is found; sin's cost is known.
    fine, bend = 200, 1e-2
    s = np.arange(fine + 1)[:, None, None] / fine
    xs = (100 + 5 * s + bend * np.sin(2 * np.pi * s) * np.ones((1, 2, 64))).astype(np.float32)
    cost = adaptive.cost_matrix(adaptive.squared_distances([xs]))[0, fine]
    assert cost == pytest.approx(piece_cost(xs, 0, fine), rel=1e-4)
    assert cost == pytest.approx(64 * bend**2 * (2 * np.pi) ** 2 / 2, rel=0.02)


@pytest.mark.parametrize("boundaries", [(1, 0), (1, 0.7, 0.3, 0), (1, 2 / 3, 1 / 3, 0), (1, 0.513, 0.0801, 0)])
def test_cost_curve_off_the_grid_is_that_of_a_finer_grid(boundaries):
    fine, finer = 10, 10_000
    xs = wandering(fine)
    s = np.linspace(0, fine, finer + 1)
    flat = xs.astype(np.float64).reshape(fine + 1, -1)
    dense = np.stack([np.interp(s, np.arange(fine + 1), column) for column in flat.T], axis=1)
    dense = dense.reshape(finer + 1, *xs.shape[1:])
    path = np.rint((1 - np.array(boundaries)) * finer).astype(int)
    expected = sum(piece_cost(dense, i, j) for i, j in itertools.pairwise(path))
    curve = adaptive.cost_curve(adaptive.squared_distances([xs]), np.array(boundaries, np.float32))
    assert curve.cost == pytest.approx(expected, rel=1e-3)
    assert curve.times[0] == 1
    assert curve.times[-1] == 0
    # The density itself, in the first fine step.
    velocity, chord = (xs[1] - xs[0]) * fine, (dense[path[1]] - dense[0]) / (1 - boundaries[1])
    assert curve.density[0] == pytest.approx(((velocity - chord) ** 2).reshape(5, -1).sum(-1).mean(), rel=1e-3)


def test_adaptive_times_are_kinks_and_exact_boundaries():
    # Boundary 1/3 is on no fine step. Inside the segments the kinks are the free step ends.
    fine, boundaries = 100, np.array([1, 1 / 3, 0], np.float32)
    distances = adaptive.squared_distances([kinked((11, 40, 67, 80), fine)])
    times = adaptive.adaptive_times(distances, boundaries, 5)
    assert times.dtype == np.float32
    np.testing.assert_array_equal(times, np.array([1, 0.89, 0.60, 1 / 3, 0.20, 0], np.float32))
    grid = segments.step_grid_of_times(boundaries, times)
    np.testing.assert_array_equal(grid.segment, [0, 0, 0, 1, 1])


@pytest.mark.parametrize("num_scales", [3, 5, 7])
def test_adaptive_times_equal_brute_force_inside_each_segment(num_scales):
    xs = wandering(24, seed=num_scales)
    distances = adaptive.squared_distances([xs])
    boundaries = np.array([1, 14 / 24, 5 / 24, 0], np.float32)
    times = adaptive.adaptive_times(distances, boundaries, num_scales)
    assert len(times) == num_scales + 1
    expected = 0
    counts = segments.steps_per_segment(num_scales, 3)
    for (i, j), count in zip([(0, 10), (10, 19), (19, 24)], counts, strict=True):
        # Time inside the slice is measured in its own length, and cost goes with one over it.
        expected += brute_force(xs[i : j + 1], count, 1) * 24 / (j - i)
    assert adaptive.cost_curve(distances, times).cost == pytest.approx(expected, rel=1e-9)


def test_every_fine_step_may_be_a_step():
    distances = adaptive.squared_distances([wandering(12)])
    times = adaptive.adaptive_times(distances, segments.uniform_boundaries(3), 12)
    np.testing.assert_allclose(times, np.linspace(1, 0, 13), atol=1e-7)
    assert adaptive.cost_curve(distances, times).cost == pytest.approx(0, abs=1e-9)


def test_invalid_numbers_of_segments_or_steps_and_trajectories_are_errors():
    xs = wandering(10)
    distances = adaptive.squared_distances([xs])
    for k in (0, 11):
        with pytest.raises(InputError, match=r"do not fit: use training\.reflow_t from 1 to 10"):
            adaptive.adaptive_boundaries(xs, k)
    with pytest.raises(InputError, match=r"0's 6 of num_scales = 11 .* do not fit into its 5 of 10 .*lower model"):
        adaptive.adaptive_times(distances, segments.uniform_boundaries(2), 11)
    with pytest.raises(ValueError, match="cannot cover"):
        adaptive.adaptive_times(distances, segments.uniform_boundaries(2), 1)
    for shape in [(1, 4, 2), (3, 0, 2)]:
        with pytest.raises(ValueError, match="fine trajectory is"):
            adaptive.adaptive_boundaries(np.zeros(shape, np.float32), 1)
    for bad in (np.nan, np.inf):
        broken = xs.copy()
        broken[4, 2] = bad
        with pytest.raises(InputError, match="not finite: the weights are damaged"):
            adaptive.adaptive_boundaries(broken, 2)


def test_fine_step_spans_need_no_trajectory_and_refuse_steps_that_do_not_fit():
    assert adaptive.fine_step_spans(segments.uniform_boundaries(2), 500, 500) == [(0, 250, 250), (250, 500, 250)]
    with pytest.raises(InputError, match="1000 of num_scales = 1000"):
        adaptive.fine_step_spans(segments.uniform_boundaries(1), 1000, 500)
    with pytest.raises(InputError, match=r"segment 3's 10 of .* do not fit into its 5 of 500"):
        adaptive.fine_step_spans(np.float32([1, 0.7, 0.3, 0.01, 0]), 40, 500)


def test_full_size_trajectory_in_little_memory():
    # M = 500, 128 noises of 3 x 32 x 32: 788 MB, which nothing may copy whole.
    rng = np.random.default_rng(0)
    noise, data = rng.normal(size=(2, 128, 32, 32, 3)).astype(np.float32)
    xs = np.empty((501, *noise.shape), np.float32)
    for m in range(501):
        s = np.float32(m / 500)
        np.multiply(data, s + np.exp(-8 * s), out=xs[m])
        xs[m] += noise
    tracemalloc.start()
    boundaries = adaptive.adaptive_boundaries(xs, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * xs.nbytes
    # The bend decays exponentially from the noise on, so the pieces grow towards the data.
    assert np.all(np.diff(-np.diff(boundaries)) > 0)
