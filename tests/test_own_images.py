"""What scripts/own_images.sh chooses for a folder of pictures."""

import numpy as np
import PIL.Image
import pytest

from scripts import own_images
from utils import InputError


def folder_of(path, count, size, mode="RGB", classes=1):
    for number in range(count):
        place = path / (f"class_{number % classes}" if classes > 1 else "")
        place.mkdir(parents=True, exist_ok=True)
        levels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
        PIL.Image.fromarray(levels).convert(mode).save(place / f"{number}.png")
    return path


@pytest.mark.parametrize(
    ("count", "size", "mode", "classes", "accelerator", "expected"),
    [
        (20, 64, "RGBA", 1, False, ("16", "", "0", "pixels")),
        (20, 64, "RGB", 1, True, ("32", "", "0", "pixels")),
        (20, 30, "L", 1, True, ("16", "1", "0", "pixels")),
        (20, 40, "RGB", 2, True, ("32", "", "0", "pixels")),  # too few for a classifier
        (200, 12, "RGB", 3, False, ("8", "", "0.1", "classifier")),
    ],
)
def test_choices_fit_the_pictures_and_the_machine(tmp_path, count, size, mode, classes, accelerator, expected):
    folder = folder_of(tmp_path, count, size, mode, classes)
    (folder / "notes.txt").write_text("no picture")
    chosen = own_images.choices(folder, accelerator=accelerator)
    assert tuple(chosen[name] for name in ("SIZE", "GREY", "TEST", "FEATURES")) == expected


def test_too_few_and_too_small_pictures_are_refused_and_the_environment_wins(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="has 3 pictures; 8 are needed"):
        own_images.choices(folder_of(tmp_path / "few", 3, 64), accelerator=False)
    with pytest.raises(InputError, match="less than 8 pixels"):
        own_images.choices(folder_of(tmp_path / "small", 9, 6), accelerator=False)
    monkeypatch.setattr("sys.argv", ["own_images", str(folder_of(tmp_path / "some", 9, 32))])
    monkeypatch.setenv("UPDATES", "12")
    assert own_images.main() == 0
    assert {"UPDATES=12", "SIZE=16", "GREY=''"} <= set(capsys.readouterr().out.splitlines())
    monkeypatch.setattr("sys.argv", ["own_images", str(tmp_path / "nowhere")])
    assert own_images.main() == 2
    assert capsys.readouterr().err.startswith("error: ")
