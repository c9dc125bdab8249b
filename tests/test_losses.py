import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import distributed
import losses
import models
import sampling
import segments
import train_step
from models.weights import ema_name


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
    return train_step.example_keys(0, jnp.int32(step), jnp.arange(n))


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


def _ushape_cdf(u, a=4.0):
    rising, falling = np.expm1(a * u), np.expm1(a * (1 - u))
    return 0.5 * rising / np.expm1(a) + 0.5 * (1 - falling / np.expm1(a))


CDFS = {
    "uniform": lambda u: u,
    "ushape": _ushape_cdf,
    "exponential": lambda u: (10**u - 1) / 9,
    "logitnormal": lambda u: scipy.stats.norm.cdf(scipy.special.logit(u)),
}


@pytest.mark.parametrize("name", CDFS)
def test_draws_have_their_distribution(name):
    u = np.asarray(jax.jit(losses.draw_u, static_argnums=1)(keys(20_000), name), np.float64)
    assert 0 <= u.min() < 0.1
    assert 0.9 < u.max() <= 1
    assert scipy.stats.kstest(u, CDFS[name]).pvalue > 0.01


def test_the_shape_of_the_u_is_the_callers():
    u = np.asarray(losses.draw_u(keys(20_000), "ushape", shape=9.0), np.float64)
    assert scipy.stats.kstest(u, lambda u: _ushape_cdf(u, 9.0)).pvalue > 0.01


@pytest.mark.parametrize("name", ["uniform", "exponential"])
def test_the_distribution_of_1_rf_is_of_t(name):
    data = {"image": np.zeros((20_000, 1, 1, 1), np.float32)}
    targets = losses.rf_targets(keys(20_000), data, t_distribution=name)
    assert scipy.stats.kstest(np.asarray(targets.t, np.float64), CDFS[name]).pvalue > 0.01
    noise = -np.asarray(targets.velocity)
    np.testing.assert_allclose(targets.x, np.asarray(targets.u)[:, None, None, None] * noise, atol=1e-6)
    np.testing.assert_allclose(targets.u, 1 - segments.tau_of_t(targets.t), atol=1e-6)


@pytest.mark.parametrize("steps", [2, 3])
def test_m_step_targets_are_the_starts_of_m_euler_steps_that_reach_the_end(steps):
    batch = pairs(256)
    targets = losses.distill_targets(keys(256), batch, steps=steps)
    share = np.round(np.asarray(targets.u) * steps)
    np.testing.assert_array_equal(targets.u, (share / steps).astype(np.float32))
    assert np.all(np.abs(np.bincount(share.astype(int), minlength=steps + 1)[1:] - 256 / steps) < 40)
    grid = segments.step_grid([1.0, 0.3, 0.0], 2 * steps)
    distance = np.abs(np.asarray(targets.t)[:, None] - np.asarray(grid.t_from))
    np.testing.assert_array_less(distance.min(1), 1e-6)  # the sampler's own times
    left = segments.tau_of_t(batch["t0"]) - segments.tau_of_t(np.asarray(targets.t))
    np.testing.assert_allclose(targets.x + left[:, None, None, None] * targets.velocity, batch["x0"], atol=1e-5)


def test_one_step_a_segment_draws_nothing():
    batch = pairs(8)
    jax.tree.map(
        np.testing.assert_array_equal,
        losses.distill_targets(keys(8), batch),
        losses.distill_targets(keys(8, step=4), batch, steps=1),
    )


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


def test_losses_of_examples_are_their_formulas():
    random = np.random.default_rng(0)
    velocity, target = random.normal(size=(2, 5, 4, 4, 3))
    square = ((velocity - target) ** 2).sum((1, 2, 3))
    velocity, target = np.float32(velocity), np.float32(target)
    np.testing.assert_allclose(losses.LOSSES["l2"](velocity, target), square / 48, rtol=1e-5)
    c = 0.00054 * 48
    np.testing.assert_allclose(losses.LOSSES["huber"](velocity, target), (np.sqrt(square + c**2) - c) / 48, rtol=1e-5)
    gradient = jax.grad(lambda v: losses.LOSSES["huber"](v, target).sum())(target)
    np.testing.assert_array_equal(gradient, 0)  # finite where the error is 0


def absolute(x, y):
    return jnp.mean(jnp.abs(x - y), axis=(1, 2, 3))


def test_lpips_huber_weighs_both_by_u_where_the_end_is_data():
    batch = pairs(8)
    targets = losses.reflow_targets(keys(8), batch)
    velocity = targets.velocity + 1.0
    ends = {}

    def lpips(x_end_hat, x_end):
        ends.update(hat=x_end_hat, x_end=x_end)
        return absolute(x_end_hat, x_end)

    found = losses.lpips_huber(velocity, targets, lpips)
    np.testing.assert_allclose(ends["x_end"], batch["x0"], atol=1e-5)
    left = segments.tau_of_t(batch["t0"]) - segments.tau_of_t(np.asarray(targets.t))
    np.testing.assert_allclose(ends["hat"], batch["x0"] + left[:, None, None, None], atol=1e-5)
    u, smooth = np.asarray(targets.u), np.asarray(losses.LOSSES["huber"](velocity, targets.velocity))
    expected = np.where(batch["t0"] == 0, (1 - u) * smooth + left / np.maximum(u, 0.01), smooth)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_lpips_huber_of_distillation_is_lpips_alone_in_the_last_segment():
    targets = losses.distill_targets(keys(2), pairs(2))
    velocity = targets.velocity + 1.0
    found = float(losses.make_loss("lpips_huber", lpips=absolute)(velocity, targets))
    smooth = float(losses.LOSSES["huber"](velocity, targets.velocity)[0])
    lpips = segments.tau_of_t(0.0) - segments.tau_of_t(0.3)  # of a velocity that is 1 off for that long
    assert found == pytest.approx((smooth + float(lpips)) / 2, rel=1e-4)


@pytest.mark.parametrize(("updates", "expected"), [(0, 0.1), (90, 0.91), (10**7, 0.9999)])
def test_variable_ema_rate_is_capped_by_the_updates_so_far(updates, expected):
    assert train_step.ema_rate_at(updates, 0.9999, variable=True) == pytest.approx(expected)
    assert train_step.ema_rate_at(updates, 0.9999, variable=False) == 0.9999


@pytest.mark.parametrize("warmup", [0, 4])
def test_optimizer_is_adam_with_warm_up_and_clipping(warmup):
    ours = train_step.optimizer(lr=0.1, beta1=0.9, eps=1e-8, warmup=warmup, grad_clip=1.0)
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
    ours = train_step.optimizer(lr=1.0, beta1=0.0, eps=1.0, warmup=0, grad_clip=-1.0)
    params = jnp.float32([0.0])
    big, _ = ours.update(jnp.float32([1e4]), ours.init(params), params)
    assert big[0] == pytest.approx(-1e4 / (1e4 + 1), rel=1e-3)


def test_warm_adam_moments_keep_their_count_and_the_warm_up_starts_anew():
    transformation = train_step.optimizer(lr=1.0, beta1=0.9, eps=1e-8, warmup=10, grad_clip=-1.0)
    weights = fresh_weights({"w": jnp.ones(2)})
    weights = weights.replace(mu={"w": jnp.full(2, 0.5)}, nu={"w": jnp.full(2, 0.25)}, count=1000)
    state = train_step.initial_state(weights, transformation)
    change, _ = transformation.update({"w": jnp.full(2, 0.5)}, state.opt_state, weights.params)
    np.testing.assert_array_equal(change["w"], 0)  # warm-up's first update
    assert state.opt_state[1].count == 1000


def test_cosine_schedule_falls_to_zero_after_the_warm_up():
    options = {"lr": 0.1, "beta1": 0.0, "eps": 1e-8, "grad_clip": -1.0}
    ours = train_step.optimizer(**options, warmup=4, schedule="cosine", n_iters=12)
    params = jnp.ones(2)
    state = ours.init(params)
    constant = train_step.optimizer(**options, warmup=4).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(constant)
    rates = []
    for _ in range(13):
        change, state = ours.update(jnp.ones(2), state, params)
        rates.append(-float(change[0]))
    expected = [0.1 * (n / 4 if n < 4 else 0.5 * (1 + np.cos(np.pi * (n - 4) / 8))) for n in range(13)]
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-7)
    no_warmup = train_step.optimizer(**options, warmup=0, schedule="cosine", n_iters=12)
    change, _ = no_warmup.update(jnp.ones(2), no_warmup.init(params), params)
    assert -float(change[0]) == pytest.approx(0.1, rel=1e-4)


def test_a_start_from_the_ema_has_a_fresh_adam():
    transformation = train_step.optimizer(lr=1.0, beta1=0.9, eps=1e-8, warmup=0, grad_clip=-1.0)
    weights = fresh_weights({"w": jnp.ones(2)})
    weights = weights.replace(ema_params={"w": jnp.full(2, 5.0)}, mu={"w": jnp.ones(2)}, nu={"w": jnp.ones(2)}, count=9)
    state = train_step.initial_state(weights, transformation, from_ema=True, ema_rates=(0.5,))
    for tree in (state.params, state.ema_params, state.extra_ema["0.5"]):
        np.testing.assert_array_equal(tree["w"], 5.0)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, transformation.init(weights.params))


def _updates(devices, per_device, batches, state=None, **options):
    model = Linear()
    transformation = train_step.optimizer(lr=0.1, beta1=0.9, eps=1e-8, warmup=0, grad_clip=-1.0)
    params = model.init(jax.random.key(0), jnp.zeros((1, 3, 3, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
    state = train_step.initial_state(fresh_weights(params), transformation) if state is None else state
    step = train_step.make_train_step(
        model,
        losses.distill_targets if options.get("on_policy") else losses.reflow_targets,
        losses.make_loss("l2"),
        transformation,
        ema_rate=0.9,
        variable_ema_rate=False,
        **options,
    )
    program = distributed.map_devices(step, devices=jax.devices()[:devices])
    n = len(next(iter(batches.values()))) // (devices * per_device)

    def shared(rows):
        return rows.reshape(n, devices, -1, *rows.shape[1:]).swapaxes(0, 1)

    replicated = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * devices), state)
    state, values = program(
        replicated, {name: shared(rows) for name, rows in batches.items()}, np.full(devices, 5, np.uint32)
    )
    return jax.tree.map(lambda a: a[0], (state, values))


def test_updates_do_not_depend_on_how_devices_share_the_batch():
    batches = pairs(16)
    one, loss_one = _updates(1, 8, batches)
    two, loss_two = _updates(2, 4, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), loss_one, loss_two)
    np.testing.assert_allclose(one.params["scale"], two.params["scale"], atol=1e-5)
    assert int(one.step) == int(two.step) == 2


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_two_updates_in_one_call_are_two_calls(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # written out, or as a loop
    batches = pairs(8)
    together, losses_together = _updates(1, 4, batches)
    first, loss_first = _updates(1, 4, {name: rows[:4] for name, rows in batches.items()})
    second, loss_second = _updates(1, 4, {name: rows[4:] for name, rows in batches.items()}, first)
    separate = jax.tree.map(lambda *values: np.concatenate(values), loss_first, loss_second)
    jax.tree.map(np.testing.assert_array_equal, losses_together, separate)
    jax.tree.map(np.testing.assert_array_equal, together, second)


def test_updates_that_are_not_finite_are_dropped_where_asked():
    batches = {name: np.array(rows) for name, rows in pairs(12).items()}
    batches["x0"][5] = np.inf  # in the second of three updates
    good = [{name: rows[n : n + 4] for name, rows in batches.items()} for n in (0, 8)]
    kept, values = _updates(1, 4, batches, drop_nonfinite=True)
    first, _ = _updates(1, 4, good[0])
    expected, _ = _updates(1, 4, good[1], first.replace(step=first.step + 1))
    jax.tree.map(np.testing.assert_array_equal, kept, expected)
    for value in values.values():
        np.testing.assert_array_equal(np.isfinite(value), [True, False, True])
    spoiled, _ = _updates(1, 4, batches)
    assert not np.isfinite(spoiled.params["scale"]).any()


def test_the_gradient_norm_is_that_of_the_whole_batch_before_clipping():
    batch, weights = pairs(8), Linear().init(jax.random.key(0), jnp.zeros((1, 3, 3, 1)), jnp.zeros(1), jnp.zeros(1))
    clipping = train_step.optimizer(lr=0.1, beta1=0.9, eps=1e-8, warmup=0, grad_clip=1e-3)
    _, values = _updates(2, 4, batch, train_step.initial_state(fresh_weights(weights["params"]), clipping))
    wanted = losses.reflow_targets(train_step.example_keys(5, jnp.int32(0), jnp.arange(8)), batch)
    scale = np.float64(weights["params"]["scale"])[..., None]
    error = (
        np.float64(wanted.x) * scale + np.float64(segments.tau_of_t(wanted.t))[:, None, None, None] - wanted.velocity
    )
    gradient = np.sum(2 * error * wanted.x, axis=(0, 3)) / error.size  # of the mean square, by hand
    np.testing.assert_allclose(values["gradient_norm"], [np.linalg.norm(gradient)], rtol=1e-5)


def test_ema_follows_the_weights_at_its_rate():
    start, _ = _updates(1, 4, pairs(4))
    before = Linear().init(jax.random.key(0), jnp.zeros((1, 3, 3, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
    expected = 0.9 * before["scale"] + 0.1 * start.params["scale"]
    np.testing.assert_allclose(start.ema_params["scale"], expected, atol=1e-6)


def test_further_emas_follow_at_their_own_rates():
    transformation = train_step.optimizer(lr=0.1, beta1=0.9, eps=1e-8, warmup=0, grad_clip=-1.0)
    before = {"scale": jnp.ones((3, 3))}
    state = train_step.initial_state(fresh_weights(before), transformation, ema_rates=(0.5, 0.75))
    after, _ = _updates(1, 4, pairs(4), state)
    for rate in (0.5, 0.75):
        expected = rate * before["scale"] + (1 - rate) * after.params["scale"]
        np.testing.assert_allclose(after.extra_ema[ema_name(rate)]["scale"], expected, atol=1e-6)


# --- on-policy pairs --------------------------------------------------------------------------------------------------

BOUNDARIES = (1.0, 0.55, 0.2, 0.0)
on_policy_pairs = jax.jit(losses.on_policy_pairs, static_argnums=(0, 3, 4))


def curved(x, t, index):
    return jnp.sin(3.0 * x) - (t + index)[:, None, None, None] * x


def teacher_states(n, k=3, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=(n, k + 1, 3, 3, 1)))


@pytest.mark.parametrize(("steps", "n", "first"), [(1, 6, 0), (1, 2, 4), (2, 13, 5), (3, 4, 22)])
def test_on_policy_starts_are_the_samplers_states_and_ends_the_teachers(steps, n, first):
    states, num_steps = teacher_states(n), 3 * steps
    positions = first + jnp.arange(n)
    rows = []  # of each network call

    def velocity(x, t, index):
        rows.append(len(x))
        return curved(x, t, index)

    found = on_policy_pairs(velocity, states, positions, BOUNDARIES, num_steps)
    solved = sampling.solve(
        curved, states[:, 0], BOUNDARIES, method="pc", num_scales=num_steps, predictor="rf_solver", save_trajectory=True
    )
    j = np.asarray(positions) % num_steps
    segment = j // steps
    np.testing.assert_allclose(found["x1"], np.asarray(solved.xs)[j, np.arange(n)], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found["t1"], np.asarray(solved.ts)[j])
    np.testing.assert_array_equal(found["index"], segment)
    np.testing.assert_array_equal(found["x0"], states[np.arange(n), segment + 1])
    np.testing.assert_array_equal(found["t0"], np.float32(BOUNDARIES)[segment + 1])
    np.testing.assert_allclose(found["u"], 1 - (j % steps) / steps, atol=1e-6)
    whole = n // num_steps
    assert whole * num_steps * (num_steps - 1) / 2 <= sum(rows) <= (whole + 1) * num_steps * (num_steps - 1) / 2


def test_an_euler_step_along_an_on_policy_target_lands_on_the_teachers_state():
    states = teacher_states(12)
    on_policy = on_policy_pairs(curved, states, jnp.arange(12), BOUNDARIES, 6)
    targets = losses.distill_targets(keys(0), {"on_policy": on_policy}, steps=2)
    np.testing.assert_array_equal(targets.x, on_policy["x1"])
    left = segments.tau_of_t(targets.t_end) - segments.tau_of_t(targets.t)
    np.testing.assert_allclose(targets.x + left[:, None, None, None] * targets.velocity, on_policy["x0"], atol=1e-5)
    np.testing.assert_allclose(targets.u, [1, 0.5] * 6, atol=1e-6)


def test_stored_and_on_policy_rows_stand_side_by_side():
    stored, on_policy = pairs(4), on_policy_pairs(curved, teacher_states(3), jnp.arange(3), BOUNDARIES, 3)
    both = losses.distill_targets(keys(4), stored | {"on_policy": on_policy}, steps=2)
    alone = losses.distill_targets(keys(4), stored, steps=2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:4], b), both, alone)
    np.testing.assert_array_equal(both.x[4:], on_policy["x1"])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_on_policy_updates_do_not_depend_on_how_devices_share_the_batch(share):
    options = losses.OnPolicy(BOUNDARIES, 3)
    batches = {"states": teacher_states(8)} | (pairs(8) if share < 1 else {})
    one, loss_one = _updates(1, 4, batches, on_policy=options)
    two, loss_two = _updates(2, 2, batches, on_policy=options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), loss_one, loss_two)
    np.testing.assert_allclose(one.params["scale"], two.params["scale"], atol=1e-5)


def test_on_policy_states_are_those_of_the_ema():
    transformation = train_step.optimizer(lr=0.1, beta1=0.9, eps=1e-8, warmup=0, grad_clip=-1.0)
    params, ema = {"scale": jnp.ones((3, 3))}, {"scale": jnp.full((3, 3), 0.25)}
    state = train_step.initial_state(fresh_weights(params).replace(ema_params=ema), transformation)
    states = teacher_states(4)
    _, values = _updates(1, 4, {"states": states}, state, on_policy=losses.OnPolicy(BOUNDARIES, 3))
    student = models.velocity_fn(Linear(), ema)
    targets = losses.distill_targets(
        keys(0), {"on_policy": on_policy_pairs(student, states, jnp.arange(4), BOUNDARIES, 3)}
    )
    answer = models.velocity_fn(Linear(), params)(targets.x, targets.t, targets.index)
    assert values["loss"][0] == pytest.approx(float(np.mean((answer - targets.velocity) ** 2)), rel=1e-5)
