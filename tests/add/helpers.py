"""What the tests of add.py share: networks small enough to check by hand, and the paper's step
written naively."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from add import (
    ADD,
    ADDConfig,
    Batch,
    Denoiser,
    Discriminator,
    DiscriminatorHeads,
    NoiseSchedule,
    Student,
)
from common.augment import Augmented

COND, TEXT, IMAGE = 3, 4, 5  # widths of the networks' condition, c_text and c_img


def sd_schedule():
    """Stable Diffusion's schedule in float64 throughout: α² + σ² = 1 to 1e-16, where a float32 one
    has 1e-7."""
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    return NoiseSchedule.from_betas(root**2)


class TinyNet(nn.Module):
    """network(x_t, t, cond), smooth and nonlinear in all three. `calls` lists (t, was gradient on?,
    x_t)."""

    def __init__(self, channels=3, hidden=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.into = nn.Conv2d(channels, hidden, 3, padding=1)
        self.out = nn.Conv2d(hidden, channels, 1)
        self.norm = nn.Identity()
        self.cond = nn.Linear(COND + 1, hidden)
        self.calls = []

    def forward(self, x, t, cond):
        self.calls.append((t, torch.is_grad_enabled(), x.detach()))
        side = self.cond(torch.cat([cond, t[:, None] / 1000], 1).to(x.dtype))
        return self.out(torch.tanh(self.norm(self.into(x)) + side[:, :, None, None]))


class TinyFeatures(nn.Module):
    """F: (B, 3, H, W) → token maps (B, HW, 4) and (B, HW/4, 6). `calls` lists (images, was gradient
    on?)."""

    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(4, 6, 2, stride=2), nn.Tanh())
        self.calls = []

    def forward(self, images):
        self.calls.append((images.detach(), torch.is_grad_enabled()))
        first = self.first(images)
        return [x.flatten(2).transpose(1, 2) for x in (first, self.second(first))]


class _Forbidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("differentiated")


class NoBackward(nn.Module):
    """A network whose outputs (a tensor, or a list) must not be differentiated: its backward
    raises."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *inputs):
        out = self.network(*inputs)
        if isinstance(out, list):
            return [_Forbidden.apply(x) for x in out]
        return _Forbidden.apply(out)


def make_add(
    *,
    schedule=None,
    student="v",
    teacher="epsilon",
    augment=(),
    timesteps=(249, 499, 749, 999),
    **config,
):
    """A whole ADD in float64, its networks trained on nothing; student and teacher predict
    different things. Augmentations, if any, are drawn from generator(7)."""
    schedule = schedule or sd_schedule()
    features = TinyFeatures()
    if augment:
        features = Augmented(features, augment, generator(7))
    teacher_network = TinyNet(seed=3)
    teacher_network.norm = nn.BatchNorm2d(4)  # has something to move, were it ever in train mode
    torch.manual_seed(4)
    heads = DiscriminatorHeads([4, 6], text_dim=TEXT, image_dim=IMAGE, hidden=5, kernel=3, c_map=3)
    return ADD(
        Student(Denoiser(TinyNet(seed=2), schedule, student), timesteps),
        Denoiser(teacher_network, schedule, teacher),
        Discriminator(features, heads),
        ADDConfig(**config),
    ).double()


def make_batch(n=8, seed=0, side=4):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=g)

    return Batch(
        torch.tanh(randn(n, 3, side, side)),
        *(randn(n, COND) for _ in range(4)),
        c_text=randn(n, TEXT),
        c_img=randn(n, IMAGE),
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(x, y):
    """‖x - y‖ / ‖y‖ of each sample, the first axis."""
    return (x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)


def optimizers(model, lr=0.1):
    """SGD for the student and for the heads, as ADD.step takes them."""
    parts = model.student, model.discriminator.heads
    return tuple(torch.optim.SGD(part.parameters(), lr=lr) for part in parts)


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def snapshot(module):
    """Parameters and buffers, copied."""
    return {name: x.clone() for name, x in module.state_dict().items()}


def moved(module, before):
    """Names of the parameters and buffers that differ from an earlier snapshot."""
    return [name for name, x in module.state_dict().items() if not torch.equal(x, before[name])]


def assert_refused(wrong, parts):
    """wrong() raises a ValueError whose message has every part: the argument, its value, what is
    allowed."""
    with pytest.raises(ValueError) as error:
        wrong()
    assert [part for part in parts if part not in str(error.value)] == []


def assert_gradients_close(got, expected, rtol=1e-9, atol=1e-12):
    """Float64 rounding, some 1e-16, through a dozen layers and sums over a few hundred elements."""
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


# The paper again, from its equations: of add.py it takes the networks and the columns α, σ alone.


def read_output(prediction, output, x_t, a, s):
    """(x̂_0, ε̂): the table of conversions."""
    if prediction == "epsilon":
        return (x_t - s * output) / a, output
    if prediction == "v":
        return a * x_t - s * output, s * x_t + a * output
    return output, (x_t - a * output) / s


def draws(model, batch, g):
    """What one student half draws, in its order: s, ε, t, ε'."""
    tau = torch.tensor(model.student.timesteps)
    s = tau[torch.randint(len(tau), (len(batch.x_0),), generator=g)]
    noise = torch.randn(batch.x_0.shape, dtype=torch.float64, generator=g)
    t = torch.randint(1000, (len(batch.x_0),), generator=g)
    return s, noise, t, torch.randn(batch.x_0.shape, dtype=torch.float64, generator=g)


def column(schedule, t):
    return schedule.alpha[t].reshape(-1, 1, 1, 1), schedule.sigma[t].reshape(-1, 1, 1, 1)


def naive_student(model, batch, s, noise):
    """x̂_θ(x_s, s)."""
    denoiser = model.student.denoiser
    a, sigma = column(denoiser.schedule, s)
    x_s = a * batch.x_0 + sigma * noise
    x_s[s == model.student.timesteps[-1]] = noise[s == model.student.timesteps[-1]]
    return read_output(denoiser.prediction, denoiser.network(x_s, s, batch.cond), x_s, a, sigma)[0]


def naive_c_img(model, batch, s):
    return batch.c_img * (s != model.student.timesteps[-1]).double()[:, None]


def naive_student_loss(model, batch, s, noise, t, noise_2):
    """Eq. 1, 2 and 4 with the exponential weight."""
    x_hat = naive_student(model, batch, s, noise)
    a, sigma = column(model.teacher.schedule, t)
    with torch.no_grad():
        x_t = a * x_hat + sigma * noise_2
        output = model.teacher.network(x_t, t, batch.teacher_cond)
        target = read_output(model.teacher.prediction, output, x_t, a, sigma)[0]
    distillation = (a.flatten() * ((x_hat - target) ** 2).mean((1, 2, 3))).mean()
    tokens = model.discriminator.features(x_hat)
    logits = model.discriminator.heads(tokens, batch.c_text, naive_c_img(model, batch, s))
    return -sum(x.mean() for x in logits) + model.config.lambda_ * distillation


def naive_discriminator_loss(model, batch, s, noise):
    """Eq. 3: the student and F run again, on reals and on fakes."""
    with torch.no_grad():
        fakes = naive_student(model, batch, s, noise)
    c = batch.c_text, naive_c_img(model, batch, s)
    features, heads = model.discriminator.features, model.discriminator.heads
    real_tokens = [x.detach().requires_grad_() for x in features(batch.x_0)]
    with parametrize.cached():  # both under one spectral norm, which moves with every other call
        real = heads(real_tokens, *c)
        fake = heads([x.detach() for x in features(fakes)], *c)
    hinge = sum(functional.relu(1 - x).mean() for x in real)
    hinge = hinge + sum(functional.relu(1 + x).mean() for x in fake)
    penalty = 0
    for logits, tokens in zip(real, real_tokens, strict=True):
        (g,) = torch.autograd.grad(logits.sum(), tokens, create_graph=True)
        penalty = penalty + (g**2).sum() / len(g)
    return hinge + model.config.gamma * penalty


def naive_head(head, tokens, c_text=None, c_img=None):
    """One discriminator head from its weights, the local batch norm from torch's own on each group
    of 8."""

    def conv(layer, x):
        k = layer.weight.shape[-1] // 2
        padded = functional.pad(x, (k, k), mode="circular")
        return functional.conv1d(padded, layer.weight, layer.bias)

    def norm(layer, x):
        scale, shift = layer.weight, layer.bias
        groups = [
            functional.batch_norm(g, None, None, scale, shift, training=True) for g in x.split(8)
        ]
        return torch.cat(groups)

    def block(layers, x):
        return functional.leaky_relu(norm(layers[1], conv(layers[0], x)), 0.2)

    h = block(head.first, tokens.transpose(1, 2))
    r = block(head.residual, h)
    h = conv(head.last, (h + r) / math.sqrt(2))
    if not head.conditional:
        return h[:, 0]
    projection = head.unconditional[None]
    if c_text is not None:
        projection = projection + c_text @ head.maps["c_text"].T / math.sqrt(c_text.shape[1])
    if c_img is not None:
        projection = projection + c_img @ head.maps["c_img"].T / math.sqrt(c_img.shape[1])
    logits = torch.einsum("bcn,bc->bn", h, projection.expand(len(h), -1))
    return logits / math.sqrt(head.last.weight.shape[0])
