"""Logs a run's numbers and pictures to the terminal, to metrics.json and to Weights & Biases."""

import copy
import hashlib
import importlib.util
import logging
import math
import netrc
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

import utils
from utils import InputError

MOST_HISTORY = 2**28  # bytes: a line for each of a million updates

logger = logging.getLogger("seqrf")


class Tracker:
    """Logs to the terminal, to `<folder>/metrics.json` and to wandb (offline without a key: never a prompt).

    Only the first host logs; on the others every call does nothing.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        workdir: epath.PathLike,
        name: str,
        config: dict[str, Any],
        primary: bool = True,
        resume_step: float = math.inf,
        file_name: str = "metrics.json",
        prefix: str = "",
        tensorboard: bool = False,
    ):
        """
        Args:
          folder: where metrics.json and the pictures go.
          workdir: where wandb keeps its own files, in `wandb/`; in the current folder's where it is in a bucket.
          name: the run's name in wandb; the same name in the same workdir continues the same wandb run.
          config: the run's settings, as wandb shows them.
          primary: whether this is the first host.
          resume_step: the step that the run resumes from; lines of metrics.json after it are dropped.
          file_name: of metrics.json, where several runs write into one folder.
          prefix: of every name in wandb, for a run that `branch` has several parts of.
          tensorboard: also write the numbers for TensorBoard, into `<folder>/tensorboard`.

        Raises:
          InputError: wandb cannot write into `workdir`.
        """
        self._primary = primary
        self._branches: list[Tracker] = []
        self._open(epath.Path(folder) / file_name, prefix, resume_step)
        self._board = None
        if primary and tensorboard:
            writer = utils.needed("tensorboardX", "--config.tensorboard=True").SummaryWriter
            purged = int(resume_step) + 1 if math.isfinite(resume_step) else None
            self._board = writer(os.fspath(epath.Path(folder) / "tensorboard"), purge_step=purged)
        if primary:
            self._wandb = _wandb_run(workdir, name, config)

    def _open(self, path: epath.Path, prefix: str, resume_step: float = math.inf):
        self._path, self._prefix = path, prefix
        self._lines: dict[int, dict[str, Any]] = {}  # by step
        if self._primary:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = {line["step"]: line for line in read_history(path) if line["step"] <= resume_step}

    def branch(self, folder: epath.PathLike, prefix: str) -> "Tracker":
        """A tracker of another folder in the same wandb run, where its names get the prefix; closed with this one."""
        branch = copy.copy(self)
        branch._open(epath.Path(folder) / self._path.name, prefix)
        self._branches.append(branch)
        return branch

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged numbers, one {"step": ..., name: number, ...} for each step, by step."""
        return [self._lines[step] for step in sorted(self._lines)]

    def log(self, step: int, values: dict[str, Any], *, shown: str | None = None) -> None:
        """Logs numbers at a step, beside those of other names. metrics.json is written by the next `flush`.

        Args:
          shown: what the terminal says before them; None: 'update <step>'.
        """
        if not self._primary:
            return
        values = {name: _plain(value) for name, value in values.items()}
        self._lines.setdefault(step, {"step": step}).update(values)
        self._tell_wandb(lambda run: run.log({self._prefix + name: value for name, value in values.items()}, step=step))
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(self._prefix + name, value, step)
        numbers = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
        logger.info("%s%s: %s", self._prefix, shown or f"update {step}", numbers)

    def picture(self, step: int, name: str, path: epath.PathLike) -> None:
        """Shows a PNG file in wandb."""
        if self._primary and self._wandb is not None:
            import wandb
            from PIL import Image

            with epath.Path(path).open("rb") as file:  # wandb opens no bucket
                shown = wandb.Image(Image.open(file))
            self._tell_wandb(lambda run: run.log({self._prefix + name: shown}, step=step))

    def record(self, values: dict[str, Any]) -> None:
        """Keeps in wandb's configuration of the run what its numbers depend on, `provenance` by its prefix."""
        if self._primary:
            named = {f"{self._prefix}provenance": values}
            self._tell_wandb(lambda run: run.config.update(named, allow_val_change=True))

    def flush(self) -> None:
        """Writes `<folder>/metrics.json`: `history`."""
        if self._primary:
            utils.write_json(self._path, self.history)

    def close(self) -> None:
        """Flushes, all branches too, and ends the wandb run."""
        if self._primary:
            for part in (self, *self._branches):
                part.flush()
            if self._board is not None:
                self._board.close()
            self._tell_wandb(lambda run: run.finish())

    def _tell_wandb(self, send: Callable[[Any], None]) -> None:
        """Calls `send` with the wandb run, whose loss is no reason to end.

        It lives in a process of its own, which Slurm and systemd end together with ours, by the same SIGTERM.
        """
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except Exception as error:
            self._wandb = None
            logger.warning("wandb has ended (%r): from here on numbers are in %s alone", error, self._path)


def read_history(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.json, {"step": ..., name: number or None}, as they are; none where there is no file.

    Raises:
      InputError: it is damaged: whoever took it for absent would write over it.
    """
    lines = utils.read_json(path, list[dict[str, float | None]], [], most=MOST_HISTORY)
    if not all(isinstance(line.get("step"), int) for line in lines):
        raise InputError(f"{path} is damaged (it has lines without a step); restore or remove it")
    return lines


def _plain(value):
    value = np.asarray(value).item()
    return float(value) if isinstance(value, float) else value


def _has_wandb_key() -> bool:
    """Whether wandb finds a key, in the environment or in ~/.netrc, without a prompt."""
    try:
        known = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return known or bool(os.environ.get("WANDB_API_KEY"))


def _wandb_run(workdir, name, config):
    """An online run where a key is known, else an offline one (`wandb sync` uploads it later); None without wandb."""
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # else a folder of wandb's runs
        logger.info("wandb is not installed: numbers are in metrics.json alone")
        return None
    import wandb

    folder = epath.Path(workdir)
    local = folder if utils.is_local(folder) else epath.Path(".")
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    if mode != "disabled":
        local.mkdir(parents=True, exist_ok=True)
    # Of the workdir too: runs of the same name in two workdirs are two wandb runs.
    identity = hashlib.sha256(f"{utils.absolute(folder)} {name}".encode()).hexdigest()[:16]
    settings = wandb.Settings(init_timeout=30, console="off", silent=True)
    project = os.environ.get("WANDB_PROJECT") or "seqrf"
    arguments = {"project": project, "id": identity, "resume": "allow", "config": config}
    # Runs of one workdir are a group, and their names begin with its name.
    shown = utils.absolute(folder).name
    arguments |= {"name": f"{shown} {name}", "group": shown, "job_type": name.rpartition("-")[2]}
    arguments["dir"] = os.fspath(local)
    try:
        return wandb.init(mode=mode, settings=settings, **arguments)
    except wandb.errors.Error as error:
        if mode == "offline":
            raise InputError(f"wandb cannot log into {local}: {error}") from error
        logger.warning("wandb cannot be reached (%s); logging offline into %s", error, local / "wandb")
        return wandb.init(mode="offline", settings=settings, **arguments)
