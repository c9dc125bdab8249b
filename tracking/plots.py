"""Every picture that a run leaves behind: PNG files, drawn by matplotlib and Pillow, written atomically."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

import adaptive
import datasets
import segments
from utils import atomic_file


def image_grid(
    images: Float[np.ndarray, "n h w c"], padding: int = 1, columns: int | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """One picture, [rows (h + padding), columns (w + padding), 3], of n images in [0, 1]; nearly square by default."""
    n, h, w, c = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = np.ones((rows * (h + padding), columns * (w + padding), c), np.float32)
    for index, image in enumerate(np.asarray(images, np.float32)):
        y, x = divmod(index, columns)
        y, x = y * (h + padding), x * (w + padding)
        grid[y : y + h, x : x + w] = image
    grid = np.broadcast_to(grid, (*grid.shape[:2], 3)) if c == 1 else grid
    return datasets.levels(grid)


def draw_images(
    path: epath.PathLike, images: Float[np.ndarray, "n h w c"], columns: int | None = None, size: int = 512
) -> None:
    """One grid of images in [0, 1], the pixels of small ones enlarged, to at most `size` of the whole."""
    with atomic_file(path) as file:
        _enlarged(image_grid(images, columns=columns), size).save(file, format="PNG")


def _enlarged(grid: np.ndarray, size: int) -> Any:
    from PIL import Image

    zoom = max(1, size // max(grid.shape[:2]))
    picture = Image.fromarray(grid)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def write_image(path: epath.PathLike, image: Float[np.ndarray, "h w c"]) -> None:
    """One image in [0, 1] of 1 or 3 channels as a PNG of its own size."""
    from PIL import Image

    pixels = datasets.levels(image)
    with atomic_file(path) as file:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")


def draw_animation(path: epath.PathLike, frames: Float[np.ndarray, "frames n h w c"], seconds: float = 2.0) -> None:
    """A GIF of grids of images in [0, 1] that plays for ever; the last frame stays for as long as all others."""
    pictures = [_enlarged(image_grid(images), 256) for images in frames]
    if frames.shape[-1] == 1:
        pictures = [picture.convert("L") for picture in pictures]
    each = max(20, round(1000 * seconds / max(1, len(pictures) - 1)))
    durations = [each] * (len(pictures) - 1) + [round(1000 * seconds)]
    with atomic_file(path) as file:
        pictures[0].save(
            file, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1
        )


def draw_rows(path: epath.PathLike, rows: dict[str, UInt8[np.ndarray, "n h w c"]]) -> None:
    """A row of images for each name, such as samples and, below them, the training images nearest to them."""
    figure, axes = new_figure(rows=len(rows), size=(8, 0.8 * len(rows) + 0.2))
    for ax, (name, images) in zip(np.atleast_1d(axes), rows.items(), strict=True):
        padded = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255)
        strip = np.concatenate(list(padded), axis=1)
        ax.imshow(np.repeat(strip, 3, axis=-1) if strip.shape[-1] == 1 else strip)
        ax.set_title(name, fontsize=8, loc="left")
        ax.set_axis_off()
    save_figure(figure, path)


def draw_straightness(
    path: epath.PathLike,
    ts: Float[np.ndarray, "n"],
    curves: dict[str, np.ndarray],
    boundaries: Float[np.ndarray, "boundaries"],
) -> None:
    """Straightness against t, from noise to data: for each name the curve of n - 1 values between the times."""
    figure, axes = new_figure()
    for name, curve in curves.items():
        area = float(np.sum(curve * (ts[:-1] - ts[1:])))
        axes.stairs(np.asarray(curve)[::-1], np.asarray(ts)[::-1], label=f"{name}: {area:.4g}", baseline=None)
    for boundary in boundaries:
        axes.axvline(boundary, color="gray", linewidth=0.6, linestyle=":")
    axes.set(xlim=(1, 0), ylim=(0, None), xlabel="t  (1: noise, 0: data)", ylabel="squared deviation per unit of t")
    axes.legend()
    save_figure(figure, path)


def draw_trajectories(
    path: epath.PathLike,
    ts: Float[np.ndarray, "n"],
    xs: Float[np.ndarray, "n b h w c"],
    unscale: Callable[[np.ndarray], np.ndarray],
    count: int = 8,
) -> None:
    """A few trajectories: a row of states for each image, and the middle pixel's value against t below them.

    Args:
      xs: states in the model's range, which `unscale` maps to [0, 1].
    """
    picked = np.linspace(0, len(ts) - 1, min(10, len(ts))).astype(int)
    count = min(count, xs.shape[1])
    figure, (top, bottom) = new_figure(rows=2, size=(8, 8))
    gap = ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0))  # a white line below and beside each image
    rows = np.pad(unscale(xs[picked][:, :count]).swapaxes(0, 1), gap, constant_values=1.0)
    tiles = rows.swapaxes(1, 2).reshape(count * rows.shape[2], len(picked) * rows.shape[3], rows.shape[4])
    top.imshow(np.repeat(tiles, 3, axis=-1) if tiles.shape[-1] == 1 else tiles, vmin=0, vmax=1)
    top.set(xticks=[], yticks=[], title="from noise (left) to data (right)")
    middle = xs[:, :count, xs.shape[2] // 2, xs.shape[3] // 2, 0]
    bottom.plot(ts, middle, linewidth=1)
    bottom.set(xlim=(1, 0), xlabel="t  (1: noise, 0: data)", ylabel="value of the middle pixel")
    save_figure(figure, path)


def draw_pairs(
    path: epath.PathLike,
    x1: Float[np.ndarray, "n h w c"],
    x0: Float[np.ndarray, "n h w c"],
    segment: Int[np.ndarray, "n"],
    boundaries: Sequence[float],
    unscale: Callable[[np.ndarray], np.ndarray],
    count: int = 16,
) -> None:
    """A few pairs of each segment, a row for each: grids of their start points x1 and of their end points x0.

    Args:
      x1, x0: [n, h, w, c] in the model's range, which `unscale` maps to [0, 1].
      segment: [n] the segment of each pair.
      boundaries: [k + 1] in t.
    """
    figure, axes = new_figure(rows=len(boundaries) - 1, columns=2, size=(8, 4 * (len(boundaries) - 1)))
    for index, row in enumerate(axes.reshape(-1, 2)):
        rows = np.flatnonzero(segment == index)[:count]
        for ax, x, name, time in zip(row, (x1, x0), ("start", "end"), boundaries[index : index + 2], strict=True):
            ax.imshow(image_grid(unscale(x[rows])))
            ax.set_title(f"segment {index}, {name}: t = {time:.3g}")
            ax.set_axis_off()
    save_figure(figure, path)


def draw_partition(path: epath.PathLike, partition: adaptive.Partition) -> None:
    """The curvature cost against t of SeqRF-Ada's partition and of the uniform one, with their boundaries."""
    figure, axes = new_figure(size=(8, 4))
    k = partition.boundaries.size - 1
    curves = [
        ("uniform", partition.uniform_curve, segments.uniform_boundaries(k), "tab:gray", 0.8, ":"),
        ("adaptive", partition.curve, partition.boundaries, "tab:blue", 1.6, "-"),
    ]
    for name, curve, boundaries, color, width, style in curves:
        label = f"{name}, cost {curve.cost:.4g}"
        axes.stairs(curve.density[::-1], curve.times[::-1], color=color, linewidth=width, label=label)
        for boundary in boundaries:
            axes.axvline(boundary, color=color, linewidth=width / 2, linestyle=style)
    axes.set(xlim=(1, 0), xlabel="t  (1: noise, 0: data)", ylabel="cost per unit of t", ylim=(0, None))
    axes.set_title(f"{k} segments: curvature cost {partition.cost:.4g}, uniform {partition.uniform_cost:.4g}")
    axes.legend()
    save_figure(figure, path)


def draw_loss(path: epath.PathLike, steps: Sequence[int], losses: Sequence[float | None]) -> None:
    """The training loss against updates, on a logarithmic axis."""
    figure, axes = new_figure()
    axes.plot(steps, losses, linewidth=1)
    axes.set(xlabel="update", ylabel="loss", yscale="log")
    save_figure(figure, path)


def plain_text(text: str) -> str:
    """`text` as it is, in matplotlib, which reads formulas between dollar signs."""
    return text.replace("$", r"\$")


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4.5)) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(figure: Any, path: epath.PathLike) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
