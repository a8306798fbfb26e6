"""Settings check themselves, and are the same run as flat keywords."""

import pytest
import torch

from qakd_plugin import QakdError, distill
from qakd_plugin.training.config import Checkpoints, Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16' is unknown"),
        ({"compile_quantizers": "cuda"}, "compile_quantizers='cuda' must be True or False"),
        ({"accumulate": 0}, "accumulate=0 must be a positive whole number"),
        ({"accumulate": 1.5}, "accumulate=1.5 must be a positive whole number"),
        ({"patience": 0}, "patience=0 must be a positive whole number or None"),
        ({"lr": -1e-3}, "lr=-0.001 must be a number, and not negative"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must be a number, and not negative"),
        ({"recalibrate_batches": -1}, "recalibrate_batches=-1 must be a number, and not negative"),
        ({"lr": "fast"}, "lr='fast' must be a number, and not negative"),
        ({"warmup": "x"}, "warmup='x' must be a share"),
        ({"grad_clip": "x"}, "grad_clip='x' must be positive"),
        ({"ema": "x"}, "ema='x' must lie between 0 and 1"),
        ({"accumulate": True}, "accumulate=True must be a positive whole number"),
    ],
)
def test_settings_check_themselves(options, message):
    with pytest.raises(QakdError, match=message):
        Settings(**options)


def test_checkpoints_need_a_folder():
    with pytest.raises(QakdError, match="need checkpoint_dir"):
        Checkpoints.of(None, None, True)
    with pytest.raises(QakdError, match="checkpoint_every=0 must be a positive whole number or None"):
        Checkpoints.of("folder", 0, False)


def test_settings_give_the_run_of_flat_keywords(make_student, teacher, batches):
    flat = distill(make_student(), teacher, batches[:3], epochs=1, lr=1e-2, accumulate=2, seed=0)
    whole = distill(make_student(), teacher, batches[:3], epochs=1, settings=Settings(lr=1e-2, accumulate=2), seed=0)
    for name, value in flat.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_settings_and_a_keyword_that_they_hold_are_refused(make_student, teacher, batches):
    with pytest.raises(QakdError, match="settings= holds lr, ema already: pass them in it"):
        distill(make_student(), teacher, batches, settings=Settings(), lr=1e-3, ema=None)
