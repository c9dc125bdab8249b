"""Fashion-MNIST at 14 x 14 grey, half of its size, resized without aliasing: the bench for studies on a CPU.

    python -m scripts.prepare_dataset fashion_mnist --from /usr/share/datasets/fashion-mnist
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python main.py --mode=train \
        --config=configs/rf/fashion_mnist_14_rf_continuous.py --workdir=runs/fashion_mnist_14 --config.model.rf_phase=1

Source: the digits configuration, half as wide again; chosen here, not published anywhere. 422,353 weights. Time: about
half an hour on 2 calm CPU cores (not measured undisturbed). Result after 6,000 updates, 100 Euler steps, 4,096 samples:
fid_fashion_mnist_14_classifier 0.860, clothes at a glance; 4,096 test images are at 0.203 (scripts/reference_stats.py).
The classifier is right on 0.9085 of the test images. The weights are in model_zoo/fashion_mnist_14_1rf.
"""

import ml_collections

from configs.default import get_default_config
from configs.recipes import apply_recipe


def get_config(recipe: str = "paper") -> ml_collections.ConfigDict:
    """A network of two resolutions, one block each, for 14 x 14 images; `recipe`: see configs/recipes.py."""
    config = get_default_config()
    # Shoes point to the left in this data set: mirrored images are not in it.
    config.data.update(dataset="FASHION_MNIST", image_size=14, num_channels=1, random_flip=False)
    config.model.update(nf=24, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(7,), dropout=0.0)
    config.rf.update(n_iters=6_000, ema_rate=0.999)
    config.reflow.update(n_iters=6_000, ema_rate=0.999)
    config.training.update(
        batch_size=64,
        log_freq=100,
        snapshot_freq=2_000,
        snapshot_freq_for_preemption=500,
        n_reflow_data=16_384,
        gen_reflow_size=256,
        reflow_file_size=4_096,
    )
    config.optim.update(lr=1e-3, warmup=200)
    config.sampling.update(tol=1e-3)
    config.eval.update(batch_size=256, num_samples=4_096, straightness_samples=64)
    return apply_recipe(config, recipe)
