"""Pair generation: what the pairs are, and that every way of making a set ends in the same bytes."""

import concurrent.futures
import contextlib
import errno
import itertools
import json
import logging
import os
import random
import resource
import shutil
import socket
import subprocess
import time

import jax
import numpy as np
import pair_maker
import pytest
from scipy.integrate import solve_ivp

import reflow
import segments
import utils
from pairs import npz
from pairs import plan as pairplan
from utils import InputError


@pytest.fixture(scope="module", autouse=True)
def programs_kept(tmp_path_factory):
    """Compiled programs are kept for the processes and the repetitions of these tests."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory):
    """The folder of a set that was made without disturbance."""
    folder = tmp_path_factory.mktemp("whole") / "reflow_batch"
    summary = pair_maker.generate(folder)
    assert summary.complete
    assert (summary.pairs, summary.files) == (60, 5)
    return folder


def arrays_of(folder):
    """Every array of the set, its files joined in order."""
    files = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    return {name: np.concatenate([file[name] for file in files]) for name in files[0].files}


def test_plan_rounds_up_to_whole_shares_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    plan = pair_maker.plan(tmp_path, pairs=100, file_size=31)
    assert (plan.pairs, plan.file_size, plan.files) == (102, 33, 4)
    assert [plan.count(number) for number in (1, 2, 3, 4)] == [33, 33, 33, 3]
    assert "from 100 to 102" in caplog.text
    assert pair_maker.plan(tmp_path, pairs=10, file_size=10_000).file_size == 12
    for wrong in ({"pairs": 0}, {"file_size": 0}, {"dtype": "int8"}):
        with pytest.raises(InputError, match="reflow"):
            pair_maker.plan(tmp_path, **wrong)


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
    assert pair_maker.digests(tmp_path / "p") == pair_maker.digests(whole_set)
    assert pair_maker.digests(tmp_path / "q") == pair_maker.digests(whole_set)


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
    there = reflow.PairSet(tmp_path / "with").batches(25, 0)
    rebuilt = reflow.PairSet(tmp_path / "without", images=pair_maker.Images()).batches(25, 0)
    for _ in range(20):
        a, b = next(there), next(rebuilt)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    stored = arrays_of(tmp_path / "with")
    assert stored["x0"].dtype == stored["x1"].dtype == np.dtype(dtype)
    if dtype == "float16":  # the solve began from the rounded point
        ends = pair_maker.flow(stored["x1"].astype(np.float64), stored["t1"], stored["t0"])
        assert np.max(np.abs(stored["x0"] - ends)) < 3e-3


def test_a_run_makes_only_what_is_missing_or_broken(whole_set, tmp_path):
    folder = tmp_path / "p"
    shutil.copytree(whole_set, folder)
    (folder / "reflow_batch_2.npz").unlink()
    with open(folder / "reflow_batch_4.npz", "r+b") as file:
        file.truncate(1000)
    kept = (folder / "reflow_batch_1.npz").stat().st_mtime_ns
    summary = pair_maker.generate(folder)
    assert (summary.files, summary.complete) == (2, True)
    assert (folder / "reflow_batch_1.npz").stat().st_mtime_ns == kept
    assert pair_maker.digests(folder) == pair_maker.digests(whole_set)
    assert pair_maker.generate(folder).files == 0


@pytest.fixture(scope="module")
def other_set(tmp_path_factory):
    """The folder of the same set in other bytes, those of another batch."""
    folder = tmp_path_factory.mktemp("other") / "reflow_batch"
    pair_maker.generate(folder, batch_size=2)
    return folder


def test_a_wrong_file_does_not_become_the_right_one_by_running_again(whole_set, other_set, tmp_path):
    folder = tmp_path / "p"
    shutil.copytree(whole_set, folder)
    shutil.copy(other_set / "reflow_batch_2.npz", folder)
    manifest = (folder / "manifest.json").read_bytes()
    with pytest.raises(npz.BrokenFile, match=r"reflow_batch_2\.npz is broken: .*not those.*--repair"):
        pair_maker.generate(folder, worker=(1, 2))  # which has nothing to do
    assert (folder / "manifest.json").read_bytes() == manifest
    (folder / "reflow_batch_3.npz").unlink()
    with pytest.raises(npz.BrokenFile, match=r"reflow_batch_2\.npz is broken: .*not those"):
        pair_maker.generate(folder, worker=(1, 2))  # which makes a file, and would complete the set
    assert not json.loads((folder / "manifest.json").read_text())["complete"]
    assert pair_maker.generate(folder, worker=(2, 2)).files == 1
    assert pair_maker.digests(folder) == pair_maker.digests(whole_set)


@pytest.mark.parametrize("killed_in", ["write_manifest", "_refuse_small_disk", "_make_files"])
def test_a_wrong_file_is_made_again_wherever_its_repair_is_killed(
    whole_set, other_set, tmp_path, monkeypatch, killed_in
):
    folder = tmp_path / "p"
    shutil.copytree(whole_set, folder)
    shutil.copy(other_set / "reflow_batch_2.npz", folder)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pairplan if killed_in == "write_manifest" else reflow, killed_in, kill)
        with pytest.raises(KeyboardInterrupt):
            pair_maker.generate(folder)
    assert pair_maker.generate(folder).files == 1
    assert pair_maker.digests(folder) == pair_maker.digests(whole_set)


def test_the_batch_of_a_device_and_the_bytes_do_not_depend_on_the_number_of_devices(tmp_path):
    ten_of_a_segment = {"pairs": 75, "file_size": 30}  # the last file is shorter
    child = pair_maker.process(devices=1, folder=tmp_path / "one", batch_size=4, **ten_of_a_segment)
    children = [child, pair_maker.process(devices=7, folder=tmp_path / "seven", batch_size=28, **ten_of_a_segment)]
    pair_maker.generate(tmp_path / "two", batch_size=8, **ten_of_a_segment)
    for child in children:
        child.join()
    assert pair_maker.digests(tmp_path / "one") == pair_maker.digests(tmp_path / "two")
    assert pair_maker.digests(tmp_path / "seven") == pair_maker.digests(tmp_path / "two")


def test_no_device_idles_where_files_and_segments_do_not_fill_them(tmp_path, monkeypatch):
    groups, in_groups = [], reflow._in_groups

    def noted(parts, size):
        for group in in_groups(parts, size):
            groups.append([(part.file.number, part.segment, part.count) for part in group])
            yield group

    monkeypatch.setattr(reflow, "_in_groups", noted)
    pair_maker.generate(tmp_path / "p", pairs=45, file_size=15, batch_size=10)  # a part is a segment of a file
    assert groups == [
        [(1, 0, 5), (1, 1, 5)],
        [(1, 2, 5), (2, 0, 5)],
        [(2, 1, 5), (2, 2, 5)],
        [(3, 0, 5), (3, 1, 5)],
        [(3, 2, 5)],
    ]
    pairs = arrays_of(tmp_path / "p")
    np.testing.assert_allclose(pairs["x0"], pair_maker.flow(pairs["x1"], pairs["t1"], pairs["t0"]), atol=1e-3)


def test_any_mix_of_workers_ends_in_the_same_set(whole_set, tmp_path):
    folder = tmp_path / "p"
    assert [pair_maker.generate(folder, worker=(i, 3)).complete for i in (3, 1, 1)] == [False, False, False]
    assert not json.loads((folder / "manifest.json").read_text())["complete"]
    # The second of three never came; one of two takes over and finds the set whole.
    summaries = [pair_maker.generate(folder, worker=(i, 2)) for i in (1, 2)]
    assert summaries[0].complete or summaries[1].complete
    assert pair_maker.digests(folder) == pair_maker.digests(whole_set)


def run_two_hosts(folder):
    """Makes the set in `folder` with two processes that know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [pair_maker.process(hosts=(port, 2, place), folder=folder) for place in (0, 1)]
    for host in hosts:
        host.join()
        assert host.exitcode == 0


def test_two_hosts_make_the_same_set_as_one(whole_set, tmp_path):
    run_two_hosts(tmp_path / "p")
    assert pair_maker.digests(tmp_path / "p") == pair_maker.digests(whole_set)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_broken_file_of_one_host_is_made_again_while_the_other_waits(whole_set, other_set, tmp_path, damage):
    shutil.copytree(whole_set, tmp_path / "p")
    if damage == "cut":
        os.truncate(tmp_path / "p" / "reflow_batch_4.npz", 1000)
    else:
        shutil.copy(other_set / "reflow_batch_4.npz", tmp_path / "p")
    run_two_hosts(tmp_path / "p")
    assert pair_maker.digests(tmp_path / "p") == pair_maker.digests(whole_set)


def test_a_host_waits_until_the_files_of_the_others_are_whole(whole_set, other_set, tmp_path, monkeypatch):
    monkeypatch.setattr(reflow, "POLL_SECONDS", 0.01)
    folder = tmp_path / "p"
    shutil.copytree(whole_set, folder)
    os.truncate(folder / "reflow_batch_2.npz", 1000)
    shutil.copy(other_set / "reflow_batch_4.npz", folder)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(reflow._wait_for_hosts, pair_maker.plan(folder), {1, 2, 4})
        for number in (2, 4):
            time.sleep(0.2)
            assert not waiting.done()
            pairplan.reopen_set(folder, [number])
            shutil.copy(whole_set / npz.file_name(number), folder)
        waiting.result(timeout=60)


def test_twenty_kills_leave_the_same_set(tmp_path):
    many = {"pairs": 1500, "file_size": 6, "batch_size": 2}
    pair_maker.generate(tmp_path / "undisturbed", **many)
    undisturbed = pair_maker.digests(tmp_path / "undisturbed")
    chance, killed, folder = random.Random(0), 0, tmp_path / "0"

    def files():
        return len(npz.pair_file_numbers(folder))

    while killed < 20:
        workers, before = [pair_maker.process(folder=folder, worker=(i, 2), **many) for i in (1, 2)], files()
        if killed:  # the first two die anywhere, in their start too; the others while files are being made
            while files() == before and any(worker.is_alive() for worker in workers):
                time.sleep(0.001)
        for worker in workers:
            time.sleep(chance.uniform(0, 0.05 if killed else 1))
            killed += worker.is_alive()
            worker.kill()
            worker.join()
        if files() == 250 or killed >= 20:  # a set that was made in spite of its kills is followed by the next one
            assert pair_maker.generate(folder, **many).complete
            assert pair_maker.digests(folder) == undisturbed
            folder = tmp_path / str(killed)


@contextlib.contextmanager
def disk_that_fills(tmp_path):
    """(a folder, a function that leaves no room there, one that makes room): a small tmpfs.

    Where mounting is not permitted the limit is the kernel's on the size of a file, whose error is as real.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    ).returncode
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
            return
        with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)) == 4096:
                pass

    def make_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        (folder / "ballast").unlink(missing_ok=True)

    try:
        yield folder, fill, make_room
    finally:
        make_room()
        if mounted:
            subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_is_one_line_and_the_run_goes_on_when_there_is_room(whole_set, tmp_path):
    with disk_that_fills(tmp_path) as (disk, fill, make_room):

        class FillingImages(pair_maker.Images):
            def read(self, start, count):
                if start >= 48:  # the last file; by then the first has been written
                    fill()
                return super().read(start, count)

        folder = disk / "samples" / "reflow_batch"
        with pytest.raises(InputError) as error:
            pair_maker.generate(folder, images=FillingImages())
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)
        assert "is full" in str(error.value)
        assert isinstance(error.value.__cause__, OSError)
        assert error.value.__cause__.errno in (errno.ENOSPC, errno.EFBIG)
        assert not list(folder.glob(".*"))
        make_room()
        assert 0 < pair_maker.generate(folder).files < 5
        assert pair_maker.digests(folder) == pair_maker.digests(whole_set)


def test_a_disk_that_is_too_small_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"bytes free, the pairs that are not there need [\d,]+; make room"):
        pair_maker.generate(tmp_path / "p", pairs=10**13, file_size=10**10)
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["manifest.json"]


def test_a_set_is_made_in_a_bucket(whole_set, tmp_path, monkeypatch):
    pair_maker.mount_bucket(monkeypatch, tmp_path)
    assert pair_maker.generate("gs://bucket/samples/reflow_batch").complete
    assert pair_maker.digests(tmp_path / "samples" / "reflow_batch") == pair_maker.digests(whole_set)
    assert (tmp_path / "samples" / "pairs.png").stat().st_size > 1000
    tensorflow = pytest.importorskip("tensorflow")

    def refuse(*_, **__):
        raise tensorflow.errors.PermissionDeniedError(None, None, "no credentials\nand much more")

    monkeypatch.setattr(pair_maker.Bucket, "makedirs", refuse, raising=False)
    with pytest.raises(InputError, match=r"gs://bucket/other cannot be written: .*no credentials;"):
        pair_maker.generate("gs://bucket/other")


def test_another_set_in_the_folder_is_refused_by_the_first_difference(whole_set, tmp_path):
    before = pair_maker.digests(whole_set)
    for changes, line in (
        ({"seed": 8}, "seed = 7, but this run makes them with 8"),
        ({"teacher": "new"}, "teacher = known, but this run makes them with new"),
        ({"boundaries": segments.uniform_boundaries(2)}, "boundaries = "),
    ):
        with pytest.raises(InputError, match=line):
            pair_maker.generate(whole_set, **changes)
    assert pair_maker.digests(whole_set) == before
    shutil.copytree(whole_set, tmp_path / "p")
    (tmp_path / "p" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"without a manifest\.json"):
        pair_maker.generate(tmp_path / "p")


def test_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "p").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot be written"):
        pair_maker.generate(tmp_path / "p")


def test_a_full_disk_is_noticed_before_the_next_file_is_solved(tmp_path, monkeypatch):
    solved, dispatched = [], reflow._dispatched_ahead

    def counted(*arguments):
        for result in dispatched(*arguments):
            solved.append(result)
            time.sleep(0.01)
            yield result

    def fail(path, **_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(reflow, "_dispatched_ahead", counted)
    monkeypatch.setattr(reflow, "draw_pairs", lambda *_: None)
    monkeypatch.setattr(utils, "write_arrays", fail)
    with pytest.raises(InputError, match="is full"):
        pair_maker.generate(tmp_path / "p", pairs=1200, file_size=600)  # 150 groups a file
    assert 150 <= len(solved) < 225


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


def test_what_kills_have_left_is_cleared_away_when_nobody_can_need_it(tmp_path):
    folder = tmp_path / "samples" / "reflow_batch"
    pair_maker.generate(folder)
    pair_file, manifest = folder / ".reflow_batch_2.npz.0.tmp", folder / ".manifest.json.0.tmp"
    figure = folder.parent / ".pairs.png.0.tmp"
    for path in (pair_file, manifest, figure):
        path.touch()
    pair_maker.generate(folder)
    assert not pair_file.exists()  # the set is complete
    assert manifest.exists()  # another process may be about to name it
    assert figure.exists()
    for path in (manifest, figure):
        os.utime(path, (0, time.time() - 2 * reflow.STALE_SECONDS))
    pair_maker.generate(folder)
    assert not manifest.exists()
    assert not figure.exists()
    assert len(list(folder.parent.iterdir())) == 2


def test_a_solve_that_misses_its_tolerance_stores_nothing(tmp_path):
    def make_velocity(params):
        return lambda x, t, index: params * np.nan * x

    plan = pair_maker.plan(tmp_path / "p")
    with pytest.raises(InputError, match="did not reach"):
        reflow.generate(plan, pair_maker.Images(), make_velocity, np.float32(1), batch_size=4, progress=False)
    assert not list((tmp_path / "p").glob("*.npz"))


def test_of_two_workers_that_begin_at_once_one_manifest_wins(tmp_path, monkeypatch):
    first, second = pair_maker.plan(tmp_path / "p"), pair_maker.plan(tmp_path / "p", boundaries=[1, 0.6, 0.3, 0])
    pairplan.begin_manifest(first, {})
    before = (tmp_path / "p" / "manifest.json").read_bytes()
    # The second looked before the first wrote.
    looks = iter([None])
    real = pairplan.read_manifest
    monkeypatch.setattr(pairplan, "read_manifest", lambda folder: next(looks, real(folder)))
    with pytest.raises(InputError, match="boundaries"):
        pairplan.begin_manifest(second, {})
    assert (tmp_path / "p" / "manifest.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["manifest.json"]


def test_of_two_divisions_found_at_once_the_first_is_taken_over(tmp_path):
    first = pair_maker.plan(tmp_path / "p", boundaries=[1, 0.7, 0.3, 0])
    second = pair_maker.plan(tmp_path / "p", boundaries=[1, 0.6, 0.3, 0])
    assert reflow.claim_plan(first, {"adaptive": True, "cost_adaptive": 1.0}) == first
    assert reflow.claim_plan(second, {"adaptive": True, "cost_adaptive": 2.0}) == first
    assert reflow.read_manifest(tmp_path / "p")["cost_adaptive"] == 1
    params, other = {"one": np.float32(1)}, pair_maker.plan(tmp_path / "p", boundaries=[1, 0.5, 0])
    arguments = (pair_maker.Images(), pair_maker.make_velocity, params)
    assert reflow.generate(second, *arguments, batch_size=4, extra={"adaptive": True}, progress=False).complete
    assert set(arrays_of(tmp_path / "p")["t1"]) == set(np.float32([1, 0.7, 0.3]))
    for plan, extra in ((other, {"adaptive": True}), (second, {"adaptive": False}), (second, {})):
        with pytest.raises(InputError, match="boundaries"):
            reflow.claim_plan(plan, extra)


def test_files_of_two_divisions_do_not_mix_where_a_manifest_was_replaced(tmp_path):
    folder = tmp_path / "p"
    other = pair_maker.plan(tmp_path / "q", boundaries=[1, 0.7, 0.3, 0])
    pairplan.begin_manifest(other, {})

    class Replaced(pair_maker.Images):  # as an object store does, which knows no links
        def read(self, start, count):
            shutil.copy(tmp_path / "q" / "manifest.json", folder)
            return super().read(start, count)

    with pytest.raises(InputError, match="boundaries"):
        pair_maker.generate(folder, images=Replaced())
    assert not list(folder.glob("*.npz"))


def test_extra_entries_stay_in_the_manifest(tmp_path):
    plan = pair_maker.plan(tmp_path / "p", pairs=3)
    params = {"one": np.float32(1)}
    costs = {"adaptive": True, "cost_uniform": 2.0, "cost_adaptive": 1.5}
    arguments = (plan, pair_maker.Images(), pair_maker.make_velocity, params)
    reflow.generate(*arguments, batch_size=4, extra=costs, progress=False)
    reflow.generate(*arguments, batch_size=4, progress=False)
    assert reflow.read_manifest(plan.folder).items() >= costs.items()


def test_worker_names():
    assert reflow.worker_of("2/16") == (2, 16)
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2", ""):
        with pytest.raises(InputError, match="gen_worker"):
            reflow.worker_of(wrong)
