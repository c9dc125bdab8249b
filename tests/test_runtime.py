"""What a process writes to its terminal, seen from outside, as libraries write to the file descriptor."""

import subprocess
import sys
from pathlib import Path

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
