import jax
import numpy as np
import pytest

import checkpoints
import losses
import models
from configs.rf.digits_rf_continuous import get_config
from utils import InputError


def tiny_config(k=1):
    config = get_config()
    config.model.update(nf=4, ch_mult=(1,), attn_resolutions=())
    config.training.reflow_t = k
    return config


@pytest.fixture(scope="module")
def weights():
    config = tiny_config()
    params = models.init_params(models.create_model(config), jax.random.key(0), (8, 8, 1))
    random = np.random.default_rng(0)

    def noise(tree):
        return jax.tree.map(lambda a: random.normal(size=a.shape).astype(np.float32), tree)

    return models.Weights(
        params=noise(params), ema_params=noise(params), mu=noise(params), nu=noise(params), count=7, step=30
    )


def state_of(weights, step):
    transformation = losses.optimizer(lr=1e-3, beta1=0.9, eps=1e-8, warmup=5, grad_clip=1.0)
    return losses.initial_state(weights, transformation, step=step)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def info(config, stage="1_rf"):
    return checkpoints.describe(config, stage, np.linspace(1, 0, config.training.reflow_t + 1), "")


def saved(folder, config, weights, *steps, keep=True):
    kept = checkpoints.RunCheckpoints(folder)
    for step in steps:
        kept.save(state_of(weights, step), info(config), keep=keep)
    kept.close()


def test_a_state_comes_back_bit_for_bit_and_the_latest_counts(tmp_path, weights):
    config = tiny_config()
    saved(tmp_path / "1_rf", config, weights, 0, 10)
    saved(tmp_path / "1_rf", config, weights, 5, 15, keep=False)
    assert checkpoints.steps_in(tmp_path / "1_rf") == [0, 10]
    kept = checkpoints.RunCheckpoints(tmp_path / "1_rf")
    like = jax.eval_shape(lambda: state_of(weights, 0))
    state = kept.resume(like, info(config))
    kept.close()
    same(state, state_of(weights, 15))
    assert not (tmp_path / "1_rf" / "checkpoints-meta" / "5").exists()


def test_another_network_is_not_resumed(tmp_path, weights):
    saved(tmp_path / "1_rf", tiny_config(), weights, 0)
    kept = checkpoints.RunCheckpoints(tmp_path / "1_rf")
    other = tiny_config()
    other.model.nf = 8
    with pytest.raises(InputError, match="another --workdir"):
        kept.resume(jax.eval_shape(lambda: state_of(weights, 0)), info(other))
    kept.close()


@pytest.mark.parametrize("place", ["", "1_rf", "1_rf/checkpoints", "1_rf/checkpoints/10"])
def test_weights_load_from_any_folder_of_a_run_with_their_head_copied(tmp_path, weights, place):
    saved(tmp_path / "1_rf", tiny_config(), weights, 0, 10)
    loaded = checkpoints.load_weights(tmp_path / place, tiny_config(k=3))
    assert loaded.step == 10
    same(loaded.ema_params, models.expand_heads(weights.ema_params, 3))
    same(loaded.nu, models.expand_heads(weights.nu, 3))


def test_an_exported_file_comes_back_bit_for_bit(tmp_path, weights):
    path = tmp_path / "exported.safetensors"
    checkpoints.export_file(path, weights, tiny_config())
    loaded = checkpoints.load_weights(path, tiny_config())
    same(loaded.params, weights.params)
    same(loaded.mu, weights.mu)
    assert (loaded.step, loaded.count) == (30, 7)


def test_what_is_no_checkpoint_of_this_network_is_named(tmp_path, weights):
    config = tiny_config()
    with pytest.raises(InputError, match="no checkpoint at"):
        checkpoints.load_weights(tmp_path / "nowhere", config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoints.load_weights(tmp_path / "empty", config)
    path = tmp_path / "exported.safetensors"
    checkpoints.export_file(path, weights, config)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a file that SeqRF exported"):
        checkpoints.load_weights(path, config)
    path.write_bytes(whole)
    other = tiny_config()
    other.model.fir = True
    with pytest.raises(InputError, match=r"model\.fir = False"):
        checkpoints.load_weights(path, other)


def test_a_damaged_checkpoint_folder_is_named(tmp_path, weights):
    config = tiny_config()
    saved(tmp_path / "1_rf", config, weights, 10)
    folder = tmp_path / "1_rf" / "checkpoints" / "10"
    (folder / "state" / "manifest.ocdbt").write_bytes(b"broken")
    with pytest.raises(InputError, match="not a whole checkpoint"):
        checkpoints.load_weights(folder, config)


def test_a_workdir_of_several_stages_asks_which(tmp_path, weights):
    saved(tmp_path / "1_rf", tiny_config(), weights, 10)
    saved(tmp_path / "2_rf", tiny_config(), weights, 10)
    with pytest.raises(InputError, match="several stages"):
        checkpoints.load_weights(tmp_path, tiny_config())


def test_boundaries_are_kept_with_the_weights(tmp_path, weights):
    saved(tmp_path / "1_rf", tiny_config(), weights, 10)
    assert checkpoints.boundaries_of(tmp_path / "1_rf" / "checkpoints" / "10") == [1.0, 0.0]
