"""Makes the models of the study: their pairs, reflow and distillation, each within the budget of its bench."""

import dataclasses
import functools
import importlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections

import run_lib
import segments
import utils
from checkpointing.checkpoint import checkpoint_at
from checkpointing.metadata import distill_folder
from models.weights import fingerprint
from sampler import FINE_NOISES
from study.cells import CALLS_PER_EXAMPLE, Bench, Recipe


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


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Pairs or trajectories: the folder whose `samples/` has them, network calls and wall time that they took."""

    folder: Path
    calls: int
    seconds: float


class Models:
    """The models of one bench, made by `run_lib.train`, as main.py does it, in a folder for each seed."""

    def __init__(self, bench: Bench, workdir: Path):
        """`workdir`: of the bench; models that are in it are not trained again."""
        self.bench, self.workdir = bench, workdir

    def config(self, seed: int, options: dict[str, Any]) -> ml_collections.ConfigDict:
        """The bench's configuration with settings by name, such as {'optim.lr': 1e-3}."""
        module = self.bench.config.removesuffix(".py").replace("/", ".")
        config = importlib.import_module(module).get_config()
        updates = {"seed": seed, "training.batch_size": self.bench.batch_size, **self.bench.options, **options}
        config.update_from_flattened_dict(updates)
        return config

    def run(self, folder: Path, name: str, seed: int, options: dict[str, Any], *, is_done: bool) -> float:
        """One job of `main.py --mode=train`, unless it is done; its seconds, kept in `<folder>/seconds_<name>.json`."""
        record = folder / f"seconds_{name}.json"
        seconds = utils.read_json(record, float, 0.0)
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
        path = Path(self.bench.teacher)
        return path, fingerprint(checkpoint_at(path).load().ema_params)

    def model(self, recipe: Recipe, seed: int) -> Model:
        """The model of a recipe, trained as far as it is not yet.

        Raises:
          ValueError: the budget leaves no updates to it.
        """
        if not recipe.k:
            return Model(self.teacher[0], recipe)
        if recipe.scale != 1:
            scaled = Models(self.bench.scaled(recipe.scale), self.workdir / f"budget_x{recipe.scale:g}")
            return dataclasses.replace(scaled.model(dataclasses.replace(recipe, scale=1.0), seed), recipe=recipe)
        return self._distilled(recipe, seed) if recipe.m else self._reflowed(recipe, seed, whole=True)

    def holds(self, recipe: Recipe, seed: int) -> bool:
        """Whether a model that has been measured is in the workdir, so that nothing is trained to sample it."""
        return not recipe.k or self._folder(recipe.name, seed).is_dir()

    def _folder(self, name: str, seed: int) -> Path:
        return self.workdir / f"seed_{seed}" / name

    # --- pairs --------------------------------------------------------------------------------------------------------

    def _pairs(self, recipe: Recipe, seed: int, kind: str = "segments") -> PairSet:
        """The pairs ('segments') or trajectories ('trajectory') that a recipe is trained on, made if they are missing.

        Trajectories are of fewer noises for a recipe that has pairs of its own.
        """
        bench, is_trajectory = self.bench, kind == "trajectory"
        noises = bench.pairs[recipe.k][0]
        if is_trajectory:
            noises = (bench.direct_trajectories if recipe.direct else bench.trajectories)[recipe.k]
        folder = self._folder(f"{recipe.pair_name}_{kind}_{noises}", seed)
        if recipe.adaptive and is_trajectory:  # the boundaries are found once, with the pairs
            _link(self._pairs(recipe, seed).folder / "samples" / "reflow_batch", folder / "samples" / "reflow_batch")
        made = folder / "samples" / ("trajectories" if is_trajectory else "reflow_batch")
        logged = folder / "samples" / f"metrics{'_trajectories' if is_trajectory else ''}.json"
        is_done = utils.read_json(made / "manifest.json", dict[str, Any], {}).get("complete", False)
        if is_done and not logged.exists():  # killed between the two: what they cost is not known
            shutil.rmtree(made.resolve())
            is_done = False
        seconds = self.run(folder, kind, seed, self._generation(recipe, kind, noises), is_done=is_done)
        entries = utils.read_json(logged, list[dict[str, Any]])[-1].items()
        nfe = sum(value for name, value in entries if name.startswith("nfe_segment"))
        boundaries = segments.FINE_STEPS * FINE_NOISES if recipe.adaptive and not is_trajectory else 0
        return PairSet(folder, int(noises * nfe) + boundaries, seconds)

    def _generation(self, recipe: Recipe, kind: str, noises: int) -> dict[str, Any]:
        rows = noises if kind == "trajectory" else noises * recipe.k
        return recipe.options() | {
            "training.reflow_mode": "gen_reflow",
            "training.reflow_t": recipe.k,
            "training.reflow_pairs": kind,
            "training.adaptive_interval": recipe.adaptive,
            "training.n_reflow_data": rows,
            "training.reflow_file_size": rows,
            "training.gen_reflow_size": 256,
            "training.import_flax": str(self.teacher[0]),
            "sampling.tol": recipe.options().get("sampling.tol", self.bench.tol),
            "sampling.solver": self.bench.pairs[recipe.k][1],
        }

    # --- training -----------------------------------------------------------------------------------------------------

    def _reflowed(self, recipe: Recipe, seed: int, *, whole: bool) -> Model:
        """The k-SeqRF of a recipe: with all of the budget, or as far as a distillation starts from."""
        pairs, bench = self._pairs(recipe, seed), self.bench
        folder, calls, seconds = self._folder(recipe.reflow_name, seed), pairs.calls, pairs.seconds
        _link(pairs.folder / "samples", folder / "samples")
        if whole:  # goes on from there
            seconds = self._reflowed(recipe, seed, whole=False).seconds
        left = (bench.calls - calls) // (bench.batch_size * CALLS_PER_EXAMPLE)
        updates, record = (left, "2_rf_whole") if whole else (bench.reflow, "2_rf")
        options = self._training(recipe, "train_reflow", updates, self.teacher[0])
        seconds += self._train(folder / "2_rf", seed, updates, options, record)
        calls += updates * bench.batch_size * CALLS_PER_EXAMPLE
        return Model(folder / "2_rf" / "checkpoints" / str(updates), recipe, updates, calls, seconds)

    def _distilled(self, recipe: Recipe, seed: int) -> Model:
        """The distilled model of a recipe, with what its pairs, reflow and trajectories leave of the budget."""
        start = Model(self.teacher[0], recipe) if recipe.direct else self._reflowed(recipe, seed, whole=False)
        data, calls, seconds = self._pairs(recipe, seed, recipe.distilled_on), start.calls, start.seconds
        if recipe.direct or recipe.on_policy:  # else the pairs of the reflow, counted there
            calls, seconds = calls + data.calls, seconds + data.seconds
        folder = self._folder(recipe.name, seed)
        _link(data.folder / "samples", folder / "samples")
        calls_per_update = self.bench.batch_size * recipe.calls_per_distilled_example
        updates = int((self.bench.calls - calls) / calls_per_update)
        options = self._training(recipe, "train_distill", updates, start.checkpoint)
        stage = distill_folder(recipe.m)
        seconds += self._train(folder / stage, seed, updates, options, stage)
        calls += int(updates * calls_per_update)
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


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(target, link.parent))
