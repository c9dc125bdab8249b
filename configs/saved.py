"""Configurations that were saved: what a resumed run may change, and how one comes back from its JSON."""

from collections.abc import Callable
from typing import Any

from configs.default import SETTINGS, get_default_config
from configs.settings import Config
from configs.validation import StageValues
from utils import InputError

COMPARED = ("seed", "data", "model", "training", "optim")
START = {"training.import_torch", "training.import_flax"}  # paths, of the same weights or of others


def resolved(config: Config, values: StageValues, k: int) -> dict[str, Any]:
    """The configuration as run.json and metrics.json keep it, with what its job made of the settings left open.

    Args:
      values: of the stage.
      k: the number of segments.
    """
    settings = config.to_dict()
    settings["training"] |= {"n_iters": values.n_iters, "reflow_t": k}
    settings["model"] |= {"ema_rate": values.ema_rate, "variable_ema_rate": values.variable_ema_rate}
    settings["eval"]["segments"] = config.eval.segments or config.training.reflow_t
    return settings


def check_resume(
    saved: dict[str, Any], settings: dict[str, Any], stage_folder: Any, starts_alike: Callable[[], bool]
) -> None:
    """Checks that a stage goes on with the settings that it was begun with.

    A setting that a later version has introduced had its default. The number of updates may change where the learning
    rate does not depend on it.

    Args:
      saved, settings: `resolved`, then and now.
      starts_alike: whether `settings` mean the weights that the stage began with; asked where they name them otherwise.

    Raises:
      InputError: settings differ, unless `training.override_resume`; it names them and both values.
    """
    before, now = (_flat(get_default_config().to_dict()) | _flat(saved)), _flat(settings)
    free = {name for name, setting in SETTINGS.items() if setting.may_change}
    if now["optim.schedule"] == "constant":
        free.add("training.n_iters")
    compared = filter(_is_compared, sorted(now.keys() & before.keys() - free))
    differing = [name for name in compared if before[name] != now[name]]
    if not differing or now["training.override_resume"]:
        return
    if START.intersection(differing) and starts_alike():
        differing = [name for name in differing if name not in START]
    if differing:
        values = "; ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in differing)
        raise InputError(
            f"{stage_folder} was begun with other settings: {values}. Use those again, or another --workdir, or go on "
            "all the same with --config.training.override_resume=True"
        )


def config_from(stored: dict[str, Any]) -> Config:
    """The configuration that `stored` is the JSON of: lists are tuples again, and what is missing has its default.

    Raises:
      InputError: a setting that does not exist, or a value of another type.
    """
    config = get_default_config()
    config.lock()
    for name, value in _flat(stored).items():
        try:
            if value is None and SETTINGS[name].default is not None:  # which ConfigDict takes for every type
                raise TypeError
            config.update_from_flattened_dict({name: _tuple(value)})
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"unknown or mistyped setting in the stored configuration: {name}={value!r}") from None
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
