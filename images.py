"""Any picture that PIL opens as an 8-bit RGB one: toy/ and full/ read people's own folders."""

from PIL import Image, ImageOps


def to_rgb(picture):
    """A PIL image, turned as its EXIF says, as RGB: of 16 bits the upper eight; what was transparent lies on black."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # PIL's own conversion would clip 16 bits to white
        picture = picture.convert("I").point(lambda x: x * (1 / 256)).convert("L")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture.convert("RGBA"))
    return picture.convert("RGB")
