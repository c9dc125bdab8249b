"""The samplers of one evaluation: `eval.samplers`, such as 'ode;euler:1,2,4,8;heun:4;ode:1e-3,1e-5'.

Entries are separated by semicolons: a name, and after a colon the steps N of a fixed grid, or tolerances of 'ode'.
"""

import ml_collections

import sampling
from utils import InputError

# Short names beside those of `sampling.PREDICTORS`. 'heun' is rf_solver_heun: the fixed grid's own.
PREDICTOR_NAMES = {"euler": "rf_solver", "heun": "rf_solver_heun", "reinterpolate": "rf_reinterpolate"}


def sampler_configs(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The configuration of each sampler in eval.samplers, as if it were the only one, by its name, such as 'euler_4'.

    Empty where eval.samplers is: `config` alone then says how to sample.

    Raises:
      InputError: an entry that cannot be read, or one that is named twice.
    """
    found: dict[str, ml_collections.ConfigDict] = {}
    for entry in filter(None, (part.strip() for part in config.eval.samplers.split(";"))):
        for name, overrides in _entry_overrides(entry):
            if name in found:
                raise InputError(f"--config.eval.samplers={config.eval.samplers} names {name} twice")
            found[name] = config.copy_and_resolve_references()
            found[name].eval.samplers = ""
            found[name].update_from_flattened_dict(overrides)
    return found


def _entry_overrides(entry: str):
    """Yields (name, settings) of each sampler of an entry, such as 'euler:1,2'."""
    kind, _, given = (part.strip() for part in entry.partition(":"))
    values = [value.strip() for value in given.split(",")] if given else []
    if kind == "ode":
        for value in values or [""]:
            tolerance = {"sampling.tol": _number(float, entry, value)} if value else {}
            yield f"ode_{value}" if value else "ode", {"sampling.method": "ode", **tolerance}
        return
    predictor = PREDICTOR_NAMES.get(kind, kind)
    if predictor not in sampling.PREDICTORS or not values:
        names = ", ".join(dict.fromkeys([*PREDICTOR_NAMES, *sampling.PREDICTORS]))
        raise InputError(
            f"--config.eval.samplers: cannot read {entry!r}; an entry is ode, ode:TOL,... or NAME:N,... (N steps), "
            f"a NAME of {names}"
        )
    for value in values:
        steps = _number(int, entry, value)
        grid = {"sampling.method": "pc", "sampling.predictor": predictor, "model.num_scales": steps}
        yield f"{kind}_{steps}", grid


def _number(kind: type, entry: str, value: str) -> float | int:
    try:
        return kind(value)
    except ValueError:
        raise InputError(f"--config.eval.samplers: {value!r} in {entry!r} is not a number of the kind needed") from None
