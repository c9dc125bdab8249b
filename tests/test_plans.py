"""Plans of jobs: what a configuration means in a workdir, found without a device and without writing anything."""

import jax
import pytest
from etils import epath
from tiny_run import reflow_config, tiny_config

import run_lib
from jobs.evaluate import evaluation_plan
from jobs.generate import generation_plan
from jobs.sample import sample_plan
from jobs.stages import STAGES, stage_in, stage_of
from jobs.train import train_plan
from sampling import SamplerOptions


@pytest.fixture
def no_device(monkeypatch):
    """Fails where JAX is asked for its devices."""
    for name in ("devices", "local_devices", "device_count", "local_device_count"):  # orbax asks for the process
        monkeypatch.setattr(jax, name, lambda *_, name=name: pytest.fail(f"jax.{name} was called"))


def files(folder):
    return sorted(path for path in folder.rglob("*") if "wandb" not in path.parts)


def planned(config, workdir, mode="train_reflow"):
    return train_plan(config, epath.Path(workdir), stage_of(config, mode), "test")


def test_plans_say_what_a_job_works_on_without_a_device_or_a_file(trained, no_device):
    before, workdir = files(trained), epath.Path(trained)
    first = planned(tiny_config(), trained)
    assert (first.stage, first.network.heads, first.values.n_iters) == (STAGES["rf"], 1, 6)
    reflow = planned(reflow_config(), trained)
    assert (reflow.network.heads, reflow.stage.folder) == (2, "2_rf")
    assert reflow.summary()["from"] == "its update 6"
    pairs = generation_plan(reflow_config("gen_reflow"), workdir, "test")
    assert pairs.teacher.path == workdir / "1_rf" / "checkpoints" / "6"
    config = reflow_config(eval={"samplers": "ode:1e-2;euler:2,4", "begin_step": 4})
    evaluation = evaluation_plan(config, workdir, "found", "test")
    assert list(evaluation.checkpoints) == [4, 6]
    assert [part.folder.name for part in evaluation.samplers] == ["found_ode_1e-2", "found_euler_2", "found_euler_4"]
    assert evaluation.samplers[2].options == SamplerOptions("pc", predictor="rf_solver", num_scales=4)
    drawn = sample_plan(reflow_config(), workdir, "drawn")
    assert drawn.checkpoint.path == workdir / "2_rf" / "checkpoints" / "6"
    assert files(trained) == before


def test_a_configuration_is_not_changed_by_its_plan(trained):
    config = reflow_config()
    config.training.reflow_t = 1  # the checkpoint's k is taken
    before = config.to_dict()
    plan = evaluation_plan(config, epath.Path(trained), "found", "test")
    assert plan.network.heads == 2
    assert plan.settings["training"]["reflow_t"] == 2
    assert config.to_dict() == before


def test_a_dry_run_prints_the_plan_and_does_nothing(trained, capsys):
    before = files(trained)
    run_lib.train(reflow_config("gen_reflow"), trained, dry_run=True)
    run_lib.train(reflow_config("train_distill"), trained, dry_run=True)
    run_lib.evaluate(reflow_config(), trained, "found", dry_run=True)
    run_lib.sample(reflow_config(), trained, "drawn", dry_run=True)
    printed = capsys.readouterr().out
    for line in ("generate 64 pairs of 2 segments", "train 2-SeqRF-Distill", "evaluate 2-SeqRF", "draw 64 samples"):
        assert f"{line}\n" in printed
    assert f"into:        {trained}/2_distill\n" in printed
    assert printed.count("devices:     2 x cpu\n") == 4
    assert files(trained) == before


@pytest.mark.parametrize("folder", ["1_rf", "2_rf", "2_distill", "2_distill_4"])
def test_a_stage_is_found_by_its_folder(folder):
    stage = stage_in(folder)
    assert stage.folder == folder
    assert (stage.distills, stage.steps) == ("distill" in folder, 4 if folder.endswith("4") else 1)
    assert stage_in(f"{folder}_x") is None
