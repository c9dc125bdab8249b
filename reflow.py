"""Reflow: the pairs that a teacher makes, and the doors to reading them and to SeqRF-Ada's boundaries.

A pair is a point x1 at a segment's start and the point x0 that the teacher's ODE carries it to at the segment's end.
"""

import collections
import contextlib
import dataclasses
import errno
import itertools
import logging
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import tqdm

import parallel
import sampling
import utils
from adaptive import adaptive_boundaries
from pairs import npz
from pairs import plan as pairplan
from pairs.plan import PairPlan, claim_plan, plan_pairs, read_manifest
from pairs.reader import PairSet, count_of_file, images_of_file
from utils import InputError

__all__ = [
    "PairPlan", "PairSet", "adaptive_boundaries", "claim_plan", "generate", "plan_pairs", "read_manifest", "worker_of",
]  # fmt: skip

BATCHES_AHEAD = 2  # handed to the devices before the first of them is waited for
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in XLA's message
SHOWN_PAIRS = 16  # of each segment, in the figure
FIGURE = "pairs.png"
POLL_SECONDS = 0.5
STALE_SECONDS = 600  # a file still under its temporary name after this was left behind by a kill
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED_DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EREMOTEIO)

logger = logging.getLogger("seqrf")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one call of `generate` did.

    Attributes:
      pairs, files: solved by this call on this host.
      nfe: mean network calls of a solve in each segment; empty if nothing was solved.
      calls: network calls of a device, all batches together.
      seconds: from the first batch to the last file written; the compilation before them not included.
      complete: whether the whole set is there now.
    """

    pairs: int
    files: int
    nfe: list[float]
    calls: int
    seconds: float
    complete: bool

    @property
    def pairs_per_second(self) -> float:
        """Pairs made in a second on this host; 0 if none was."""
        return self.pairs / self.seconds if self.pairs else 0.0


def worker_of(text: str) -> tuple[int, int]:
    """(i, n) of 'i/n': the i-th of n workers that share a pair set, counted from 1.

    Raises:
      InputError: not of that form, or not 1 <= i <= n.
    """
    place, slash, workers = text.partition("/")
    if not (slash and place.isdecimal() and workers.isdecimal() and 1 <= int(place) <= int(workers)):
        raise InputError(f"training.gen_worker = {text!r} is not of the form 'i/n' with 1 <= i <= n")
    return int(place), int(workers)


def generate(
    plan: PairPlan,
    images,
    make_velocity,
    params,
    *,
    batch_size: int,
    worker: tuple[int, int] = (1, 1),
    extra: dict | None = None,
    progress: bool = True,
) -> Summary:
    """Makes what is missing of this worker's and this host's share of the planned pair set.

    Files that are there and whole are left alone, so a run that was interrupted goes on. Worker (i, n) makes the files
    i, i + n, ...; its hosts share these in turn. Whoever finds the whole set there completes the manifest.

    Args:
      plan: what the set is; of workers that begin at once with SeqRF-Ada's boundaries one decides, see `claim_plan`.
      images: the `ImageSource` to start from.
      make_velocity: params -> velocity(x [B, H, W, C], t [B], index [B] int32) -> dx/dtau.
      params: the teacher's weights, not replicated.
      batch_size: images solved together on this host, at most; changes speed only.
      worker: (i, n).
      extra: further entries for the manifest, such as the costs of SeqRF-Ada's division.
      progress: show a progress bar.

    Raises:
      InputError: the folder holds another set, the disk is too small or full, a solve did not reach its tolerance, a
        batch is too large for the devices.
      BrokenFile: a file of another worker's share is not whole.
    """
    with _disk_errors_named(plan):
        _remove_temporaries(plan)
        plan = claim_plan(plan, extra or {})
        share = parallel.this_host().items(_files_of_worker(plan, worker))
        todo = _prepared(plan, share)
        done = sum(map(plan.count, share)) - sum(map(plan.count, todo))
        with tqdm.tqdm(initial=done, total=sum(map(plan.count, share)), unit="pair", disable=not progress) as bar:
            summary = _make_files(plan, todo, images, make_velocity, params, batch_size, bar)
        _wait_for_hosts(plan, set(_files_of_worker(plan, worker)) - set(share))
        if pairplan.complete_manifest(plan) is None:
            logger.info("%d of %d pair files are still missing", len(pairplan.missing_files(plan)), plan.files)
            return summary
        _remove_temporaries(plan, all_pairs=True)
        return dataclasses.replace(summary, complete=True)


def _files_of_worker(plan, worker):
    """The numbers of the files that the worker's hosts share."""
    place, workers = worker
    return range(place, plan.files + 1, workers)


def _prepared(plan, share):
    """The files of the share that are to be made; those that are there but broken are removed."""
    manifest = pairplan.begin_manifest(plan, {})
    faults = {number: fault for number in share if (fault := _fault(plan, manifest, number))}
    broken = [number for number, fault in faults.items() if isinstance(fault, npz.BrokenFile)]
    for number in broken:
        logger.warning("%s", faults[number])
    if faults:
        _refuse_small_disk(plan)
        pairplan.reopen_set(plan.folder, broken)
    return list(faults)


def _fault(plan, manifest, number):
    """Why the file is to be made; None if it is there as it should be."""
    try:
        count_of_file(plan.folder, manifest, number)
    except (npz.MissingFile, npz.BrokenFile) as fault:
        return fault
    return None


def _wait_for_hosts(plan, awaited):
    """Returns when this worker's other hosts have made the files `awaited`, which they may find broken, as we do.

    JAX ends all hosts soon after the first has left. Looking for the files needs no collective with its time limit.
    """
    while awaited:
        manifest, there = read_manifest(plan.folder), npz.pair_file_numbers(plan.folder)
        awaited -= {number for number in awaited.intersection(there) if not _fault(plan, manifest, number)}
        if awaited:
            time.sleep(POLL_SECONDS)


@dataclasses.dataclass
class _FileInWork:
    """A pair file while its pairs are being solved."""

    number: int
    layout: pairplan.FileLayout
    x1: np.ndarray
    x0: np.ndarray
    unsolved: int  # of its parts

    def write(self, plan) -> None:
        """Draws the first file of a set, and writes the file; in this order, so that a kill leaves no gap."""
        layout = self.layout
        if self.number == 1:
            draw_pairs(plan.folder.parent / FIGURE, self.x0, self.x1, layout.segment, plan)
        starts = {"x1": self.x1}
        if not plan.store_noise:
            starts = {name: getattr(layout, name) for name in ("image", "flip", "key")}
            starts["x1_crc"] = npz.crc_of_rows(self.x1)
        # Where a manifest cannot be claimed, another worker's may have replaced it: files of two sets must not mix.
        pairplan.begin_manifest(plan, {})
        arrays = {"x0": self.x0, **starts, "t0": layout.t0, "t1": layout.t1}
        utils.write_arrays(plan.path(self.number), overwrite=False, **arrays)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one device solves at a time: rows of a file that belong to one segment, some repeated to fill it."""

    file: _FileInWork
    segment: int
    rows: np.ndarray
    count: int  # of rows that are not repeated


@dataclasses.dataclass
class _Tally:
    """What has been solved."""

    pairs: int = 0
    files: int = 0
    calls: int = 0
    nfe: list[list[int]] = dataclasses.field(default_factory=list)  # of every part, by segment

    def summary(self, started):
        nfe = [float(np.mean(of)) for of in self.nfe] if self.pairs else []
        return Summary(self.pairs, self.files, nfe, self.calls, time.perf_counter() - started, complete=False)


def _make_files(plan, todo, images, make_velocity, params, batch_size, bar):
    """Solves and writes the files `todo`: the host prepares one file while the devices solve and a thread writes."""
    tally = _Tally(nfe=[[] for _ in range(plan.k)])
    if not todo:
        return tally.summary(time.perf_counter())
    size = _rows_of_part(plan, batch_size)
    with _memory_errors_named(batch_size):
        solve = _parts_solver(plan, size, make_velocity, params)
        started = time.perf_counter()
        parts = _parts(plan, todo, images, size)
        with ThreadPoolExecutor(1, thread_name_prefix="pairs-write") as writer:
            writing = None
            for solved in _dispatched_ahead(solve, _in_groups(parts, jax.local_device_count())):
                for file in _finished_files(plan, solved, tally, bar):
                    if writing:
                        writing.result()
                    writing = writer.submit(file.write, plan)
                if writing and writing.done():  # a full disk is noticed now, not a whole file later
                    writing.result()
                    writing = None
            if writing:
                writing.result()
    return tally.summary(started)


def _finished_files(plan, solved, tally, bar):
    """Puts what the devices have solved into its files; those that are full then."""
    parts, (x0, calls) = solved
    calls = np.asarray(calls)
    tally.calls += int(calls.max())
    finished = []
    for part, ends, calls_of_part in zip(parts, np.asarray(x0), calls, strict=False):  # spare devices repeat a part
        ends = ends[: part.count]
        if not np.isfinite(ends).all():
            raise InputError(f"a solve did not reach sampling.tol = {plan.tol}; use a larger tolerance")
        part.file.x0[part.rows[: part.count]] = ends
        part.file.unsolved -= 1
        tally.nfe[part.segment].append(int(calls_of_part))
        tally.pairs += part.count
        bar.update(part.count)
        if not part.file.unsolved:
            finished.append(part.file)
    tally.files += len(finished)
    return finished


def _rows_of_part(plan, batch_size):
    """The pairs that a device solves at a time: at most its share of `batch_size`, all parts of a segment alike.

    It does not depend on how many devices there are if `batch_size` grows with them; the bytes then do not either.
    """
    pairs = plan.file_size // plan.k
    most = max(1, batch_size // jax.local_device_count())
    return math.ceil(pairs / math.ceil(pairs / most))


def _parts_solver(plan, size, make_velocity, params):
    """The compiled program that solves a _Part on each device: one for all segments, whose times it is told."""

    def solve(params, x, t_start, t_end, index):
        velocity = make_velocity(params)
        solution = sampling.solve_segment(
            velocity, x, t_start, t_end, index, tol=plan.tol, solver=plan.solver, error_norm=plan.error_norm
        )
        return solution.x, solution.nfe

    # Only this host's devices: the hosts make different files, in their own time.
    devices = jax.local_devices()
    boundaries = np.asarray(plan.boundaries, np.float32)
    params = parallel.replicate(params)
    program = parallel.map_devices(solve)
    times, index = np.zeros(len(devices), np.float32), np.zeros(len(devices), np.int32)
    shape = (len(devices), size, *plan.image_shape)
    program = program.lower(params, np.zeros(shape, np.float32), times, times, index).compile()

    def solve_parts(parts):
        parts = parts + [parts[-1]] * (len(devices) - len(parts))
        x = np.stack([part.file.x1[part.rows] for part in parts]).astype(np.float32)
        index = np.array([part.segment for part in parts], np.int32)
        return program(params, x, boundaries[index], boundaries[index + 1], index)

    return solve_parts


def _parts(plan, todo, images, size):
    """The parts of the files `todo` in turn."""
    for number in todo:
        layout = pairplan.file_layout(plan, number)
        x1 = pairplan.start_points(
            images_of_file(images, layout.first_image, plan.count(number), plan.k),
            layout.flip,
            layout.key,
            layout.t1,
            centered=plan.centered,
            dequantize=plan.dequantize,
            dtype=plan.dtype,
        )
        parts_of_segment = math.ceil(plan.count(number) // plan.k / size)
        file = _FileInWork(number, layout, x1, np.empty_like(x1), unsolved=plan.k * parts_of_segment)
        for segment in range(plan.k):
            rows = np.flatnonzero(layout.segment == segment)
            filled = np.resize(rows, (parts_of_segment, size))
            for place, rows_of_part in enumerate(filled):
                yield _Part(file, segment, rows_of_part, min(size, len(rows) - place * size))


def _in_groups(parts, size):
    """Lists of `size` parts in turn, the last one shorter; they go on from one segment and file to the next."""
    return iter(lambda: list(itertools.islice(parts, size)), [])


def _dispatched_ahead(solve, groups):
    """(parts, solve(parts)) in turn, some groups handed to the devices before the first is waited for."""
    waiting = collections.deque()
    for parts in groups:
        waiting.append((parts, solve(parts)))
        if len(waiting) > BATCHES_AHEAD:
            yield waiting.popleft()
    yield from waiting


def draw_pairs(path, x0, x1, segment, plan: PairPlan) -> None:
    """Writes a PNG of some pairs' start and end points, a row for each segment."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4 * plan.k), layout="constrained")
    axes = figure.subplots(plan.k, 2, squeeze=False)
    for index, row in enumerate(axes):
        rows = np.flatnonzero(segment == index)[:SHOWN_PAIRS]
        for ax, points, time_, name in zip(
            row, (x1, x0), plan.boundaries[index : index + 2], ("start", "end"), strict=True
        ):
            unit = points[rows].astype(np.float32)
            ax.imshow(utils.image_grid((unit + 1) / 2 if plan.centered else unit))
            ax.set_title(f"segment {index}, {name}: t = {time_:.3g}")
            ax.set_axis_off()
    with utils.atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _refuse_small_disk(plan):
    """Says at once that the disk is too small, where that can be told."""
    needed = sum(map(plan.file_bytes, pairplan.missing_files(plan)))
    if utils.is_local(plan.folder) and needed > (free := shutil.disk_usage(plan.folder).free):
        raise InputError(
            f"the disk of {plan.folder} has {free:,} bytes free, the pairs that are not there need {needed:,}; make "
            "room, make fewer pairs, or use training.reflow_dtype=float16 or training.reflow_store_noise=False"
        )


@contextlib.contextmanager
def _disk_errors_named(plan):
    """One line for a disk that fills or cannot be written."""
    try:
        with utils.os_errors():
            yield
    except OSError as error:
        if error.errno in FULL_DISK:
            missing = pairplan.missing_files(plan)
            raise InputError(
                f"the disk of {plan.folder} is full: the {len(missing)} pair files that are not there need "
                f"{sum(map(plan.file_bytes, missing)):,} bytes; make room and run the same command again, which goes "
                "on from here"
            ) from error
        if error.errno in CLOSED_DISK:
            raise InputError(f"{plan.folder} cannot be written: {error}; a link to a disk that is there?") from error
        raise


@contextlib.contextmanager
def _memory_errors_named(batch_size):
    """One line for devices that are too small."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        raise InputError(
            f"training.gen_reflow_size = {batch_size} is too large for the memory of the devices "
            f"({str(error).splitlines()[0]}); use a smaller one"
        ) from error


def _remove_temporaries(plan, all_pairs=False):
    """Removes the unfinished files that killed runs have left; a file being written now is younger than that.

    `all_pairs`: of a set that is complete nobody needs a pair file any more, however young.
    """
    for folder, pattern, age in (
        (plan.folder, ".reflow_batch_*.tmp", 0 if all_pairs else STALE_SECONDS),
        (plan.folder, f".{pairplan.MANIFEST}.*.tmp", STALE_SECONDS),
        (plan.folder.parent, f".{FIGURE}.*.tmp", STALE_SECONDS),
    ):
        for path in folder.glob(pattern) if folder.exists() else ():
            with contextlib.suppress(FileNotFoundError):  # another worker may clear up too
                if time.time() - path.stat().mtime >= age:
                    path.unlink()
