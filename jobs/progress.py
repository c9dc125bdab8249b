"""Bookkeeping of the training loop: throughput, deferred logging of metrics, NaN and infinity, profiler traces."""

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import distributed
from utils import InputError

logger = logging.getLogger("seqrf")

PROFILED_UPDATES, UNPROFILED_CALLS = 10, 3
MOST_DROPPED = 10  # in a row, with training.nan_policy='skip'
# In the order in which an update computes them.
_WHAT = {"loss": "the loss", "gradient_norm": "the gradient", "parameter_norm": "a parameter"}

Values = dict[str, Any]  # name -> [devices, updates of a call], see `train_step.make_train_step`


def profiled(calls: Iterator[tuple[Any, int]], folder: os.PathLike) -> Iterator[tuple[Any, int]]:
    """`calls` of (batch, updates), with a trace of PROFILED_UPDATES by JAX's profiler, written into `folder`.

    It begins after the first calls, of which one waits for the compiler, and goes on for as many calls more as may be
    in flight. TensorBoard, Perfetto and XProf show it.
    """
    yield from itertools.islice(calls, UNPROFILED_CALLS)
    with jax.profiler.trace(os.fspath(folder)):
        begun = 0
        for batch, count in calls:
            yield batch, count
            begun += count
            if begun >= PROFILED_UPDATES + distributed.MAX_IN_FLIGHT * count:
                break
    yield from calls


def announced(program: Callable, what: str) -> Callable:
    """`program`, which says before its first call that it is compiled, and afterwards how long that took."""
    is_compiled = False

    def called(*arguments: Any) -> Any:
        nonlocal is_compiled
        if is_compiled:
            return program(*arguments)
        is_compiled, began = True, time.perf_counter()
        logger.info("compiling %s", what)
        results = jax.block_until_ready(program(*arguments))
        logger.info("compiled %s in %.0f s", what, time.perf_counter() - began)
        return results

    return called


class Pace:
    """Images per second, and the share of time that the host waited for input, since the last log."""

    def __init__(self, images: int):
        """`images` of one update."""
        self._images = images
        self._is_compiled = False
        self.restart()

    def restart(self) -> None:
        """Counts from now: what came before, such as a snapshot, was no training."""
        self._began, self._waited, self._updates = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for input."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def add(self, updates: int) -> bool:
        """Counts updates; not the first ones, whose program was compiled. Returns whether these were the first."""
        self._updates += updates
        is_first, self._is_compiled = not self._is_compiled, True
        if is_first:
            self.restart()
        return is_first

    def summary(self) -> dict[str, float]:
        """The numbers to log, none where there was no update; counts from now."""
        if not self._updates:
            return {}
        seconds = time.perf_counter() - self._began
        rates = {"images_per_second": self._images * self._updates / seconds, "input_wait": self._waited / seconds}
        self.restart()
        return rates


class UpdateMetrics:
    """Collects the metrics of every update without blocking the host.

    They are logged one interval late, once the devices have computed them. `check` blocks, so that a diverged state is
    never saved.
    """

    def __init__(self, log: Callable[[int, dict[str, Any]], None], *, drops: bool, remedy: str):
        """
        Args:
          log: (update, {name: value}), for loss and gradient_norm, their means over the last call, and what `log` adds.
          drops: whether updates that are not finite were dropped, as `make_train_step(drop_nonfinite=True)` does: up to
            MOST_DROPPED in a row are counted, and their number since the log before is logged as "dropped_updates".
          remedy: the end of the message of an error.
        """
        self._log, self._drops, self._remedy = log, drops, remedy
        self._new: list[tuple[int, Values]] = []  # (updates so far, values) since the last log
        self._due: list[tuple[int, Values]] = []  # up to the last log, not logged yet
        self._extra: dict[str, float] = {}
        self._in_row = self._dropped = 0

    def add(self, step: int, values: Values) -> None:
        """Takes the values of a call that ends with update number `step`."""
        self._new.append((step, values))

    def log(self, **extra: float) -> None:
        """Schedules the metrics so far, and `extra`, to be logged by the next `log` or `check`.

        Raises:
          InputError: as `check`.
        """
        self._log_due()
        self._new, self._due, self._extra = [], self._new, extra

    def check(self) -> None:
        """Waits for the values of all updates so far.

        Raises:
          InputError: one is not finite, or with `drops` MOST_DROPPED in a row; it names the update and what it was.
        """
        self._log_due()
        self._fetch(self._new)
        self._new = []

    def _log_due(self):
        if not self._due:
            return
        last = self._fetch(self._due)
        logged = {name: float(np.mean(last[name])) for name in ("loss", "gradient_norm")}
        if self._drops:
            logged["dropped_updates"], self._dropped = self._dropped, 0
        self._log(self._due[-1][0], logged | self._extra)
        self._due = []

    def _fetch(self, calls: list[tuple[int, Values]]) -> dict[str, np.ndarray]:
        """The values [updates] of the last call; of all calls they are checked."""
        fetched: dict[str, np.ndarray] = {}
        for step, values in calls:
            fetched = {name: distributed.local_copy(rows) for name, rows in values.items()}
            is_finite = np.isfinite(np.stack(list(fetched.values()))).all(axis=0)
            for n, update in enumerate(range(step - len(is_finite) + 1, step + 1)):
                self._in_row = 0 if is_finite[n] else self._in_row + 1
                self._dropped += not is_finite[n]
                if self._in_row == (MOST_DROPPED if self._drops else 1):
                    raise InputError(self._message(update, {name: float(rows[n]) for name, rows in fetched.items()}))
        return fetched

    def _message(self, update: int, values: dict[str, float]) -> str:
        first = next(name for name in _WHAT if not np.isfinite(values[name]))
        found = ", ".join(f"{name} {values[name]:.4g}" for name in _WHAT)
        dropped = f"{MOST_DROPPED} updates in a row were dropped, the last one because " if self._drops else ""
        return f"{dropped}{_WHAT[first]} is not finite at update {update} ({found}): {self._remedy}"
