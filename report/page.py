"""The page of report: everything that a workdir holds, in one file that needs no other.

What is read from files is text and numbers for the template, which escapes it (Jinja's autoescape), and pictures.
"""

import base64
import dataclasses
import datetime
import functools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jinja2
import numpy as np
from PIL import Image

import utils
from report import plots as report_plots
from report.results import Evaluation, Results, read_or
from utils import InputError

STAGES = ("1_rf", "samples", "2_rf", "2_distill*")  # in the order in which they run
HISTORY = ("loss", "gradient_norm", "learning_rate", "images_per_second")
DISTANCES = {
    "rms": ("rms_to_teacher", "RMS distance to the teacher's own sample"),
    "truncation": ("truncation_error", "truncation error: RMS to the model's own exact sample"),
}
CURVES = {"curve": "straightness over all of time", "sequential_curve": "straightness within the segments"}
SHOWN = 16  # samples in a row of the same noises
GRID = 64  # images of samples.png
PAIR_FACTS = (
    "pairs", "k", "boundaries", "adaptive", "image_shape", "dataset", "tol", "solver", "error_norm", "dtype",
    "store_noise", "inverted_pairs", "teacher", "seed", "files", "complete",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of the page: its bytes as an address, what it shows, and its caption."""

    address: str
    alt: str
    caption: str = ""


def write(workdir: pathlib.Path, results: Results) -> pathlib.Path:
    """Writes `<workdir>/report.html` and its pictures into `<workdir>/report/`; returns the page's path.

    Shows `<workdir>/fid_against_nfe.png`, which `draw_fid` draws, as it is.
    """
    last, stages = results.last, _stages(workdir)
    page = _template().render(
        title=workdir.resolve().name,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        fid=results.fid,
        rows=results.rows,
        claims=_claims(results),
        floors=_floors(results),
        pictures=_pictures(workdir, results, stages),
        history=HISTORY,
        curves=CURVES,
        samples=_sample_rows(workdir, last),
        trajectories=_existing([one for one in last if one.metrics["sampler"] == "ODE"], "trajectory.png"),
        nearest=_existing(last, "nearest.png"),
        pairs=_pair_facts(workdir),
        pair_pictures=[_picture(path, path.stem) for path in _files(workdir, "samples/*.png")],
        commands=_commands(stages, last),
        measured=[_how_measured(one) for one in last],
        explore="explore.html" if (workdir / "explore.html").exists() else None,
    )
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report_page.html")


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_fid(path: pathlib.Path, results: Results) -> None:
    """Draws the FID against NFE, with the floor where it was measured."""
    last, fid = results.last, results.fid
    report_plots.draw_quality(path, _curves(last, fid), fid, next(iter(_values(last, f"floor_{fid}")), None))


def _curves(last: list[Evaluation], quality: str) -> dict[str, tuple[list, list]]:
    """{model and kind of sampler: (NFE, quality)} of the evaluations that have it."""
    curves: dict[str, tuple[list, list]] = {}
    for one in last:
        if (value := one.value(quality)) is not None:
            nfe, values = curves.setdefault(f"{one.metrics['model']}, {one.metrics['sampler'].split(' ')[0]}", ([], []))
            nfe.append(one.metrics["nfe"])
            values.append(value)
    return curves


def _values(last: list[Evaluation], name: str) -> list[float]:
    return [value for one in last if (value := one.value(name)) is not None]


def _pictures(workdir: pathlib.Path, results: Results, stages: dict[str, Any]) -> dict[str, Picture | None]:
    """The pictures by the name that the template knows, drawn into `<workdir>/report/`; None: nothing to draw."""
    folder, fid = workdir / "report", results.fid
    folder.mkdir(exist_ok=True)
    drawn: dict[str, Picture | None] = {"fid": _picture(workdir / "fid_against_nfe.png", f"{fid} against NFE")}
    for name, (quality, axis) in DISTANCES.items():
        curves = _curves(results.last, quality)
        draw: Callable[[pathlib.Path], None] = functools.partial(report_plots.draw_quality, curves=curves, quality=axis)
        drawn[name] = _drawn(folder / f"{name}.png", axis, draw if curves else None)
    straightness = _straightness(results.last)
    for curve, shown in CURVES.items():
        draw = functools.partial(report_plots.draw_straightness_of_models, models=straightness, curve=curve)
        drawn[curve] = _drawn(folder / f"{curve}.png", shown, draw if straightness else None)
    checkpoints = {each[0].name: [one.metrics for one in each] for each in results.steps if len(each) > 1}
    history = {name: stage["history"] for name, stage in stages.items()}
    for name, histories, value in [("checkpoints", checkpoints, fid), *((name, history, name) for name in HISTORY)]:
        is_logged = any(value in line for lines in histories.values() for line in lines)
        draw = functools.partial(report_plots.draw_history, histories=histories, name=value)
        drawn[name] = _drawn(folder / f"{name}.png", name.replace("_", " "), draw if is_logged else None)
    return drawn


def _drawn(path: pathlib.Path, alt: str, draw: Callable[[pathlib.Path], None] | None) -> Picture | None:
    """The picture that `draw` writes to `path`; None where there is nothing to draw."""
    if draw is None:
        return None
    draw(path)
    return _picture(path, alt)


def _straightness(last: list[Evaluation]) -> dict[str, dict[str, np.ndarray]]:
    """The curves of the adaptive solves by model; of a model without one, those of its most steps."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for one in sorted(last, key=lambda one: (one.metrics["sampler"] == "ODE", one.metrics["nfe"])):
        if (arrays := _arrays(one.folder / "straightness.npz", ("ts", "curve", "sequential_curve"))) is not None:
            found[f"{one.metrics['model']}, {one.metrics['sampler']}"] = arrays
    by_model = {name.rpartition(", ")[0]: name for name in found}
    return {name: found[name] for name in sorted(by_model.values())}


def _arrays(path: pathlib.Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    """Finite vectors of an .npz, the first one longer by one; None where they are not there."""
    try:
        arrays = utils.read_arrays(path, dict.fromkeys(names, ("f[48]", 1)))
    except (OSError, InputError):
        return None
    if len(arrays) < len(names):
        return None
    sizes = [array.shape for array in arrays.values()]
    fits = all(len(size) == 1 and size[0] + (n > 0) == sizes[0][0] for n, size in enumerate(sizes))
    return arrays if fits and all(np.isfinite(array).all() for array in arrays.values()) else None


def _sample_rows(workdir, last: list[Evaluation]) -> list[tuple[str, str, Picture]]:
    """(model, sampler, its samples of the first noises side by side), cut from samples.png."""
    found = []
    for one in sorted(last, key=lambda one: (one.metrics["model"], one.metrics["nfe"])):
        path = workdir / "report" / f"samples_{one.name}.png"
        if _cut_samples(one, path):
            model, sampler, nfe = (one.metrics[name] for name in ("model", "sampler", "nfe"))
            name = sampler if sampler.split(" ")[-1] == f"{nfe:.0f}" else f"{sampler}, NFE {nfe:.0f}"
            found.append((model, name, _picture(path, f"samples of {model} by {sampler}")))
    return found


def _cut_samples(one: Evaluation, path: pathlib.Path) -> bool:
    """Writes the first rows of the grid samples.png beside each other; False where there is no such grid."""
    given = _inner(one.metrics, "settings").get("num_samples")
    count = min(GRID, given) if isinstance(given, int) and given > 0 else GRID
    try:
        with Image.open(one.folder / "samples.png", formats=["PNG"]) as picture:
            grid = picture.convert("RGB")
    except Exception:  # Pillow raises nearly anything for a damaged file
        return False
    columns = math.ceil(math.sqrt(count))
    width, height = grid.width / columns, grid.height / math.ceil(count / columns)
    if width != height or width != int(width):
        return False
    rows = max(1, min(SHOWN, count) // columns)
    strip = Image.new("RGB", (rows * grid.width, int(height)), "white")
    for row in range(rows):
        strip.paste(grid.crop((0, row * int(height), grid.width, (row + 1) * int(height))), (row * grid.width, 0))
    strip.save(path)
    return True


def _existing(last: list[Evaluation], name: str) -> list[Picture]:
    """The pictures of this name that evaluations have left, with what they are of."""
    return [
        _picture(one.folder / name, f"{one.metrics['model']}, {one.metrics['sampler']}")
        for one in last
        if (one.folder / name).is_file()
    ]


def _picture(path: pathlib.Path, alt: str) -> Picture:
    return Picture("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(), alt, alt)


# --- text -------------------------------------------------------------------------------------------------------------


def _claims(results: Results) -> list[str]:
    try:
        return [str(claim) for claim in results.claims if not math.isnan(claim.ratio)]
    except KeyError:  # not all of what they compare was measured
        return []


def _floors(results: Results) -> list[str]:
    """What the floor is and of how many images, once for each."""
    found = []
    for one in results.last:
        if (floor := one.value(f"floor_{results.fid}")) is not None:
            counts = [one.value(f"floor_{name}") or 0 for name in ("samples", "reference_samples")]
            found.append(f"{floor:.3g}, of {counts[0]:.0f} real images against {counts[1]:.0f}")
    return list(dict.fromkeys(found))


def _stages(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """{folder: its record (provenance.json) and the numbers that it has logged}, in the order in which they run."""
    found = {}
    for pattern in STAGES:
        for folder in sorted(path for path in workdir.glob(pattern) if path.is_dir()):
            lines = read_or(folder / "metrics.json", list[dict[str, Any]], [])
            numbers = [_numbers(line) for line in lines]
            history = [line for line in numbers if "step" in line and "loss" in line]
            record = read_or(folder / "provenance.json", dict[str, Any], {})
            found[folder.name] = {"history": history, "record": record}
    return found


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if isinstance(value, int | float)}


def _commands(stages: dict[str, dict[str, Any]], last: list[Evaluation]) -> list[tuple[str, str]]:
    """(what it made, command), each command once, in the order in which they were given."""
    records = [(name, stage["record"]) for name, stage in stages.items()]
    records += [(one.name, _inner(one.metrics, "provenance")) for one in last]
    made: dict[str, list[str]] = {}
    for name, record in records:
        if isinstance(command := record.get("command"), str):
            made.setdefault(command, []).append(name)
    return [(", ".join(names), command) for command, names in made.items()]


def _pair_facts(workdir: pathlib.Path) -> dict[str, str]:
    manifest = read_or(workdir / "samples" / "reflow_batch" / "manifest.json", dict[str, Any], {})
    facts = {name: manifest[name] for name in PAIR_FACTS if name in manifest}
    lines = read_or(workdir / "samples" / "metrics.json", list[dict[str, Any]], [])
    made = lines[-1] if lines else {}
    facts |= {name: f"{value:.4g}" for name, value in _numbers(made).items() if name not in ("step", "pairs")}
    return {name.replace("_", " "): _text(value) for name, value in facts.items()}


def _how_measured(one: Evaluation) -> tuple[str, dict[str, str]]:
    """(evaluation, what its numbers depend on), from its entries 'settings' and 'provenance'."""
    settings, record = (_inner(one.metrics, name) for name in ("settings", "provenance"))
    commit = record.get("commit")
    facts = {
        "checkpoint": f"{record.get('checkpoint', '')} (EMA weights {settings.get('weights', '')})",
        "EMA rate": record.get("ema_rate"),
        "samples": settings.get("num_samples"),
        "noises behind straightness, truncation error, distance to the teacher": settings.get("straightness_samples"),
        "feature network": settings.get("network"),
        "reference": settings.get("reference"),
        "sampler": record.get("sampler", settings.get("sampling")),
        "boundaries": settings.get("boundaries"),
        "seed": settings.get("seed"),
        "batch": settings.get("batch_size"),
        "devices": settings.get("devices"),
        "images/s, sampling": one.value("seconds_per_1000") and f"{1000 / one.metrics['seconds_per_1000']:.4g}",
        "seconds, everything": record.get("seconds"),
        "code": commit and f"{commit}{', changed' if record.get('dirty') else ''}",
        "versions": record.get("versions"),
        "pairs": record.get("pairs"),
        "best step": read_or(one.folder.parent / "best.json", Any),
    }
    return f"{one.metrics['model']}, {one.metrics['sampler']}: {os.path.join(one.name, one.folder.name)}", {
        name: _text(value) for name, value in facts.items() if value not in (None, "", {}, [])
    }


def _text(value: Any) -> str:
    """A value of a JSON file on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _inner(metrics: dict[str, Any], name: str) -> dict[str, Any]:
    value = metrics.get(name)
    return value if isinstance(value, dict) else {}


def _files(workdir: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    return sorted(path for path in workdir.glob(pattern) if path.is_file())
