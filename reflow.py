"""Reflow: the pairs that a teacher makes, and the doors to reading them and to SeqRF-Ada's boundaries.

A pair is a point x1 at a segment's start and the point x0 that the teacher's ODE carries it to at the segment's end.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import logging
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import tqdm
from flax import jax_utils

import pairfiles
import pairplan
import sampling
import utils
from adaptive import adaptive_boundaries
from pairplan import PairPlan, plan_pairs, read_manifest
from pairs import PairSet, count_of_file, images_of_file
from utils import InputError

__all__ = [
    "PairPlan", "PairSet", "adaptive_boundaries", "fingerprint", "generate", "plan_pairs", "read_manifest", "worker_of",
]  # fmt: skip

BATCHES_AHEAD = 2  # handed to the devices before the first of them is waited for
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
      pairs, files: made by this call on this host.
      nfe: mean network calls of a batch in each segment; empty if nothing was made.
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


def fingerprint(params) -> str:
    """16 hexadecimal digits that tell one tree of weights from another, by names, shapes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf)
    return digest.hexdigest()[:16]


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
      plan: what the set is.
      images: the `ImageSource` to start from.
      make_velocity: params -> velocity(x [B, H, W, C], t [B], index [B] int32) -> dx/dtau.
      params: the teacher's weights, not replicated.
      batch_size: images solved together on this host, at most; changes speed only.
      worker: (i, n).
      extra: further entries for the manifest, such as the costs of SeqRF-Ada's division.
      progress: show a progress bar.

    Raises:
      InputError: the folder holds another set, the disk is too small or full, a solve did not reach its tolerance.
    """
    with _disk_errors_named(plan):
        _remove_temporaries(plan, older_than=STALE_SECONDS)
        manifest = pairplan.begin_manifest(plan, extra or {})
        share = _files_of_worker(plan, worker)[jax.process_index() :: jax.process_count()]
        todo = [number for number in share if not _is_whole(plan, manifest, number)]
        if todo:
            _refuse_small_disk(plan)
            if manifest["complete"]:
                pairplan.write_manifest(plan.folder, manifest | {"complete": False})
        done = sum(map(plan.count, share)) - sum(map(plan.count, todo))
        with tqdm.tqdm(initial=done, total=sum(map(plan.count, share)), unit="pair", disable=not progress) as bar:
            summary = _make_files(plan, todo, images, make_velocity, params, batch_size, bar)
        _wait_for_hosts(plan, worker)
        if pairplan.complete_manifest(plan) is None:
            logger.info("%d of %d pair files are still missing", len(pairplan.missing_files(plan)), plan.files)
            return summary
        _remove_temporaries(plan, older_than=0)
        return dataclasses.replace(summary, complete=True)


def _files_of_worker(plan, worker):
    """The numbers of the files that the worker's hosts share."""
    place, workers = worker
    return range(place, plan.files + 1, workers)


def _wait_for_hosts(plan, worker):
    """Returns when this worker's other hosts have made their files too.

    JAX ends all hosts soon after the first has left. Looking for the files needs no collective with its time limit.
    """
    if jax.process_count() > 1:
        while not set(_files_of_worker(plan, worker)).isdisjoint(pairplan.missing_files(plan)):
            time.sleep(POLL_SECONDS)


def _is_whole(plan, manifest, number):
    """Whether the file is there as it should be; one that is there but broken is to be made again."""
    if not plan.path(number).exists():
        return False
    try:
        count_of_file(plan.folder, manifest, number)
    except pairfiles.BrokenFile as error:
        logger.warning("%s", error)
        return False
    return True


@dataclasses.dataclass
class _FileInWork:
    """A pair file while its pairs are being solved."""

    number: int
    layout: pairplan.FileLayout
    x1: np.ndarray
    x0: np.ndarray

    def write(self, plan):
        """Draws the first file of a set, and writes the file; in this order, so that a kill leaves no gap."""
        layout = self.layout
        if self.number == 1:
            draw_pairs(plan.folder.parent / FIGURE, self.x0, self.x1, layout.segment, plan)
        starts = (
            {"x1": self.x1} if plan.store_noise else {name: getattr(layout, name) for name in ("image", "flip", "key")}
        )
        try:
            pairfiles.write_pairs(plan.path(self.number), {"x0": self.x0, **starts, "t0": layout.t0, "t1": layout.t1})
        except FileNotFoundError:
            # Another worker made the same file, completed the set and cleared away what was not finished.
            if not plan.path(self.number).exists():
                raise


@dataclasses.dataclass(frozen=True)
class _Job:
    """One batch to be solved: rows of a file that belong to one segment, the last ones repeated to fill the batch."""

    file: _FileInWork
    segment: int
    rows: np.ndarray
    count: int  # of rows that are not repeated
    last: bool  # of its file


def _make_files(plan, todo, images, make_velocity, params, batch_size, bar):
    """Solves and writes the files `todo`: the host prepares one file while the devices solve and a thread writes."""
    if not todo:
        return Summary(pairs=0, files=0, nfe=[], calls=0, seconds=0.0, complete=False)
    batch = _rounded_batch(plan, batch_size)
    solve = _segment_solver(plan, batch, make_velocity, params)
    started, nfe, calls = time.perf_counter(), [[] for _ in range(plan.k)], 0
    with ThreadPoolExecutor(1, thread_name_prefix="pairs-write") as writer:
        writing = None
        for job, (x0, calls_each) in _dispatched_ahead(solve, _jobs(plan, todo, images, batch)):
            x0 = np.asarray(x0).reshape(batch, *plan.image_shape)[: job.count]
            if not np.isfinite(x0).all():
                raise InputError(f"a solve did not reach sampling.tol = {plan.tol}; use a larger tolerance")
            job.file.x0[job.rows[: job.count]] = x0
            nfe[job.segment].append(np.mean(calls_each))
            calls += int(np.max(calls_each))
            bar.update(job.count)
            if job.last:
                if writing:
                    writing.result()
                writing = writer.submit(job.file.write, plan)
        writing.result()
    seconds = time.perf_counter() - started
    pairs = sum(map(plan.count, todo))
    return Summary(pairs, len(todo), [float(np.mean(of)) for of in nfe], calls, seconds, complete=False)


def _rounded_batch(plan, batch_size):
    """The pairs in a batch: at most `batch_size`, all batches of a segment alike, a multiple of the devices."""
    pairs = plan.file_size // plan.k
    batches = math.ceil(pairs / batch_size)
    devices = jax.local_device_count()
    return math.ceil(pairs / batches / devices) * devices


def _segment_solver(plan, batch, make_velocity, params):
    """The compiled program that solves a _Job: one for all segments, whose times it is told."""

    def solve(params, x, t_start, t_end, index):
        velocity = make_velocity(params)
        solution = sampling.solve_segment(
            velocity, x, t_start, t_end, index, tol=plan.tol, solver=plan.solver, error_norm=plan.error_norm
        )
        return solution.x, solution.nfe

    # Only this host's devices: the hosts make different files, in their own time.
    devices = jax.local_devices()
    shape = (len(devices), batch // len(devices), *plan.image_shape)
    boundaries = np.asarray(plan.boundaries, np.float32)
    params = jax_utils.replicate(params, devices)
    program = jax.pmap(solve, in_axes=(0, 0, None, None, None), devices=devices)
    program = program.lower(params, np.zeros(shape, np.float32), *boundaries[:2], np.int32(0)).compile()

    def solve_job(job):
        x = job.file.x1[job.rows].astype(np.float32).reshape(shape)
        return program(params, x, *boundaries[job.segment : job.segment + 2], np.int32(job.segment))

    return solve_job


def _jobs(plan, todo, images, batch):
    """The batches of every file in turn."""
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
        file = _FileInWork(number, layout, x1, np.empty_like(x1))
        for segment in range(plan.k):
            rows = np.flatnonzero(layout.segment == segment)
            # A device's part of a batch must not depend on how many devices there are, the repeated rows neither.
            filled = np.resize(rows, math.ceil(len(rows) / batch) * batch)
            for first in range(0, len(filled), batch):
                last = segment == plan.k - 1 and first + batch == len(filled)
                yield _Job(file, segment, filled[first : first + batch], min(batch, len(rows) - first), last)


def _dispatched_ahead(solve, jobs):
    """(job, solve(job)) in turn, some jobs handed to the devices before the first is waited for."""
    waiting = collections.deque()
    for job in jobs:
        waiting.append((job, solve(job)))
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
    with utils.atomic_path(path) as temporary, pairfiles.durable_file(temporary) as file:
        figure.savefig(file, format="png", dpi=100)


def _refuse_small_disk(plan):
    """Says at once that the disk is too small, where that can be told."""
    needed = sum(map(plan.file_bytes, pairplan.missing_files(plan)))
    if pairfiles.is_local(plan.folder) and needed > (free := shutil.disk_usage(plan.folder).free):
        raise InputError(
            f"the disk of {plan.folder} has {free:,} bytes free, the pairs that are not there need {needed:,}; make "
            "room, make fewer pairs, or use training.reflow_dtype=float16 or training.reflow_store_noise=False"
        )


@contextlib.contextmanager
def _disk_errors_named(plan):
    """One line for a disk that fills or cannot be written."""
    try:
        with pairfiles.os_errors():
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


def _remove_temporaries(plan, older_than):
    """Removes the unfinished files that killed runs have left; a file being written now is younger than that."""
    for path in plan.folder.glob(".reflow_batch_*.tmp") if plan.folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # another worker may clear up too
            if time.time() - path.stat().mtime >= older_than:
                path.unlink()
