"""scripts/reproduce.py on a tiny network: the same figures bit for bit, and what differs where they are not."""

import json
import os
import runpy
import sys

import jax
import pytest
from tiny_run import export_file, network_config, random_weights

import run_lib


def reproduce(monkeypatch, capsys, *arguments):
    """The exit status and what the script prints; with status 2 the line of the error."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("scripts.reproduce", run_name="__main__")
    out, err = capsys.readouterr()
    return end.value.code, next(line for line in err.splitlines() if "error: " in line) if end.value.code == 2 else out


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The metrics.json of an evaluated network with random weights, its checkpoint given by a relative path."""
    folder = tmp_path_factory.mktemp("measured")
    config = network_config()
    config.model.update(rf_phase=1, num_scales=2)
    config.eval.update(batch_size=16, num_samples=16, straightness_samples=2, samplers="euler:2")
    before = os.getcwd()
    os.chdir(folder)
    try:
        export_file("tiny.safetensors", random_weights(config, step=3), config)
        config.training.import_flax = "tiny.safetensors"
        run_lib.evaluate(config, "run", "eval")
    finally:
        os.chdir(before)
    return folder / "run" / "eval_euler_2" / "step_3" / "metrics.json"


def test_figures_are_measured_again_bit_for_bit(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = set(measured.parents[3].rglob("*"))
    status, said = reproduce(monkeypatch, capsys, measured, "--to", tmp_path / "again")
    assert status == 0, said
    assert "DIFFERS" not in said
    assert {path for path in set(measured.parents[3].rglob("*")) - files if "wandb" not in path.parts} == set()
    entry, again = (json.loads(path.read_text()) for path in (measured, tmp_path / "again" / "step_3" / "metrics.json"))
    for name in ("fid_digits_classifier", "straightness", "truncation_error"):
        assert entry[name] == again[name]
        assert f"{entry[name]!s}" in said
    record = entry["provenance"]
    assert record["sampler"] == {"method": "pc", "predictor": "rf_solver", "num_scales": 2}
    assert (record["nfe"], record["num_samples"], record["ema_rate"], record["seed"]) == (2, 16, 0.999, 42)
    assert record["weights"] == entry["settings"]["weights"]
    assert record["seconds"] > 0
    assert record["images_per_second"] == pytest.approx(1000 / entry["seconds_per_1000"])
    status, said = reproduce(monkeypatch, capsys, measured, "--to", tmp_path / "again")
    assert status == 2
    assert "again holds results already" in said


def test_what_differs_is_named(measured, tmp_path, monkeypatch, capsys):
    entry = json.loads(measured.read_text())
    entry["straightness"] *= 1 + 1e-9
    entry["provenance"]["versions"]["jax"] = "0.1"
    entry["provenance"]["config"]["training"]["import_flax"] = "moved.safetensors"
    entry["provenance"]["workdir"] = str(tmp_path / "other machine" / "run")
    (tmp_path / "metrics.json").write_text(json.dumps(entry))
    monkeypatch.chdir(tmp_path)
    moved = measured.parents[3] / "tiny.safetensors"
    status, said = reproduce(monkeypatch, capsys, tmp_path / "metrics.json", "--checkpoint", moved)
    assert status == 1
    assert [line.split()[0] for line in said.splitlines() if line.endswith("DIFFERS")] == ["straightness"]
    assert not (tmp_path / "other machine").exists()
    assert f"versions.jax: then 0.1, now {jax.__version__}" in said


def test_a_checkpoint_of_another_update_is_named(measured, tmp_path, monkeypatch, capsys):
    config = network_config()
    export_file(tmp_path / "later.safetensors", random_weights(config, step=4), config)
    monkeypatch.chdir(tmp_path)
    status, said = reproduce(monkeypatch, capsys, measured, "--checkpoint", "later.safetensors")
    assert status == 2
    assert "later.safetensors is not of update 3" in said


@pytest.mark.parametrize(
    "content", ["", "[]", '{"step": 3}', '{"step": 3, "settings": {}, "provenance": {"config": 0}}']
)
def test_a_file_without_a_record_is_refused(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.json").write_text(content)
    status, said = reproduce(monkeypatch, capsys, tmp_path / "metrics.json")
    assert status == 2
    assert "has no complete 'provenance' record" in said
