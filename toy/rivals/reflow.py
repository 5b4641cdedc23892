"""2-rectified flow (Liu et al. 2022, arXiv 2209.03003; InstaFlow, Liu et al. 2023): the student
learns the straight path from a noise to the teacher's image of it.

A straight path x + u (z - x) is, up to its scale, the diffused x_t = α_t x + σ_t z with
u = σ_t / (α_t + σ_t). An Euler step along the velocity z - x is then a DDIM step, so that sampling
is add.ddim at timesteps of equal distance in u. With α_T > 0 the path would begin beside the pure
noise that sampling begins from. So its noise is not z but (z - α_T x) / σ_T: the path begins at z
itself.

InstaFlow then distils the flow into one step. That stage is left out: the table's row of one step
is the flow's own.
"""

import torch

from add import ddim
from toy.rivals.pairs import OnPairs


class Reflow(OnPairs):
    """See the module."""

    TITLE = "2-rectified flow"
    STEPS = (1, 2)

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.u = self.schedule.sigma / (self.schedule.alpha + self.schedule.sigma)  # (T,), rising

    def straight(self, noise, images, t):
        """(x_t, velocity) of the pairs at t (B,)."""
        alpha, sigma = self.schedule.alpha[-1], self.schedule.sigma[-1]
        noise = (noise - alpha * images) / sigma
        return self.schedule.diffuse(images, noise, t), noise - images

    def timestep_of(self, u):
        """The first t at which σ_t / (α_t + σ_t) is at least u (N,)."""
        return torch.bucketize(u, self.u).clamp(max=len(self.u) - 1)

    def draw_timesteps(self, n):
        """(n,) timesteps t with u uniform between its values at t = 0 and T - 1."""
        drawn = torch.rand(n, device=self.device, generator=self.generator)
        return self.timestep_of(torch.lerp(self.u[0], self.u[-1], drawn))

    def loss(self, noise, images, labels):
        """‖(z - x) - (ε̂ - x̂_0)‖², averaged over elements, a scalar."""
        t = self.draw_timesteps(len(labels))
        x_t, velocity = self.straight(noise, images, t)
        x_0, epsilon = self.denoiser.predict(x_t, t, labels)
        return (velocity - (epsilon - x_0)).square().mean()

    def sample(self, noise, labels, steps, generator=None):
        """Images (B, C, H, W) in pixels, by Euler steps of equal length in u."""
        u = self.u[-1] * torch.arange(steps, 0, -1, device=self.device) / steps
        timesteps = [torch.full_like(labels, t) for t in self.timestep_of(u).tolist()]
        return self.denoiser.decode(ddim(self.denoiser, noise, timesteps, labels))
