"""Exported models: one safetensors file, or a folder with it, a config.json and a README.md, as model hubs expect them.

The file holds the trees of `models.Weights`, or the EMA's alone, and in its header's entry `seqrf` all that is needed
to use them (`checkpointing.metadata`). Whoever made it is a stranger: nothing is unpickled, no path is read
from it and nothing is allocated before it is checked. The format is in docs/method.md, section 9.
"""

import json
import os
from typing import Any, TypedDict

import flax
import jax
import numpy as np
from etils import epath

import models
import segments
import utils
from checkpointing.metadata import checked_metadata
from models.weights import TREES
from utils import InputError, atomic_path, damage_named, is_local, write_json

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_LARGEST_IMAGE = 4_096  # pixels of a side
_NOT_EXPORTED = "is not a file that SeqRF exported (PyTorch checkpoints go to training.import_torch)"
_Header = TypedDict("_Header", {"__metadata__": dict[str, str]})


def find(path: epath.Path) -> epath.Path | None:
    """The exported file that `path` is, or that it holds as a folder; None: neither."""
    return next((file for file in (path, path / WEIGHTS) if file.is_file()), None)


def write_file(path: epath.PathLike, weights: models.Weights, metadata: dict[str, Any], *, full: bool = True) -> None:
    """Writes one safetensors file that `read_weights` reads.

    Args:
      path: local or remote. A local file is written array by array, a remote one needs its size in memory twice.
      metadata: `checkpointing.metadata`.
      full: with raw weights, Adam's moments and extras; else the EMA alone.
    """
    from safetensors.numpy import save, save_file

    names = (*TREES, "extras") if full else ("ema_params",)
    trees = {name: getattr(weights, name) for name in names}
    arrays = {name: np.asarray(a, order="C") for name, a in flax.traverse_util.flatten_dict(trees, sep="/").items()}
    header = {"seqrf": json.dumps(_with_counts(metadata, weights, full))}
    with atomic_path(path) as temporary:
        if is_local(temporary):
            temporary.touch()
            mode = os.stat(temporary).st_mode
            save_file(arrays, temporary, header)  # which makes a file that only its owner may read
            os.chmod(temporary, mode)
        else:
            temporary.write_bytes(save(arrays, header))


def write_folder(
    folder: epath.PathLike,
    weights: models.Weights,
    metadata: dict[str, Any],
    *,
    full: bool = False,
    samplers: list[dict[str, Any]] | None = None,
) -> None:
    """Writes `folder`/model.safetensors and a config.json that says what it is to people and other programs.

    Args:
      metadata, full: as `write_file`.
      samplers: recommended ones, as keywords of `sampler.TrainedSampler.sample`.
    """
    folder, size = epath.Path(folder), metadata["data"]["image_size"]
    described = {
        "library_name": "seqrf",
        **_with_counts(metadata, weights, full),
        "image_shape": [size, size, metadata["data"]["num_channels"]],
        "data_range": [-1.0 if metadata["data"]["centered"] else 0.0, 1.0],
        "clock": {
            "t": "1: noise, 0: data",
            "tau": "eps + (1 - eps) (1 - t)",
            "eps": segments.EPS,
            "label": f"{segments.LABEL_SCALE:g} tau",
            "velocity": "dx/dtau",
        },
        "samplers": samplers or [],
    }
    (folder / CONFIG).unlink(missing_ok=True)  # never beside weights that it does not describe
    write_file(folder / WEIGHTS, weights, metadata, full=full)
    write_json(folder / CONFIG, described)


def _with_counts(metadata: dict[str, Any], weights: models.Weights, full: bool) -> dict[str, Any]:
    return {**metadata, "count": int(weights.count) if full else 0, "step": int(weights.step)}


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """The metadata of an exported file, in its header, which begins with its length. Reads no array.

    Raises:
      InputError: not an exported model, a corrupt one, out-of-range metadata, or a config.json that disagrees.
    """
    with damage_named(f"{path} {_NOT_EXPORTED}"), utils.open_plain(path) as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = utils.parse_json(stream.read(min(size, utils.MOST_JSON + 1)), _Header)
        metadata = checked_metadata(utils.parse_json(header["__metadata__"]["seqrf"]))
        _check_sizes(metadata, arrays=len(header) - 1)
    if path.name == WEIGHTS:
        _check_config(path.parent / CONFIG, metadata)
    return metadata


def _check_config(path: epath.Path, metadata: dict[str, Any]) -> None:
    """Raises InputError where the config.json beside an exported file is damaged or describes another model."""
    described = utils.read_json(path, dict[str, Any], metadata)
    for name, value in metadata.items():
        if described.get(name) != value:
            raise InputError(
                f"{path} has {name} = {str(described.get(name))[:60]}, {WEIGHTS} {str(value)[:60]}; export the model "
                "again"
            )


def _check_sizes(metadata: dict[str, Any], *, arrays: int) -> None:
    """Raises ValueError where counts do not fit an int32, or the network is larger than what the file holds.

    The network is traced and images are allocated before one of its arrays would be missing.
    """
    for name in ("count", "step"):
        if not isinstance(metadata.get(name), int) or not 0 <= metadata[name] < 2**31:
            raise ValueError(f"its metadata has {name} = {metadata.get(name)}")
    data, model = metadata["data"], metadata["model"]
    if data.get("image_size", 0) > _LARGEST_IMAGE:
        raise ValueError(f"its metadata has images of {data['image_size']} x {data['image_size']} pixels")
    blocks = len(model.get("ch_mult") or ()) * (model.get("num_res_blocks") or 0)
    if blocks > arrays:
        raise ValueError(f"its metadata describes {blocks} residual blocks, it has {arrays} arrays")


def read_weights(path: epath.Path, metadata: dict[str, Any]) -> models.Weights:
    """The weights of an exported file; where it holds the EMA alone, with raw weights equal to it and zero moments.

    Raises:
      InputError: a damaged file.
    """
    from safetensors.numpy import load, load_file

    with damage_named(f"{path} {_NOT_EXPORTED}"):
        arrays = load_file(os.fspath(path)) if is_local(path) else load(path.read_bytes())
        trees = flax.traverse_util.unflatten_dict(arrays, sep="/")
        if trees.keys() == {"ema_params"}:
            ema = trees["ema_params"]
            zeros = jax.tree.map(np.zeros_like, ema)
            trees = {"params": ema, "ema_params": ema, "mu": zeros, "nu": zeros}
        return models.Weights(
            **{name: trees[name] for name in TREES},
            extras=trees.get("extras", {}),
            count=metadata["count"],
            step=metadata["step"],
        )
