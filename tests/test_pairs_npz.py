"""One pair file: what is refused, and its checksums."""

import itertools
import os
import shutil
import struct
import zipfile

import numpy as np
import pair_maker
import pytest
from pair_maker import flip_byte, names_of, rewrite, stream, truncate

import utils
from pairs import npz
from pairs.reader import PairSet
from utils import InputError


def swap(path):
    shutil.copy(path.with_name("reflow_batch_9.npz"), path)


def pickled(path):
    rewrite(path, x0=np.full((12, *pair_maker.SHAPE), {"anything": print}, object))


def compressed_with_pickle(path):
    rewrite(path, np.savez_compressed, t0=np.array([print] * 12, object))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (truncate, "is broken"),
        (swap, "is broken: its crc32 is"),
        (pickled, "pickled Python objects"),
        (compressed_with_pickle, "pickled Python objects"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "is broken"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(5000)), "is broken"),
        (lambda path: rewrite(path, without=["t1"]), "it has no array t1"),
        (lambda path: rewrite(path, t1=np.zeros((12, 1), np.float32)), r"its array t1 is float32 \[12, 1\]"),
        (lambda path: rewrite(path, t1=np.zeros(11, np.float32)), "x0 and t1 have different shapes"),
        (
            lambda path: rewrite(path, x1=np.zeros((12, 2, 2, 1), np.float32)),
            "x0 and x1 have different shapes",
        ),
        (lambda path: rewrite(path, np.savez_compressed), "is broken: its bytes is"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_named_at_once(copied_set, damage, line):
    damage(copied_set / "reflow_batch_4.npz")
    with pytest.raises(InputError, match=rf"reflow_batch_4\.npz.*{line}") as error:
        PairSet(copied_set)
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
            PairSet(copied_set)


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
    iterator = PairSet(copied_set).batches(3, seed=0)
    next(iterator)
    for path in copied_set.glob("*.npz"):
        os.truncate(path, 500)
    with pytest.raises(InputError, match=r"reflow_batch_\d+\.npz is broken"):
        list(itertools.islice(iterator, 60))


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
