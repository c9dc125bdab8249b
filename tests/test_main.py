"""What users type, as they type it: real processes, wrong input, time and exit code."""

import json
import multiprocessing
import os
import pathlib
import runpy
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run
import xla
from tiny_run import export_file, restore

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = "--config=configs/rf/digits_rf_continuous.py"
FIRST = "--config.model.rf_phase=1"


def start(*arguments, workdir, devices, **environment):
    """A started `python main.py ...` that sees so many devices."""
    environment = os.environ | environment | {"XLA_FLAGS": xla.flags(devices)}
    command = [sys.executable, "main.py", f"--workdir={workdir}", *arguments]
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **merged)


def run(*arguments, workdir, before=()):
    """(exit code, what it printed) of `python main.py ...`; `before`: Python's own options."""
    environment = os.environ | {"XLA_FLAGS": xla.QUICK}  # no forced devices: users have none
    command = [sys.executable, *before, "main.py", f"--workdir={workdir}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def run_preloaded(*arguments, workdir):
    """As `run`, in a fork of a process that has imported all that takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_lib"])
    printed = workdir.parent / "printed"
    process = context.Process(target=_main, args=(["main.py", f"--workdir={workdir}", *arguments], printed))
    process.start()
    process.join(300)
    return process.exitcode, printed.read_text()


def _main(arguments, printed):
    """Ends this process as `python main.py ...` does; what it prints goes to a file."""
    with open(printed, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = arguments
    runpy.run_path("main.py", run_name="__main__")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DIGITS, "--mode=train", "--config.training.no_such=3"], "unknown setting --config.training.no_such=3"),
        ([DIGITS, "--mode=train", "--config.model.nff=3"], "setting --config.model.nff=3; did you mean nf?"),
        ([DIGITS, "--mode=train", "--config.training.reflow_t=two"], "--config.training.reflow_t=two"),
        ([DIGITS, "--mode=fly"], "one of <train|eval|sample>"),
        (["--config=configs/rf/nowhere.py", "--mode=train"], "configs/rf/nowhere.py"),
        ([f"{DIGITS}:papre", "--mode=train"], "recipe 'papre': use one of paper, 2rf++, on_policy, best; see --help"),
        ([DIGITS, "--mode=train", "--config.training.reflow_t=0"], "--config.training.reflow_t=0"),
        ([DIGITS, "--mode=train", FIRST, "--workdir=README.md/run"], "README.md"),
        ([DIGITS, "--mode=train", FIRST, "--config.training.import_torch=/no/such.pth"], "/no/such.pth"),
    ],
)  # fmt: skip
def test_wrong_input_ends_in_one_clear_line(arguments, message, tmp_path):
    code, said = run_preloaded(*arguments, workdir=tmp_path / "run")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code not in (0, None)
    assert len(errors) == 1, said
    assert message in errors[0]
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("checkpoints/*"))  # before any work


def test_help_waits_for_no_large_library(tmp_path):
    code, said = run("--help", workdir=tmp_path, before=["-X", "importtime"])
    assert "--workdir" in said
    assert code in (0, 1)  # absl ends --help with 1
    assert "absl.flags" in said
    assert not {"jax", "flax", "tensorflow", "torch"} & {line.rpartition("|")[2].strip() for line in said.splitlines()}


TINY = [
    "--config.model.nf=4",
    "--config.model.ch_mult=(1,)",
    "--config.model.attn_resolutions=()",
    "--config.training.snapshot_sampling=False",
]


def test_a_second_start_compiles_nothing_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQRF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_DEBUG_LOG_MODULES", "jax._src.compiler")
    config = tiny_run.network_config()
    export_file(tmp_path / "tiny.safetensors", tiny_run.random_weights(config), config)
    sizes = ["--config.eval.num_samples=16", "--config.eval.batch_size=16", "--config.eval.straightness_samples=4"]
    given = [f"--config.training.import_flax={tmp_path / 'tiny.safetensors'}"]
    kept = []
    for folder in ("first", "second"):
        evaluate = [DIGITS, "--mode=eval", FIRST, f"--eval_folder={folder}", "--config.sampling.tol=0.01"]
        code, said = run(*evaluate, *sizes, *given, *TINY, workdir=tmp_path / "run")
        assert code == 0, said
        assert "host callbacks" not in said  # such programs are never kept
        kept.append({path.name for path in (tmp_path / "cache" / "compiled").glob("*-cache")})
    assert len(kept[0]) >= 3  # samples, straightness, the exact solve; and the classifier's training
    assert kept[1] == kept[0]
    assert said.count("Persistent compilation cache hit") >= 3


def test_two_hosts_train_what_one_host_with_two_devices_trains(trained, tmp_path):
    # The hosts share the samples of a snapshot, and the first one draws.
    settings = tiny_run.tiny_config(training=tiny_run.PICTURES, sampling={"method": "pc"}, model={"num_scales": 1})
    arguments = [DIGITS, "--mode=train", *tiny_run.flags(settings)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    started = [start(*arguments, workdir=tmp_path, devices=1, **hosts, JAX_PROCESS_ID=str(n)) for n in (0, 1)]
    for process in started:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said

    one, _ = restore(trained / "1_rf")
    two, _ = restore(tmp_path / "1_rf")
    assert one.step == two.step == 6
    assert (tmp_path / "1_rf" / "samples" / "step_6.png").exists()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), one.params, two.params)
    losses = [json.loads((workdir / "1_rf" / "metrics.json").read_text()) for workdir in (trained, tmp_path)]
    assert losses[0][-1]["loss"] == pytest.approx(losses[1][-1]["loss"], rel=1e-4)
