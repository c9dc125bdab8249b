"""Process-wide settings, in one place: environment, logging, several hosts, the compilation cache, TensorFlow.

Importing this module imports nothing heavy, so that `main.py --help` answers at once.
"""

import contextlib
import logging
import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NoReturn

from etils import epath

logger = logging.getLogger("seqrf")

# What collectives say when a host has gone: a status, then Gloo (CPU), NCCL (GPU) or the coordination service (all).
LOST_HOST = re.compile("[A-Z_]+: .*(Gloo|NCCL|[Pp]eer|heartbeat|unhealthy|[Cc]oordination)")
HOST_SETTINGS: dict[str, Callable] = {"coordinator_address": str, "num_processes": int, "process_id": int}
# Fail within about a minute when Google Cloud Storage is unreachable: 4 retries (about 15 s a call; TensorFlow's
# default takes 4 minutes) and 5 s to connect (default: 2 minutes). checkpointing/runs.py sets tensorstore's retries.
BUCKET_SETTINGS = {
    "GCS_RETRY_CONFIG_MAX_RETRIES": "4",
    "GCS_REQUEST_CONNECTION_TIMEOUT_SECS": "5",
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "5",
}
# What TensorFlow's libraries write in every import: information, and that jax has registered the GPU's plugins already.
STARTUP_MESSAGES = re.compile(
    rb"WARNING: All log messages before absl::Init|I\d{4} |\S+ \S+: I |.*(factory for plugin|computation_placer)"
)


def set_environment(*, deterministic: bool = False, **hosts: str | int | None) -> None:
    """Environment variables that libraries read when they are imported: call it before.

    EQX_ON_ERROR is set by sampling.py, which is a library too and must have it before diffrax.

    Args:
      deterministic: on a GPU, XLA picks kernels that give the same bits in every run.
      hosts: coordinator_address, num_processes, process_id, as `start_hosts` takes them; None: not given.
    """
    _ensure_home()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's C++ lines after its import: errors only
    os.environ.setdefault("JAX_ENABLE_PREEMPTION_SERVICE", "false")  # it would take SIGTERM from `Preemption`
    for name, value in BUCKET_SETTINGS.items():
        os.environ.setdefault(name, value)
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    os.environ.update({f"JAX_{name.upper()}": str(value) for name, value in hosts.items() if value is not None})


def _ensure_home() -> None:
    """Gives libraries a temporary home where a user has none, as in containers with a bare user id.

    Without one wandb raises, and others write into a folder `~`. Docker's is then `/`. One that is read-only stays.
    """
    with contextlib.suppress(RuntimeError):
        home = pathlib.Path.home()
        if home.is_dir() and (home != pathlib.Path("/") or os.access(home, os.W_OK)):
            return
    folder = pathlib.Path(tempfile.gettempdir()) / f"seqrf-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's, who could put files there for us
        folder = pathlib.Path(tempfile.mkdtemp(prefix="seqrf-"))
    os.environ["HOME"] = os.fspath(folder)
    print(
        f"warning: there is no home folder; caches are in {folder}, unless HOME is set",
        file=sys.stderr,
    )


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
    # A failed save is raised to us as well: its four tracebacks in the log, and what asyncio adds, tell nothing more.
    absl_logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # JAX says so too, without the remedy of `distributed.unused_accelerator`.
    unused = "may be present on this machine"
    logging.getLogger("jax._src.xla_bridge").addFilter(lambda record: unused not in record.getMessage())
    logging.raiseExceptions = False  # of wandb's own log, on a disk that is full
    sys.unraisablehook = _without_late_errors(sys.unraisablehook)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    with logging_redirect_tqdm([logger]):
        yield


class Preempted(Exception):
    """The process was asked to stop and has done so between two steps: nothing is half done.

    Attributes:
      signal: that asked.
      agreed: whether all hosts of the job stop at this very step, so that none of them waits for another.
    """

    def __init__(self, number: signal.Signals, where: str = "", *, agreed: bool = False):
        """`where`: what was reached, for the message."""
        super().__init__(" ".join(filter(None, (f"stopped by {number.name}", where))))
        self.signal, self.agreed = number, agreed

    @property
    def exit_code(self) -> int:
        """As shells have it for a process that the signal ended: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.signal


class Preemption:
    """Whether the process has been asked to stop, by SIGTERM or SIGINT. Long work asks between its steps."""

    def __init__(self) -> None:
        """Nothing is asked, and signals do what they did before."""
        self.requested: signal.Signals | None = None

    def check(self) -> None:
        """Raises Preempted if the process has been asked to stop."""
        if self.requested:
            raise Preempted(self.requested)

    def stopped(self, where: str) -> Preempted:
        """The exception to raise where all hosts have agreed to stop, asked by a signal to any of them."""
        return Preempted(self.requested or signal.SIGTERM, where, agreed=True)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Within the block SIGTERM and SIGINT only set `requested`; a further SIGINT ends the process at once.

        A thread receives the signals: Python's own handlers wait for the main thread, which may be compiling.
        """
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        threading.Thread(target=self._receive, args=(reading,), daemon=True).start()
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            writing.close()
            self.requested = None

    def _receive(self, reading):
        with reading:
            while byte := reading.recv(1):
                number = signal.Signals(byte[0])
                if self.requested and number == signal.SIGINT:
                    os._exit(128 + number)
                if not self.requested and number in (signal.SIGTERM, signal.SIGINT):
                    self.requested = number
                    logger.warning("%s: stopping after this step; a further Ctrl-C (SIGINT) ends at once", number.name)


preemption = Preemption()  # of this process


def leave(code: int, *, agreed: bool = False) -> NoReturn:
    """Ends the process, one of several hosts without waiting for the others, which wait for it, unless all agreed."""
    if _has_hosts() and not agreed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def failures_shared() -> Iterator[None]:
    """One of several hosts that fails inside the block ends at once, and so do the others; a lost host is named so."""
    try:
        yield
    except Exception as error:
        if not _has_hosts():
            raise
        if LOST_HOST.match(reason := str(error).partition("\n")[0]):
            advice = "see its output, then start all hosts again with the same command"
            print(
                f"error: another host of this job has ended, so this one ends too; {advice} ({reason})", file=sys.stderr
            )
        else:
            traceback.print_exc()
        leave(1)


def _has_hosts() -> bool:
    """Whether this process has joined others. Does not import jax."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _without_late_errors(hook):
    """`hook` (sys.unraisablehook) without the secondary errors of wandb and open writers after a reported failure."""

    def reported(unraisable):
        error = unraisable.exc_value
        if str(error) != "Event loop is closed" and not isinstance(error, ConnectionError):
            hook(unraisable)

    return reported


def set_up_compilation_cache(folder: os.PathLike) -> None:
    """Keeps compiled programs in `folder`, unless the user has named another one; warns if that cannot be written."""

    import jax

    import utils

    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        utils.check_writable(named or folder)
    except utils.InputError as error:
        logger.warning("no compiled program is kept: %s (SEQRF_CACHE names one)", error)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    if not named:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # All of them: a threshold in seconds would keep other programs on a busy day than on a calm one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def tensorflow_on_cpu() -> ModuleType:
    """The module tensorflow, without its start-up messages, kept off the GPU, whose memory it would take from JAX."""
    from utils import needed

    with contextlib.nullcontext() if "tensorflow" in sys.modules else _without_startup_messages():
        tensorflow = needed("tensorflow", "this job")

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


def cache_folder() -> epath.Path:
    """Where trained classifiers and features are kept: $SEQRF_CACHE, else ~/.cache/seqrf."""
    return epath.Path(os.environ.get("SEQRF_CACHE") or "~/.cache/seqrf").expanduser()
