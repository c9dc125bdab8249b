"""Checkpoints: a run's folders (orbax) and exported models (`exported`).

A run keeps snapshots in `checkpoints/<step>/` and the latest preemption checkpoint in `checkpoints-meta/<step>/`. Both
hold `state` (a `train_step.TrainState` as nested dicts of arrays) and `info` (its metadata, see `make_metadata`).
Reading never unpickles. The formats are in docs/method.md, section 9.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import re
import shutil
from collections.abc import Callable
from typing import Any

import flax
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Float
from orbax.checkpoint._src.serialization import tensorstore_utils as ts_utils

import models
import segments
from checkpointing import exported
from models.weights import TREES, ema_name
from utils import InputError, absolute, disk_error, is_local, os_errors, read_json, write_json

logger = logging.getLogger("seqrf")

_SETTINGS = "run.json"
# A lost bucket is called for 15 s, as by runtime.BUCKET_SETTINGS; else for a quarter of an hour. Orbax has no option.
ts_utils._DEFAULT_OCDBT_TS_CONTEXT["gcs_request_retries"] = {"max_retries": 4}
_DAMAGED = "incomplete or corrupt checkpoint (if it is removed, the one before it is used)"


def distill_steps(metadata: dict[str, Any]) -> int:
    """m, the Euler steps a segment that a model was distilled to, from its stage '2_distill_<m>'; else 1."""
    match = re.fullmatch(r"2_distill_(\d{1,4})", str(metadata["stage"]))
    return int(match[1]) if match else 1


def make_metadata(
    config: ml_collections.ConfigDict,
    stage: str,
    boundaries: segments.TimesLike,
    *,
    source: str = "",
    teacher: str | None = None,
) -> dict[str, Any]:
    """The metadata saved beside a state: its stage, the network's settings, its segments and what it was trained on.

    Args:
      boundaries: k + 1 times, from 1 to 0.
      source: where the starting weights came from.
      teacher: the `fingerprint` of the weights that made the pairs; None where there are none.
    """
    trained = {"stage": stage, "source": source, "teacher": teacher}
    segmented = {"k": len(boundaries) - 1, "boundaries": [float(b) for b in boundaries]}
    # Through JSON and back: tuples become lists, as they will be when read.
    return json.loads(json.dumps({**trained, **segmented, **models.network_identity(config)}))


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
          InputError: the folder holds another network, other segments or another optimiser than `like`.
        """
        step = self.latest_step()
        if step is None:
            return None
        manager = self._snapshots if self._snapshots.latest_step() == step else self._latest
        folder = epath.Path(manager.directory) / str(step)
        saved = _folder_metadata(folder)
        for key in ("stage", "k", "boundaries", "teacher"):
            if saved.get(key) != metadata[key]:
                raise InputError(
                    f"{folder} was trained with {key} = {saved.get(key)}, this run has {metadata[key]}; "
                    "use another --workdir or the same settings"
                )
        _check_same_network(folder, saved, metadata, "use another --workdir or the same settings")
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
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=jax.process_index() == 0)
    return ocp.CheckpointManager(absolute(folder), options=options)


def _read_state(folder) -> dict:
    """The state of one checkpoint folder as nested dicts of NumPy arrays."""
    folder = absolute(folder)
    with exported.damage_named(f"{folder}: {_DAMAGED}"):
        tree = ocp.PyTreeCheckpointer().restore(folder / "state")
        # Orbax writes nothing for empty trees: clipping has no state, and most runs have one EMA.
        tree["opt_state"]["0"] = {}
        tree.setdefault("extra_ema", {})
        return tree


def _folder_metadata(folder) -> dict:
    folder = absolute(folder)
    with exported.damage_named(f"{folder}: {_DAMAGED}"):
        return exported.checked_metadata(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "info"))


def steps_in(stage_folder: epath.PathLike) -> list[int]:
    """The steps of a stage's complete snapshots, ascending; empty if there is none."""
    folder = epath.Path(stage_folder) / "checkpoints"
    if not folder.exists():  # is_dir is False for whatever fails in a bucket
        return []
    found = [entry for entry in folder.iterdir() if entry.name.isdigit()]
    # On a disk a step has its name when it is complete; in a bucket, which cannot rename, it is marked so.
    return sorted(int(entry.name) for entry in found if is_local(entry) or ocp.utils.is_checkpoint_finalized(entry))


def write_settings(stage_folder: epath.PathLike, config: ml_collections.ConfigDict) -> None:
    """Keeps the settings of a stage's run in `<stage_folder>/run.json`, beside its checkpoints."""
    write_json(epath.Path(stage_folder) / _SETTINGS, {"config": config.to_dict()})


def read_settings(stage_folder: epath.PathLike) -> dict[str, Any] | None:
    """The settings of the latest run of a stage; None: a version that did not keep them."""
    return read_json(epath.Path(stage_folder) / _SETTINGS, {}).get("config")


def planned_updates(stage_folder: epath.PathLike) -> int:
    """The updates that a stage has when it is finished; 0 where no settings were kept."""
    settings = read_settings(stage_folder)
    return int(settings["training"]["n_iters"]) if settings else 0


def read_metadata(path: epath.PathLike) -> dict[str, Any]:
    """The `make_metadata` saved with the weights at `path` (any that `load_weights` takes). Reads no array.

    Raises:
      InputError: nothing there, or an incomplete or corrupt checkpoint.
    """
    path = resolve(path)
    return exported.read_metadata(path) if path.is_file() else _folder_metadata(path)


def load_weights(path: epath.PathLike, config: ml_collections.ConfigDict, *, ema_rate: float = 0.0) -> models.Weights:
    """The weights at `path`, for `models.create_model(config)`: one head is copied to k = training.reflow_t.

    Args:
      path: an exported model (a folder or its file), a checkpoint folder `.../checkpoints/<step>`, a stage's folder
        (its last checkpoint), or a workdir that holds one trained stage.
      config: the run's configuration.
      ema_rate: return the EMA of this rate, one of model.ema_rates, as `ema_params`; 0: the main one.

    Raises:
      InputError: nothing there, damaged, another network, or no such EMA; the message names what differs.
    """
    path = resolve(path)  # once: a run in progress may save another snapshot meanwhile
    metadata, k = read_metadata(path), config.training.reflow_t
    wanted = make_metadata(config, "", [1, 0])
    _check_same_network(path, metadata, wanted, "choose another checkpoint or the configuration it was trained with")
    if metadata["k"] not in (1, k):
        raise InputError(
            f"{path} has {metadata['k']} time-embedding heads, this run has k = {k}; set training.reflow_t to "
            f"{metadata['k']} or choose a checkpoint with one head"
        )
    weights, _ = restore(path, ema_rate=ema_rate)
    with exported.damage_named(f"{path}: {_DAMAGED}"):
        shapes = models.weight_shapes(models.create_model(config).clone(heads=metadata["k"]))
    for name in TREES:
        _check_shapes(f"{path}: {name}", getattr(weights, name), shapes)
    trees = {name: models.expand_heads(getattr(weights, name), k) for name in TREES}
    return dataclasses.replace(weights, **trees)


def own_config(metadata: dict[str, Any]) -> ml_collections.ConfigDict:
    """The configuration of the network that `metadata` describes, for `load_weights` and `models.create_model`."""
    network = {key: metadata[key] for key in ("data", "model")}
    return ml_collections.ConfigDict({**network, "training": {"reflow_t": metadata["k"]}})


def _check_same_network(path, saved: dict, wanted: dict, remedy: str):
    network = models.network_identity(ml_collections.ConfigDict({key: saved[key] for key in ("data", "model")}))
    network = json.loads(json.dumps(network))
    for section, settings in network.items():
        for name, value in settings.items():
            if value != wanted[section][name]:
                raise InputError(
                    f"{path} holds a network with {section}.{name} = {value}, the configuration has "
                    f"{wanted[section][name]}; {remedy}"
                )


def _check_shapes(what: str, tree, shapes):
    leaves = flax.traverse_util.flatten_dict(tree)
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    for path in sorted(shapes.keys() | found.keys()):
        if found.get(path) != shapes.get(path):
            raise InputError(
                f"{what}/{'/'.join(path)} has shape {found.get(path, 'none: it is missing')}, the network's is "
                f"{shapes.get(path, 'none')}; convert or train it again"
            )
        if leaves[path].dtype != np.float32:
            raise InputError(f"{what}/{'/'.join(path)} has dtype {leaves[path].dtype}, the network's is float32")


def restore(path: epath.PathLike, *, ema_rate: float = 0.0) -> tuple[models.Weights, dict]:
    """The weights at `path`, with their own number of heads, and their metadata. `ema_rate` as in `load_weights`."""
    path = resolve(path)
    metadata = read_metadata(path)
    tree = {} if path.is_file() else _read_state(path)
    if ema_rate and ema_name(ema_rate) not in (kept := tree.get("extra_ema", {})):
        rates = ", ".join(kept) or "none"
        raise InputError(f"{path} has no EMA of rate {ema_rate} beside the main one, its others are: {rates}")
    if path.is_file():
        return exported.read_weights(path, metadata), metadata
    with exported.damage_named(f"{path}: {_DAMAGED}"):
        adam = tree["opt_state"]["1"]  # of the chain clipping, Adam, rate (`train_step.optimizer`)
        weights = models.Weights(
            params=tree["params"],
            ema_params=tree["extra_ema"][ema_name(ema_rate)] if ema_rate else tree["ema_params"],
            mu=adam["mu"],
            nu=adam["nu"],
            count=int(adam["count"]),
            step=int(tree["step"]),
        )
    return weights, metadata


def resolve(path: epath.PathLike) -> epath.Path:
    """The exported file or the checkpoint folder that `path` stands for, see `load_weights`.

    Raises:
      InputError: there is none, or more than one.
    """
    path = epath.Path(path)
    try:
        with os_errors():
            is_there = path.exists()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not is_there:
        raise InputError(f"no checkpoint at {path}")
    if (file := exported.find(path)) is not None:
        return file
    if (path / "state").is_dir():
        return path
    if path.name == "checkpoints":
        path = path.parent
    trained = [path] if steps_in(path) else sorted(folder for folder in path.iterdir() if steps_in(folder))
    if len(trained) > 1:
        raise InputError(f"{path} holds several stages; name one, for example {trained[0]}")
    if not trained:
        raise InputError(f"{path} holds no checkpoint: looked for checkpoints/<step> in it and in its folders")
    return trained[0] / "checkpoints" / str(steps_in(trained[0])[-1])


def export_file(
    path: epath.PathLike,
    weights: models.Weights,
    config: ml_collections.ConfigDict,
    boundaries: segments.TimesLike | None = None,
    teacher: str | None = None,
) -> None:
    """Writes weights, EMA and Adam moments as one safetensors file that `load_weights` reads without torch.

    Args:
      path: local or remote. A local file is written array by array, a remote one needs its size in memory twice.
      boundaries: of the segments that the weights were trained on; None: k = training.reflow_t uniform segments.
      teacher: as in `make_metadata`.
    """
    if boundaries is None:
        boundaries = np.linspace(1, 0, (config.training.reflow_t if "training" in config else 1) + 1)
    exported.write_file(path, weights, make_metadata(config, "exported", boundaries, teacher=teacher))


def log_source(name: str, weights: models.Weights, *, centered: bool):
    """Logs which weights a stage starts from, and the range of the images that the network is given."""
    size = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    images = "[-1, 1]" if centered else "[0, 1]"
    logger.info("starting from %s: %s parameters, update %d, images in %s", name, f"{size:,}", weights.step, images)


TORCH_METADATA = {"stage": "1_rf", "k": 1, "boundaries": [1.0, 0.0]}  # a PyTorch checkpoint is a 1-RF


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that a job starts from or evaluates, not loaded yet.

    Attributes:
      name: its path, down to the step of a run or the file of an exported model.
      metadata: `make_metadata`: stage, k, boundaries, teacher.
      load: () -> `models.Weights` with the run's number of heads.
    """

    name: str
    metadata: dict[str, Any]
    load: Callable[[], models.Weights]

    @property
    def boundaries(self) -> Float[np.ndarray, "boundaries"]:
        """[k + 1] in t, of the segments that the weights were trained on."""
        return segments.validate_boundaries(self.metadata["boundaries"])


def checkpoint_at(path: epath.PathLike, config: ml_collections.ConfigDict, ema_rate: float = 0.0) -> CheckpointRef:
    """The checkpoint at `path`: a PyTorch file (.pth, .pt), or what `load_weights` takes.

    Args:
      ema_rate: the EMA to load, one of model.ema_rates; 0: the main one.

    Raises:
      InputError: there is none.
    """
    if str(path).endswith((".pth", ".pt")):
        return CheckpointRef(str(path), TORCH_METADATA, lambda: models.import_torch(path, config))
    path = resolve(path)  # once: a run in progress may save another snapshot meanwhile
    load = functools.partial(load_weights, path, config, ema_rate=ema_rate)
    return CheckpointRef(str(path), read_metadata(path), load)
