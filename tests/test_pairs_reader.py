"""Reading pair sets: what is refused, and what the endless stream of batches is."""

import itertools
import json
import logging
import shutil
import subprocess
import threading
import zipfile

import numpy as np
import pair_maker
import pytest
from pair_maker import flip_byte, names_of, rewrite, stream, truncate

import segments
from pairs import npz, reader
from pairs import plan as pairplan
from pairs.reader import PairSet
from utils import InputError


def test_a_set_says_what_it_is(large_set):
    pair_set = PairSet(large_set)
    assert len(pair_set) == 174
    assert pair_set.k == 3
    assert pair_set.image_shape == pair_maker.SHAPE
    np.testing.assert_array_equal(pair_set.boundaries, segments.uniform_boundaries(3))
    assert pair_set.manifest["teacher"] == "known"


def test_batches_hold_pairs_that_belong_together(large_set):
    for batch in stream(large_set, 4, 50, seed=0):
        assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
            "x0": (np.float32, (50, *pair_maker.SHAPE)),
            "x1": (np.float32, (50, *pair_maker.SHAPE)),
            "t0": (np.float32, (50,)),
            "t1": (np.float32, (50,)),
            "index": (np.int32, (50,)),
        }
        boundaries = segments.uniform_boundaries(3)
        np.testing.assert_array_equal(batch["t1"], boundaries[batch["index"]])
        np.testing.assert_array_equal(batch["t0"], boundaries[batch["index"] + 1])
        ends = pair_maker.flow(batch["x1"], batch["t1"], batch["t0"])
        np.testing.assert_allclose(batch["x0"], ends, atol=1e-3)


def test_every_epoch_has_every_pair_once_in_another_order(large_set):
    order = names_of(stream(large_set, 30, 29, seed=0))  # 870 = 5 x 174, epochs end inside batches of other sizes
    assert names_of(stream(large_set, 10, 87, seed=0)) == order
    epochs = [order[first : first + 174] for first in range(0, 870, 174)]
    assert all(len(set(epoch)) == 174 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert {frozenset(epoch) for epoch in epochs} == {frozenset(order)}
    assert len({frozenset(epoch[:48]) for epoch in epochs}) == 5  # the pairs of the first four files, which are others
    assert names_of(stream(large_set, 6, 29, seed=1)) != epochs[0]


def test_the_shuffle_mixes_files_and_pairs(large_set):
    place = {}
    for number in npz.pair_file_numbers(large_set):
        for row, x1 in enumerate(np.load(large_set / npz.file_name(number))["x1"]):
            place[x1.tobytes()] = (number, row)
    order = [place[name] for name in names_of(stream(large_set, 1, 174, seed=0))]
    files = np.array([number for number, _ in order])
    assert len(set(files[:48])) == reader.GROUP_FILES
    assert np.mean(np.diff(files) != 0) > 0.6  # 3/4 if neighbours are independent
    assert abs(np.corrcoef(np.arange(48), [row for _, row in order[:48]])[0, 1]) < 0.5


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_the_stream_that_one_host_reads(large_set, hosts):
    one = stream(large_set, 12, 6 * hosts, seed=5)
    shares = [stream(large_set, 12, 6, seed=5, shard=(host, hosts)) for host in range(hosts)]
    for n, batch in enumerate(one):
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([share[n][name] for share in shares]), batch[name])
    epoch = [name for share in shares for name in names_of(share[: 174 // (6 * hosts)])]
    assert len(set(epoch)) == len(epoch)


def test_any_batch_can_be_the_first_and_few_files_are_read_for_it(large_set, monkeypatch):
    order = stream(large_set, 31, 20, seed=2)
    check, read = npz.PairFile.check_crc, set()
    monkeypatch.setattr(npz.PairFile, "check_crc", lambda self: (read.add(self.path.name), check(self))[1])
    for name, array in stream(large_set, 1, 20, seed=2, start=30)[0].items():
        np.testing.assert_array_equal(array, order[30][name])
    assert len(read) <= 3 * reader.GROUP_FILES  # of this batch, of those made ahead, of the group after them
    far = stream(large_set, 1, 20, seed=2, start=10**9)[0]
    assert set(names_of([far])) <= set(names_of(order))


def test_few_files_are_open_and_none_after_the_end(large_set, monkeypatch):
    opened = set()

    class Counted(npz.PairFile):
        def __init__(self, path):
            super().__init__(path)
            opened.add(self)

        def close(self):
            super().close()
            opened.discard(self)

    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("pairs")]

    pair_sets = [PairSet(large_set), PairSet(large_set)]
    monkeypatch.setattr(npz, "PairFile", Counted)
    for end, pair_set in zip(("close", "collect"), pair_sets, strict=True):
        iterator = pair_set.batches(10, seed=0)
        for _ in range(40):
            next(iterator)
            assert 0 < len(opened) <= 3 * reader.GROUP_FILES
            # One opens files, one makes batches, and up to two for each group of open files read their rows.
            assert 2 <= len(threads()) <= 6
        if end == "close":
            iterator.close()
        del iterator
        assert not threads()
        assert not opened


def test_invalid_batches_are_refused_at_once(large_set):
    pair_set = PairSet(large_set)
    for wrong in ({"batch_size": 0}, {"start": -1}, {"shard": (2, 2)}, {"shard": (-1, 2)}):
        with pytest.raises(ValueError, match="invalid batch_size"):
            pair_set.batches(**({"batch_size": 3, "seed": 0} | wrong))


def test_through_a_link_and_without_writing(large_set, tmp_path):
    (tmp_path / "link").symlink_to(large_set)
    before = {path.name: path.stat().st_mtime_ns for path in [*large_set.iterdir(), large_set]}
    linked = stream(tmp_path / "link", 3, 60, seed=0)
    assert names_of(linked) == names_of(stream(large_set, 3, 60, seed=0))
    assert {path.name: path.stat().st_mtime_ns for path in [*large_set.iterdir(), large_set]} == before


def test_from_a_read_only_disk(large_set, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode
    try:
        shutil.copytree(large_set, disk / "p")
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        else:  # where mounting is not permitted neither is writing to this, unless for root
            (disk / "p").chmod(0o500)
        assert names_of(stream(disk / "p", 3, 60, seed=0)) == names_of(stream(large_set, 3, 60, seed=0))
        assert pair_maker.generate(disk / "p", pairs=174).complete  # there is nothing to do
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)
        else:
            (disk / "p").chmod(0o700)


def test_sets_in_a_bucket_are_read_once(large_set, copied_set, monkeypatch):
    here = stream(large_set, 4, 60, seed=0)
    pair_maker.mount_bucket(monkeypatch, copied_set.parent)
    loads, read = [], zipfile.ZipFile.read
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, info: (loads.append((self.fp, info.filename)), read(self, info))[1]
    )
    assert names_of(stream("gs://bucket/p", 4, 60, seed=0)) == names_of(here)
    # While a file is open each of its arrays is fetched once, not once for the checksum and once for the rows.
    assert len(loads) == len(set(loads)) >= 2 * 15
    flip_byte(copied_set / "reflow_batch_7.npz", "x0")
    with pytest.raises(InputError, match=r"reflow_batch_7\.npz is broken: .*CRC"):
        stream("gs://bucket/p", 6, 30, seed=0)


def test_what_a_bucket_refuses_is_one_line(copied_set, monkeypatch):
    pair_maker.mount_bucket(monkeypatch, copied_set.parent)
    tensorflow = pytest.importorskip("tensorflow")
    with pytest.raises(InputError, match=r"there are no pairs in gs://bucket/nowhere"):
        PairSet("gs://bucket/nowhere")
    with pytest.raises(npz.MissingFile, match=r"gs://bucket/p/none\.npz is missing"):
        npz.PairFile("gs://bucket/p/none.npz")
    truncate(copied_set / "reflow_batch_4.npz")
    with pytest.raises(InputError, match=r"gs://bucket/p/reflow_batch_4\.npz is broken"):
        PairSet("gs://bucket/p")

    def refuse(*_):
        raise tensorflow.errors.PermissionDeniedError(None, None, "no credentials\nand much more")

    monkeypatch.setattr(pair_maker.Bucket, "exists", refuse, raising=False)
    with pytest.raises(InputError, match=r"gs://bucket/p cannot be listed: .*no credentials; give"):
        PairSet("gs://bucket/p")


@pytest.mark.parametrize("array", ["x0", "x1", "t0", "t1"])
def test_a_flipped_byte_is_found_at_the_latest_when_the_file_is_first_read(copied_set, array):
    flip_byte(copied_set / "reflow_batch_7.npz", array)
    with pytest.raises(InputError, match=r"reflow_batch_7\.npz is broken: .*CRC.*check_pairs\.py --repair"):
        stream(copied_set, 6, 30, seed=0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pairs")]


@pytest.mark.parametrize(
    ("expect", "line"),
    [
        ({"k": 2}, "k = 3, but this run has 2"),
        ({"boundaries": np.float32([1, 0.7, 0.3, 0])}, r"boundaries = \[1\.0, 0\.6.*, but this run has"),
        ({"image_shape": (8, 8, 1)}, r"image_shape = \[6, 5, 1\], but this run has \(8, 8, 1\)"),
        ({"centered": False}, "centered = True, but this run has False"),
        ({"teacher": "another"}, "teacher = known, but this run has another"),
    ],
)
def test_a_set_made_for_another_run_is_refused(large_set, expect, line):
    with pytest.raises(InputError, match=line):
        PairSet(large_set, expect=expect)


def test_a_set_made_for_this_run_is_accepted(large_set):
    boundaries = [1, 0.66666667, 0.33333333, 0]
    expect = {"k": 3, "boundaries": boundaries, "image_shape": pair_maker.SHAPE, "centered": True, "teacher": "known"}
    assert len(PairSet(large_set, expect=expect)) == 174


def test_an_incomplete_set_is_accepted_only_when_asked(copied_set, tmp_path):
    (copied_set / "reflow_batch_2.npz").unlink()
    assert len(PairSet(copied_set, partial=True)) == 162
    assert len(set(names_of(stream(PairSet(copied_set, partial=True), 1, 162, seed=0)))) == 162
    pair_maker.generate(tmp_path / "half", pairs=174, worker=(1, 2))
    with pytest.raises(InputError, match=r"has 8 of its 15 files, reflow_batch_2\.npz is missing; run gen_reflow"):
        PairSet(tmp_path / "half")
    assert len(PairSet(tmp_path / "half", partial=True)) == 7 * 12 + 6


def test_a_set_that_was_not_completed_is_refused(copied_set):
    manifest = json.loads((copied_set / "manifest.json").read_text()) | {"complete": False}
    (copied_set / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was not completed; run gen_reflow again"):
        PairSet(copied_set)


def test_noise_is_not_rebuilt_from_other_images(tmp_path):
    pair_maker.generate(tmp_path / "p", store_noise=False)
    other = pair_maker.Images()
    other.identity = "others"
    with pytest.raises(InputError, match=r"made from fifty.*cannot be rebuilt from others"):
        PairSet(tmp_path / "p", images=other)
    assert len(PairSet(tmp_path / "p")) == 60  # it can be looked at
    with pytest.raises(ValueError, match="give the images"):
        PairSet(tmp_path / "p").batches(3, 0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_noise_that_is_rebuilt_in_other_bits_is_refused(tmp_path, dtype, monkeypatch):
    pair_maker.generate(tmp_path / "p", store_noise=False, dtype=dtype)

    def read_all(images):
        return list(itertools.islice(PairSet(tmp_path / "p", images=images).batches(20, 0), 3))

    read_all(pair_maker.Images())
    decoded_otherwise = pair_maker.Images()
    decoded_otherwise.pixels[:, 2, 3, 0] ^= 1
    line = r"reflow_batch_\d\.npz: x1 of pair \d+ is .* decoder .*NumPy"
    with pytest.raises(InputError, match=line) as error:
        read_all(decoded_otherwise)
    assert "\n" not in str(error.value)
    real, most = pairplan.start_points, np.array(9, dtype)
    monkeypatch.setattr(pairplan, "start_points", lambda *what, **how: np.nextafter(real(*what, **how), most))
    with pytest.raises(InputError, match=line):
        read_all(pair_maker.Images())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4", np.float64])
def test_files_of_another_program_are_accepted(tmp_path, caplog, save, dtype):
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(0)
    boundaries = np.float32([1, 0.4, 0])
    for number in (1, 2, 3):
        index = rng.permutation([0, 1] * 5)
        images = rng.standard_normal((2, 10, 4, 4, 3)).astype(dtype)
        times = {"t0": boundaries[index + 1], "t1": boundaries[index]}
        save(tmp_path / f"reflow_batch_{number}.npz", x0=images[0], x1=images[1], **times)
    pair_set = PairSet(tmp_path, expect={"k": 2, "teacher": "whoever", "image_shape": (4, 4, 3)})
    assert "has no manifest.json" in caplog.text
    np.testing.assert_array_equal(pair_set.boundaries, boundaries)
    (batch,) = stream(pair_set, 1, 30, seed=0)
    assert batch["x0"].dtype == np.float32
    stored = [np.load(path)["x0"].astype(np.float32) for path in tmp_path.glob("*.npz")]
    assert {row.tobytes() for row in batch["x0"]} == {row.tobytes() for row in np.concatenate(stored)}
    with pytest.raises(InputError, match="k = 2, but this run has 3"):
        PairSet(tmp_path, expect={"k": 3})


def test_files_of_another_program_must_make_one_set(copied_set):
    (copied_set / "manifest.json").unlink()
    assert len(PairSet(copied_set)) == 174
    (copied_set / "reflow_batch_2.npz").rename(copied_set / "kept")
    with pytest.raises(InputError, match=r"reflow_batch_2\.npz is missing"):
        PairSet(copied_set)
    assert len(PairSet(copied_set, partial=True)) == 162
    (copied_set / "kept").rename(copied_set / "reflow_batch_2.npz")
    rewrite(copied_set / "reflow_batch_2.npz", t0=np.zeros(12, np.float32))
    with pytest.raises(InputError, match="do not lie in segments that join"):
        PairSet(copied_set)
    zeros = np.zeros((12, 8, 8, 1), np.float32)
    rewrite(copied_set / "reflow_batch_2.npz", x0=zeros, x1=zeros)
    with pytest.raises(InputError, match="images of different sizes"):
        PairSet(copied_set)
