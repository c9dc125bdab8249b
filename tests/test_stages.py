"""Which checkpoint a job starts from or evaluates, and whether it fits the pairs."""

import numpy as np
import pytest
from etils import epath

import models
from checkpointing import runs
from checkpointing.checkpoint import CheckpointRef
from configs.default import get_default_config
from jobs import inputs, stages
from jobs.inputs import TrainingData
from models.weights import fingerprint
from utils import InputError

EVEN = [1.0, 0.5, 0.0]


def config_with(**settings):
    config = get_default_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in settings.items()})
    return config


def reference(k=2, stage="2_rf", boundaries=None, teacher=None):
    metadata = {"stage": stage, "k": k, "boundaries": boundaries or EVEN[: k + 1], "teacher": teacher}
    return CheckpointRef(epath.Path("runs/a"), metadata)


def weights_of(value):
    params = {"a": np.full(3, value, np.float32)}
    return models.Weights(params=params, ema_params=params, mu=params, nu=params, count=0, step=0)


def pairs(teacher, boundaries=EVEN):
    return TrainingData(
        np.array(boundaries, np.float32), lambda start: iter(()), teacher, epath.Path("samples/reflow_batch")
    )


def test_a_given_pytorch_checkpoint_comes_before_a_given_checkpoint_before_the_stage_before(tmp_path):
    torch, other = str(tmp_path / "one.pth"), str(tmp_path / "two")
    config = config_with(training__import_torch=torch, training__import_flax=other)
    assert inputs.starting_checkpoint(config, epath.Path(tmp_path)).name == torch
    with pytest.raises(InputError, match=f"no checkpoint at {other}"):
        inputs.starting_checkpoint(config_with(training__import_flax=other), epath.Path(tmp_path))
    with pytest.raises(InputError, match=f"no weights to start from: .*{tmp_path}/checkpoints has no checkpoint"):
        inputs.starting_checkpoint(config_with(), epath.Path(tmp_path))
    assert inputs.starting_checkpoint(config_with(), None) is None


def test_a_stage_that_is_not_finished_is_no_parent_but_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "read_metadata", lambda path: {"path": str(path)})
    stage = epath.Path(tmp_path) / "1_rf"
    (stage / "checkpoints" / "300" / "state").mkdir(parents=True)
    config = config_with()
    last = str(stage / "checkpoints" / "300")
    assert inputs.starting_checkpoint(config, stage).name == last  # of a version that kept no settings
    config.training.n_iters = 300
    runs.write_settings(stage, config.to_dict())
    assert inputs.starting_checkpoint(config, stage).name == last
    config.training.n_iters = 301  # as when a finished run is begun again to make it longer
    runs.write_settings(stage, config.to_dict())
    with pytest.raises(InputError, match=r"has 300 of 301 updates; resume it, or .*import_flax=\S+checkpoints/300"):
        inputs.starting_checkpoint(config, stage)
    config.training.import_flax = last
    assert inputs.starting_checkpoint(config, stage).name == last


@pytest.mark.parametrize(("interval", "expected"), [(1, [10, 20, 30]), (20, [10, 30])])
def test_the_checkpoints_between_begin_and_end_step_are_evaluated(tmp_path, monkeypatch, interval, expected):
    for step in (0, 10, 20, 30, 40):
        (tmp_path / "checkpoints" / str(step) / "state").mkdir(parents=True)
    monkeypatch.setattr(runs, "read_metadata", lambda path: {"path": str(path)})
    config = config_with(eval__begin_step=10, eval__end_step=30, eval__interval_step=interval)
    found = inputs.checkpoints_to_evaluate(config, epath.Path(tmp_path), ema_rate=0.5)
    assert list(found) == expected
    config.eval.begin_step = 41
    config.eval.end_step = 50
    with pytest.raises(InputError, match=r"no checkpoint to evaluate .* it has \[0, 10, 20, 30, 40\]"):
        inputs.checkpoints_to_evaluate(config, epath.Path(tmp_path), ema_rate=0.5)


def test_k_is_the_checkpoints_unless_its_head_is_to_be_copied():
    assert stages.evaluated_segments(config_with(training__reflow_t=1), reference()) == 2
    assert stages.evaluated_segments(config_with(training__reflow_t=2), reference()) == 2
    with pytest.raises(InputError, match=r"has k = 2 segments, this run has training.reflow_t=4; use 2"):
        stages.evaluated_segments(config_with(training__reflow_t=4), reference())
    one_head = reference(k=1, stage="1_rf", boundaries=[1.0, 0.0])
    assert stages.evaluated_segments(config_with(training__reflow_t=4), one_head) == 4


def test_weights_must_have_made_the_pairs_or_learned_from_them():
    own = fingerprint(weights_of(1).ema_params)
    one_head = reference(k=1, stage="1_rf", boundaries=[1.0, 0.0])
    pairs(own).check_fit(one_head, weights_of(1), distills=False)
    pairs("0f").check_fit(reference(teacher="0f"), weights_of(1), distills=False)
    pairs("0f").check_fit(reference(), weights_of(1), distills=True)  # a model whose teacher is unknown
    with pytest.raises(InputError, match=f"made by teacher 0f, this run starts from {own}"):
        pairs("0f").check_fit(reference(), weights_of(1), distills=False)
    with pytest.raises(InputError, match="made by teacher 0f, this run starts from 1e"):
        pairs("0f").check_fit(reference(teacher="1e"), weights_of(1), distills=True)
    with pytest.raises(InputError, match="start from the model that was trained on them"):
        pairs("0f", [1.0, 0.7, 0.0]).check_fit(reference(teacher="0f"), weights_of(1), distills=True)
