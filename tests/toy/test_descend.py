"""toy/loop.py: backward, update and descend; nothing moves on what is not finite."""

import pytest
import torch
from torch import nn

from toy.loop import backward, descend, update


def test_descend_steps_and_gives_the_norm_of_the_gradient_before_it_was_clipped():
    layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x = torch.tensor([[3.0, 4.0]])
    norm = descend(layer(x).sum(), optimizer, "x")
    assert norm.item() == pytest.approx(5) and layer.weight.tolist() == [[-3.0, -4.0]]
    norm = descend(layer(x).sum(), optimizer, "x", clip=1.0)  # the last gradient is gone
    assert norm.item() == pytest.approx(5)
    assert layer.weight[0].tolist() == pytest.approx([-3.6, -4.8], abs=1e-5)


def test_backward_moves_nothing_and_update_takes_the_step():
    w = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    loss = (torch.tensor([3.0, 4.0]) * w).sum()
    norm = backward(loss, optimizer, clip=2.5)
    assert norm.item() == pytest.approx(5) and w.tolist() == [1, 1]
    assert w.grad.tolist() == pytest.approx([1.5, 2.0], abs=1e-5)
    update(optimizer, "x", loss, norm)
    assert w.tolist() == pytest.approx([-0.5, -1.0], abs=1e-5)


NOT_FINITE = {  # the loss of weights 1 → what the error says of it
    "nan": (lambda w: (w * float("nan")).sum(), "teacher loss is nan"),
    "inf": (lambda w: w.sum() / 0, "teacher loss is inf"),
    "gradient alone": (lambda w: (w - 1).sqrt().sum(), "teacher gradient is inf"),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_descend_moves_nothing_on_what_is_not_finite(case):
    loss, says = NOT_FINITE[case]
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([w], lr=1.0)
    with pytest.raises(FloatingPointError, match=says):
        descend(loss(w), optimizer, "teacher")
    assert w.tolist() == [1, 1, 1] and not optimizer.state
