"""Kills every stage and an evaluation again and again, and compares with a run that was left alone.

    python -m benchmarks.chaos WORKDIR [--seed 0] [--kills 2] [--jobs 1_rf,pairs,2_rf,2_distill,ode] [--fill]

Each job is started by `main.py` with a tiny network, gets SIGKILL or SIGTERM at a random moment after a random line of
its log, and is started again, until it has been stopped so often and ends by itself. Checkpoints, pairs, logged numbers
and metrics must be equal bit for bit, and after a SIGTERM the next start must go on from the very update of the stop.
The exit status is 1 if something differs. Moments depend on the seed and on how fast the machine is.

With --fill the disk runs full at such a moment instead, and has room again for the next start: the job must end in one
line of error. WORKDIR must be on a disk of at most a gigabyte: mount -t tmpfs -o size=100m tmpfs WORKDIR
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "configs/rf/digits_rf_continuous.py"
TINY = {
    "model": {"nf": 4, "ch_mult": (1,), "attn_resolutions": ()},
    "training": {
        "batch_size": 8, "n_iters": 300, "log_freq": 20, "snapshot_freq": 150, "snapshot_freq_for_preemption": 40,
        "n_reflow_data": 640, "reflow_file_size": 64, "gen_reflow_size": 16, "reflow_t": 2,
    },
    "eval": {"batch_size": 16, "num_samples": 64, "straightness_samples": 8, "interval_step": 150},
    "sampling": {"tol": 1e-3},
}  # fmt: skip
JOBS = {
    "1_rf": ["--mode=train", "--config.model.rf_phase=1"],
    "pairs": ["--mode=train", "--config.training.reflow_mode=gen_reflow"],
    "2_rf": ["--mode=train", "--config.training.reflow_mode=train_reflow"],
    "2_distill": ["--mode=train", "--config.training.reflow_mode=train_distill"],
    "ode": ["--mode=eval", "--eval_folder=ode"],
}
BALLAST = "ballast"  # the file that fills a disk
LARGEST_DISK = 1 << 30  # of those that are filled
LOG_LINE = re.compile(r"^\d\d:\d\d:\d\d ")  # of SeqRF's own log
STOPPED = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 2)  # exit statuses: a signal, a disk that is full
# What depends on the moment or on the folder, and on nothing else.
UNCOMPARED = re.compile(r"seconds|per_second|input_wait|provenance|source|folder|hash")


def command(workdir: pathlib.Path, job: str, settings: dict) -> list[str]:
    """`python main.py ...` of a job with the tiny network; `settings`: {section: {key: value}}."""
    values = [f"--config.{section}.{key}={value}" for section in settings for key, value in settings[section].items()]
    return [sys.executable, "main.py", f"--config={CONFIG}", f"--workdir={workdir}", *values, *JOBS[job]]


@dataclasses.dataclass(frozen=True)
class Stop:
    """A signal, or (None) a disk that runs full, so many seconds after a line of log, counted from 1."""

    line: int
    seconds: float
    number: signal.Signals | None

    @property
    def name(self) -> str:
        """SIGKILL, SIGTERM or 'disk full'."""
        return self.number.name if self.number else "disk full"


def fill_disk(cache: pathlib.Path) -> None:
    """Leaves no room on the disk of the cache, by a file beside it."""
    with contextlib.suppress(OSError), open(cache.parent / BALLAST, "wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)) == 4096:
            pass


def run(arguments: list[str], cache: pathlib.Path, stop: Stop | None = None) -> tuple[int, str, list[float]]:
    """Runs a job: its exit status, its output, and the times of its lines of log."""
    environment = os.environ | {"SEQRF_CACHE": str(cache), "WANDB_MODE": "offline"}
    environment.pop("WANDB_SERVICE", None)  # of this process, where a run that is killed would stay open
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said, times = [], []
    for line in process.stderr or ():
        said.append(line)
        if LOG_LINE.match(line):
            times.append(time.monotonic())
            if stop is not None and len(times) == stop.line:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=stop.seconds)
                if stop.number is None:
                    fill_disk(cache)
                else:
                    process.send_signal(stop.number)  # does nothing where the job has ended
    code = process.wait()
    (cache.parent / BALLAST).unlink(missing_ok=True)
    return code, "".join(said), times


def random_stop(times: list[float], rng: random.Random, numbers: list[signal.Signals | None]) -> Stop:
    """A stop, by one of `numbers`, between two of the lines of log that an undisturbed run wrote at `times`."""
    line = rng.randrange(1, len(times))
    seconds = rng.uniform(0, times[line] - times[line - 1])
    return Stop(line, seconds, rng.choice(numbers))


def disturb(arguments: list[str], cache: pathlib.Path, stops: list[Stop]) -> list[str]:
    """Runs a job, stopped by each of `stops` in turn, until it ends; what went wrong."""
    stopped_at, faults = None, []
    for stop in [*stops, None]:
        code, said, _ = run(arguments, cache, stop)
        resumed = re.search(r"resuming \S+ from update (\d+)", said)
        if stopped_at is not None and not (resumed and resumed[1] == stopped_at):
            faults.append(f"stopped after update {stopped_at}, resumed from {resumed and resumed[1]}")
        stopped = re.search(r"stopped by SIGTERM after update (\d+)", said)
        stopped_at = stopped and stopped[1]
        what = stop.name if stop else "left alone"
        print(f"  {what}: exit {code}" + (f" after update {stopped_at}" if stopped else ""), flush=True)
        if code == 0:
            return faults
        if code not in STOPPED or "Traceback" in said or (code == 2 and said.count("\nerror: ") != 1):
            return [*faults, f"exit {code}: {said[-2000:]}"]
    return [*faults, "it never ended"]


def compared(value):
    """A JSON value without its entries that may differ."""
    if isinstance(value, dict):
        return {key: compared(entry) for key, entry in value.items() if not UNCOMPARED.search(key)}
    return [compared(entry) for entry in value] if isinstance(value, list) else value


def contents(workdir: pathlib.Path) -> dict[str, object]:
    """All that two runs are compared by: {file: its numbers, or a digest of its arrays or bytes}."""
    import numpy as np

    from checkpointing.checkpoint import checkpoint_at
    from models.weights import fingerprint

    found: dict[str, object] = {}
    for path in sorted(workdir.glob("*/checkpoints/*")):
        checkpoint = checkpoint_at(path)
        weights, metadata = checkpoint.load(), checkpoint.metadata
        trees = {name: getattr(weights, name) for name in ("params", "ema_params", "mu", "nu")}
        counts = {name: np.array(getattr(weights, name)) for name in ("step", "count")}
        found[str(path.relative_to(workdir))] = fingerprint(trees | counts), compared(metadata)
    for path in sorted([*workdir.glob("*/metrics.json"), *workdir.glob("*/step_*/metrics.json")]):
        if path.parent.name == "samples":
            continue  # of pairs it says what each call has made
        found[str(path.relative_to(workdir))] = compared(json.loads(path.read_text()))
    for path in sorted(workdir.glob("samples/*/*.npz")):
        found[str(path.relative_to(workdir))] = path.read_bytes()
    for path in sorted(workdir.glob("samples/*/manifest.json")):
        found[str(path.relative_to(workdir))] = json.loads(path.read_text())
    return found


def chaos(
    workdir: pathlib.Path, jobs: list[str], *, seed: int, kills: int, fills: bool = False, settings: dict = TINY
) -> list[str]:
    """Runs the jobs undisturbed and disturbed, in two folders of `workdir`; what differs or went wrong."""
    numbers: list[signal.Signals | None] = [None] if fills else [signal.SIGKILL, signal.SIGTERM]
    rng, cache, faults = random.Random(seed), workdir / "cache", []
    alone, killed = workdir / "undisturbed", workdir / "disturbed"
    for job in jobs:
        print(job, flush=True)
        code, said, times = run(command(alone, job, settings), cache)
        if code:
            return [*faults, f"{job} undisturbed: exit {code}: {said[-2000:]}"]
        stops = [random_stop(times, rng, numbers) for _ in range(kills)]
        faults += [f"{job}: {fault}" for fault in disturb(command(killed, job, settings), cache, stops)]
    one, other = contents(alone), contents(killed)
    names = sorted(one.keys() | other.keys())
    differing = [name for name in names if one.get(name) != other.get(name)]
    print(f"{len(names) - len(differing)} of {len(names)} files are equal bit for bit", flush=True)
    return faults + [f"{name} differs" for name in differing]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=2, help="of each job, at most")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--fill", action="store_true", help="fill WORKDIR's disk instead of sending signals")
    given = parser.parse_args()
    workdir = given.workdir.resolve()
    if given.fill and shutil.disk_usage(workdir).total > LARGEST_DISK:
        parser.error(f"{workdir} is on a disk of more than a gigabyte, which is not filled; mount a small one there")
    faults = chaos(workdir, given.jobs.split(","), seed=given.seed, kills=given.kills, fills=given.fill)
    print("\n".join(faults) or "nothing went wrong")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
