"""PyTorch rectified-flow checkpoints, in both directions. The format is in docs/method.md, section 10.

A checkpoint is untrusted input: nothing in it is executed, and every name and shape is checked against the
configuration before anything of its size is allocated. torch is imported only when one of the two functions runs.
"""

import dataclasses
import logging
import math
import re
from collections import OrderedDict

import numpy as np
from etils import epath
from flax import traverse_util

from models.factory import expand_heads
from models.ncsnpp import NCSNpp, sigma_table
from models.pytorch import file as torch_file
from models.pytorch.layout import Entries, Entry, entries_of
from models.weights import Weights
from utils import InputError, atomic_path, needed

logger = logging.getLogger("seqrf")

PREFIX = "module."
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)*")  # of DataParallel and torch.compile, in any order
MOST_SIGMAS = 100_000  # public checkpoints have 1,000


def read_weights(path: epath.PathLike, network: NCSNpp) -> Weights:
    """The PyTorch checkpoint at `path` for `network`, as NumPy arrays; its one head is copied to k.

    Without an `optimizer` part, or with an empty one, the moments are zeros, the count is 0 and a warning is logged.

    Raises:
      InputError: not a checkpoint, truncated, with code in it, a key missing, a wrong shape, a number that is not
        finite, an EMA or an optimiser that does not fit, or another configuration's. One line that names the first
        thing wrong.
    """
    path = epath.Path(path)
    with torch_file.errors_named(f"PyTorch checkpoint {path}"):
        return _weights(_opened(path), network, path.stat().length)


def _weights(file: dict, model: NCSNpp, size: int) -> Weights:
    entries = entries_of(model)
    state = _state_dict(file, entries, model)
    shadow = _shadow_params(file["ema"], entries)
    count, mu, nu = _adam_state(file.get("optimizer"), entries)
    torch_file.check_numbers({"model": state, "ema": shadow, "exp_avg": mu, "exp_avg_sq": nu}, size)
    extras = {
        "sigmas": np.array(state["sigmas"].numpy()),
        "ema_decay": np.array(_number("ema['decay']", file["ema"].get("decay"))),
    }
    if file["ema"].get("num_updates") is not None:
        extras["ema_num_updates"] = np.array(_count("ema['num_updates']", file["ema"]["num_updates"]))

    def tree(tensors: dict):
        leaves = {
            entry.path: entry.to_flax(tensors[entry.name].numpy())
            if entry.name in tensors
            else np.zeros(entry.flax_shape, np.float32)
            for entry in entries
        }
        return expand_heads(traverse_util.unflatten_dict(leaves), model.heads)

    # The EMA leaves out what is not trained.
    return Weights(
        params=tree(state),
        ema_params=tree(state | shadow),
        mu=tree(mu),
        nu=tree(nu),
        count=count,
        step=_count("step", file["step"]),
        extras=extras,
    )


def _opened(path) -> dict:
    """The dict in the file."""
    file = torch_file.load(path)
    if not isinstance(file, dict):
        raise InputError(f"holds a {type(file).__name__}, not the dict of a training run")
    for key in ("model", "ema", "step"):
        if key not in file:
            raise InputError(f"misses {key!r}")
    return file


def _state_dict(file: dict, entries: Entries, model: NCSNpp) -> dict:
    """The tensors of the network by name, without the prefix, once they are known to be this configuration's."""
    keys = _keys(file["model"])
    state = {name: file["model"][key] for name, key in keys.items()}
    wanted = {entry.name: entry.shape for entry in entries}
    # What is missing is named as the file would name it.
    prefix = PREFIX if not keys or any(key.startswith(PREFIX) for key in keys.values()) else ""
    for name in ("sigmas", *wanted):
        if name not in state:
            raise InputError(f"misses model[{prefix + name!r}], which this configuration needs")
        state[name] = torch_file.dense(f"model[{keys[name]!r}]", state[name], wanted.get(name))
    if surplus := [key for name, key in keys.items() if name not in ("sigmas", *wanted)]:
        raise InputError(f"has model[{surplus[0]!r}], which this configuration has not")
    _check_sigmas(f"model[{keys['sigmas']!r}]", state["sigmas"], model)
    return state


def _keys(part) -> dict[str, str]:
    """The keys of a state dict by the names they have without the prefix."""
    if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
        raise InputError("'model' is not a state dict")
    keys: dict[str, str] = {}
    for key in part:
        if (other := keys.setdefault(_WRAPPERS.sub("", key), key)) != key:
            raise InputError(f"has both model[{other!r}] and model[{key!r}]")
    return keys


def _check_sigmas(name: str, sigmas, model: NCSNpp):
    if sigmas.ndim != 1 or not 0 < len(sigmas) <= MOST_SIGMAS:
        raise InputError(f"{name} has shape {tuple(sigmas.shape)}: not a list of up to {MOST_SIGMAS:,} noise levels")
    sigmas, table = sigmas.numpy(), sigma_table(model.sigma_min, model.sigma_max)
    if not model.scale_by_sigma or (sigmas.shape == table.shape and np.allclose(sigmas, table, rtol=1e-4)):
        return
    difference = (
        f"it has {sigmas.size} noise levels from {sigmas[0]:g} to {sigmas[-1]:g}, config.model.sigma_max and sigma_min "
        f"mean {table.size} from {table[0]:g} to {table[-1]:g}"
    )
    if model.uses_sigma_table:
        raise InputError(f"belongs to another configuration: {difference}")
    # The outputs do not depend on them, but they tell the public checkpoints of one network apart: 380 is LSUN church.
    logger.warning("the checkpoint may be of another data set than the configuration: %s", difference)


def _shadow_params(ema, entries: Entries) -> dict:
    """The EMA's tensors by name."""
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, list | tuple):
        raise InputError("misses ema['shadow_params']")
    trainable = [entry for entry in entries if entry.trainable]
    if len(shadow) != len(trainable):
        raise InputError(f"ema['shadow_params'] has {len(shadow)} tensors, this configuration trains {len(trainable)}")
    return {
        entry.name: torch_file.dense(f"ema['shadow_params'][{i}] ({entry.name})", tensor, entry.shape)
        for i, (entry, tensor) in enumerate(zip(trainable, shadow, strict=True))
    }


def _adam_state(optimizer, entries: Entries) -> tuple[int, dict, dict]:
    """Adam's count and both moments by name; (0, {}, {}) and a line in the log if the file has none."""
    state = optimizer.get("state") if isinstance(optimizer, dict) else optimizer
    if state is None or (isinstance(state, dict | list) and not state):
        logger.warning("the checkpoint has no optimiser state: Adam's moments start at zero")
        return 0, {}, {}
    if not isinstance(state, dict):
        raise InputError("optimizer['state'] is not a dict")
    counts, mu, nu = set(), {}, {}
    for index, entry in _adam_order(state, optimizer, entries):
        where = f"optimizer['state'][{index}]"
        slot = state[index]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if not isinstance(slot, dict) or key not in slot:
                raise InputError(f"misses {where}[{key!r}] ({entry.name})")
        counts.add(_count(f"{where}['step']", slot["step"]))
        mu[entry.name] = torch_file.dense(f"{where}['exp_avg'] ({entry.name})", slot["exp_avg"], entry.shape)
        nu[entry.name] = torch_file.dense(f"{where}['exp_avg_sq'] ({entry.name})", slot["exp_avg_sq"], entry.shape)
    if len(counts) != 1:
        raise InputError(
            f"optimizer['state'] has weights after {min(counts)} and after {max(counts)} updates; one count fits all"
        )
    return counts.pop(), mu, nu


def _adam_order(state: dict, optimizer: dict, entries: Entries) -> list[tuple[int, Entry]]:
    """Which number of `state` belongs to which weight.

    Adam numbers what it was given, in the order of its groups, and keeps state only for what had a gradient. The public
    trainer gives it the Fourier frequencies too, so the numbers of `state` may start at 1.
    """
    trainable = tuple(entry for entry in entries if entry.trainable)
    try:
        given = [index for group in optimizer["param_groups"] for index in group["params"]]
    except (LookupError, TypeError) as error:
        raise InputError("misses optimizer['param_groups']") from error
    if not all(isinstance(index, int) for index in given) or len(set(given)) < len(given):
        raise InputError("optimizer['param_groups'] does not number every weight once")
    named = next((some for some in (entries, trainable) if len(some) == len(given)), None)
    if named is None:
        raise InputError(f"optimizer has {len(given)} weights, this configuration trains {len(trainable)}")
    order = [(i, entry) for i, entry in zip(given, named, strict=True) if entry.trainable]
    for index, entry in order:
        if index not in state and not entry.idle:
            raise InputError(f"misses optimizer['state'][{index}] ({entry.name})")
    return [(index, entry) for index, entry in order if index in state]


def _number(name: str, value) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name} is not a number") from error
    if not math.isfinite(number):
        raise InputError(f"{name} is not a number")
    return number


def _count(name: str, value) -> int:
    number = _number(name, value)
    if not number.is_integer() or not 0 <= number < 2**31:
        raise InputError(f"{name} = {number:g} is not a number of updates")
    return int(number)


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """What the public trainer keeps beside the tensors: Adam's settings and the EMA's decay."""

    lr: float = 2e-4
    beta1: float = 0.9
    eps: float = 1e-8
    ema_rate: float = 0.9999


def write_weights(
    path: epath.PathLike, weights: Weights, network: NCSNpp, settings: TrainerSettings = TrainerSettings()
) -> None:
    """Writes `weights` (k = 1) in PyTorch's format: the inverse of `read_weights`, bit for bit in every tensor.

    The EMA's decay and count are those of the file that the weights were imported from, else `settings.ema_rate` and
    `weights.step`.

    Raises:
      InputError: more than one head, or weights of another network.
    """
    torch = needed("torch", "a PyTorch checkpoint")

    entries = entries_of(network)
    params = _exported(weights.params, entries)
    ema = _exported(weights.ema_params, entries)
    extras = weights.extras
    sigmas = extras.get("sigmas", sigma_table(network.sigma_min, network.sigma_max))
    state = OrderedDict({f"{PREFIX}sigmas": torch.tensor(np.asarray(sigmas))})
    state.update((PREFIX + name, tensor) for name, tensor in params.items())
    shadow = {
        "decay": float(extras.get("ema_decay", settings.ema_rate)),
        "num_updates": int(extras.get("ema_num_updates", weights.step)),
        "shadow_params": [ema[entry.name] for entry in entries if entry.trainable],
    }
    optimizer = _adam(weights, settings, entries)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        torch.save({"optimizer": optimizer, "model": state, "ema": shadow, "step": int(weights.step)}, stream)


def _exported(tree, entries: Entries) -> dict:
    """Tensors by name."""
    torch = needed("torch", "a PyTorch checkpoint")

    leaves = traverse_util.flatten_dict(tree)
    heads = {leaf.shape[0] for path, leaf in leaves.items() if path[-1].startswith("head_")}
    if heads - {1}:
        raise InputError(f"a PyTorch checkpoint has one time-embedding head, these weights have {max(heads)}")
    if {path: tuple(leaf.shape) for path, leaf in leaves.items()} != {e.path: e.flax_shape for e in entries}:
        raise InputError("these weights are not of the configuration's network")
    return {entry.name: torch.from_numpy(entry.to_torch(np.asarray(leaves[entry.path]))) for entry in entries}


def _adam(weights: Weights, settings: TrainerSettings, entries: Entries) -> dict:
    """The optimiser's part, with the numbering of the public trainer: every weight is counted, trained or not."""
    torch = needed("torch", "a PyTorch checkpoint")

    adam = torch.optim.Adam([torch.zeros(1)], lr=settings.lr, betas=(settings.beta1, 0.999), eps=settings.eps)
    group = adam.state_dict()["param_groups"][0] | {"params": list(range(len(entries)))}
    if not int(weights.count):
        return {"state": {}, "param_groups": [group]}
    mu, nu = _exported(weights.mu, entries), _exported(weights.nu, entries)
    state = {
        index: {
            "step": torch.tensor(float(weights.count)),
            "exp_avg": mu[entry.name],
            "exp_avg_sq": nu[entry.name],
        }
        for index, entry in enumerate(entries)
        if entry.trainable and not entry.idle
    }
    return {"state": state, "param_groups": [group]}
