"""Which configuration a PyTorch checkpoint was made with, inferred from the names and shapes of its weights."""

import dataclasses
import itertools
import re
from typing import Any

from models.ncsnpp import NCSNpp
from models.pytorch.layout import entries_of
from utils import InputError

Shapes = dict[str, tuple[int, ...]]

# Where a field of NCSNpp is not called as the option it comes from.
OPTION_NAMES = {"channels": "data.num_channels", "fir_kernel": "model.fir"}


@dataclasses.dataclass(frozen=True)
class _Module:
    """One entry of `all_modules`: what it is for, and the shapes of its weights."""

    kind: str  # fourier | dense | norm | conv | block | attention | combine | resample
    shapes: Shapes

    @property
    def resamples(self) -> bool:
        """A 'biggan' block that changes the resolution: only there is the shortcut's convolution square."""
        shape = self.shapes.get("Conv_2.weight")
        return shape is not None and shape[0] == shape[1]


def _kind(shapes: Shapes) -> str:
    if "NIN_3.W" in shapes:
        return "attention"
    if "Conv_1.weight" in shapes:
        return "block"
    if "Conv2d_0.weight" in shapes:
        return "resample"
    if "Conv_0.weight" in shapes:
        return "combine" if shapes["Conv_0.weight"][2:] == (1, 1) else "resample"
    if "W" in shapes:
        return "fourier"
    return {1: "norm", 2: "dense", 4: "conv"}[len(shapes["weight"])]


def _modules(shapes: Shapes) -> list[_Module]:
    grouped: dict[int, Shapes] = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(r"all_modules\.(\d{1,6})\.(.+)", name):
            grouped.setdefault(int(match[1]), {})[match[2]] = shape
    return [_Module(_kind(grouped[n]), grouped[n]) for n in sorted(grouped)]


def _levels(modules: list[_Module], kind: str) -> list[list[tuple[int, bool]]]:
    """The residual blocks as (channels, attention follows) between changes of resolution, from input to output."""
    groups: list[list[tuple[int, bool]]] = [[]]
    for module, following in itertools.zip_longest(modules, modules[1:]):
        if kind == "ddpm":
            changes_resolution = module.kind == "resample"
        else:
            changes_resolution = module.kind == "block" and module.resamples
        if changes_resolution:
            groups += [[]] if groups[-1] else []
        elif module.kind == "block":
            attended = following is not None and following.kind == "attention"
            groups[-1].append((module.shapes["Conv_0.weight"][0], attended))
    return groups if groups[-1] else groups[:-1]


def _progressive(convs: list[Shapes], levels: int, configured: str) -> str:
    if len(convs) == 3 and convs[1]["weight"][0] == convs[1]["weight"][1]:
        return "residual"
    if len(convs) == levels + 1 == 2:
        return "none" if configured == "residual" else configured  # one level: 'none' and 'output_skip' look alike
    return "none" if len(convs) == 2 else "output_skip"


def _progressive_input(modules: list[_Module], channels: int) -> dict[str, str]:
    for module, following in itertools.pairwise(modules):
        if module.kind == "combine":
            doubled = following.shapes["GroupNorm_0.weight"][0] == 2 * module.shapes["Conv_0.weight"][0]
            return {"progressive_input": "input_skip", "progressive_combine": "cat" if doubled else "sum"}
        if module.kind == "resample" and next(iter(module.shapes.values()))[1:2] == (channels,):
            return {"progressive_input": "residual"}
    return {"progressive_input": "none"}


def _inferred_options(shapes: Shapes, model: NCSNpp) -> dict:
    """The fields of `NCSNpp` that can be read off `shapes`; raises whatever an unknown structure makes it raise."""
    modules = _modules(shapes)
    kinds = {module.kind for module in modules}
    convs = [module.shapes for module in modules if module.kind == "conv"]
    nf, channels = convs[0]["weight"][:2]
    kind = "ddpm" if any(m.kind == "block" and "NIN_0.W" in m.shapes for m in modules) else "biggan"
    groups = _levels(modules, kind)
    levels = (len(groups) + 1) // 2
    resolutions = [model.image_size >> level for level in range(levels)]
    inferred: dict[str, Any] = {
        "nf": nf,
        "channels": channels,
        "embedding_type": "fourier" if "fourier" in kinds else "positional",
        "conditional": "dense" in kinds,
        "resblock_type": kind,
        "ch_mult": tuple(group[0][0] // nf for group in groups[:levels]),
        "num_res_blocks": len(groups[0]) if levels > 1 else (len(groups[0]) - 3) // 2,
        "attn_resolutions": tuple(r for r, group in zip(resolutions, groups, strict=False) if group[0][1]),
        "progressive": _progressive(convs, levels, model.progressive),
    }
    if levels > 1:
        inferred |= _progressive_input(modules, channels)
    resamplers = [module.shapes for module in modules if module.kind == "resample"]
    if resamplers:
        # Its taps leave no trace; whether there are any does, in the name.
        filtered = "Conv2d_0.weight" in resamplers[0]
        inferred["fir_kernel"] = (model.fir_kernel or (1.0, 3.0, 3.0, 1.0)) if filtered else None
    return inferred


def disagreements(shapes: Shapes, model: NCSNpp) -> list[str]:
    """The options in which a checkpoint differs from the configuration of `model`: "config.model.nf = 32, not 16".

    Empty unless those differences explain every name and shape, so that a damaged file is not taken for another
    configuration's.

    Args:
      shapes: the checkpoint's state dict: names without `module.`, without `sigmas`.
    """
    try:
        inferred = _inferred_options(shapes, model)
        changed = {field: value for field, value in inferred.items() if value != _configured(field, inferred, model)}
        other = model.clone(**changed)
        # Weights do not depend on the image size; the smallest serves, with its attention at the same levels.
        smallest = 2 ** (len(other.ch_mult) - 1)
        attended = tuple(r * smallest // model.image_size for r in inferred["attn_resolutions"])
        other = other.clone(image_size=smallest, attn_resolutions=attended)
        if {entry.name: entry.shape for entry in entries_of(other)} != shapes:
            return []
    except (InputError, ValueError, TypeError, LookupError, ArithmeticError):
        return []  # not a structure of this family
    return [_difference(field, value, _configured(field, inferred, model)) for field, value in changed.items()]


def _difference(field: str, value, configured) -> str:
    if field == "fir_kernel":
        value, configured = value is not None, configured is not None
    return f"config.{OPTION_NAMES.get(field, f'model.{field}')} = {value!r}, not {configured!r}"


def _configured(field: str, inferred: dict, model: NCSNpp):
    """What the configuration says of a field, in the terms of `inferred`."""
    value = getattr(model, field)
    if field == "attn_resolutions":
        levels = [model.image_size >> level for level in range(len(inferred["ch_mult"]))]
        return tuple(level for level in levels if level in value)
    return value
