"""A short version of benchmarks/chaos.py: a stage that is killed, then stopped, equals one that was left alone."""

import signal

from benchmarks import chaos

SETTINGS = chaos.TINY | {"training": chaos.TINY["training"] | {"n_iters": 300, "snapshot_sampling": False}}


def test_a_stage_that_is_killed_and_stopped_comes_to_the_same_bits(tmp_path, capsys):
    cache = tmp_path / "cache"
    assert chaos.run(chaos.command(tmp_path / "alone", "1_rf", SETTINGS), cache)[0] == 0
    stops = [chaos.Stop(5, 0, signal.SIGKILL), chaos.Stop(5, 0, signal.SIGTERM)]
    assert chaos.disturb(chaos.command(tmp_path / "disturbed", "1_rf", SETTINGS), cache, stops) == []
    printed = capsys.readouterr().out
    assert "SIGKILL: exit -9" in printed
    assert "SIGTERM: exit 143 after update" in printed
    assert "left alone: exit 0" in printed
    alone, disturbed = chaos.contents(tmp_path / "alone"), chaos.contents(tmp_path / "disturbed")
    assert alone == disturbed
    assert len(alone["1_rf/metrics.json"]) == 15
    assert {f"1_rf/checkpoints/{step}" for step in (0, 150, 300)} <= alone.keys()


def test_differences_are_seen():
    assert chaos.compared({"loss": 1.0, "images_per_second": 3.0, "settings": {"source": "a", "k": 2}}) == {
        "loss": 1.0,
        "settings": {"k": 2},
    }
