"""Workers, hosts, kills and full disks: every way of making a set ends in the same bytes."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import time

import pair_maker
import pytest
from pair_maker import digests

import reflow
import utils
from pairs import manifest as pairmanifest
from pairs import npz, workers
from utils import InputError


@pytest.fixture(scope="module")
def other_set(tmp_path_factory):
    """The folder of the same set in other bytes, those of another batch."""
    folder = tmp_path_factory.mktemp("other") / "reflow_batch"
    pair_maker.generate(folder, batch_size=2)
    return folder


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
    assert digests(folder) == digests(whole_set)
    assert pair_maker.generate(folder).files == 0


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
    assert digests(folder) == digests(whole_set)


@pytest.mark.parametrize("killed_in", [(utils, "write_json"), (workers, "_check_disk_space"), (reflow, "_make_files")])
def test_a_wrong_file_is_made_again_wherever_its_repair_is_killed(
    whole_set, other_set, tmp_path, monkeypatch, killed_in
):
    folder = tmp_path / "p"
    shutil.copytree(whole_set, folder)
    shutil.copy(other_set / "reflow_batch_2.npz", folder)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*killed_in, kill)
        with pytest.raises(KeyboardInterrupt):
            pair_maker.generate(folder)
    assert pair_maker.generate(folder).files == 1
    assert digests(folder) == digests(whole_set)


def test_any_mix_of_workers_ends_in_the_same_set(whole_set, tmp_path):
    folder = tmp_path / "p"
    assert [pair_maker.generate(folder, worker=(i, 3)).complete for i in (3, 1, 1)] == [False, False, False]
    assert not json.loads((folder / "manifest.json").read_text())["complete"]
    # The second of three never came; one of two takes over and finds the set whole.
    summaries = [pair_maker.generate(folder, worker=(i, 2)) for i in (1, 2)]
    assert summaries[0].complete or summaries[1].complete
    assert digests(folder) == digests(whole_set)


def run_two_hosts(folder):
    """Makes the set in `folder` with two processes that know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [pair_maker.process(hosts=(port, 2, host_index), folder=folder) for host_index in (0, 1)]
    for host in hosts:
        host.join()
        assert host.exitcode == 0


def test_two_hosts_make_the_same_set_as_one(whole_set, tmp_path):
    run_two_hosts(tmp_path / "p")
    assert digests(tmp_path / "p") == digests(whole_set)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_broken_file_of_one_host_is_made_again_while_the_other_waits(whole_set, other_set, tmp_path, damage):
    shutil.copytree(whole_set, tmp_path / "p")
    if damage == "cut":
        os.truncate(tmp_path / "p" / "reflow_batch_4.npz", 1000)
    else:
        shutil.copy(other_set / "reflow_batch_4.npz", tmp_path / "p")
    run_two_hosts(tmp_path / "p")
    assert digests(tmp_path / "p") == digests(whole_set)


def test_a_host_waits_until_the_files_of_the_others_are_whole(whole_set, other_set, tmp_path, monkeypatch):
    folder = tmp_path / "p"
    shutil.copytree(whole_set, folder)
    os.truncate(folder / "reflow_batch_2.npz", 1000)
    shutil.copy(other_set / "reflow_batch_4.npz", folder)
    broken = [2, 4]

    def repair_one(seconds):
        number = broken.pop(0)
        pairmanifest.reopen_set(folder, [number])
        shutil.copy(whole_set / npz.file_name(number), folder)

    monkeypatch.setattr(workers.time, "sleep", repair_one)  # what the other host does meanwhile
    workers.wait_for_files(pair_maker.plan(folder), {1, 2, 4})
    assert not broken


def test_twenty_kills_leave_the_same_set(tmp_path):
    many = {"pairs": 1500, "file_size": 6, "batch_size": 2}
    pair_maker.generate(tmp_path / "undisturbed", **many)
    undisturbed = digests(tmp_path / "undisturbed")
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
            assert digests(folder) == undisturbed
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
        assert digests(folder) == digests(whole_set)


def test_a_disk_that_is_too_small_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"bytes free, the missing pairs need [\d,]+; free some space"):
        pair_maker.generate(tmp_path / "p", pairs=10**13, file_size=10**10)
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["manifest.json"]


def test_a_dangling_symlink_is_refused(tmp_path):
    (tmp_path / "p").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot be written.*dangling symlink"):
        pair_maker.generate(tmp_path / "p")


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
        os.utime(path, (0, time.time() - 2 * workers.STALE_SECONDS))
    pair_maker.generate(folder)
    assert not manifest.exists()
    assert not figure.exists()
    assert len(list(folder.parent.iterdir())) == 2


def test_worker_names():
    assert workers.worker_of("2/16") == (2, 16)
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2", ""):
        with pytest.raises(InputError, match="gen_worker"):
            workers.worker_of(wrong)
