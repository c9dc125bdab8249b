"""The rows of the study: what each cell measured, a JSON object a line in study/results.jsonl.

A metric's name says what it is. Names that main.py's evaluations use too mean what they mean in a metrics.json
(docs/method.md, section 11): fid_<network>, kid_<network>, truncation_error. Others are the study's own:

    rms_to_teacher_1e-4               RMS of sample minus the teacher's own sample of the same noise, solved at 1e-4
    sequential_straightness_ode_1e-4  of the model's solves at tolerance 1e-4, whatever the cell's sampler is

and two that rows of earlier versions alone have:

    truncation_error_1e-4             against the model's own solves at 1e-4; truncation_error is against those at 1e-6
    kid_<network>_10000               against the first 10,000 training images; kid_<network> is against all
"""

import contextlib
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.jsonl")
METRICS = ("fid_", "kid_", "rms_to_teacher", "truncation_error", "sequential_straightness")  # their names' beginnings
Row = dict[str, Any]


def read_rows(path: Path = RESULTS) -> list[Row]:
    """The rows so far; an incomplete last line, of a killed run, is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append_row(row: Row, path: Path = RESULTS) -> None:
    """Adds a row, on a line of its own even after an incomplete one."""
    path.parent.mkdir(exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")


def metrics_of(row: Row) -> dict[str, float]:
    """What was measured of a cell."""
    return {name: value for name, value in row.items() if name.startswith(METRICS)}


def metric(row: Row, beginning: str) -> float:
    """The metric whose name begins so, whichever network or tolerance it names: metric(row, 'fid').

    Raises:
      StopIteration: none does.
    """
    return row[metric_name(row, beginning)]


def metric_name(row: Row, beginning: str) -> str:
    """The name of that metric in a row. Errors as `metric`."""
    return next(name for name in row if name.startswith(beginning))
