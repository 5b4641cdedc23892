"""What the log says of a run's health, each value against its definition; and that nothing moves on what is not finite."""

import pytest
import torch
from helpers import generator, make_add, make_batch, moved, snapshot
from torch import nn

from add import descend, hinge_student


def output_gradients(model, batch, space):
    """Root mean square of the samples' gradient norms of both terms at the output, by torch.autograd.grad."""
    taken = {}
    discriminator, distill = model.discriminator.tokens, model.distill
    model.discriminator.tokens = lambda images, g=None: discriminator(taken.setdefault("pixels", images), g)
    model.distill = lambda x_hat, pixels, *rest: distill(*(taken.setdefault(k, x) for k, x in (("x_hat", x_hat), ("seen", pixels))), *rest)
    half = model.student_half(batch, generator(1))
    del model.discriminator.tokens, model.distill
    g = generator(2)
    tokens = model.discriminator.tokens(taken["pixels"], g)
    adversarial = hinge_student(model.discriminator(tokens, half.c_text, half.c_img)).mean()
    at = taken["seen" if space == "pixel" else "x_hat"]
    return half, taken, adversarial, at


@pytest.mark.parametrize("space", ["pixel", "diffused"])
def test_the_gradients_of_both_terms_at_the_students_output(space):
    model, batch = make_add(space=space), make_batch()
    model.discriminator.heads.eval()  # no power iteration: the same heads twice
    half, taken, adversarial, at = output_gradients(model, batch, space)
    n = len(batch.x_0)
    by_hand = {
        "gradient_adversarial": torch.autograd.grad(adversarial, taken["pixels"], retain_graph=True)[0],
        "gradient_distillation": torch.autograd.grad(half.loss, at, retain_graph=True)[0],
    }
    half.loss.backward()
    for name, gradient in by_hand.items():
        each = n * gradient.flatten(1).norm(dim=1)  # the loss is a mean over samples
        assert half.log[name].item() == pytest.approx(each.square().mean().sqrt().item(), rel=1e-5) and each.min() > 0


def test_the_distillation_by_t_averages_to_each_quarters_own():
    """Over many iterations every bin's average is the mean of c(t) d over the t that fall into it."""
    model, batch = make_add(), make_batch()
    sums, expected, counts = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    with torch.no_grad():
        for seed in range(200):
            half = model.student_half(batch, generator(seed))
            alpha = model.teacher.schedule.alpha[half.t]
            each = alpha * (half.pixels - half.target).square().mean((1, 2, 3))
            bins = half.t // 250
            expected.index_add_(0, bins, each.float())
            counts.index_add_(0, bins, torch.ones(8))
            sums += torch.stack([half.log[f"distillation_t{t}"] for t in (0, 250, 500, 750)]).float()
    torch.testing.assert_close(sums / 200, 4 * expected / counts.sum(), rtol=1e-4, atol=1e-6)  # exactly this estimate
    torch.testing.assert_close(sums / 200, expected / counts, rtol=0.15, atol=0)  # whose expectation is the bins' mean


@pytest.mark.parametrize("real, fake, won", [(1.0, -1.0, 1), (1.0, 1.0, 0), (-1.0, -1.0, 0)])
def test_a_discriminator_that_tells_all_apart_has_won(real, fake, won):
    class Heads(nn.Module):
        def forward(self, tokens, c_text=None, c_img=None):
            self.calls = getattr(self, "calls", 0) + 1
            value = real if self.calls == 2 else fake  # the student's half comes first, then reals, then fakes
            return [x.sum(2) * 0 + value for x in tokens]

    model = make_add(gamma=0.0)
    model.discriminator.heads = Heads()
    half = model.student_half(make_batch(), generator())
    assert model.discriminator_half(half, generator())[1]["discriminator_won"].item() == won


def test_descend_steps_and_gives_the_norm_of_the_gradient_before_it_was_clipped():
    layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    norm = descend(layer(torch.tensor([[3.0, 4.0]])).sum(), optimizer, "x")
    assert norm.item() == pytest.approx(5) and layer.weight.tolist() == [[-3.0, -4.0]]
    norm = descend(layer(torch.tensor([[3.0, 4.0]])).sum(), optimizer, "x", clip=1.0)  # the last gradient is gone
    assert norm.item() == pytest.approx(5) and layer.weight[0].tolist() == pytest.approx([-3.6, -4.8], abs=1e-5)


@pytest.mark.parametrize("loss", [lambda w: (w * float("nan")).sum(), lambda w: w.sum() / 0, lambda w: (w * 0).sqrt().sum()],
                         ids=["nan", "inf", "gradient alone"])  # fmt: skip
def test_descend_moves_nothing_on_what_is_not_finite(loss):
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([w], lr=1.0)
    with pytest.raises(FloatingPointError, match=r"teacher (loss|gradient) is (nan|inf)"):
        descend(loss(w), optimizer, "teacher")
    assert w.tolist() == [1, 1, 1] and not optimizer.state


@pytest.mark.parametrize("half", ["student", "discriminator"])
def test_a_step_on_what_is_not_finite_names_the_half_and_leaves_its_network(half):
    model, batch = make_add(), make_batch()
    network = model.student.denoiser.network if half == "student" else model.discriminator.heads
    optimizers = [torch.optim.Adam(m.parameters(), 0.1) for m in (model.student, model.discriminator.heads)]
    if half == "student":
        batch.cond[0] = float("nan")
    else:
        # Finite in the student's half, not in F of the reals.
        tokens, calls = model.discriminator.tokens, []
        model.discriminator.tokens = lambda images, g=None: [
            x * (float("nan") if len(calls) > 1 else 1) for x in (calls.append(0) or tokens(images, g))
        ]
    before = snapshot(network)
    with pytest.raises(FloatingPointError, match=f"{half} loss is nan"):
        model.step(batch, *optimizers, generator())
    parameters = dict(network.named_parameters())
    assert not [name for name in moved(network, before) if name in parameters]


@pytest.mark.parametrize("won, says", [([0.0] * 15 + [0.4, 0.6] * 2 + [1.0], True), ([1.0] * 18 + [0.4, 0.4], False)])
def test_a_report_says_that_the_discriminator_has_won_at_the_end(won, says):
    from toy.report import HEALTH, health

    log = {name: list(map(float, range(20))) for name in HEALTH} | {"discriminator_won": won, "nonfinite": [0.0] * 19 + [3.0]}
    lines = health(log)
    assert any("has won" in line for line in lines) == says
    assert lines[2] == "| " + "18.5 | " * len(HEALTH) + "3 |"  # the last tenth: 18 and 19
