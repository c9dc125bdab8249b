"""Whole jobs with a tiny network on real digits: every stage, every artefact, and a kill in the middle."""

import json

import flax
import jax
import numpy as np
import pytest

import checkpoints
import reflow
import run_lib
from configs.rf.digits_rf_continuous import get_config
from utils import InputError


def tiny_config(**sections):
    config = get_config()
    config.model.update(nf=4, ch_mult=(1,), attn_resolutions=(), num_scales=2)
    config.training.update(
        batch_size=8,
        n_iters=6,
        n_jitted_steps=2,
        log_freq=2,
        snapshot_freq=4,
        snapshot_freq_for_preemption=2,
        n_reflow_data=64,
        reflow_file_size=32,
        gen_reflow_size=16,
        reflow_t=2,
    )
    config.eval.update(batch_size=16, num_samples=32, straightness_samples=8)
    config.sampling.tol = 1e-2
    for section, values in sections.items():
        config[section].update(values)
    return config


def reflow_config(mode="train_reflow", **sections):
    config = tiny_config(**sections)
    config.model.rf_phase = 2
    config.training.reflow_mode = mode
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir where every training stage has run."""
    workdir = tmp_path_factory.mktemp("run")
    run_lib.train(tiny_config(), workdir)
    run_lib.train(reflow_config("gen_reflow"), workdir)
    run_lib.train(reflow_config("train_reflow"), workdir)
    run_lib.train(reflow_config("train_distill"), workdir)
    return workdir


def state(workdir, stage, step):
    return checkpoints.load_with_info(workdir / stage / "checkpoints" / str(step))


@pytest.mark.parametrize("stage", ["1_rf", "2_rf", "2_distill"])
def test_a_stage_leaves_checkpoints_numbers_and_pictures(workdir, stage):
    assert checkpoints.steps_in(workdir / stage) == [0, 4, 6]
    lines = json.loads((workdir / stage / "metrics.json").read_text())
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert (workdir / stage / "loss.png").stat().st_size > 1000
    assert (workdir / stage / "samples" / "step_6.png").stat().st_size > 200


def test_a_stage_starts_from_the_one_before_with_its_head_copied(workdir):
    teacher, _ = state(workdir, "1_rf", 6)
    student, info = state(workdir, "2_rf", 0)
    assert info["k"] == 2
    shapes = jax.tree.map(np.shape, flax.traverse_util.flatten_dict(student.params))
    differing = 0
    for path, leaf in flax.traverse_util.flatten_dict(teacher.params).items():
        copied = np.asarray(flax.traverse_util.flatten_dict(student.params)[path])
        np.testing.assert_array_equal(copied, np.broadcast_to(leaf, copied.shape))
        differing += shapes[path] != np.shape(leaf)
    assert differing == 4  # kernel and bias of the two dense layers of the time embedding
    assert student.step == 0
    assert student.count == teacher.count == 6  # Adam's moments travel with their count


def test_pairs_are_what_their_manifest_says(workdir):
    pairs = reflow.PairSet(workdir / run_lib.PAIRS)
    teacher, _ = state(workdir, "1_rf", 6)
    assert len(pairs) == 64
    assert pairs.k == 2
    expanded = checkpoints.load_weights(workdir / "1_rf", reflow_config())
    assert pairs.manifest["teacher"] == reflow.fingerprint(expanded.ema_params)
    assert teacher.step == 6


def test_evaluation_measures_every_checkpoint_asked_for_once(workdir):
    config = reflow_config(eval={"begin_step": 0, "end_step": 4, "interval_step": 4, "save_trajectory": True})
    run_lib.evaluate(config, workdir, "ode")
    folders = sorted(path.name for path in (workdir / "ode").glob("step_*"))
    assert folders == ["step_0", "step_4"]
    for folder in folders:
        metrics = json.loads((workdir / "ode" / folder / "metrics.json").read_text())
        for name in ("fid_digits_classifier", "nfe", "straightness", "sequential_straightness", "truncation_error"):
            assert np.isfinite(metrics[name]), name
        assert metrics["sequential_straightness"] <= metrics["straightness"] * 1.001
        with np.load(workdir / "ode" / folder / "trajectory.npz") as saved:
            assert saved["xs"].shape[0] == saved["ts"].size
        for picture in ("samples.png", "straightness.png", "trajectory.png"):
            assert (workdir / "ode" / folder / picture).stat().st_size > 200
    metrics_file = workdir / "ode" / "step_4" / "metrics.json"
    before = metrics_file.stat().st_mtime_ns
    run_lib.evaluate(config, workdir, "ode")
    assert metrics_file.stat().st_mtime_ns == before
    config.sampling.tol = 0.1
    run_lib.evaluate(config, workdir, "ode")
    assert metrics_file.stat().st_mtime_ns > before


def test_distilled_and_first_models_are_evaluated_on_a_fixed_grid(workdir):
    config = reflow_config(eval={"reflow_mode": "eval_distill", "begin_step": 6})
    config.sampling.method = "pc"
    run_lib.evaluate(config, workdir, "distilled")
    metrics = json.loads((workdir / "distilled" / "step_6" / "metrics.json").read_text())
    assert metrics["nfe"] == 2
    assert metrics["model"] == "2-SeqRF-Distill"
    assert metrics["sequential_straightness"] < 1e-6  # one Euler step in a segment is straight
    config = tiny_config(eval={"begin_step": 6}, model={"num_scales": 3})
    config.sampling.update(method="pc", predictor="rf_solver_heun", time_grid="adaptive")
    run_lib.evaluate(config, workdir, "first")
    metrics = json.loads((workdir / "first" / "step_6" / "metrics.json").read_text())
    assert metrics["nfe"] == 6
    assert metrics["model"] == "1-RF"


def test_a_run_that_stopped_goes_on_to_the_same_result(workdir, tmp_path):
    # Stopped after 2 updates by a smaller n_iters: what it kept is a checkpoint like that of a kill.
    run_lib.train(tiny_config(training={"n_iters": 2}), tmp_path)
    run_lib.train(tiny_config(), tmp_path)
    went_on, _ = state(tmp_path, "1_rf", 6)
    undisturbed, _ = state(workdir, "1_rf", 6)
    jax.tree.map(np.testing.assert_array_equal, went_on.params, undisturbed.params)
    jax.tree.map(np.testing.assert_array_equal, went_on.nu, undisturbed.nu)


def test_a_finished_run_is_left_alone(workdir):
    checkpoint = workdir / "1_rf" / "checkpoints" / "6"
    before = checkpoint.stat().st_mtime_ns
    run_lib.train(tiny_config(), workdir)
    assert checkpoint.stat().st_mtime_ns == before


def test_adaptive_boundaries_are_kept_in_the_manifest_and_used_by_training(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("measurement.FINE_STEPS", 100)
    monkeypatch.setattr("measurement.FINE_NOISES", 16)
    source = {"import_flax": str(workdir / "1_rf"), "adaptive_interval": True, "n_reflow_data": 32}
    run_lib.train(reflow_config("gen_reflow", training=source), tmp_path)
    manifest = reflow.read_manifest(tmp_path / run_lib.PAIRS)
    assert manifest["adaptive"]
    assert manifest["cost_adaptive"] <= manifest["cost_uniform"]
    assert (tmp_path / "samples" / "division.png").stat().st_size > 1000
    run_lib.train(reflow_config(training=source | {"n_iters": 2}), tmp_path)
    assert checkpoints.boundaries_of(tmp_path / "2_rf" / "checkpoints" / "2") == pytest.approx(manifest["boundaries"])


def test_pairs_of_another_teacher_or_k_are_refused(workdir, tmp_path):
    other = str(workdir / "1_rf" / "checkpoints" / "0")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "reflow_batch").symlink_to(workdir / "samples" / "reflow_batch")
    with pytest.raises(InputError, match="teacher"):
        run_lib.train(reflow_config(training={"import_flax": other}), tmp_path)
    with pytest.raises(InputError, match="k = 2"):
        run_lib.train(reflow_config(training={"reflow_t": 4}), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(InputError, match="loss is nan"):
        run_lib.train(tiny_config(optim={"lr": float("inf"), "warmup": 0}), tmp_path)
