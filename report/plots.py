"""Pictures of the report: many evaluations in one."""

import math
from typing import Any

import numpy as np
from etils import epath

from tracking import plots


def draw_quality(
    path: epath.PathLike,
    curves: dict[str, tuple[list, list]],
    quality: str,
    floor: float | None = None,
) -> None:
    """A distance such as the FID against NFE, one line or point for each name: {name: (nfe, distance)}.

    Args:
      floor: the distance of real images, as a line across.
    """
    figure, axes = plots.new_figure()
    for name, (nfe, values) in curves.items():
        axes.plot(nfe, [_positive(value) for value in values], marker="o", linewidth=1, label=plots.plain_text(name))
    if floor is not None and floor > 0:
        axes.axhline(floor, color="gray", linewidth=1, linestyle="--", label=f"real images: {floor:.3g}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(yscale="log", xlabel="NFE: network calls for a sample", ylabel=plots.plain_text(quality))
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend()
    plots.save_figure(figure, path)


def draw_history(path: epath.PathLike, histories: dict[str, list[dict[str, Any]]], name: str) -> None:
    """What was logged as `name` against the step, a line for each history of lines {"step": ..., name: ...}."""
    figure, axes = plots.new_figure()
    for label, lines in histories.items():
        points = [(line["step"], _positive(line[name])) for line in lines if name in line]
        if points:
            axes.plot(
                *zip(*points, strict=True), marker="." if len(points) < 20 else None, label=plots.plain_text(label)
            )
    axes.set(xlabel="update", ylabel=plots.plain_text(name), yscale="log")
    axes.grid(visible=True, linewidth=0.3)
    axes.legend()
    plots.save_figure(figure, path)


def draw_straightness_of_models(path: epath.PathLike, models: dict[str, dict[str, np.ndarray]], curve: str) -> None:
    """One curve of several models' straightness.npz: 'curve' or 'sequential_curve'."""
    figure, axes = plots.new_figure()
    for name, arrays in models.items():
        ts = arrays["ts"]
        area = float(np.sum(arrays[curve] * (ts[:-1] - ts[1:])))
        axes.stairs(arrays[curve][::-1], ts[::-1], label=f"{plots.plain_text(name)}: {area:.4g}", baseline=None)
    axes.set(xlim=(1, 0), ylim=(0, None), xlabel="t  (1: noise, 0: data)", ylabel="squared deviation per unit of t")
    axes.legend()
    plots.save_figure(figure, path)


def _positive(value: float | None) -> float:
    """`value`, or NaN, which is not drawn, where a logarithmic axis has no place for it."""
    return value if value is not None and value > 0 else math.nan
