"""Generates reflow pairs by integrating the teacher's ODE over each segment (docs/method.md, section 8).

A pair of a segment is (x1, x0): x1 at the segment's start t1, x0 at its end t0. The ODE is solved from x1 to x0, of an
inverted pair from x0 to x1, and of a trajectory from noise through all boundaries.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tqdm

import datasets
import distributed
import runtime
import sampling
import utils
from adaptive import adaptive_boundaries
from pairs import manifest as pairmanifest
from pairs import npz, workers
from pairs import plan as pairplan
from pairs.plan import PairPlan
from pairs.reader import PairSet
from tracking import plots
from utils import InputError

__all__ = ["PairSet", "Summary", "adaptive_boundaries", "generate"]

GROUPS_AHEAD = 2  # groups of device batches dispatched before the first of them is waited for
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in XLA's message

logger = logging.getLogger("seqrf")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one call of `generate` did.

    Attributes:
      pairs, files: solved by this call on this host.
      nfe: mean network calls of a solve in each segment; empty if nothing was solved.
      calls: network calls of a device, all batches together.
      seconds: from the first batch to the last file written; the compilation before them not included.
      complete: whether the whole set exists now.
    """

    pairs: int
    files: int
    nfe: list[float]
    calls: int
    seconds: float
    complete: bool

    @property
    def pairs_per_second(self) -> float:
        """Pairs solved per second on this host; 0 if none was."""
        return self.pairs / self.seconds if self.pairs else 0.0


def generate(
    plan: PairPlan,
    images: datasets.ImageSource,
    make_velocity: Callable[[Any], Callable],
    params: Any,
    *,
    batch_size: int,
    worker: tuple[int, int] = (1, 1),
    extra: dict[str, Any] | None = None,
    progress: bool = True,
) -> Summary:
    """Makes the missing files of this worker's and this host's share of the planned pair set.

    Whole files are kept, so the same call resumes an interrupted run. Worker (i, n) makes the files i, i + n, ...; its
    hosts take these in turn. Whoever finds all files of the set completes the manifest.

    Args:
      plan: of workers that start at the same time with SeqRF-Ada's boundaries one decides, see `claim_plan`.
      images: the real images to start from.
      make_velocity: params -> velocity(x [B, H, W, C], t [B], index [B] int32) -> dx/dtau.
      params: the teacher's weights, not replicated.
      batch_size: images solved together on this host, at most; changes the speed, and results within the tolerance.
      worker: (i, n).
      extra: further entries for the manifest, such as the costs of SeqRF-Ada's partition.
      progress: show a progress bar.

    Raises:
      InputError: the folder holds another set, the disk is too small or full, a solve did not reach its tolerance, a
        batch is too large for the devices.
      BrokenFile: a file of another worker's share is damaged.
    """
    with workers.named_disk_errors(plan):
        workers.remove_temporaries(plan)
        plan = pairmanifest.claim_plan(plan, extra or {})
        of_worker = workers.files_of_worker(plan, worker)
        share = distributed.this_host().items(of_worker)
        todo = workers.files_to_make(plan, share)
        total, missing = (sum(map(plan.count, numbers)) for numbers in (share, todo))
        with tqdm.tqdm(initial=total - missing, total=total, unit="pair", disable=not progress) as bar:
            summary = _make_files(plan, todo, images, make_velocity, params, batch_size, bar)
        workers.wait_for_files(plan, set(of_worker) - set(share))
        if not pairmanifest.complete_manifest(plan):
            logger.info("%d of %d pair files are still missing", len(pairmanifest.missing_files(plan)), plan.files)
            return summary
        workers.remove_temporaries(plan, complete=True)
        return dataclasses.replace(summary, complete=True)


@dataclasses.dataclass
class _PendingFile:
    """A file whose pairs or trajectories are being solved."""

    number: int
    layout: pairplan.FileLayout
    start: np.ndarray  # [n, H, W, C]
    solved: np.ndarray  # [n, H, W, C], of trajectories [n, k, H, W, C]
    unsolved: int  # device batches

    def write(self, plan):
        """Draws the first file of a set, then writes the file: in this order a kill leaves no gap."""
        arrays = self._trajectories() if plan.is_trajectory else self._pairs()
        if self.number == 1:
            _draw(plan, arrays, self.layout)
        if not plan.store_noise:
            x1, keys = arrays["x1"], {name: getattr(self.layout, name) for name in ("image", "flip", "key")}
            arrays = {"x0": arrays["x0"], **keys, "x1_crc": npz.crc_of_rows(x1), "t0": arrays["t0"], "t1": arrays["t1"]}
        # Where the manifest was not claimed atomically (object stores) another worker's may have replaced it.
        pairmanifest.begin_manifest(plan)
        utils.write_arrays(plan.path(self.number), overwrite=False, **arrays)

    def _pairs(self):
        x0, x1, inverted = self.solved, self.start, self.layout.inverted
        if inverted.any():
            x0[inverted], x1[inverted] = x1[inverted], x0[inverted]
        return {"x0": x0, "x1": x1, "t0": self.layout.t0, "t1": self.layout.t1}

    def _trajectories(self):
        return {"xs": np.concatenate([self.start[:, None], self.solved], axis=1)}


def _draw(plan, arrays, layout):
    """Draws some of the pairs or trajectories of a file beside the set."""
    unscale = functools.partial(datasets.unscale, centered=plan.centered)
    if plan.is_trajectory:
        picture, ts = plan.folder.parent / "trajectories.png", np.asarray(plan.boundaries)
        plots.draw_trajectories(picture, ts, arrays["xs"].swapaxes(0, 1), unscale)
    else:
        picture = plan.folder.parent / "pairs.png"
        plots.draw_pairs(picture, arrays["x1"], arrays["x0"], layout.segment, plan.boundaries, unscale)


@dataclasses.dataclass(frozen=True)
class _DeviceBatch:
    """What one device solves at a time: rows of a file, some repeated to fill the batch, all over the same times."""

    file: _PendingFile
    segment: np.ndarray | np.int32  # of trajectories [k]
    t_start: np.ndarray | np.float32  # of the shape of segment
    t_end: np.ndarray | np.float32
    rows: np.ndarray
    count: int  # of rows that are not repeated


@dataclasses.dataclass
class _Stats:
    """What has been solved."""

    pairs: int = 0
    files: int = 0
    calls: int = 0
    nfe: dict[int, list[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))  # by segment

    def summary(self, started):
        nfe = [float(np.mean(self.nfe[segment])) for segment in sorted(self.nfe)]
        return Summary(self.pairs, self.files, nfe, self.calls, time.perf_counter() - started, complete=False)


def _make_files(plan, todo, images, make_velocity, params, batch_size, bar):
    """Solves and writes the files `todo`: the host prepares a file while the devices solve and a thread writes."""
    stats = _Stats()
    if not todo:
        return stats.summary(time.perf_counter())
    size = _device_batch_size(plan, batch_size)
    with _named_memory_errors(batch_size), ThreadPoolExecutor(1, thread_name_prefix="pairs-write") as writer:
        solve = _compiled_solver(plan, size, make_velocity, params)
        started = time.perf_counter()
        batches = itertools.chain.from_iterable(_device_batches(plan, number, images, size) for number in todo)
        groups = iter(lambda: list(itertools.islice(batches, jax.local_device_count())), [])
        writing = None
        for solved in _dispatched_ahead(solve, groups):
            runtime.preemption.check()  # the files that are written are kept
            for file in _finished_files(plan, solved, stats, bar):
                if writing:
                    writing.result()
                writing = writer.submit(file.write, plan)
            if writing and writing.done():
                writing.result()  # raises now that the disk is full, not a whole file later
        writing.result()
    return stats.summary(started)


def _finished_files(plan, solved, stats, bar):
    """Copies what the devices have solved into its files; those that are complete then."""
    batches, (x, nfe) = solved
    nfe = np.asarray(nfe).reshape(len(nfe), -1)
    stats.calls += int(nfe.sum(axis=1).max())
    finished = []
    for batch, ends, calls in zip(batches, np.asarray(x), nfe, strict=False):  # idle devices repeat a batch
        ends = ends[: batch.count]
        if not np.isfinite(ends).all():
            raise InputError(f"a solve did not reach sampling.tol = {plan.tol}; use a larger tolerance")
        batch.file.solved[batch.rows[: batch.count]] = ends
        batch.file.unsolved -= 1
        for segment, n in zip(batch.segment.flat, calls, strict=True):
            stats.nfe[int(segment)].append(int(n))
        stats.pairs += batch.count
        bar.update(batch.count)
        if not batch.file.unsolved:
            finished.append(batch.file)
    stats.files += len(finished)
    return finished


def _device_batch_size(plan, batch_size):
    """The pairs that a device solves at a time: at most its share of `batch_size`, equal for all batches of a segment.

    It does not depend on how many devices there are if `batch_size` grows with them; the bytes then do not either.
    """
    pairs = plan.file_size if plan.is_trajectory else plan.file_size // plan.k
    most = max(1, batch_size // jax.local_device_count())
    return math.ceil(pairs / math.ceil(pairs / most))


def _compiled_solver(plan, size, make_velocity, params):
    """The compiled solver of a device batch on each device: one program for all segments, whose times it is given."""

    def solve_segment(params, x, t_start, t_end, index):
        velocity = make_velocity(params)
        solution = sampling.solve_segment(
            velocity, x, t_start, t_end, index, tol=plan.tol, solver=plan.solver, error_norm=plan.error_norm
        )
        return solution.x, solution.nfe

    def solve_trajectory(params, x, t_start, t_end, index):
        def step(x, segment):
            x, nfe = solve_segment(params, x, *segment)
            return x, (x, nfe)

        states, nfe = jax.lax.scan(step, x, (t_start, t_end, index))[1]
        return states.swapaxes(0, 1), nfe

    # Only this host's devices: the hosts make different files, in their own time.
    devices = jax.local_device_count()
    params = distributed.replicate(params)
    times = np.zeros((devices, plan.k) if plan.is_trajectory else devices, np.float32)
    x = np.zeros((devices, size, *plan.image_shape), np.float32)
    program = distributed.map_devices(solve_trajectory if plan.is_trajectory else solve_segment)
    program = program.lower(params, x, times, times, times.astype(np.int32)).compile()

    def solve_batches(batches):
        batches = batches + [batches[-1]] * (devices - len(batches))
        x = np.stack([batch.file.start[batch.rows] for batch in batches]).astype(np.float32)
        spans = [np.stack([getattr(batch, name) for batch in batches]) for name in ("t_start", "t_end", "segment")]
        return program(params, x, *spans)

    return solve_batches


def _device_batches(plan, number, images, size) -> list[_DeviceBatch]:
    """The device batches of a file, segment by segment."""
    layout = pairplan.file_layout(plan, number)
    start = pairplan.start_points(
        pairplan.file_images(images, layout.first_image, layout.image),
        layout.flip,
        layout.key,
        np.where(layout.inverted, layout.t0, layout.t1),
        centered=plan.centered,
        dequantize=plan.dequantize,
        dtype=plan.dtype,
    )
    states = (plan.k,) if plan.is_trajectory else ()
    solved = np.empty((len(start), *states, *plan.image_shape), plan.dtype)
    file, batches = _PendingFile(number, layout, start, solved, unsolved=0), []
    for rows, segment, t_start, t_end in _solved_alike(plan, layout):
        count = math.ceil(len(rows) / size)
        for n, filled in enumerate(np.resize(rows, (count, size))):
            batches.append(_DeviceBatch(file, segment, t_start, t_end, filled, min(size, len(rows) - n * size)))
    file.unsolved = len(batches)
    return batches


def _solved_alike(plan, layout) -> Iterator[tuple]:
    """(rows, segment, t_start, t_end) of the rows of a file that are solved over the same times."""
    boundaries, segment = np.asarray(plan.boundaries, np.float32), np.arange(plan.k, dtype=np.int32)
    if plan.is_trajectory:
        yield np.arange(len(layout.segment)), segment, boundaries[:-1], boundaries[1:]
        return
    for i, inverted in itertools.product(segment, (False, True)):
        rows = np.flatnonzero((layout.segment == i) & (layout.inverted == inverted))
        times = (boundaries[i], boundaries[i + 1])
        if len(rows):
            yield rows, i, *(reversed(times) if inverted else times)


def _dispatched_ahead(solve, groups: Iterable[list]) -> Iterator[tuple]:
    """(group, solve(group)) in turn, GROUPS_AHEAD of them dispatched before the first is waited for."""
    waiting = collections.deque()
    for group in groups:
        waiting.append((group, solve(group)))
        if len(waiting) > GROUPS_AHEAD:
            yield waiting.popleft()
    yield from waiting


@contextlib.contextmanager
def _named_memory_errors(batch_size):
    """Converts the error of devices that are too small to an InputError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        raise InputError(
            f"training.gen_reflow_size = {batch_size} is too large for the memory of the devices "
            f"({str(error).splitlines()[0]}); use a smaller one"
        ) from error
