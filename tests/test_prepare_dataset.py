"""scripts/prepare_dataset.py: Fashion-MNIST from IDX files, pictures from a folder, and what is wrong with either."""

import gzip
import pathlib
import struct

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import mnist

import datasets
from scripts import prepare_dataset

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
    assert lines.count("skipped: ") == 2
    assert all(f"skipped: {folder / name}: " in lines for name in ("broken.jpg", "cut.png"))
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
