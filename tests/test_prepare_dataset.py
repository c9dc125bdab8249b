"""scripts/prepare_dataset.py: Fashion-MNIST from IDX files, pictures from a folder, and what is wrong with either."""

import gzip
import os
import pathlib
import struct
import subprocess
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import mnist

import datasets
from scripts import pictures, prepare_dataset
from utils import InputError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def data(dataset, folder, size, channels):
    """`config.data` of a prepared data set."""
    return datasets.DataOptions(dataset, size, channels, data_dir=str(folder))


def idx(array, kind=0x08):
    """`array` as an IDX file of unsigned bytes (kind 8), as the format's description has it."""
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def fashion(folder, count=5, **replaced):
    """(images, labels) of a small Fashion-MNIST, its four files in `folder`; `replaced`: other contents, by stem."""
    rng = np.random.default_rng(count)
    made = {}
    for prefix, number in (("train", count), ("t10k", 3)):
        images = rng.integers(0, 256, (number, 28, 28), np.uint8)
        labels = rng.integers(0, 10, number, np.uint8)
        contents = {f"{prefix}-images-idx3-ubyte": idx(images), f"{prefix}-labels-idx1-ubyte": idx(labels)}
        for name, content in contents.items():
            (folder / f"{name}.gz").write_bytes(gzip.compress(replaced.get(name.split("-idx")[0], content)))
        made[prefix] = images, labels
    return made


def run(capsys, *arguments):
    """(exit status, standard error) of the script."""
    status = prepare_dataset.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err


def prepared_by_tfds(files, data_dir, monkeypatch):
    """The folder of the data set as TFDS's own builder writes it from `files`, which it would download."""
    for name, split in (("_TRAIN_EXAMPLES", "train"), ("_TEST_EXAMPLES", "t10k")):
        monkeypatch.setattr(mnist, name, len(prepare_dataset.fashion_mnist_split(files, split)))

    class Extracted:
        def download_and_extract(self, urls):
            paths = {key: files / url.rsplit("/", 1)[1] for key, url in urls.items()}
            for path in paths.values():
                path.with_suffix(".raw").write_bytes(gzip.decompress(path.read_bytes()))
            return {key: str(path.with_suffix(".raw")) for key, path in paths.items()}

    class FashionMNIST(mnist.FashionMNIST, skip_registration=True):
        name = "fashion_mnist"

        def _split_generators(self, dl_manager):
            return super()._split_generators(Extracted())

    builder = FashionMNIST(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return pathlib.Path(builder.data_dir)


def test_fashion_mnist_is_what_tfds_itself_prepares(tmp_path, capsys, monkeypatch):
    made = fashion(tmp_path)
    assert run(capsys, "fashion_mnist", "--from", tmp_path, "--to", tmp_path / "tfds")[0] == 0
    for split, prefix in (("train", "train"), ("test", "t10k")):
        source = datasets.image_source(data("FASHION_MNIST", tmp_path / "tfds", 28, 1), split)
        images, labels = made[prefix]
        order = [int(np.flatnonzero((images == image[..., 0]).all((1, 2)))[0]) for image in source.read(0, source.size)]
        assert sorted(order) == list(range(len(images)))
        np.testing.assert_array_equal(source.labels(), labels[order])
    own = prepared_by_tfds(tmp_path, tmp_path / "own", monkeypatch)
    written = tmp_path / "tfds/fashion_mnist/3.0.1"
    files = sorted(path.name for path in own.iterdir())
    assert sorted(path.name for path in written.iterdir()) == files
    for name in files:
        if name != "dataset_info.json":  # it holds the description
            assert (written / name).read_bytes() == (own / name).read_bytes(), name


def test_a_data_set_is_not_overwritten(tmp_path, capsys):
    fashion(tmp_path)
    job = ("fashion_mnist", "--from", tmp_path, "--to", tmp_path / "tfds")
    assert run(capsys, *job)[0] == 0
    status, line = run(capsys, *job)
    assert status == 2
    assert "fashion_mnist/3.0.1 exists; remove it" in line.splitlines()[-1]


EMPTY = np.zeros((5, 28, 28), np.uint8)
DAMAGED = {
    "labels instead of images": ("train-images", idx(np.zeros(5, np.uint8)), "3 dimension"),
    "floats": ("train-images", idx(EMPTY, kind=0x0D), "not an IDX file of unsigned bytes"),
    "no header": ("t10k-labels", b"\0\0", "not an IDX file"),
    "too few values": ("train-images", idx(EMPTY)[:-1], "holds 3919 values, but its header says 5 x 28 x 28"),
    "a size beyond all memory": ("train-labels", b"\0\0\x08\x01\xff\xff\xff\xff", "holds 0 values"),
    "other images": ("train-images", idx(np.zeros((5, 32, 32), np.uint8)), "5 x 32 x 32 and 5 labels"),
    "other counts": ("train-images", idx(EMPTY[:4]), "4 x 28 x 28 and 5 labels"),
    "an eleventh class": ("train-labels", idx(np.full(5, 10, np.uint8)), "has a label 10"),
    "nothing": ("t10k-images", idx(EMPTY[:0]), "0 x 28 x 28 and 3 labels"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_wrong_idx_files_are_one_line(tmp_path, capsys, name):
    stem, content, expected = DAMAGED[name]
    fashion(tmp_path, **{stem: content})
    status, line = run(capsys, "fashion_mnist", "--from", tmp_path, "--to", tmp_path / "tfds")
    assert status == 2
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert expected in line
    assert not (tmp_path / "tfds").exists()


def test_truncated_missing_and_uncompressed_files_are_one_line(tmp_path, capsys):
    fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content, expected in ((whole[:-100], "end-of-stream"), (b"text", "Not a gzipped file"), (None, "No such file")):
        path.unlink() if content is None else path.write_bytes(content)
        status, line = run(capsys, "fashion_mnist", "--from", tmp_path, "--to", tmp_path / "tfds")
        assert (status, line.count("\n")) == (2, 1)
        assert f"cannot read {path}: " in line
        assert expected in line
    status, line = run(capsys, "fashion_mnist", "--from", tmp_path / "nowhere")
    assert (status, line) == (2, f"error: {tmp_path / 'nowhere'} is not a folder\n")


def picture(height, width):
    """Smooth waves, of which every part is different."""
    y, x, c = np.mgrid[:height, :width, :3]
    return np.rint(127.5 + 60 * np.sin(x / 9 + c) + 60 * np.cos(y / 11)).astype(np.uint8)


def test_pictures_of_a_folder_become_squares_and_broken_ones_are_named(tmp_path, capsys):
    folder = tmp_path / "pictures"
    (folder / "cats").mkdir(parents=True)
    wide, tall = picture(40, 60), picture(90, 50)
    PIL.Image.fromarray(wide).save(folder / "wide.png")
    PIL.Image.fromarray(tall).save(folder / "cats/tall.PNG")
    PIL.Image.fromarray(picture(20, 20)[..., 0]).save(folder / "cats/grey.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("not a picture")
    status, lines = run(capsys, "images", "--from", folder, "--to", tmp_path / "tfds", "--size", 20)
    assert status == 0
    assert lines.count("skipped: ") == 3
    assert all(f"skipped: {folder / name}: " in lines for name in ("broken.jpg", "cut.png", "notes.txt"))
    source = datasets.image_source(data("IMAGES", tmp_path / "tfds", 20, 3))
    assert (source.name, source.size, source.image_shape) == ("images/1.0.0", 3, (20, 20, 3))
    squares = [wide[:, 10:50].astype(float), tall[20:70].astype(float), picture(20, 20)[..., [0, 0, 0]].astype(float)]
    found = source.read(0, 3).astype(float)
    for square in squares:
        # The mean over each output pixel's area, an independent resize that is close for smooth pictures.
        fine = square.repeat(20, 0).repeat(20, 1)
        side = len(square)
        expected = fine.reshape(20, side, 20, side, 3).mean((1, 3))
        assert min(np.abs(image - expected).max() for image in found) < 5


def test_folders_are_labels_and_a_share_is_the_test_split(tmp_path, capsys):
    for number in range(60):
        folder = tmp_path / "pictures" / ("apples" if number % 3 else "pears")
        folder.mkdir(parents=True, exist_ok=True)
        colour = (number, 0, 0) if number % 3 else (number, 0, 255)
        PIL.Image.new("RGB", (9, 8), colour).save(folder / f"{number}.png")
    arguments = ("images", "--from", tmp_path / "pictures", "--to", tmp_path / "tfds", "--size", 8, "--test", 0.25)
    status, _ = run(capsys, *arguments)
    assert status == 0
    numbers = []
    for split in ("train", "test"):
        source = datasets.image_source(data("IMAGES", tmp_path / "tfds", 8, 3), split)
        images = source.read(0, source.size)
        np.testing.assert_array_equal(source.labels() == 1, images[:, 0, 0, 2] == 255)
        assert source.identity.count("contents ") == 1
        numbers.append(images[:, 0, 0, 0].tolist())
    assert sorted(numbers[0] + numbers[1]) == list(range(60))
    assert 8 <= len(numbers[1]) <= 22  # 15, and two standard deviations
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "loose.png")
    run(capsys, *arguments[:4], tmp_path / "other", *arguments[5:])
    with pytest.raises(InputError, match="has no labels"):
        datasets.image_source(data("IMAGES", tmp_path / "other", 8, 3)).labels()
    status, line = run(capsys, *arguments[:4], tmp_path / "third", *arguments[5:-1], 1)
    assert (status, "use a share from 0 to 0.9" in line) == (2, True)


def test_greys_and_other_crops(tmp_path, capsys):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 40:] = (255, 0, 0), (0, 0, 255)
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        PIL.Image.fromarray(wide).save(tmp_path / "pictures" / f"{number}.png")

    def images(channels, *options):
        folder = tmp_path / "_".join(map(str, options))
        job = ("images", "--from", tmp_path / "pictures", "--to", folder, "--size", 20, *options)
        assert run(capsys, *job)[0] == 0
        source = datasets.image_source(data("IMAGES", folder, 20, channels))
        return source.read(0, source.size)

    squeezed = images(3, "--crop", "none")
    np.testing.assert_array_equal(squeezed[0, 10, [2, 17]], [[255, 0, 0], [0, 0, 255]])
    assert not images(3, "--crop", "centre").any()
    placed = images(3, "--crop", "random")
    assert len({image.tobytes() for image in placed}) > 6
    np.testing.assert_array_equal(placed, images(3, "--crop", "random", "--background", "white"))
    grey = images(1, "--crop", "none", "--grey")
    np.testing.assert_array_equal(grey[0, 10, [2, 17], 0], [76, 29])  # ITU-R 601-2: 0.299 red, 0.114 blue


def test_pictures_are_stored_alike_wherever_they_lie(tmp_path, capsys):
    contents = []
    for name in ("one", "another"):
        folder = tmp_path / name
        folder.mkdir()
        for i in np.arange(9) if name == "one" else np.arange(9)[::-1]:
            PIL.Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(folder / f"{i}.png")
        assert run(capsys, "images", "--from", folder, "--to", tmp_path / f"{name}_tfds", "--size", 8)[0] == 0
        (file,) = tmp_path.glob(f"{name}_tfds/images/1.0.0/*tfrecord*")
        contents.append(file.read_bytes())
    assert contents[0] == contents[1]


def test_two_sets_of_one_name_size_and_count_are_told_apart(tmp_path, capsys):
    rng, found = np.random.default_rng(0), {}
    for name, low in (("dark", 0), ("bright", 128)):
        (tmp_path / name).mkdir()
        for i in range(8):
            noise = rng.integers(low, low + 128, (16, 16, 3), np.uint8)
            PIL.Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
        assert run(capsys, "images", "--from", tmp_path / name, "--to", tmp_path / f"{name}_tfds", "--size", 16)[0] == 0
        found[name] = datasets.image_source(data("IMAGES", tmp_path / f"{name}_tfds", 16, 3)).identity
    assert not datasets.same_data(found["dark"], found["bright"])
    (tmp_path / "dark_tfds/images/1.0.0" / datasets.CONTENTS).unlink()
    older = datasets.image_source(data("IMAGES", tmp_path / "dark_tfds", 16, 3)).identity
    assert "contents" not in older
    assert found["dark"].startswith(older)
    assert datasets.same_data(older, found["dark"])  # a set prepared before is compared as before


@pytest.mark.parametrize(
    ("size", "content", "expected"), [(0, b"", "--size 0"), (8, None, "no readable picture"), (8, b"x", "no readable")]
)
def test_a_folder_without_pictures_is_refused(tmp_path, capsys, size, content, expected):
    folder = tmp_path / "pictures"
    folder.mkdir()
    if content is not None:
        (folder / "a.png").write_bytes(content)
    status, lines = run(capsys, "images", "--from", folder, "--to", tmp_path / "tfds", "--size", size)
    assert status == 2
    assert expected in lines.splitlines()[-1]
    assert not (tmp_path / "tfds").exists()


RAMP = np.linspace(0, 1, 32)[None].repeat(32, 0)
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


def tiff(values, bits, order="<", photometric=1, content=None, **tags):
    """An uncompressed grey TIFF, as the format's description has it; tags by number, such as t339=2."""
    height, width = values.shape
    content = values.tobytes() if content is None else content
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    entries |= {279: len(content)} | {int(name[1:]): value for name, value in tags.items()}
    directory = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(content))
    return head + content + struct.pack(f"{order}H", len(entries)) + directory + bytes(4)


def png(width, height, depth, colour, rows, key=b""):
    """A PNG of these rows; key: the transparent colour."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *([(b"tRNS", key)] if key else []), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


def saved(path, array, **options):
    """The file, after the array is saved in it as a picture."""
    PIL.Image.fromarray(array).save(path, **options)
    return path


def written(path, content):
    """The file, after it got this content."""
    path.write_bytes(content)
    return path


def stored(path, size=32, background=(255, 255, 255), levels=None):
    """What is stored of a picture, which is checked first as all are."""
    rendering = pictures.Rendering(size, background, levels)
    pictures.facts_of(path, rendering)
    return pictures.square_picture(path, rendering)


def survey(folder, size=32, levels=None):
    """(facts, skipped) by name below `folder`."""
    facts, skipped = prepare_dataset.survey(folder, pictures.Rendering(size, levels=levels))
    named = {str(error.path.relative_to(folder)): error.kind for error in skipped}
    return {str(path.relative_to(folder)): found for path, found in facts.items()}, named


def refused(capsys, folder, *options):
    """The one line with which a folder is refused."""
    to = folder.parent / "tfds"
    status, line = run(capsys, "images", "--from", folder, "--to", to, "--size", 32, *options)
    assert (status, line.count("\n"), to.exists()) == (2, 1, False), line
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    "name", ["rgb.png", "photo.jpg", "grey.png", "palette.gif", "bits.png", "inks.jpg", "cut.webp"]
)
def test_pictures_of_eight_bits_are_stored_as_pillow_converts_them(tmp_path, name):
    modes = {"grey.png": "L", "palette.gif": "P", "bits.png": "1", "inks.jpg": "CMYK"}
    made = PIL.Image.fromarray(picture(50, 40)).convert(modes.get(name, "RGB"))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    made.save(tmp_path / name, **({"exif": exif} if name.endswith("jpg") else {}))
    with PIL.Image.open(tmp_path / name) as opened:
        upright = PIL.ImageOps.exif_transpose(opened).convert("RGB")
    expected = PIL.ImageOps.fit(upright, (32, 32), PIL.Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(stored(tmp_path / name), np.asarray(expected))


def test_one_bit_and_inks_have_their_colours(tmp_path):
    bits = stored(saved(tmp_path / "bits.png", RAMP > 0.5))
    np.testing.assert_array_equal(bits, np.where(RAMP > 0.5, 255, 0)[..., None].repeat(3, 2))
    inks = PIL.Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    inks.save(tmp_path / "inks.tif")
    assert (stored(tmp_path / "inks.tif") == RED).all()


SIXTEEN = np.rint(65535 * RAMP).astype(np.uint16)
TWELVE = np.rint(4095 * RAMP).astype(np.uint16)
DARK_COLOURS = [row.tobytes() for row in TWELVE.repeat(3, 1).astype(">u2")]
FLOATS = RAMP.astype(np.float32)
# Two values in three bytes.
PACKED = np.stack([TWELVE[:, ::2] >> 4, (TWELVE[:, ::2] & 15) << 4 | TWELVE[:, 1::2] >> 8, TWELVE[:, 1::2] & 255], -1)
WRITTEN_DEPTHS = {
    "16.png": png(32, 32, 16, 0, [row.tobytes() for row in SIXTEEN.astype(">u2")]),
    "16.tif": tiff(SIXTEEN, 16),
    "16_big_endian.tif": tiff(SIXTEEN.astype(">u2"), 16, ">"),
    "16.pgm": b"P5 32 32 65535\n" + SIXTEEN.astype(">u2").tobytes(),
    "12.tif": tiff(TWELVE, 12, content=PACKED.astype(np.uint8).tobytes()),
    "12.pgm": b"P5 32 32 4095\n" + TWELVE.astype(">u2").tobytes(),
    "12_plain.pgm": b"P2 32 32 4095\n" + b" ".join(b"%d" % value for value in TWELVE.ravel()),
    "float.tif": tiff(FLOATS, 32, t339=3),
    "float.pfm": b"Pf 32 32 -1\n" + FLOATS.tobytes(),
}


@pytest.mark.parametrize("name", WRITTEN_DEPTHS)
def test_greys_are_scaled_by_the_depth_that_is_written(tmp_path, name):
    shares = SIXTEEN / 65535 if "16" in name else TWELVE / 4095 if "12" in name else FLOATS.astype(float)
    if name in ("12.pgm", "12_plain.pgm"):
        shares = np.rint(65535 * shares) / 65535  # as Pillow reads it
    found = stored(written(tmp_path / name, WRITTEN_DEPTHS[name]))
    np.testing.assert_array_equal(found, np.rint(255 * shares)[..., None].repeat(3, 2))


def test_a_grey_of_16_bits_is_turned_as_exif_says(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    found = stored(saved(tmp_path / "a.png", SIXTEEN, exif=exif))
    np.testing.assert_array_equal(found[..., 0], np.rot90(np.rint(SIXTEEN / 257), -1))


def test_sixteen_bit_colours_keep_their_upper_bits(tmp_path):
    values = np.stack([SIXTEEN, SIXTEEN[::-1, ::-1], SIXTEEN.T], -1)
    found = stored(written(tmp_path / "a.png", png(32, 32, 16, 2, [row.tobytes() for row in values.astype(">u2")])))
    np.testing.assert_array_equal(found, values >> 8)


WITHOUT_DEPTH = {
    "12 bits in 16, PNG": ("a.png", png(32, 32, 16, 0, [row.tobytes() for row in TWELVE.astype(">u2")]), "6.25%"),
    "14 bits in 16, TIFF": ("a.tif", tiff(4 * TWELVE, 16), "24.99%"),
    "12 bits in 16, PGM": ("a.pgm", b"P5 32 32 65535\n" + TWELVE.astype(">u2").tobytes(), "6.25%"),
    "32 bits": ("a.tif", tiff(np.int32(1000 * RAMP), 32, t339=2), "whole numbers of which no depth is written"),
    "floats up to 255": ("a.tif", tiff(255 * FLOATS, 32, t339=3), "floats from 0 to 255"),
    "negative floats": ("a.tif", tiff(-FLOATS, 32, t339=3), "floats from -1 to -0"),
}


@pytest.mark.parametrize("name", WITHOUT_DEPTH)
def test_greys_without_a_written_depth_are_refused_unless_levels_are_given(tmp_path, capsys, name):
    folder = tmp_path / "pictures"
    folder.mkdir()
    file, content, expected = WITHOUT_DEPTH[name]
    saved(folder / "good.png", picture(32, 32))
    path = written(folder / file, content)
    line = refused(capsys, folder)
    assert line.startswith(f"{path}: ")
    assert expected in line
    assert "--levels=" in line
    assert set(survey(folder, levels=(0, 4095))[0]) == {"good.png", file}


def test_refused_pictures_are_counted(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    saved(folder / "b.png", TWELVE)
    saved(folder / "c.tif", np.int32(1000 * RAMP))
    line = refused(capsys, folder)
    assert f"{folder / 'c.tif'}: " in line
    assert line.endswith("(2 pictures are refused)\n")


@pytest.mark.parametrize("levels", [(0, 1000), (-500, 1500), (250, 750)])
def test_levels_are_one_scale_for_all_greys_without_depth(tmp_path, levels):
    low, high = levels
    values = np.rint(1000 * RAMP)
    made = {"a.tif": np.int32, "b.tif": np.float32, "c.png": np.uint16}
    for name, kind in made.items():
        saved(tmp_path / name, values.astype(kind))
        saved(tmp_path / f"half_{name}", (values // 2).astype(kind))
    for name in made:
        for path, scaled in ((tmp_path / name, values), (tmp_path / f"half_{name}", values // 2)):
            expected = np.rint(255 * np.clip((scaled - low) / (high - low), 0, 1))
            np.testing.assert_array_equal(stored(path, levels=levels)[..., 1], expected)
    facts, _ = survey(tmp_path, levels=levels)
    assert {name for name, found in facts.items() if found.clipped} == (set(facts) if low > 0 else set())


def test_levels_change_nothing_where_a_depth_is_written(tmp_path):
    for name in ("12.tif", "12.pgm"):
        path = written(tmp_path / name, WRITTEN_DEPTHS[name])
        np.testing.assert_array_equal(stored(path, levels=(0, 1000)), stored(path))
    path = saved(tmp_path / "a.png", picture(32, 32))
    np.testing.assert_array_equal(stored(path, levels=(0, 1000)), picture(32, 32))


def test_a_dark_picture_among_brighter_ones_is_named(tmp_path, capsys):
    saved(tmp_path / "bright.png", SIXTEEN)
    saved(tmp_path / "dark.png", TWELVE)
    facts, _ = survey(tmp_path)
    assert set(facts) == {"bright.png", "dark.png"}
    assert capsys.readouterr().err == (
        f"note: {tmp_path / 'dark.png'}: dark if its 16 bits are all in use: nothing in it exceeds 6.25% of the range\n"
    )
    np.testing.assert_array_equal(stored(tmp_path / "dark.png")[..., 0], np.rint(TWELVE / 257))


NEVER = {
    "not a number": ("a.tif", tiff(np.where(RAMP > 0.9, np.nan, FLOATS).astype(np.float32), 32, t339=3), "no numbers"),
    "infinite": ("a.tif", tiff(np.where(RAMP > 0.9, np.inf, FLOATS).astype(np.float32), 32, t339=3), "no numbers"),
    "8 bits with a sign": ("a.tif", tiff(np.int8(100 * RAMP), 8, t339=2), "8 bits with a sign"),
    "0 is white": ("a.tif", tiff(SIXTEEN, 16, photometric=0), "of which 0 is white"),
    "32 bits without a sign": ("a.tif", tiff(np.uint32(4e9 * RAMP), 32), "32 bits, which Pillow reads as negative"),
    "colours of 12 bits in 16": ("a.png", png(32, 32, 16, 2, DARK_COLOURS), "no colour of the set"),
    "PostScript": ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "PostScript"),
    "PostScript by another name": ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "PostScript"),
    "PostScript with a preview": ("a.ps", b"\xc5\xd0\xd3\xc6" + bytes(28), "PostScript"),
    "many pixels": ("a.png", png(10000, 9000, 8, 2, [b""]), "more than 89478485 pixels"),
    "too many pixels": ("a.png", png(65000, 65000, 8, 2, [b""]), "more than 89478485 pixels"),
    "FITS": ("a.fits", b"".join(line.ljust(80) for line in (
        b"SIMPLE  =                    T", b"BITPIX  =                   16", b"NAXIS   =                    2",
        b"NAXIS1  =                   32", b"NAXIS2  =                   32", b"END")).ljust(2880) + bytes(2880),
        "FITS of more than 8 bits"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
def test_what_pillow_would_decode_wrongly_or_with_another_program_is_refused(tmp_path, capsys, monkeypatch, name):
    folder = tmp_path / "pictures"
    folder.mkdir()
    file, content, expected = NEVER[name]
    saved(folder / "good.png", picture(32, 32))
    path = written(folder / file, content)
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program is started"))
    line = refused(capsys, folder, "--levels=0,4095")
    assert line.startswith(f"{path}: ")
    assert expected in line


def disc():
    """(colours, alpha) of a red square of which all around is transparent and hides green."""
    alpha = np.zeros((32, 32), np.uint8)
    alpha[8:24, 8:24] = 255
    return np.where(alpha[..., None] > 0, np.uint8(RED), np.uint8((0, 255, 0))), alpha


def transparent(folder, name):
    """A file with `disc` in one of the ways of writing transparency."""
    colours, alpha = disc()
    if name == "palette.png":
        indices = PIL.Image.fromarray((alpha > 0).astype(np.uint8), "L").convert("L")
        made = PIL.Image.frombytes("P", (32, 32), indices.tobytes())
        made.putpalette([0, 255, 0, 255, 0, 0])
        made.save(folder / name, transparency=0)
    elif name == "palette_alphas.png":
        made = PIL.Image.frombytes("P", (32, 32), (alpha > 0).astype(np.uint8).tobytes())
        made.putpalette([0, 255, 0, 255, 0, 0])
        made.save(folder / name, transparency=bytes([0, 255]))
    elif name == "key.png":
        PIL.Image.fromarray(colours).save(folder / name, transparency=(0, 255, 0))
    elif name == "key_16.png":
        rows = [row.tobytes() for row in (257 * colours.astype(">u2")).astype(">u2")]
        written(folder / name, png(32, 32, 16, 2, rows, struct.pack(">3H", 0, 65535, 0)))
    else:
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        PIL.Image.fromarray(np.dstack([colours, alpha])).save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize(
    "name", ["a.png", "a.webp", "a.tif", "a.tga", "palette.png", "palette_alphas.png", "a.gif", "key.png", "key_16.png"]
)
def test_what_is_transparent_shows_the_background(tmp_path, name):
    path = transparent(tmp_path, name)
    alpha = disc()[1][..., None]
    for background in ((255, 255, 255), (16, 32, 48)):
        np.testing.assert_array_equal(stored(path, background=background), np.where(alpha > 0, RED, background))


def test_greys_are_laid_over_the_background_too(tmp_path):
    alpha = disc()[1]
    grey = np.rint(255 * RAMP).astype(np.uint8)
    PIL.Image.fromarray(grey).save(tmp_path / "plain.png")
    PIL.Image.merge("LA", [PIL.Image.fromarray(grey), PIL.Image.fromarray(alpha)]).save(tmp_path / "la.png")
    expected = np.where(alpha[..., None] > 0, grey[..., None], BLUE)
    np.testing.assert_array_equal(stored(tmp_path / "la.png", background=BLUE), expected)
    key = struct.pack(">H", int(SIXTEEN[0, 7]))
    rows = [row.tobytes() for row in SIXTEEN.astype(">u2")]
    found = stored(written(tmp_path / "16.png", png(32, 32, 16, 0, rows, key)), background=BLUE)
    np.testing.assert_array_equal(found, np.where(SIXTEEN[..., None] == SIXTEEN[0, 7], BLUE, grey[..., None]))
    quarters = png(4, 4, 2, 0, [bytes([0b00011011])] * 4, struct.pack(">H", 2))  # 0 1 2 3, of which 2 is transparent
    found = stored(written(tmp_path / "2.png", quarters), size=4, background=BLUE)
    np.testing.assert_array_equal(found[0], [(0, 0, 0), (85, 85, 85), BLUE, (255, 255, 255)])


def test_half_transparent_is_half_of_the_background(tmp_path):
    half = np.full((32, 32, 4), (200, 100, 0, 51), np.uint8)  # 51 of 255: a fifth
    assert (stored(saved(tmp_path / "a.png", half), background=(100, 200, 50)) == (120, 180, 40)).all()


def test_a_picture_of_which_nothing_is_visible_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.png: all of it is transparent"):
        stored(saved(tmp_path / "a.png", np.zeros((32, 32, 4), np.uint8)))


def test_further_frames_and_pages_are_named(tmp_path, capsys):
    frames = [PIL.Image.fromarray(np.full((32, 32, 3), value, np.uint8)) for value in (10, 120, 240)]
    for name in ("animated.gif", "pages.tif", "animated.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    saved(tmp_path / "single.png", picture(32, 32))
    facts, _ = survey(tmp_path)
    assert {name: found.frames for name, found in facts.items()} == {
        "animated.gif": 3, "animated.webp": 3, "pages.tif": 3, "single.png": 1
    }  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"note: {tmp_path / name}: the first of 3 frames" for name in sorted(facts)[:3]]
    for name in sorted(facts)[:3]:
        assert (stored(tmp_path / name) == 10).all()


def test_layers_are_no_frames(tmp_path):
    layer = bytes(16) + struct.pack(">H", 0) + b"8BIMnorm" + bytes(4) + struct.pack(">I", 0)
    layers = struct.pack(">H", 2) + 2 * layer
    blocks = [b"", b"", struct.pack(">I", len(layers)) + layers]
    content = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, 32, 32, 8, 1)  # one channel of 32 x 32, 8 bits, grey
    content += b"".join(struct.pack(">I", len(block)) + block for block in blocks)
    written(tmp_path / "a.psd", content + struct.pack(">H", 0) + np.rint(255 * RAMP).astype(np.uint8).tobytes())
    with PIL.Image.open(tmp_path / "a.psd") as opened:
        assert opened.n_frames == 2
    assert survey(tmp_path)[0]["a.psd"].frames == 1
    np.testing.assert_array_equal(stored(tmp_path / "a.psd")[..., 0], np.rint(255 * RAMP))


def test_pictures_of_less_than_half_the_size_are_named(tmp_path):
    for name, height, width in (("tiny.png", 3, 3), ("strip.png", 1, 32), ("low.png", 15, 90), ("half.png", 16, 16)):
        saved(tmp_path / name, picture(height, width))
    facts, skipped = survey(tmp_path)
    assert {name: found.enlarged for name, found in facts.items()} == {"half.png": True}
    assert skipped == dict.fromkeys(("tiny.png", "strip.png", "low.png"), "too small")


def test_every_file_is_recorded_or_named(tmp_path, capsys):
    folder = tmp_path / "pictures"
    for name in ("sub", ".ipynb_checkpoints"):
        (folder / name).mkdir(parents=True)
        saved(folder / name / "a.png", picture(32, 32))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    saved(elsewhere / "b.png", picture(32, 32))
    (folder / "linked").symlink_to(elsewhere)
    (folder / "a_link").symlink_to("sub")  # before `sub`, whose own name is used nevertheless
    (folder / "sub/loop").symlink_to(folder)
    (folder / "dead.png").symlink_to("nowhere")
    (folder / "itself.png").symlink_to("itself.png")
    os.mkfifo(folder / "pipe.png")
    saved(folder / "jpeg_without_suffix", picture(32, 32), format="JPEG")
    saved(folder / ".hidden.png", picture(32, 32))
    for name in ("photo.HEIC", "a.jxl", "a.exr", "notes"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (folder / "empty.png").touch()
    written(folder / "raw.dng", tiff(np.uint8(255 * RAMP), 8, t254=1))
    written(folder / "preview.tif", tiff(np.uint8(255 * RAMP), 8, t254=1))
    written(folder / "raw.nef", tiff(np.uint8(255 * RAMP), 8))
    written(folder / "raw.tif", tiff(np.uint8(255 * RAMP), 8, t50706=0x01040000))
    facts, skipped = survey(folder)
    assert set(facts) == {"sub/a.png", "linked/b.png", "jpeg_without_suffix"}
    unknown = ("photo.HEIC", "a.jxl", "a.exr", "notes", "empty.png", "raw.dng", "raw.nef", "raw.tif", "preview.tif")
    assert skipped == dict.fromkeys(unknown, "not a picture of a known format") | {
        "a_link": "a link to a folder that is read already",
        "sub/loop": "a link to a folder that is read already",
        "dead.png": "cannot be opened",
        "itself.png": "cannot be opened",
        "pipe.png": "neither a file nor a folder",
        ".hidden.png": "hidden",
        ".ipynb_checkpoints": "hidden",
    }
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == sorted(str(folder / name) for name in skipped)


def test_folders_and_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    saved(tmp_path / "a.png", picture(32, 32))
    saved(tmp_path / "b.png", picture(32, 32))

    def closed(function):  # root may read everything
        def allowed(path, *arguments):
            if path.name in ("closed", "b.png"):
                raise PermissionError(13, "Permission denied")
            return function(path, *arguments)

        return allowed

    monkeypatch.setattr(pathlib.Path, "iterdir", closed(pathlib.Path.iterdir))
    monkeypatch.setattr(pathlib.Path, "open", closed(pathlib.Path.open))
    facts, skipped = survey(tmp_path)
    assert (set(facts), skipped) == ({"a.png"}, dict.fromkeys(("closed", "b.png"), "cannot be opened"))


def test_odd_names_are_recorded_and_printed_on_one_line(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate((b"caf\xe9.png", b"caf\xe8.png", "café.png".encode())):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            PIL.Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    with open(os.fsencode(folder) + b"/two\nlines\xff\x1b[2J.png", "wb") as file:
        file.write(b"no picture")
    status = prepare_dataset.main(["images", "--from", str(folder), "--to", str(tmp_path / "tfds"), "--size", "8"])
    out, err = capsys.readouterr()
    assert status == 0
    assert f"skipped: {folder}/two\\nlines\\xff\\x1b[2J.png: not a picture" in err
    recorded, skipped = out.splitlines()[-2:]
    assert recorded == "recorded 3"
    assert skipped.startswith("skipped 1, 1 not a picture of a known format; save pictures in HEIC, ")
    source = datasets.image_source(data("IMAGES", tmp_path / "tfds", 8, 3))
    assert sorted(source.read(0, 3)[:, 0, 0, 0]) == [0, 1, 2]


def test_the_counts_are_of_what_was_recorded(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    transparent(folder, "cut.png")
    small = saved(folder / "small.png", picture(24, 24))
    written(folder / "small_and_damaged.png", small.read_bytes()[:-200])
    saved(folder / "dark.png", TWELVE)
    saved(folder / "bright.png", SIXTEEN)
    arguments = ["images", "--from", folder, "--to", tmp_path / "tfds", "--size", 32, "--background", "green"]
    assert prepare_dataset.main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    assert f"skipped: {folder / 'small_and_damaged.png'}: damaged (" in err
    assert out.splitlines()[-3:] == [
        f"wrote {tmp_path / 'tfds/images/1.0.0'}",
        "recorded 4, 1 smaller than --size and enlarged (such as small.png), "
        "1 with transparency, laid over --background (such as cut.png), "
        "1 of more than 8 bits and dark (such as dark.png)",
        "skipped 1, 1 damaged",
    ]
    source = datasets.image_source(data("IMAGES", tmp_path / "tfds", 32, 3))
    assert GREEN in {tuple(image[0, 0].tolist()) for image in source.read(0, 4)}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--background=mauvish", "--background mauvish: use an opaque colour"),
        ("--background=#ffffff80", "--background #ffffff80: use an opaque colour"),
        ("--levels=12", "--levels 12: use two numbers"),
        ("--levels=0,x", "--levels 0,x: use two numbers"),
        ("--levels=5,5", "--levels 5,5: use two numbers"),
        ("--levels=0,inf", "--levels 0,inf: use two numbers"),
        ("--levels=nan,1", "--levels nan,1: use two numbers"),
    ],
)
def test_wrong_colours_and_levels_are_one_line(tmp_path, capsys, option, expected):
    folder = tmp_path / "pictures"
    folder.mkdir()
    saved(folder / "a.png", picture(32, 32))
    assert refused(capsys, folder, option).startswith(expected)
