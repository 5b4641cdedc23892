"""Adversarial Diffusion Distillation in one file.

ADD (Sauer et al. 2023, arXiv 2311.17042; SD-Turbo, SDXL-Turbo) turns a pretrained diffusion model
into one that samples in one to four steps. A student starts as a copy of the model and learns to
denoise in a single step, from two losses. It must fool a discriminator that looks at its images
through a frozen feature network, and agree with the frozen model, the teacher, which denoises the
student's image once more.

Notation (all names are ASCII; a hat is the suffix `_hat`, a subscript follows an underscore)
    x_0, x_s, x_t      a clean image; the same diffused to timestep s (student) or t (teacher)
    α_t, σ_t           alpha, sigma: x_t = α_t x_0 + σ_t ε, α_t² + σ_t² = 1.
                       t = 0 … T-1, so our 999 is the paper's 1000
    x̂_θ(x_s, s)        x_hat: the student's estimate of x_0, in its space (pixels or latents)
    x̂_ψ(x̂_θ,t; t)      target: the teacher's estimate, from x_hat diffused to t
    F_k, D_k           the feature network's token map k, (B, N_k, C_k); the head that reads it
    s ~ T_student      the student's timesteps {τ_1 … τ_n} = (249, 499, 749, 999)

Where to find what
    §3.1   1 NoiseSchedule   2 Denoiser, ddim   3 Student, with sampling
    §3.2   4 DiscriminatorHead, Discriminator   5 hinge_student, hinge_discriminator (Eq. 2, 3), r1
    §3.3   6 distillation_weight c(t), distance, reconstruction_target (Eq. 4), also App. A
    Eq. 1  7 ADDConfig, ADD: one iteration

Departures from the paper, and choices where it is silent
    1. ε-networks keep a schedule with α_T > 0 and are fed pure noise at τ_n all the same, as by
       the released models' public sampler: at α_T = 0 their x̂_0 is singular.
    2. ‖x - y‖² is averaged over an image's elements. The paper's sum (reduction="sum") would make
       the loss grow with the resolution.
    3. Hinge losses are averaged over tokens and summed over heads. R1 has no factor ½ and
       differentiates the sum over tokens and batch.
    4. c_text and c_img have a linear map each, and the results are added: the same as one linear
       map of their concatenation.
    5. c_img is zero at τ_n, where the student's input contains nothing of x_0. Real images get the
       conditions of their generated partners.
    6. The paper gives no guidance of the teacher, optimisers, EMA or augmentation. NFSD with
       several teacher steps has no published form, and is refused.
    7. Of T_student the paper gives N = 4 and τ_n = 1000; ours is evenly spaced. The teacher's t is
       uniform over the schedule. Each iteration trains both sides; the heads see images from before
       the student's update.
    8. Each further sampling step adds fresh noise; the paper does not say. The released models'
       demo keeps a part of the old noise, at t = 999, 899, 799, 699.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm


def identity(x):
    """x. What a pixel model has in the place of a VAE."""
    return x


def append_dims(x):
    """(B,) → (B, 1, 1, 1), to multiply images with; a number stays a number."""
    return x[:, None, None, None] if torch.is_tensor(x) else x


def randn_like(x, generator=None):
    """Unit noise of x's shape, type and device."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


# 1. Forward process (§3.1): x_t = α_t x_0 + σ_t ε =================================================
class NoiseSchedule(nn.Module):
    """α_t and σ_t for t = 0 … T-1, from ᾱ_t = α_t², a (T,) tensor that falls within [0, 1)."""

    def __init__(self, alphas_cumprod):
        super().__init__()
        shape, low, high = alphas_cumprod.shape, alphas_cumprod.min(), alphas_cumprod.max()
        if len(shape) != 1 or not (0 <= low and high < 1 and (alphas_cumprod.diff() <= 0).all()):
            got = f"alphas_cumprod={low.item()}…{high.item()} of shape {tuple(shape)}"
            raise ValueError(f"{got} must be (T,) and fall monotonically within [0, 1)")
        # A schedule is a setting: loading a checkpoint must not change it.
        self.register_buffer("alpha", alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("sigma", (1 - alphas_cumprod).sqrt(), persistent=False)
        self.has_zero_terminal_snr = bool(alphas_cumprod[-1] == 0)

    @classmethod
    def from_betas(cls, betas):
        """The schedule with ᾱ_t = Π (1 - β_i), i ≤ t (Ho et al. 2020); betas (T,)."""
        return cls((1 - betas.double()).cumprod(0).to(betas.dtype))

    @classmethod
    def scaled_linear(cls, T=1000, beta_start=0.00085, beta_end=0.012):
        """√β linear in t: Stable Diffusion's schedule, with α_T = 0.068."""
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, T) ** 2)

    def zero_terminal_snr(self):
        """A copy with α shifted and scaled so that α_T = 0 and α_0 stays (Lin et al. 2023)."""
        alpha = self.alpha.double()
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        return NoiseSchedule((alpha**2).to(self.alpha.dtype))

    def __len__(self):
        return len(self.alpha)

    def coefficients(self, t):
        """(α_t, σ_t), each (B, 1, 1, 1), for integers t (B,). ValueError if t is out of range."""
        if t.ndim != 1 or t.is_floating_point() or self.alpha.dtype.itemsize < 4:
            got = f"t is {tuple(t.shape)}, {t.dtype}; the schedule {self.alpha.dtype}"
            raise ValueError(f"{got}; t must be integers (B,), the schedule float32 or more")
        if t.device.type == "cpu" and len(t):  # on a GPU it would force a wait
            low, high = t.min().item(), t.max().item()
            if not 0 <= low <= high < len(self):
                raise ValueError(f"t={low}…{high} is out of range; t = 0…{len(self) - 1}")
        return append_dims(self.alpha[t]), append_dims(self.sigma[t])

    def diffuse(self, x_0, noise, t):
        """x_t = α_t x_0 + σ_t ε; x_0 and noise (B, C, H, W), t (B,). ValueError if they differ."""
        if x_0.shape != noise.shape or x_0.ndim != 4 or len(t) != len(x_0):
            shapes = [tuple(x.shape) for x in (x_0, noise, t)]
            raise ValueError(f"x_0, noise, t are {shapes}; expected (B, C, H, W) twice, then (B,)")
        alpha, sigma = self.coefficients(t)
        return alpha * x_0 + sigma * noise


# 2. Denoiser: any network, whatever it predicts, read as an estimate of x_0 and of ε ==============

PREDICTIONS = ("epsilon", "v", "x_0")  # v = α ε - σ x_0 (Salimans & Ho 2022)


def to_x_0_and_epsilon(output, x_t, alpha, sigma, prediction):
    """(x̂_0, ε̂) from a network's output and what it predicts; always x_t = α x̂_0 + σ ε̂."""
    # From here on in the schedule's precision.
    output = output.to(torch.promote_types(output.dtype, alpha.dtype))
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha, output
    if prediction == "v":
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output
    return output, (x_t - alpha * output) / sigma


class Denoiser(nn.Module):
    """A network f(x_t, t, cond) with its schedule; denoiser(x_t, t, cond) is x̂_0.

    encode is a function from pixels (B, C, H, W) in [-1, 1] to the space that is diffused; decode
    goes back. The caller moves, casts and freezes the VAE behind them. clip takes x̂_0 to the range
    of images (static thresholding, Saharia et al. 2022).
    """

    def __init__(
        self, network, schedule, prediction="epsilon", encode=identity, decode=identity, clip=None
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction={prediction!r} is unknown; choose one of {PREDICTIONS}")
        if prediction == "epsilon" and schedule.has_zero_terminal_snr:
            raise ValueError(
                "prediction='epsilon' divides by alpha_T, which is 0 in this schedule; keep the "
                "original one, on which Student is fed pure noise at the last timestep all the same"
            )
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.encode, self.decode, self.clip = encode, decode, clip

    def forward(self, x_t, t, cond, guidance=1.0, null_cond=None):
        """x̂_0 (B, C, H, W); see predict."""
        return self.predict(x_t, t, cond, guidance, null_cond)[0]

    def predict(self, x_t, t, cond, guidance=1.0, null_cond=None):
        """(x̂_0, ε̂) at x_t (B, C, H, W), t (B,), in the schedule's precision. guidance (a number,
        or (B,)) other than 1 extrapolates from null_cond to cond (Ho & Salimans 2022)."""
        alpha, sigma = self.schedule.coefficients(t)
        output = self.network(x_t, t, cond)
        if torch.is_tensor(guidance) or guidance != 1:
            if null_cond is None:
                raise ValueError(f"guidance={guidance} needs null_cond, the empty condition")
            null_output = self.network(x_t, t, null_cond)  # x̂_0 and ε̂ are linear in the output
            output = null_output + append_dims(guidance) * (output - null_output)
        x_0, epsilon = to_x_0_and_epsilon(output, x_t, alpha, sigma, self.prediction)
        if self.clip is not None:
            x_0 = self.clip(x_0)
            epsilon = (x_t - alpha * x_0) / sigma
        return x_0, epsilon


def ddim(denoiser, x_t, timesteps, cond, guidance=1.0, null_cond=None):
    """x̂_0 after deterministic steps (DDIM, η = 0; Song et al. 2021) from x_t at timesteps[0];
    timesteps is a list of (B,) tensors that do not rise."""
    x_0, epsilon = denoiser.predict(x_t, timesteps[0], cond, guidance, null_cond)
    for t in timesteps[1:]:
        x_t = denoiser.schedule.diffuse(x_0, epsilon, t)
        x_0, epsilon = denoiser.predict(x_t, t, cond, guidance, null_cond)
    return x_0


# 3. Student (§3.1): trained at the few timesteps that it samples at ===============================
class Student(nn.Module):
    """The denoiser that is trained, with T_student: pure noise at τ_n, diffused images below."""

    def __init__(self, denoiser, timesteps=(249, 499, 749, 999)):
        super().__init__()
        timesteps, last = tuple(timesteps), len(denoiser.schedule) - 1
        rising = [t for t in sorted(set(timesteps)) if 0 <= t <= last]
        if not timesteps or list(timesteps) != rising:
            raise ValueError(f"timesteps={timesteps} must rise strictly within 0…{last}")
        self.denoiser, self.timesteps = denoiser, timesteps
        self.register_buffer("tau", torch.tensor(timesteps), persistent=False)

    def draw_timesteps(self, n, device=None, generator=None):
        """(n,) timesteps s, uniform over T_student."""
        drawn = torch.randint(len(self.timesteps), (n,), device=device, generator=generator)
        return self.tau.to(device)[drawn]

    def is_terminal(self, s):
        """(B,) booleans: s = τ_n, where the input holds nothing of x_0."""
        return s == self.timesteps[-1]

    def diffuse(self, x_0, noise, s):
        """x_s (B, C, H, W). At τ_n the noise alone, whatever α_T: sampling starts there (§3.1)."""
        x_s = self.denoiser.schedule.diffuse(x_0, noise, s)
        return torch.where(append_dims(self.is_terminal(s)), noise.to(x_s.dtype), x_s)

    def forward(self, x_s, s, cond):
        """x̂_θ(x_s, s), without guidance."""
        return self.denoiser(x_s, s, cond)

    def inference_timesteps(self, steps):
        """Trailing choice from T_student: 1 step (999,), 2 (999, 499), 4 (999, 749, 499, 249)."""
        n = len(self.timesteps)
        if not 1 <= steps <= n:
            raise ValueError(f"steps={steps} is out of range; this student has 1…{n} steps")
        return tuple(self.timesteps[n - 1 - i * n // steps] for i in range(steps))

    @torch.no_grad()
    def sample(self, noise, cond, steps=1, timesteps=None, generator=None, on_step=None):
        """Images (B, C, H, W), decoded, from unit noise: predict x̂_θ, diffuse it with fresh noise
        to the next smaller timestep, predict again. timesteps overrules steps; on_step(s, x_s,
        x_hat) sees every state."""
        timesteps = self.inference_timesteps(steps) if timesteps is None else tuple(timesteps)
        if not timesteps or list(timesteps) != sorted(set(timesteps), reverse=True):
            raise ValueError(f"timesteps={timesteps} must fall strictly, and have an entry")
        x_s, x_hat = noise, None
        for i, tau in enumerate(timesteps):
            s = torch.full((len(noise),), tau, device=noise.device)
            if i > 0:
                x_s = self.denoiser.schedule.diffuse(x_hat, randn_like(noise, generator), s)
            x_hat = self(x_s, s, cond)
            if on_step is not None:
                on_step(tau, x_s, x_hat)
        return self.denoiser.decode(x_hat)


# 4. Discriminator (§3.2; StyleGAN-T, Sauer et al. 2023): heads on a frozen network's features =====
class LocalBatchNorm(nn.Module):
    """Batch norm of (C, B, N) over groups of at most 8 samples, equal in size or differing by one;
    without running statistics."""

    def __init__(self, channels, group_size=8, eps=1e-5):
        super().__init__()
        self.group_size, self.eps = group_size, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        groups = math.ceil(x.shape[1] / self.group_size)
        if x.shape[1] % groups:
            return torch.cat([self(part) for part in x.tensor_split(groups, dim=1)], dim=1)
        rows = rearrange(x, "c (g b) n -> c g (b n)", g=groups)  # layer norm over (b n) is fused
        x = functional.layer_norm(rows, rows.shape[-1:], eps=self.eps).reshape(x.shape)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class CircularConv(nn.Conv1d):
    """Circular convolution over N of (C, B, N)."""

    def forward(self, x):
        weight, right, n = self.weight, self.kernel_size[0] // 2, x.shape[-1]
        if not right:  # as one matrix product
            flat = torch.addmm(self.bias[:, None], weight[:, :, 0], x.flatten(1))
            return flat.view(-1, *x.shape[1:])
        if n < right:  # pad goes round once at most
            x = x.repeat(1, 1, math.ceil(right / n))
        x = functional.pad(x, (self.kernel_size[0] - 1 - right, right), mode="circular")
        return functional.conv2d(x[None], weight[:, :, None], self.bias)[0, ..., :n]


class DiscriminatorHead(nn.Module):
    """D_k: a token map (B, N, C) → a logit for every token (B, N).

    1x1 conv → residual circular conv → 1x1 conv to c_map channels, whose product with a linear map
    of the conditions is the logit (projection, Miyato & Koyama 2018). Convolutions are spectrally
    normalised; local batch norm and a leaky ReLU follow the first two. Without conditions the last
    convolution gives the logit. hidden=None keeps C channels. After StyleGAN-T.
    """

    def __init__(
        self, channels, text_dim=0, image_dim=0, hidden=None, kernel=9, c_map=64,
        norm=LocalBatchNorm,
    ):  # fmt: skip
        super().__init__()
        hidden, self.conditional = hidden or channels, bool(text_dim or image_dim)

        def block(c_in, kernel):
            conv = spectral_norm(CircularConv(c_in, hidden, kernel))
            return nn.Sequential(conv, norm(hidden), nn.LeakyReLU(0.2))

        self.first, self.residual = block(channels, 1), block(hidden, kernel)
        self.last = spectral_norm(CircularConv(hidden, c_map if self.conditional else 1, 1))
        widths = {"c_text": text_dim, "c_img": image_dim}
        self.maps = nn.ParameterDict({k: torch.randn(c_map, w) for k, w in widths.items() if w})
        # The bias keeps a logit where all conditions are zero (c_img at τ_n).
        self.unconditional = nn.Parameter(torch.randn(c_map)) if self.conditional else None

    def forward(self, tokens, c_text=None, c_img=None):
        # Channels first keeps each group of the norm contiguous, which saves copies.
        h = self.first(rearrange(tokens, "b n c -> c b n"))
        h = (h + self.residual(h)) / math.sqrt(2)
        h = self.last(h)  # (c_map or 1, B, N)
        if not self.conditional:
            return h[0]
        projection = self.unconditional.expand(len(tokens), -1)  # (B, c_map)
        for name, c in (("c_text", c_text), ("c_img", c_img)):
            if name in self.maps:
                width = self.maps[name].shape[1]
                if c is None or c.shape != (len(tokens), width):
                    got = None if c is None else tuple(c.shape)
                    raise ValueError(f"{name} is {got}; this head needs {(len(tokens), width)}")
                # Unit normal weights, scaled in use: Adam moves wide and narrow maps at one pace.
                projection = projection + functional.linear(c, self.maps[name]) / math.sqrt(width)
        return (h * projection.T[:, :, None]).sum(0) / math.sqrt(len(h))


class DiscriminatorHeads(nn.ModuleList):
    """All D_k: what is trained of the discriminator, one module to optimise, save or wrap."""

    def __init__(self, channels, **head):
        super().__init__(DiscriminatorHead(c, **head) for c in channels)

    def forward(self, tokens, c_text=None, c_img=None):
        """[(B, N_k)] logits from [(B, N_k, C_k)]. ValueError if their number is not K."""
        return [head(x, c_text, c_img) for head, x in zip(self, tokens, strict=True)]


class Discriminator(nn.Module):
    """The frozen feature network F and its heads.

    features maps images (B, C, H, W) in [-1, 1] to a list of token maps, and does its own resizing
    and normalisation. If it has space = "latent" it reads x̂_θ undecoded (LADD, Sauer et al. 2024).
    """

    def __init__(self, features, heads):
        super().__init__()
        self.features, self.heads = features.requires_grad_(False).eval(), heads
        self.space = getattr(features, "space", "pixel")

    def train(self, mode=True):
        super().train(mode)
        self.features.eval()  # F is frozen
        return self


# 5. Adversarial losses (§3.2, Eq. 2 and 3); each returns one value a sample, (B,) =================
def hinge_student(fake_logits):
    """-Σ_k D_k(F_k(x̂_θ)), Eq. 2, from a list of (B, N_k)."""
    return -sum(logits.mean(1) for logits in fake_logits)


def hinge_discriminator(real_logits, fake_logits):
    """Σ_k max(0, 1 - D_k(F_k(x_0))) + Σ_k max(0, 1 + D_k(F_k(x̂_θ))): Eq. 3 without R1."""
    real = sum(functional.relu(1 - logits).mean(1) for logits in real_logits)
    return real + sum(functional.relu(1 + logits).mean(1) for logits in fake_logits)


def r1(real_logits, real_tokens):
    """Σ_k ‖∂ Σ D_k / ∂F_k(x_0)‖²: R1 (Mescheder et al. 2018) at the heads' inputs (departure 3).

    real_tokens are the leaves (B, N_k, C_k), requiring grad, that gave real_logits.
    """
    total = sum(logits.sum() for logits in real_logits)
    gradients = torch.autograd.grad(total, real_tokens, create_graph=True)
    return sum(g.square().sum((1, 2)) for g in gradients)


# 6. Distillation loss (§3.3, Eq. 4): c(t) · ‖x̂_θ - x̂_ψ(sg(x̂_θ,t); t)‖² =========================

WEIGHTS = ("exponential", "sds", "nfsd")
NFSD_THRESHOLD = 0.2  # of T: below it ε̂(x_t; ∅) itself is δ_D (Katzir et al. 2023)


def distillation_weight(name, alpha, sigma, w=torch.square):
    """c(t): α_t for "exponential", α_t w(σ_t) / (2 σ_t) for "sds" and "nfsd" (App. A): then, with
    space="latent" and reduction="sum", the gradient is SDS's, w(t) (ε̂_ψ - ε') ∂x̂_θ/∂θ."""
    return alpha if name == "exponential" else alpha * w(sigma) / (2 * sigma)


def distance(x, y, reduction="mean"):
    """‖x - y‖² of each sample, (B,): "sum" as in the paper, or the "mean" of its elements."""
    if x.shape != y.shape:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must have one shape")
    squares = (x - y).square().flatten(1)
    return squares.sum(1) if reduction == "sum" else squares.mean(1)


def nfsd_residual(teacher, x_t, t, cond, null_cond, negative_cond, guidance):
    """δ_D + g δ_C of noise-free score distillation (Katzir et al. 2023), in the place of ε̂_ψ - ε'.

    δ_C = ε̂(x_t; y) - ε̂(x_t; ∅). δ_D = ε̂(x_t; ∅) at small t, ε̂(x_t; ∅) - ε̂(x_t; y_neg) above.
    """
    conditions = (cond, null_cond, negative_cond)
    eps_cond, eps_null, eps_negative = (teacher.predict(x_t, t, c)[1] for c in conditions)
    small = append_dims(t < NFSD_THRESHOLD * len(teacher.schedule))
    delta_d = torch.where(small, eps_null, eps_null - eps_negative)
    return delta_d + append_dims(guidance) * (eps_cond - eps_null)


@torch.no_grad()
def reconstruction_target(
    teacher, x_hat, noise, t, cond, *,
    guidance=1.0, null_cond=None, negative_cond=None, steps=1, nfsd=False,
):  # fmt: skip
    """x̂_ψ(sg(x̂_θ,t); t): the teacher's estimate (B, C, H, W) from x_hat diffused to t.

    Neither the teacher nor its input has a gradient. steps > 1 takes DDIM steps at equal spacing
    from t down (Table 1f). With nfsd the target is x̂_θ - (σ_t / α_t)(δ_D + g δ_C): under the SDS
    weight its loss has the gradient w(t)(δ_D + g δ_C).
    """
    x_t = teacher.schedule.diffuse(x_hat, noise, t)
    if not nfsd:
        timesteps = [t * (steps - i) // steps for i in range(steps)]
        return ddim(teacher, x_t, timesteps, cond, guidance, null_cond)
    if null_cond is None or negative_cond is None:
        raise ValueError("weight='nfsd' needs null_cond and negative_cond in the batch")
    alpha, sigma = teacher.schedule.coefficients(t)
    residual = nfsd_residual(teacher, x_t, t, cond, null_cond, negative_cond, guidance)
    return x_hat - sigma / alpha * residual


# 7. One iteration (Eq. 1): L = L_adv^G + λ L_distill for the student, L_adv^D for the heads =======
@dataclass(frozen=True)
class ADDConfig:
    """What the paper sets, and what it leaves open. ValueError for a value that is not allowed."""

    lambda_: float = 2.5  # weight of the distillation loss, §4
    gamma: float = 1e-5  # weight of R1, §4
    weight: str = "exponential"  # c(t), §3.3: exponential, sds, or nfsd (the paper's final models)
    sds_w: Callable = torch.square  # w of sds and nfsd as a function of σ_t: DreamFusion's
    guidance: float | tuple[float, float] = 1.0  # the teacher's; a pair is a range to draw from
    teacher_steps: int = 1  # Table 1f tries 1, 2, 4
    space: str = "pixel"  # where the distance is measured: "pixel" (§3.1), or "latent": undecoded
    reduction: str = "mean"  # of the distance over an image; the paper's is "sum" (departure 2)
    shared_latents: bool = True  # False: the teacher's encoder reads x̂_θ's pixels (Table 1e)

    def __post_init__(self):
        pair = self.guidance if isinstance(self.guidance, tuple) else (self.guidance,) * 2
        rising = len(pair) == 2 and all(isinstance(x, (int, float)) for x in pair)
        rising = rising and -math.inf < pair[0] <= pair[1] < math.inf
        steps = self.teacher_steps
        most, span = (1, "1 with nfsd") if self.weight == "nfsd" else (1000, "from 1 to 1000")
        for name, allowed, rule in (
            ("weight", self.weight in WEIGHTS, f"one of {WEIGHTS}"),
            ("space", self.space in ("pixel", "latent"), "'pixel' or 'latent'"),
            ("reduction", self.reduction in ("mean", "sum"), "'mean' or 'sum'"),
            ("lambda_", 0 <= self.lambda_ < math.inf, "finite and at least 0"),
            ("gamma", 0 <= self.gamma < math.inf, "finite and at least 0"),
            ("guidance", rising, "a number, or a rising pair"),
            ("teacher_steps", type(steps) is int and 0 < steps <= most, span),
        ):
            if not allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")


@dataclass
class Batch:
    """Real images, and what each network is told about them."""

    x_0: torch.Tensor  # pixels (B, C, H, W) in [-1, 1]
    cond: Any  # the student's condition, in whatever form its network takes
    teacher_cond: Any = None  # the teacher's; None: the student's
    null_cond: Any = None  # the teacher's empty condition, for guidance other than 1 and nfsd
    negative_cond: Any = None  # the teacher's y_neg, for nfsd
    c_text: torch.Tensor | None = None  # the heads' conditions, (B, text_dim) and (B, image_dim)
    c_img: torch.Tensor | None = None


@dataclass
class StudentHalf:
    """The student's half of an iteration, for its optimiser, the other half, logs and pictures.
    All but loss and views are detached."""

    loss: torch.Tensor  # Eq. 1, a scalar
    adversarial: torch.Tensor  # its two terms, each (B,)
    distillation: torch.Tensor  # without λ
    s: torch.Tensor  # (B,) the student's timesteps
    t: torch.Tensor  # (B,) the teacher's
    x_hat: torch.Tensor  # x̂_θ in the student's space
    pixels: torch.Tensor | None  # x̂_θ decoded, (B, C, H, W); None where no loss looks at pixels
    target: torch.Tensor  # x̂_ψ, in pixels or latents (config.space)
    real: torch.Tensor = field(repr=False)  # what F reads of the real images
    fake_tokens: list = field(repr=False)  # [F_k(x̂_θ)], which the heads' half reads again
    c_text: torch.Tensor | None = field(repr=False)
    c_img: torch.Tensor | None = field(repr=False)  # zero where s = τ_n
    views: dict = field(repr=False)  # x̂_θ as each term sees it: a hook there sees that gradient


@dataclass
class DiscriminatorHalf:
    """The heads' half of an iteration. All but the loss is detached."""

    loss: torch.Tensor  # Eq. 3, a scalar
    hinge: torch.Tensor  # its two terms, each (B,)
    r1: torch.Tensor  # without γ
    real_logits: list = field(repr=False)  # [(B, N_k)]
    fake_logits: list = field(repr=False)


class ADD(nn.Module):
    """The three networks of Fig. 2, and the two halves of an iteration.

    An iteration costs one pass of the student, one of the teacher (guidance: two), one of F over
    generated images, which both halves use, and one over real ones without gradient. R1's double
    backward goes through the heads alone. On several processes wrap student.denoiser.network (DDP
    or FSDP), average the heads' gradients, and give each process a generator of its own.
    """

    def __init__(self, student, teacher, discriminator, config=None):
        super().__init__()
        if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
            raise ValueError("student and teacher share parameters; copy.deepcopy the network")
        self.student, self.discriminator = student, discriminator
        self.teacher, self.config = teacher.requires_grad_(False).eval(), config or ADDConfig()

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def step(self, batch, student_optimizer, heads_optimizer, generator=None):
        """A whole iteration, in a plain loop. Returns its StudentHalf and DiscriminatorHalf."""
        student = self.student_half(batch, generator)
        student_optimizer.zero_grad()
        student.loss.backward()
        student_optimizer.step()
        heads = self.discriminator_half(student)
        heads_optimizer.zero_grad()
        heads.loss.backward()
        heads_optimizer.step()
        return student, heads

    def student_half(self, batch, generator=None):
        """L_adv^G + λ L_distill (Eq. 1) of a fresh x̂_θ. Its backward moves the student alone."""
        student, denoiser, config = self.student, self.student.denoiser, self.config
        heads = self.discriminator.heads
        with torch.no_grad():
            z_0 = denoiser.encode(batch.x_0)
        s = student.draw_timesteps(len(z_0), z_0.device, generator)
        x_s = student.diffuse(z_0, randn_like(z_0, generator), s)
        x_hat = student(x_s, s, batch.cond)

        latent_features = self.discriminator.space == "latent"
        latent_loss = config.space == "latent" and config.shared_latents
        pixels = None if latent_features and latent_loss else denoiser.decode(x_hat)
        real, fake = (z_0, x_hat) if latent_features else (batch.x_0, pixels)
        c_img = batch.c_img
        if c_img is not None:  # departure 5
            c_img = c_img.masked_fill(student.is_terminal(s)[:, None], 0)

        # Each term has a view of x̂_θ of its own, where a hook sees that term's gradient alone.
        judged, compared = (x.view_as(x) for x in (fake, x_hat if latent_loss else pixels))
        fake_tokens = self.discriminator.features(judged)
        heads.requires_grad_(False)  # a gradient left in them would teach them to call fakes real
        adversarial = hinge_student(heads(fake_tokens, batch.c_text, c_img))
        heads.requires_grad_(True)
        distillation, target, t = self.distillation_loss(compared, x_hat, batch, generator)
        return StudentHalf(
            adversarial.mean() + config.lambda_ * distillation.mean(), adversarial.detach(),
            distillation.detach(), s, t, x_hat.detach(),
            None if pixels is None else pixels.detach(), target, real,
            [x.detach() for x in fake_tokens], batch.c_text, c_img,
            {"adversarial": judged, "distillation": compared},
        )  # fmt: skip

    def distillation_loss(self, x, x_hat, batch, generator=None):
        """(L_distill of each sample (B,), target, t). x_hat is x̂_θ in the student's space; x is it
        decoded or, for a loss in shared latents, a view of it."""
        config, teacher, latents = self.config, self.teacher, x_hat  # what the teacher diffuses
        if not config.shared_latents and config.space == "latent":
            latents = x = teacher.encode(x)
        elif not config.shared_latents:
            with torch.no_grad():
                latents = teacher.encode(x)
        T = len(teacher.schedule) - teacher.schedule.has_zero_terminal_snr  # α_T = 0 hides x̂_θ
        t = torch.randint(T, (len(latents),), device=latents.device, generator=generator)
        noise = randn_like(latents, generator)
        guidance = config.guidance
        if isinstance(guidance, tuple):
            guidance = torch.empty(len(t), device=t.device).uniform_(*guidance, generator=generator)
        target = reconstruction_target(
            teacher, latents.detach(), noise, t,
            batch.cond if batch.teacher_cond is None else batch.teacher_cond,
            guidance=guidance, null_cond=batch.null_cond, negative_cond=batch.negative_cond,
            steps=config.teacher_steps, nfsd=config.weight == "nfsd",
        )  # fmt: skip
        if config.space == "pixel":
            with torch.no_grad():
                target = teacher.decode(target)
        c_t = distillation_weight(config.weight, *teacher.schedule.coefficients(t), config.sds_w)
        return c_t.flatten() * distance(x, target, config.reduction), target, t

    def discriminator_half(self, half):
        """L_adv^D (Eq. 3), after the student's half. Its backward moves the heads alone."""
        heads, gamma = self.discriminator.heads, self.config.gamma
        with torch.no_grad():
            real_tokens = self.discriminator.features(half.real)
        real_tokens = [x.detach().requires_grad_(gamma > 0) for x in real_tokens]
        with parametrize.cached():  # one spectral norm, the same weights for real and generated
            real_logits = heads(real_tokens, half.c_text, half.c_img)
            fake_logits = heads(half.fake_tokens, half.c_text, half.c_img)
        hinge = hinge_discriminator(real_logits, fake_logits)
        penalty = r1(real_logits, real_tokens) if gamma > 0 else torch.zeros_like(hinge)
        return DiscriminatorHalf(
            hinge.mean() + gamma * penalty.mean(), hinge.detach(), penalty.detach(),
            [x.detach() for x in real_logits], [x.detach() for x in fake_logits],
        )  # fmt: skip
