"""Files that are whole or absent, local and remote."""

import errno
import json
import math
import os
import re
import threading

import numpy as np
import pytest
from pair_maker import mount_bucket

import utils
from utils import InputError


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path, monkeypatch):
    """A folder on a disk or in a (local) bucket, and where its files really are."""
    if request.param == "disk":
        return tmp_path / "a", tmp_path / "a"
    pytest.importorskip("tensorflow")
    mount_bucket(monkeypatch, tmp_path)
    return "gs://bucket/a", tmp_path / "a"


def test_a_failed_write_leaves_the_old_file_and_no_other(folder):
    path, real = f"{folder[0]}/file.txt", folder[1]
    with utils.atomic_path(path) as temporary:
        temporary.write_text("first")

    def fail_halfway():
        with utils.atomic_file(path) as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        fail_halfway()
    assert (real / "file.txt").read_text() == "first"
    assert [entry.name for entry in real.iterdir()] == ["file.txt"]


def test_an_existing_file_is_replaced_unless_told_otherwise(folder):
    path = f"{folder[0]}/file.json"
    for value, overwrite, expected in ((1, False, 1), (2, False, 1), (3, True, 3)):
        utils.write_json(path, value, overwrite=overwrite)
        assert utils.read_json(path, int) == expected
    assert [entry.name for entry in folder[1].iterdir()] == ["file.json"]


def test_a_files_bytes_are_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def recorded(number):
        synced.append((os.readlink(f"/proc/self/fd/{number}"), (tmp_path / "file.json").exists()))
        fsync(number)

    monkeypatch.setattr(utils.os, "fsync", recorded)
    utils.write_json(tmp_path / "file.json", 1)
    assert [(name.startswith(f"{tmp_path}/.file.json."), existed) for name, existed in synced] == [(True, False)]


def test_of_many_writers_of_a_new_file_exactly_one_succeeds(tmp_path):
    path, barrier = tmp_path / "file.json", threading.Barrier(8)

    def write(n):
        with utils.atomic_file(path, overwrite=False) as file:
            file.write(json.dumps([n] * 1000).encode())
            barrier.wait(60)  # all have looked before the first is done
        seen.append(path.read_bytes())

    seen = []
    threads = [threading.Thread(target=write, args=[n]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_a_disk_without_hard_links_still_keeps_an_existing_file(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(utils.os, "link", unsupported)
    for value in (1, 2):
        utils.write_json(tmp_path / "file.json", value, overwrite=False)
    assert utils.read_json(tmp_path / "file.json", int) == 1


def test_remote_errors_become_those_of_a_disk(tmp_path, monkeypatch):
    tensorflow = pytest.importorskip("tensorflow")
    for error, kind, number in (
        (tensorflow.errors.NotFoundError, FileNotFoundError, errno.ENOENT),
        (tensorflow.errors.PermissionDeniedError, OSError, errno.EACCES),
        (tensorflow.errors.UnavailableError, OSError, errno.EREMOTEIO),
    ):
        with pytest.raises(kind, match="reason") as raised, utils.os_errors():
            raise error(None, None, "reason\nand much more")
        assert raised.value.errno == number
        assert "more" not in str(raised.value)
    with pytest.raises(ValueError, match="other"), utils.os_errors():
        raise ValueError("other")


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path):
    utils.write_json(tmp_path / "a.json", {"x": [1.0, math.inf], "y": {"z": float("nan")}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1.0, None], "y": {"z": None}}
    (tmp_path / "b.json").write_text('{"x": ')
    assert utils.read_json(tmp_path / "missing.json", dict, 5) == 5
    assert utils.valid_json(tmp_path / "b.json", dict, 5) == 5
    with pytest.raises(InputError, match=r"b\.json is damaged; restore or remove it: "):
        utils.read_json(tmp_path / "b.json", dict, 5)
    (tmp_path / "b.json").unlink()
    (tmp_path / "b.json").mkdir()
    with pytest.raises(IsADirectoryError):  # any file that is there and cannot be read
        utils.read_json(tmp_path / "b.json", dict, 5)


def test_arrays_have_the_same_bytes_every_time(tmp_path):
    arrays = {"x": np.random.default_rng(0).standard_normal((30, 4)), "y": np.arange(3)}
    for name in ("a.npz", "b.npz"):
        utils.write_arrays(tmp_path / name, **arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as file:
        for name, array in arrays.items():
            np.testing.assert_array_equal(file[name], array)


def wrapped(error):
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("the save thread failed") from cause
    except RuntimeError as outer:
        return outer


def google_error(module, message):
    return type("Refused", (Exception,), {"__module__": module})(message)


UNREACHED = "ABORTED: Error reading gs://b/x: All 4 retry attempts failed: CURL error: refused [curl_code='7']"
STORE = "RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 4: No space left on device [os_error_code='28']"


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EDQUOT, "quota"), errno.EDQUOT),
        (ValueError(STORE), errno.ENOSPC),
        (ValueError(STORE.replace("28", "122")), errno.EDQUOT),
        (ValueError("UNAVAILABLE: Error reading storage.googleapis.com"), errno.EREMOTEIO),
        (ValueError(UNREACHED), errno.EREMOTEIO),
        (ValueError("NOT_FOUND: Error writing gs://bucket/x: no bucket"), errno.EREMOTEIO),
        (ValueError("NOT_FOUND: a key of a tree"), None),
        (google_error("google.auth.exceptions", "no default credentials"), errno.EREMOTEIO),
        (google_error("google.protobuf.message", "a bug"), None),
        (ValueError("RESOURCE_EXHAUSTED: of the device's memory"), None),
        (OSError(errno.ENOENT, "a bug"), None),
        (KeyError("x"), None),
    ],
)
def test_the_error_of_a_disk_is_found_however_it_is_wrapped(error, number):
    for each in (error, wrapped(error)):
        found = utils.disk_error(each)
        assert (found and found.errno) == number


ANSWER = """Error executing an HTTP request: HTTP response code 403 with body '{
 "error": {
  "code": 403,
  "message": "nobody does not have storage.objects.get access",
'"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError(UNREACHED), "CURL error: refused"),
        (ValueError(f"PERMISSION_DENIED: {ANSWER}"), "nobody does not have .* access; give this machine credentials"),
        (google_error("google.api_core.exceptions", "403 GET gs: no"), "403 GET gs: no; give this machine credentials"),
        (google_error("requests.exceptions", ""), "Refused"),
    ],
)
def test_what_a_bucket_says_is_one_line_with_a_remedy(error, reason):
    assert re.fullmatch(f"{reason}[^{{}}]*", utils.disk_error(error).strerror)


def test_a_bucket_that_does_not_exist_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    mount_bucket(monkeypatch, tmp_path / "none")
    with pytest.raises(InputError, match=r"gs://bucket/run cannot be written: there is no bucket gs://bucket;"):
        utils.check_writable("gs://bucket/run")


def test_a_path_in_the_home_folder_is_found_by_scripts(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(utils.local_path("~/runs")) == "/home/me/runs"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    utils.check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/below cannot be written: Not a directory"):
        utils.check_writable(tmp_path, tmp_path / "file" / "below")
