"""The rate that distill chooses where none is given."""

import logging
from functools import partial

import pytest
import torch

from qakd_plugin import LSQ, Settings, distill, use_quantizers
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training.optimizers import student_optimizer, with_rate

SGD = partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao", "pt2e"])
@pytest.mark.parametrize(
    ("bits", "options", "rate"),
    [
        (8, {}, 1e-5),
        (4, {}, 1e-3),
        (2, {}, 1e-3),  # though the first and the last layer have 8
        (8, {"optimizer": torch.optim.Adam}, 1e-5),
        (8, {"optimizer": SGD}, 1e-3),
        (8, {"lr": 3e-2}, 3e-2),
        (8, {"lr": 0.0}, 0.0),
    ],
)
def test_it_follows_from_the_bits_and_the_optimizer(toolkit, bits, options, rate, make_student):
    student = make_student(toolkit, bits)
    adapter = adapter_for(student)
    assert with_rate(Settings(**options), adapter, student).lr == rate
    assert student_optimizer(adapter, student, Settings(**options)).param_groups[0]["lr"] == rate


def test_it_follows_from_learned_quantizers(make_student):
    student = use_quantizers(make_student("modelopt", 8), LSQ(weight_bits=3, activation_bits=3))
    assert with_rate(Settings(), adapter_for(student), student).lr == 1e-3


def test_distill_trains_with_it_and_says_so(make_student, teacher, batches, caplog):
    caplog.set_level(logging.INFO, "qakd_plugin")

    def weights(**options):
        class Look:
            def on_epoch_end(self, row):
                trained.update({name: value.clone() for name, value in student.state_dict().items()})

        trained, student = {}, make_student()
        distill(student, teacher, batches, epochs=1, seed=0, callbacks=[Look()], **options)
        return trained

    default, given = weights(), weights(lr=1e-5)
    assert all(torch.equal(default[name], given[name]) for name in default)
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("lr=")]
    assert said == "lr=1e-05: the default for 8 bits and AdamW. Pass lr= for another."
