"""Whole jobs with a tiny network on real digits: every stage, every artefact, and a kill in the middle."""

import dataclasses
import itertools
import json
import shutil
import signal
import time

import flax
import jax
import numpy as np
import pytest
import torch
from etils import epath
from tiny_run import PICTURES, export_file, load_weights, reflow_config, restore, tiny_config

import distributed
import evaluation
import models
import reflow
import run_lib
import runtime
import train_step
import utils
from benchmarks import torch_twin
from checkpointing import runs
from checkpointing.checkpoint import checkpoint_at
from configs.rf import cifar10_rf_continuous
from configs.validation import stage_values
from jobs import evaluate as evaluate_job
from jobs import inputs
from jobs.builders import optimizer, sampler_options
from models.weights import fingerprint
from pairs.manifest import read_manifest
from tracking import provenance
from utils import InputError

PACE = ("images_per_second", "input_wait")


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """A copy of `trained`, for evaluations, and for jobs that have nothing left to do."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("run") / "trained")


def state(workdir, stage, step):
    return restore(workdir / stage / "checkpoints" / str(step))


def numbers_of(folder):
    """The lines of metrics.json without what depends on the machine's pace."""
    lines = json.loads((folder / "metrics.json").read_text())
    return [{name: value for name, value in line.items() if name not in PACE} for line in lines]


@pytest.mark.parametrize("stage", ["1_rf", "2_rf", "2_distill"])
def test_a_stage_leaves_checkpoints_numbers_and_pictures(workdir, stage):
    assert runs.steps_in(workdir / stage) == [0, 4, 6]
    lines = [line for line in json.loads((workdir / stage / "metrics.json").read_text()) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert np.isfinite(line["loss"])
        assert line["gradient_norm"] > 0
        assert line["learning_rate"] == pytest.approx(1e-3 * (line["step"] - 1) / 100, rel=1e-4)
    for line in lines[1:]:  # the first call is compiled
        assert line["images_per_second"] > 0
        assert 0 <= line["input_wait"] <= 1
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
    pairs = reflow.PairSet(workdir / inputs.PAIRS)
    teacher, _ = state(workdir, "1_rf", 6)
    assert len(pairs) == 64
    assert pairs.k == 2
    expanded = load_weights(workdir / "1_rf", reflow_config())
    assert pairs.manifest["teacher"] == fingerprint(expanded.ema_params)
    assert (workdir / "samples" / "pairs.png").stat().st_size > 1000
    assert list((workdir / "wandb").glob("*/files/media/images/pairs_64_*.png"))
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
    config.sampling.method = "pc"
    config.eval.update(begin_step=4, save_trajectory=False)
    run_lib.evaluate(config, workdir, "ode")
    assert metrics_file.stat().st_mtime_ns > before
    assert [line["step"] for line in json.loads((workdir / "ode" / "metrics.json").read_text())] == [0, 4]


def test_an_adaptive_sampler_has_the_settings_of_the_configuration():
    settings = {"method": "ode", "tol": 0.1, "solver": "bosh3", "error_norm": "sample"}
    assert sampler_options(tiny_config(sampling=settings)).record() == settings


def test_several_samplers_share_a_process_and_give_what_each_gives_alone(workdir, monkeypatch):
    references = []
    solve = evaluation.reference_samples
    monkeypatch.setattr(evaluation, "reference_samples", lambda *a: references.append(a) or solve(*a))
    config = reflow_config(eval={"begin_step": 0, "interval_step": 4, "samplers": "ode; euler:2,4;heun:2"})
    run_lib.evaluate(config, workdir, "all")
    assert len(references) == 2  # steps 0 and 4, for all samplers
    folders = {name: workdir / f"all_{name}" for name in ("ode", "euler_2", "euler_4", "heun_2")}
    found = {name: json.loads((folder / "step_4" / "metrics.json").read_text()) for name, folder in folders.items()}
    assert [entry["sampler"] for entry in found.values()] == ["ODE", "Euler 2", "Euler 4", "Heun 2"]
    for folder in folders.values():
        both = [json.loads((folder / f"step_{step}" / "metrics.json").read_text()) for step in (0, 4)]
        best = min(both, key=lambda entry: entry["fid_digits_classifier"])
        assert json.loads((folder / "best.json").read_text()) == {
            "step": best["step"],
            "fid_digits_classifier": best["fid_digits_classifier"],
            "among": 2,
        }
        assert [line["step"] for line in json.loads((folder / "metrics.json").read_text())] == [0, 4]

    alone = reflow_config(eval={"begin_step": 4, "end_step": 4}, model={"num_scales": 4})
    alone.sampling.method = "pc"
    run_lib.evaluate(alone, workdir, "alone")
    single = json.loads((workdir / "alone" / "step_4" / "metrics.json").read_text())
    timed = {"seconds_per_1000": 0, "provenance": None}
    assert single | timed == found["euler_4"] | timed
    differing = provenance.differences(single["provenance"], found["euler_4"]["provenance"])
    assert set(differing) <= {"seconds", "images_per_second", "config.eval.begin_step", "config.eval.end_step"} | {
        "config.eval.interval_step",
        "config.sampling.predictor",
    }
    times = {name: (folder / "step_4" / "metrics.json").stat().st_mtime_ns for name, folder in folders.items()}
    (folders["heun_2"] / "step_4" / "metrics.json").unlink()
    run_lib.evaluate(config, workdir, "all")  # what a kill left is measured, and nothing else
    for name, folder in folders.items():
        assert ((folder / "step_4" / "metrics.json").stat().st_mtime_ns > times[name]) == (name == "heun_2")
    assert json.loads((folders["heun_2"] / "step_4" / "metrics.json").read_text())["nfe"] == 4


def test_distilled_and_first_models_are_evaluated_on_a_fixed_grid(workdir, monkeypatch):
    monkeypatch.setattr("segments.FINE_STEPS", 100)
    monkeypatch.setattr("sampler.FINE_NOISES", 16)
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
    with np.load(workdir / "first" / "step_6" / "straightness.npz") as saved:
        assert np.ptp(np.diff(saved["ts"])) > 1e-3  # placed, not uniform


def signal_in_call(number, monkeypatch):
    """The process gets SIGTERM while that call of the training step is in flight."""
    add, calls = distributed.RunAhead.add, itertools.count(1)

    def add_signalled(self, result):
        if next(calls) == number:
            signal.raise_signal(signal.SIGTERM)
            while not runtime.preemption.requested:
                time.sleep(0.01)
        add(self, result)

    monkeypatch.setattr(distributed.RunAhead, "add", add_signalled)


def test_a_stopped_run_is_saved_is_no_parent_and_goes_on_to_the_same_result(workdir, tmp_path, monkeypatch):
    signal_in_call(2, monkeypatch)
    stops = pytest.raises(runtime.Preempted, match="stopped by SIGTERM after update 2 of 6")
    config = tiny_config(training={"snapshot_freq_for_preemption": 100})
    with runtime.preemption.handled(), stops:
        run_lib.train(config, tmp_path)
    assert runs.steps_in(tmp_path / "1_rf") == [0]
    assert runs.RunCheckpoints(tmp_path / "1_rf").latest_step() == 2
    with pytest.raises(InputError, match=r"1_rf is not finished: its last snapshot has 0 of 6 .*checkpoints/0"):
        run_lib.train(reflow_config("gen_reflow"), tmp_path)
    with pytest.raises(InputError, match=r"begun with other settings: optim.lr was 0.001 and is 0.5\."):
        run_lib.train(tiny_config(optim={"lr": 0.5}), tmp_path)
    run_lib.train(config, tmp_path)
    went_on, _ = state(tmp_path, "1_rf", 6)
    undisturbed, _ = state(workdir, "1_rf", 6)
    jax.tree.map(np.testing.assert_array_equal, went_on.params, undisturbed.params)
    jax.tree.map(np.testing.assert_array_equal, went_on.nu, undisturbed.nu)
    assert numbers_of(tmp_path / "1_rf") == numbers_of(workdir / "1_rf")


def test_a_stopped_evaluation_keeps_what_is_measured(workdir, monkeypatch):
    config = reflow_config(eval={"begin_step": 0, "end_step": 4, "interval_step": 4})
    config.sampling.method = "pc"
    measure = evaluate_job._measure

    def measure_and_signal(*arguments):
        measure(*arguments)
        monkeypatch.setattr(runtime.preemption, "requested", signal.SIGINT)

    monkeypatch.setattr(evaluate_job, "_measure", measure_and_signal)
    with pytest.raises(runtime.Preempted, match="stopped by SIGINT before checkpoint 4 was measured"):
        run_lib.evaluate(config, workdir, "stopped")
    assert [path.name for path in (workdir / "stopped").glob("step_*")] == ["step_0"]
    assert [line["step"] for line in json.loads((workdir / "stopped" / "metrics.json").read_text())] == [0]


def test_an_evaluation_killed_before_its_history_is_written_has_it_in_the_end(workdir, monkeypatch):
    config = reflow_config(eval={"begin_step": 4, "end_step": 4}, sampling={"method": "pc"})
    write = utils.write_json

    def killed(path, content, **options):
        if path == epath.Path(workdir / "history" / "metrics.json"):
            raise KeyboardInterrupt
        write(path, content, **options)

    monkeypatch.setattr(utils, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        run_lib.evaluate(config, workdir, "history")
    monkeypatch.setattr(utils, "write_json", write)
    run_lib.evaluate(config, workdir, "history")
    assert [line["step"] for line in json.loads((workdir / "history" / "metrics.json").read_text())] == [4]


def test_only_the_latest_snapshots_are_kept_where_asked_and_a_shorter_run_is_finished(workdir, tmp_path):
    shutil.copytree(workdir / "1_rf", tmp_path / "1_rf")
    shutil.rmtree(tmp_path / "1_rf" / "checkpoints" / "6")
    # From the preemption checkpoint of update 4 or the snapshot: the same.
    run_lib.train(tiny_config(training={"keep_snapshots": 1, "n_iters": 5}), tmp_path)
    assert runs.steps_in(tmp_path / "1_rf") == [5]
    assert runs.planned_updates(tmp_path / "1_rf") == 5


@pytest.fixture(scope="module")
def trajectories(workdir, tmp_path_factory):
    """A workdir with the stages before distillation, their pairs and the trajectories of the same teacher."""
    folder = tmp_path_factory.mktemp("on_policy")
    for part in ("1_rf", "2_rf", "samples"):
        shutil.copytree(workdir / part, folder / part)
    run_lib.train(reflow_config("gen_reflow", training={"reflow_pairs": "trajectory"}), folder)
    return folder


OPTIONS = {
    "training": {"on_policy": 0.5, "distill_steps": 2, "loss": "huber", "init_from_ema": True},
    "model": {"ema_rates": (0.5, 0.9)},
    "optim": {"schedule": "cosine", "warmup": 1},
}


def test_a_distillation_with_every_option_resumes_to_the_same_result(trajectories, tmp_path):
    def distill(folder, n_iters):
        config = reflow_config("train_distill", **OPTIONS)
        config.training.update(n_iters=n_iters, snapshot_freq=3)
        run_lib.train(config, folder)

    for name in ("undisturbed", "killed"):
        shutil.copytree(trajectories, tmp_path / name)
    distill(tmp_path / "undisturbed", 6)
    shutil.copytree(tmp_path / "undisturbed" / "2_distill_2", tmp_path / "killed" / "2_distill_2")
    for step in (4, 5, 6):  # a kill before update 6, with the checkpoint of update 3 alone
        shutil.rmtree(tmp_path / "killed" / "2_distill_2" / "checkpoints" / str(step), ignore_errors=True)
        shutil.rmtree(tmp_path / "killed" / "2_distill_2" / "checkpoints-meta" / str(step), ignore_errors=True)
    assert runs.RunCheckpoints(tmp_path / "killed" / "2_distill_2").latest_step() == 3
    distill(tmp_path / "killed", 6)
    for rate in (0.0, 0.5, 0.9):
        first, second = (
            restore(tmp_path / name / "2_distill_2", ema_rate=rate)[0] for name in ("undisturbed", "killed")
        )
        jax.tree.map(np.testing.assert_array_equal, first.ema_params, second.ema_params)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert numbers_of(tmp_path / "undisturbed" / "2_distill_2") == numbers_of(tmp_path / "killed" / "2_distill_2")


def test_a_stage_may_start_from_the_ema_with_adam_at_zero(workdir, tmp_path):
    start = {"import_flax": str(workdir / "1_rf"), "init_from_ema": True, "n_iters": 6}
    run_lib.train(tiny_config(training=start), tmp_path)
    source, _ = state(workdir, "1_rf", 6)
    new, _ = state(tmp_path, "1_rf", 6)
    jax.tree.map(np.testing.assert_array_equal, new.params, source.ema_params)
    assert new.count == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((new.mu, new.nu)))


def test_an_evaluation_finds_many_step_runs_picks_an_ema_and_measures_the_distance_to_the_teacher(
    trajectories, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(trajectories, folder)
    on_policy = {"on_policy": 1.0, "distill_steps": 2, "n_iters": 2}
    shutil.rmtree(folder / "samples" / "reflow_batch")  # which on-policy distillation alone does not read
    fixed_rates = {"ema_rates": (0.5,), "variable_ema_rate": False}
    run_lib.train(reflow_config("train_distill", training=on_policy, model=fixed_rates), folder)
    assert runs.steps_in(folder / "2_distill_2") == [0, 2]
    found = {}
    for rate in (0.0, 0.5):
        config = reflow_config(training={"distill_steps": 2}, model={"ema_rates": (0.5,), "num_scales": 4})
        config.eval.update(reflow_mode="eval_distill", begin_step=2, ema_rate=rate, teacher=str(folder / "1_rf"))
        config.sampling.method = "pc"
        run_lib.evaluate(config, folder, f"ema_{rate}")
        found[rate] = json.loads((folder / f"ema_{rate}" / "step_2" / "metrics.json").read_text())
    assert found[0.0]["model"] == "2-SeqRF-Distill"
    assert found[0.0]["settings"]["weights"] != found[0.5]["settings"]["weights"]
    assert all(0 < metrics["rms_to_teacher"] < 2 for metrics in found.values())


def test_an_ema_that_a_checkpoint_does_not_have_is_refused(workdir):
    config = reflow_config(model={"ema_rates": (0.25,)}, eval={"ema_rate": 0.25, "begin_step": 6})
    with pytest.raises(InputError, match=r"no EMA of rate 0.25 .* its others are: none"):
        run_lib.evaluate(config, workdir, "no")


def test_a_finished_run_is_left_alone(workdir):
    watched = [workdir / "1_rf" / "checkpoints" / "6", workdir / "samples" / "metrics.json"]
    before = [path.stat().st_mtime_ns for path in watched[:1]], watched[1].read_text()
    run_lib.train(tiny_config(), workdir)
    run_lib.train(reflow_config("gen_reflow"), workdir)
    assert ([path.stat().st_mtime_ns for path in watched[:1]], watched[1].read_text()) == before
    assert json.loads(before[1])[0]["pairs"] == 64


def test_a_checkpoint_whose_picture_a_kill_prevented_is_drawn_later(workdir):
    picture, losses_drawn = workdir / "1_rf" / "samples" / "step_6.png", workdir / "1_rf" / "loss.png"
    drawn = picture.read_bytes()
    picture.unlink()
    losses_drawn.unlink()
    run_lib.train(tiny_config(training=PICTURES), workdir)
    assert picture.read_bytes() == drawn
    assert losses_drawn.exists()
    losses_drawn.rename(workdir / "1_rf" / ".loss.png.0f0f0f0f.tmp")  # killed just before it got its name
    run_lib.train(tiny_config(training=PICTURES), workdir)
    assert losses_drawn.exists()
    assert not list((workdir / "1_rf").glob(".*"))


def test_given_weights_are_kept_counted_on_and_saved_on_the_grid_of_steps(workdir, tmp_path):
    start = {"import_flax": str(workdir / "1_rf" / "checkpoints" / "4")}
    run_lib.train(tiny_config(training=start | {"n_iters": 5}), tmp_path / "start")
    run_lib.train(tiny_config(training=start | {"n_iters": 6}), tmp_path / "start")
    assert runs.steps_in(tmp_path / "start" / "1_rf") == [4, 5, 6]
    assert checkpoint_at(tmp_path / "start").metadata["source"] == start["import_flax"]  # also of a resumed run
    start = {"import_flax": str(tmp_path / "start" / "1_rf" / "checkpoints" / "5"), "n_iters": 9}
    run_lib.train(tiny_config(training=start | {"n_jitted_steps": 2}), tmp_path / "run")
    # From update 5 in calls of two: one alone, then whole calls that end where a checkpoint is due.
    assert runs.steps_in(tmp_path / "run" / "1_rf") == [5, 8, 9]
    run_lib.train(tiny_config(training=start), tmp_path / "one by one")
    together, _ = state(tmp_path / "run", "1_rf", 9)
    alone, _ = state(tmp_path / "one by one", "1_rf", 9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), together.params, alone.params)


def test_a_run_goes_on_from_the_same_weights_in_another_place_but_from_no_others(workdir, tmp_path):
    def train(start, n_iters):
        run_lib.train(tiny_config(training={"import_flax": str(start), "n_iters": n_iters}), tmp_path / "run")

    first = workdir / "1_rf" / "checkpoints" / "4"
    shutil.copytree(first, tmp_path / "moved")
    train(first, 5)
    train(tmp_path / "moved", 6)
    assert runs.steps_in(tmp_path / "run" / "1_rf") == [4, 5, 6]
    with pytest.raises(InputError, match=r"other settings: training.import_flax was '.*moved' and is '.*/6'\."):
        train(workdir / "1_rf" / "checkpoints" / "6", 7)


def test_given_weights_that_need_no_update_are_the_stage(workdir, tmp_path):
    run_lib.train(tiny_config(training={"import_flax": str(workdir / "1_rf")}), tmp_path)
    assert runs.steps_in(tmp_path / "1_rf") == [6]
    kept, info = state(tmp_path, "1_rf", 6)
    jax.tree.map(np.testing.assert_array_equal, kept.params, state(workdir, "1_rf", 6)[0].params)
    assert info["source"] == str(workdir / "1_rf" / "checkpoints" / "6")


def test_snapshots_are_measured(workdir):
    lines = {line["step"]: line for line in json.loads((workdir / "2_distill" / "metrics.json").read_text())}
    assert [step for step, line in lines.items() if "fid_digits_classifier" in line] == [0, 4, 6]
    assert {"loss", "nfe", "fid_digits_classifier", "straightness", "sequential_straightness"} <= lines[4].keys()


def test_adaptive_boundaries_are_kept_in_the_manifest_and_used_by_training(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("segments.FINE_STEPS", 100)
    monkeypatch.setattr("sampler.FINE_NOISES", 16)
    source = {"import_flax": str(workdir / "1_rf"), "adaptive_interval": True, "n_reflow_data": 32}
    run_lib.train(reflow_config("gen_reflow", training=source), tmp_path)
    manifest = read_manifest(tmp_path / inputs.PAIRS)
    assert manifest["adaptive"]
    assert manifest["cost_adaptive"] <= manifest["cost_uniform"]
    assert (tmp_path / "samples" / "division.png").stat().st_size > 1000
    run_lib.train(reflow_config(training=source | {"n_iters": 2}), tmp_path)
    trained = tmp_path / "2_rf" / "checkpoints" / "2"
    assert checkpoint_at(trained).metadata["boundaries"] == pytest.approx(manifest["boundaries"])
    # Measured from another workdir, which has no pairs, it is sampled on its own segments; so is its file's copy.
    exported = tmp_path / "ada.safetensors"
    weights, info = restore(trained)
    export_file(exported, weights, reflow_config(), boundaries=info["boundaries"])
    for path in (trained, exported):
        config = reflow_config(training={"import_flax": str(path)})
        given = inputs.given_checkpoint(config)
        boundaries = inputs.sampled_boundaries(given, 2, epath.Path(tmp_path) / "elsewhere")
        np.testing.assert_allclose(boundaries, manifest["boundaries"], atol=1e-6)
    # Uniform pairs are nothing that it learned from.
    (tmp_path / "other" / "samples").mkdir(parents=True)
    (tmp_path / "other" / "samples" / "reflow_batch").symlink_to(workdir / "samples" / "reflow_batch")
    with pytest.raises(InputError, match="boundaries"):
        run_lib.train(reflow_config("train_distill", training={"import_flax": str(trained)}), tmp_path / "other")


def test_pairs_of_another_teacher_or_k_are_refused(workdir, tmp_path):
    other = str(workdir / "1_rf" / "checkpoints" / "0")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "reflow_batch").symlink_to(workdir / "samples" / "reflow_batch")
    with pytest.raises(InputError, match="teacher"):
        run_lib.train(reflow_config(training={"import_flax": other}), tmp_path)
    with pytest.raises(InputError, match="k = 2"):
        run_lib.train(reflow_config(training={"reflow_t": 4}), tmp_path)


def test_neither_a_resumed_run_nor_a_distillation_takes_the_pairs_of_another_teacher(workdir, tmp_path):
    for stage in ("1_rf", "2_rf"):
        shutil.copytree(workdir / stage, tmp_path / stage)
    run_lib.train(reflow_config("gen_reflow", training={"import_flax": str(workdir / "1_rf/checkpoints/0")}), tmp_path)
    with pytest.raises(InputError, match="teacher"):
        run_lib.train(reflow_config("train_reflow"), tmp_path)
    with pytest.raises(InputError, match="teacher"):
        run_lib.train(reflow_config("train_distill"), tmp_path)


def test_a_run_on_part_of_a_set_does_not_go_on_on_more_of_it(workdir, tmp_path):
    for part in ("1_rf", "samples"):
        shutil.copytree(workdir / part, tmp_path / part)
    (tmp_path / inputs.PAIRS / "reflow_batch_2.npz").rename(tmp_path / "later.npz")
    run_lib.train(reflow_config(training={"reflow_partial": True, "n_iters": 2}), tmp_path)
    (tmp_path / "later.npz").rename(tmp_path / inputs.PAIRS / "reflow_batch_2.npz")
    with pytest.raises(InputError, match=r"2_rf.* was trained with pairs = 32, this run has 64"):
        run_lib.train(reflow_config(training={"reflow_partial": True}), tmp_path)


def test_an_evaluation_takes_k_from_the_checkpoint_and_refuses_another(workdir):
    config = reflow_config(training={"reflow_t": 1}, eval={"begin_step": 6})
    config.sampling.method = "pc"
    run_lib.evaluate(config, workdir, "k from the checkpoint")
    metrics = json.loads((workdir / "k from the checkpoint" / "step_6" / "metrics.json").read_text())
    assert metrics["model"] == "2-SeqRF"
    assert metrics["settings"]["boundaries"] == [1.0, 0.5, 0.0]
    with pytest.raises(InputError, match="k = 2 segments"):
        run_lib.evaluate(reflow_config(training={"reflow_t": 4}), workdir, "no")
    config.model.num_scales = 1
    with pytest.raises(InputError, match="num_scales=1 steps cannot cover"):
        run_lib.evaluate(config, workdir, "no")


def test_every_stage_and_evaluation_start_from_a_pytorch_checkpoint(workdir, tmp_path):
    config = tiny_config(training={"reflow_t": 1})
    saved = torch_twin.checkpoint(torch_twin.randomized(torch_twin.Twin(config)), step=70, updates=3)
    torch.save(saved, tmp_path / "one.pth")
    start = {"import_torch": str(tmp_path / "one.pth"), "import_flax": str(workdir / "1_rf")}  # the first is taken
    imported = models.import_torch(tmp_path / "one.pth", config)

    run_lib.train(tiny_config(training=start | {"n_iters": 71}), tmp_path)
    assert runs.steps_in(tmp_path / "1_rf") == [70, 71]
    run_lib.train(reflow_config("gen_reflow", training=start), tmp_path)
    teacher = fingerprint(models.import_torch(tmp_path / "one.pth", reflow_config()).ema_params)
    assert read_manifest(tmp_path / inputs.PAIRS)["teacher"] == teacher
    run_lib.train(reflow_config("train_reflow", training=start | {"n_iters": 1}), tmp_path)
    student, info = state(tmp_path, "2_rf", 0)
    assert (student.step, student.count, info["source"]) == (0, 3, str(tmp_path / "one.pth"))
    for own, given in ((student.params, imported.params), (student.ema_params, imported.ema_params)):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.broadcast_to(b, a.shape)), own, given)
    run_lib.evaluate(tiny_config(training=start, sampling={"method": "pc"}), tmp_path, "imported")
    metrics = json.loads((tmp_path / "imported" / "step_70" / "metrics.json").read_text())
    assert metrics["settings"]["weights"] == fingerprint(imported.ema_params)


def test_values_that_are_not_finite_stop_the_run_before_a_checkpoint(workdir, tmp_path):
    # Noticed when it is to be saved, though nothing is logged until then.
    config = tiny_config(training={"log_freq": 100, "import_flax": str(tmp_path / "start")})
    weights, metadata = state(workdir, "1_rf", 4)
    weights = dataclasses.replace(weights, mu=jax.tree.map(lambda a: np.full_like(a, 1e38), weights.mu))
    start = runs.RunCheckpoints(tmp_path / "start" / "1_rf")
    start.save(train_step.initial_state(weights, optimizer(config, stage_values(config)), step=4), metadata, keep=True)
    start.close()
    with pytest.raises(InputError, match=r"a parameter is not finite at update 5 .*nan_policy=skip"):
        run_lib.train(config, tmp_path / "run")
    assert runs.RunCheckpoints(tmp_path / "run" / "1_rf").latest_step() == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (reflow_config("gen_reflow", training={"reflow_t": 101, "adaptive_interval": True}), "at most 100"),
        (tiny_config(model={"num_scales": 501}, sampling={"method": "pc", "time_grid": "adaptive"}), "500 fine ones"),
        (tiny_config(model={"ch_mult": (1, 2, 2, 2, 2)}), "image_size"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(config, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run_lib.train(config, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("job", "config", "message"),
    [
        (run_lib.train, reflow_config("train_reflow"), "there are no pairs in"),
        (run_lib.train, reflow_config("gen_reflow"), "no weights to start from"),
        (lambda *given: run_lib.evaluate(*given, "eval"), tiny_config(), "no checkpoint to evaluate"),
        (lambda *given: run_lib.evaluate(*given, "eval"), reflow_config(eval={"reflow_mode": "eval_distill"}), "2_dis"),
        (run_lib.train, tiny_config(training={"import_flax": "/no/such"}), "no checkpoint at /no/such"),
        (run_lib.train, tiny_config(data={"dataset": "CIFAR10", "data_dir": "/no/data"}), "/no/data"),
    ],
)
def test_what_is_missing_is_named(job, config, message, tmp_path):
    with pytest.raises(InputError, match=message):
        job(config, tmp_path)


def test_photographs_without_inception_are_refused_before_any_work(tmp_path):
    config = cifar10_rf_continuous.get_config()
    config.model.update(nf=4, ch_mult=(1,), attn_resolutions=(), num_res_blocks=1)
    params = models.init_params(models.create_model(config), jax.random.key(0), (32, 32, 3))
    weights = models.Weights(params=params, ema_params=params, mu=params, nu=params, count=0, step=0)
    export_file(tmp_path / "tiny.safetensors", weights, config)
    config.training.import_flax = str(tmp_path / "tiny.safetensors")
    config.eval.inception_path = str(tmp_path / "inception")
    with pytest.raises(InputError, match=str(tmp_path / "inception")):
        run_lib.evaluate(config, tmp_path / "run", "eval")
