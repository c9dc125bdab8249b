"""Which settings a run may change when it is resumed: those that cannot change its result."""

from collections.abc import Callable
from typing import Any

import ml_collections

from configs.default import get_default_config
from utils import InputError

COMPARED = ("seed", "data", "model", "training", "optim")
FREE = frozenset(
    [
        # where files are
        "data.data_dir", "training.lpips_path", "training.lpips_heads",
        # how often something is logged, saved or drawn, and how a stop is handled
        "training.log_freq", "training.snapshot_freq", "training.snapshot_freq_for_preemption",
        "training.snapshot_sampling", "training.snapshot_fid_sample", "training.keep_snapshots", "training.nan_policy",
        "training.override_resume", "training.n_jitted_steps", "training.profile",
        # the sampler's
        "model.num_scales",
        # of the pairs, whose manifest says what they are; the mode is the stage
        "training.reflow_mode", "training.n_reflow_data", "training.gen_reflow_size", "training.reflow_file_size",
        "training.reflow_dtype", "training.reflow_store_noise", "training.reflow_pairs", "training.inverted_pairs",
        "training.gen_worker",
    ]
)  # fmt: skip
START = {"training.import_torch", "training.import_flax"}  # paths, of the same weights or of others


def check_resume(
    saved: dict[str, Any], config: ml_collections.ConfigDict, stage_folder, starts_alike: Callable[[], bool]
) -> None:
    """Checks that a stage goes on with the settings that it was begun with; `saved` is the configuration then.

    A setting that a later version has introduced had its default. The number of updates may change where the learning
    rate does not depend on it.

    Args:
      starts_alike: whether `config` means the weights that the stage began with; asked where it names them otherwise.

    Raises:
      InputError: settings differ, unless `training.override_resume`; it names them and both values.
    """
    free = FREE | ({"training.n_iters"} if config.optim.schedule == "constant" else set())
    before, now = (_flat(get_default_config().to_dict()) | _flat(saved)), _flat(config.to_dict())
    compared = filter(_is_compared, sorted(now.keys() & before.keys() - free))
    differing = [name for name in compared if before[name] != now[name]]
    if not differing or config.training.override_resume:
        return
    if START.intersection(differing) and starts_alike():
        differing = [name for name in differing if name not in START]
    if differing:
        values = "; ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in differing)
        raise InputError(
            f"{stage_folder} was begun with other settings: {values}. Use those again, or another --workdir, or go on "
            "all the same with --config.training.override_resume=True"
        )


def config_from(stored: dict[str, Any]) -> ml_collections.ConfigDict:
    """The configuration that `stored` is the JSON of: lists are tuples again, and what is missing has its default.

    Raises:
      InputError: a setting that does not exist, or a value of another type.
    """
    config = get_default_config()
    config.lock()
    for name, value in _flat(stored).items():
        try:
            if value is None:  # which ConfigDict takes for every type
                raise TypeError
            config.update_from_flattened_dict({name: _tuple(value)})
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"the stored setting {name}={value!r} is none that this version takes") from None
    config.unlock()
    return config


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """{'section.key': value}, and {'key': value} of what is in no section; tuples are lists, as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inner = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: list(item) if isinstance(item, tuple) else item for key, item in inner.items()}
    return flat


def _is_compared(name: str) -> bool:
    return name.partition(".")[0] in COMPARED


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
