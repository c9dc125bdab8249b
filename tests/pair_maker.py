"""A teacher whose flow is known in closed form, and the making of pair sets with it, also in a process of its own."""

import contextlib
import hashlib
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import struct
import sys
import unittest.mock
import zipfile

import jax
import numpy as np
import xla
from etils.epath import backend, gpath

import datasets
import reflow
import segments
from pairs.plan import plan_pairs
from pairs.reader import FileSet, PairSet

MEAN, STD = 0.3, 0.5  # of the teacher's data, every pixel alike
SHAPE = (6, 5, 1)


class Images(datasets.ArraySource):
    """50 random images."""

    def __init__(self):
        self.pixels = np.random.default_rng(0).integers(0, 256, (50, *SHAPE)).astype(np.uint8)
        super().__init__("fifty", self.pixels)
        self.identity = "fifty"


def std_of_tau(tau):
    """The standard deviation of tau data + (1 - tau) noise."""
    return (tau**2 * STD**2 + (1 - tau) ** 2) ** 0.5


def make_velocity(params):
    """The exact velocity for data N(MEAN, STD^2), the same in every segment."""

    def velocity(x, t, index):
        tau = segments.tau_of_t(t).reshape(-1, 1, 1, 1)
        slope = (tau * STD**2 - (1 - tau)) / std_of_tau(tau) ** 2
        return params["one"] * (MEAN + slope * (x - tau * MEAN))

    return velocity


def flow(x, t_start, t_end):
    """Where the teacher's ODE carries x at t_start until t_end."""
    start, end = (segments.tau_of_t(np.reshape(t, (-1, 1, 1, 1)).astype(np.float64)) for t in (t_start, t_end))
    return end * MEAN + std_of_tau(end) / std_of_tau(start) * (x - start * MEAN)


def plan(folder, **changes):
    """A plan for 60 pairs of 3 segments in 5 files."""
    settings = {
        "boundaries": segments.uniform_boundaries(3),
        "pairs": 60,
        "file_size": 12,
        "image_shape": SHAPE,
        "dataset": "fifty",
        "dataset_size": 50,
        "centered": True,
        "flip": True,
        "dequantize": False,
        "seed": 7,
        "teacher": "known",
        "tol": 1e-4,
        "solver": "dopri5",
        "error_norm": "batch",
        "dtype": "float32",
        "store_noise": True,
    }
    return plan_pairs(folder=folder, **(settings | changes))


def generate(folder, batch_size=4, worker=(1, 1), images=None, **changes):
    """Makes the set of `plan(folder, **changes)` and returns the summary."""
    params = {"one": np.float32(1)}
    return reflow.generate(
        plan(folder, **changes),
        images or Images(),
        make_velocity,
        params,
        batch_size=batch_size,
        worker=worker,
        progress=False,
    )


def digests(folder) -> dict[str, str]:
    """A digest of the bytes of every file in the folder, but for manifests that a killed process has begun to claim.

    Those are cleared away by their age alone: a process may be about to give one its name. Anything else that is left
    behind counts.
    """
    paths = [path for path in sorted(folder.iterdir()) if not path.match(".manifest.json.*.tmp")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def arrays_of(folder) -> dict[str, np.ndarray]:
    """Every array of the set, its files joined in order."""
    files = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    return {name: np.concatenate([file[name] for file in files]) for name in files[0].files}


def stream(pair_set, count, *arguments, **options) -> list[dict[str, np.ndarray]]:
    """The first `count` batches of a set, given open or as its folder."""
    pair_set = pair_set if isinstance(pair_set, FileSet) else PairSet(pair_set)
    with contextlib.closing(pair_set.batches(*arguments, **options)) as batches:
        return list(itertools.islice(batches, count))


def names_of(batches) -> list[bytes]:
    """What tells every pair in the batches from any other, in order."""
    return [row.tobytes() for batch in batches for row in batch["x1"]]


def flip_byte(path, array) -> None:
    """Changes the last byte of an array in the file."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{array}.npy")
    with open(path, "r+b") as file:
        file.seek(info.header_offset)
        lengths = struct.unpack("<26xHH", file.read(30))  # of the name and the extra field between header and array
        file.seek(sum(lengths) + info.file_size - 1, os.SEEK_CUR)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def rewrite(path, save=np.savez, without=(), **changes) -> None:
    """The file again, some of its arrays changed."""
    arrays = {name: array for name, array in np.load(path).items() if name not in without} | changes
    save(path, **arrays)


def truncate(path) -> None:
    """Cuts the last 100 bytes off."""
    os.truncate(path, path.stat().st_size - 100)


def process(devices=2, hosts=None, **arguments) -> multiprocessing.Process:
    """A started process that generates with `arguments`; `hosts` is (port, number of hosts, this host)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pair_maker", "pytest"])  # imported once, not in every process
    with unittest.mock.patch.dict(
        os.environ, PYTHONPATH=os.pathsep.join(sys.path)
    ):  # which Python 3.11 does not tell it
        multiprocessing.forkserver.ensure_running()
    child = context.Process(target=_generate_apart, args=(devices, hosts, arguments), daemon=True)
    child.start()
    return child


def _generate_apart(devices, hosts, arguments):
    os.environ["XLA_FLAGS"] = xla.flags(devices)
    if hosts:
        port, count, host_index = hosts
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=host_index)
    generate(**arguments)
    if hosts:
        jax.distributed.shutdown()  # as a program's own end would; this kind of process skips it


class Bucket:
    """TensorFlow's functions for files, to which gs://bucket is the local folder `root`."""

    def __init__(self, root):
        self.root = str(root)

    def __getattr__(self, name):
        import tensorflow as tf

        real = getattr(tf.io.gfile, name)

        def call(*arguments, **options):
            local = [os.fspath(value).replace("gs://bucket", self.root) for value in arguments]
            result = real(*local, **options)
            return [path.replace(self.root, "gs://bucket") for path in result] if name == "glob" else result

        return call


def mount_bucket(monkeypatch, root):
    """Makes gs://bucket the folder `root`; epath's way there and TensorFlow's files and errors stay the real ones."""
    monkeypatch.setattr(gpath, "_is_zonal_gcs_bucket", lambda bucket: False)  # else it asks Google
    monkeypatch.setattr(type(backend.tf_backend), "gfile", Bucket(root))
