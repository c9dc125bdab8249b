"""The 256 x 256 network of the public rectified-flow checkpoints, which the four configurations of that size share.

Source: the public PyTorch implementation of arXiv 2209.03003, configs/default_lsun_configs.py and
configs/rectified_flow/. The published training took 2,400,001 updates: --config.training.n_iters=2400001. Recommended
batches on a TPU v3-8: 64 to train, 256 to evaluate. A pair takes 1.6 MB: --config.training.n_reflow_data=100000 makes
157 GB; reflow_dtype=float16 and reflow_store_noise=False halve that. Only the network's outputs are checked here, on
random weights: benchmarks/check_full_size_torch.py.
"""

import ml_collections

from configs.default import get_default_config


def get_256_config(*, sigma_max: float) -> ml_collections.ConfigDict:
    """The settings common to 256 x 256 images: 65,574,549 parameters, 128 of them fixed Fourier frequencies.

    Args:
      sigma_max: end of the table of noise scales that `scale_by_sigma` divides the network's output by.
    """
    config = get_default_config()
    config.data.update(image_size=256)
    config.model.update(
        ch_mult=(1, 1, 2, 2, 2, 2, 2),
        num_res_blocks=2,
        dropout=0.0,
        embedding_type="fourier",
        fir=True,
        progressive="output_skip",
        progressive_input="input_skip",
        scale_by_sigma=True,
        sigma_max=sigma_max,
    )
    config.rf.update(ema_rate=0.999)
    config.training.update(batch_size=64, gen_reflow_size=128, reflow_file_size=1_024)
    config.eval.update(batch_size=256)
    return config
