"""What is written beside figures, and how two records are compared."""

import hashlib
import importlib.metadata
import os
import subprocess

import jax
from etils import epath

from tracking import provenance


def test_the_record_names_code_libraries_and_machine():
    record = provenance.of_process({"seed": 7, "data": {"dataset": "digits"}})
    assert (record["seed"], record["config"]["data"]["dataset"]) == (7, "digits")
    assert record["versions"]["jax"] == importlib.metadata.version("jax")
    assert (record["device"], record["devices"], record["processes"]) == ("cpu", jax.device_count(), 1)
    assert record["folder"] == os.getcwd()
    assert record["command"].startswith("python ")
    if record["commit"] is not None:  # a clone
        head = subprocess.run(["git", "-C", provenance.ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
        assert record["commit"] == head.stdout.strip()


def test_there_is_a_record_at_pythons_prompt(monkeypatch):
    monkeypatch.setattr("sys.argv", [""])
    assert provenance.of_process({"seed": 7})["command"] == "python"


def test_code_that_is_changed_or_added_is_dirty_and_code_without_a_clone_has_no_commit(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(provenance, "ROOT", tmp_path.resolve())
    assert provenance._code.__wrapped__() == {"commit": None, "dirty": None}
    git("init")
    (tmp_path / "module.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    assert provenance._code.__wrapped__()["dirty"] is False
    (tmp_path / "notes.txt").write_text("not code\n")
    assert provenance._code.__wrapped__()["dirty"] is False
    (tmp_path / "other.py").write_text("b = 1\n")
    assert provenance._code.__wrapped__()["dirty"] is True
    inner = tmp_path / "inner"  # a copy of the code inside somebody's repository
    inner.mkdir()
    monkeypatch.setattr(provenance, "ROOT", inner.resolve())
    assert provenance._code.__wrapped__() == {"commit": None, "dirty": None}


def test_differences_are_named_to_the_innermost_entry():
    one = {"a": 1, "versions": {"jax": "1", "numpy": "2"}, "pairs": {}}
    other = {"a": 1, "versions": {"jax": "1", "numpy": "3"}, "b": None, "c": 5}
    assert provenance.differences(one, other) == {"c": (None, 5), "pairs": ({}, None), "versions.numpy": ("2", "3")}
    assert provenance.differences(one, one) == {}


def test_file_hashes_are_of_the_files_that_exist(tmp_path):
    folder = epath.Path(tmp_path)
    (folder / "manifest.json").write_bytes(b"{}")
    found = provenance.file_hashes([folder / "manifest.json", folder / "none.json"])
    assert found == {str(tmp_path / "manifest.json"): hashlib.sha256(b"{}").hexdigest()}
