"""CIFAR-10, 32 x 32, through TFDS. Recommended batches on TPUs (train, evaluate): (512, 2048) on v3-8, (512, 1024)
on v2-8.

    python main.py --config=configs/rf/cifar10_rf_continuous.py --workdir=runs/cifar10 --mode=train \
        --config.model.rf_phase=1

The network has 61,804,419 parameters, as the public PyTorch checkpoint. Reflow stages use an EMA of 0.9999 and
100,001 iterations: --config.model.ema_rate=0.9999 --config.model.variable_ema_rate=False
--config.training.n_iters=100001.
"""

from configs.default import get_default_config


def get_config():
    """The defaults are CIFAR-10's."""
    return get_default_config()
