"""What a log tells of an ADD run's health, from the two halves of an iteration (add.py)."""

import math

BINS = 4  # of t, for the distillation loss
WON = 0.9  # mean sign of the logits: 19 of 20 tokens are told right


def watch(half):
    """The log that the student's backward fills: for each term of the loss, the root mean square
    over the batch of its gradient's norm at x̂_θ, λ included."""
    log = {}
    for term, x in half.views.items():
        if x.requires_grad:

            def record(gradient, name=f"gradient_{term}"):
                norm = gradient.detach().float().norm()
                log[name] = norm * math.sqrt(len(gradient))

            x.register_hook(record)
    return log


def student_log(half, T):
    """Both terms, and the distillation loss by quarters of t, which average to it."""
    log = {"adversarial": half.adversarial.mean(), "distillation": half.distillation.mean()}
    for i in range(BINS):  # an empty quarter counts 0, so that averages over iterations are right
        inside = half.t * BINS // T == i
        log[f"distillation_t{i * T // BINS}"] = BINS * (inside * half.distillation).mean()
    return log


def heads_log(half):
    """Hinge, R1, mean logits and signs of real and generated tokens, and whether the discriminator
    has won: what reaches the student then says little but "wrong"."""
    log = {"hinge": half.hinge.mean(), "r1": half.r1.mean()}
    for name, logits in (("real", half.real_logits), ("fake", half.fake_logits)):
        log[f"logit_{name}"] = sum(x.mean() for x in logits) / len(logits)
        log[f"sign_{name}"] = sum(x.sign().mean() for x in logits) / len(logits)
    log["discriminator_won"] = ((log["sign_real"] > WON) & (log["sign_fake"] < -WON)).float()
    return log
