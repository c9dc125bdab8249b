"""What pair sets cost, as ratios that can be compared between machines: python -m benchmarks.bench_pairs [PART ...]

reading     batches of 512 CIFAR-10 pairs from the page cache, against a plain memory copy of the same bytes and
            against the same pairs in compressed npz files
writing     a file of 10,000 CIFAR-10 pairs, against numpy.savez_compressed
memory      peak memory of a reader of 200,000 pairs, against one of 10,000
generation  wall time, writing included, against network calls x the time of one compiled call

Every ratio is printed with what is asked of it. The exit status is 1 if one of them is missed.
"""

import argparse
import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import datasets
import distributed
import models
import reflow
import sampling
import segments
import utils
from benchmarks.common import perturbed_weights, seconds
from configs.rf import cifar10_rf_continuous, digits_rf_continuous
from pairs import manifest as pairmanifest
from pairs import npz
from pairs.plan import PairPlan, plan_pairs

PARTS = ["reading", "writing", "memory", "generation"]
PAIRS, SHAPE, BATCH, RUNS, ROUNDS = 10_000, (32, 32, 3), 512, 7, 4


def median_seconds(action, runs=RUNS) -> float:
    """The median wall time of `runs` calls."""
    return statistics.median(seconds(action) for _ in range(runs))


class Report:
    """Prints measurements, and remembers whether what was asked of them was reached."""

    def __init__(self):
        self.missed = False

    def say(self, name: str, value: str) -> None:
        """One line."""
        print(f"{name:<58} {value}", flush=True)

    def ratio(self, name: str, value: float, *, least: float = 0.0, most: float = float("inf")) -> None:
        """One line with a ratio and its limit."""
        limit = f">= {least:g}" if least else f"<= {most:g}"
        good = least <= value <= most
        self.missed |= not good
        self.say(name, f"{value:8.3f}   (asked: {limit}){'' if good else '   MISSED'}")


def cifar_pairs() -> dict[str, np.ndarray]:
    """The arrays of a file of 10,000 pairs that look like noise and smooth images, one segment."""
    rng = np.random.default_rng(0)
    x1 = rng.standard_normal((PAIRS, *SHAPE), np.float32)
    x0 = np.tanh(rng.standard_normal((PAIRS, 8, 8, 3), np.float32).repeat(4, axis=1).repeat(4, axis=2) + 0.1 * x1)
    return {"x0": x0, "x1": x1, "t0": np.zeros(PAIRS, np.float32), "t1": np.ones(PAIRS, np.float32)}


def plan_of(folder: Path, **what) -> PairPlan:
    """The plan of a set of float32 pairs; `what` says its boundaries, pairs, file size, image shape and data set."""
    return plan_pairs(
        folder=folder,
        dtype="float32",
        store_noise=True,
        centered=True,
        flip=True,
        dequantize=False,
        seed=0,
        teacher="bench",
        tol=1e-3,
        solver="dopri5",
        error_norm="batch",
        **what,
    )


def take(iterator, batches: int) -> None:
    """Reads the next batches."""
    for _ in itertools.islice(iterator, batches):
        pass


def copy_arrays(target: np.ndarray, *arrays: np.ndarray) -> None:
    """Copies one array after another into `target`."""
    for array in arrays:
        np.copyto(target, array)


def read_once(folder: Path, batches: int) -> None:
    """Opens the set and reads its first epoch, which verifies every file."""
    iterator: Any = reflow.PairSet(folder).batches(BATCH, seed=0)
    take(iterator, batches)
    iterator.close()


def read_compressed(path: Path) -> None:
    """Reads a compressed file and deals its pairs in batches, shuffled."""
    with np.load(path) as file:
        x0, x1 = file["x0"], file["x1"]
    order = np.random.default_rng(0).permutation(PAIRS)
    for first in range(0, PAIRS, BATCH):
        _ = x0[order[first : first + BATCH]], x1[order[first : first + BATCH]]


def bench_files(report: Report, folder: Path, parts: list[str]) -> None:
    """Reading and writing."""
    arrays: dict[str, Any] = cifar_pairs()
    size = sum(array.nbytes for array in arrays.values())
    path, compressed = folder / "set" / npz.file_name(1), folder / "compressed.npz"
    plan = plan_of(
        path.parent,
        boundaries=segments.uniform_boundaries(1),
        pairs=PAIRS,
        file_size=PAIRS,
        image_shape=SHAPE,
        dataset="noise",
        dataset_size=PAIRS,
    )
    pairmanifest.begin_manifest(plan)
    write = median_seconds(lambda: utils.write_arrays(path, **arrays))
    pairmanifest.complete_manifest(plan)
    write_compressed = median_seconds(lambda: np.savez_compressed(compressed, **arrays))
    if "writing" in parts:
        report.say("writing, MB/s, on the disk before it counts", f"{size / write / 1e6:8.0f}")
        report.say("numpy.savez_compressed, MB/s", f"{size / write_compressed / 1e6:8.0f}")
        report.ratio("writing / numpy.savez_compressed", write_compressed / write, least=10)
    if "reading" in parts:
        bench_reading(report, path.parent, compressed, arrays)


def bench_reading(report: Report, folder: Path, compressed: Path, arrays: dict[str, np.ndarray]) -> None:
    """Reading. Every round times all of it in turn, and ratios are of one round: a busy moment slows all alike."""
    epoch, size = -(-PAIRS // BATCH), sum(array.nbytes for array in arrays.values())
    bytes_read, target = size * epoch * BATCH / PAIRS, np.empty_like(arrays["x1"])
    iterator: Any = reflow.PairSet(folder).batches(BATCH, seed=0)
    jobs = {  # name: (what is timed, bytes)
        "plain memory copy": (lambda: copy_arrays(target, arrays["x0"], arrays["x1"]), size),
        "reading with the CRC check": (lambda: read_once(folder, epoch), bytes_read),
        "reading after it": (lambda: take(iterator, epoch), bytes_read),
        "compressed npz": (lambda: read_compressed(compressed), size),
    }
    rounds = [{name: size / seconds(job) for name, (job, size) in jobs.items()} for _ in range(RUNS + 1)][1:]
    iterator.close()
    for name in jobs:
        report.say(f"{name}, MB/s", f"{statistics.median(speeds[name] for speeds in rounds) / 1e6:8.0f}")
    for name, least in (("reading with the CRC check", 0.1), ("reading after it", 0.2)):
        for rival, bound in (("plain memory copy", least), ("compressed npz", 10)):
            ratio = statistics.median(speeds[name] / speeds[rival] for speeds in rounds)
            report.ratio(f"{name} / {rival}", ratio, least=bound)


def peak_memory() -> float:
    """This program's peak resident memory in MB. (getrusage's would include that of the process that started it.)"""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def peak_memory_of_reader(folder: str, batches: str) -> None:
    """Prints the peak memory in MB, before and after reading; run in a process of its own."""
    before = peak_memory()
    take(reflow.PairSet(folder).batches(BATCH, seed=0), int(batches))
    print(before, peak_memory())


def bench_memory(report: Report, folder: Path) -> None:
    """Peak memory of readers in processes of their own; the large set is one file under many names."""
    arrays: dict[str, Any] = cifar_pairs()
    peaks = {}
    first = folder / "memory_1" / npz.file_name(1)
    utils.write_arrays(first, **arrays)
    (folder / "memory_20").mkdir()
    for number in range(1, 21):
        os.link(first, folder / "memory_20" / npz.file_name(number))
    for files in (1, 20):
        command = [sys.executable, "-m", "benchmarks.bench_pairs", "--reader", str(folder / f"memory_{files}"), "400"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        before, peaks[files] = map(float, output.split())
        report.say(
            f"peak memory of a reader of {files * PAIRS:,} pairs, MB", f"{peaks[files]:8.0f} ({before:.0f} idle)"
        )
    report.ratio("memory, 200,000 / 10,000 pairs", peaks[20] / peaks[1], most=1.2)


def small_network_config():
    """A network for 32 x 32 colour images that a CPU can run."""
    config = cifar10_rf_continuous.get_config()
    with config.unlocked():
        config.model.nf, config.model.num_res_blocks, config.model.ch_mult = 32, 1, (1, 2)
    return config


def network_call(make_velocity, params, shape, batch_size: int):
    """A compiled call of the network alone, on all devices, compiled and ready; a function without arguments."""
    devices = jax.local_device_count()
    x = np.random.default_rng(0).standard_normal((devices, batch_size // devices, *shape), np.float32)
    t, index = np.full(x.shape[:2], 0.5, np.float32), np.zeros(x.shape[:2], np.int32)
    velocity = distributed.map_devices(
        lambda params, *arguments: sampling.full_precision(make_velocity(params))(*arguments)
    )
    params = distributed.replicate(params)
    x, t, index = (distributed.map_devices(lambda array: array)(array) for array in (x, t, index))

    def call():
        velocity(params, x, t, index).block_until_ready()

    call()
    return call


def bench_generation(report: Report, folder: Path, name: str, config, pairs: int, batch_size: int) -> None:
    """A set of `pairs` pairs in two segments, in four rounds; a network call is timed before and after each of them."""
    with config.unlocked():
        config.training.reflow_t = 2
    network = models.create_model(config)
    make_velocity = functools.partial(models.velocity_fn, models.in_float32(network))  # as jobs/generate.py has it
    params, shape = perturbed_weights(network, 0.01), network.image_shape
    call = network_call(make_velocity, params, shape, batch_size)
    pixels = np.random.default_rng(0).integers(0, 256, (1000, *shape)).astype(np.uint8)
    images = datasets.ArraySource("noise", pixels)
    plan = plan_of(
        folder / name / "reflow_batch",
        boundaries=segments.uniform_boundaries(2),
        pairs=pairs,
        file_size=pairs // ROUNDS,
        image_shape=shape,
        dataset=images.identity,
        dataset_size=images.size,
    )
    expected, timed, summaries = 0.0, [seconds(call) for _ in range(10)], []
    for number in range(1, ROUNDS + 1):
        summary = reflow.generate(
            plan, images, make_velocity, params, batch_size=batch_size, worker=(number, ROUNDS), progress=False
        )
        before, timed = timed, [seconds(call) for _ in range(10)]
        expected += summary.calls * statistics.median(before + timed)
        summaries.append(summary)
    calls, spent = (sum(getattr(summary, name) for summary in summaries) for name in ("calls", "seconds"))
    report.say(f"{name}: pairs/s; NFE in each segment", f"{pairs / spent:8.1f}   {summaries[0].nfe}")
    report.say(f"{name}: seconds; calls; ms a call", f"{spent:8.1f}   {calls}   {1000 * expected / calls:.1f}")
    report.ratio(f"{name}: wall time / (calls x one call)", spent / expected, most=1.1)


def main() -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="; ".join(PARTS) + "; all of them if none is given")
    parser.add_argument("--reader", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        peak_memory_of_reader(*arguments.reader)
        return 0
    parts, report = arguments.parts or PARTS, Report()
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="bench_pairs_") as name:
        folder = Path(name)
        if {"reading", "writing"} & set(parts):
            bench_files(report, folder, parts)
        if "memory" in parts:
            bench_memory(report, folder)
        if "generation" in parts:
            digits = digits_rf_continuous.get_config()
            bench_generation(report, folder, "digits network", digits, pairs=8000, batch_size=250)
            bench_generation(report, folder, "32 x 32 network", small_network_config(), pairs=256, batch_size=16)
    return int(report.missed)


if __name__ == "__main__":
    sys.exit(main())
