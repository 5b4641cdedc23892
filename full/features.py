"""The discriminator's feature network F (Table 1a), and its conditions c_text and c_img (1b)."""

import torch
from einops import rearrange
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionModel

from common.errors import brief
from common.features import noised, readout
from common.images import resize
from full.backbones import LOAD_ERRORS, BackboneError

IMAGE_NETWORKS = {
    "dinov2-s": "facebook/dinov2-small",
    "dino-s": "facebook/dino-vits16",
    "dinov2-l": "facebook/dinov2-large",
    "clip-l": "openai/clip-vit-large-patch14",
}
# Mean and deviation of the pixels that DINO was trained on.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def load_vit(name, dtype, what):
    """A frozen vision transformer (transformers' DINOv2, ViT or CLIP) by its short name, folder or
    repository."""
    path = IMAGE_NETWORKS.get(name, name)
    try:
        config = AutoConfig.from_pretrained(path)
        kind = CLIPVisionModel if config.model_type in ("clip", "clip_vision_model") else AutoModel
        network = kind.from_pretrained(path, dtype=dtype)
    except LOAD_ERRORS as error:
        names = ", ".join(IMAGE_NETWORKS)
        raise BackboneError(
            f"--{what} {name}: none of {names}, nor a vision model ({brief(error)})"
        ) from error
    if network.config.model_type not in ("dinov2", "vit", "clip_vision_model"):
        raise BackboneError(
            f"--{what} {name}: is a {network.config.model_type}; DINOv2, ViT and CLIP are known"
        )
    return network.requires_grad_(False).eval()


class VisionTransformer(nn.Module):
    """A frozen ViT on images (B, 3, H, W) in [-1, 1], resized to `size` (0: its own) and normalised
    as it expects.

    Calling it gives the token maps [(B, N, C)] of StyleGAN-T's discriminator: after the patch
    embedding and after four evenly spaced blocks (2, 5, 8, 11 of 12), with the class token read
    out. crop is the probability that a batch is cut out at random, at `size`, instead of resized:
    only in calls that are for the discriminator.
    """

    def __init__(self, network, size=0, crop=0.0, what="features"):
        super().__init__()
        self.network, self.crop, config = network, crop, network.config
        self.size = size or config.image_size
        patch, blocks = config.patch_size, config.num_hidden_layers
        if self.size % patch:
            given = f"--{what}-size {size}" if size else f"--{what}: its image size, {self.size}"
            raise BackboneError(f"{given}: must be a multiple of {patch}, the network's patch")
        if blocks < 4:
            raise BackboneError(f"--{what}: a network of {blocks} blocks; four are read")
        # Places in hidden_states, whose first is the embedding.
        self.levels = [0] + [blocks * i // 4 for i in (1, 2, 3, 4)]
        self.width = config.hidden_size
        self.channels = [self.width] * len(self.levels)
        self.is_clip = config.model_type == "clip_vision_model"
        mean, std = CLIP if self.is_clip else IMAGENET
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        # DINOv2 always interpolates its position embeddings, the others when asked to.
        self.options = {} if config.model_type == "dinov2" else {"interpolate_pos_encoding": True}

    def _prepare(self, images, crop):
        height, width = images.shape[2:]
        if crop and min(height, width) > self.size and torch.rand(()) < crop:
            top, left = (int(torch.randint(n - self.size + 1, ())) for n in (height, width))
            images = images[:, :, top : top + self.size, left : left + self.size]
        elif (height, width) != (self.size, self.size):
            images = resize(images, self.size)
        return (((images + 1) / 2 - self.mean) / self.std).to(self.network.dtype)

    def forward(self, images):
        output = self.network(
            self._prepare(images, self.crop), output_hidden_states=True, **self.options
        )
        return [readout(output.hidden_states[i].float()) for i in self.levels]

    @torch.no_grad()
    def summary(self, images):
        """The class token after the last norm, (B, C), scaled to mean square 1: c_img."""
        output = self.network(self._prepare(images, 0.0), **self.options)
        # CLIP's last state is not normed yet.
        token = output.pooler_output if self.is_clip else output.last_hidden_state[:, 0]
        return unit_scale(token.float())


def encode(unet, x_t, t, cond):
    """What each block of a diffusers U-Net's down path gives, and its middle: [(B, C_k, H_k, W_k)];
    cond as backbones.UNet takes it."""
    text, added = cond["encoder_hidden_states"], cond.get("added_cond_kwargs")
    embedding = unet.time_embedding(unet.get_time_embed(sample=x_t, timestep=t))
    more = unet.get_aug_embed(emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added)
    embedding = embedding if more is None else embedding + more
    h, maps = unet.conv_in(x_t), []
    for block in (*unet.down_blocks, unet.mid_block):
        attends = getattr(block, "has_cross_attention", False)
        h = block(h, embedding, **({"encoder_hidden_states": text} if attends else {}))
        h = h[0] if isinstance(h, tuple) else h  # a down block gives its skips, too
        maps.append(h)
    return maps


class TeacherEncoder(nn.Module):
    """The frozen teacher's down path and middle on noised latents, as in LADD (Sauer et al. 2024)
    and DMD2: no image is decoded for the discriminator.

    Scaled latents (B, 4, h, w) are diffused to t drawn uniformly from 0…599, each to its own, and
    get the empty prompt. Calling it gives token maps [(B, N_k, C_k)]. The draws have a generator of
    their own, which checkpoints hold.
    """

    space = "latent"

    def __init__(self, teacher, null, seed, device):
        super().__init__()
        # Past the module tree, which has the teacher already; null(B) is ∅ for B samples.
        self.__dict__.update(teacher=teacher, null=null)
        unet = teacher.network.unet
        self.channels = [
            block.resnets[-1].out_channels for block in (*unet.down_blocks, unet.mid_block)
        ]
        self.generator = None  # on the meta device, which has none
        if device.type != "meta":
            self.generator = torch.Generator(device).manual_seed(seed)

    def forward(self, latents):
        x_t, t = noised(self.teacher.schedule, latents, self.generator)
        unet = self.teacher.network.unet
        maps = encode(unet, x_t.to(unet.dtype), t, self.null(len(latents)))
        return [rearrange(x.float(), "b c h w -> b (h w) c") for x in maps]


def unit_scale(x):
    """Rows of x (B, C) scaled to mean square 1, so that conditions of any encoder weigh alike in
    the projection."""
    return x * (x.shape[1] ** 0.5) / x.norm(dim=1, keepdim=True)


def open_clip_source(name):
    """(model, weights) as open_clip takes them. A name is MODEL/WEIGHTS, hf-hub:REPOSITORY or a
    folder; the last two have weights of their own, so None."""
    import open_clip

    model, _, weights = name.partition("/")
    if weights and model in open_clip.list_models():
        return model, weights
    return name if name.startswith("hf-hub:") else f"local-dir:{name}", None


class TextFeatures:
    """CLIP's text encoder by open_clip: a list of B prompts → c_text (B, C), mean square 1."""

    def __init__(self, name, dtype, device):
        import open_clip

        try:
            model, weights = open_clip_source(name)
            # Without require_pretrained its weights could be random.
            network = open_clip.create_model(model, pretrained=weights, require_pretrained=True)
            self.tokenize = open_clip.get_tokenizer(model)
        except LOAD_ERRORS as error:
            raise BackboneError(
                f"--c-text {name}: neither an open_clip MODEL/WEIGHTS nor a folder of one "
                f"({brief(error)})"
            ) from error
        network.visual = None  # three quarters of it
        self.network = network.requires_grad_(False).eval().to(device, dtype)
        self.device = device
        with torch.no_grad():
            self.width = self(["a"]).shape[1]

    @torch.no_grad()
    def __call__(self, prompts):
        return unit_scale(self.network.encode_text(self.tokenize(prompts).to(self.device)).float())
