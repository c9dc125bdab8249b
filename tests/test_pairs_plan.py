"""The plan of a pair set: layouts of files and start points."""

import logging

import numpy as np
import pair_maker
import pytest

from pairs import plan as pairplan


def test_plan_rounds_up_to_whole_shares_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    plan = pair_maker.plan(tmp_path, pairs=100, file_size=31)
    assert (plan.pairs, plan.file_size, plan.files) == (102, 33, 4)
    assert [plan.count(number) for number in (1, 2, 3, 4)] == [33, 33, 33, 3]
    assert "from 100 to 102" in caplog.text
    assert pair_maker.plan(tmp_path, pairs=10, file_size=10_000).file_size == 12


def test_layout_shares_segments_equally_and_follows_from_the_number_alone(tmp_path):
    plan = pair_maker.plan(tmp_path, pairs=3000, file_size=600)
    layouts = [pairplan.file_layout(plan, number) for number in range(1, plan.files + 1)]
    for number, layout in enumerate(layouts, 1):
        assert np.bincount(layout.segment).tolist() == [200, 200, 200]
        assert not np.array_equal(layout.segment, layouts[0].segment) or number == 1
        np.testing.assert_array_equal(layout.t1, np.float32(plan.boundaries)[layout.segment])
        np.testing.assert_array_equal(layout.t0, np.float32(plan.boundaries)[layout.segment + 1])
        place = (number - 1) * 600 + np.arange(600)
        np.testing.assert_array_equal(layout.image, np.where(layout.segment > 0, place % 50, -1))
        assert 0.4 < layout.flip[layout.segment > 0].mean() < 0.6
        assert not layout.flip[layout.segment == 0].any()
    keys = np.concatenate([layout.key for layout in layouts])
    assert len(np.unique(keys, axis=0)) == 3000
    other = pairplan.file_layout(pair_maker.plan(tmp_path, pairs=3000, file_size=600, seed=8), 1)
    assert not np.array_equal(other.segment, layouts[0].segment)


@pytest.mark.parametrize("centered", [True, False])
def test_start_points_are_images_and_unit_noise_in_the_right_parts(centered):
    n, t = 400, np.float32(0.25)
    tau = 1e-3 + (1 - 1e-3) * 0.75
    images = np.broadcast_to(np.arange(30, dtype=np.uint8).reshape(1, 6, 5, 1) * 8, (n, 6, 5, 1))
    key = np.stack([np.full(n, 7), np.arange(n)], axis=1).astype(np.uint32)
    flip = np.arange(n) % 2 == 1
    how = {"centered": centered, "dequantize": False, "dtype": "float32"}
    x1 = pairplan.start_points(images, flip, key, np.full(n, t), **how)
    data = images / 255 * 2 - 1 if centered else images / 255
    data = np.where(flip[:, None, None, None], data[:, :, ::-1], data)
    noise = (x1 - tau * data) / (1 - tau)
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.size) ** 0.5
    assert abs(np.corrcoef(noise[0::2].ravel(), noise[1::2].ravel())[0, 1]) < 0.05
    # At t = 1 the same key gives that noise itself.
    np.testing.assert_allclose(
        pairplan.start_points(images, flip, key, np.ones(n, np.float32), **how), noise, atol=2e-5
    )


def test_start_points_of_a_row_do_not_depend_on_the_others():
    layout = pairplan.file_layout(pair_maker.plan("unused", pairs=300, file_size=300), 1)
    images = pair_maker.Images().read(0, 300)
    for dtype in ("float32", "float16"):
        how = {"centered": True, "dequantize": True, "dtype": dtype}
        whole = pairplan.start_points(images, layout.flip, layout.key, layout.t1, **how)
        rows = np.random.default_rng(0).permutation(300)[:37]
        some = pairplan.start_points(images[rows], layout.flip[rows], layout.key[rows], layout.t1[rows], **how)
        np.testing.assert_array_equal(some.view(np.uint8), whole[rows].view(np.uint8))


def test_dequantization_adds_less_than_one_level():
    n = 300
    images = np.full((n, 6, 5, 1), 255, np.uint8)
    key = np.stack([np.full(n, 7), np.arange(n)], axis=1).astype(np.uint32)
    arguments = (images, np.zeros(n, bool), key, np.zeros(n, np.float32))  # at t = 0 there is no noise
    x1 = pairplan.start_points(*arguments, centered=False, dequantize=True, dtype="float32")
    assert 255 / 256 <= x1.min() < x1.max() <= 1
    assert abs(x1.mean() - 255.5 / 256) < 1e-4
