"""CelebA, cropped to its central 140 x 140 and resized to 64 x 64, through TFDS.

    python main.py --config=configs/rf/celeba_64_rf_continuous.py --workdir=runs/celeba_64 --mode=train \
        --config.model.rf_phase=1
"""

from configs.default import get_default_config


def get_config():
    """The CIFAR-10 network for 64 x 64 images, with less dropout."""
    config = get_default_config()
    config.data.update(dataset="CELEBA", image_size=64)
    config.model.update(dropout=0.1, ema_rate=0.9999)
    config.training.update(batch_size=128, gen_reflow_size=512, reflow_file_size=4_096)
    config.eval.update(batch_size=512)
    return config
