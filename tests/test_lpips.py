"""LPIPS against PyTorch's own arithmetic, with random weights that the tests write in both public file formats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import lpips
from utils import InputError


@functools.cache
def random_states():
    """State dicts as torchvision and the LPIPS package write them, with weights that keep the features' size."""
    generator = torch.Generator().manual_seed(0)
    vgg = {
        name: torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        if len(shape) == 4
        else 0.1 * torch.randn(shape, generator=generator)
        for name, shape in lpips.VGG_SHAPES.items()
    }
    heads = {name: torch.rand(shape, generator=generator) for name, shape in lpips.HEAD_SHAPES.items()}
    return vgg | {"classifier.0.bias": torch.zeros(4)}, heads


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    for name, state in zip(("vgg.pth", "heads.pth"), random_states(), strict=True):
        torch.save(state, folder / name)
    return folder / "vgg.pth", folder / "heads.pth"


def torch_lpips(x, y):
    """The distance by PyTorch, written from the paper: images [B, C, H, W] in [0, 1]."""
    vgg, heads = random_states()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def features(image):
        image = image.expand(-1, 3, -1, -1)
        image = F.interpolate(image, size=(lpips.SIZE, lpips.SIZE), mode="bilinear", align_corners=False)
        image = (image - mean[:, None, None]) / deviation[:, None, None]
        for block, (numbers, _) in enumerate(lpips.BLOCKS):
            image = F.max_pool2d(image, 2) if block else image
            for n in numbers:
                image = F.relu(F.conv2d(image, vgg[f"features.{n}.weight"], vgg[f"features.{n}.bias"], padding=1))
            yield image / (image.square().sum(1, keepdim=True).sqrt() + 1e-10)

    parts = [
        F.conv2d((fx - fy) ** 2, heads[f"lin{n}.model.1.weight"]).mean((1, 2, 3))
        for n, (fx, fy) in enumerate(zip(features(x), features(y), strict=True))
    ]
    return torch.stack(parts).sum(0)


def images(channels, size, seed):
    return np.random.default_rng(seed).random((1, size, size, channels), np.float32)


def as_torch(x):
    return torch.from_numpy(np.array(x.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(("channels", "size", "centered"), [(1, 8, True), (3, 40, False)])
def test_distance_and_gradient_are_pytorchs(files, channels, size, centered, monkeypatch):
    monkeypatch.setattr(lpips, "SIZE", 32)  # 49 times less work, and the same program but for its shapes
    x, y = images(channels, size, 1), images(channels, size, 2)
    scale, shift = (2, -1) if centered else (1, 0)  # the model's range
    distance = lpips.load_lpips(*files, centered=centered)
    found, gradient = jax.jit(jax.value_and_grad(lambda x, y: jnp.sum(distance(x, y))))(
        scale * x + shift, scale * y + shift
    )
    x_torch = as_torch(x).requires_grad_()
    expected = torch_lpips(x_torch, as_torch(y)).sum()
    expected.backward()
    np.testing.assert_allclose(found, expected.item(), rtol=1e-4)
    wanted = x_torch.grad.numpy().transpose(0, 2, 3, 1) / scale
    # As a whole: rounding decides which of two equal neighbours a max pooling takes.
    assert np.linalg.norm(gradient - wanted) < 0.01 * np.linalg.norm(wanted)


@pytest.mark.parametrize("size", [8, 300])
def test_images_are_resized_as_pytorch_does(size):
    x = images(3, size, 1)
    expected = F.interpolate(as_torch(x), size=(224, 224), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(lpips._prepared(x, False), expected.permute(0, 2, 3, 1), atol=1e-5)


def test_features_of_length_zero_stay_zero_with_a_finite_gradient():
    features = jnp.zeros((1, 2, 2, 3)).at[0, 0, 0, 1].set(5.0)
    unit, pull_back = jax.vjp(lpips._unit_length, features)
    np.testing.assert_array_equal(unit, features / 5)
    (gradient,) = pull_back(jnp.ones_like(unit))
    np.testing.assert_allclose(gradient[0, 0, 0], [0.2, 0, 0.2], atol=1e-6)  # across it
    np.testing.assert_array_equal(gradient[0, 1], 0)


def _broken(kind, vgg, heads):
    vgg, heads = dict(vgg), {name: weight.clone() for name, weight in heads.items()}
    if kind == "missing key":
        del vgg["features.10.bias"]
    elif kind == "surplus key":
        heads["lin5.model.1.weight"] = torch.ones(1, 512, 1, 1)
    elif kind == "wrong shape":
        vgg["features.2.weight"] = torch.zeros(64, 64, 1, 1)
    elif kind == "wrong type":
        vgg["features.0.bias"] = torch.zeros(64, dtype=torch.int64)
    elif kind == "not finite":
        heads["lin0.model.1.weight"][0, 3] = torch.nan
    elif kind == "negative":
        heads["lin2.model.1.weight"][0, 3] = -1
    return vgg, heads


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing key", r"training.lpips_path, VGG16's weights .*vgg.pth: misses 'features.10.bias'"),
        ("surplus key", r"training.lpips_heads, .*heads.pth: has 'lin5.model.1.weight'"),
        ("wrong shape", r"features.2.weight has shape \(64, 64, 1, 1\)"),
        ("wrong type", r"features.0.bias is not a tensor of float16, float32 or float64"),
        ("not finite", r"lin0.model.1.weight has a number that is not finite"),
        ("negative", r"lin2.model.1.weight has a negative weight"),
    ],
)
def test_files_with_other_weights_are_refused(tmp_path, kind, message):
    for name, state in zip(("vgg.pth", "heads.pth"), _broken(kind, *random_states()), strict=True):
        torch.save(state, tmp_path / name)
    with pytest.raises(InputError, match=message):
        lpips.load_weights(tmp_path / "vgg.pth", tmp_path / "heads.pth")


class Code:
    def __reduce__(self):
        return print, ("executed",)


def test_missing_damaged_and_pickled_files_are_refused(files, tmp_path, capsys):
    def refused(path, message):
        with pytest.raises(InputError, match=message) as error:
            lpips.load_weights(files[0], path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none.pth", "there is no such file")
    (tmp_path / "short.pth").write_bytes(files[1].read_bytes()[:1000])
    refused(tmp_path / "short.pth", "truncated")
    torch.save({"lin0.model.1.weight": Code()}, tmp_path / "code.pth")
    refused(tmp_path / "code.pth", "carries code")
    torch.save([1.0], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "not a state dict")
    assert "executed" not in capsys.readouterr().out
