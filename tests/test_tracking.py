"""Numbers reach metrics.json and wandb, from the first host only."""

import json

import numpy as np
import pytest
from pair_maker import mount_bucket
from PIL import Image

from tracking.tracker import Tracker, logger


def tracker(folder, **options):
    return Tracker(folder / "stage", workdir=folder, name="test", config={"seed": 1}, **options)


def test_numbers_reach_metrics_json_and_an_offline_wandb_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc, so no key
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    run = tracker(tmp_path)
    assert run._wandb.project == "ours"
    assert (run._wandb.group, run._wandb.name) == (tmp_path.name, f"{tmp_path.name} test")
    run.log(10, {"loss": np.float32(0.5)})
    run.log(20, {"loss": float("nan")})
    run.close()
    lines = json.loads((tmp_path / "stage" / "metrics.json").read_text())
    assert lines == [{"step": 10, "loss": 0.5}, {"step": 20, "loss": None}]
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 0


def test_numbers_reach_tensorboard_where_asked(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tensorflow = pytest.importorskip("tensorflow")
    with caplog.at_level("INFO", logger="seqrf"):
        run = tracker(tmp_path, tensorboard=True, prefix="a/")
        run.log(10, {"loss": np.float32(0.5)}, shown="10 of 20 pairs")
        run.close()
    assert caplog.messages[-1] == "a/10 of 20 pairs: loss 0.5"
    (events,) = (tmp_path / "stage" / "tensorboard").glob("events.*")
    found = [
        (event.step, value.tag, value.simple_value)
        for event in tensorflow.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
    ]
    assert found == [(10, "a/loss", 0.5)]
    assert not list(tracker(tmp_path / "without")._path.parent.glob("tensorboard"))


def test_a_resumed_run_drops_the_lines_after_its_step(tmp_path):
    first = tracker(tmp_path)
    for step in (10, 20, 30):
        first.log(step, {"loss": 1.0 / step})
    first.close()
    second = tracker(tmp_path, resume_step=20)
    assert second._wandb.project == "seqrf"
    second.log(30, {"loss": 7.0})
    second.close()
    assert second._wandb.id == first._wandb.id  # one run in wandb
    lines = json.loads((tmp_path / "stage" / "metrics.json").read_text())
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] == 7.0


def test_numbers_of_one_step_are_one_line_over_all_runs(tmp_path):
    for step, values in ((1, {"a": 1, "b": 1.0}), (2, {"b": 2.0, "c": 3.0})):
        run = tracker(tmp_path)
        run.log(step, {"a": 5})
        run.log(10, values)
        run.close()
    lines = json.loads((tmp_path / "stage" / "metrics.json").read_text())
    assert lines == [{"step": 1, "a": 5}, {"step": 2, "a": 5}, {"step": 10, "a": 1, "b": 2.0, "c": 3.0}]


def test_branches_share_a_wandb_run_and_keep_files_of_their_own(tmp_path):
    first = tracker(tmp_path, prefix="ode/")
    second = first.branch(tmp_path / "other", "euler_1/")
    logged = []
    first._wandb.log, log = lambda values, step: logged.append(values) or log(values, step=step), first._wandb.log
    first.log(1, {"fid": 2.0})
    second.log(1, {"fid": 3.0})
    first.close()
    assert logged == [{"ode/fid": 2.0}, {"euler_1/fid": 3.0}]
    for folder, fid in (("stage", 2.0), ("other", 3.0)):
        assert json.loads((tmp_path / folder / "metrics.json").read_text()) == [{"step": 1, "fid": fid}]
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_a_picture_in_a_bucket_reaches_wandb(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    mount_bucket(monkeypatch, tmp_path)
    Image.new("L", (5, 4)).save(tmp_path / "drawn.png")
    run = tracker(tmp_path)
    run.picture(1, "samples", "gs://bucket/drawn.png")
    run.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png")
    with Image.open(kept) as image:
        assert image.size == (5, 4)


def test_wandb_may_be_disabled(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = tracker(tmp_path)
    run.log(1, {"loss": 1.0})
    run.record({"seed": 1})
    run.close()
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]
    assert json.loads((tmp_path / "stage" / "metrics.json").read_text()) == [{"step": 1, "loss": 1.0}]


def test_other_hosts_write_nothing(tmp_path):
    run = tracker(tmp_path, primary=False)
    run.log(1, {"loss": 1.0})
    run.close()
    assert not any(tmp_path.iterdir())


def test_a_run_goes_on_without_wandbs_process(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logger, "propagate", True)
    run = tracker(tmp_path)
    run.log(1, {"loss": 1.0})

    def lost(*_, **__):
        raise ConnectionResetError("Connection lost")

    run._wandb.finish()
    monkeypatch.setattr(run._wandb, "log", lost)
    for step in (2, 3):
        run.log(step, {"loss": 1.0 / step})
    run.record({"commit": "a"})
    run.close()
    lines = json.loads((tmp_path / "stage" / "metrics.json").read_text())
    assert [line["step"] for line in lines] == [1, 2, 3]
    said = "wandb has ended (ConnectionResetError('Connection lost'))"
    assert len({id(record) for record in caplog.records if said in record.getMessage()}) == 1  # by any handlers
