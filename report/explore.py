"""Writes one HTML page to play with models: a slider over network calls, the same noises, ways from noise to image.

    python -m report.explore model_zoo/digits_1rf model_zoo/digits_2seqrf_distill -o runs/digits/explore.html

A MODEL is anything that `sampler.load` takes; NAME=MODEL calls it NAME on the page. Everything is in the page, which
needs no network. All frames are rendered now: each model, each number of Euler steps and the adaptive solver. Exit
status 2 and one line if a MODEL is none.
"""

import argparse
import base64
import io
import json
import pathlib
import sys
from typing import Any

PAGE = pathlib.Path(__file__).with_name("explore_page.html")
FRAMES = 17  # states of a trajectory; the strip shows every second


def rendered(model: Any, count: int, seed: int, steps: list[int], tol: float) -> list[dict[str, Any] | None]:
    """What the page shows of a model for each of `steps` and for the adaptive solver; None: fewer steps than segments.

    Each has nfe, rms (over pixels, in [0, 1], from the adaptive solver's images) and sprite: a PNG with a row of
    `count` images for each of FRAMES times, as a data URI.
    """
    import numpy as np

    times, k = np.linspace(1, 0, FRAMES), len(model.boundaries) - 1
    exact, nfe = _trajectories(model, count, times, seed=seed, tol=tol)
    runs: list[dict[str, Any] | None] = []
    for number in steps:
        if number < k:
            runs.append(None)
            continue
        found, _ = _trajectories(model, count, times, seed=seed, num_scales=number)
        rms = float(np.sqrt(np.mean((found[-1] - exact[-1]) ** 2)))
        runs.append({"nfe": str(number), "rms": f"{rms:.3f}", "sprite": _sprite(found)})
    return [*runs, {"nfe": f"{nfe:.0f}", "rms": None, "sprite": _sprite(exact)}]


def _trajectories(model: Any, count: int, times: Any, **options: Any) -> tuple[Any, float]:
    """(states [times, count, H, W, C] in [0, 1] on the ways of the first noises, mean NFE)."""
    import jax
    import numpy as np

    import datasets
    from jobs import sample
    from sampler import check_finite

    def solve(sampler: Any, params: Any, indices: Any) -> Any:
        return sampler.solve(params, sampler.noise(indices), save_trajectory=True)

    sampler = model.sampler(**options)
    batches = sampler.map_noises(
        "states of a trajectory", solve, model.params, count, sampler.trajectories_per_device(count)
    )
    found = [jax.device_get(solved) for _, solved, _ in batches]
    xs = np.concatenate([x for solved in found for x in solved.xs], axis=1)[sampler.states, :count]
    check_finite(np.isfinite(xs), sampler)
    states = sample.states_at(found[0].ts[0, sampler.states], xs, times)
    return datasets.unscale(states, model.centered), float(np.mean([solved.nfe for solved in found]))


def _sprite(frames: Any) -> str:
    """Frames [times, images, H, W, C] in [0, 1] as the data URI of one PNG, a row for each time."""
    from PIL import Image

    import datasets

    times, images, height, width, channels = frames.shape
    rows = datasets.levels(frames.swapaxes(1, 2).reshape(times * height, images * width, channels))
    file = io.BytesIO()
    Image.fromarray(rows[..., 0] if channels == 1 else rows).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def page(data: dict[str, Any]) -> str:
    """The HTML page of `data`, whatever strings are in it."""
    text = json.dumps(data, allow_nan=False)
    for character in "<>&":  # so that no string can end the script element
        text = text.replace(character, f"\\u{ord(character):04x}")
    return PAGE.read_text().replace("@DATA@", text)


def explore(options: argparse.Namespace) -> None:
    """Writes the page. Raises InputError where a model cannot be shown."""
    import tqdm

    import runtime
    import sampler
    from utils import InputError, atomic_path

    runtime.set_up_compilation_cache(runtime.cache_folder() / "compiled")
    steps = sorted(set(options.steps))
    loaded = []
    for named in options.models:
        name, _, path = named.rpartition("=") if not pathlib.Path(named).exists() else ("", "", named)
        loaded.append((name or pathlib.Path(path).resolve().name, path, sampler.load(path, batch_size=options.count)))
    shapes = {model.image_shape for _, _, model in loaded}
    if len(shapes) > 1:
        raise InputError(f"the models make images of {' and '.join(map(str, sorted(shapes)))}; choose some of one size")
    (shape,) = shapes
    if shape[2] not in (1, 3):
        raise InputError(f"the models make images of {shape[2]} channels; the page shows 1 or 3")
    models = []
    for name, path, model in tqdm.tqdm(loaded, desc="rendering", unit="model", disable=None):
        try:
            runs = rendered(model, options.count, options.seed, steps, options.tol)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        models.append({"name": name, "k": len(model.boundaries) - 1, "runs": runs})
    data = {
        "models": models,
        "steps": [*map(str, steps), "adaptive"],
        "first": next((i for i, number in enumerate(steps) if number >= 2), 0),
        "times": [1 - i / (FRAMES - 1) for i in range(FRAMES)],
        "shape": shape[:2],
        "count": options.count,
        "columns": max(1, round(options.count**0.5)),
    }
    with atomic_path(options.out) as temporary:
        temporary.write_text(page(data))
    print(f"wrote {options.out}, {options.out.stat().st_size / 1e6:.1f} MB: open it in a browser")


def _positive(text: str) -> int:
    if not 1 <= int(text) <= 10_000:
        raise ValueError(text)
    return int(text)


def _steps(text: str) -> list[int]:
    return [_positive(number) for number in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="[NAME=]an exported model, a run or a checkpoint")
    parser.add_argument("-o", "--out", type=pathlib.Path, default=pathlib.Path("explore.html"))
    parser.add_argument("--steps", type=_steps, default=[1, 2, 4, 8, 16], help="numbers of Euler steps: 1,2,4,8,16")
    parser.add_argument("--tol", type=float, default=1e-4, help="tolerance of the adaptive solver")
    parser.add_argument("--count", type=_positive, default=25, help="images of each model")
    parser.add_argument("--seed", type=int, default=0, help="of the noises")
    options = parser.parse_args(arguments)
    from utils import InputError

    try:
        explore(options)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
