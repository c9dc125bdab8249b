"""One job at a time in a folder of results: a lock that names its holder and does not outlive it."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

import distributed
import runtime
import utils
from utils import InputError

logger = logging.getLogger("seqrf")

RENEWED = 10  # seconds between the renewals of a lease
VOID = 60  # seconds without a renewal after which a lease holds no more
_WITHOUT_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def exclusive(folder: epath.PathLike) -> Iterator[None]:
    """Holds the results in `folder` for this job while the block runs; the first host does for all.

    Temporary files that a killed job left in it are removed.

    On a disk the operating system frees the lock when its process ends, however it ends. In a bucket, and on network
    disks without flock, it is a file that is renewed: what a killed process leaves is void after VOID seconds.

    Raises:
      InputError: another process holds them, or the folder beside `folder` cannot be written.
    """
    if not distributed.is_first_host():
        yield
        return
    folder = epath.Path(folder)
    utils.check_writable(folder.parent)
    path = folder.parent / f".{folder.name}.lock"
    with contextlib.ExitStack() as held:
        if not utils.is_local(path) or not _take_flock(path, held):
            held.enter_context(_lease(path))
        utils.remove_leftovers(folder)
        yield


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _in_use(path: epath.Path, holder: str) -> InputError:
    folder = path.parent / path.name.removeprefix(".").removesuffix(".lock")
    return InputError(f"{folder} is in use by {holder}; wait until it ends, or choose another folder")


def _take_flock(path: epath.Path, held: contextlib.ExitStack) -> bool:
    """Locks the file until `held` is left; False: not on this disk."""
    while True:
        file = held.enter_context(open(path, "a+"))  # noqa: SIM115  the stack closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(path, file.read(200).strip() or "another process") from None
        except OSError as error:
            if error.errno in _WITHOUT_FLOCK:
                return False
            raise
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break  # else its holder removed it between our opening and locking it
    file.truncate(0)
    file.write(_holder())
    file.flush()
    held.callback(path.unlink, missing_ok=True)
    return True


@contextlib.contextmanager
def _lease(path: epath.Path) -> Iterator[None]:
    _wait_until_void(path)
    own, ended = {"holder": _holder(), "token": uuid.uuid4().hex}, threading.Event()

    def renew() -> None:
        renewals = 0
        while not ended.wait(RENEWED):
            renewals += 1
            try:
                utils.write_json(path, own | {"renewals": renewals})
            except OSError as error:
                logger.warning("%s could not be renewed: %s", path, error.strerror)

    utils.write_json(path, own | {"renewals": 0})
    time.sleep(VOID / 30)  # of two that find no lease at the same moment, the later one's is there afterwards
    if (now := utils.valid_json(path, dict[str, Any], {})).get("token") != own["token"]:
        raise _in_use(path, str(now.get("holder", "another process"))[:200])
    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        path.unlink(missing_ok=True)


def _wait_until_void(path: epath.Path) -> None:
    """Waits until there is no lease, or it has not changed for VOID seconds: no clock of another host is read.

    Raises:
      InputError: it is renewed.
    """
    before = utils.valid_json(path, dict[str, Any])
    if before is None:
        return
    logger.info("waiting up to %d s: %s may still be at work in %s", VOID, before.get("holder"), path.parent)
    end = time.monotonic() + VOID
    while time.monotonic() < end:
        time.sleep(min(1, VOID / 10))
        runtime.preemption.check()
        now = utils.valid_json(path, dict[str, Any])
        if now is None:
            return
        if now != before:
            raise _in_use(path, str(now.get("holder"))[:200])
