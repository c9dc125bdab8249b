"""The smallest network, for real digits: with random weights, and in every job."""

import jax
import numpy as np

import models
import run_lib
from checkpointing import exported
from checkpointing.checkpoint import checkpoint_at
from checkpointing.metadata import make_metadata
from configs.rf.digits_rf_continuous import get_config

PICTURES = {"snapshot_sampling": True}
MEASURED = PICTURES | {"snapshot_fid_sample": 16}


def network_config(k=1):
    """Digits by the smallest network of k segments, everything else as configured for them."""
    config = get_config()
    config.model.update(nf=4, ch_mult=(1,), attn_resolutions=())
    config.training.reflow_t = k
    return config


def random_weights(config, **counts):
    """Random values of standard deviation 0.1 for every weight, EMA and moment; `counts`: count and step."""
    params = models.init_params(models.create_model(config), jax.random.key(0), (8, 8, 1))
    random = np.random.default_rng(0)

    def noise():
        return jax.tree.map(lambda a: 0.1 * random.normal(size=a.shape).astype(np.float32), params)

    trees = {name: noise() for name in ("params", "ema_params", "mu", "nu")}
    return models.Weights(**trees, **({"count": 0, "step": 0} | counts))


def load_weights(path, config, **options):
    """The weights at `path` for the network of a configuration."""
    return checkpoint_at(path, **options).load(models.create_model(config))


def restore(path, **options):
    """(the weights at `path` with their own heads, their metadata)."""
    found = checkpoint_at(path, **options)
    return found.load(), found.metadata


def export_file(path, weights, config, boundaries=None, teacher=None):
    """Writes weights of the configuration's network, over uniform segments where no boundaries are given."""
    network = models.create_model(config)
    boundaries = np.linspace(1, 0, network.heads + 1) if boundaries is None else boundaries
    exported.write_file(path, weights, make_metadata(network, "exported", boundaries, teacher=teacher))


def tiny_config(**sections):
    """A short 1-RF; `sections`: {section: settings} other than these."""
    config = network_config()
    config.model.update(rf_phase=1, num_scales=2)
    config.training.update(
        batch_size=8,
        n_iters=6,
        snapshot_sampling=False,
        log_freq=2,
        snapshot_freq=4,
        snapshot_freq_for_preemption=2,
        n_reflow_data=64,
        reflow_file_size=32,
        gen_reflow_size=16,
        reflow_t=2,
    )
    config.eval.update(batch_size=16, num_samples=32, straightness_samples=8)
    config.sampling.tol = 1e-2
    for section, values in sections.items():
        config[section].update(values)
    return config


def reflow_config(mode="train_reflow", **sections):
    """A job of the later stages, of two segments."""
    config = tiny_config(**sections)
    config.model.rf_phase = 2
    config.training.reflow_mode = mode
    return config


def train_stages(workdir):
    """Every training stage, one after another."""
    run_lib.train(tiny_config(training=PICTURES), workdir)
    run_lib.train(reflow_config("gen_reflow"), workdir)
    run_lib.train(reflow_config("train_reflow", training=MEASURED), workdir)
    run_lib.train(reflow_config("train_distill", training=MEASURED), workdir)


def flags(config):
    """The command line's flags for what the configuration has other than the digits'."""
    own, default = (dict(c.items()) for c in (config, get_config()))
    return [
        f"--config.{section}.{name}={value}"
        for section in default
        if isinstance(own[section], type(config))
        for name, value in own[section].items()
        if value != default[section][name]
    ]
