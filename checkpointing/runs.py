"""The checkpoints of a run: written and resumed by orbax.

A run keeps snapshots in `checkpoints/<step>/` and the latest preemption checkpoint in `checkpoints-meta/<step>/`. Both
hold `state` (a `train_step.TrainState` as nested dicts of arrays) and `info` (`checkpointing.metadata`).
Reading never unpickles. The formats are in docs/method.md, section 9.
"""

import contextlib
import shutil
from typing import Any, TypedDict

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils as ts_utils

import models
from checkpointing.metadata import checked_metadata, network_of
from models.weights import ema_name
from utils import InputError, absolute, damage_named, disk_error, is_local, read_json, user_path, write_json

_SETTINGS = "run.json"
_DELETED = "deleted"  # the folder, beside the checkpoints, of those that are being removed
# Limit retries in a bucket to about 15 s (default: 15 minutes), as runtime.BUCKET_SETTINGS. Orbax has no public option.
ts_utils._DEFAULT_OCDBT_TS_CONTEXT["gcs_request_retries"] = {"max_retries": 4}
DAMAGED = "incomplete or corrupt checkpoint (if it is removed, the one before it is used)"


class _Updates(TypedDict):
    n_iters: int


class _Ema(TypedDict, total=False):
    ema_rate: float | None
    variable_ema_rate: bool | None


class _Config(TypedDict):
    training: _Updates
    model: _Ema


class _RunFile(TypedDict, total=False):
    """What run.json holds, as far as it is used without a comparison."""

    config: _Config


class RunCheckpoints:
    """Snapshots and the latest preemption checkpoint of one stage of one run. Saves in the background.

    A save that fails leaves earlier checkpoints as they are. Its InputError is raised by the next call of any method.
    """

    def __init__(self, stage_folder, *, keep_snapshots: int = 0):
        """Opens (and makes) `<stage_folder>/checkpoints` and `checkpoints-meta`.

        Args:
          keep_snapshots: the latest so many are kept, earlier ones removed as new ones are saved; 0: all.
        """
        self._folder = epath.Path(stage_folder)
        with self._named_disk_errors("opened"):
            self._snapshots = _manager(self._folder / "checkpoints", max_to_keep=keep_snapshots or None)
            self._latest = _manager(self._folder / "checkpoints-meta", max_to_keep=1)

    def save(self, state: Any, metadata: dict, *, keep: bool) -> None:
        """Saves an unreplicated `train_step.TrainState`: as a snapshot, or (`keep=False`) as the one to resume from."""
        manager = self._snapshots if keep else self._latest
        step = int(state.step)
        if step in manager.all_steps():
            return
        tree = jax.device_get(flax.serialization.to_state_dict(state))
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(tree), info=ocp.args.JsonSave(metadata))
        with self._named_disk_errors():
            manager.wait_until_finished()
            _remove_deleted(epath.Path(manager.directory))
            manager.save(step, args=arguments)

    def check(self) -> None:
        """Raises InputError if a save in the background has failed; does not wait for those under way."""
        with self._named_disk_errors():
            for manager in (self._snapshots, self._latest):
                manager.check_for_errors()

    def wait(self) -> None:
        """Waits for the saves under way."""
        with self._named_disk_errors():
            for manager in (self._snapshots, self._latest):
                manager.wait_until_finished()
                _remove_deleted(epath.Path(manager.directory))

    def check_room(self, like: Any) -> None:
        """Raises InputError where a local disk has no room for one checkpoint more of a state of the shapes `like`."""
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
        if is_local(self._folder) and needed > (free := shutil.disk_usage(self._folder).free):
            raise InputError(
                f"the disk of {self._folder} has {free:,} bytes free, a checkpoint needs {needed:,}; free some space, "
                "or keep fewer of them with training.keep_snapshots"
            )

    @contextlib.contextmanager
    def _named_disk_errors(self, action="saved"):
        try:
            yield
        except Exception as error:
            if isinstance(error, InputError) or (cause := disk_error(error)) is None:
                raise
            raise InputError(
                f"a checkpoint could not be {action} in {self._folder}: {cause.strerror}; those before it are "
                "complete: when it can be written again, the same command resumes from the last one"
            ) from error

    def latest_step(self) -> int | None:
        """The step that `resume` would continue from; None for a new run."""
        steps = [step for manager in (self._snapshots, self._latest) if (step := manager.latest_step()) is not None]
        return max(steps, default=None)

    def resume(self, like: Any, metadata: dict) -> Any:
        """The latest state, with the structure and shapes of `like`, or None for a new run.

        Raises:
          InputError: the folder holds another network, other segments or another optimiser than `like`, or was trained
            on more or fewer pairs.
        """
        step = self.latest_step()
        if step is None:
            return None
        manager = self._snapshots if self._snapshots.latest_step() == step else self._latest
        folder = epath.Path(manager.directory) / str(step)
        saved = read_metadata(folder)
        for key in ("stage", "k", "boundaries", "teacher", "pairs"):  # "pairs": not in a run of images, or an old one
            if key in saved and saved[key] != metadata.get(key):
                raise InputError(
                    f"{folder} was trained with {key} = {saved[key]}, this run has {metadata.get(key)}; "
                    "use another --workdir or the same settings"
                )
        check_same_network(folder, saved, metadata, "use another --workdir or the same settings")
        tree = _read_state(folder)
        try:
            state = flax.serialization.from_state_dict(like, tree)
        except (ValueError, KeyError) as error:
            raise InputError(f"{folder} does not fit this run: {error}".replace("\n", " ")) from error
        return jax.tree.map(lambda a, b: np.asarray(b).astype(a.dtype).reshape(a.shape), like, state)

    def close(self):
        """Waits for the saves under way."""
        with self._named_disk_errors():
            try:
                self.wait()
            finally:
                for manager in (self._snapshots, self._latest):
                    manager.close()


def _manager(folder, max_to_keep):
    _remove_deleted(epath.Path(folder))
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep, cleanup_tmp_directories=jax.process_index() == 0, todelete_subdir=_DELETED
    )
    return ocp.CheckpointManager(absolute(user_path(folder)), options=options)


def _remove_deleted(folder: epath.Path) -> None:
    """Removes what orbax has renamed into a folder of its own, so that a kill leaves no half of a checkpoint."""
    if is_local(folder) and jax.process_index() == 0:
        shutil.rmtree(folder / _DELETED, ignore_errors=True)


def _read_state(folder) -> dict:
    """The state of one checkpoint folder as nested dicts of NumPy arrays."""
    folder = absolute(user_path(folder))
    with damage_named(f"{folder}: {DAMAGED}"):
        tree = ocp.PyTreeCheckpointer().restore(folder / "state")
        # Orbax writes nothing for empty trees: clipping has no state, and most runs have one EMA.
        tree["opt_state"]["0"] = {}
        tree.setdefault("extra_ema", {})
        return tree


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    """The metadata in a checkpoint folder. Reads no array. Raises InputError for an incomplete or corrupt one."""
    folder = absolute(user_path(folder))
    with damage_named(f"{folder}: {DAMAGED}"):
        return checked_metadata(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "info"))


def steps_in(stage_folder: epath.PathLike) -> list[int]:
    """The steps of a stage's complete snapshots, ascending; empty if there is none."""
    return _steps_of(epath.Path(stage_folder) / "checkpoints")


def _steps_of(folder: epath.Path) -> list[int]:
    if not folder.exists():  # is_dir is False for whatever fails in a bucket
        return []
    found = [entry for entry in folder.iterdir() if entry.name.isdigit()]
    # On a disk a step has its name when it is complete; in a bucket, which cannot rename, it is marked so.
    return sorted(int(entry.name) for entry in found if is_local(entry) or ocp.utils.is_checkpoint_finalized(entry))


def latest_step(stage_folder: epath.PathLike) -> int | None:
    """The step that a run of this stage would resume from; None: it has not begun."""
    preemption = epath.Path(stage_folder) / "checkpoints-meta"
    steps = steps_in(stage_folder) + _steps_of(preemption)
    return max(steps, default=None)


def write_settings(stage_folder: epath.PathLike, settings: dict[str, Any]) -> None:
    """Keeps the settings of a stage's run in `<stage_folder>/run.json`, beside its checkpoints."""
    write_json(epath.Path(stage_folder) / _SETTINGS, {"config": settings})


def read_settings(stage_folder: epath.PathLike) -> dict[str, Any] | None:
    """The settings of the latest run of a stage; None: a version that did not keep them."""
    return read_json(epath.Path(stage_folder) / _SETTINGS, _RunFile, {}).get("config")


def planned_updates(stage_folder: epath.PathLike) -> int:
    """The updates that a stage has when it is finished; 0 where no settings were kept."""
    settings = read_settings(stage_folder)
    return int(settings["training"]["n_iters"]) if settings else 0


def read_weights(folder: epath.Path, ema_rate: float = 0.0) -> models.Weights:
    """The weights in a checkpoint folder `.../checkpoints/<step>`, with their own number of heads.

    Args:
      ema_rate: the EMA that becomes `ema_params`, one of model.ema_rates; 0: the main one.

    Raises:
      InputError: an incomplete or corrupt checkpoint, or no such EMA.
    """
    tree = _read_state(folder)
    if ema_rate and ema_name(ema_rate) not in (kept := tree["extra_ema"]):
        rates = ", ".join(kept) or "none"
        raise InputError(f"{folder} has no EMA of rate {ema_rate} beside the main one, its others are: {rates}")
    with damage_named(f"{folder}: {DAMAGED}"):
        adam = tree["opt_state"]["1"]  # of the chain clipping, Adam, rate (`train_step.optimizer`)
        return models.Weights(
            params=tree["params"],
            ema_params=tree["extra_ema"][ema_name(ema_rate)] if ema_rate else tree["ema_params"],
            mu=adam["mu"],
            nu=adam["nu"],
            count=int(adam["count"]),
            step=int(tree["step"]),
        )


def check_same_network(path: epath.Path, saved: dict, wanted: dict, remedy: str) -> None:
    """Raises InputError where the metadata `saved` at `path` describes another network than `wanted` does."""
    network = models.network_identity(network_of(saved))
    for section, settings in network.items():
        for name, value in settings.items():
            if value != wanted[section][name]:
                raise InputError(
                    f"{path} holds a network with {section}.{name} = {value}, the configuration has "
                    f"{wanted[section][name]}; {remedy}"
                )
