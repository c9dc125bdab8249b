"""Trajectory sets: the teacher's states of the same noise at all boundaries."""

import itertools
import json
import os

import numpy as np
import pair_maker
import pytest
from pair_maker import arrays_of, digests, stream

import segments
from pairs import npz
from pairs.reader import PairSet, TrajectorySet, check_same_teacher
from utils import InputError

SETTINGS = {"reflow_pairs": "trajectory", "pairs": 23, "file_size": 8}  # neither is a multiple of k = 3


@pytest.fixture(scope="module")
def trajectory_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories") / "trajectories"
    summary = pair_maker.generate(folder, **SETTINGS)
    assert (summary.pairs, summary.files, summary.complete) == (23, 3, True)
    assert len(summary.nfe) == 3
    assert sum(summary.nfe) * 23 / 4 <= 1.3 * summary.calls  # of two devices, which solve 2 noises at a time
    return folder


def test_states_are_on_the_teachers_flow_of_unit_noise_at_every_boundary(trajectory_folder):
    xs, boundaries = arrays_of(trajectory_folder)["xs"], segments.uniform_boundaries(3)
    assert (xs.shape, xs.dtype) == ((23, 4, *pair_maker.SHAPE), np.float32)
    assert abs(xs[:, 0].mean()) < 4 / xs[:, 0].size ** 0.5
    assert abs(xs[:, 0].std() - 1) < 4 / (2 * xs[:, 0].size) ** 0.5
    for i, t in enumerate(boundaries[1:], 1):
        np.testing.assert_allclose(xs[:, i], pair_maker.flow(xs[:, 0], 1.0, t), atol=1e-3)
    assert (trajectory_folder.parent / "trajectories.png").stat().st_size > 1000


def test_the_noise_and_the_end_are_those_of_one_segments_pairs(trajectory_folder, tmp_path):
    xs = arrays_of(trajectory_folder)["xs"]
    pair_maker.generate(tmp_path / "p", boundaries=[1, 0], pairs=23, file_size=8)
    pairs = arrays_of(tmp_path / "p")
    np.testing.assert_array_equal(pairs["x1"], xs[:, 0])
    np.testing.assert_allclose(pairs["x0"], xs[:, -1], atol=1e-3)


def test_the_manifest_says_what_it_is_and_counts_trajectories(trajectory_folder):
    manifest = json.loads((trajectory_folder / "manifest.json").read_text())
    assert (manifest["reflow_pairs"], manifest["pairs"], manifest["files"]) == ("trajectory", 23, 3)
    assert "inverted_pairs" not in manifest
    assert manifest["complete"]
    trajectories = TrajectorySet(trajectory_folder, expect={"k": 3, "teacher": "known"})
    assert (len(trajectories), trajectories.k, trajectories.image_shape) == (23, 3, pair_maker.SHAPE)
    with pytest.raises(InputError, match="teacher = known, but this run has another"):
        TrajectorySet(trajectory_folder, expect={"teacher": "another"})


def test_batches_are_all_trajectories_in_every_epoch_and_can_start_anywhere(trajectory_folder):
    stored = {xs.tobytes() for xs in arrays_of(trajectory_folder)["xs"]}
    batches = stream(TrajectorySet(trajectory_folder), 23, 6, seed=3)
    assert all(batch.keys() == {"states"} and batch["states"].shape == (6, 4, *pair_maker.SHAPE) for batch in batches)
    order = [states.tobytes() for batch in batches for states in batch["states"]]
    for first in range(0, 6 * 23, 23):
        assert set(order[first : first + 23]) == stored
    (later,) = stream(TrajectorySet(trajectory_folder), 1, 6, seed=3, start=17)
    np.testing.assert_array_equal(later["states"], batches[17]["states"])
    shares = [stream(TrajectorySet(trajectory_folder), 2, 3, seed=3, shard=(host, 2)) for host in range(2)]
    for n in range(2):
        halves = np.concatenate([share[n]["states"] for share in shares])
        np.testing.assert_array_equal(halves, batches[n]["states"])


def test_interrupted_and_shared_sets_end_in_the_same_bytes(trajectory_folder, tmp_path):
    folder = tmp_path / "p"
    assert [pair_maker.generate(folder, worker=(i, 2), **SETTINGS).files for i in (2, 1)] == [1, 2]
    assert digests(folder) == digests(trajectory_folder)
    os.truncate(folder / "reflow_batch_3.npz", 500)
    (folder / "reflow_batch_1.npz").unlink()
    assert pair_maker.generate(folder, **SETTINGS).files == 2
    assert digests(folder) == digests(trajectory_folder)


def test_kills_leave_the_same_set(tmp_path):
    many = {**SETTINGS, "pairs": 300, "file_size": 4, "batch_size": 4}
    pair_maker.generate(tmp_path / "undisturbed", **many)
    folder = tmp_path / "p"
    for count in (1, 20, 45):
        worker = pair_maker.process(folder=folder, **many)
        while worker.is_alive() and len(npz.pair_file_numbers(folder)) < count:
            worker.join(0.001)
        assert worker.is_alive()
        worker.kill()
        worker.join()
    assert 45 <= 75 - pair_maker.generate(folder, **many).files < 75
    assert digests(folder) == digests(tmp_path / "undisturbed")


def test_half_precision_starts_from_the_rounded_noise(tmp_path):
    pair_maker.generate(tmp_path / "p", **SETTINGS, dtype="float16")
    xs = arrays_of(tmp_path / "p")["xs"]
    assert xs.dtype == np.float16
    np.testing.assert_allclose(xs[:, 3], pair_maker.flow(xs[:, 0].astype(np.float64), 1.0, 0.0), atol=3e-3)
    assert stream(TrajectorySet(tmp_path / "p"), 1, 4, seed=0)[0]["states"].dtype == np.float32


def test_pairs_and_trajectories_are_told_apart(trajectory_folder, whole_set, tmp_path):
    for kind, folder, line in (
        (PairSet, trajectory_folder, "reflow_pairs = trajectory, but this run has segments"),
        (TrajectorySet, whole_set, "reflow_pairs = segments, but this run has trajectory"),
        (TrajectorySet, tmp_path, "no pairs in .*reflow_pairs=trajectory"),
    ):
        with pytest.raises(InputError, match=line):
            kind(folder)
    with pytest.raises(InputError, match="reflow_pairs = trajectory, but this run makes them with segments"):
        pair_maker.generate(trajectory_folder, pairs=23, file_size=8, boundaries=[1, 0.5, 0])


@pytest.mark.parametrize(
    ("array", "line"),
    [
        (np.zeros((8, 3, 6, 5, 1), np.float32), "its k is 2 where the manifest has 3"),
        (np.zeros((8, 4, 6, 5), np.float32), "its array xs is float32"),
        (np.zeros((8, 4, 6, 5, 2), np.float32), "its image_shape is"),
        (np.zeros((7, 4, 6, 5, 1), np.float32), "its pairs is 7"),
        (np.full((8, 4, 6, 5, 1), None, object), "pickled Python objects"),
    ],
)
def test_a_file_of_other_trajectories_is_refused(trajectory_folder, tmp_path, array, line):
    for path in trajectory_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    np.savez(tmp_path / "reflow_batch_2.npz", xs=array)
    with pytest.raises(InputError, match=rf"reflow_batch_2\.npz is broken: .*{line}"):
        TrajectorySet(tmp_path)


def test_pairs_and_trajectories_of_different_teachers_or_segments_are_not_used_together(
    trajectory_folder, whole_set, tmp_path
):
    trajectories = TrajectorySet(trajectory_folder)
    check_same_teacher(trajectories, PairSet(whole_set))
    changes = [
        ({"teacher": "new"}, "teacher = known, but the pairs in .* with new"),
        ({"boundaries": [1, 0.7, 0.3, 0]}, "boundaries = "),
    ]
    for n, (change, line) in enumerate(changes):
        pair_maker.generate(tmp_path / str(n), pairs=3, **change)
        with pytest.raises(InputError, match=line):
            check_same_teacher(trajectories, PairSet(tmp_path / str(n)))


def test_teachers_with_a_network_for_each_segment_use_the_one_of_the_segment(tmp_path):
    """A velocity that differs between segments: constant i in segment i."""
    import reflow

    plan = pair_maker.plan(tmp_path / "p", **SETTINGS)
    make_velocity = lambda params: lambda x, t, index: params * index.reshape(-1, 1, 1, 1) + 0 * x  # noqa: E731
    reflow.generate(plan, pair_maker.Images(), make_velocity, np.float32(1), batch_size=4, progress=False)
    xs = arrays_of(tmp_path / "p")["xs"]
    for i, (start, end) in enumerate(itertools.pairwise(np.linspace(1, 0, 4))):
        np.testing.assert_allclose(xs[:, i + 1] - xs[:, i], i * 0.999 * (start - end), atol=1e-5)
