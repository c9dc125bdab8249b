"""How workers and hosts share the files of a pair set, and how a run is resumed.

Worker i of n makes the files i, i + n, ...; its hosts take these in turn. They meet only in the folder, where a file is
either complete or absent.
"""

import contextlib
import errno
import logging
import shutil
import time
from collections.abc import Iterable, Iterator

import runtime
import utils
from pairs import manifest as pairmanifest
from pairs import npz
from pairs.plan import PairPlan
from utils import InputError

POLL_SECONDS = 0.5
STALE_SECONDS = 600  # a temporary file of this age was left behind by a killed run
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY_DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EREMOTEIO)

logger = logging.getLogger("seqrf")


def worker_of(text: str) -> tuple[int, int]:
    """(i, n) of 'i/n': the i-th of n workers that share a pair set, counted from 1.

    Raises:
      InputError: not of that form, or not 1 <= i <= n.
    """
    number, slash, workers = text.partition("/")
    if not (slash and number.isdecimal() and workers.isdecimal() and 1 <= int(number) <= int(workers)):
        raise InputError(f"training.gen_worker = {text!r} is not of the form 'i/n' with 1 <= i <= n")
    return int(number), int(workers)


def files_of_worker(plan: PairPlan, worker: tuple[int, int]) -> range:
    """The numbers of the files that the hosts of worker (i, n) share."""
    number, workers = worker
    return range(number, plan.files + 1, workers)


def files_to_make(plan: PairPlan, numbers: Iterable[int]) -> list[int]:
    """Those of the files `numbers` that are missing or broken; broken ones are removed.

    Raises:
      InputError: the disk is too small for the missing files.
    """
    manifest = pairmanifest.read_manifest(plan.folder)
    faults = {number: fault for number in numbers if (fault := _fault(plan, manifest, number))}
    broken = [number for number, fault in faults.items() if isinstance(fault, npz.BrokenFile)]
    for number in broken:
        logger.warning("%s", faults[number])
    if faults:
        _check_disk_space(plan)
        pairmanifest.reopen_set(plan.folder, broken)
    return list(faults)


def _fault(plan, manifest, number):
    """The reason to make file `number`; None if it exists and agrees with the manifest."""
    try:
        pairmanifest.check_file(plan.folder, manifest, number)
    except (npz.MissingFile, npz.BrokenFile) as fault:
        return fault
    return None


def wait_for_files(plan: PairPlan, numbers: Iterable[int]) -> None:
    """Returns when the files `numbers`, which other hosts make, exist and agree with the manifest.

    JAX ends all hosts soon after the first has left. Polling the folder needs no collective with its time limit.
    """
    waiting = set(numbers)
    while waiting:
        runtime.preemption.check()
        manifest = pairmanifest.read_manifest(plan.folder)
        waiting = {number for number in waiting if _fault(plan, manifest, number)}
        if waiting:
            time.sleep(POLL_SECONDS)


def remove_temporaries(plan: PairPlan, *, complete: bool = False) -> None:
    """Removes the temporary files that killed runs have left: old ones, and of a complete set all pair files'."""
    stale = time.time() - STALE_SECONDS
    for path in [*plan.folder.glob(".*.tmp"), *plan.folder.parent.glob(".*.png.*.tmp")]:
        with contextlib.suppress(FileNotFoundError):  # another worker may remove them too
            if path.stat().mtime <= stale or (complete and ".npz." in path.name):
                path.unlink()


def _check_disk_space(plan):
    """Raises InputError where a local disk is too small for the missing files."""
    needed = sum(map(plan.file_bytes, pairmanifest.missing_files(plan)))
    if utils.is_local(plan.folder) and needed > (free := shutil.disk_usage(plan.folder).free):
        raise InputError(
            f"the disk of {plan.folder} has {free:,} bytes free, the missing pairs need {needed:,}; free some space, "
            "make fewer pairs, or use training.reflow_dtype=float16 or training.reflow_store_noise=False"
        )


@contextlib.contextmanager
def named_disk_errors(plan: PairPlan) -> Iterator[None]:
    """Converts the errors of a full or read-only disk to an InputError."""
    try:
        with utils.os_errors():
            yield
    except OSError as error:
        if error.errno in FULL_DISK:
            missing = pairmanifest.missing_files(plan)
            raise InputError(
                f"the disk of {plan.folder} is full: the {len(missing)} missing pair files need "
                f"{sum(map(plan.file_bytes, missing)):,} bytes; free some space and run the same command again, which "
                "resumes from here"
            ) from error
        if error.errno in READ_ONLY_DISK:
            raise InputError(f"{plan.folder} cannot be written: {error}; is it a dangling symlink?") from error
        raise
