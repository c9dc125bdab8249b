"""A configuration from its JSON, as metrics.json keeps it."""

from typing import Any

import ml_collections

from configs.default import get_default_config
from utils import InputError


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


def _flat(stored: dict[str, Any]) -> dict[str, Any]:
    """{'section.key': value}, and {'key': value} of what is in no section."""
    flat: dict[str, Any] = {}
    for name, value in stored.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
