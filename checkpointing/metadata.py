"""What is kept beside weights: the stage, the segments, the network, and what it was trained on.

A dict, as JSON has it: "stage", "k", "boundaries", "source" (where the starting weights came from), "teacher" (the
`fingerprint` of the weights that made the pairs), "data" and "model" (`models.network_identity`); of checkpoints of a
run also "start" (the `start_fingerprint` of what it began with) and, of a stage that learns from pairs, "pairs" (their
number: an incomplete set may grow later). docs/method.md, section 9.
"""

import re
from typing import Any

import models
import segments
from utils import has_type

DISTILL = "2_distill"
TORCH = {"stage": "1_rf", "k": 1, "boundaries": [1.0, 0.0]}  # of a PyTorch checkpoint, which is a 1-RF
_TYPES: dict[str, Any] = {"stage": str, "k": int, "boundaries": list[float]}
_TYPES |= {"source": str | None, "teacher": str | None, "data": dict[str, Any], "model": dict[str, Any]}


def distill_folder(steps: int) -> str:
    """The stage, and so the folder, of a distillation to `steps` = m Euler steps a segment."""
    return DISTILL if steps == 1 else f"{DISTILL}_{steps}"


def distill_steps(stage: str) -> int:
    """m of a stage that `distill_folder` named; 1 of every other one."""
    match = re.fullmatch(rf"{DISTILL}_(\d{{1,4}})", stage)
    return int(match[1]) if match else 1


def make_metadata(
    network: models.NCSNpp,
    stage: str,
    boundaries: segments.TimesLike,
    *,
    source: str = "",
    teacher: str | None = None,
) -> dict[str, Any]:
    """The metadata of weights of `network`.

    Args:
      stage: the folder of the stage in a workdir, "exported" where no stage is known.
      boundaries: [k + 1] in t, from 1 to 0.
      source, teacher: see the module; empty and None where there is none.
    """
    times = [float(b) for b in boundaries]
    trained = {"stage": stage, "source": source, "teacher": teacher, "k": len(times) - 1, "boundaries": times}
    return {**trained, **models.network_identity(network)}


def network_of(metadata: dict[str, Any]) -> models.NCSNpp:
    """The network that the metadata describes, with its own k heads. Raises InputError as `models.make_network`."""
    return models.make_network(metadata["data"], metadata["model"], heads=metadata["k"])


def checked_metadata(metadata: dict) -> dict:
    """`metadata` as a file has it. Raises ValueError where it lacks or contradicts something."""
    for name, kind in _TYPES.items():
        if not has_type(metadata.get(name), kind):
            raise ValueError(f"its metadata has {name} = {str(metadata.get(name))[:20]}")
    if len(metadata["boundaries"]) != metadata["k"] + 1:
        raise ValueError(f"its metadata has k = {metadata['k']} and {len(metadata['boundaries'])} boundaries")
    segments.validate_boundaries(metadata["boundaries"])
    network_of(metadata)
    return metadata
