import numpy as np
import pytest

import segments


def test_clocks_are_inverse_and_meet_the_checkpoints_ends():
    assert segments.tau_of_t(1.0) == 1e-3
    assert segments.tau_of_t(0.0) == 1.0
    assert segments.label_of_t(0.0) == 999.0
    t = np.linspace(0, 1, 11)
    np.testing.assert_allclose(segments.t_of_tau(segments.tau_of_t(t)), t, atol=1e-15)


@pytest.mark.parametrize(("n", "k", "counts"), [(4, 4, [1, 1, 1, 1]), (10, 4, [3, 3, 2, 2]), (5, 1, [5])])
def test_steps_are_shared_from_the_noise_side(n, k, counts):
    assert segments.steps_per_segment(n, k) == counts
    grid = segments.step_grid(segments.uniform_boundaries(k), n)
    assert np.bincount(grid.segment).tolist() == counts
    assert int(np.sum(grid.starts_segment)) == k


def test_fewer_steps_than_segments_is_an_error_that_says_what_to_use():
    with pytest.raises(ValueError, match="use num_scales >= 4"):
        segments.steps_per_segment(3, 4)


def test_steps_meet_the_boundaries_exactly():
    boundaries = np.float32([1.0, 0.37, 0.11, 0.0])
    grid = segments.step_grid(boundaries, 11)
    assert np.isin(boundaries, np.asarray(grid.ts)).all()
    np.testing.assert_allclose(grid.t_to[:-1], grid.t_from[1:], atol=1e-7)
    for i in range(3):
        steps = np.asarray(grid.t_from - grid.t_to)[np.asarray(grid.segment) == i]
        np.testing.assert_allclose(steps, steps[0], rtol=1e-4)


def test_grid_of_times_finds_each_steps_segment():
    grid = segments.step_grid_of_times(np.float32([1, 0.5, 0]), np.float32([1, 0.9, 0.5, 0.4, 0.1, 0]))
    assert grid.segment.tolist() == [0, 0, 1, 1, 1]
    assert grid.starts_segment.tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("wrong", [[1.0], [1, 0.5, 0.5, 0], [0, 1], [1, 0.2], [[1, 0]]])
def test_boundaries_that_do_not_decrease_from_one_to_zero_are_refused(wrong):
    with pytest.raises(ValueError, match="boundaries must"):
        segments.validate_boundaries(wrong)
