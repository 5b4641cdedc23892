"""What the feature networks of toy/ and full/ have in common."""

import torch

from add import randn_like

T_MAX = 600  # of 1000: beyond, little of an image is left to judge


def readout(tokens):
    """(B, 1 + N, C), class token first → (B, N, C): it is added to the others and dropped."""
    return tokens[:, 1:] + tokens[:, :1]


def noised(schedule, x_0, generator):
    """(x_t, t): each of x_0 (B, C, H, W) diffused to its own t, uniform over 0…T_MAX-1 (LADD)."""
    t = torch.randint(T_MAX, (len(x_0),), device=x_0.device, generator=generator)
    return schedule.diffuse(x_0, randn_like(x_0, generator), t), t
