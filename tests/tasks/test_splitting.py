"""Batches of any structure are split as the network wants them."""

import pytest
import torch
from torch import nn

from qakd_plugin.errors import QakdError
from qakd_plugin.tasks.batches import batch_splitter, default_batch

X, Y = torch.randn(4, 3), torch.arange(4)


class Encoder(nn.Module):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return input_ids


class Image(nn.Module):
    def forward(self, x):
        return x


class Anything(nn.Module):
    def forward(self, *args, **kwargs):
        return args


@pytest.mark.parametrize(
    ("network", "batch", "inputs", "targets"),
    [
        (Image(), X, X, None),
        (Image(), (X, Y), X, Y),
        (Image(), [X, Y, "path"], X, Y),
        (Image(), {"image": X, "label": Y, "path": ["a"]}, X, Y),
        (Image(), {"x": X, "y": Y}, X, Y),
        (Encoder(), {"input_ids": X, "labels": Y}, X, Y),
        (
            Encoder(),
            {"input_ids": X, "attention_mask": X, "labels": Y, "text": ["a"]},
            {"input_ids": X, "attention_mask": X},
            Y,
        ),
        (Anything(), {"a": X, "b": X, "target": Y}, {"a": X, "b": X}, Y),
    ],
)
def test_what_forward_takes_by_name_goes_in_and_labels_stay_out(network, batch, inputs, targets):
    found, others = batch_splitter(default_batch, network)(batch)
    torch.testing.assert_close(found, inputs)
    assert others is targets


def test_a_function_of_the_users_is_used_as_it_is():
    mine = lambda batch: ((batch, 1), None)  # noqa: E731
    assert batch_splitter(mine, Image()) is mine


@pytest.mark.parametrize("batch", [{"picture": X, "label": Y}, [], "text", {"image": "a.png"}])
def test_a_batch_without_inputs_is_refused_with_the_line_to_write(batch):
    with pytest.raises(QakdError, match=r"batch_fn=lambda batch: \(inputs, targets\)"):
        batch_splitter(default_batch, Image())(batch)
