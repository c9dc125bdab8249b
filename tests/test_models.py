"""The networks against their twin in plain PyTorch, option by option; resampling against SciPy; the k heads."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.signal
import torch
from flax import traverse_util

import models
from benchmarks.torch_twin import Twin, randomized
from configs.default import get_default_config
from models import resampling
from models.pytorch.layout import entries_of
from utils import InputError

torch.set_num_threads(1)  # on images this small threads only wait for each other


def tiny_config(image_size=8, num_channels=3, centered=True, k=1, **model):
    """A configuration whose network runs in a blink."""
    config = get_default_config()
    config.data.update(image_size=image_size, num_channels=num_channels, centered=centered)
    config.model.update(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0)
    config.model.update(model)
    config.training.reflow_t = k
    return config


# Compiling is what these tests wait for, not the arithmetic.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def params_of(twin, model):
    """The twin's weights as our parameter tree, one head."""
    state = twin.state_dict()
    leaves = {entry.path: entry.to_flax(state[entry.name].numpy()) for entry in entries_of(model)}
    return traverse_util.unflatten_dict(leaves)


def random_inputs(config, batch=3):
    """(x, labels), labels over the whole range."""
    size, channels = config.data.image_size, config.data.num_channels
    x = np.random.default_rng(0).normal(size=(batch, size, size, channels)).astype(np.float32)
    return x, np.linspace(1.7, 998.0, batch).astype(np.float32)


def output(config, params, x, labels, index=None):
    """The network's velocity, compiled."""
    index = jnp.zeros(len(x), jnp.int32) if index is None else jnp.asarray(index, jnp.int32)
    apply = quick_jit(models.create_model(config).apply)
    return np.asarray(apply({"params": params}, jnp.asarray(x), jnp.asarray(labels), index))


def twin_output(twin, x, labels):
    """The same from PyTorch, in our layout."""
    with torch.no_grad():
        return twin.eval()(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(labels)).permute(0, 2, 3, 1).numpy()


PYRAMIDS = {"progressive": "output_skip", "progressive_input": "input_skip"}
RESIDUAL = {"progressive": "residual", "progressive_input": "residual"}
FOURIER = {"embedding_type": "fourier"}
FAMILY = {
    "ddpm++": {},
    "ncsn++": {**FOURIER, **PYRAMIDS, "fir": True, "scale_by_sigma": True},
    "fir of odd length, one channel": {"fir": True, "fir_kernel": (1, 2, 1), **PYRAMIDS, "num_channels": 1},
    "long uneven fir, residual": {"fir": True, "fir_kernel": (1, 2, 3, 5, 7, 1), **RESIDUAL, "skip_rescale": False},
    "fir, elu": {"fir": True, "nonlinearity": "elu"},
    "ddpm blocks, relu": {"resblock_type": "ddpm", "nonlinearity": "relu"},
    "ddpm blocks without convolution": {"resblock_type": "ddpm", "resamp_with_conv": False, **PYRAMIDS},
    "ddpm blocks, fir, residual": {"resblock_type": "ddpm", "fir": True, **RESIDUAL},
    "ddpm blocks, fir without convolution": {
        "resblock_type": "ddpm", "fir": True, "resamp_with_conv": False, "nonlinearity": "lrelu",
    },
    "pyramids, cat, not centered": {**PYRAMIDS, "progressive_combine": "cat", "centered": False},
    "pyramids, cat, fir, 3 levels": {
        **PYRAMIDS, "progressive_combine": "cat", "fir": True, "ch_mult": (1, 2, 1), "num_res_blocks": 2,
    },
    "residual, 3 levels": {**RESIDUAL, "ch_mult": (1, 2, 2)},
    "residual out, skip in": {"progressive": "residual", "progressive_input": "input_skip"},
    "skip out, residual in": {"progressive": "output_skip", "progressive_input": "residual", "fir": True},
    "positional, by sigma": {"scale_by_sigma": True, "sigma_max": 20.0, "sigma_min": 0.5},
    "fourier without time": {**FOURIER, "conditional": False},
    "12 pixels, 3 levels, 2 blocks": {
        "image_size": 12, "ch_mult": (1, 1, 2), "num_res_blocks": 2, "attn_resolutions": (3, 12),
    },
    "one level": {"ch_mult": (2,), "attn_resolutions": ()},
}  # fmt: skip


@pytest.mark.parametrize("options", FAMILY.values(), ids=FAMILY.keys())
def test_every_option_computes_what_the_twin_does(options):
    config = tiny_config(**options)
    torch.manual_seed(0)
    twin = randomized(Twin(config))
    x, labels = random_inputs(config)
    expected = twin_output(twin, x, labels)
    assert np.abs(expected).max() > (1e-2 if config.model.scale_by_sigma else 0.1)
    found = output(config, params_of(twin, models.create_model(config)), x, labels)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


KERNELS = [(1, 3, 3, 1), (1, 2, 1), (1, 1), (1, 4, 6, 4, 1), (1, 2, 3, 5), (1, 0, 2, 3, 1, 7)]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("direction", ["up", "down"])
def test_filtered_resampling_is_upfirdn(kernel, direction):
    x = np.random.default_rng(0).normal(size=(2, 6, 8, 3)).astype(np.float32)
    taps = np.asarray(kernel, np.float64) / sum(kernel)
    p = len(kernel) - 2
    expected = x.astype(np.float64)
    for axis in (1, 2):
        size = expected.shape[axis]
        if direction == "up":
            # SciPy returns the whole convolution; padding by n samples in front means starting n samples earlier.
            full = scipy.signal.upfirdn(2 * taps, expected, up=2, axis=axis)
            start = len(kernel) - 1 - ((p + 1) // 2 + 1)
            expected = full.take(np.arange(start, start + 2 * size), axis)
        else:
            full = scipy.signal.upfirdn(taps, expected, axis=axis)
            start = len(kernel) - 1 - (p + 1) // 2
            expected = full.take(np.arange(start, start + size, 2), axis)
    resample = resampling.upsample if direction == "up" else resampling.downsample
    np.testing.assert_allclose(resample(jnp.asarray(x), kernel), expected, rtol=0, atol=2e-6)


def test_plain_resampling_repeats_and_averages():
    x = jnp.arange(8.0).reshape(1, 2, 4, 1)
    np.testing.assert_array_equal(resampling.downsample(x, None)[0, :, :, 0], [[2.5, 4.5]])
    np.testing.assert_array_equal(resampling.upsample(x, None)[0, :2, :4, 0], [[0, 0, 1, 1], [0, 0, 1, 1]])
    np.testing.assert_array_equal(resampling.downsample(resampling.upsample(x, None), None), x)


def made_up(config):
    """(model, params) with every weight its own, which costs no compiling and silences no layer."""
    model, rng = models.create_model(config), np.random.default_rng(0)
    image_shape = (config.data.image_size, config.data.image_size, config.data.num_channels)
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0), image_shape))

    def weight(leaf):
        spread = (leaf.size / leaf.shape[-1]) ** -0.5 if len(leaf.shape) > 1 else 1.0
        return jnp.asarray(spread * rng.normal(size=leaf.shape), jnp.float32)

    return model, jax.tree.map(weight, shapes)


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_copied_heads_compute_what_the_one_head_did(embedding):
    config = tiny_config(embedding_type=embedding)
    _, params = made_up(config)
    x, labels = random_inputs(config, batch=4)
    expected = output(config, params, x, labels)
    wide = models.expand_heads(params, 4)
    config.training.reflow_t = 4
    found = output(config, wide, x, labels, index=[0, 1, 2, 3])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert models.expand_heads(wide, 4)["all_modules_1"].keys() == params["all_modules_1"].keys()
    with pytest.raises(ValueError, match="4 time-embedding heads cannot become a network with 3"):
        models.expand_heads(wide, 3)


def test_shapes_are_told_without_making_weights():
    model, params = made_up(tiny_config(k=3, embedding_type="fourier"))
    made = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}
    assert models.weight_shapes(model) == made
    assert models.weight_shapes(model)["all_modules_1", "head_bias"] == (3, 32)
    assert models.weight_shapes(model) is models.weight_shapes(model)


def test_each_example_uses_its_own_head():
    config = tiny_config(k=3)
    _, params = made_up(config)
    x, labels = random_inputs(config, batch=3)
    found = output(config, params, x, labels, index=[2, 0, 1])
    alone = tiny_config(k=1)

    def head(i):
        return traverse_util.path_aware_map(lambda path, w: w[i : i + 1] if path[-1].startswith("head_") else w, params)

    expected = [output(alone, head(i), x[n : n + 1], labels[n : n + 1])[0] for n, i in enumerate([2, 0, 1])]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - output(config, params, x, labels, index=[0, 1, 2])).max() > 1e-3


def test_only_the_heads_in_the_batch_get_a_gradient_and_the_frequencies_get_none():
    config = tiny_config(k=3, embedding_type="fourier")
    model, params = made_up(config)
    x, labels = random_inputs(config, batch=2)

    def loss(params):
        return (model.apply({"params": params}, jnp.asarray(x), labels, jnp.array([0, 2])) ** 2).mean()

    gradient = quick_jit(jax.grad(loss))(params)
    assert not np.any(gradient["all_modules_0"]["W"])
    for dense in ("all_modules_1", "all_modules_2"):
        moved = [bool(np.any(gradient[dense]["head_kernel"][i])) for i in range(3)]
        assert moved == [True, False, True]


def test_dropout_acts_in_training_only_and_follows_its_key():
    config = tiny_config(dropout=0.5)
    model, params = made_up(config)
    x, labels = random_inputs(config)
    inputs = jnp.asarray(x), jnp.asarray(labels), jnp.zeros(3, jnp.int32)

    @quick_jit
    def trained(seed):
        return model.apply({"params": params}, *inputs, train=True, rngs={"dropout": jax.random.key(seed)})

    still = output(config, params, x, labels)
    np.testing.assert_array_equal(output(tiny_config(dropout=0.0), params, x, labels), still)
    np.testing.assert_array_equal(trained(1), trained(1))
    assert np.abs(trained(1) - still).max() > 1e-3
    assert np.abs(trained(1) - trained(2)).max() > 1e-3


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


def test_in_bfloat16_velocities_are_a_few_percent_off_and_float32():
    full, half = tiny_config(**FAMILY["ncsn++"]), tiny_config(**FAMILY["ncsn++"], dtype="bfloat16")
    params = params_of(randomized(Twin(full)), models.create_model(full))
    x, labels = random_inputs(full)
    exact, rounded = output(full, params, x, labels), output(half, params, x, labels)
    assert rounded.dtype == np.float32
    assert 1e-4 < np.sqrt(np.mean((exact - rounded) ** 2) / np.mean(exact**2)) < 0.05
    networks = models.create_model(full), models.create_model(half)
    assert models.network_identity(networks[0]) == models.network_identity(networks[1])  # the weights are the same


@pytest.mark.parametrize("family", ["ddpm++", "ncsn++", "ddpm blocks, fir, residual"])
def test_in_bfloat16_convolutions_are_rounded_and_statistics_are_not(family):
    config = tiny_config(**FAMILY[family], dtype="bfloat16")
    params = params_of(randomized(Twin(config)), models.create_model(config))
    x, labels = random_inputs(config)
    jaxpr = jax.make_jaxpr(models.create_model(config).apply)({"params": params}, x, labels, jnp.zeros(3, jnp.int32))
    found = {}
    for equation in equations(jaxpr.jaxpr):
        for operand in equation.invars[:1]:
            found.setdefault(equation.primitive.name, set()).add(str(operand.aval.dtype))
    assert found["conv_general_dilated"] == {"bfloat16"}
    assert found["rsqrt"] == found["exp"] == found["sin"] == {"float32"}  # group norms, softmax, time embedding


def test_activations_that_are_not_kept_change_nothing():
    small = {"dropout": 0.5, "ch_mult": (1,), "attn_resolutions": (8,)}
    x, labels = map(jnp.asarray, random_inputs(tiny_config()))
    index, options = jnp.zeros(3, jnp.int32), {"train": True, "rngs": {"dropout": jax.random.key(1)}}
    _, params = made_up(tiny_config(**small))

    def gradient(remat):
        model = models.create_model(tiny_config(**small, remat=remat))

        def square(params):
            return jnp.mean(model.apply({"params": params}, x, labels, index, **options) ** 2)

        names = [equation.primitive.name for equation in equations(jax.make_jaxpr(square)(params).jaxpr)]
        return quick_jit(jax.grad(square))(params), names.count("remat2")

    (kept, none), (recomputed, blocks) = gradient(False), gradient(True)
    assert (none, blocks) == (0, 8)  # of one level: 5 residual blocks and 3 of attention
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), kept, recomputed)


def test_velocity_fn_speaks_t():
    config = tiny_config()
    model, params = made_up(config)
    x, _ = random_inputs(config)
    t, index = jnp.array([0.0, 0.5, 1.0]), jnp.zeros(3, jnp.int32)
    labels = 999 * np.array([1.0, 0.5005, 0.001], np.float32)
    found = quick_jit(models.velocity_fn(model, params))(jnp.asarray(x), t, index)
    np.testing.assert_allclose(found, output(config, params, x, labels), rtol=0, atol=1e-5)


def test_a_new_network_predicts_almost_zero_and_is_the_same_for_the_same_key():
    config = tiny_config(ch_mult=(1,), attn_resolutions=())
    model = models.create_model(config)
    first, second = (models.init_params(model, jax.random.key(3), (8, 8, 3)) for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    assert np.abs(output(config, first, *random_inputs(config))).max() < 1e-3


def test_golden_json_without_any_other_section_is_enough():
    config = ml_collections.ConfigDict({"data": {"image_size": 8}, "model": {"nf": 8, "ch_mult": [1, 1]}})
    assert models.create_model(config).heads == 1


WRONG = {
    "embedding_type": "learned",
    "resblock_type": "resnet",
    "progressive": "skip",
    "progressive_input": "output_skip",
    "progressive_combine": "mean",
    "nonlinearity": "gelu",
    "attention_type": "linear",
    "normalization": "BatchNorm",
    "name": "unet",
    "nf": 0,
    "num_res_blocks": 0,
    "ch_mult": (),
    "attn_resolutions": (0,),
    "dropout": 1.0,
    "fir_kernel": (1, -1),
    "conv_size": 5,
    "fourier_scale": -1,
    "sigma_min": 0.0,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_named(name):
    config = tiny_config()
    config.model[name] = WRONG[name]
    with pytest.raises(InputError, match=rf"config\.model\.{name} = .*(use|must)"):
        models.create_model(config)


def test_wrong_sizes_are_named():
    with pytest.raises(InputError, match=r"config\.data\.image_size = 10: .* use a multiple of 4"):
        models.create_model(tiny_config(image_size=10, ch_mult=(1, 1, 1)))
    with pytest.raises(InputError, match=r"config\.training\.reflow_t = 0"):
        models.create_model(tiny_config(k=0))
    model = models.create_model(tiny_config(nf=100, ch_mult=(1, 2)))
    with pytest.raises(InputError, match=r"config\.model\.nf and ch_mult make a layer of 200 channels"):
        models.init_params(model, jax.random.key(0), (8, 8, 3))
    model, params = made_up(tiny_config())
    with pytest.raises(ValueError, match=r"takes images of shape \(8, 8, 3\), got \(16, 16, 3\)"):
        model.apply({"params": params}, jnp.zeros((1, 16, 16, 3)), jnp.ones(1), jnp.zeros(1, jnp.int32))
