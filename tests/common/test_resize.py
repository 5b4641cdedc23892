"""common/images.py: resize."""

import pytest
import torch
from torch.nn import functional

from common.images import resize


@pytest.mark.parametrize("size, antialias", [(7, True), (7, False), (40, True), (40, False)])
def test_resize_is_bicubic_interpolation_and_so_is_its_gradient(size, antialias):
    images = torch.rand(2, 3, 16, 20, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, size, size, dtype=torch.float64)
    found, expected = (
        resize(images, size, antialias),
        functional.interpolate(images, (size, size), mode="bicubic", antialias=antialias),
    )
    assert torch.allclose(found, expected, atol=1e-6)
    gradients = [torch.autograd.grad((x * weights).sum(), images)[0] for x in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0
