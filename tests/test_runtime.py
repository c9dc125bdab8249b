"""What a process writes to its terminal, seen from outside, as libraries write to the file descriptor."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runtime

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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
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
    return process.wait(timeout=30), process.stderr.read()


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
