"""Pair generation: what the pairs are, and that their bytes follow from the plan."""

import errno
import itertools
import json
import signal
import threading

import jax
import numpy as np
import pair_maker
import pytest
from pair_maker import arrays_of, digests
from scipy.integrate import solve_ivp

import reflow
import runtime
import sampling
import segments
import utils
from pairs import plan as pairplan
from pairs.manifest import read_manifest
from pairs.reader import PairSet
from utils import InputError


def test_pairs_are_the_ends_of_the_teachers_flow(whole_set):
    pairs = arrays_of(whole_set)
    assert {name: array.dtype for name, array in pairs.items()} == dict.fromkeys(["x0", "x1", "t0", "t1"], np.float32)
    np.testing.assert_allclose(pairs["x0"], pair_maker.flow(pairs["x1"], pairs["t1"], pairs["t0"]), atol=1e-3)
    manifest = json.loads((whole_set / "manifest.json").read_text())
    assert manifest["complete"]
    assert (manifest["k"], manifest["pairs"], manifest["teacher"], manifest["tol"]) == (3, 60, "known", 1e-4)
    assert sorted(manifest["contents"]) == [f"reflow_batch_{i}.npz" for i in range(1, 6)]
    assert (whole_set.parent / "pairs.png").stat().st_size > 1000
    assert sorted(path.name for path in whole_set.iterdir()) == ["manifest.json", *sorted(manifest["contents"])]


def test_end_points_are_as_accurate_as_scipys(tmp_path):
    tol, boundaries = 1e-3, segments.uniform_boundaries(4)
    pair_maker.generate(tmp_path / "p", boundaries=boundaries, pairs=256, file_size=256, tol=tol, batch_size=64)
    pairs = arrays_of(tmp_path / "p")
    velocity = pair_maker.make_velocity({"one": 1.0})

    def scipy_solve(x, t_start, t_end, tol):
        span = (segments.tau_of_t(float(t_start)), segments.tau_of_t(float(t_end)))

        def slope(tau, flat):
            return np.asarray(velocity(flat.reshape(x.shape), np.full(len(x), segments.t_of_tau(tau)), None)).ravel()

        return solve_ivp(slope, span, x.ravel().astype(np.float64), rtol=tol, atol=tol).y[:, -1].reshape(x.shape)

    for t_start, t_end in itertools.pairwise(boundaries):
        rows = np.flatnonzero(pairs["t1"] == t_start)
        x1, x0 = pairs["x1"][rows], pairs["x0"][rows]
        exact = scipy_solve(x1, t_start, t_end, 1e-7)
        ours = np.sqrt(np.mean((x0 - exact) ** 2))
        scipys = np.sqrt(np.mean((scipy_solve(x1, t_start, t_end, tol) - exact) ** 2))
        assert ours <= 3 * scipys + tol


def test_the_same_set_is_made_again_bit_for_bit_by_any_number_of_devices(whole_set, tmp_path):
    child = pair_maker.process(devices=1, folder=tmp_path / "p", batch_size=2)
    pair_maker.generate(tmp_path / "q", batch_size=4)
    child.join()
    assert digests(tmp_path / "p") == digests(whole_set)
    assert digests(tmp_path / "q") == digests(whole_set)


def test_the_batch_changes_the_ends_within_the_tolerance_and_nothing_else(whole_set, tmp_path):
    pair_maker.generate(tmp_path / "p", batch_size=2)
    there, here = arrays_of(whole_set), arrays_of(tmp_path / "p")
    for name in ("x1", "t0", "t1"):
        np.testing.assert_array_equal(here[name], there[name])
    np.testing.assert_allclose(here["x0"], there["x0"], atol=1e-3)
    assert not np.array_equal(here["x0"], there["x0"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_noise_that_is_not_stored_is_rebuilt_bit_for_bit(tmp_path, dtype):
    for name, stored in (("with", True), ("without", False)):
        pair_maker.generate(
            tmp_path / name, store_noise=stored, dtype=dtype, dequantize=True, pairs=240, file_size=60, batch_size=40
        )
    bytes_with, bytes_without = (
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.npz")) for name in ("with", "without")
    )
    assert bytes_without < bytes_with
    there = PairSet(tmp_path / "with").batches(25, 0)
    rebuilt = PairSet(tmp_path / "without", images=pair_maker.Images()).batches(25, 0)
    for _ in range(20):
        a, b = next(there), next(rebuilt)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    stored = arrays_of(tmp_path / "with")
    assert stored["x0"].dtype == stored["x1"].dtype == np.dtype(dtype)
    if dtype == "float16":  # the solve began from the rounded point
        ends = pair_maker.flow(stored["x1"].astype(np.float64), stored["t1"], stored["t0"])
        assert np.max(np.abs(stored["x0"] - ends)) < 3e-3


def test_the_batch_of_a_device_and_the_bytes_do_not_depend_on_the_number_of_devices(tmp_path):
    ten_of_a_segment = {"pairs": 75, "file_size": 30}  # the last file is shorter
    child = pair_maker.process(devices=1, folder=tmp_path / "one", batch_size=4, **ten_of_a_segment)
    children = [child, pair_maker.process(devices=7, folder=tmp_path / "seven", batch_size=28, **ten_of_a_segment)]
    pair_maker.generate(tmp_path / "two", batch_size=8, **ten_of_a_segment)
    for child in children:
        child.join()
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert digests(tmp_path / "seven") == digests(tmp_path / "two")


def test_no_device_idles_where_files_and_segments_do_not_fill_them(tmp_path, monkeypatch):
    groups, dispatched_ahead = [], reflow._dispatched_ahead

    def noted(solve, of_devices):
        for group, solved in dispatched_ahead(solve, of_devices):
            groups.append([(batch.file.number, batch.segment, batch.count) for batch in group])
            yield group, solved

    monkeypatch.setattr(reflow, "_dispatched_ahead", noted)
    pair_maker.generate(tmp_path / "p", pairs=45, file_size=15, batch_size=10)  # a batch is a segment of a file
    assert groups == [
        [(1, 0, 5), (1, 1, 5)],
        [(1, 2, 5), (2, 0, 5)],
        [(2, 1, 5), (2, 2, 5)],
        [(3, 0, 5), (3, 1, 5)],
        [(3, 2, 5)],
    ]
    pairs = arrays_of(tmp_path / "p")
    np.testing.assert_allclose(pairs["x0"], pair_maker.flow(pairs["x1"], pairs["t1"], pairs["t0"]), atol=1e-3)


def test_a_set_is_made_in_a_bucket(whole_set, tmp_path, monkeypatch):
    pair_maker.mount_bucket(monkeypatch, tmp_path)
    assert pair_maker.generate("gs://bucket/samples/reflow_batch").complete
    assert digests(tmp_path / "samples" / "reflow_batch") == digests(whole_set)
    assert (tmp_path / "samples" / "pairs.png").stat().st_size > 1000
    tensorflow = pytest.importorskip("tensorflow")

    def refuse(*_, **__):
        raise tensorflow.errors.PermissionDeniedError(None, None, "no credentials\nand much more")

    monkeypatch.setattr(pair_maker.Bucket, "makedirs", refuse, raising=False)
    with pytest.raises(InputError, match=r"gs://bucket/other cannot be written: .*no credentials"):
        pair_maker.generate("gs://bucket/other")


def test_a_full_disk_is_noticed_before_the_next_file_is_solved(tmp_path, monkeypatch):
    solved, failed, dispatched_ahead = [], threading.Event(), reflow._dispatched_ahead

    def counted(*arguments):
        for result in dispatched_ahead(*arguments):
            solved.append(result)
            if len(solved) > 150:  # groups of a file
                failed.wait(60)
            yield result

    def fail(path, **_):
        failed.set()
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(reflow, "_dispatched_ahead", counted)
    monkeypatch.setattr(reflow.plots, "draw_pairs", lambda *_: None)
    monkeypatch.setattr(utils, "write_arrays", fail)
    with pytest.raises(InputError, match="is full"):
        pair_maker.generate(tmp_path / "p", pairs=1200, file_size=600)
    assert 150 <= len(solved) < 300


def test_a_stopped_generation_keeps_whole_files_and_goes_on_to_the_same_bytes(whole_set, tmp_path, monkeypatch):
    solved = reflow._finished_files

    def solve_and_signal(plan, *arguments):
        files = solved(plan, *arguments)
        if files:
            monkeypatch.setattr(runtime.preemption, "requested", signal.SIGTERM)
        return files

    with monkeypatch.context() as patch:
        patch.setattr(reflow, "_finished_files", solve_and_signal)
        with pytest.raises(runtime.Preempted):
            pair_maker.generate(tmp_path / "p")
    monkeypatch.setattr(runtime.preemption, "requested", None)
    assert [path.name for path in (tmp_path / "p").glob("*.npz")] == ["reflow_batch_1.npz"]
    assert not list((tmp_path / "p").glob(".*.tmp"))
    pair_maker.generate(tmp_path / "p")
    assert digests(tmp_path / "p") == digests(whole_set)


def test_a_batch_that_the_devices_cannot_hold_is_one_line(tmp_path):
    def make_velocity(params):
        def velocity(x, t, index):
            wide = jax.numpy.sort(params * x.ravel()[0] + jax.numpy.arange(2**45, dtype=np.float32))
            return x * wide[3]

        return velocity

    plan = pair_maker.plan(tmp_path / "p")
    with pytest.raises(InputError, match=r"training\.gen_reflow_size = 4 is too large for the memory") as error:
        reflow.generate(plan, pair_maker.Images(), make_velocity, np.float32(1), batch_size=4, progress=False)
    assert "\n" not in str(error.value)


def test_a_solve_that_misses_its_tolerance_stores_nothing(tmp_path):
    def make_velocity(params):
        return lambda x, t, index: params * np.nan * x

    plan = pair_maker.plan(tmp_path / "p")
    with pytest.raises(InputError, match="did not reach"):
        reflow.generate(plan, pair_maker.Images(), make_velocity, np.float32(1), batch_size=4, progress=False)
    assert not list((tmp_path / "p").glob("*.npz"))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("centered", [True, False])
def test_inverted_pairs_end_at_real_points_and_solved_forward_come_back_to_them(tmp_path, k, centered):
    boundaries = segments.uniform_boundaries(k)
    settings = {"boundaries": boundaries, "pairs": 24, "file_size": 24, "centered": centered, "flip": False}
    pair_maker.generate(tmp_path / "p", inverted_pairs=0.5, **settings)
    pairs = arrays_of(tmp_path / "p")
    plan = pair_maker.plan(tmp_path / "p", inverted_pairs=0.5, **settings)
    layout = pairplan.file_layout(plan, 1)
    assert np.bincount(layout.segment[layout.inverted]).tolist() == [12 // k] * k
    images = pair_maker.Images().read(0, 24) / 255
    for row in np.flatnonzero(layout.inverted):
        t0, x0 = pairs["t0"][row], pairs["x0"][row]
        data = images[row] * 2 - 1 if centered else images[row]
        noise = np.random.Generator(np.random.Philox(key=[7, row])).standard_normal(x0.shape, np.float32)
        np.testing.assert_allclose(x0, segments.noisy_image(data, noise, segments.tau_of_t(t0)), atol=1e-6)
        if t0 == 0:
            np.testing.assert_allclose(x0, data, atol=1e-6)
    # All lie on the flow in closed form, and the solver comes back to where the inverted pairs began.
    ends = pair_maker.flow(pairs["x1"], pairs["t1"], pairs["t0"])
    np.testing.assert_allclose(pairs["x0"], ends, atol=1e-3)
    velocity = pair_maker.make_velocity({"one": 1.0})
    for i in range(k):
        rows = np.flatnonzero(layout.inverted & (layout.segment == i))
        again = sampling.solve_segment(
            velocity, jax.numpy.asarray(pairs["x1"][rows]), *boundaries[i : i + 2], i, tol=1e-4
        )
        np.testing.assert_allclose(again.x, pairs["x0"][rows], atol=1e-3)


def test_ordinary_pairs_start_from_the_same_points_whatever_the_share_of_inverted_ones(whole_set, tmp_path):
    pair_maker.generate(tmp_path / "p", inverted_pairs=0.25)
    with_inverted, without = arrays_of(tmp_path / "p"), arrays_of(whole_set)
    plan = pair_maker.plan(tmp_path / "p", inverted_pairs=0.25)
    layouts = [pairplan.file_layout(plan, number) for number in range(1, 6)]
    assert [np.bincount(layout.segment[layout.inverted]).tolist() for layout in layouts] == [[1, 1, 1]] * 5
    ordinary = ~np.concatenate([layout.inverted for layout in layouts])
    for name in ("t0", "t1"):
        np.testing.assert_array_equal(with_inverted[name], without[name])
    np.testing.assert_array_equal(with_inverted["x1"][ordinary], without["x1"][ordinary])
    assert read_manifest(tmp_path / "p")["inverted_pairs"] == 0.25
    assert "inverted_pairs" not in read_manifest(whole_set)
    with pytest.raises(InputError, match=r"inverted_pairs = 0\.25, but this run makes them with 0\.0"):
        pair_maker.generate(tmp_path / "p")
    with pytest.raises(InputError, match=r"inverted_pairs = 0\.0, but this run makes them with 1\.0"):
        pair_maker.generate(whole_set, inverted_pairs=1.0)


def test_a_set_of_inverted_pairs_alone_is_resumed_to_the_same_bytes(tmp_path):
    pair_maker.generate(tmp_path / "p", inverted_pairs=1.0, dtype="float16")
    for worker in ((2, 2), (1, 2)):
        pair_maker.generate(tmp_path / "q", inverted_pairs=1.0, dtype="float16", worker=worker)
    assert digests(tmp_path / "q") == digests(tmp_path / "p")
    pairs = arrays_of(tmp_path / "p")
    assert pairs["x0"].dtype == np.float16
    ends = pair_maker.flow(pairs["x1"].astype(np.float64), pairs["t1"], pairs["t0"])
    np.testing.assert_allclose(pairs["x0"], ends, atol=5e-3)


def test_files_have_the_arrays_of_their_format_in_its_order(whole_set, tmp_path):
    """The order decides the bytes of a file: sets that were begun by an older version go on with the same."""
    pair_maker.generate(tmp_path / "p", store_noise=False, pairs=3)
    assert np.load(whole_set / "reflow_batch_1.npz").files == ["x0", "x1", "t0", "t1"]
    keyed = ["x0", "image", "flip", "key", "x1_crc", "t0", "t1"]
    assert np.load(tmp_path / "p" / "reflow_batch_1.npz").files == keyed
    names = ["complete", "boundaries", "pairs", "file_size", "image_shape", "dataset", "dataset_size", "centered"]
    names += ["flip", "dequantize", "seed", "teacher", "tol", "solver", "error_norm", "dtype", "store_noise", "k"]
    assert list(read_manifest(whole_set)) == [*names, "files", "format", "contents"]
