"""Which k, which recipe: trains and measures every cell of the study, one row of study/results.jsonl each.

    python -m study.run fashion_mnist_14                   # the bench, verdicts over three seeds
    python -m study.run digits                             # its quick form: half the budget, one seed
    python -m study.run digits --only k4_m1/euler_4/seed_0 # cells whose name contains this
    python -m study.run digits --verify k4_m1/euler_4/seed_0   # makes that row again and compares

A row is appended when its cell is done; stopped at any point, on any machine, the same command goes on with the cells
that are missing, and a training run with its latest checkpoint. A row by another feature network than today's does not
count. study/page.py makes docs/choosing_k.md of the rows; study/cells.py says what is compared, study/rows.py what is
measured. Below --workdir every model has a folder that main.py can evaluate.
"""

import argparse
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

import evaluation
import runtime
from checkpointing.checkpoint import checkpoint_at
from jobs.builders import data_options, reference_options, sampler_options
from jobs.lock import exclusive
from metrics.reference import RealData, feature_distances, real_data
from models import create_model
from sampler import Sampler
from sampler import sampler_options as steps_of
from study.cells import BENCHES, EXACT_TOL, Bench, Cell, all_cells
from study.models import Model, Models
from study.rows import RESULTS, Row, append_row, metrics_of, read_rows
from utils import InputError, local_path

ROOT = Path(__file__).resolve().parents[1]
BATCH = 256  # noises that are solved together; an adaptive solve shares its steps over them


class Study:
    """The cells of one bench: their models, made where they are missing, and what evaluation.py measures of them."""

    def __init__(self, bench: Bench, workdir: Path):
        """`workdir`: of the models."""
        self.bench, self.models = bench, Models(bench, workdir)
        self.commit = _commit()  # of the code that is loaded, whatever is checked out later
        self._sampler = functools.cache(self._exact_sampler)  # compiled once for all models of the same segments
        self._teacher_samples = functools.cache(self._samples_of_teacher)

    @functools.cached_property
    def real(self) -> RealData:
        """The feature network and what is known of the training images' features."""
        config = self.models.config(0, {})
        return real_data(data_options(config), reference_options(config), config.eval.batch_size)

    def metrics(self, cell: Cell, model: Model) -> dict[str, float]:
        """What is measured of a cell, by the names that study/rows.py explains.

        Raises:
          InputError: samples that are not finite.
        """
        exact, params = self._loaded(model.checkpoint, cell.seed)
        sampler, bench = _with_steps(exact, cell, params), self.bench
        network, centered = self.real.network, self.models.config(0, {}).data.centered
        samples = evaluation.draw_samples(sampler, params, bench.samples, BATCH, network=network, centered=centered)
        rms = functools.partial(evaluation.rms_to_reference, sampler, params, batch_size=BATCH)
        own = evaluation.reference_samples(exact, params, bench.referenced, BATCH)
        noises = bench.referenced
        straightness = evaluation.trajectory_metrics(exact, params, exact.boundaries, noises, noises)
        return {
            **feature_distances(self.real, samples.features),
            "rms_to_teacher_1e-4": rms(self._teacher_samples(cell.seed)),
            "truncation_error": rms(own),
            "sequential_straightness_ode_1e-4": straightness.sequential_straightness,
        }

    def _loaded(self, checkpoint: Path, seed: int) -> tuple[Sampler, Any]:
        """(the sampler that solves a checkpoint's flow at EXACT_TOL, with noises of `seed`; its EMA weights)."""
        found = checkpoint_at(checkpoint)
        sampler = self._sampler(tuple(found.metadata["boundaries"]))
        return dataclasses.replace(sampler, seed=seed), found.load().ema_params

    def _exact_sampler(self, boundaries: tuple[float, ...]) -> Sampler:
        options = {"training.reflow_t": len(boundaries) - 1, "sampling.method": "ode", "sampling.tol": EXACT_TOL}
        config = self.models.config(0, options)
        network = create_model(config)
        times = np.asarray(boundaries, np.float32)
        return Sampler(network, times, network.image_shape, sampler_options(config), config.seed)

    def _samples_of_teacher(self, seed: int) -> list[Float[np.ndarray, "_ h w c"]]:
        """The teacher's samples of the noises that are compared, in batches."""
        exact, params = self._loaded(self.models.teacher[0], seed)
        # In float64, in which differences to them are then taken too: figures of earlier rows come out bit for bit.
        return [x.astype(np.float64) for x in exact.samples(params, self.bench.compared, BATCH)]

    def rows(self) -> list[Row]:
        """The rows so far of this bench and teacher."""
        teacher = self.models.teacher[1]
        return [row for row in read_rows() if (row["bench"], row["teacher"]) == (self.bench.name, teacher)]

    def is_measured(self, cell: Cell) -> bool:
        """Whether a row of the cell is by the feature network of today."""
        mine = [row for row in self.rows() if row["cell"] == cell.id]
        return any(row.get("features") == self.real.network.identity for row in mine)

    def row(self, cell: Cell) -> Row:
        """The row of a cell; trains what it needs. Errors as `Models.model` and `metrics`."""
        model = self.models.model(cell.recipe, cell.seed)
        return {
            "bench": self.bench.name,
            "cell": cell.id,
            "model": cell.recipe.model,
            "recipe": cell.recipe.name,
            "k": max(cell.recipe.k, 1),
            "sampler": cell.sampler,
            "nfe": cell.nfe,
            "seed": cell.seed,
            **self.metrics(cell, model),
            "updates": model.updates,
            "network_calls": model.calls,
            "wall_seconds": round(model.seconds, 1),
            "features": self.real.network.identity,
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "commit": self.commit,
            "teacher": self.models.teacher[1],
        }


def _with_steps(exact: Sampler, cell: Cell, params: Any) -> Sampler:
    """The sampler of `cell.nfe` network calls with the weights `params`."""
    steps, predictor = (cell.nfe // 2, "rf_solver_heun") if cell.sampler == "heun" else (cell.nfe, "rf_solver")
    options = steps_of(len(exact.boundaries) - 1, num_scales=steps, predictor=predictor)
    time_grid = "adaptive" if cell.sampler == "adaptive" else "uniform"
    return dataclasses.replace(exact, options=options).with_time_grid(params, time_grid)


def _commit() -> str:
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    dirty = run(["git", "status", "--porcelain", "--untracked-files=no", "--", "*.py"]).stdout.strip()
    return run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() + ("+" if dirty else "")


def verify(study: Study, cell: Cell) -> bool:
    """Makes a row again, from its pairs on, in a folder of its own; True if every metric of both is the same."""
    *_, before = (row for row in study.rows() if row["cell"] == cell.id)
    with tempfile.TemporaryDirectory() as folder:
        after = Study(study.bench, Path(folder)).row(cell)
    shared = [name for name in metrics_of(after) if name in before]  # a row of an earlier version has others too
    for name in (*shared, "features", "device", "commit"):
        print(f"{name}: {before.get(name)!r} then, {after[name]!r} now")
    return all(before[name] == after[name] for name in shared)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--seeds", help="such as 0,1,2; default: the bench's")
    parser.add_argument("--workdir", type=local_path, default=ROOT / "runs" / "study")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--verify", metavar="CELL")
    parser.add_argument("--teacher", type=os.path.abspath, help="another 1-RF than the bench's own")
    return parser.parse_args()


def main() -> None:
    """The script."""
    arguments = _arguments()
    bench = BENCHES[arguments.bench]
    bench = dataclasses.replace(bench, teacher=arguments.teacher or bench.teacher)
    folder = arguments.workdir.absolute() / bench.name
    study = Study(bench, folder)
    os.chdir(ROOT)  # the teacher's path is the same in every clone: it is compared when a run goes on
    seeds = tuple(map(int, arguments.seeds.split(","))) if arguments.seeds else bench.seeds
    cells = all_cells(seeds, screening=bench.screening)
    with runtime.terminal_logging(), exclusive(folder):
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
            print(" ".join(f"{name} {value:.4g}" for name, value in metrics_of(row).items()), flush=True)


if __name__ == "__main__":
    runtime.set_environment()
    os.environ.setdefault("WANDB_MODE", "disabled")  # hundreds of short runs; the rows are the record
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
