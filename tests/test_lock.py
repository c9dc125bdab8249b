"""The lock on a folder of results: two at once, a killed holder, and disks without flock."""

import concurrent.futures
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from tiny_run import reflow_config, tiny_config

import run_lib
from jobs import lock
from utils import InputError, write_json

HOLD = """import sys, time
from jobs.lock import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_job_is_refused_in_one_line_until_the_first_ends(tmp_path):
    with lock.exclusive(tmp_path / "1_rf"):
        with pytest.raises(InputError, match=rf"1_rf is in use by process {os.getpid()} on \S+; wait until it ends"):
            run_lib.train(tiny_config(), tmp_path)
        with pytest.raises(InputError, match="no weights to start from"):  # another folder
            run_lib.train(reflow_config("gen_reflow"), tmp_path)
        with lock.exclusive(tmp_path / "2_rf"):
            pass
    with lock.exclusive(tmp_path / "1_rf"):
        pass
    assert not list(tmp_path.glob(".*"))


def test_a_killed_holder_leaves_nothing_in_the_way(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "eval")]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"in use by process {holder.pid} on"), lock.exclusive(tmp_path / "eval"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock.exclusive(tmp_path / "eval"):
        pass


@pytest.fixture
def no_flock(monkeypatch):
    """A disk without flock, and leases that are short."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "RENEWED", 0.05)
    monkeypatch.setattr(lock, "VOID", 1.0)


def test_without_flock_a_lease_that_is_renewed_is_respected(tmp_path, no_flock):
    refused = pytest.raises(InputError, match=f"in use by process {os.getpid()}")
    with lock.exclusive(tmp_path / "1_rf"), refused, lock.exclusive(tmp_path / "1_rf"):
        pass


def test_without_flock_a_lease_that_a_kill_left_is_void_after_its_time(tmp_path, no_flock):
    write_json(tmp_path / ".1_rf.lock", {"holder": "process 1 on elsewhere", "renewals": 3})
    started = time.monotonic()
    with lock.exclusive(tmp_path / "1_rf"):
        assert time.monotonic() - started >= lock.VOID
    assert not list(tmp_path.glob(".*"))


def test_without_flock_one_of_two_that_start_together_is_refused(tmp_path, no_flock):
    both, held, refused = threading.Barrier(2), [], []

    def start(_):
        both.wait()
        try:
            with lock.exclusive(tmp_path / "1_rf"):
                held.append(True)
                both.wait()  # for the other one's refusal
        except InputError:
            refused.append(True)
            both.wait()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(start, range(2)))
    assert (held, refused) == ([True], [True])


def test_without_flock_a_holder_that_ends_meanwhile_is_followed_at_once(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(lock, "VOID", 60.0)
    write_json(tmp_path / ".1_rf.lock", {"holder": "process 1 on elsewhere", "renewals": 3})
    threading.Timer(0.2, (tmp_path / ".1_rf.lock").unlink).start()
    with lock.exclusive(tmp_path / "1_rf"):
        assert (tmp_path / ".1_rf.lock").exists()
