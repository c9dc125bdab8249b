"""Prints the evaluations in a workdir as a table and draws the FID against NFE: python scripts/report.py WORKDIR

Reads the last step of each <eval_folder>/step_<step>/metrics.json. With --check it also prints the ratios of k-SeqRF's
figures to 1-RF's at k network calls; the exit status is 1 if one is larger than the quickstart's bound.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

COLUMNS = {
    "NFE": ("nfe", "{:.0f}"),
    "FID": (None, "{:.3g}"),
    "straightness": ("straightness", "{:.4g}"),
    "sequential": ("sequential_straightness", "{:.4g}"),
    "truncation": ("truncation_error", "{:.3g}"),
    "s / 1000": ("seconds_per_1000", "{:.3g}"),
}


def last_metrics(workdir: pathlib.Path) -> list[dict]:
    """The metrics of the last measured step in each evaluation folder, by model, then adaptive first, then by NFE."""
    folders = {path.parent.parent for path in workdir.glob("*/step_*/metrics.json")}
    found = []
    for folder in folders:
        last = max(folder.glob("step_*/metrics.json"), key=lambda path: int(path.parent.name.removeprefix("step_")))
        found.append(json.loads(last.read_text()))
    return sorted(found, key=lambda m: (m["model"], m["sampler"] != "ODE", m["nfe"]))


def fid_name(metrics: list[dict]) -> str:
    """'fid' for Inception, else the name that says which network's features were compared."""
    return next(name for name in metrics[0] if name.startswith("fid"))


def table(metrics: list[dict], fid: str) -> str:
    """A Markdown table, a row for each model and sampler."""
    rows = [["model", "sampler", *(name if name != "FID" else fid for name in COLUMNS)]]
    for entry in metrics:
        values = [(entry[key or fid], form) for key, form in COLUMNS.values()]
        cells = ["-" if value is None else form.format(value) for value, form in values]
        rows.append([entry["model"], entry["sampler"], *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


@dataclasses.dataclass(frozen=True)
class Claim:
    """A ratio of two measured figures, and the largest that it may be."""

    text: str
    ratio: float
    most: float

    @property
    def holds(self) -> bool:
        """Whether the ratio is within its bound; one that could not be measured is not."""
        return self.ratio <= self.most

    def __str__(self):
        return f"{self.text}: {self.ratio:.3f} (asked: <= {self.most:g}){'' if self.holds else '   MISSED'}"


def claims(metrics: list[dict], fid: str) -> list[Claim]:
    """The quickstart's claims: a lower FID in k calls, none lost by distillation, a straighter flow.

    Raises:
      KeyError: one of the models or samplers was not measured.
    """
    found = {(entry["model"], entry["sampler"]): entry for entry in metrics}
    student = next((model for model, _ in found if model.endswith("-SeqRF")), "k-SeqRF")
    euler = f"Euler {student.partition('-')[0]}"

    def ratio(one, other, figure):
        one, other = found[one][figure], found[other][figure]
        return float("nan") if one is None or other is None else one / other

    first, distilled = ("1-RF", euler), (f"{student}-Distill", euler)
    return [
        Claim(f"{fid} of {student} / 1-RF, {euler}", ratio((student, euler), first, fid), 1 / 5),
        Claim(f"{fid} of {student}-Distill / {student}, {euler}", ratio(distilled, (student, euler), fid), 1),
        Claim(
            f"sequential straightness of {student} / 1-RF, ODE",
            ratio((student, "ODE"), ("1-RF", "ODE"), "sequential_straightness"),
            1 / 4,
        ),
    ]


def main() -> int:
    """The script: prints the table, writes it to report.md and draws the figure beside it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a ratio is larger than its bound")
    options = parser.parse_args()
    metrics = last_metrics(options.workdir)
    if not metrics:
        sys.exit(
            f"error: no <eval_folder>/step_<step>/metrics.json in {options.workdir}; run main.py --mode=eval first"
        )
    import figures

    fid = fid_name(metrics)
    print(table(metrics, fid))
    curves = {}
    for entry in metrics:
        name = entry["model"] + (" ODE" if entry["sampler"] == "ODE" else "")
        nfe, values = curves.setdefault(name, ([], []))
        nfe.append(entry["nfe"])
        values.append(entry[fid])
    figures.draw_quality(options.workdir / "fid_against_nfe.png", curves, fid)
    (options.workdir / "report.md").write_text(table(metrics, fid) + "\n")
    print(f"\nfigure: {options.workdir / 'fid_against_nfe.png'}")
    if not options.check:
        return 0
    shown = claims(metrics, fid)
    print("", *shown, sep="\n")
    return int(not all(claim.holds for claim in shown))


if __name__ == "__main__":
    sys.exit(main())
