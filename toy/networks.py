"""The toy's networks: the U-Net denoiser, those whose features the discriminator may read (a ViT, a
plain convolutional one), the classifier whose features the metrics are computed in.

They are deliberately different from one another: a metric network that resembled the
discriminator's would flatter it.
"""

import math

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from common.features import readout


def has_bf16(device):
    """Whether the device is known to multiply bfloat16 numbers faster than float32 ones: GPUs from
    compute capability 8.0 on, and x86 processors with AVX-512 BF16 or AMX, which torch tells from
    2.11 on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    can = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


# Denoiser: a U-Net on 2x2-unshuffled pixels, at a fifth of the cost ===============================


def timestep_embedding(t, dim):
    """Sinusoidal embedding (B,) → (B, dim) of integer timesteps (Ho et al. 2020)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResidualBlock(nn.Module):
    """norm → conv → norm, scaled and shifted by the embedding → dropout → conv, plus the input
    (Dhariwal & Nichol 2021)."""

    def __init__(self, channels_in, channels_out, embedding, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.GroupNorm(8, channels_in), nn.GroupNorm(8, channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * channels_out)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)
        nn.init.zeros_(self.conv2.weight)  # every block starts as its skip path
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, embedding):
        h = self.conv1(functional.silu(self.norm1(x)))
        scale, shift = self.modulate(functional.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(self.dropout(functional.silu(self.norm2(h) * (1 + scale) + shift)))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Self-attention over the positions of a (B, C, H, W) map, plus the input."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        qkv, layout = self.qkv(self.norm(x)), "b (three n c) h w -> three b n (h w) c"
        q, k, v = rearrange(qkv, layout, three=3, n=self.heads)
        out = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(out, "b n (h w) c -> b (n c) h w", h=x.shape[2]))


class UNet(nn.Module):
    """The denoiser's network f(x_t, t, label): class-conditional, with a resolution for each of
    widths, attention at the lowest.

    x_t (B, channels, H, W) in about [-1, 1], t (B,) integer timesteps, label (B,) in 0…classes,
    where `classes` itself is the empty condition ∅ of classifier-free guidance. Returns a tensor of
    x_t's shape and type. H and W must be divisible by 2 ** len(widths). With bf16, convolutions and
    products are taken in bfloat16, from float32 weights.
    """

    def __init__(
        self, channels=1, classes=10, widths=(64, 128), blocks=2, patch=2, bf16=False, dropout=0.0
    ):
        super().__init__()
        self.patch, self.classes, self.blocks, self.bf16 = patch, classes, blocks, bf16
        first, embedding = widths[0], 4 * widths[0]
        self.time = nn.Sequential(
            nn.Linear(first, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label = nn.Embedding(classes + 1, embedding)
        self.stem = nn.Conv2d(channels * patch**2, first, 3, padding=1)

        self.down, self.up, width = nn.ModuleList(), nn.ModuleList(), first
        for level, w in enumerate(widths):
            if level > 0:
                self.down.append(nn.Conv2d(width, w, 3, stride=2, padding=1))
            self.down.extend(ResidualBlock(w, w, embedding, dropout) for _ in range(blocks))
            width = w
        self.middle = nn.ModuleList(
            [SelfAttention(width), ResidualBlock(width, width, embedding, dropout)]
        )
        # Of the maps that encode gives.
        self.map_channels = [w for w in widths for _ in range(blocks)] + [width]
        for w, above in zip(reversed(widths), (*reversed(widths[:-1]), None), strict=True):
            self.up.extend(ResidualBlock(2 * w, w, embedding, dropout) for _ in range(blocks))
            if above:
                self.up.append(nn.Sequential(nn.Conv2d(w, 4 * above, 1), nn.PixelShuffle(2)))
        self.norm = nn.GroupNorm(8, first)
        self.out = nn.Conv2d(first, channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def encode(self, x_t, t, label):
        """[(B, widths[level], H', W')]: what each residual block of the down path and the middle
        gives, finest first."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            return [h.to(x_t.dtype) for h in self._encode(x_t, self._embed(t, label))]

    def forward(self, x_t, t, label):
        return self.with_middle(x_t, t, label)[0]

    def with_middle(self, x_t, t, label):
        """(the output, the last map of encode)."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            embedding = self._embed(t, label)
            *skips, h = self._encode(x_t, embedding)
            middle = h.to(x_t.dtype)
            for layer in self.up:
                if isinstance(layer, ResidualBlock):
                    h = layer(torch.cat([h, skips.pop()], dim=1), embedding)
                else:
                    h = layer(h)
            out = self.out(functional.silu(self.norm(h)))
            return functional.pixel_shuffle(out, self.patch).to(x_t.dtype), middle

    def _embed(self, t, label):
        return self.time(timestep_embedding(t, self.time[0].in_features)) + self.label(label)

    def _encode(self, x_t, embedding):
        h, maps = self.stem(functional.pixel_unshuffle(x_t, self.patch)), []
        for layer in (*self.down, *self.middle):
            if isinstance(layer, ResidualBlock):
                maps.append(h := layer(h, embedding))
            else:
                h = layer(h)
        return maps


# Feature network F of the discriminator: a plain ViT ==============================================


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP on (B, N, C) (Dosovitskiy et al. 2021)."""

    def __init__(self, width, heads, expansion=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )

    def forward(self, x):
        qkv, layout = self.qkv(self.norm1(x)), "b l (three n c) -> three b n l c"
        q, k, v = rearrange(qkv, layout, three=3, n=self.heads)
        out = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(rearrange(out, "b n l c -> b l (n c)"))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A plain ViT; calling it gives token maps [(B, N, width)]: after the patch embedding, then
    after each block.

    Images (B, channels, size, size) in [-1, 1]. N = (size / patch)²; the class token is read out
    (readout).
    """

    def __init__(self, channels=1, size=32, patch=4, width=96, depth=4, heads=4):
        super().__init__()
        self.patch, self.width, self.channels = patch, width, [width] * (depth + 1)
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))

    def states(self, images):
        """All token maps with the class token first, [(B, 1 + N, width)]."""
        x = rearrange(self.embed(images), "b c h w -> b (h w) c") + self.position
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def forward(self, images):
        return [readout(x) for x in self.states(images)]

    def summary(self, images):
        """The class token after the last block, (B, width)."""
        return self.states(images)[-1][:, 0]


class ConvNet(nn.Module):
    """A plain convolutional network; calling it gives token maps [(B, H' W', C)] of three
    resolutions, with C = width / 2, width and 2 width."""

    def __init__(self, channels=1, width=96):
        super().__init__()
        widths = [width // 2, width, 2 * width]
        self.channels, self.width, self.stages = widths, widths[-1], nn.ModuleList()
        for c_in, c in zip([channels, *widths], widths, strict=False):
            down, conv = nn.Conv2d(c_in, c, 4, 2, 1), nn.Conv2d(c, c, 3, padding=1)
            norms = nn.GroupNorm(8, c), nn.GroupNorm(8, c)
            self.stages.append(nn.Sequential(down, norms[0], nn.GELU(), conv, norms[1], nn.GELU()))

    def forward(self, images):
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return [rearrange(x, "b c h w -> b (h w) c") for x in maps[1:]]

    def summary(self, images):
        """The last map averaged over positions, (B, 2 width)."""
        return self(images)[-1].mean(1)


# Metric network: a small convolutional classifier, with other layers than ConvNet on purpose ======


class MetricNet(nn.Module):
    """Images (B, channels, 32, 32) → class logits; features(images) gives the (B, 64) in which
    metrics are taken. Three resolutions, with `depth` convolutions each."""

    def __init__(self, channels=1, classes=10, width=32, depth=1):
        super().__init__()

        def stage(c_in, c_out):
            layers = []
            for c in [c_in] + [c_out] * (depth - 1):
                layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(c_out), nn.ReLU()]
            return nn.Sequential(*layers, nn.MaxPool2d(2))

        self.body = nn.Sequential(
            stage(channels, width), stage(width, 2 * width), stage(2 * width, 2 * width)
        )
        self.project = nn.Sequential(nn.Flatten(), nn.LazyLinear(64), nn.ReLU())
        self.classify = nn.Linear(64, classes)

    def features(self, images):
        """(B, 64) activations before the class logits."""
        return self.project(self.body(images))

    def forward(self, images):
        return self.classify(self.features(images))
