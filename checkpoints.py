"""Our checkpoints: a run's folders (orbax) and single exported files (safetensors), written whole or not at all.

A run keeps `checkpoints/<step>/` for good and `checkpoints-meta/<step>/` only to resume from; both hold
`state` (a `losses.TrainState` as nested dicts of arrays) and `info` (what the network is, see `describe`). Reading
never unpickles.
"""

import contextlib
import json
import logging
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

import models
from utils import InputError, atomic_path

logger = logging.getLogger("seqrf")

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
    ],
}


def describe(config, stage: str, boundaries, source: str) -> dict[str, Any]:
    """What is written beside a state: the stage, the network's settings, its segments and where it started from."""
    settings = {section: {key: config[section][key] for key in keys} for section, keys in ARCHITECTURE.items()}
    segmented = {"k": len(boundaries) - 1, "boundaries": [float(b) for b in boundaries]}
    # Through JSON and back: tuples become lists, as they will be when read.
    return json.loads(json.dumps({"stage": stage, "source": source, **segmented, **settings}))


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
        tree, saved = _read(folder)
        for key in ("stage", "k", "boundaries", *ARCHITECTURE):
            if saved.get(key) != info[key]:
                raise InputError(
                    f"{folder} was trained with {key} = {saved.get(key)}, this run says {info[key]}; "
                    "use another --workdir or the same settings"
                )
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
    return ocp.CheckpointManager(epath.Path(folder).absolute(), options=options)


def _read(folder) -> tuple[dict, dict]:
    """(state as nested dicts of NumPy arrays, info) of one checkpoint folder."""
    folder = epath.Path(folder).absolute()
    with _damage_named(folder):
        tree = ocp.PyTreeCheckpointer().restore(folder / "state")
        tree["opt_state"]["0"] = {}  # clipping has no state, which orbax writes as nothing
    return tree, _read_info(folder)


def _read_info(folder) -> dict:
    with _damage_named(folder):
        return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "info")


@contextlib.contextmanager
def _damage_named(folder):
    try:
        yield
    except Exception as error:
        # orbax, tensorstore and the JSON reader each raise what they like for a damaged folder.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder} is not a whole checkpoint of ours: {reason[:200]}") from error


def steps_in(stage_folder) -> list[int]:
    """The kept checkpoints of a stage, ascending; empty if there is none."""
    folder = epath.Path(stage_folder) / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def boundaries_of(folder) -> list[float]:
    """The segment boundaries that the checkpoint `<stage>/checkpoints/<step>` was trained with, in t."""
    return _read_info(epath.Path(folder).absolute())["boundaries"]


def load_weights(path, config) -> models.Weights:
    """The weights at `path`, for `models.create_model(config)`: one head is copied to k = training.reflow_t.

    Args:
      path: an exported file (`export_file`), a checkpoint folder `.../checkpoints/<step>`, a stage's folder (its last
        checkpoint), or a workdir that holds one trained stage.
      config: the run's configuration.

    Raises:
      InputError: nothing there, damaged, or another network; the message names the first setting that differs.
    """
    weights, info = load_with_info(path)
    wanted = describe(config, "", [1, 0], "")
    for section, keys in ARCHITECTURE.items():
        for key in keys:
            if info[section].get(key) != wanted[section][key]:
                raise InputError(
                    f"{path} holds a network with {section}.{key} = {info[section].get(key)}, "
                    f"this run has {wanted[section][key]}; set --config.{section}.{key} or choose another checkpoint"
                )
    k = config.training.reflow_t
    if info["k"] not in (1, k):
        raise InputError(f"{path} has {info['k']} time-embedding heads, this run has k = {k}; set training.reflow_t")

    def expand(tree):
        return models.expand_heads(tree, k)

    return weights.replace(
        params=expand(weights.params),
        ema_params=expand(weights.ema_params),
        mu=expand(weights.mu),
        nu=expand(weights.nu),
    )


def load_with_info(path) -> tuple[models.Weights, dict]:
    """The weights at `path` as they are, with their own number of heads, and their `describe`. Errors as above."""
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"no checkpoint at {path}")
    if path.is_file():
        return _load_file(path)
    tree, info = _read(_checkpoint_folder(path))
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


def _checkpoint_folder(path):
    if (path / "state").is_dir():
        return path
    if path.name == "checkpoints":
        path = path.parent
    trained = [path] if steps_in(path) else [path / stage for stage in STAGES if steps_in(path / stage)]
    if len(trained) > 1:
        raise InputError(f"{path} holds several stages; name one, for example {trained[0]}")
    if not trained:
        raise InputError(f"{path} holds no checkpoint: looked for checkpoints/<step> in it and in {', '.join(STAGES)}")
    return trained[0] / "checkpoints" / str(steps_in(trained[0])[-1])


def export_file(path, weights: models.Weights, config):
    """Writes weights, EMA and Adam moments as one safetensors file that `load_weights` reads without torch."""
    from safetensors.numpy import save

    k = config.training.reflow_t if "training" in config else 1
    info = describe(config, "exported", np.linspace(1, 0, k + 1), str(path))
    trees = {name: getattr(weights, name) for name in (*_TREES, "extras")}
    arrays = {name: np.asarray(a, order="C") for name, a in flax.traverse_util.flatten_dict(trees, sep="/").items()}
    info = {**info, "count": int(weights.count), "step": int(weights.step)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(arrays, metadata={"seqrf": json.dumps(info)}))


def _load_file(path) -> tuple[models.Weights, dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            info = json.loads((file.metadata() or {})["seqrf"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        trees = flax.traverse_util.unflatten_dict(arrays, sep="/")
        count, step = info["count"], info["step"]
        return models.Weights(
            **{name: trees[name] for name in _TREES}, extras=trees.get("extras", {}), count=count, step=step
        ), info
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(
            f"{path} is not a file that SeqRF exported ({error}); PyTorch checkpoints go to training.import_torch"
        ) from error


_TREES = ("params", "ema_params", "mu", "nu")


def log_found(what: str, weights: models.Weights):
    """One line on the terminal: which weights a stage starts from."""
    size = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    logger.info("starting from %s: %s parameters, update %d", what, f"{size:,}", weights.step)
