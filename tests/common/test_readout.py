"""common/features.py: the class token."""

import torch

from common.features import readout


def test_readout_adds_the_class_token_and_drops_it():
    tokens = torch.tensor([[[100.0, 200.0], [1.0, 2.0], [3.0, 4.0]]])
    assert readout(tokens).tolist() == [[[101.0, 202.0], [103.0, 204.0]]]
