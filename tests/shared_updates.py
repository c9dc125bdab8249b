"""Fifty updates of a small network by the devices of one or of two processes, for tests/test_distributed.py.

    python tests/shared_updates.py OUT.npz DEVICES:ACCUMULATE ...

writes for each way of sharing the batch the losses and the first update's gradient, as arrays of these names.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import distributed
import losses
import models
import train_step
from models import layers

BATCH, UPDATES = 16, 50


class Network(nn.Module):
    """Two convolutions around a normalisation, and the time: every kind of layer whose gradient devices share."""

    @nn.compact
    def __call__(self, x, labels, index, train=False):
        h = layers.conv3x3(8, "first")(x) + nn.Dense(8)(jnp.log(labels)[:, None])[:, None, None, :]
        return layers.conv3x3(1, "last")(nn.swish(layers.group_norm(h, "norm")))


def updates(devices, accumulate):
    """(the losses [UPDATES], the gradient of the first update) with the first `devices` devices."""
    model = Network()
    params = models.init_params(model, jax.random.key(0), (8, 8, 1))
    weights = models.Weights(params=params, ema_params=params, mu=params, nu=params, count=0, step=0)
    # Adam's first moment after one update is a tenth of the gradient.
    optimizer = train_step.optimizer(lr=1e-2, beta1=0.9, eps=1e-8, warmup=0, grad_clip=-1.0)
    state = train_step.initial_state(weights, optimizer, from_ema=True)
    step = train_step.make_train_step(
        model,
        losses.rf_targets,
        losses.make_loss("l2"),
        optimizer,
        ema_rate=0.9,
        variable_ema_rate=False,
        accumulate=accumulate,
    )
    own = [device for device in jax.devices()[:devices] if device.process_index == jax.process_index()]
    program = distributed.map_devices(step, devices=None if jax.process_count() > 1 else own, all_hosts=True)
    state, seed = distributed.replicate((state, np.uint32(3)), own)
    share = BATCH // jax.process_count()
    found = []
    for n in range(UPDATES):
        images = np.random.default_rng(n).uniform(-1, 1, (BATCH, 8, 8, 1)).astype(np.float32)
        mine = images[jax.process_index() * share :][:share]
        state, values = program(state, {"image": mine.reshape(len(own), 1, -1, 8, 8, 1)}, seed)
        found.append(float(values["loss"].addressable_shards[0].data[0, 0]))
        if n == 0:
            moments = distributed.first_copy(state).opt_state[1].mu
            gradient = np.concatenate([np.ravel(leaf) / 0.1 for leaf in jax.tree.leaves(moments)])
    return np.float64(found), gradient


def main(path, *ways):
    """Computes every way of sharing; the first process writes."""
    distributed.start_hosts()
    arrays = {}
    for way in ways:
        arrays[f"losses {way}"], arrays[f"gradient {way}"] = updates(*map(int, way.split(":")))
    arrays["gathered"] = distributed.gather(np.float32([[jax.process_index(), 7]]))
    distributed.sync("end")
    if distributed.is_first_host():
        np.savez(path, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
