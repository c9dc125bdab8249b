"""The weights of a network: what every checkpoint holds and every job is given."""

import hashlib
from typing import Any

import flax
import jax
import numpy as np

TREES = ("params", "ema_params", "mu", "nu")  # of `Weights`


def ema_name(rate: float) -> str:
    """The key of an EMA rate in `TrainState.extra_ema`; `float` of it is the rate again."""
    return repr(float(rate))


@flax.struct.dataclass
class Weights:
    """The content of a checkpoint, SeqRF's or PyTorch's: weights, EMA, Adam's state.

    A stage that starts from another stage's weights counts its updates, and so its warm-up, from 0. Adam's
    moments are kept together with Adam's own count, which corrects their bias towards the zeros that they once started
    from: a count of 0 beside warm moments would multiply the first moment by 1 / (1 - 0.9) = 10 and the second by
    1 / (1 - 0.999) = 1000 in the first update.

    Attributes:
      params, ema_params: trees for `create_model(config).apply`.
      mu, nu: Adam's first and second moments, trees like `params`; zeros where there are none.
      count: the updates that Adam's moments have seen.
      step: the updates that the run counted.
      extras: entries of PyTorch's format alone, kept for `export_torch`, as arrays by name: "sigmas" [levels] float64,
        "ema_decay", "ema_num_updates". Empty for weights that were not imported.
    """

    params: Any
    ema_params: Any
    mu: Any
    nu: Any
    count: int
    step: int
    extras: dict = flax.struct.field(default_factory=dict)


def fingerprint(params: Any) -> str:
    """16 hexadecimal digits that tell one tree of weights from another, by names, shapes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.data)
    return digest.hexdigest()[:16]


def start_fingerprint(weights: Weights) -> str:
    """The `fingerprint` of all that a stage takes over from what it starts from: weights, EMA and Adam's moments."""
    return fingerprint({name: getattr(weights, name) for name in (*TREES, "count", "step")})
