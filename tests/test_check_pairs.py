"""scripts/check_pairs.py."""

import errno
import os
import runpy
import shutil
import sys

import pair_maker
import pytest
from pair_maker import digests, flip_byte, truncate


def check_pairs(monkeypatch, capsys, *arguments):
    """The exit status and the output of scripts/check_pairs.py."""
    monkeypatch.setattr(sys, "argv", ["check_pairs.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("scripts.check_pairs", run_name="__main__")
    return end.value.code, capsys.readouterr().out


def test_repair_removes_what_is_broken_and_generation_makes_it_again(large_set, copied_set, monkeypatch, capsys):
    assert check_pairs(monkeypatch, capsys, copied_set) == (0, "15 files are whole, 0 are not, 0 are missing\n")
    flip_byte(copied_set / "reflow_batch_2.npz", "x0")
    truncate(copied_set / "reflow_batch_3.npz")
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
    assert digests(copied_set) == digests(large_set)


def test_repair_says_in_one_line_that_it_cannot_write(copied_set, monkeypatch, capsys):
    truncate(copied_set / "reflow_batch_3.npz")
    before = digests(copied_set)

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(os, "remove", refuse)
    status, output = check_pairs(monkeypatch, capsys, copied_set, "--repair")
    assert status == 1
    assert "cannot be changed: " in output.splitlines()[-1]
    assert digests(copied_set) == before


def test_repair_removes_nothing_that_cannot_be_made_again(copied_set, tmp_path, monkeypatch, capsys):
    (copied_set / "manifest.json").unlink()
    truncate(copied_set / "reflow_batch_3.npz")
    status, output = check_pairs(monkeypatch, capsys, copied_set, "--repair")
    assert status == 1
    assert "nothing is removed" in output
    assert len(list(copied_set.glob("*.npz"))) == 15
    assert check_pairs(monkeypatch, capsys, tmp_path / "nowhere")[0] == 2
    status, output = check_pairs(monkeypatch, capsys, copied_set / "reflow_batch_1.npz")
    assert status == 2
    assert "cannot be listed" in output
