"""Pictures for toy/ and full/: whatever PIL opens as 8-bit RGB, and tensors in another size."""

import torch
from PIL import Image, ImageOps
from torch.nn import functional


def to_rgb(picture):
    """A PIL image, turned as its EXIF says, as RGB. Of 16 bits it keeps the upper eight; what was
    transparent lies on black."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # PIL's own conversion would clip 16 bits to white
        picture = picture.convert("I").point(lambda x: x * (1 / 256)).convert("L")
    if "A" in picture.getbands() or "transparency" in picture.info:
        black = Image.new("RGBA", picture.size, "black")
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    return picture.convert("RGB")


def resize(images, size, antialias=True):
    """Images (B, C, H, W) → (B, C, size, size), bicubic. It is torch's interpolate as two matrix
    products: on CUDA their gradient is the same to the bit every time, and interpolate's is not."""

    def matrix(n):  # (size, n): what each pixel of the result takes from those of the input
        eye = torch.eye(n, dtype=images.dtype, device=images.device)[None, None]
        return functional.interpolate(eye, (size, n), mode="bicubic", antialias=antialias)[0, 0]

    height, width = images.shape[2:]
    return matrix(height) @ images @ matrix(width).mT
