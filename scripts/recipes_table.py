"""Prints what scripts/compare_recipes.sh measured as a Markdown table: python scripts/recipes_table.py WORKDIR

A cell is the RMS distance to the teacher's samples of the same noises / FID, the mean over seeds, with the standard
deviation where there are several.
"""

import json
import pathlib
import statistics
import sys

# Row -> folder below <workdir>/seed_<seed>/, for n network calls.
ROWS = {
    "reflow (k = 1)": "k1",
    "reflow, n-step distillation": "k1_m{n}_distill",
    "the same, 1.85 times as many updates": "k1_m{n}_distill_long",
    "the same on policy, equal cost": "k1_m{n}_on_policy",
    "k-SeqRF (k = n)": "k{n}",
    "k-SeqRF-Distill": "k{n}_m1_distill",
    "the same, as many updates": "k{n}_m1_distill_long",
    "k-SeqRF distilled on policy, equal cost": "k{n}_m1_on_policy",
}
CALLS = (1, 2, 4)


def read_runs(workdir: pathlib.Path, folder: str, calls: int) -> list[dict]:
    """The metrics of `folder` at `calls` Euler steps, one for each seed that has them."""
    paths = sorted(workdir.glob(f"seed_*/{folder}/euler_{calls}/step_*/metrics.json"))
    return [json.loads(path.read_text()) for path in paths]


def cell(runs: list[dict]) -> str:
    """'distance / FID' over the runs, empty where there are none."""
    if not runs:
        return ""
    fid = next(name for name in runs[0] if name.startswith("fid"))
    return " / ".join(
        _mean_and_spread([run[name] for run in runs], form) for name, form in (("rms_to_teacher", ".4f"), (fid, ".3f"))
    )


def _mean_and_spread(values, form):
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):{form}}"


def table(workdir: pathlib.Path) -> str:
    """The Markdown table of a workdir."""
    lines = ["| recipe |" + "".join(f" NFE {calls} |" for calls in CALLS), "|---" * (len(CALLS) + 1) + "|"]
    for name, folder in ROWS.items():
        # At one call k = n is plain reflow, which has a row already.
        columns = [n for n in CALLS if n > 1 or folder.startswith("k1")]
        cells = {n: cell(read_runs(workdir, folder.format(n=n), n)) for n in columns}
        lines.append(f"| {name} |" + "".join(f" {cells.get(n, '')} |" for n in CALLS))
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(table(pathlib.Path(sys.argv[1])))
