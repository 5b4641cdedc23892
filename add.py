"""Adversarial Diffusion Distillation in one file.

ADD (Sauer, Lorenz, Blattmann & Rombach 2023, arXiv 2311.17042; the method behind SD-Turbo and SDXL-Turbo) turns a
pretrained diffusion model into one that samples in one to four steps. A student, which starts as a copy of the model,
denoises diffused images in a single step and is trained with two losses: it must fool a discriminator that looks at its
images through a frozen feature network, and agree with the frozen model, the teacher, that denoises them once more.

Notation (paper → here; everything is ASCII, a hat is the suffix `_hat`, a subscript follows an underscore)
    x_0, x_s, x_t        a clean image; the same diffused to timestep s (student) or t (teacher)
    α_t, σ_t             alpha, sigma: x_t = α_t x_0 + σ_t ε, α_t² + σ_t² = 1; t = 0 … T-1, so 999 is the paper's 1000
    x̂_θ(x_s, s)          x_hat: what the student makes of x_s, in the space it works in (pixels, or a VAE's latents)
    x̂_ψ(x̂_θ,t; t)        target: what the teacher makes of x_hat diffused to t
    F_k, D_k             the feature network's token map k, (B, N_k, C_k), and the discriminator head that reads it
    s ~ T_student        timesteps: {τ_1 … τ_n} = (249, 499, 749, 999)

Where to find what
    §3.1 forward process x_s          1 NoiseSchedule.diffuse            §3.2 Eq. 2, Eq. 3      5 hinge_*, r1
    §3.1 zero terminal SNR            1 NoiseSchedule.zero_terminal_snr  §3.3 Eq. 4, target     6 reconstruction_target
    §3.1 a denoiser's x̂_0 and ε̂       2 Denoiser, ddim                   §3.3 c(t), App. A      6 weight, distance
    §3.1 student, T_student, sampling 3 Student                          Eq. 1, one iteration   7 ADDConfig, ADD
    §3.2 heads, projection            4 DiscriminatorHead, Discriminator

Departures from the paper, and choices where it is silent
    1. ε-networks keep a schedule with α_T > 0 and are *fed* pure noise at τ_n: at α_T = 0 their x̂_0 is singular. The
       released models' public sampler does the same. v- and x_0-networks may use zero_terminal_snr().
    2. ‖x - y‖² is averaged over an image's elements (config.reduction = "sum" gives the paper's formula): summed, its
       weight against the hinge would grow with the resolution.
    3. Hinge losses are averaged over tokens and summed over heads; R1, without the usual ½, differentiates the sum over
       tokens and batch.
    4. c_text and c_img enter as a sum of two linear maps, which is one linear map of their concatenation.
    5. c_img is zero at τ_n, where the student has seen nothing of x_0. Real images get their generated partners' c.
    6. The teacher's guidance, optimisers, EMA and augmentation are not in the paper: arguments here.
    7. NFSD with several teacher steps has no published form: refused.
    8. Of T_student the paper gives N = 4 and τ_n = 1000; the others here are evenly spaced. Each iteration has both
       halves; the heads judge images from before the student's update.
    9. Further steps take fresh noise (§3.1). The released models' demo keeps a share of the old, at t = 999, 899, 799, 699.
   10. Optional, off unless asked for: estimates of x_0 clipped to the range of images (Denoiser.clip).
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def _column(x):
    """(B,) → (B, 1, 1, 1), to go with images; a number stays what it is."""
    return x[:, None, None, None] if torch.is_tensor(x) else x


# =====================================================================================================================
# 1. Forward process (§3.1): x_t = α_t x_0 + σ_t ε
# =====================================================================================================================


class NoiseSchedule(nn.Module):
    """α_t and σ_t for t = 0 … T-1, from ᾱ_t = α_t², a (T,) tensor that falls from below 1 to at least 0."""

    def __init__(self, alphas_cumprod):
        super().__init__()
        if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 2:
            raise ValueError(f"alphas_cumprod has shape {tuple(alphas_cumprod.shape)}; expected (T,) with T > 1")
        low, high = float(alphas_cumprod.min()), float(alphas_cumprod.max())
        if not (0 <= low and high < 1 and (alphas_cumprod.diff() <= 0).all()):
            raise ValueError(f"alphas_cumprod={low}…{high} must fall monotonically within [0, 1)")
        # Not in checkpoints: a schedule is a setting, and loading another's weights must not change it.
        self.register_buffer("alpha", alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("sigma", (1 - alphas_cumprod).sqrt(), persistent=False)
        self.has_zero_terminal_snr = bool(alphas_cumprod[-1] == 0)

    @classmethod
    def from_betas(cls, betas):
        """The schedule with ᾱ_t = Π (1 - β_i), i ≤ t (Ho et al. 2020); betas (T,), computed in float64."""
        return cls((1 - betas.double()).cumprod(0).to(betas.dtype))

    @classmethod
    def linear(cls, T=1000, beta_start=1e-4, beta_end=0.02):
        """β linear in t (Ho et al. 2020)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, T))

    @classmethod
    def scaled_linear(cls, T=1000, beta_start=0.00085, beta_end=0.012):
        """√β linear in t: Stable Diffusion's schedule, with α_T = 0.068."""
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, T) ** 2)

    @classmethod
    def cosine(cls, T=1000, offset=0.008):
        """ᾱ_t = f(t + 1) / f(0), f(u) = cos²(π/2 (u/T + offset) / (1 + offset)) (Nichol & Dhariwal 2021)."""
        f = torch.cos(math.pi / 2 * (torch.arange(T + 1, dtype=torch.float64) / T + offset) / (1 + offset)) ** 2
        return cls.from_betas((1 - f[1:] / f[:-1]).clamp(max=0.999).float())

    def zero_terminal_snr(self):
        """A copy whose α is shifted and scaled so that α_T = 0 exactly and α_0 stays (Lin et al. 2023, Alg. 1)."""
        alpha = self.alpha.double()
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        return NoiseSchedule((alpha**2).to(self.alpha.dtype))

    def __len__(self):
        return len(self.alpha)

    def coefficients(self, t):
        """(α_t, σ_t) as (B, 1, 1, 1) tensors for integer t (B,). ValueError if a t is not in 0 … T-1."""
        if t.ndim != 1 or t.is_floating_point():
            raise ValueError(f"t has shape {tuple(t.shape)} and type {t.dtype}; expected (B,) integers")
        if self.alpha.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the schedule is {self.alpha.dtype}; it needs float32: cast denoiser.network alone")
        if t.device.type == "cpu" and len(t):  # elsewhere it would wait for the device, whose indexing has its own check
            low, high = t.min().item(), t.max().item()
            if not 0 <= low <= high < len(self):
                raise ValueError(f"t={low}…{high} is out of range; this schedule has t = 0…{len(self) - 1}")
        return _column(self.alpha[t]), _column(self.sigma[t])

    def diffuse(self, x_0, noise, t):
        """x_t = α_t x_0 + σ_t ε; x_0 and noise (B, C, H, W), t (B,). ValueError if shapes differ."""
        if x_0.shape != noise.shape or x_0.ndim != 4 or len(t) != len(x_0):
            raise ValueError(
                f"x_0 {tuple(x_0.shape)}, noise {tuple(noise.shape)} and t {tuple(t.shape)} do not fit; "
                "expected (B, C, H, W), the same, and (B,)"
            )
        alpha, sigma = self.coefficients(t)
        return alpha * x_0 + sigma * noise


# =====================================================================================================================
# 2. Denoiser: any network, whatever it predicts, read as an estimate of x_0 and of ε
# =====================================================================================================================

PREDICTIONS = ("epsilon", "v", "x_0")  # v = α ε - σ x_0 (Salimans & Ho 2022)


def to_x_0_and_epsilon(output, x_t, alpha, sigma, prediction):
    """(x̂_0, ε̂) from a network's output, given what it predicts; the pair satisfies x_t = α x̂_0 + σ ε̂."""
    _check_choice("prediction", prediction, PREDICTIONS)
    output = output.to(torch.promote_types(output.dtype, alpha.dtype))  # half-precision outputs lose nothing further
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha, output
    if prediction == "v":
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output
    return output, (x_t - alpha * output) / sigma


class Denoiser(nn.Module):
    """A network f(x_t, t, cond) with its schedule: calling it gives (x̂_0, ε̂) of noisy images.

    encode maps pixels (B, 3, H, W) in [-1, 1] to the space that is diffused, decode back: a latent model's VAE with its
    scale, the identity for a pixel model. They stay out of the module tree, so that no optimiser, checkpoint or wrapper
    sees a VAE: its owner moves it, casts it and freezes it, as gradients go through decode and none may stay there.
    clip, a function of x̂_0, takes it to the range that images have in that space (static thresholding, Saharia et al.
    2022): for pixels, whose noise beyond black no eye sees. What it cuts off gets no gradient from any loss on x̂_0.
    ValueError if an ε-network is given a schedule with zero terminal SNR.
    """

    def __init__(self, network, schedule, prediction="epsilon", encode=nn.Identity(), decode=nn.Identity(), clip=None):
        super().__init__()
        _check_choice("prediction", prediction, PREDICTIONS)
        if prediction == "epsilon" and schedule.has_zero_terminal_snr:
            raise ValueError(
                "prediction='epsilon' cannot use a schedule with zero terminal SNR: x_0 = (x_t - sigma eps) / alpha "
                "has alpha_T = 0. Keep the un-rescaled schedule (the student is fed pure noise at tau_n all the same), "
                "or use prediction='v' or 'x_0'"
            )
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.__dict__.update(encode=encode, decode=decode, clip=clip)  # past nn.Module's registration

    def forward(self, x_t, t, cond, guidance=1.0, null_cond=None, clip=True):
        """(x̂_0, ε̂) at x_t (B, C, H, W), t (B,), in the schedule's float32: at 999 x̂_0 has 14.6 times ε̂'s error.

        guidance (a float, or (B,)) other than 1 extrapolates from null_cond to cond (Ho & Salimans 2022): in the
        output, in which x̂_0 and ε̂ are linear. clip=False leaves x̂_0 as it is, for a loss that has to pull it back.
        """
        alpha, sigma = self.schedule.coefficients(t)
        output = self.network(x_t, t, cond)
        if torch.is_tensor(guidance) or guidance != 1:
            if null_cond is None:
                raise ValueError(f"guidance={guidance} needs null_cond, the empty condition; pass it, or guidance=1")
            null_output = self.network(x_t, t, null_cond)
            output = null_output + _column(guidance) * (output - null_output)
        x_0, epsilon = to_x_0_and_epsilon(output, x_t, alpha, sigma, self.prediction)
        if clip and self.clip is not None:
            x_0 = self.clip(x_0)
            epsilon = (x_t - alpha * x_0) / sigma
        return x_0, epsilon


def ddim(denoiser, x_t, timesteps, cond, guidance=1.0, null_cond=None):
    """x̂_0 after consecutive deterministic steps (DDIM, η = 0; Song et al. 2021) from x_t at timesteps[0].

    timesteps is a list of (B,) tensors that do not rise; one entry means a single denoising.
    """
    x_0, epsilon = denoiser(x_t, timesteps[0], cond, guidance, null_cond)
    for t in timesteps[1:]:
        x_0, epsilon = denoiser(denoiser.schedule.diffuse(x_0, epsilon, t), t, cond, guidance, null_cond)
    return x_0


# =====================================================================================================================
# 3. Student (§3.1): trained at the few timesteps that it samples at
# =====================================================================================================================


class Student(nn.Module):
    """The denoiser that is trained, with T_student = {τ_1 < … < τ_n}: pure noise at τ_n, diffused images below.

    ValueError if the timesteps do not rise strictly within the schedule.
    """

    def __init__(self, denoiser, timesteps=(249, 499, 749, 999)):
        super().__init__()
        T = len(denoiser.schedule)
        if not timesteps or list(timesteps) != sorted(set(timesteps)) or timesteps[0] < 0 or timesteps[-1] >= T:
            raise ValueError(f"timesteps={tuple(timesteps)} must rise strictly within 0…{T - 1}")
        self.denoiser, self.timesteps = denoiser, tuple(timesteps)
        self.register_buffer("tau", torch.tensor(self.timesteps), persistent=False)

    def draw_timesteps(self, n, device=None, generator=None):
        """(n,) timesteps s, uniform over T_student."""
        drawn = torch.randint(len(self.timesteps), (n,), device=device, generator=generator)
        return self.tau.to(device)[drawn]

    def is_terminal(self, s):
        """(B,) booleans: s = τ_n, where the input holds nothing of x_0."""
        return s == self.timesteps[-1]

    def diffuse(self, x_0, noise, s):
        """The student's input x_s (B, C, H, W); at τ_n the noise alone, whatever α_T: sampling starts there (§3.1)."""
        x_s = self.denoiser.schedule.diffuse(x_0, noise, s)
        return torch.where(_column(self.is_terminal(s)), noise.to(x_s.dtype), x_s)

    def forward(self, x_s, s, cond):
        """x̂_θ(x_s, s), without guidance."""
        return self.denoiser(x_s, s, cond)[0]

    def inference_timesteps(self, steps):
        """Trailing choice from T_student: 1 step (999,), 2 (999, 499), 4 (999, 749, 499, 249)."""
        n = len(self.timesteps)
        if not 1 <= steps <= n:
            raise ValueError(f"steps={steps} is out of range; this student was trained for 1…{n} steps")
        return tuple(self.timesteps[n - 1 - i * n // steps] for i in range(steps))

    @torch.no_grad()
    def sample(self, noise, cond, steps=1, timesteps=None, generator=None, on_step=None):
        """Images (B, C, H, W) in the range of decode, from unit noise in the student's space: predict x̂_0, diffuse it
        with fresh noise to the next smaller timestep, predict again.

        timesteps overrules steps; generator draws the fresh noise; on_step(s, x_s, x_hat) sees every state.
        """
        timesteps = self.inference_timesteps(steps) if timesteps is None else tuple(timesteps)
        if not timesteps or list(timesteps) != sorted(set(timesteps), reverse=True):
            raise ValueError(f"timesteps={timesteps} must fall strictly, and have at least one entry")
        x_s = noise
        for i, tau in enumerate(timesteps):
            s = torch.full((len(noise),), tau, device=noise.device)
            if i > 0:
                fresh = torch.randn(noise.shape, dtype=noise.dtype, device=noise.device, generator=generator)
                x_s = self.denoiser.schedule.diffuse(x_hat, fresh, s)
            x_hat = self(x_s, s, cond)
            if on_step is not None:
                on_step(tau, x_s, x_hat)
        return self.denoiser.decode(x_hat)


# =====================================================================================================================
# 4. Discriminator (§3.2, after StyleGAN-T, Sauer et al. 2023): heads on a frozen network's features
# =====================================================================================================================


def readout(tokens):
    """(B, 1 + N, C), class token first → (B, N, C): it is added to every patch token and dropped."""
    return tokens[:, 1:] + tokens[:, :1]


class LocalBatchNorm(nn.Module):
    """Batch norm of (B, C, N) over groups of at most 8 samples and their tokens, without running statistics.

    Where the group size does not divide B, the groups differ by one sample.
    """

    def __init__(self, channels, group_size=8, eps=1e-5):
        super().__init__()
        self.group_size, self.eps = group_size, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def _normalize(self, x, b):  # (g b, C, N), b samples a group; as a layer norm over (b N), which is fused
        rows = rearrange(x, "(g b) c n -> g c (b n)", b=b)
        rows = F.layer_norm(rows, rows.shape[-1:], eps=self.eps)
        return rearrange(rows, "g c (b n) -> (g b) c n", b=b)

    def forward(self, x):
        groups = max(1, math.ceil(len(x) / self.group_size))
        size, larger = divmod(len(x), groups)  # the first `larger` groups take one sample more
        first, rest = x.split([larger * (size + 1), (groups - larger) * size])
        parts = [self._normalize(part, b) for part, b in ((first, size + 1), (rest, size)) if len(part)]
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        return x * self.weight[:, None] + self.bias[:, None]


class Projection(nn.Linear):
    """Conditions (B, width) → (B, c_map): unit normal weights, scaled by 1/√width in use, so that Adam changes what wide
    and narrow conditions do at one pace (StyleGAN-T)."""

    def __init__(self, width, c_map):
        super().__init__(width, c_map, bias=False)

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, c):
        return super().forward(c) / math.sqrt(self.in_features)


class DiscriminatorHead(nn.Module):
    """D_k: one token map (B, N, C) → a logit for every token (B, N).

    1x1 conv → residual circular conv (sum / √2) → 1x1 conv to c_map channels, multiplied by a linear map of the
    conditions and summed / √c_map (projection, Miyato & Koyama 2018); convolutions spectrally normalised, each of the
    first two followed by local batch norm and a leaky ReLU. Without conditions the last convolution gives the logit.
    hidden=None keeps C channels (StyleGAN-T); the toy uses fewer.
    """

    def __init__(self, channels, text_dim=0, image_dim=0, hidden=None, kernel=9, c_map=64):
        super().__init__()
        hidden, self.conditional = hidden or channels, bool(text_dim or image_dim)

        def block(c_in, kernel):
            conv = nn.Conv1d(c_in, hidden, kernel, padding="same", padding_mode="circular")
            return nn.Sequential(spectral_norm(conv), LocalBatchNorm(hidden), nn.LeakyReLU(0.2))

        self.first, self.residual = block(channels, 1), block(hidden, kernel)
        self.last = spectral_norm(nn.Conv1d(hidden, c_map if self.conditional else 1, 1))
        self.from_text = Projection(text_dim, c_map) if text_dim else None
        self.from_image = Projection(image_dim, c_map) if image_dim else None
        # With it a condition of zeros (c_img at τ_n) still leaves a logit.
        self.unconditional = nn.Parameter(torch.randn(c_map)) if self.conditional else None

    def forward(self, tokens, c_text=None, c_img=None):
        h = self.first(rearrange(tokens, "b n c -> b c n"))
        h = (h + self.residual(h)) / math.sqrt(2)
        h = self.last(h)  # (B, c_map or 1, N)
        if not self.conditional:
            return h[:, 0]
        projection = self.unconditional.expand(len(h), -1)  # (B, c_map)
        for layer, c, name in ((self.from_text, c_text, "c_text"), (self.from_image, c_img, "c_img")):
            if layer is not None:
                if c is None or c.shape != (len(h), layer.in_features):
                    shape = None if c is None else tuple(c.shape)
                    raise ValueError(f"{name} has shape {shape}; this head needs ({len(h)}, {layer.in_features})")
                projection = projection + layer(c)
        return (h * projection[:, :, None]).sum(1) / math.sqrt(h.shape[1])


class DiscriminatorHeads(nn.ModuleList):
    """All D_k: the trainable part of the discriminator, one module to optimise, save or wrap for several processes."""

    def __init__(self, channels, **head):
        super().__init__(DiscriminatorHead(c, **head) for c in channels)

    def forward(self, tokens, c_text=None, c_img=None):
        """List of logits (B, N_k) from a list of token maps (B, N_k, C_k). ValueError if their number is not K."""
        if len(tokens) != len(self):
            raise ValueError(f"tokens has {len(tokens)} maps; there are {len(self)} heads")
        return [head(x, c_text, c_img) for head, x in zip(self, tokens, strict=True)]


class Discriminator(nn.Module):
    """F and its heads. features maps images (B, C, H, W) in [-1, 1] to a list of token maps, one for each head; it does
    its own resizing and normalisation. It is frozen, and train() cannot bring it out of eval mode. Features that say
    `space = "diffused"` read the student's space instead: then nothing is decoded for them (LADD, Sauer et al. 2024).
    ValueError for DiffAugment there."""

    def __init__(self, features, heads, augment=()):
        super().__init__()
        self.features, self.heads, self.augment = features.requires_grad_(False).eval(), heads, tuple(augment)
        for name in self.augment:
            _check_choice("augment", name, tuple(AUGMENTATIONS))
        self.space = getattr(features, "space", "pixel")
        if self.augment and self.space != "pixel":
            raise ValueError(f"augment={self.augment} is for images; these features read the student's space: use ()")

    def train(self, mode=True):
        super().train(mode)
        self.features.eval()
        return self

    def tokens(self, images, generator=None):
        """[F_k(images)], augmented first; the gradient with respect to the images goes through."""
        for name in self.augment:
            images = AUGMENTATIONS[name](images, generator)
        return self.features(images)

    def forward(self, tokens, c_text=None, c_img=None):
        return self.heads(tokens, c_text, c_img)


# DiffAugment (Zhao et al. 2020): differentiable, one draw for each image, the same policy for real and generated ones.


def _uniform(images, low, high, generator):
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high, generator=generator)


def augment_color(images, generator=None):
    """Brightness ± 0.5, saturation x 0…2, contrast x 0.5…1.5."""
    images = images + _uniform(images, -0.5, 0.5, generator)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * _uniform(images, 0, 2, generator)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * _uniform(images, 0.5, 1.5, generator)


def _integers(images, low, high, generator):
    """(B, 1) whole numbers, low and high among them."""
    return torch.randint(low, high + 1, (len(images), 1), device=images.device, generator=generator)


def augment_translation(images, generator=None, ratio=0.125):
    """Shift by up to ratio of height and width; what comes in at the border is zero."""
    sources, inside = [], []  # of rows and columns, (B, H) and (B, W): where each comes from; whether that is in the image
    for n in images.shape[2:]:
        most = int(ratio * n + 0.5)
        source = torch.arange(n, device=images.device) + _integers(images, -most, most, generator)
        inside.append((source >= 0) & (source < n))
        sources.append(source.clamp(0, n - 1))
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[batch, sources[0][:, :, None], sources[1][:, None, :]].permute(0, 3, 1, 2)
    return moved * (inside[0][:, None, :, None] & inside[1][:, None, None, :])


def augment_cutout(images, generator=None, ratio=0.2):
    """A square of ratio of height and width becomes zero, anywhere, partly outside too; StyleGAN-T's ratio."""
    cut = []
    for n in images.shape[2:]:
        size = int(ratio * n + 0.5)
        first = _integers(images, 0, n - size % 2, generator) - size // 2
        place = torch.arange(n, device=images.device)
        cut.append((place >= first) & (place < first + size))
    return images * ~(cut[0][:, None, :, None] & cut[1][:, None, None, :])


AUGMENTATIONS = {"color": augment_color, "translation": augment_translation, "cutout": augment_cutout}


# =====================================================================================================================
# 5. Adversarial losses (§3.2, Eq. 2 and 3); each returns one value a sample, (B,)
# =====================================================================================================================


def hinge_student(fake_logits):
    """-Σ_k D_k(F_k(x̂_θ)), Eq. 2, from a list of (B, N_k)."""
    return -sum(logits.mean(1) for logits in fake_logits)


def hinge_discriminator(real_logits, fake_logits):
    """Σ_k max(0, 1 - D_k(F_k(x_0))) + Σ_k max(0, 1 + D_k(F_k(x̂_θ))), Eq. 3 without R1, from lists of (B, N_k)."""
    real = sum(F.relu(1 - logits).mean(1) for logits in real_logits)
    return real + sum(F.relu(1 + logits).mean(1) for logits in fake_logits)


def r1(real_logits, real_tokens):
    """Σ_k ‖∂ Σ D_k / ∂F_k(x_0)‖² for each sample: R1 (Mescheder et al. 2018) at each head's input, not at the pixels.

    Σ D_k runs over tokens and batch, whose samples local batch norm couples (departure 3).
    real_tokens are the leaves (B, N_k, C_k) that require grad and gave real_logits: F itself is never differentiated.
    """
    total = sum(logits.sum() for logits in real_logits)
    gradients = torch.autograd.grad(total, real_tokens, create_graph=True)
    return sum(g.square().sum((1, 2)) for g in gradients)


# =====================================================================================================================
# 6. Distillation loss (§3.3, Eq. 4): c(t) · ‖x̂_θ - x̂_ψ(sg(x̂_θ,t); t)‖²
# =====================================================================================================================

WEIGHTS = ("exponential", "sds", "nfsd")
SDS_W = {"one": torch.ones_like, "sigma_squared": torch.square}  # w(t) as a function of σ_t; the latter: DreamFusion
NFSD_THRESHOLD = 0.2  # of T: below t = 200 of 1000 NFSD takes ε̂(x_t; ∅) itself as δ_D (Katzir et al. 2023)


def weight(name, alpha, sigma, w="sigma_squared"):
    """c(t): α_t ("exponential"), or α_t w(t) / (2 σ_t) ("sds", and "nfsd" with its own target); App. A.

    With the latter, space="diffused" and reduction="sum" the loss has the SDS gradient w(t) (ε̂_ψ - ε') ∂x̂_θ/∂θ;
    "mean" divides it by the number of elements, pixel distance puts the decoder in between.
    """
    _check_choice("weight", name, WEIGHTS)
    _check_choice("sds_w", w, tuple(SDS_W))
    return alpha if name == "exponential" else alpha * SDS_W[w](sigma) / (2 * sigma)


def distance(x, y, reduction="mean"):
    """d(x, y) = ‖x - y‖² for each sample, (B,): "sum" as in the paper, or "mean" over an image's elements."""
    _check_choice("reduction", reduction, ("mean", "sum"))
    if x.shape != y.shape:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must have one shape")
    squares = (x - y).square().flatten(1)
    return squares.sum(1) if reduction == "sum" else squares.mean(1)


def nfsd_residual(teacher, x_t, t, cond, null_cond, negative_cond, guidance):
    """δ_D + g δ_C of noise-free score distillation (Katzir et al. 2023): what takes the place of ε̂_ψ - ε'.

    δ_C = ε̂(x_t; y) - ε̂(x_t; ∅); δ_D = ε̂(x_t; ∅) below the threshold, ε̂(x_t; ∅) - ε̂(x_t; y_neg) above it.
    """
    eps_cond, eps_null, eps_negative = (teacher(x_t, t, c)[1] for c in (cond, null_cond, negative_cond))
    small = _column(t < NFSD_THRESHOLD * len(teacher.schedule))
    return torch.where(small, eps_null, eps_null - eps_negative) + _column(guidance) * (eps_cond - eps_null)


@torch.no_grad()
def reconstruction_target(
    teacher, x_hat, noise, t, cond, *, guidance=1.0, null_cond=None, negative_cond=None, steps=1, nfsd=False
):
    """x̂_ψ(sg(x̂_θ,t); t), the teacher's reconstruction (B, C, H, W) of x_hat, in the teacher's space.

    Nothing here has a gradient: not the teacher, not its input. steps > 1 takes so many DDIM steps at equal spacing
    from t down (Table 1f). With nfsd, the target x̂_θ - (σ_t / α_t)(δ_D + g δ_C), whose loss under the SDS weight has
    the gradient w(t)(δ_D + g δ_C).
    """
    x_t = teacher.schedule.diffuse(x_hat, noise, t)
    if not nfsd:
        return ddim(teacher, x_t, [t * (steps - i) // steps for i in range(steps)], cond, guidance, null_cond)
    if steps != 1:
        raise ValueError(f"teacher_steps={steps} has no meaning with weight='nfsd'; use teacher_steps=1")
    if null_cond is None or negative_cond is None:
        raise ValueError("weight='nfsd' needs null_cond and negative_cond in the batch")
    alpha, sigma = teacher.schedule.coefficients(t)
    return x_hat - sigma / alpha * nfsd_residual(teacher, x_t, t, cond, null_cond, negative_cond, guidance)


# =====================================================================================================================
# 7. One iteration (Eq. 1): L = L_adv^G + λ L_distill for the student, L_adv^D for the heads
# =====================================================================================================================


@dataclass(frozen=True)
class ADDConfig:
    """What the paper sets, and what it leaves open. ValueError for a value that is not allowed."""

    lambda_: float = 2.5  # weight of the distillation loss, §4
    gamma: float = 1e-5  # weight of R1, §4
    weight: str = "exponential"  # c(t): exponential (the paper's ablations), sds, or nfsd (its final models), §3.3
    sds_w: str = "sigma_squared"  # w(t) of sds and nfsd; not in the paper
    guidance: float | tuple[float, float] = 1.0  # the teacher's, or a range to draw from; nfsd's g (7.5 in its paper)
    teacher_steps: int = 1  # Table 1f tries 1, 2, 4
    space: str = "pixel"  # where d(x, y) is measured: "pixel" (§3.1), or "diffused", the space the teacher diffuses
    reduction: str = "mean"  # of d(x, y) over an image; the paper's formula is "sum" (departure 2)
    # The student's space is the teacher's; if not, its pixels are encoded again (Table 1e). Nothing can check this: the
    # latents of SD2.1 and SDXL have one shape and two meanings.
    shared_latents: bool = True

    def __post_init__(self):
        _check_choice("weight", self.weight, WEIGHTS)
        _check_choice("sds_w", self.sds_w, tuple(SDS_W))
        _check_choice("space", self.space, ("pixel", "diffused"))
        _check_choice("reduction", self.reduction, ("mean", "sum"))
        for name in ("lambda_", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and at least 0")
        low, high = self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"guidance={self.guidance} must be a finite number, or a rising pair of them as a tuple")
        n = self.teacher_steps
        if not isinstance(n, int) or n < 1 or (self.weight == "nfsd" and n != 1):
            raise ValueError(f"teacher_steps={n} must be a whole number of at least 1, and 1 with weight='nfsd'")


@dataclass
class Batch:
    """Real images and what each network is told about them; the teacher's condition is the student's unless given."""

    x_0: torch.Tensor  # pixels (B, C, H, W) in [-1, 1]
    cond: Any  # the student's condition, in whatever form its network takes
    teacher_cond: Any = None
    null_cond: Any = None  # the teacher's empty condition: for guidance other than 1, and nfsd
    negative_cond: Any = None  # the teacher's y_neg: for nfsd
    c_text: torch.Tensor | None = None  # the heads' conditions, (B, text_dim) and (B, image_dim)
    c_img: torch.Tensor | None = None


@dataclass
class StudentHalf:
    """What the student's half of an iteration hands on: its loss, to the optimiser; the rest, to the other half, the
    log and the pictures."""

    loss: torch.Tensor  # Eq. 1, a scalar
    s: torch.Tensor  # (B,) the student's timesteps
    t: torch.Tensor  # (B,) the teacher's
    x_hat: torch.Tensor  # x̂_θ in the student's space, detached
    pixels: torch.Tensor | None  # x̂_θ decoded, (B, C, H, W), detached; None where no loss looks at pixels
    real: torch.Tensor = field(repr=False)  # what F reads of the real images: pixels, or the student's space
    target: torch.Tensor  # the teacher's x̂_ψ, in pixels or in its own space (config.space)
    fake_tokens: list = field(repr=False)  # [F_k(x̂_θ)], detached: the heads' half reads them again at no cost
    c_text: torch.Tensor | None = field(repr=False)
    c_img: torch.Tensor | None = field(repr=False)  # zero where s = τ_n
    log: dict = field(default_factory=dict)  # name → detached scalar


def _tap(x, log, name):
    """x; the root mean square over the batch of its samples' gradient norms goes to the log when backward comes by."""
    if x is not None and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda g: log.update({name: g.detach().float().norm() * math.sqrt(len(g))}))
    return x


def backward(loss, optimizer, clip=math.inf):
    """Gives the optimiser's parameters their gradient, clipped to the norm `clip`; returns the norm before that."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)


def update(optimizer, name, loss, norm):
    """A step of the optimiser. FloatingPointError, which names what it was, if the loss or the norm of its gradient is
    not finite: then no weight has moved."""
    for what, value in (("loss", loss.detach()), ("gradient", norm)):
        if not value.isfinite():
            raise FloatingPointError(f"{name} {what} is {value.item()}")
    optimizer.step()


def descend(loss, optimizer, name, clip=math.inf):
    """backward, then update; returns the norm of the gradient."""
    norm = backward(loss, optimizer, clip)
    update(optimizer, name, loss, norm)
    return norm


@contextmanager
def _frozen(module):
    """No parameter of module gets a gradient inside: left in .grad, it would teach the heads to call fakes real."""
    required = [p.requires_grad for p in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for p, value in zip(module.parameters(), required, strict=True):
            p.requires_grad_(value)


class ADD(nn.Module):
    """The three networks of Fig. 2 and the two halves of an iteration, each a loss from a batch.

    The cheapest correct step: one student forward; one pass of F over the fakes, whose features serve both halves; one
    pass of F over the reals without gradient; R1's double backward through the heads alone; no gradient in the teacher.

    On several processes wrap student.denoiser.network (DDP or FSDP) and discriminator.heads (DDP alone: R1 needs a
    second backward), and give each its own generator. ValueError if student and teacher share parameters.
    """

    def __init__(self, student, teacher, discriminator, config=None):
        super().__init__()
        if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
            raise ValueError("student and teacher share parameters; give the student a copy.deepcopy of the network")
        self.student, self.discriminator, self.config = student, discriminator, config or ADDConfig()
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def distill(self, x_hat, pixels, batch, generator=None):
        """L_distill of each sample (B,), the target and t, from x̂_θ in the student's space and in pixels (§3.3)."""
        config, teacher = self.config, self.teacher
        # Measured in pixels, the loss wants no gradient through the teacher's encoder.
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.space == "diffused"):
            z = x_hat if config.shared_latents else teacher.encode(pixels)  # what the teacher's forward process takes
        T = len(teacher.schedule) - teacher.schedule.has_zero_terminal_snr  # nothing of x̂_θ is left at α_T = 0
        t = torch.randint(T, (len(z),), device=z.device, generator=generator)
        noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        guidance = config.guidance
        if isinstance(guidance, tuple):
            guidance = _uniform(z, *guidance, generator).flatten()
        target = reconstruction_target(
            teacher, z.detach(), noise, t, batch.cond if batch.teacher_cond is None else batch.teacher_cond,
            guidance=guidance, null_cond=batch.null_cond, negative_cond=batch.negative_cond,
            steps=config.teacher_steps, nfsd=config.weight == "nfsd",
        )  # fmt: skip
        if config.space == "pixel":
            with torch.no_grad():
                z, target = pixels, teacher.decode(target)
        c_t = weight(config.weight, *teacher.schedule.coefficients(t), config.sds_w).flatten()
        return c_t * distance(z, target, config.reduction), target, t

    def student_half(self, batch, generator=None):
        """L_adv^G + λ L_distill (Eq. 1) on a fresh x̂_θ. Its backward moves the student alone."""
        student, denoiser = self.student, self.student.denoiser
        with torch.no_grad():
            z_0 = denoiser.encode(batch.x_0)
        s = student.draw_timesteps(len(z_0), z_0.device, generator)
        noise = torch.randn(z_0.shape, dtype=z_0.dtype, device=z_0.device, generator=generator)
        x_hat = student(student.diffuse(z_0, noise, s), s, batch.cond)
        latent_features = self.discriminator.space == "diffused"
        if latent_features and self.config.space == "diffused" and self.config.shared_latents:
            pixels = None
        else:
            pixels = denoiser.decode(x_hat)
        real, fake = (z_0, x_hat) if latent_features else (batch.x_0, pixels)

        c_text, c_img = batch.c_text, batch.c_img
        if c_img is not None:  # departure 5
            c_img = c_img.masked_fill(student.is_terminal(s)[:, None], 0)
        log = {}
        with _frozen(self.discriminator.heads):
            fake_tokens = self.discriminator.tokens(_tap(fake, log, "gradient_adversarial"), generator)
            adversarial = hinge_student(self.discriminator(fake_tokens, c_text, c_img)).mean()
        x_hat, pixels = (_tap(x, log, "gradient_distillation") for x in (x_hat, pixels))  # one of them is used
        distillation, target, t = self.distill(x_hat, pixels, batch, generator)
        loss = adversarial + self.config.lambda_ * distillation.mean()
        log |= {"adversarial": adversarial.detach(), "distillation": distillation.detach().mean()}
        T, bins = len(self.teacher.schedule), 4
        for i in range(bins):  # of t; an empty bin counts 0, so that averages over iterations are right
            share = (t * bins // T == i) * distillation.detach()
            log[f"distillation_t{i * T // bins}"] = bins * share.mean()
        fake_tokens = [x.detach() for x in fake_tokens]
        x_hat, pixels = x_hat.detach(), None if pixels is None else pixels.detach()
        return StudentHalf(loss, s, t, x_hat, pixels, real, target, fake_tokens, c_text, c_img, log)

    def discriminator_half(self, student_half, generator=None):
        """L_adv^D (Eq. 3), a scalar, and its log; its backward moves the heads alone."""
        with torch.no_grad():
            real_tokens = self.discriminator.tokens(student_half.real, generator)
        real_tokens = [x.detach().requires_grad_(self.config.gamma > 0) for x in real_tokens]
        conditions = student_half.c_text, student_half.c_img
        with parametrize.cached():  # one spectral norm for both: real and generated meet the same weights
            real_logits = self.discriminator(real_tokens, *conditions)
            fake_logits = self.discriminator(student_half.fake_tokens, *conditions)
        hinge = hinge_discriminator(real_logits, fake_logits).mean()
        penalty = r1(real_logits, real_tokens).mean() if self.config.gamma > 0 else torch.zeros_like(hinge)
        log = {"hinge": hinge.detach(), "r1": penalty.detach()}
        for name, logits in (("real", real_logits), ("fake", fake_logits)):
            log[f"logit_{name}"] = sum(x.detach().mean() for x in logits) / len(logits)
            log[f"sign_{name}"] = sum(x.detach().sign().mean() for x in logits) / len(logits)
        # 19 of 20 tokens told right, on both sides: what reaches the student then says little but "wrong".
        log["discriminator_won"] = ((log["sign_real"] > 0.9) & (log["sign_fake"] < -0.9)).float()
        return hinge + self.config.gamma * penalty, log

    def step(self, batch, student_optimizer, heads_optimizer, generator=None):
        """A whole iteration in a plain loop, the student first. Returns the student's half, its log completed.

        FloatingPointError if a loss or gradient is not finite; the network that it belongs to has not moved then.
        """
        half = self.student_half(batch, generator)
        half.log["gradient_student"] = descend(half.loss, student_optimizer, "student")
        loss, log = self.discriminator_half(half, generator)
        half.log["gradient_heads"] = descend(loss, heads_optimizer, "discriminator")
        half.log |= log | {"student_loss": half.loss.detach(), "discriminator_loss": loss.detach()}
        return half
