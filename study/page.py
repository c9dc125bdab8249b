"""Writes docs/choosing_k.md from study/results.jsonl: python -m study.page [--workdir runs/study]

With --workdir, where study/run.py left its models, the same noises are drawn side by side as well.
"""

import argparse
import collections
import dataclasses
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sampler
from report.results import markdown_table
from study.cells import BENCHES, BEST, ELEMENTS, EXACT_TOL, NFES, PAIR_ELEMENTS, Bench, Cell, Recipe, all_cells
from study.models import Models
from study.rows import Row, metric, metric_name, read_rows
from utils import local_path

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURES = ROOT / "docs" / "choosing_k.md", ROOT / "docs" / "choosing_k"
ADVICE = PICTURES / "advice.md"  # written by hand, from the tables
Key = tuple[str, str, int]  # recipe, sampler, nfe
Cells = dict[Key, list[Row]]  # the latest row last


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A paired comparison over seeds: the mean of (first - second) of a metric, its standard error, and the seeds.

    It is settled if there are three seeds or more, their differences have one sign, and the mean is above two standard
    errors. Of three seeds without any true difference 18 % are settled so, by Student's t.
    """

    mean: float
    error: float
    differences: tuple[float, ...]

    @property
    def is_settled(self) -> bool:
        """Whether the first is better (mean below 0) or worse, by this rule."""
        agree = all(d < 0 for d in self.differences) or all(d > 0 for d in self.differences)
        return bool(len(self.differences) >= 3 and agree and abs(self.mean) > 2 * self.error)

    def text(self, form: str) -> str:
        """'mean ± error', or the one difference; '-' where there is none."""
        if not self.differences:
            return "-"
        return format(self.mean, form) + ("" if math.isnan(self.error) else f" ± {self.error:{form[1:]}}")

    @property
    def word(self) -> str:
        """'better', 'worse', 'not settled', or 'n of 3 seeds'."""
        if len(self.differences) < 3:
            return f"{len(self.differences)} of 3 seeds"
        return ("better" if self.mean < 0 else "worse") if self.is_settled else "not settled"


def compare(first: list[Row], second: list[Row], name: str) -> Verdict:
    """The verdict on the rows of two cells, over the seeds that both have, by a metric that is better if lower.

    FIDs are compared if their feature network is the same too: a cell may have been measured with several. The distance
    to the teacher has none.

    Args:
      name: what the metric's name begins with, see `study.rows.metric`.
    """

    def key(row: Row) -> tuple[Any, ...]:
        return (row["seed"], row.get("features")) if name == "fid" else (row["seed"],)

    values = [{key(row): metric(row, name) for row in rows} for rows in (first, second)]
    by_seed = {key[0]: value - values[1][key] for key, value in values[0].items() if key in values[1]}
    differences = tuple(by_seed.values())
    if len(differences) < 2:
        return Verdict(differences[0] if differences else math.nan, math.nan, differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Verdict(statistics.mean(differences), error, differences)


def grouped(rows: list[Row], bench: str) -> Cells:
    """The rows of a bench by cell."""
    cells: Cells = collections.defaultdict(list)
    for row in rows:
        if row["bench"] == bench:
            cells[row["recipe"], row["sampler"], row["nfe"]].append(row)
    return cells


def latest(rows: list[Row], name: str) -> list[float]:
    """A metric of a cell, or another number of its rows, one value for a seed: of its latest row."""
    return list({row["seed"]: metric(row, name) for row in rows}.values())


def spread(values: list[float], form: str) -> str:
    """'mean ± standard deviation (number of values)', or '' where there is one."""
    if len(values) < 2:
        return ""
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}} ({len(values)})"


def table(cells: Cells, nfe: int, first_seed: int) -> str:
    """Markdown: what makes an image in `nfe` calls, the best FID of the first seed first."""
    titles = ("model", "recipe", "FID", "RMS", "truncation", "updates", "FID, seeds", "RMS, seeds")
    of_seeds = [{row["seed"]: row for row in rows} for key, rows in cells.items() if key[2] == nfe]  # the latest rows
    of_seeds = [rows for rows in of_seeds if first_seed in rows]
    of_seeds.sort(key=lambda rows: metric(rows[first_seed], "fid"))
    return markdown_table([titles, *(_line(list(rows.values()), rows[first_seed]) for rows in of_seeds)])


def _line(rows: list[Row], row: Row) -> tuple[str, ...]:
    """Of a table: the metrics of one row of a cell, then of one row for each seed; a star marks the old classifier."""
    name = row["recipe"] + ("" if row["sampler"] == "euler" else f", {row['sampler']}")
    star, stars = ("" if all(each.get("features") for each in measured) else "*" for measured in ([row], rows))
    fid, rms = spread(latest(rows, "fid"), ".3f"), spread(latest(rows, "rms"), ".4f")
    return (
        row["model"],
        f"`{name}`",
        f"{metric(row, 'fid'):.3f}{star}",
        f"{metric(row, 'rms'):.4f}",
        f"{metric(row, 'truncation_error'):.4f}",
        str(row["updates"] or ""),
        fid and fid + stars,
        rms,
    )


Question = tuple[str, Recipe, Recipe, int]


def questions() -> list[Question]:
    """(question, first, second, calls): the pairs of cells that a verdict is given on."""
    return [*_segments_or_steps(), *_reflow_alone(), *_on_policy(), *_ways_to_four_calls(), *_elements()]


def _segments_or_steps() -> list[Question]:
    """k segments of one step, or plain reflow distilled to k steps, with the same of everything else."""
    asked = []
    for elements, calls in {(): (2, 4, 8), ("huber",): (4,), BEST: (2, 4, 8)}.items():
        for n in calls:
            name = f"{n} segments against {n}-step distillation of plain reflow"
            name += f", both with {_named(elements)}" if elements else ""
            asked.append((name, Recipe(n, m=1, elements=elements), Recipe(1, m=n, elements=elements), n))
    direct = {k: Recipe(k, m=4 // k, direct=True, elements=BEST) for k in (1, 4)}
    name = f"4 segments against 4 steps, both distilled from the teacher without reflow, with {_named(BEST)}"
    return [*asked, (name, direct[4], direct[1], 4)]


def _reflow_alone() -> list[Question]:
    """Distillation is not always what plain reflow does best with: against it alone, sampled by Euler's steps."""
    name = "{} segments, distilled, against plain reflow alone"
    return [(name.format(n), Recipe(n, m=1), Recipe(1), n) for n in (2, 4, 8)]


def _on_policy() -> list[Question]:
    asked = []
    for n in (2, 4, 8):
        off, on = (
            {k: Recipe(k, m=n // k, on_policy=policy) for k in (1, n)} for policy in (False, True)
        )  # k of plain reflow, of n segments
        asked.append((f"{n} segments against {n}-step distillation, both on policy", on[n], on[1], n))
        asked += [(f"on against off policy, k = {k}", on[k], off[k], n) for k in (1, n)]
    reflowed = Recipe(4, m=1, on_policy=True)
    direct = dataclasses.replace(reflowed, direct=True)
    asked.append(("4 segments on policy: from the teacher against by way of reflow", direct, reflowed, 4))
    for k in (1, 4):
        huber = {policy: Recipe(k, m=4 // k, on_policy=policy, elements=("huber",)) for policy in (True, False)}
        asked.append((f"`huber`, k = {k}, on against off policy", huber[True], huber[False], 4))
    return asked


def _ways_to_four_calls() -> list[Question]:
    plain = Recipe(4, m=1)
    asked = {
        "4 segments from the teacher, against by way of reflow": dataclasses.replace(plain, direct=True),
        "SeqRF-Ada against uniform boundaries": dataclasses.replace(plain, adaptive=True),
        "2 segments of 2 steps against 4 of 1": Recipe(2, m=2),
        "4 segments with half the budget": dataclasses.replace(plain, scale=0.5),
        "4 segments with twice the budget": dataclasses.replace(plain, scale=2.0),
    }
    return [(question, first, plain, 4) for question, first in asked.items()]


def _elements() -> list[Question]:
    """Recipe elements beside the plain recipe, and the last beside the best alone."""
    alone: list[tuple[str, ...]] = [(name,) for name in (*ELEMENTS, *PAIR_ELEMENTS)]
    tried = [(elements, ()) for elements in (*alone, BEST)] + [(BEST, ("huber",))]
    asked = []
    for elements, beside in tried:
        for k in (1, 4):
            first, second = (Recipe(k, m=4 // k, elements=each) for each in (elements, beside))
            name = f"{_named(elements)}{f' against {_named(beside)}' if beside else ''}, k = {k}"
            asked.append((name, first, second, 4))
    return asked


def _named(elements: tuple[str, ...]) -> str:
    return " and ".join(f"`{name}`" for name in elements)


def verdicts(cells: Cells) -> str:
    """Markdown: a line for each question that has rows."""
    lines = [("question", "NFE", "FID, difference", "", "RMS to the teacher, difference", "")]
    for question, first, second, n in questions():
        pair = [cells.get((recipe.name, "euler", n), []) for recipe in (first, second)]
        fid, rms = (compare(pair[0], pair[1], name) for name in ("fid", "rms"))
        if rms.differences:
            lines.append((question, str(n), fid.text("+.3f"), fid.word, rms.text("+.4f"), rms.word))
    return markdown_table(lines)


def at_each_nfe(recipe_at: Callable[[int], Recipe], sampler: str = "euler") -> list[Key]:
    """The cells of a line over N calls."""
    return [(recipe_at(n).name, sampler, n) for n in NFES]


def summary_series() -> dict[str, list[Key]]:
    """The lines of README's picture: the teacher, plain reflow distilled to N steps, and N-SeqRF-Distill."""
    return {
        "1-RF, N Euler steps": at_each_nfe(lambda n: Recipe(0)),
        "plain reflow, distilled to N steps": at_each_nfe(lambda n: Recipe(1, m=n)),
        "N-SeqRF-Distill": at_each_nfe(lambda n: Recipe(n, m=1)),
    }


def nfe_series() -> dict[str, list[Key]]:
    """More lines over N calls."""
    return summary_series() | {
        "1-RF, Heun": at_each_nfe(lambda n: Recipe(0), "heun"),
        "1-RF, adaptive times": at_each_nfe(lambda n: Recipe(0), "adaptive"),
        "plain reflow alone": at_each_nfe(lambda n: Recipe(1)),
        "4-SeqRF alone": at_each_nfe(lambda n: Recipe(4)),
        "plain reflow, distilled on policy": at_each_nfe(lambda n: Recipe(1, m=n, on_policy=True)),
        "N-SeqRF-Distill, on policy": at_each_nfe(lambda n: Recipe(n, m=1, on_policy=True)),
    }


def cost_series() -> dict[str, list[Key]]:
    """At 4 calls, with half, all and twice the budget."""
    names = {1: "plain reflow, distilled to 4 steps", 4: "4-SeqRF-Distill"}
    return {
        name: [(Recipe(k, m=4 // k, scale=scale).name, "euler", 4) for scale in (0.5, 1.0, 2.0)]
        for k, name in names.items()
    }


def draw_series(cells: Cells, series: dict[str, list[Key]], x: str, label: str, path: Path) -> None:
    """FID and distance to the teacher against a number `x` of the rows, with the standard deviation over seeds."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, name in zip(axes, ("fid", "rms"), strict=True):
        for line, keys in series.items():
            if not (found := [cells[key] for key in keys if cells.get(key)]):
                continue
            axis.set_ylabel(metric_name(found[0][0], name))  # a FID of a classifier's features says so
            values = [latest(rows, name) for rows in found]
            spreads = [statistics.stdev(each) if len(each) > 1 else 0 for each in values]
            places = [statistics.mean(latest(rows, x)) for rows in found]
            axis.errorbar(places, list(map(statistics.mean, values)), spreads, fmt="o-", ms=4, capsize=3, label=line)
        axis.set(xlabel=label, yscale="log")
        if x == "nfe":
            axis.set_xscale("log", base=2)
            axis.set_xticks(NFES, NFES)
        else:
            axis.locator_params("x", nbins=4)
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(bench: Bench, cells: Cells, workdir: Path, path: Path) -> None:
    """The same ten noises by the teacher and by measured models of the first seed, if all of them are in `workdir`."""
    from matplotlib import pyplot as plt

    models = Models(bench, workdir / bench.name)
    wanted = [Cell(Recipe(0), n, 0) for n in (1, 2, 4)]
    wanted += [Cell(recipe, n, 0) for n in (1, 2, 4) for recipe in (Recipe(1, m=n), Recipe(n, m=1))]
    measured = {row["cell"] for rows in cells.values() for row in rows}
    wanted = [cell for cell in dict.fromkeys(wanted) if cell.id in measured]
    if absent := [cell.recipe.name for cell in wanted if not models.holds(cell.recipe, cell.seed)]:
        print(f"{path} stays as it is: the models {', '.join(absent)} of seed 0 are not in {models.workdir}")
        return
    strips = {"teacher, exact": sampler.load(bench.teacher).sample(10, tol=EXACT_TOL)}
    for cell in wanted:
        model = sampler.load(models.model(cell.recipe, cell.seed).checkpoint)
        strips[f"{cell.recipe.model}, NFE {cell.nfe}"] = model.sample(10, num_scales=cell.nfe)
    figure, axes = plt.subplots(len(strips), 1, figsize=(8, 0.95 * len(strips)), layout="constrained")
    for axis, (name, images) in zip(axes, strips.items(), strict=True):
        axis.imshow(images.transpose(1, 0, 2, 3).reshape(images.shape[1], -1), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_pictures(bench: Bench, cells: Cells) -> None:
    """The pictures of a bench's tables."""
    calls, first = "N: network calls an image", bench.seeds[0]
    of_first = {key: [row for row in rows if row["seed"] == first] for key, rows in cells.items()}
    draw_series(cells, summary_series(), "nfe", calls, picture(bench, "summary"))
    draw_series(of_first, nfe_series(), "nfe", f"{calls} (one seed)", picture(bench, "nfe"))
    if bench.screening:  # else of one budget
        cost = "network calls to make the model (one seed, NFE 4)"
        draw_series(of_first, cost_series(), "network_calls", cost, picture(bench, "cost"))


def picture(bench: Bench, name: str) -> Path:
    """The file of a bench's picture."""
    return PICTURES / f"{bench.name}_{name}.png"


def section(bench: Bench, rows: list[Row]) -> str:
    """The page's part on one bench."""
    here = [row for row in rows if row["bench"] == bench.name]
    planned = all_cells(bench.seeds, screening=bench.screening)
    missing = {cell.id for cell in planned} - {row["cell"] for row in here if row.get("features")}
    cells, devices = grouped(rows, bench.name), ", ".join(sorted({row["device"] for row in here}))
    drawn = {
        "summary": "FID and distance at equal calls and equal cost",
        "nfe": "FID and distance against network calls an image",
        "cost": "FID and distance against the cost of the model",
        "samples": "The same noises",
    }
    files = {name: picture(bench, name) for name in drawn}
    shown = "\n\n".join(f"![{drawn[name]}](choosing_k/{file.name})" for name, file in files.items() if file.exists())
    tables = "\n\n".join(f"### NFE {n}\n\n{table(cells, n, bench.seeds[0])}" for n in NFES)
    return f"""## {bench.name}

{len(here)} rows, {len(missing)} cells still to be run, or run again with today's classifier. Teacher
`{bench.teacher}` ({here[0]["teacher"]}); budget of a model {bench.calls:,} network calls; {bench.samples} samples;
devices: {devices}.

### Verdicts

Differences are first minus second, so below 0 the first is better; ± is the standard error over seeds. With three seeds
the rule of two standard errors calls 18 % of equal pairs different: trust what is far above it.

{verdicts(cells)}

{shown}

Tables of the first seed, lowest FID first; in the last two columns mean ± standard deviation over (so many) seeds.
Seeds differ by the noises that are sampled, which moves the FID of all models alike: compare within a seed. A star:
measured (for a mean: in part) before the classifier was kept with the code, by another one, whose FIDs are about 1 %
different.

{tables}
"""


INTRODUCTION = """# Choosing k

Which k, which recipe, for how many network calls? Written by `python -m study.page` from
[study/results.jsonl](../study/results.jsonl), which `python -m study.run BENCH` fills, cell by cell; what is
compared, and why, is in `study/cells.py`.

All models of a bench cost the same, counted in network calls: 3 for each trained example, 1 for each call of the
teacher or the student in making pairs, trajectories, boundaries and on-policy states. `k4_m1` is a 4-SeqRF distilled
to one call a segment, `k1_m4` plain reflow (2-RF) distilled to 4 Euler steps: the rival at equal NFE. `_direct`:
distilled from the teacher, without reflow; `_x2`: twice the budget. FID is over the features of a classifier of the
bench's labels, RMS the distance to the teacher's own samples of the same noises, truncation that to the model's own;
`study/rows.py` has their names in the rows. A verdict is settled if three seeds agree and their mean difference is
above two standard errors.
"""


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=local_path, help="of study/run.py, for the pictures of samples")
    arguments = parser.parse_args()
    workdir = arguments.workdir and arguments.workdir.absolute()
    os.chdir(ROOT)  # the teachers' paths are relative to it
    teachers = {bench.name: Models(bench, ROOT).teacher[1] for bench in BENCHES.values()}
    rows = [row for row in read_rows() if row["teacher"] == teachers.get(row["bench"])]
    measured = [bench for bench in BENCHES.values() if any(row["bench"] == bench.name for row in rows)]
    PICTURES.mkdir(exist_ok=True)
    for bench in measured:
        draw_pictures(bench, grouped(rows, bench.name))
        if workdir:
            draw_samples(bench, grouped(rows, bench.name), workdir, picture(bench, "samples"))
    sections = [section(bench, rows) for bench in measured]
    PAGE.write_text("\n".join([INTRODUCTION, ADVICE.read_text(), *sections]))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
