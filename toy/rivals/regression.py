"""Regression in one step (Luhman & Luhman 2021, arXiv 2101.02388): the student learns the teacher's
DDIM sample from its noise. Where noise does not settle the image, the answer is a mean.
"""

import torch

from add import distance
from toy.rivals.pairs import OnPairs


class Regression(OnPairs):
    """See the module."""

    TITLE = "regression"
    STEPS = (1,)

    def loss(self, noise, images, labels):
        """‖x̂_0(z, T - 1) - x‖², a scalar."""
        t = torch.full_like(labels, len(self.schedule) - 1)
        return distance(self.denoiser(noise, t, labels), images).mean()
