"""Which k, which recipe: trains and measures every cell of the study, one row of study/results.jsonl each.

    python -m study.run fashion_mnist_14                   # the bench, verdicts over three seeds
    python -m study.run digits                             # its quick form: half the budget, one seed
    python -m study.run digits --only k4_m1/euler_4/seed_0 # cells whose name contains this
    python -m study.run digits --verify k4_m1/euler_4/seed_0   # makes that row again and compares

A row is appended when its cell is done; stopped at any point, on any machine, the same command goes on with the cells
that are missing, and a training run with its latest checkpoint. A row by another feature network than today's does not
count. study/page.py makes docs/choosing_k.md of the rows; study/cells.py says what is compared. Below
--workdir every model has a folder that main.py can evaluate.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runtime
from study.cells import (
    BENCHES,
    CALLS_PER_EXAMPLE,
    Bench,
    Cell,
    Recipe,
    all_cells,
)
from utils import local_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "study" / "results.jsonl"
KERNEL_REAL = 10_000  # real images behind the KID
FIGURES = ("fid", "kid", "kid_error", "rms_to_teacher", "truncation_error", "straightness")


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model of one seed.

    Attributes:
      checkpoint: its folder.
      recipe: how it was made.
      updates: of all its stages.
      calls, seconds: network calls and wall time that making it took.
    """

    checkpoint: Path
    recipe: Recipe
    updates: int = 0
    calls: int = 0
    seconds: float = 0.0


class Study:
    """The cells of one bench. Training and pairs go through `run_lib.train`, as main.py does it."""

    def __init__(self, bench: Bench, workdir: Path):
        """`workdir`: of all runs, a folder for each seed."""
        self.bench, self.workdir = bench, workdir
        self.commit = _commit()  # of the code that is loaded, whatever is checked out later
        self._sampler = functools.cache(self._exact_sampler)  # compiled once for all models of the same segments
        self._teacher_samples = functools.cache(self._samples_of_teacher)
        self._fine_distances = functools.cache(self._distances_of_states)

    def config(self, seed: int, options: dict[str, Any]) -> Any:
        """The bench's configuration with settings by name, such as {'optim.lr': 1e-3}."""
        module = self.bench.config.removesuffix(".py").replace("/", ".")
        config = importlib.import_module(module).get_config()
        updates = {"seed": seed, "training.batch_size": self.bench.batch_size, **self.bench.options, **options}
        config.update_from_flattened_dict(updates)
        return config

    def run(self, folder: Path, name: str, seed: int, options: dict[str, Any], *, is_done: bool) -> float:
        """One job of `main.py --mode=train`, unless it is done; its seconds, kept in `<folder>/seconds_<name>.json`."""
        import jax

        import run_lib
        import utils

        record = folder / f"seconds_{name}.json"
        seconds = utils.read_json(record, 0.0)
        if is_done:
            return seconds
        began = time.perf_counter()
        try:
            run_lib.train(self.config(seed, options), folder)
        finally:  # a run that is stopped goes on later
            seconds += time.perf_counter() - began
            utils.write_json(record, seconds)
        jax.clear_caches()  # of programs that no other run uses
        return seconds

    @functools.cached_property
    def teacher(self) -> tuple[Path, str]:
        """The teacher's path and fingerprint."""
        from checkpointing import runs
        from models.weights import fingerprint

        path = Path(self.bench.teacher)
        return path, fingerprint(runs.restore(path)[0].ema_params)

    # --- models -------------------------------------------------------------------------------------------------------

    def model(self, recipe: Recipe, seed: int) -> Model:
        """The model of a recipe, trained as far as it is not yet."""
        if not recipe.k:
            return Model(self.teacher[0], recipe)
        if recipe.scale != 1:
            scaled = Study(self.bench.scaled(recipe.scale), self.workdir / f"budget_x{recipe.scale:g}")
            return dataclasses.replace(scaled.model(dataclasses.replace(recipe, scale=1), seed), recipe=recipe)
        return self._distilled(recipe, seed) if recipe.m else self._reflowed(recipe, seed, whole=True)

    def holds(self, recipe: Recipe, seed: int) -> bool:
        """Whether a model that has been measured is in the workdir, so that nothing is trained to sample it."""
        return not recipe.k or self._folder(recipe.name, seed).is_dir()

    def _folder(self, name: str, seed: int) -> Path:
        return self.workdir / f"seed_{seed}" / name

    def _pairs(self, recipe: Recipe, seed: int, noises: int, kind: str = "segments") -> tuple[Path, int, float]:
        """(folder, calls, seconds) of the pairs or trajectories of `noises` solves, made if they are missing."""
        import segments
        import utils
        from sampler import FINE_NOISES

        trajectory = kind == "trajectory"
        folder = self._folder(f"{recipe.pair_name}_{kind}_{noises}", seed)
        if recipe.adaptive and trajectory:  # the boundaries are found once, with the pairs
            pairs, *_ = self._pairs(recipe, seed, self.bench.pairs[recipe.k][0])
            _link(pairs / "samples" / "reflow_batch", folder / "samples" / "reflow_batch")
        options = recipe.options() | {
            "training.reflow_mode": "gen_reflow",
            "training.reflow_t": recipe.k,
            "training.reflow_pairs": kind,
            "training.adaptive_interval": recipe.adaptive,
            "training.n_reflow_data": noises if trajectory else noises * recipe.k,
            "training.reflow_file_size": noises if trajectory else noises * recipe.k,
            "training.gen_reflow_size": 256,
            "training.import_flax": str(self.teacher[0]),
            "sampling.tol": recipe.options().get("sampling.tol", self.bench.tol),
            "sampling.solver": self.bench.pairs[recipe.k][1],
        }
        made = folder / "samples" / ("trajectories" if trajectory else "reflow_batch")
        logged = folder / "samples" / f"metrics{'_trajectories' if trajectory else ''}.json"
        is_done = utils.read_json(made / "manifest.json", {}).get("complete", False)
        if is_done and not logged.exists():  # killed between the two: what they cost is not known
            shutil.rmtree(made.resolve())
            is_done = False
        seconds = self.run(folder, kind, seed, options, is_done=is_done)
        metrics = utils.read_json(logged, None)
        nfe = sum(value for name, value in metrics[-1].items() if name.startswith("nfe_segment"))
        boundaries = segments.FINE_STEPS * FINE_NOISES if recipe.adaptive and not trajectory else 0
        return folder, int(noises * nfe) + boundaries, seconds

    def _reflowed(self, recipe: Recipe, seed: int, *, whole: bool) -> Model:
        """The k-SeqRF of a recipe: with all of the budget, or as far as a distillation starts from."""
        pairs, calls, seconds = self._pairs(recipe, seed, self.bench.pairs[recipe.k][0])
        folder = self._folder(recipe.reflow_name, seed)
        _link(pairs / "samples", folder / "samples")
        if whole:  # goes on from there
            seconds = self._reflowed(recipe, seed, whole=False).seconds
        left = (self.bench.calls - calls) // (self.bench.batch_size * CALLS_PER_EXAMPLE)
        updates, record = (left, "2_rf_whole") if whole else (self.bench.reflow, "2_rf")
        options = self._training(recipe, "train_reflow", updates, self.teacher[0])
        seconds += self._train(folder / "2_rf", seed, updates, options, record)
        calls += updates * self.bench.batch_size * CALLS_PER_EXAMPLE
        return Model(folder / "2_rf" / "checkpoints" / str(updates), recipe, updates, calls, seconds)

    def _distilled(self, recipe: Recipe, seed: int) -> Model:
        """The distilled model of a recipe, with what its pairs, reflow and trajectories leave of the budget."""
        start = Model(self.teacher[0], recipe) if recipe.direct else self._reflowed(recipe, seed, whole=False)
        if recipe.on_policy:
            noises = (self.bench.direct_trajectories if recipe.direct else self.bench.trajectories)[recipe.k]
            data, calls, seconds = self._pairs(recipe, seed, noises, "trajectory")
        else:
            data, calls, seconds = self._pairs(recipe, seed, self.bench.pairs[recipe.k][0])
        if not recipe.direct and not recipe.on_policy:
            calls = seconds = 0  # the pairs of the reflow, counted there
        calls, seconds = calls + start.calls, seconds + start.seconds
        folder = self._folder(recipe.name, seed)
        _link(data / "samples", folder / "samples")
        per_example = CALLS_PER_EXAMPLE + ((recipe.k * recipe.m - 1) / 2 if recipe.on_policy else 0)
        updates = int((self.bench.calls - calls) / (self.bench.batch_size * per_example))
        options = self._training(recipe, "train_distill", updates, start.checkpoint)
        stage = "2_distill" + (f"_{recipe.m}" if recipe.m > 1 else "")
        seconds += self._train(folder / stage, seed, updates, options, stage)
        calls += int(updates * self.bench.batch_size * per_example)
        return Model(folder / stage / "checkpoints" / str(updates), recipe, start.updates + updates, calls, seconds)

    def _training(self, recipe: Recipe, mode: str, updates: int, start: Path) -> dict[str, Any]:
        return recipe.options() | {
            "training.reflow_mode": mode,
            "training.reflow_t": recipe.k,
            "training.adaptive_interval": recipe.adaptive,
            "training.distill_steps": recipe.m if mode == "train_distill" else 1,
            "training.on_policy": float(recipe.on_policy and mode == "train_distill"),
            "training.n_iters": updates,
            "training.snapshot_freq": updates,
            "training.snapshot_freq_for_preemption": 200,
            "training.snapshot_sampling": False,
            "training.import_flax": str(start),
        }

    def _train(self, stage: Path, seed: int, updates: int, options: dict[str, Any], record: str) -> float:
        if updates < 1:
            raise ValueError(f"nothing of the budget is left to train {stage}")
        is_done = (stage / "checkpoints" / str(updates)).is_dir()
        return self.run(stage.parent, record, seed, options, is_done=is_done)

    # --- figures ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def real(self) -> Any:
        """The feature network and what is known of the training images' features."""
        from jobs.builders import real_data_of

        return real_data_of(self.config(0, {}))

    def _exact_sampler(self, boundaries: tuple[float, ...], seed: int) -> Any:
        import numpy as np

        import datasets
        import models
        from sampler import Sampler

        config = self.config(seed, {"training.reflow_t": len(boundaries) - 1})
        options = {"method": "ode", "tol": self.bench.reference_tol, "solver": "dopri5", "error_norm": "batch"}
        model, shape = models.create_model(config), datasets.image_shape(config)
        return Sampler(model, np.array(boundaries, np.float32), shape, options, seed)

    def _samples_of_teacher(self, seed: int) -> Any:
        """The teacher's own samples of the noises that are compared."""
        from checkpointing import runs

        weights, metadata = runs.restore(self.teacher[0])
        sampler = self._sampler(tuple(metadata["boundaries"]), seed)
        return _images(sampler, weights.ema_params, self.bench.compared)

    def _distances_of_states(self, checkpoint: Path, seed: int) -> Any:
        from checkpointing import runs

        weights, metadata = runs.restore(checkpoint)
        return self._sampler(tuple(metadata["boundaries"]), seed).fine_distances(weights.ema_params)

    def samples(self, cell: Cell, count: int) -> Any:
        """The first samples of a cell, [count, H, W, C] in [0, 1]; trains what is missing."""
        import datasets
        from checkpointing import runs

        model = self.model(cell.recipe, cell.seed)
        weights, metadata = runs.restore(model.checkpoint)
        exact = self._sampler(tuple(metadata["boundaries"]), cell.seed)
        stepped = _with_steps(exact, cell, lambda: self._fine_distances(model.checkpoint, cell.seed))
        return datasets.unscale(_images(stepped, weights.ema_params, count), self.config(0, {}).data.centered)

    def exact_samples(self, count: int, seed: int = 0) -> Any:
        """The teacher's own samples of the first noises, [count, H, W, C] in [0, 1]."""
        import datasets

        return datasets.unscale(self._teacher_samples(seed)[:count], self.config(0, {}).data.centered)

    def figures(self, cell: Cell, model: Model) -> dict[str, float]:
        """What is measured of a cell."""
        import numpy as np

        import datasets
        from checkpointing import runs
        from metrics.distances import frechet_distance_to, kernel_distance_and_error

        weights, metadata = runs.restore(model.checkpoint)
        params = weights.ema_params
        exact = self._sampler(tuple(metadata["boundaries"]), cell.seed)
        stepped = _with_steps(exact, cell, lambda: self._fine_distances(model.checkpoint, cell.seed))
        x = _images(stepped, params, self.bench.samples)
        unit = datasets.unscale(x, self.config(0, {}).data.centered)
        found, _ = self.real.network.features_and_logits((255 * unit + 0.5).astype(np.uint8))
        kid, error = kernel_distance_and_error(self.real.features[:KERNEL_REAL], found)
        noises = self.bench.compared
        reference, straightness = self._reference(exact, params)
        return {
            "fid": frechet_distance_to(self.real.moments, found),
            "kid": kid,
            "kid_error": error,
            "rms_to_teacher": _rms(x[:noises], self._teacher_samples(cell.seed)),
            "truncation_error": _rms(x[: len(reference)], reference),
            "straightness": straightness,
        }

    def _reference(self, exact: Any, params: Any) -> tuple[Any, float]:
        """(the model's exact samples of the first noises, their sequential straightness)."""
        from metrics.straightness import straightness

        def solve(sampler: Any, params: Any, indices: Any) -> Any:
            solved = sampler.solve(params, sampler.noise(indices), save_trajectory=True)
            return solved.x, straightness(solved.ts, solved.xs, exact.boundaries).sequential

        (_, (x, sequential), _), *_ = exact.map_noises("reference", solve, params, 1, self.bench.referenced)
        return x[0], float(sequential[0])

    def rows(self) -> list[dict[str, Any]]:
        """The rows so far of this bench and teacher."""
        return [row for row in read_rows() if (row["bench"], row["teacher"]) == (self.bench.name, self.teacher[1])]

    def is_measured(self, cell: Cell) -> bool:
        """Whether a row of the cell is by the feature network of today."""
        mine = [row for row in self.rows() if row["cell"] == cell.id]
        return any(row.get("features") == self.real.network.identity for row in mine)

    def row(self, cell: Cell) -> dict[str, Any]:
        """The row of a cell; trains what it needs."""
        model = self.model(cell.recipe, cell.seed)
        figures = self.figures(cell, model)
        return {
            "bench": self.bench.name,
            "cell": cell.id,
            "model": cell.recipe.model,
            "recipe": cell.recipe.name,
            "k": max(cell.recipe.k, 1),
            "sampler": cell.sampler,
            "nfe": cell.nfe,
            "seed": cell.seed,
            **figures,
            "updates": model.updates,
            "network_calls": model.calls,
            "wall_seconds": round(model.seconds, 1),
            "features": self.real.network.identity,
            "device": _device(),
            "commit": self.commit,
            "teacher": self.teacher[1],
        }


def _with_steps(sampler: Any, cell: Cell, distances: Callable[[], Any]) -> Any:
    """A sampler of `cell.nfe` network calls; `distances`: those of `Sampler.fine_distances`, for adaptive times."""
    import adaptive

    heun = cell.sampler == "heun"
    options = {
        "method": "pc",
        "predictor": "rf_solver_heun" if heun else "rf_solver",
        "num_scales": cell.nfe // 2 if heun else cell.nfe,
    }
    stepped = dataclasses.replace(sampler, options=options)
    if cell.sampler != "adaptive":
        return stepped
    times = adaptive.adaptive_times(distances(), sampler.boundaries, cell.nfe)
    return dataclasses.replace(stepped, time_grid=times)


def _images(sampler: Any, params: Any, count: int) -> Any:
    import numpy as np

    return np.concatenate(list(sampler.samples(params, count, 256)))


def _rms(a: Any, b: Any) -> float:
    import numpy as np

    return float(np.sqrt(np.mean(np.square(np.asarray(a, np.float64) - b))))


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(target, link.parent))


def _device() -> str:
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _commit() -> str:
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    dirty = run(["git", "status", "--porcelain", "--untracked-files=no", "--", "*.py"]).stdout.strip()
    return run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() + ("+" if dirty else "")


def read_rows(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows so far; an incomplete last line, of a killed run, is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append_row(row: dict[str, Any], path: Path = RESULTS) -> None:
    """Adds a row, on a line of its own even after an incomplete one."""
    path.parent.mkdir(exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")


def verify(study: Study, cell: Cell) -> bool:
    """Makes a row again, from its pairs on, in a folder of its own; True if every figure is the same."""
    *_, before = (row for row in study.rows() if row["cell"] == cell.id)
    with tempfile.TemporaryDirectory() as folder:
        after = Study(study.bench, Path(folder)).row(cell)
    for name in (*FIGURES, "features", "device", "commit"):
        print(f"{name}: {before.get(name)!r} then, {after[name]!r} now")
    return all(before[name] == after[name] for name in FIGURES)


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--seeds", help="such as 0,1,2; default: the bench's")
    parser.add_argument("--workdir", type=local_path, default=ROOT / "runs" / "study")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--verify", metavar="CELL")
    parser.add_argument("--teacher", help="another 1-RF than the bench's own")
    arguments = parser.parse_args()
    bench = BENCHES[arguments.bench]
    bench = dataclasses.replace(
        bench, teacher=os.path.abspath(arguments.teacher) if arguments.teacher else bench.teacher
    )
    study = Study(bench, arguments.workdir.absolute() / bench.name)
    os.chdir(ROOT)  # the teacher's path is the same in every clone: it is compared when a run goes on
    seeds = tuple(map(int, arguments.seeds.split(","))) if arguments.seeds else bench.seeds
    cells = all_cells(seeds, screening=bench.screening)
    with runtime.terminal_logging():
        if arguments.verify:
            named = [cell for cell in cells if cell.id == arguments.verify]
            if not named or named[0].id not in {row["cell"] for row in study.rows()}:
                sys.exit(f"error: no row of {RESULTS} is of the cell {arguments.verify!r}, this bench and teacher")
            sys.exit(0 if verify(study, named[0]) else 1)
        for number, cell in enumerate(cells, 1):
            if arguments.only not in cell.id or study.is_measured(cell):
                continue
            print(f"== {number}/{len(cells)} {cell.id}", flush=True)
            row = study.row(cell)
            append_row(row)
            print(" ".join(f"{name} {row[name]:.4g}" for name in FIGURES), flush=True)


if __name__ == "__main__":
    runtime.set_environment()
    os.environ.setdefault("WANDB_MODE", "disabled")  # hundreds of short runs; the rows are the record
    main()
