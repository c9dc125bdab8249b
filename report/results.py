"""What a workdir's evaluations measured: their metrics.json, as rows of a table, and what the quickstart claims."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import utils
from tracking.tracker import MOST_HISTORY

COLUMNS = {
    "NFE": ("nfe", "{:.0f}"),
    "FID": (None, "{:.3g}"),
    "straightness": ("straightness", "{:.4g}"),
    "sequential": ("sequential_straightness", "{:.4g}"),
    "truncation": ("truncation_error", "{:.3g}"),
    "s / 1000": ("seconds_per_1000", "{:.3g}"),
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A measured checkpoint: its folder `<eval_folder>/step_<step>` and its metrics.json."""

    folder: pathlib.Path
    metrics: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the evaluation's folder in the workdir."""
        return self.folder.parent.name

    @property
    def order(self) -> tuple:
        """By model, then adaptive first, then by NFE."""
        return self.metrics["model"], self.metrics["sampler"] != "ODE", self.metrics["nfe"], self.name

    def value(self, name: str) -> float | None:
        """A number of metrics.json; None where it was not measured."""
        value = self.metrics.get(name)
        return value if _is_number(value) else None


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a workdir's evaluations measured.

    Attributes:
      steps: of every evaluation folder the measured checkpoints by step; the folders in the order of their last ones.
    """

    steps: list[list[Evaluation]]

    @functools.cached_property
    def last(self) -> list[Evaluation]:
        """The last checkpoint of every folder."""
        return [each[-1] for each in self.steps]

    @functools.cached_property
    def fid(self) -> str:
        """'fid' for Inception, else the name that says which network's features were compared."""
        return next(name for name in self.last[0].metrics if name.startswith("fid"))

    @functools.cached_property
    def rows(self) -> list[list[str]]:
        """The table's cells: its head, then a row for each model and sampler."""
        rows = [["model", "sampler", *(name if name != "FID" else self.fid for name in COLUMNS)]]
        for one in self.last:
            values = [(one.value(key or self.fid), form) for key, form in COLUMNS.values()]
            cells = ["-" if value is None else form.format(value) for value, form in values]
            rows.append([one.metrics["model"], one.metrics["sampler"], *cells])
        return rows

    @functools.cached_property
    def claims(self) -> list["Claim"]:
        """The quickstart's claims: a lower FID in k calls, none lost by distillation, a straighter flow.

        Raises:
          KeyError: one of the models or samplers was not measured.
        """
        by_name = {(one.metrics["model"], one.metrics["sampler"]): one for one in self.last}
        student = next((model for model, _ in by_name if model.endswith("-SeqRF")), "k-SeqRF")
        euler, fid = f"Euler {student.partition('-')[0]}", self.fid

        def ratio(one: tuple[str, str], other: tuple[str, str], name: str) -> float:
            value, beside = by_name[one].value(name), by_name[other].value(name)
            return float("nan") if value is None or not beside else value / beside

        first, distilled, straight = ("1-RF", euler), (f"{student}-Distill", euler), "sequential_straightness"
        return [
            Claim(f"{fid} of {student} / 1-RF, {euler}", ratio((student, euler), first, fid), 1 / 5),
            Claim(f"{fid} of {student}-Distill / {student}, {euler}", ratio(distilled, (student, euler), fid), 1),
            Claim(
                f"sequential straightness of {student} / 1-RF, ODE",
                ratio((student, "ODE"), ("1-RF", "ODE"), straight),
                1 / 4,
            ),
        ]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A ratio of two metrics, and the largest that it may be."""

    text: str
    ratio: float
    most: float

    @property
    def holds(self) -> bool:
        """Whether the ratio is within its bound; one that could not be measured is not."""
        return self.ratio <= self.most

    def __str__(self):
        return f"{self.text}: {self.ratio:.3f} (asked: <= {self.most:g}){'' if self.holds else '   MISSED'}"


def read(workdir: pathlib.Path) -> Results:
    """What is in `<workdir>/<eval_folder>/step_<step>/metrics.json`.

    Files that are not of an evaluation are left out, with a line on stderr.
    """
    found: dict[pathlib.Path, list[tuple[int, Evaluation]]] = {}
    for path in sorted(workdir.glob("*/step_*/metrics.json")):
        step = path.parent.name.removeprefix("step_")
        metrics = read_or(path, dict[str, Any], {})
        if not step.isdecimal() or not _is_evaluation(metrics):
            print(f"left out: {path} is not the metrics.json of an evaluation", file=sys.stderr)
            continue
        found.setdefault(path.parent.parent, []).append((int(step), Evaluation(path.parent, metrics)))
    steps = [[one for _, one in sorted(each, key=lambda pair: pair[0])] for each in found.values()]
    return Results(sorted(steps, key=lambda each: each[-1].order))


def read_or(path: pathlib.Path, kind: Any, default: Any = None) -> Any:
    """The content of a JSON file; `default` where it is missing or damaged or cannot be read: it is left out."""
    with contextlib.suppress(OSError):
        return utils.valid_json(path, kind, default, most=MOST_HISTORY)
    return default


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_evaluation(metrics: dict[str, Any]) -> bool:
    if not all(isinstance(metrics.get(name), str) for name in ("model", "sampler")):
        return False
    names = [key for key, _ in COLUMNS.values() if key]
    numbers = all(name in metrics and (metrics[name] is None or _is_number(metrics[name])) for name in names)
    return numbers and _is_number(metrics["nfe"]) and any(name.startswith("fid") for name in metrics)


def markdown_table(rows: Sequence[Sequence[str]], *, aligned: bool = False) -> str:
    """Cells, the head in the first row, as a Markdown table; `aligned`: as wide as the widest of its column."""
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*rows, strict=True)]
    head, *body = ("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
    return "\n".join([head, "|" + "|".join("-" * max(width + 2, 3) for width in widths) + "|", *body])
