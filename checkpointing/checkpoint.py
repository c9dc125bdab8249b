"""The one way to weights: from a path to a `CheckpointRef`, from that to `models.Weights`."""

import dataclasses
import logging
from typing import Any

import flax
import jax
import numpy as np
from etils import epath
from jaxtyping import Float

import models
import segments
from checkpointing import exported, metadata, runs
from models.pytorch import checkpoint as torch_checkpoint
from models.weights import TREES
from utils import InputError, os_errors

logger = logging.getLogger("seqrf")

TORCH_SUFFIXES = (".pth", ".pt")


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint whose weights are not loaded yet.

    Attributes:
      path: down to the step of a run, the file of an exported model, or a PyTorch file.
      metadata: `checkpointing.metadata`, without "data" and "model" for a PyTorch file.
      ema_rate: the EMA that `load` returns as `ema_params`, one of model.ema_rates; 0: the main one.
    """

    path: epath.Path
    metadata: dict[str, Any]
    ema_rate: float = 0.0

    @property
    def name(self) -> str:
        """The path, for messages and records."""
        return str(self.path)

    @property
    def stage(self) -> str:
        """The stage that made it, by its folder in a workdir."""
        return self.metadata["stage"]

    @property
    def k(self) -> int:
        """The number of segments that the weights were trained on, and of their heads."""
        return self.metadata["k"]

    @property
    def boundaries(self) -> Float[np.ndarray, "boundaries"]:
        """[k + 1] in t, of these segments."""
        return segments.validate_boundaries(self.metadata["boundaries"])

    @property
    def teacher(self) -> str | None:
        """The fingerprint of the weights that made the pairs; None where it was not trained on pairs."""
        return self.metadata.get("teacher")

    @property
    def distill_steps(self) -> int:
        """m, the Euler steps a segment that it was distilled to; else 1."""
        return metadata.distill_steps(self.stage)

    @property
    def network(self) -> models.NCSNpp:
        """The network that it describes, with its own k heads.

        Raises:
          InputError: a PyTorch file, which describes none.
        """
        if self._is_torch:
            raise InputError(f"{self.path} does not say which network it is of; import it with a configuration")
        return metadata.network_of(self.metadata)

    @property
    def _is_torch(self) -> bool:
        return self.metadata is metadata.TORCH

    def load(self, network: models.NCSNpp | None = None) -> models.Weights:
        """The weights, for `network`: one head is copied to as many as it has.

        Args:
          network: None: the checkpoint's own.

        Raises:
          InputError: damaged, another network, other heads, or no EMA of `ema_rate`; the message names what differs.
        """
        if self._is_torch:
            return torch_checkpoint.read_weights(self.path, network or self.network)
        network = network or self.network
        self._check_network(network)
        is_file = self.path.is_file()
        if is_file and self.ema_rate:
            raise InputError(
                f"{self.path} has no EMA of rate {self.ema_rate} beside the main one, its others are: none"
            )
        if is_file:
            weights = exported.read_weights(self.path, self.metadata)
        else:
            weights = runs.read_weights(self.path, self.ema_rate)
        shapes = models.weight_shapes(network.clone(heads=self.k))
        for name in TREES:
            _check_shapes(f"{self.path}: {name}", getattr(weights, name), shapes)
        trees = {name: models.expand_heads(getattr(weights, name), network.heads) for name in TREES}
        return dataclasses.replace(weights, **trees)

    def _check_network(self, network: models.NCSNpp) -> None:
        remedy = "choose another checkpoint or the configuration it was trained with"
        runs.check_same_network(self.path, self.metadata, models.network_identity(network), remedy)
        if self.k not in (1, network.heads):
            raise InputError(
                f"{self.path} has {self.k} time-embedding heads, this run has k = {network.heads}; set "
                f"training.reflow_t to {self.k} or choose a checkpoint with one head"
            )


def checkpoint_at(path: epath.PathLike, *, ema_rate: float = 0.0) -> CheckpointRef:
    """The checkpoint at `path`. Reads its metadata, no weights.

    Args:
      path: a PyTorch file (.pth, .pt), an exported model (a folder or its file), a checkpoint folder
        `.../checkpoints/<step>`, a stage's folder (its last checkpoint), or a workdir that holds one trained stage.
      ema_rate: as `CheckpointRef`.

    Raises:
      InputError: nothing there, more than one stage, or metadata that cannot be read.
    """
    path = epath.Path(path).expanduser()
    if path.suffix in TORCH_SUFFIXES:
        return torch_file(path)
    path = _resolved(path)  # once: a run in progress may save another snapshot meanwhile
    found = exported.read_metadata(path) if path.is_file() else runs.read_metadata(path)
    return CheckpointRef(path, found, ema_rate)


def torch_file(path: epath.PathLike) -> CheckpointRef:
    """The PyTorch checkpoint at `path`, whatever its name is. Nothing is read."""
    return CheckpointRef(epath.Path(path).expanduser(), metadata.TORCH)


def _resolved(path: epath.Path) -> epath.Path:
    """The exported file or the checkpoint folder that `path` stands for."""
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
    trained = [path] if runs.steps_in(path) else sorted(folder for folder in path.iterdir() if runs.steps_in(folder))
    if len(trained) > 1:
        raise InputError(f"{path} holds several stages; name one, for example {trained[0]}")
    if not trained:
        raise InputError(f"{path} holds no checkpoint: looked for checkpoints/<step> in it and in its folders")
    return trained[0] / "checkpoints" / str(runs.steps_in(trained[0])[-1])


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
        if not np.isfinite(leaves[path]).all():
            raise InputError(f"{what}/{'/'.join(path)} has values that are not finite; choose an earlier checkpoint")


def log_source(name: str, weights: models.Weights, *, centered: bool) -> None:
    """Logs which weights a job starts from, and the range of the images that the network is given."""
    size = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    images = "[-1, 1]" if centered else "[0, 1]"
    logger.info("starting from %s: %s parameters, update %d, images in %s", name, f"{size:,}", weights.step, images)
