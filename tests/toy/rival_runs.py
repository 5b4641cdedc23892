"""What the tests of the rivals share: a training on random images, and who moves."""

import torch
from torch import nn
from toy_runs import make_teacher, noise_data, stage_at

from toy.rivals.pairs import Pairs


def make(rival, folder, steps=4, guidance=2.0, lr=1e-2, clip=None, **more):
    """A rival's training on random images of three classes, 8 × 8."""
    stage = stage_at(folder, data=noise_data(12), distil_batch=4, precision="fp32", flip="false")
    teacher = make_teacher().eval().requires_grad_(False)
    teacher.clip = clip  # none: else most of what random weights give would have no gradient
    if rival.PAIRS:
        z = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        more.setdefault("pairs", Pairs(z, z.flip(3), torch.arange(8) % 3))
    return rival(stage, teacher, lr, steps, guidance, **more)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def moved(module, action):
    """Whether the action changes a module's weights."""
    before = weights(module)
    action()
    return not torch.equal(before, weights(module))


def has_gradient(module):
    return any(p.grad is not None and p.grad.any() for p in module.parameters())


def count_calls(network, action):
    calls = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    result = action()
    handle.remove()
    return len(calls), result


class Answer(nn.Module):
    """A network that gives x̂_0 = x + e whatever it sees, and remembers that."""

    def __init__(self, x, e=0.0):
        super().__init__()
        self.x, self.e, self.seen = x, e, []

    def forward(self, x_t, t, label):
        self.seen.append((x_t, t))
        return self.x + self.e

    def with_middle(self, x_t, t, label):
        return self(x_t, t, label), x_t
