"""scripts/reference_stats.py: what it makes of the digits is what an evaluation makes and reads."""

import numpy as np
import pytest

from configs.rf.digits_rf_continuous import get_config
from jobs.builders import data_options, reference_options
from metrics import reference
from scripts import reference_stats
from utils import InputError


def real_data_of(config):
    return reference.real_data(data_options(config), reference_options(config), config.eval.batch_size)


def test_statistics_of_the_digits_are_an_evaluations_own(tmp_path):
    config = get_config()
    record = reference_stats.make(config, "train", str(tmp_path / "digits.npz"))
    described = {"data": "digits", "split": "train", "images": 1797, "image_shape": [8, 8, 1]}
    assert record.items() >= (described | {"network": "digits_classifier", "preprocessing": "divided by 255"}).items()
    own = real_data_of(config)
    config.eval.reference = str(tmp_path / "digits.npz")
    read = real_data_of(config)
    np.testing.assert_array_equal(read.features, own.features)
    np.testing.assert_array_equal(read.kernel_sums, own.kernel_sums)
    assert own.record == record
    config.data.image_size = 16
    with pytest.raises(InputError, match="the digits are 8 x 8"):
        reference_stats.make(config, "train", None)
    with pytest.raises(InputError, match="no split 'test'"):
        reference_stats.make(get_config(), "test", None)
