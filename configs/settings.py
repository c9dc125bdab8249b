"""How a setting is declared: its default, what it may be, and whether a run may change it when it is resumed."""

import dataclasses
import math
from typing import Any, TypeAlias

import ml_collections

from models.factory import CHOICES, CONSTANTS, NUMBERS
from utils import InputError

Config: TypeAlias = ml_collections.ConfigDict

LARGEST = 2**31 - 1  # counts are int32 on the devices


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of the configuration.

    Attributes:
      default: None: not set; then `kind` is its type.
      choices: all values that it may have; empty: any of the default's type.
      least, most: inclusive bounds of a number; None: none.
      above: an exclusive lower bound.
      or_zero: whether 0 is possible beside the numbers from `least` on: it stands for none, or all.
      may_change: whether a resumed run may have another value: it does not change the result.
      kind: the type where there is no default.
    """

    default: Any
    choices: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    or_zero: bool = False
    may_change: bool = False
    kind: type | None = None

    def complaint(self, value: Any) -> str | None:
        """Why `value` cannot be; None: it can."""
        if value is None:
            return None
        if self.choices:
            return None if value in self.choices else f"use one of {', '.join(map(str, self.choices))}"
        if isinstance(value, float) and not math.isfinite(value):
            return "use a finite number"
        if isinstance(value, int) and abs(value) > LARGEST:
            return f"use a number of at most {LARGEST}"
        if self.above is not None and value <= self.above:
            return f"it must be above {self.above}"
        zero = "0 or " if self.or_zero else ""
        if self.least is not None and value < self.least and (value != 0 or not self.or_zero):
            return f"it must be {zero}at least {self.least}" if self.most is None else self._range(zero)
        return self._range(zero) if self.most is not None and value > self.most else None

    def _range(self, zero: str) -> str:
        return f"it must be {zero}from {self.least} to {self.most}"


setting = Setting


def network(option: str, default: Any = None) -> Setting:
    """An option of the network, whose values `models.make_network` knows; `default` where it is not the network's own.

    Runs that are resumed keep it, but for what matters neither to the weights nor to their meaning.
    """
    if option in NUMBERS:
        own = NUMBERS[option][0]
    else:
        own = (CHOICES | CONSTANTS)[option][0]
    return Setting(own if default is None else default)


class Page:
    """The settings in the order in which they are declared, by name: assign them to a section's attributes."""

    settings: dict[str, Setting]

    def __init__(self) -> None:
        """Without any."""
        object.__setattr__(self, "settings", {})

    def __setattr__(self, name: str, value: Setting) -> None:
        self.settings[name] = value

    def section(self, name: str) -> "Section":
        """A section whose settings are called `name.<attribute>`."""
        return Section(self.settings, name)


class Section:
    """Part of a `Page`."""

    _place: tuple[dict[str, Setting], str]

    def __init__(self, settings: dict[str, Setting], name: str):
        """Of the page's `settings`."""
        object.__setattr__(self, "_place", (settings, name))

    def __setattr__(self, name: str, value: Setting) -> None:
        settings, section = self._place
        settings[f"{section}.{name}"] = value


def defaults(settings: dict[str, Setting]) -> Config:
    """The configuration with every setting at its default."""
    config = ml_collections.ConfigDict()
    for name, declared in settings.items():
        section, _, key = name.rpartition(".")
        if section and section not in config:
            config[section] = ml_collections.ConfigDict()
        part = config[section] if section else config
        if declared.default is None and declared.kind is not None:
            part[key] = ml_collections.config_dict.placeholder(declared.kind)
        else:
            part[key] = declared.default
    return config


def value_of(config: Config, name: str) -> Any:
    """The value of the setting `section.key`."""
    for key in name.split("."):
        config = config[key]
    return config


def check_values(config: Config, settings: dict[str, Setting]) -> None:
    """Raises InputError for the first value that its setting cannot have."""
    for name, declared in settings.items():
        value = value_of(config, name)
        if (complaint := declared.complaint(value)) is not None:
            raise InputError(f"--config.{name}={value}: {complaint}")
