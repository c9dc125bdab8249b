"""What a process writes to its terminal, seen from outside, as libraries write to the file descriptor; its hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import distributed
import runtime
from utils import InputError

ROOT = Path(__file__).parents[1]
WRITES = """
import logging, os, sys
import runtime
with runtime._without_startup_messages():
    os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n")
    os.write(2, b"I0000 00:00:1 99 port.cc:153] custom operations are on\\n")
    os.write(2, b"E0000 00:00:1 99 driver.cc:1] the driver is too old\\n")
    os.write(2, b"W0000 00:00:1 99 driver.cc:2] a warning\\n")
    print("Traceback of a failed import", file=sys.stderr)
os.write(2, b"I0000 after\\n")
with runtime.terminal_logging():
    logging.getLogger("seqrf").info("update 100: loss 0.5")
    logging.getLogger("seqrf").warning("no optimiser state")
    logging.getLogger("orbax").info("chatter")
    logging.getLogger("orbax").warning("disk is slow")
"""


def stderr_of(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_only_messages_that_tell_something_are_written():
    lines = stderr_of(WRITES).splitlines()
    assert lines[:4] == [
        "E0000 00:00:1 99 driver.cc:1] the driver is too old",
        "W0000 00:00:1 99 driver.cc:2] a warning",
        "Traceback of a failed import",
        "I0000 after",
    ]
    assert [line.split(" ", 1)[1] for line in lines[4:6]] == ["update 100: loss 0.5", "warning: no optimiser state"]
    assert len(lines) == 7
    assert "disk is slow" in lines[6]


def test_tensorflow_is_imported_without_a_word():
    assert not stderr_of("import runtime; runtime.set_environment(); runtime.tensorflow_on_cpu().constant(1) + 1")


WORKS = """
import sys, time
import runtime
with runtime.preemption.handled():
    print("ready", flush=True)
    for _ in range(600):
        time.sleep(0.05)
        if "deaf" not in sys.argv and runtime.preemption.requested:
            runtime.preemption.check()
"""


def signalled(*numbers, deaf=False):
    """(exit status, stderr) of a process that is sent signals while it works."""
    command = [sys.executable, "-c", WORKS, *(["deaf"] if deaf else [])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)
    return process.wait(timeout=300), process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_between_two_steps(number):
    code, said = signalled(number)
    assert code == 1  # by the exception
    assert f"Preempted: stopped by {number.name}" in said
    assert runtime.Preempted(number).exit_code == {"SIGTERM": 143, "SIGINT": 130}[number.name]


def test_a_second_interrupt_ends_the_process_at_once_and_a_second_sigterm_does_not():
    code, said = signalled(signal.SIGINT, signal.SIGINT, deaf=True)
    assert code == 130
    assert "Traceback" not in said
    code, said = signalled(signal.SIGTERM, signal.SIGTERM, signal.SIGINT, deaf=True)
    assert code == 130
    assert said.count("stopping after this step") == 1


def test_signals_mean_what_they_did_after_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with runtime.preemption.handled():
        assert signal.getsignal(signal.SIGTERM) is not before
        signal.raise_signal(signal.SIGTERM)
        while not runtime.preemption.requested:
            time.sleep(0.01)
        with pytest.raises(runtime.Preempted, match="stopped by SIGTERM"):
            runtime.preemption.check()
    assert signal.getsignal(signal.SIGTERM) is before
    runtime.preemption.check()  # forgotten


ADDRESS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip


@pytest.fixture
def joined(monkeypatch):
    """(environment -> the arguments that the hosts are joined with, None if this process stays alone)."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)

    def start(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        distributed.start_hosts()
        return calls[0] if calls else None

    return start


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_NUM_PROCESSES": "1"},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        SLURM | {"JAX_NUM_PROCESSES": "1"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_process_without_others_joins_nobody(environment, joined):
    assert joined(environment) is None


@pytest.mark.parametrize(
    ("environment", "given", "method"),
    [
        (
            ADDRESS | {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            {"coordinator_address": "10.0.0.1:1234", "num_processes": 3, "process_id": 2},
            "deactivate",
        ),
        (SLURM, {}, "slurm"),
        (SLURM | ADDRESS, {"coordinator_address": "10.0.0.1:1234"}, "slurm"),
        (OPEN_MPI, {}, "ompi"),
    ],
)
def test_hosts_are_those_that_the_environment_names(environment, given, method, joined):
    arguments = joined(environment)
    assert {name: arguments[name] for name in runtime.HOST_SETTINGS if name in arguments} == given
    assert arguments["cluster_detection_method"] == method
    assert arguments["heartbeat_timeout_seconds"] < 60


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ADDRESS, "need --num_processes, --process_id too"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "need --coordinator_address too"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "two"}, "whole numbers: .*'two'"),
    ],
)
def test_hosts_that_are_half_named_are_refused(environment, message, joined):
    with pytest.raises(InputError, match=message):
        joined(environment)


def test_hosts_that_cannot_be_are_one_line(monkeypatch):
    for name, value in (ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax._src.distributed.xla_bridge, "backends_are_initialized", lambda: False)
    with pytest.raises(InputError, match=r"cannot be joined: .*process_id < num_processes"):
        distributed.start_hosts()


COMPUTE_TOGETHER = """
import sys, distributed, runtime
@runtime.failures_shared()
def main(host, address):
    runtime.set_environment(coordinator_address=address, num_processes=2, process_id=int(host))
    distributed.start_hosts()
    import jax, jax.numpy as jnp
    total = jax.pmap(lambda x: jax.lax.psum(x, "i"), axis_name="i")
    while float(total(jnp.ones(1))[0]) == 2:
        print("together" * (host == "0"), end="", flush=True)
main(*sys.argv[1:])
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_host_that_dies_ends_the_other_with_a_line(killed):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"XLA_FLAGS": ""}
    hosts = [
        subprocess.Popen([sys.executable, "-c", COMPUTE_TOGETHER, host, address], cwd=ROOT, env=environment, **pipes)
        for host in "01"
    ]
    try:
        assert hosts[0].stdout.readline().startswith("[Gloo]")  # which comes with the first collective
        assert hosts[0].stdout.read(8) == "together"
        hosts[killed].kill()
        _, said = hosts[1 - killed].communicate(timeout=300)
    finally:
        for host in hosts:
            host.kill()
            host.communicate()
    # Of the first host, which coordinates, JAX's runtime may notice the end first; it says so and aborts the process.
    runtimes = killed == 0 and hosts[1].returncode == -signal.SIGABRT and "another task died" in said
    assert runtimes or hosts[1 - killed].returncode == 1, said
    assert runtimes or "\nerror: another host of this job has ended" in f"\n{said}", said
    assert "Traceback" not in said


def test_without_a_home_libraries_get_a_temporary_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError, as of a user id without a name
    for _ in range(2):
        runtime.set_environment()
        assert os.environ["HOME"] == str(tmp_path / f"seqrf-{os.getuid()}")
        assert runtime.cache_folder().is_relative_to(tmp_path) or "SEQRF_CACHE" in os.environ
        assert capsys.readouterr().err.count(f"caches are in {tmp_path}") == 1
        monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setattr(runtime.os, "getuid", lambda: 12345)
    (tmp_path / "seqrf-12345").mkdir()  # made by somebody else
    runtime.set_environment()
    assert os.environ["HOME"].startswith(str(tmp_path / "seqrf-"))
    assert os.environ["HOME"] != str(tmp_path / "seqrf-12345")


def test_settings_of_the_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {"XLA_FLAGS": "--a"})
    runtime.set_environment(deterministic=True, coordinator_address=None, num_processes=1)
    assert os.environ["XLA_FLAGS"] == "--a --xla_gpu_deterministic_ops=true"
    assert os.environ["JAX_NUM_PROCESSES"] == "1"
    assert "JAX_COORDINATOR_ADDRESS" not in os.environ
