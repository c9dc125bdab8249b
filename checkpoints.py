"""Our checkpoints: a run's folders (orbax) and single exported files (safetensors), written whole or not at all.

A run keeps `checkpoints/<step>/` for good and `checkpoints-meta/<step>/` only to resume from; both hold
`state` (a `losses.TrainState` as nested dicts of arrays) and `info` (what the network is, see `describe`). Reading
never unpickles.
"""

import contextlib
import json
import logging
import os
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

import models
from utils import InputError, atomic_path, is_local

logger = logging.getLogger("seqrf")

_TREES = ("params", "ema_params", "mu", "nu")
_LONGEST_HEADER = 100_000_000  # of an exported file, as safetensors has it
_NOT_OURS = "is not a file that SeqRF exported (PyTorch checkpoints go to training.import_torch)"

STAGES = ("1_rf", "2_rf", "2_distill")
# The settings that make two networks different networks.
ARCHITECTURE = {
    "data": ("image_size", "num_channels", "centered"),
    "model": [
        "nf",
        "ch_mult",
        "num_res_blocks",
        "attn_resolutions",
        "embedding_type",
        "fourier_scale",
        "conditional",
        "resblock_type",
        "resamp_with_conv",
        "fir",
        "fir_kernel",
        "skip_rescale",
        "progressive",
        "progressive_input",
        "progressive_combine",
        "nonlinearity",
        "scale_by_sigma",
        "sigma_min",
        "sigma_max",
    ],
}


def describe(config, stage: str, boundaries, *, source: str = "", teacher: str | None = None) -> dict[str, Any]:
    """What is written beside a state: the stage, the network's settings, its segments and what it learned from.

    Args:
      boundaries: k + 1 times, from 1 to 0.
      source: where the starting weights came from.
      teacher: the fingerprint of the model that made the pairs; None where there are none.
    """
    settings = {section: {key: config[section][key] for key in keys} for section, keys in ARCHITECTURE.items()}
    if not models.create_model(config).uses_sigma_table:
        settings["model"] |= {"sigma_min": None, "sigma_max": None}  # networks that differ only there are the same
    learned = {"stage": stage, "source": source, "teacher": teacher}
    segmented = {"k": len(boundaries) - 1, "boundaries": [float(b) for b in boundaries]}
    # Through JSON and back: tuples become lists, as they will be when read.
    return json.loads(json.dumps({**learned, **segmented, **settings}))


class RunCheckpoints:
    """The checkpoints of one stage of one run: kept ones, and the latest to resume from. Saves in the background."""

    def __init__(self, stage_folder):
        """Opens (and makes) `<stage_folder>/checkpoints` and `checkpoints-meta`."""
        folder = epath.Path(stage_folder)
        self._kept = _manager(folder / "checkpoints", max_to_keep=None)
        self._latest = _manager(folder / "checkpoints-meta", max_to_keep=1)

    def save(self, state, info: dict, *, keep: bool):
        """Saves an unreplicated `losses.TrainState`: for good, or (`keep=False`) as the one to resume from."""
        manager = self._kept if keep else self._latest
        step = int(state.step)
        if step in manager.all_steps():
            return
        tree = jax.device_get(flax.serialization.to_state_dict(state))
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(tree), info=ocp.args.JsonSave(info))
        manager.save(step, args=arguments)

    def latest_step(self) -> int | None:
        """The step that `resume` would go on from; None for a new run."""
        steps = [step for manager in (self._kept, self._latest) if (step := manager.latest_step()) is not None]
        return max(steps, default=None)

    def resume(self, like, info: dict):
        """The latest state, shaped as `like`, or None for a new run.

        Raises:
          InputError: the folder holds another network, other segments or another optimiser than `like`.
        """
        step = self.latest_step()
        if step is None:
            return None
        manager = self._kept if self._kept.latest_step() == step else self._latest
        folder = epath.Path(manager.directory) / str(step)
        saved = _read_info(folder)
        for key in ("stage", "k", "boundaries", "teacher"):
            if saved[key] != info[key] and None not in (saved[key], info[key]):
                raise InputError(
                    f"{folder} was trained with {key} = {saved[key]}, this run says {info[key]}; "
                    "use another --workdir or the same settings"
                )
        _refuse_other_network(folder, saved, info, "use another --workdir or the same settings")
        tree = _read_state(folder)
        try:
            state = flax.serialization.from_state_dict(like, tree)
        except (ValueError, KeyError) as error:
            raise InputError(f"{folder} does not fit this run: {error}".replace("\n", " ")) from error
        return jax.tree.map(lambda a, b: np.asarray(b).astype(a.dtype).reshape(a.shape), like, state)

    def close(self):
        """Waits for the saves under way."""
        for manager in (self._kept, self._latest):
            manager.wait_until_finished()
            manager.close()


def _manager(folder, max_to_keep):
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=jax.process_index() == 0)
    return ocp.CheckpointManager(_absolute(folder), options=options)


def _absolute(path):
    """`path` as orbax asks for it: from the root. A remote one is; `absolute` would put it below the current folder."""
    path = epath.Path(path)
    return path.absolute() if is_local(path) else path


def _read_state(folder) -> dict:
    """The state of one checkpoint folder as nested dicts of NumPy arrays."""
    folder = _absolute(folder)
    with _damage_named(f"{folder} is not a whole checkpoint of ours"):
        tree = ocp.PyTreeCheckpointer().restore(folder / "state")
        tree["opt_state"]["0"] = {}  # clipping has no state, which orbax writes as nothing
        return tree


def _read_info(folder) -> dict:
    folder = _absolute(folder)
    with _damage_named(f"{folder} is not a whole checkpoint of ours"):
        return _complete(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "info"))


def _complete(info: dict) -> dict:
    """`info` with None for what versions before this one did not write; raises ValueError where more is missing."""
    for key, kind in {"stage": str, "k": int, "boundaries": list, **dict.fromkeys(ARCHITECTURE, dict)}.items():
        if not isinstance(info.get(key), kind):
            raise ValueError(f"its description lacks {key!r}")
    if len(info["boundaries"]) != info["k"] + 1:
        raise ValueError(f"its description has k = {info['k']} and {len(info['boundaries'])} boundaries")
    return {"source": None, "teacher": None, **info}


@contextlib.contextmanager
def _damage_named(what: str):
    try:
        yield
    except Exception as error:
        # orbax, tensorstore, safetensors and the JSON reader each raise what they like for damaged files.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{what}: {reason[:200]}") from error


def steps_in(stage_folder) -> list[int]:
    """The kept checkpoints of a stage, ascending; empty if there is none."""
    folder = epath.Path(stage_folder) / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def info_of(path) -> dict[str, Any]:
    """What was noted beside the weights at `path` (all that `load_weights` takes): `describe`. No array is read.

    "source" and "teacher" are None where an older version wrote it.

    Raises:
      InputError: nothing there, or damaged.
    """
    path = _found(path)
    return _file_info(path) if path.is_file() else _read_info(path)


def load_weights(path, config) -> models.Weights:
    """The weights at `path`, for `models.create_model(config)`: one head is copied to k = training.reflow_t.

    Args:
      path: an exported file (`export_file`), a checkpoint folder `.../checkpoints/<step>`, a stage's folder (its last
        checkpoint), or a workdir that holds one trained stage.
      config: the run's configuration.

    Raises:
      InputError: nothing there, damaged, or another network; the message names the first setting that differs.
    """
    path = _found(path)  # once: a run that goes on may keep another checkpoint meanwhile
    info, k = info_of(path), config.training.reflow_t
    wanted = describe(config, "", [1, 0])
    _refuse_other_network(path, info, wanted, "choose another checkpoint or the configuration it was trained with")
    if info["k"] not in (1, k):
        raise InputError(
            f"{path} has {info['k']} time-embedding heads, this run has k = {k}; set training.reflow_t to "
            f"{info['k']} or choose a checkpoint with one head"
        )
    weights, _ = load_with_info(path)
    shapes = models.weight_shapes(models.create_model(config).clone(heads=info["k"]))
    for name in _TREES:
        _check_shapes(f"{path}: {name}", getattr(weights, name), shapes)
    return weights.replace(**{name: models.expand_heads(getattr(weights, name), k) for name in _TREES})


def _refuse_other_network(path, info: dict, wanted: dict, remedy: str):
    for section, keys in ARCHITECTURE.items():
        for key in keys:
            asked = wanted[section][key]
            if key not in info[section] and asked is not None:
                raise InputError(
                    f"{path} does not say its network's {section}.{key}, which older versions did not note and the "
                    f"configuration has at {asked}; {remedy}"
                )
            if info[section].get(key) != asked:
                raise InputError(
                    f"{path} holds a network with {section}.{key} = {info[section].get(key)}, the configuration has "
                    f"{asked}; {remedy}"
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


def load_with_info(path) -> tuple[models.Weights, dict]:
    """The weights at `path` as they are, with their own number of heads, and their `info_of`. Errors as there."""
    path = _found(path)
    info = info_of(path)
    if path.is_file():
        return _file_weights(path, info), info
    tree = _read_state(path)
    with _damage_named(f"{path} is not a whole checkpoint of ours"):
        _, adam, _ = (tree["opt_state"][place] for place in "012")  # the chain of `losses.optimizer`
        weights = models.Weights(
            params=tree["params"],
            ema_params=tree["ema_params"],
            mu=adam["mu"],
            nu=adam["nu"],
            count=int(adam["count"]),
            step=int(tree["step"]),
        )
    return weights, info


def _found(path):
    """The exported file or the checkpoint folder that `path` means."""
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"no checkpoint at {path}")
    if path.is_file() or (path / "state").is_dir():
        return path
    if path.name == "checkpoints":
        path = path.parent
    trained = [path] if steps_in(path) else [path / stage for stage in STAGES if steps_in(path / stage)]
    if len(trained) > 1:
        raise InputError(f"{path} holds several stages; name one, for example {trained[0]}")
    if not trained:
        raise InputError(f"{path} holds no checkpoint: looked for checkpoints/<step> in it and in {', '.join(STAGES)}")
    return trained[0] / "checkpoints" / str(steps_in(trained[0])[-1])


def export_file(path, weights: models.Weights, config, boundaries=None, teacher: str | None = None):
    """Writes weights, EMA and Adam moments as one safetensors file that `load_weights` reads without torch.

    Args:
      path: local or remote. A local file is written array by array, a remote one needs its size in memory twice.
      boundaries: the segments that the weights were trained on; None: k = training.reflow_t uniform ones.
      teacher: as in `describe`.
    """
    from safetensors.numpy import save, save_file

    if boundaries is None:
        boundaries = np.linspace(1, 0, (config.training.reflow_t if "training" in config else 1) + 1)
    info = describe(config, "exported", boundaries, teacher=teacher)
    trees = {name: getattr(weights, name) for name in (*_TREES, "extras")}
    arrays = {name: np.asarray(a, order="C") for name, a in flax.traverse_util.flatten_dict(trees, sep="/").items()}
    metadata = {"seqrf": json.dumps({**info, "count": int(weights.count), "step": int(weights.step)})}
    with atomic_path(path) as temporary:
        if is_local(temporary):
            temporary.touch()
            mode = os.stat(temporary).st_mode
            save_file(arrays, temporary, metadata)  # a new file, which only its owner may read
            os.chmod(temporary, mode)
        else:
            temporary.write_bytes(save(arrays, metadata))


def _file_info(path) -> dict:
    """The description in an exported file: of its header, which says how long it is, one entry."""
    with _damage_named(f"{path} {_NOT_OURS}"), path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > _LONGEST_HEADER:
            raise ValueError("it does not begin as one")
        info = json.loads(json.loads(stream.read(size))["__metadata__"]["seqrf"])
        return _complete(info)


def _file_weights(path, info: dict) -> models.Weights:
    from safetensors.numpy import load, load_file

    with _damage_named(f"{path} {_NOT_OURS}"):
        arrays = load_file(os.fspath(path)) if is_local(path) else load(path.read_bytes())
        trees = flax.traverse_util.unflatten_dict(arrays, sep="/")
        parts = {name: trees[name] for name in _TREES}
        return models.Weights(**parts, extras=trees.get("extras", {}), count=int(info["count"]), step=int(info["step"]))


def log_found(what: str, weights: models.Weights):
    """One line on the terminal: which weights a stage starts from."""
    size = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    logger.info("starting from %s: %s parameters, update %d", what, f"{size:,}", weights.step)
