"""LSUN church, 256 x 256, through TFDS. Recommended batches on a TPU v3-8: 64 to train, 256 to evaluate.

    python main.py --config=configs/rf/church_rf_continuous.py --workdir=runs/church --mode=train \
        --config.model.rf_phase=1
"""

from configs.rf.lsun_256 import get_lsun_config


def get_config():
    """See `lsun_256`."""
    return get_lsun_config("church_outdoor")
