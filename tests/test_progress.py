"""Values of updates: what is logged and when, and which updates stop a run."""

import re

import jax.numpy as jnp
import pytest

from jobs import progress
from utils import InputError

NAN = float("nan")


def test_the_first_call_of_a_program_is_announced(caplog):
    program = progress.announced(lambda x: x + 1, "the step")
    with caplog.at_level("INFO", logger="seqrf"):
        assert [program(n) for n in (1, 2)] == [2, 3]
    compiling, compiled = caplog.messages
    assert compiling == "compiling the step"
    assert re.fullmatch(r"compiled the step in \d+ s", compiled)


def values_of(losses, gradient_norms=None, parameter_norms=None):
    """As the training step returns them on one device: [1, n]."""
    ones = [1.0] * len(losses)
    rows = {
        "loss": losses,
        "gradient_norm": gradient_norms or ones,
        "parameter_norm": parameter_norms or ones,
    }
    return {name: jnp.asarray([row], jnp.float32) for name, row in sorted(rows.items())}


@pytest.fixture
def logged():
    return []


def taker(logged, *, drops=False):
    return progress.UpdateMetrics(lambda step, values: logged.append((step, values)), drops=drops, remedy="REMEDY")


def test_the_last_call_is_logged_one_log_later(logged):
    values = taker(logged)
    for step in (2, 4):
        values.add(step, values_of([step, step + 1], [3.0, 5.0]))
    values.log()
    assert logged == []
    values.add(6, values_of([6, 6]))
    values.log()
    assert logged == [(4, {"loss": 4.5, "gradient_norm": 4.0})]
    values.check()
    assert logged[1:] == [(6, {"loss": 6.0, "gradient_norm": 1.0})]
    values.add(8, values_of([8, 8]))
    values.check()  # before a checkpoint that is not logged
    assert len(logged) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (values_of([1.0, NAN], [1.0, NAN], [1.0, NAN]), "the loss is not finite at update 6"),
        (values_of([1.0, 2.0], [float("inf"), NAN], [NAN, NAN]), "the gradient is not finite at update 5 .loss 1,"),
        (values_of([1.0, 2.0], None, [1.0, NAN]), "a parameter is not finite at update 6 .*REMEDY"),
    ],
)
def test_the_first_update_that_is_not_finite_and_what_it_was_are_named(values, message, logged):
    taken = taker(logged)
    taken.add(4, values_of([1.0, 1.0]))
    taken.add(6, values)
    with pytest.raises(InputError, match=message):
        taken.check()
    assert logged == []


def test_dropped_updates_are_counted_and_ten_in_a_row_stop_the_run(logged):
    taken = taker(logged, drops=True)
    taken.add(9, values_of([NAN] * 9))
    taken.add(10, values_of([1.0]))
    taken.log()
    taken.check()
    assert logged == [(10, {"loss": 1.0, "gradient_norm": 1.0, "dropped_updates": 9})]
    taken.add(15, values_of([NAN] * 5))
    taken.check()
    taken.add(19, values_of([NAN] * 4))
    taken.check()
    taken.add(20, values_of([NAN]))
    with pytest.raises(InputError, match=r"10 updates in a row were dropped.*at update 20"):
        taken.check()


def test_what_is_logged_beside_the_values_comes_with_them(logged):
    values = taker(logged)
    values.add(2, values_of([1.0, 2.0]))
    values.log(learning_rate=0.5)
    values.add(4, values_of([3.0, 3.0]))
    values.log(learning_rate=0.25)
    values.check()
    beside = [(step, line["loss"], line["learning_rate"]) for step, line in logged]
    assert beside == [(2, 1.5, 0.5), (4, 3.0, 0.25)]


def test_the_pace_leaves_out_compilation_and_snapshots(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    pace = progress.Pace(images=8)
    pass_time(100)
    pace.add(2)  # compiled
    assert pace.summary() == {}
    for _ in range(3):
        with pace.waiting():
            pass_time(1)
        pass_time(3)
        pace.add(2)
    assert pace.summary() == {"images_per_second": 8 * 6 / 12, "input_wait": 3 / 12}
    pass_time(50)
    pace.restart()  # after a snapshot
    pass_time(2)
    pace.add(1)
    assert pace.summary() == {"images_per_second": 4.0, "input_wait": 0.0}
