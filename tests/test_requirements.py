"""scripts/requirements.sh: what it would install on machines that are not there."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MACHINES = {
    "a laptop": ({}, {}, "cpu full"),
    "an NVIDIA driver": ({"proc/driver/nvidia/version": "NVRM"}, {}, "cuda full jax[cuda12]"),
    "a GPU in a container": ({"dev/nvidiactl": ""}, {}, "cuda full jax[cuda12]"),
    "an AMD GPU under WSL": ({"dev/dxg": ""}, {}, "cpu full"),
    "a TPU v3": ({"dev/accel0": ""}, {}, "tpu full jax[tpu]"),
    "a TPU v6e": (
        {"sys/bus/pci/devices/0000:00:05.0/vendor": "0x1ae0\n", "sys/bus/pci/devices/0000:00:05.0/device": "0x006f\n"},
        {},
        "tpu full jax[tpu]",
    ),
    "a network card of Google": (
        {"sys/bus/pci/devices/0000:00:04.0/vendor": "0x1ae0\n", "sys/bus/pci/devices/0000:00:04.0/device": "0x0042\n"},
        {},
        "cpu full",
    ),
    "a TPU slice's pod": ({}, {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}, "tpu full jax[tpu]"),
}


@pytest.fixture
def clone(tmp_path):
    """A folder with the script and what it reads; no .venv."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "requirements.sh", tmp_path / "scripts")
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, tmp_path)
    return tmp_path


def shown(clone, *arguments, **environment):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TPU_")}
    command = ["bash", clone / "scripts" / "requirements.sh", "--show", *arguments]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip()


@pytest.mark.parametrize("name", MACHINES)
def test_the_machine_decides_unless_an_argument_does(clone, tmp_path, name):
    files, environment, expected = MACHINES[name]
    for path, content in files.items():
        (tmp_path / "machine" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "machine" / path).write_text(content)
    environment |= {"SEQRF_MACHINE": str(tmp_path / "machine")}
    assert shown(clone, **environment) == expected
    assert shown(clone, "cpu", **environment) == "cpu full"
    assert shown(clone, "cuda", "--minimal", **environment) == "cuda minimal jax[cuda12]"
    assert shown(clone, "any", **environment) == "cpu full"


@pytest.mark.parametrize("stamp", ["cuda full 0f", "cuda 0f  -"])
def test_what_is_there_is_kept(clone, tmp_path, stamp):
    (clone / ".venv").mkdir()
    (clone / ".venv" / "seqrf-requirements").write_text(stamp + "\n")
    machine = {"SEQRF_MACHINE": str(tmp_path / "machine")}
    for arguments in ((), ("any",), ("--minimal",)):
        assert shown(clone, *arguments, **machine) == "cuda full jax[cuda12]"
    assert shown(clone, "cpu", **machine) == "cpu full"
    (clone / ".venv" / "seqrf-requirements").write_text("cpu minimal 0f\n")
    assert shown(clone, "--minimal", **machine) == "cpu minimal"
    assert shown(clone, **machine) == "cpu full"


def test_an_unknown_argument_is_named(clone):
    assert shown(clone, "gpu").startswith("error: unknown argument 'gpu'; use --minimal")


WITHOUT = """
import sys

from importlib.machinery import PathFinder

class Others(PathFinder):
    missing = "torch", "tensorflow", "tensorflow_datasets", "tensorflow_hub", "tensorflow_gan", "wandb", "beartype"

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.missing else PathFinder.find_spec(name, path, target)

sys.meta_path = [Others if finder is PathFinder else finder for finder in sys.meta_path]
import numpy as np, jax, pathlib
import run_lib, sampler, models
from tiny_run import tiny_config, reflow_config
folder = pathlib.Path(sys.argv[1])
run_lib.train(tiny_config(training={"n_iters": 8}), folder)
pairs = reflow_config("gen_reflow", training={"import_flax": str(folder / "1_rf" / "checkpoints" / "6")})
run_lib.train(pairs, folder / "again")
run_lib.sample(reflow_config(sample={"count": 2}, sampling={"method": "pc"}, model={"num_scales": 2}), folder, "drawn")
for config, message in (
    (tiny_config(training={"import_torch": sys.argv[1] + "/x.pth"}), "a PyTorch checkpoint needs torch, which is not"),
    (tiny_config(data={"dataset": "CIFAR10"}), "the data set cifar10 needs tensorflow_datasets, which is not"),
):
    pathlib.Path(sys.argv[1], "x.pth").write_bytes(b"x")
    try:
        run_lib.train(config, folder / "other")
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""


def test_training_and_sampling_need_no_torch_tensorflow_or_wandb(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "1_rf" / "checkpoints" / "8").is_dir()
    assert len(list((folder / "again").rglob("reflow_batch_*.npz"))) == 2
    assert list((folder / "drawn").rglob("*.png"))
