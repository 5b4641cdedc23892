"""Digits drawn from the fonts that matplotlib ships, each bent, tilted, thinned or thickened."""

import math
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional

# Those of matplotlib's fonts that draw plain digits: cmmi10's are old-style, cmex10 and cmsy10 have
# none.
_FONTS = (
    *("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-Bold", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Oblique"),
    *("DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)
_MASTER = 96  # side of the masters, of which digits fill a box of height _TALL
_TALL = 72
# Glyphs drawn at once. It is part of the definition: random numbers are drawn chunk by chunk.
_CHUNK = 500


def glyphs(n, seed=0, size=32):
    """White digits on black: (images (n, 1, size, size) uint8, labels (n,)), each ten in a row
    holding all ten digits.

    The first images of a larger `n` are those of a smaller one.
    """
    generator = torch.Generator().manual_seed(seed)
    chunks = [_draw_chunk(generator, size) for _ in range(math.ceil(n / _CHUNK))]
    images, labels = (torch.cat(parts)[:n] for parts in zip(*chunks, strict=True))
    return images, labels


def _draw_chunk(generator, size):
    """_CHUNK glyphs. Lengths are in pixels of a 32x32 image; the origin is the image's centre."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(_CHUNK, *shape, generator=generator)

    labels = torch.rand(_CHUNK // 10, 10, generator=generator).argsort(dim=1).flatten()
    masters, extents = _masters()
    font = torch.randint(len(_FONTS), (_CHUNK,), generator=generator)
    distance, extent = masters[font, labels], extents[font, labels]

    height, widening = uniform(17, 24), uniform(0.8, 1.25)
    thicken, blur = uniform(-0.2, 0.7), uniform(1.0, 1.7)
    matrix = _affine(
        angle=uniform(-15, 15), shear=uniform(-0.25, 0.25), scale=height / _TALL, widening=widening
    )
    bend = 0.8 * torch.randn(_CHUNK, 2, 4, 4, generator=generator).clamp(-2, 2)

    # Half the box that the digit may fill, from the next line on for each glyph.
    room = 16 - 2 * max(1, 32 / size)
    room = room - bend.abs().amax(dim=(1, 2, 3)) - thicken.clamp(min=0)
    reach = (matrix.abs() @ extent[..., None]).squeeze(-1)  # half the digit's own box, (_CHUNK, 2)
    shrink = (room[:, None] / reach).amin(dim=1).clamp(max=1)
    matrix, reach = matrix * shrink[:, None, None], reach * shrink[:, None]
    shift = uniform(-1, 1, 2) * (room[:, None] - reach).clamp(max=3)

    pixel = matrix.det().sqrt()[:, None, None]  # image pixels per master pixel
    sampled = _sample(distance, matrix.inverse(), shift, bend, size)
    ink = 0.5 + (sampled * pixel + thicken[:, None, None]) * size / 32 / blur[:, None, None]
    return (ink.clamp(0, 1) * 255).round().to(torch.uint8)[:, None], labels


def _affine(angle, shear, scale, widening):
    """(N, 2, 2) matrices that scale, widen, shear, then turn by `angle` degrees."""
    cos, sin = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    lean = torch.stack([one, shear, zero, one], dim=1).view(-1, 2, 2)
    stretch = torch.stack([scale * widening, zero, zero, scale], dim=1).view(-1, 2, 2)
    return turn @ lean @ stretch


def _sample(distance, inverse, shift, bend, size):
    """Read (N, M, M) masters where the pixels of (N, size, size) images come from."""
    axis = (torch.arange(size) + 0.5) * 32 / size - 16
    # (size, size, 2), x before y
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    bend = functional.interpolate(bend, (size, size), mode="bicubic", align_corners=True)
    bend = bend.permute(0, 2, 3, 1)
    source = (grid - shift[:, None, None] + bend) @ inverse.mT[:, None]
    source, masters = source / (_MASTER / 2), distance[:, None]
    sampled = functional.grid_sample(masters, source, padding_mode="border", align_corners=False)
    return sampled[:, 0]


@cache
def _masters():
    """(fonts, 10, _MASTER, _MASTER) signed distances to each digit's outline, positive inside, in
    pixels; and (fonts, 10, 2) half widths and heights.

    On a distance map a stroke grows by adding a constant, and stays sharp however it is resampled.
    """
    masks = torch.stack([_render(font, digit) for font in _FONTS for digit in "0123456789"])
    outside, inside = (torch.stack([_distance_to(mask) for mask in ink]) for ink in (masks, ~masks))
    distance = torch.where(masks, inside - 0.5, 0.5 - outside)
    extents = torch.stack([masks.any(dim=1).sum(dim=1), masks.any(dim=2).sum(dim=1)], dim=1) / 2
    return distance.view(len(_FONTS), 10, _MASTER, _MASTER), extents.view(len(_FONTS), 10, 2)


def _render(font, digit):
    """(_MASTER, _MASTER) bool: the digit, _TALL high, in the middle."""
    import matplotlib
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    large = Image.new("L", (600, 600))
    ImageDraw.Draw(large).text((150, 50), digit, fill=255, font=ImageFont.truetype(str(path), 300))
    ink = large.crop(large.getbbox())
    width = min(_MASTER - 8, round(ink.width * _TALL / ink.height))
    ink = ink.resize((width, _TALL), Image.Resampling.BOX)
    master = Image.new("L", (_MASTER, _MASTER))
    master.paste(ink, ((_MASTER - ink.width) // 2, (_MASTER - ink.height) // 2))
    return torch.from_numpy(numpy.array(master)) > 127


def _distance_to(mask):
    """(M, M) distance from each pixel to the nearest True one: the minimum along rows, then along
    columns."""
    axis = torch.arange(len(mask))
    steps = (axis[:, None] - axis).square().float()
    squared = torch.where(mask, 0.0, 1e6)
    for _ in range(2):
        squared = (squared[:, None, :] + steps).amin(dim=2).T
    return squared.sqrt()
