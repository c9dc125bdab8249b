import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import losses
import models
import parallel
import segments


class Linear(nn.Module):
    """A network of nine numbers, with dropout's interface."""

    @nn.compact
    def __call__(self, x, labels, index, train=False):
        scale = self.param("scale", nn.initializers.normal(), (3, 3))
        return x * scale[..., None] + labels[:, None, None, None] / 999.0


def fresh_weights(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return models.Weights(params=params, ema_params=params, mu=zeros, nu=zeros, count=0, step=0)


def pairs(n, seed=0):
    random = np.random.default_rng(seed)
    index = np.arange(n, dtype=np.int32) % 2
    boundaries = np.float32([1.0, 0.3, 0.0])
    x1 = random.normal(size=(n, 3, 3, 1)).astype(np.float32)
    x0 = random.normal(size=(n, 3, 3, 1)).astype(np.float32)
    return {"x0": x0, "x1": x1, "t0": boundaries[index + 1], "t1": boundaries[index], "index": index}


def keys(n, step=3):
    return losses.example_keys(0, jnp.int32(step), jnp.arange(n))


def test_rf_targets_lie_on_the_line_from_noise_to_data():
    data = np.random.default_rng(0).normal(size=(64, 3, 3, 1)).astype(np.float32)
    targets = losses.rf_targets(keys(64), {"image": data})
    tau = segments.tau_of_t(np.asarray(targets.t))[:, None, None, None]
    noise = data - np.asarray(targets.velocity)
    np.testing.assert_allclose(targets.x, tau * data + (1 - tau) * noise, atol=1e-5)
    assert np.all(np.asarray(targets.index) == 0)
    assert 0 <= targets.t.min() < 0.1
    assert 0.9 < targets.t.max() <= 1
    assert abs(noise.std() - 1) < 0.1


def test_an_euler_step_along_a_reflow_target_lands_on_the_end():
    batch = pairs(8)
    targets = losses.distill_targets(keys(8), batch)
    np.testing.assert_array_equal(targets.x, batch["x1"])
    np.testing.assert_array_equal(targets.t, batch["t1"])
    step = segments.tau_of_t(batch["t0"]) - segments.tau_of_t(batch["t1"])
    np.testing.assert_allclose(targets.x + step[:, None, None, None] * targets.velocity, batch["x0"], atol=1e-6)


def test_reflow_targets_share_the_lines_velocity_and_stay_between_its_ends():
    batch = pairs(64)
    targets = losses.reflow_targets(keys(64), batch)
    np.testing.assert_array_equal(targets.velocity, losses.distill_targets(keys(64), batch).velocity)
    u = (np.asarray(targets.t) - batch["t0"]) / (batch["t1"] - batch["t0"])
    assert np.all((u >= 0) & (u <= 1))
    assert u.std() > 0.2
    u = u[:, None, None, None]
    np.testing.assert_allclose(targets.x, (1 - u) * batch["x0"] + u * batch["x1"], atol=1e-5)


def test_loss_is_the_mean_or_half_the_sum_over_pixels():
    velocity, target = jnp.ones((2, 3, 3, 1)), jnp.zeros((2, 3, 3, 1)).at[0].set(3.0)
    targets = losses.distill_targets(keys(2), pairs(2))._replace(velocity=target)
    assert losses.make_loss("l2")(velocity, targets) == pytest.approx((4 + 1) / 2)
    assert losses.make_loss("l2", reduce_mean=False)(velocity, targets) == pytest.approx(0.5 * 9 * (4 + 1) / 2)


@pytest.mark.parametrize(("updates", "expected"), [(0, 0.1), (90, 0.91), (10**7, 0.9999)])
def test_variable_ema_rate_is_capped_by_the_updates_so_far(updates, expected):
    assert losses.ema_rate_at(updates, 0.9999, variable=True) == pytest.approx(expected)
    assert losses.ema_rate_at(updates, 0.9999, variable=False) == 0.9999


@pytest.mark.parametrize("warmup", [0, 4])
def test_optimizer_is_adam_with_warm_up_and_clipping(warmup):
    ours = losses.optimizer(lr=0.1, beta1=0.9, eps=1e-8, warmup=warmup, grad_clip=1.0)
    params = {"w": jnp.float32([3.0, -4.0])}
    gradient = {"w": jnp.float32([30.0, 40.0])}
    state = ours.init(params)
    m = v = np.zeros(2)
    for n in range(6):
        change, state = ours.update(gradient, state, params)
        g = np.array([0.6, 0.8])  # clipped to norm 1
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9 ** (n + 1))) / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
        rate = 0.1 * (min(n / warmup, 1) if warmup else 1)
        np.testing.assert_allclose(change["w"], -rate * step, rtol=1e-4, atol=1e-8)


def test_negative_grad_clip_is_off():
    ours = losses.optimizer(lr=1.0, beta1=0.0, eps=1.0, warmup=0, grad_clip=-1.0)
    params = jnp.float32([0.0])
    big, _ = ours.update(jnp.float32([1e4]), ours.init(params), params)
    assert big[0] == pytest.approx(-1e4 / (1e4 + 1), rel=1e-3)


def test_warm_adam_moments_keep_their_count_and_the_warm_up_starts_anew():
    transformation = losses.optimizer(lr=1.0, beta1=0.9, eps=1e-8, warmup=10, grad_clip=-1.0)
    weights = fresh_weights({"w": jnp.ones(2)})
    weights = weights.replace(mu={"w": jnp.full(2, 0.5)}, nu={"w": jnp.full(2, 0.25)}, count=1000)
    state = losses.initial_state(weights, transformation)
    change, _ = transformation.update({"w": jnp.full(2, 0.5)}, state.opt_state, weights.params)
    np.testing.assert_array_equal(change["w"], 0)  # warm-up's first update
    assert state.opt_state[1].count == 1000


def _updates(devices, per_device, batches, state=None):
    model = Linear()
    transformation = losses.optimizer(lr=0.1, beta1=0.9, eps=1e-8, warmup=0, grad_clip=-1.0)
    params = model.init(jax.random.key(0), jnp.zeros((1, 3, 3, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
    state = losses.initial_state(fresh_weights(params), transformation) if state is None else state
    step = losses.make_train_step(
        model,
        losses.reflow_targets,
        losses.make_loss("l2"),
        transformation,
        ema_rate=0.9,
        variable_ema_rate=False,
        seed=5,
    )
    program = parallel.map_devices(step, devices=jax.devices()[:devices])
    n = len(next(iter(batches.values()))) // (devices * per_device)

    def shared(rows):
        return rows.reshape(n, devices, per_device, *rows.shape[1:]).swapaxes(0, 1)

    replicated = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * devices), state)
    state, values = program(replicated, {name: shared(rows) for name, rows in batches.items()})
    return jax.tree.map(lambda a: a[0], state), values[0]


def test_updates_do_not_depend_on_how_devices_share_the_batch():
    batches = pairs(16)
    one, loss_one = _updates(1, 8, batches)
    two, loss_two = _updates(2, 4, batches)
    np.testing.assert_allclose(loss_one, loss_two, rtol=1e-5)
    np.testing.assert_allclose(one.params["scale"], two.params["scale"], atol=1e-5)
    assert int(one.step) == int(two.step) == 2


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_two_updates_in_one_call_are_two_calls(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # written out, or as a loop
    batches = pairs(8)
    together, losses_together = _updates(1, 4, batches)
    first, loss_first = _updates(1, 4, {name: rows[:4] for name, rows in batches.items()})
    second, loss_second = _updates(1, 4, {name: rows[4:] for name, rows in batches.items()}, first)
    np.testing.assert_array_equal(losses_together, [loss_first[0], loss_second[0]])
    jax.tree.map(np.testing.assert_array_equal, together, second)


def test_ema_follows_the_weights_at_its_rate():
    start, _ = _updates(1, 4, pairs(4))
    before = Linear().init(jax.random.key(0), jnp.zeros((1, 3, 3, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
    expected = 0.9 * before["scale"] + 0.1 * start.params["scale"]
    np.testing.assert_allclose(start.ema_params["scale"], expected, atol=1e-6)
