"""Process-wide settings, in one place: environment, logging, several hosts, the compilation cache, TensorFlow.

Importing this module imports nothing heavy, so that `main.py --help` answers at once.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

logger = logging.getLogger("seqrf")

HOSTS_WAIT_SECONDS = 24 * 3600  # at the end, for the first host, which alone draws snapshots
# What TensorFlow's libraries write in every import: information, and that jax has registered the GPU's plugins already.
STARTUP_MESSAGES = re.compile(
    rb"WARNING: All log messages before absl::Init|I\d{4} |\S+ \S+: I |.*(factory for plugin|computation_placer)"
)


def set_environment() -> None:
    """Environment variables that libraries read when they are imported, unless the user has set them.

    EQX_ON_ERROR is set by sampling.py, which is a library too and must have it before diffrax.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's C++ lines after its import: errors only


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"


@contextlib.contextmanager
def terminal_logging() -> Iterator[None]:
    """Logs SeqRF's own lines, short and above progress bars, and of libraries only warnings and errors."""
    from absl import logging as absl_logging
    from tqdm.contrib.logging import logging_redirect_tqdm

    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax alone logs twenty lines a checkpoint
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    with logging_redirect_tqdm([logger]):
        yield


def start_hosts() -> None:
    """Joins the hosts of a job: JAX_PROCESS_ID of JAX_NUM_PROCESSES at JAX_COORDINATOR_ADDRESS, where that is set."""
    import jax

    if "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized():
        numbers: dict[str, Any] = {
            name: int(value)
            for name in ("num_processes", "process_id")
            if (value := os.environ.get(f"JAX_{name.upper()}"))
        }
        jax.distributed.initialize(**numbers, shutdown_timeout_seconds=HOSTS_WAIT_SECONDS)


def set_up_compilation_cache(folder: os.PathLike) -> None:
    """Keeps compiled programs in `folder`, unless the user has named another one."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # All of them: a threshold in seconds would keep other programs on a busy day than on a calm one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def tensorflow_on_cpu() -> ModuleType:
    """The module tensorflow, without its start-up messages, kept off the GPU, whose memory it would take from JAX."""
    with contextlib.nullcontext() if "tensorflow" in sys.modules else _without_startup_messages():
        import tensorflow

    tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow


@contextlib.contextmanager
def _without_startup_messages() -> Iterator[None]:
    """Holds back what is written to stderr inside the block, then writes all of it but STARTUP_MESSAGES.

    By file descriptor: the lines come from C++ before its logging can be configured.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not STARTUP_MESSAGES.match(line):
                    os.write(2, line)
