"""Prints what was measured in a workdir as a table and draws quality against NFE: python scripts/report.py WORKDIR

Reads every <eval_folder>/step_<step>/metrics.json; of each folder the last step counts.
"""

import argparse
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
        cells = [form.format(entry[key or fid]) for key, form in COLUMNS.values()]
        rows.append([entry["model"], entry["sampler"], *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main():
    """The script: prints the table, writes it to report.md and draws the figure beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    workdir = parser.parse_args().workdir
    metrics = last_metrics(workdir)
    if not metrics:
        sys.exit(f"error: no <eval_folder>/step_<step>/metrics.json in {workdir}; run main.py --mode=eval first")
    import pictures

    fid = fid_name(metrics)
    print(table(metrics, fid))
    curves = {}
    for entry in metrics:
        name = entry["model"] + (" ODE" if entry["sampler"] == "ODE" else "")
        nfe, values = curves.setdefault(name, ([], []))
        nfe.append(entry["nfe"])
        values.append(entry[fid])
    pictures.draw_quality(workdir / "fid_against_nfe.png", curves, fid)
    (workdir / "report.md").write_text(table(metrics, fid) + "\n")
    print(f"\nfigure: {workdir / 'fid_against_nfe.png'}")


if __name__ == "__main__":
    main()
