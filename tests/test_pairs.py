"""Reading pair sets: what is refused, and what the endless stream of batches is."""

import contextlib
import errno
import itertools
import json
import logging
import os
import pathlib
import runpy
import shutil
import struct
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pair_maker
import pytest

import reflow
import segments
import utils
from pairs import npz, reader
from pairs import plan as pairplan
from utils import InputError

CHECK_PAIRS = pathlib.Path(__file__).parents[1] / "scripts" / "check_pairs.py"


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory):
    """The folder of a set of 174 pairs in 15 files, the last one shorter."""
    folder = tmp_path_factory.mktemp("whole") / "reflow_batch"
    pair_maker.generate(folder, pairs=174)
    return folder


@pytest.fixture
def copied_set(whole_set, tmp_path):
    """A copy of the set, to be damaged."""
    return shutil.copytree(whole_set, tmp_path / "p")


def stream(folder, count, *arguments, **options):
    """The first `count` batches of the set in `folder`."""
    iterator = reflow.PairSet(folder).batches(*arguments, **options)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def names_of(batches):
    """What tells every pair in the batches from any other, in order."""
    return [row.tobytes() for batch in batches for row in batch["x1"]]


def flip_byte(path, array):
    """Changes the last byte of an array in the file."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{array}.npy")
    with open(path, "r+b") as file:
        file.seek(info.header_offset)
        lengths = struct.unpack("<26xHH", file.read(30))  # of the name and the extra field between header and array
        file.seek(sum(lengths) + info.file_size - 1, os.SEEK_CUR)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def rewrite(path, save=np.savez, without=(), **changes):
    """The file again, some of its arrays changed."""
    arrays = {name: array for name, array in np.load(path).items() if name not in without} | changes
    save(path, **arrays)


def test_a_set_says_what_it_is(whole_set):
    pair_set = reflow.PairSet(whole_set)
    assert len(pair_set) == 174
    assert pair_set.k == 3
    assert pair_set.image_shape == pair_maker.SHAPE
    np.testing.assert_array_equal(pair_set.boundaries, segments.uniform_boundaries(3))
    assert pair_set.manifest["teacher"] == "known"


def test_batches_hold_pairs_that_belong_together(whole_set):
    for batch in stream(whole_set, 4, 50, seed=0):
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


def test_every_epoch_has_every_pair_once_in_another_order(whole_set):
    order = names_of(stream(whole_set, 30, 29, seed=0))  # 870 = 5 x 174, epochs end inside batches of other sizes
    assert names_of(stream(whole_set, 10, 87, seed=0)) == order
    epochs = [order[first : first + 174] for first in range(0, 870, 174)]
    assert all(len(set(epoch)) == 174 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert {frozenset(epoch) for epoch in epochs} == {frozenset(order)}
    assert names_of(stream(whole_set, 6, 29, seed=1)) != epochs[0]


def test_the_shuffle_mixes_files_and_pairs(whole_set):
    place = {}
    for number in npz.pair_file_numbers(whole_set):
        for row, x1 in enumerate(np.load(whole_set / npz.file_name(number))["x1"]):
            place[x1.tobytes()] = (number, row)
    order = [place[name] for name in names_of(stream(whole_set, 1, 174, seed=0))]
    files = np.array([number for number, _ in order])
    assert len(set(files[:48])) == reader.GROUP_FILES
    assert np.mean(np.diff(files) != 0) > 0.6  # 3/4 if neighbours are independent
    assert abs(np.corrcoef(np.arange(48), [row for _, row in order[:48]])[0, 1]) < 0.5


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_the_stream_that_one_host_reads(whole_set, hosts):
    one = stream(whole_set, 12, 6 * hosts, seed=5)
    shares = [stream(whole_set, 12, 6, seed=5, shard=(host, hosts)) for host in range(hosts)]
    for n, batch in enumerate(one):
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([share[n][name] for share in shares]), batch[name])
    epoch = [name for share in shares for name in names_of(share[: 174 // (6 * hosts)])]
    assert len(set(epoch)) == len(epoch)


def test_any_batch_can_be_the_first_and_few_files_are_read_for_it(whole_set, monkeypatch):
    order = stream(whole_set, 31, 20, seed=2)
    check, read = npz.PairFile.check_crc, set()
    monkeypatch.setattr(npz.PairFile, "check_crc", lambda self: (read.add(self.path.name), check(self))[1])
    for name, array in stream(whole_set, 1, 20, seed=2, start=30)[0].items():
        np.testing.assert_array_equal(array, order[30][name])
    assert len(read) <= 3 * reader.GROUP_FILES  # of this batch, of those made ahead, of the group after them
    far = stream(whole_set, 1, 20, seed=2, start=10**9)[0]
    assert set(names_of([far])) <= set(names_of(order))


def test_few_files_are_open_and_none_after_the_end(whole_set):
    def open_files():
        count = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # a reader's thread may close one meanwhile
                count += str(whole_set) in os.readlink(f"/proc/self/fd/{name}")
        return count

    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("pairs")]

    for end in ("close", "collect"):
        iterator = reflow.PairSet(whole_set).batches(10, seed=0)
        for _ in range(40):
            next(iterator)
            assert open_files() <= 3 * reader.GROUP_FILES
            # One opens files, one makes batches, and up to two for each group of open files read their rows.
            assert 2 <= len(threads()) <= 6
        if end == "close":
            iterator.close()
        del iterator
        assert not threads()
        assert open_files() == 0


def test_impossible_batches_are_refused_at_once(whole_set):
    pair_set = reflow.PairSet(whole_set)
    for wrong in ({"batch_size": 0}, {"start": -1}, {"shard": (2, 2)}, {"shard": (-1, 2)}):
        with pytest.raises(ValueError, match="no such batches"):
            pair_set.batches(**({"batch_size": 3, "seed": 0} | wrong))


def test_through_a_link_and_without_writing(whole_set, tmp_path):
    (tmp_path / "link").symlink_to(whole_set)
    before = {path.name: path.stat().st_mtime_ns for path in [*whole_set.iterdir(), whole_set]}
    linked = stream(tmp_path / "link", 3, 60, seed=0)
    assert names_of(linked) == names_of(stream(whole_set, 3, 60, seed=0))
    assert {path.name: path.stat().st_mtime_ns for path in [*whole_set.iterdir(), whole_set]} == before


def test_from_a_read_only_disk(whole_set, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode
    try:
        shutil.copytree(whole_set, disk / "p")
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        else:  # where mounting is not permitted neither is writing to this, unless for root
            (disk / "p").chmod(0o500)
        assert names_of(stream(disk / "p", 3, 60, seed=0)) == names_of(stream(whole_set, 3, 60, seed=0))
        assert pair_maker.generate(disk / "p", pairs=174).complete  # there is nothing to do
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)
        else:
            (disk / "p").chmod(0o700)


def test_sets_in_a_bucket_are_read_once(whole_set, copied_set, monkeypatch):
    here = stream(whole_set, 4, 60, seed=0)
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
        reflow.PairSet("gs://bucket/nowhere")
    with pytest.raises(npz.MissingFile, match=r"gs://bucket/p/none\.npz is missing"):
        npz.PairFile("gs://bucket/p/none.npz")
    cut(copied_set / "reflow_batch_4.npz")
    with pytest.raises(InputError, match=r"gs://bucket/p/reflow_batch_4\.npz is broken"):
        reflow.PairSet("gs://bucket/p")

    def refuse(*_):
        raise tensorflow.errors.PermissionDeniedError(None, None, "no credentials\nand much more")

    monkeypatch.setattr(pair_maker.Bucket, "exists", refuse, raising=False)
    with pytest.raises(InputError, match=r"gs://bucket/p cannot be listed: .*no credentials; give"):
        reflow.PairSet("gs://bucket/p")


# ---- refusals


@pytest.mark.parametrize("array", ["x0", "x1", "t0", "t1"])
def test_a_flipped_byte_is_found_at_the_latest_when_the_file_is_first_read(copied_set, array):
    flip_byte(copied_set / "reflow_batch_7.npz", array)
    with pytest.raises(InputError, match=r"reflow_batch_7\.npz is broken: .*CRC.*check_pairs\.py --repair"):
        stream(copied_set, 6, 30, seed=0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pairs")]


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)


def swap(path):
    shutil.copy(path.with_name("reflow_batch_9.npz"), path)


def pickled(path):
    rewrite(path, x0=np.full((12, *pair_maker.SHAPE), {"anything": print}, object))


def compressed_with_pickle(path):
    rewrite(path, np.savez_compressed, t0=np.array([print] * 12, object))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (cut, "is broken"),
        (swap, "is broken: its crc32 is"),
        (pickled, "pickled Python objects"),
        (compressed_with_pickle, "pickled Python objects"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "is broken"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(5000)), "is broken"),
        (lambda path: rewrite(path, without=["t1"]), "it has no array t1"),
        (lambda path: rewrite(path, t1=np.zeros((12, 1), np.float32)), r"its array t1 is float32 \[12, 1\]"),
        (lambda path: rewrite(path, t1=np.zeros(11, np.float32)), "x0 and t1 have different lengths"),
        (lambda path: rewrite(path, x1=np.zeros((12, 2, 2, 1), np.float32)), "x0 and x1 have different shapes"),
        (lambda path: rewrite(path, np.savez_compressed), "is broken: its bytes is"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_named_at_once(copied_set, damage, line):
    damage(copied_set / "reflow_batch_4.npz")
    with pytest.raises(InputError, match=rf"reflow_batch_4\.npz.*{line}") as error:
        reflow.PairSet(copied_set)
    assert "\n" not in str(error.value)


def test_a_header_that_lies_about_its_array_is_refused(copied_set):
    path = copied_set / "reflow_batch_4.npz"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    for lie in (b"(92, 6, 5, 1)", b"(12, 6, 5, 9)"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in content.items():
                archive.writestr(name, array.replace(b"(12, 6, 5, 1)", lie))
        with pytest.raises(InputError, match=r"reflow_batch_4\.npz is broken: .*length"):
            reflow.PairSet(copied_set)


def test_any_byte_of_a_file_may_be_wrong_and_only_input_errors_follow(copied_set):
    """Whatever is changed, the set is either refused by name or gives the very pairs that were written."""
    whole = set(names_of(stream(copied_set, 1, 174, seed=0)))
    path = copied_set / "reflow_batch_4.npz"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    structure = [place for place in range(len(content)) if content[place : place + 2] == b"PK"]
    places = [*rng.integers(0, len(content), 40), *(place + rng.integers(0, 46) for place in structure * 4)]
    for place in places:
        damaged = bytearray(content)
        damaged[min(place, len(content) - 1)] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        refusal, read = "", whole
        try:
            read = set(names_of(stream(copied_set, 1, 174, seed=0)))
        except InputError as error:
            refusal = str(error)
        assert "reflow_batch_4.npz" in refusal if refusal else read == whole


def test_a_file_cut_off_while_it_is_read_is_named(copied_set):
    iterator = reflow.PairSet(copied_set).batches(3, seed=0)
    next(iterator)
    for path in copied_set.glob("*.npz"):
        os.truncate(path, 500)
    with pytest.raises(InputError, match=r"reflow_batch_\d+\.npz is broken"):
        list(itertools.islice(iterator, 60))


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
def test_a_set_made_for_another_run_is_refused(whole_set, expect, line):
    with pytest.raises(InputError, match=line):
        reflow.PairSet(whole_set, expect=expect)


def test_a_set_made_for_this_run_is_taken(whole_set):
    boundaries = [1, 0.66666667, 0.33333333, 0]
    expect = {"k": 3, "boundaries": boundaries, "image_shape": pair_maker.SHAPE, "centered": True, "teacher": "known"}
    assert len(reflow.PairSet(whole_set, expect=expect)) == 174


def test_an_incomplete_set_is_taken_only_when_asked(copied_set, tmp_path):
    (copied_set / "reflow_batch_2.npz").unlink()
    assert len(reflow.PairSet(copied_set, partial=True)) == 162
    assert len(set(names_of(stream_of(reflow.PairSet(copied_set, partial=True), 162)))) == 162
    pair_maker.generate(tmp_path / "half", pairs=174, worker=(1, 2))
    with pytest.raises(InputError, match=r"has 8 of its 15 files, reflow_batch_2\.npz is missing; run gen_reflow"):
        reflow.PairSet(tmp_path / "half")
    assert len(reflow.PairSet(tmp_path / "half", partial=True)) == 7 * 12 + 6


def stream_of(pair_set, batch_size):
    iterator = pair_set.batches(batch_size, 0)
    batch = next(iterator)
    iterator.close()
    return [batch]


def test_a_set_that_was_not_completed_is_refused(copied_set):
    manifest = json.loads((copied_set / "manifest.json").read_text()) | {"complete": False}
    (copied_set / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was not completed; run gen_reflow again"):
        reflow.PairSet(copied_set)


def test_an_empty_folder_and_a_damaged_manifest_are_refused(copied_set, tmp_path):
    with pytest.raises(InputError, match=r"there are no pairs in .*gen_reflow"):
        reflow.PairSet(tmp_path / "nowhere")
    for number in (0, 16):
        stranger = shutil.copy(copied_set / "reflow_batch_1.npz", copied_set / f"reflow_batch_{number}.npz")
        with pytest.raises(InputError, match=rf"reflow_batch_{number}\.npz does not belong"):
            reflow.PairSet(copied_set)
        stranger.unlink()
    shutil.copy(copied_set / "reflow_batch_1.npz", copied_set / "reflow_batch_01.npz")
    assert len(reflow.PairSet(copied_set)) == 174  # that is no name of a pair file
    for text in ('{"complete": tr', "[]", '{"format": 1}'):
        (copied_set / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json is"):
            reflow.PairSet(copied_set)


def test_a_folder_that_is_none_is_refused(copied_set):
    with pytest.raises(InputError, match=r"reflow_batch_1\.npz cannot be listed: .*Not a directory.*; give"):
        reflow.PairSet(copied_set / "reflow_batch_1.npz")
    with pytest.raises(InputError, match=r"reflow_batch_1\.npz cannot be listed"):
        pair_maker.generate(copied_set / "reflow_batch_1.npz")
    (copied_set / "manifest.json").unlink()
    (copied_set / "manifest.json").mkdir()
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        reflow.PairSet(copied_set)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", True), ("complete", "no"), ("k", "3"), ("k", 4), ("files", 16), ("files", None), ("pairs", 0),
        ("pairs", 1.5), ("file_size", 0), ("file_size", -12), ("boundaries", [1, "a", 0.3, 0]), ("boundaries", 1),
        ("boundaries", [1, 0.3, 0.6, 0]), ("boundaries", [1, 10**400, 0.3, 0]), ("boundaries", []),
        ("image_shape", [6, 5]), ("image_shape", [6, 5, "1"]), ("image_shape", [6, 5, 0]), ("dataset_size", 0),
        ("dtype", "int8"), ("dtype", 32), ("store_noise", None), ("centered", 1), ("tol", "small"), ("seed", []),
        ("contents", []), ("contents", {"reflow_batch_1.npz": 7}), ("contents", {"reflow_batch_1.npz": {"size": 7}}),
    ],
)  # fmt: skip
def test_a_manifest_with_a_value_that_cannot_be_is_refused(copied_set, name, value):
    manifest = json.loads((copied_set / "manifest.json").read_text()) | {name: value}
    (copied_set / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"manifest\.json is damaged: its {name}.*bring back") as error:
        reflow.PairSet(copied_set)
    assert "\n" not in str(error.value)


def test_noise_is_not_rebuilt_from_other_images(tmp_path):
    pair_maker.generate(tmp_path / "p", store_noise=False)
    other = pair_maker.Images()
    other.identity = "others"
    with pytest.raises(InputError, match=r"made from fifty.*cannot be rebuilt from others"):
        reflow.PairSet(tmp_path / "p", images=other)
    assert len(reflow.PairSet(tmp_path / "p")) == 60  # it can be looked at
    with pytest.raises(ValueError, match="give the images"):
        reflow.PairSet(tmp_path / "p").batches(3, 0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_noise_that_is_rebuilt_in_other_bits_is_refused(tmp_path, dtype, monkeypatch):
    pair_maker.generate(tmp_path / "p", store_noise=False, dtype=dtype)

    def read_all(images):
        return list(itertools.islice(reflow.PairSet(tmp_path / "p", images=images).batches(20, 0), 3))

    read_all(pair_maker.Images())
    decoded_otherwise = pair_maker.Images()
    decoded_otherwise.pixels[:, 2, 3, 0] ^= 1
    line = r"reflow_batch_\d\.npz: x1 of pair \d+, .* decoder .*NumPy"
    with pytest.raises(InputError, match=line) as error:
        read_all(decoded_otherwise)
    assert "\n" not in str(error.value)
    real, most = pairplan.start_points, np.array(9, dtype)
    monkeypatch.setattr(pairplan, "start_points", lambda *what, **how: np.nextafter(real(*what, **how), most))
    with pytest.raises(InputError, match=line):
        read_all(pair_maker.Images())


# ---- sets without a manifest


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4", np.float64])
def test_other_peoples_files_are_taken(tmp_path, caplog, save, dtype):
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(0)
    boundaries = np.float32([1, 0.4, 0])
    for number in (1, 2, 3):
        index = rng.permutation([0, 1] * 5)
        images = rng.standard_normal((2, 10, 4, 4, 3)).astype(dtype)
        times = {"t0": boundaries[index + 1], "t1": boundaries[index]}
        save(tmp_path / f"reflow_batch_{number}.npz", x0=images[0], x1=images[1], **times)
    pair_set = reflow.PairSet(tmp_path, expect={"k": 2, "teacher": "whoever", "image_shape": (4, 4, 3)})
    assert "has no manifest.json" in caplog.text
    np.testing.assert_array_equal(pair_set.boundaries, boundaries)
    (batch,) = stream_of(pair_set, 30)
    assert batch["x0"].dtype == np.float32
    stored = [np.load(path)["x0"].astype(np.float32) for path in tmp_path.glob("*.npz")]
    assert {row.tobytes() for row in batch["x0"]} == {row.tobytes() for row in np.concatenate(stored)}
    with pytest.raises(InputError, match="k = 2, but this run has 3"):
        reflow.PairSet(tmp_path, expect={"k": 3})


def test_other_peoples_files_must_make_one_set(copied_set):
    (copied_set / "manifest.json").unlink()
    assert len(reflow.PairSet(copied_set)) == 174
    (copied_set / "reflow_batch_2.npz").rename(copied_set / "kept")
    with pytest.raises(InputError, match=r"reflow_batch_2\.npz is missing"):
        reflow.PairSet(copied_set)
    assert len(reflow.PairSet(copied_set, partial=True)) == 162
    (copied_set / "kept").rename(copied_set / "reflow_batch_2.npz")
    rewrite(copied_set / "reflow_batch_2.npz", t0=np.zeros(12, np.float32))
    with pytest.raises(InputError, match="do not lie in segments that join"):
        reflow.PairSet(copied_set)
    zeros = np.zeros((12, 8, 8, 1), np.float32)
    rewrite(copied_set / "reflow_batch_2.npz", x0=zeros, x1=zeros)
    with pytest.raises(InputError, match="images of different sizes"):
        reflow.PairSet(copied_set)


# ---- scripts/check_pairs.py


def check_pairs(monkeypatch, capsys, *arguments):
    """The exit status and the output of scripts/check_pairs.py."""
    monkeypatch.setattr(sys, "argv", ["check_pairs.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(CHECK_PAIRS), run_name="__main__")
    return end.value.code, capsys.readouterr().out


def test_repair_removes_what_is_broken_and_generation_makes_it_again(whole_set, copied_set, monkeypatch, capsys):
    assert check_pairs(monkeypatch, capsys, copied_set) == (0, "15 files are whole, 0 are not, 0 are missing\n")
    flip_byte(copied_set / "reflow_batch_2.npz", "x0")
    cut(copied_set / "reflow_batch_3.npz")
    (copied_set / "reflow_batch_5.npz").unlink()
    status, output = check_pairs(monkeypatch, capsys, copied_set)
    assert status == 1
    assert [line.split(" is ")[0].split("/")[-1] for line in output.splitlines()[:3]] == [
        f"reflow_batch_{number}.npz" for number in (2, 3, 5)
    ]
    assert "12 files are whole, 2 are not, 1 are missing" in output
    stranger = shutil.copy(copied_set / "reflow_batch_1.npz", copied_set / "reflow_batch_0.npz")
    assert "reflow_batch_0.npz does not belong to this set" in check_pairs(monkeypatch, capsys, copied_set)[1]
    stranger.unlink()
    assert len(list(copied_set.glob("*.npz"))) == 14
    assert check_pairs(monkeypatch, capsys, copied_set, "--repair")[0] == 0
    assert len(list(copied_set.glob("*.npz"))) == 12
    assert pair_maker.generate(copied_set, pairs=174).files == 3
    assert pair_maker.digests(copied_set) == pair_maker.digests(whole_set)


def test_repair_says_in_one_line_that_it_cannot_write(copied_set, monkeypatch, capsys):
    cut(copied_set / "reflow_batch_3.npz")
    before = pair_maker.digests(copied_set)

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(os, "remove", refuse)
    status, output = check_pairs(monkeypatch, capsys, copied_set, "--repair")
    assert status == 1
    assert "cannot be changed: " in output.splitlines()[-1]
    assert pair_maker.digests(copied_set) == before


def test_repair_removes_nothing_that_cannot_be_made_again(copied_set, tmp_path, monkeypatch, capsys):
    (copied_set / "manifest.json").unlink()
    cut(copied_set / "reflow_batch_3.npz")
    status, output = check_pairs(monkeypatch, capsys, copied_set, "--repair")
    assert status == 1
    assert "nothing is removed" in output
    assert len(list(copied_set.glob("*.npz"))) == 15
    assert check_pairs(monkeypatch, capsys, tmp_path / "nowhere")[0] == 2
    status, output = check_pairs(monkeypatch, capsys, copied_set / "reflow_batch_1.npz")
    assert status == 2
    assert "cannot be listed" in output


def test_files_larger_than_a_checksum_block_are_checked_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "CRC_BLOCK", 1000)
    arrays = {name: np.random.default_rng(0).standard_normal((30, 4, 4, 3)).astype(np.float32) for name in ("x0", "x1")}
    times = {"t0": np.zeros(30, np.float32), "t1": np.ones(30, np.float32)}
    path = tmp_path / "reflow_batch_1.npz"
    utils.write_arrays(path, **arrays, **times)
    first = path.read_bytes()
    with npz.PairFile(path) as file:
        file.check_crc()
        assert struct.pack("<I", file.crc32["x1"]) in first
        np.testing.assert_array_equal(file.array("x1"), arrays["x1"])
    utils.write_arrays(tmp_path / "again.npz", **arrays, **times)
    assert (tmp_path / "again.npz").read_bytes() == first  # no time of day in it
    flip_byte(path, "x1")
    with npz.PairFile(path) as file, pytest.raises(npz.BrokenFile, match=r"x1\.npy has changed"):
        file.check_crc()
