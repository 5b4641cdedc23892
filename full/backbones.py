"""Stable Diffusion as add.py sees it: diffusers' U-Nets, VAEs and text encoders behind
add.Denoiser. No method here."""

import copy
import logging
import os
import pickle
from functools import cached_property

import torch
from diffusers import AutoencoderTiny, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from torch import nn

from add import Denoiser, NoiseSchedule
from common.errors import brief
from full.settings import from_name, torch_dtype

# diffusers' names → add.py's.
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x_0"}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
TINY_DECODERS = {False: "madebyollin/taesd", True: "madebyollin/taesdxl"}  # by "is it SDXL?"


# What the libraries raise on files that are missing, torn, of another kind, or pickles that want to
# run something.
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    TypeError,
    EOFError,
    pickle.UnpicklingError,
)


def repeat(cond, n):
    """A condition of one sample, for n."""
    if isinstance(cond, dict):
        return {k: repeat(c, n) for k, c in cond.items()}
    return cond.expand(n, *cond.shape[1:])


class BackboneError(ValueError):
    """A checkpoint that cannot be had or used; the message is one line."""


class Float32Conv2d(nn.Conv2d):
    """The U-Net's last layer: ε stays in float32, because x̂_0 has 14.6 times the error of ε at
    t = 999."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self._conv_forward(x.float(), self.weight.float(), self.bias.float())


class UNet(nn.Module):
    """network(x_t, t, cond) for add.Denoiser; cond is a dict of tensors, the U-Net's own keyword
    arguments."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        unet.conv_out.__class__ = Float32Conv2d  # the same parameters under the same names

    def forward(self, x_t, t, cond):
        # Read on every call: FSDP2 gathers weights in another dtype than it stores.
        dtype = self.unet.conv_in.weight.dtype
        cond = {
            k: {n: v.to(dtype) for n, v in c.items()} if isinstance(c, dict) else c.to(dtype)
            for k, c in cond.items()
        }
        return self.unet(x_t.to(dtype), t, **cond, return_dict=False)[0]


class Latents:
    """Pixels (B, 3, H, W) in [-1, 1] ↔ scaled latents (B, 4, H/8, W/8), both float32; the VAE works
    in its own dtype.

    The decoder may be another network (TAESD) that reads the same latents.
    """

    def __init__(self, vae, decoder=None):
        self.vae, self.decoder = vae, decoder or vae
        self.shift = getattr(vae.config, "shift_factor", None) or 0.0

    def encode(self, pixels):
        """The posterior's mean: its spread is a hundredth of a latent's deviation."""
        z = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        return (z - self.shift) * self.vae.config.scaling_factor

    def decode(self, z):
        """Pixels (B, 3, H, W) of scaled latents, by the VAE or the tiny decoder in its place."""
        shift = self.shift if self.decoder is self.vae else 0.0
        # A tiny decoder has factor 1: it reads scaled latents.
        z = z / self.decoder.config.scaling_factor + shift
        return self.decoder.decode(z.to(self.decoder.dtype)).sample.float()


class Backbone:
    """A text-to-image checkpoint: its parts, frozen and in one dtype, and the conditions that its
    U-Net takes."""

    def __init__(self, name, dtype, device, variant=""):
        self.name, self.path, self.device = name, from_name(name), device
        try:
            config = DiffusionPipeline.load_config(self.path)
        except LOAD_ERRORS as error:
            raise BackboneError(
                f"{name}: no diffusers pipeline there, as folder or hub repository ({brief(error)})"
            ) from error
        if config.get("_class_name") not in PIPELINES:
            raise BackboneError(
                f"{name}: is a {config.get('_class_name')}; this code distils "
                f"{' and '.join(PIPELINES)}"
            )
        self.is_xl = config["_class_name"] == PIPELINES[1]
        unchecked = {"safety_checker": None, "requires_safety_checker": False}
        self.extra = {} if self.is_xl else unchecked
        self.extra |= {"variant": variant} if variant else {}
        try:
            # Always with a dtype: without one the parts come in several.
            self.pipe = DiffusionPipeline.from_pretrained(self.path, dtype=dtype, **self.extra)
        except LOAD_ERRORS as error:
            raise BackboneError(f"{name}: cannot be loaded ({brief(error)})") from error
        self.pipe.set_progress_bar_config(disable=True)
        # It warns of every caption of more than 77 tokens.
        logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)
        # transformers makes an empty tokenizer where there are no files.
        for part, tokenizer in self.pipe.components.items():
            if part.startswith("tokenizer") and tokenizer.model_max_length > 10**6:
                raise BackboneError(
                    f"{name}: the files of its {part} are missing; download it again"
                )
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval().to(device)
        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.scheduler_config = scheduler.config
        self.schedule = NoiseSchedule(scheduler.alphas_cumprod.float()).to(device)
        self.prediction = PREDICTIONS[scheduler.config.prediction_type]

    # Conditions -----------------------------------------------------------------------------------

    @torch.no_grad()
    def text(self, prompts):
        """The U-Net's keyword arguments for a list of B prompts, as the pipeline itself makes
        them."""
        embeds, _, *pooled = self.pipe.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        cond = {"encoder_hidden_states": embeds}
        return cond | {"added_cond_kwargs": {"text_embeds": pooled[0]}} if self.is_xl else cond

    def repeated(self, prompt, n):
        """text() of one prompt for n samples. It is encoded once, and kept."""
        if prompt not in self._encoded:
            self._encoded[prompt] = self.text([prompt])
        return repeat(self._encoded[prompt], n)

    @cached_property
    def _encoded(self):
        return {}

    def null(self, n):
        """∅ for n samples, as the pipeline's guidance has it: SDXL takes zeros, the others the
        empty prompt."""
        cond = self.repeated("", n)
        if self.is_xl and self.pipe.config.force_zeros_for_empty_prompt:
            added = cond["added_cond_kwargs"]
            cond["encoder_hidden_states"] = torch.zeros_like(cond["encoder_hidden_states"])
            added["text_embeds"] = torch.zeros_like(added["text_embeds"])
        return cond

    def with_sizes(self, cond, size):
        """Add to cond, in place, SDXL's size and crop conditions of uncropped square images of that
        size; other backbones have none. The pipeline samples with these, so the student is trained
        with them, as DMD2's is."""
        if self.is_xl:
            n, dtype = len(cond["encoder_hidden_states"]), cond["encoder_hidden_states"].dtype
            sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=dtype, device=self.device)
            cond["added_cond_kwargs"]["time_ids"] = sizes.expand(n, -1)
        return cond

    # Parts for add.py -----------------------------------------------------------------------------

    def read_unet(self, settings, dtype):
        """A U-Net: the checkpoint's in that dtype, or of the same shape and random in float32."""
        if settings.init == "random":
            return UNet2DConditionModel.from_config(self.pipe.unet.config)
        variant = {"variant": settings.variant} if settings.variant else {}
        return UNet2DConditionModel.from_pretrained(
            self.path, subfolder="unet", dtype=dtype, **variant
        )

    def load_student_unet(self, settings, frozen=torch.float32):
        """A trainable U-Net in float32. With LoRA only the adapters are, and the rest is frozen and
        in that dtype."""
        unet = self.read_unet(settings, frozen if settings.lora_rank else torch.float32)
        # What the saved pipeline draws by default.
        unet.register_to_config(sample_size=settings.resolution // 8)
        if settings.lora_rank:
            from peft import LoraConfig

            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            unet.requires_grad_(False)
            rank = settings.lora_rank
            unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
            cast_training_params(unet, torch.float32)
        if settings.checkpointing:
            unet.enable_gradient_checkpointing()
        return unet

    def load_latents(self, settings):
        """Latents of this backbone, with the decoder that settings.vae names."""
        vae = self.pipe.vae
        decoder = None if settings.vae == "kl" else self.load_tiny_decoder(settings.vae)
        for network in filter(None, (vae, decoder)):
            if settings.checkpointing:
                network.enable_gradient_checkpointing()
            if settings.vae_slicing:
                network.enable_slicing()
        return Latents(vae, decoder)

    def load_tiny_decoder(self, name):
        """TAESD ("taesd"), or that of a folder or repository, frozen. BackboneError."""
        path = TINY_DECODERS[self.is_xl] if name == "taesd" else name
        try:
            decoder = AutoencoderTiny.from_pretrained(path, dtype=self.pipe.vae.dtype)
        except LOAD_ERRORS as error:
            raise BackboneError(f"--vae {name}: no tiny decoder there ({brief(error)})") from error
        return decoder.requires_grad_(False).eval().to(self.device)


def make_teacher(backbone, latents):
    """add.Denoiser around a frozen U-Net, on the schedule that it was trained with."""
    network = UNet(backbone.pipe.unet)
    return Denoiser(network, backbone.schedule, backbone.prediction, latents.encode, latents.decode)


def make_student_denoiser(backbone, latents, settings):
    """add.Denoiser around the trainable U-Net. An ε-network keeps its schedule, a v-network gets
    zero terminal SNR."""
    schedule = copy.deepcopy(backbone.schedule)
    if settings.rescales(backbone.prediction) and not schedule.has_zero_terminal_snr:
        schedule = schedule.zero_terminal_snr()
    unet = backbone.load_student_unet(settings, torch_dtype(settings.precision))
    network = UNet(unet).to(backbone.device)
    return Denoiser(network, schedule, backbone.prediction, latents.encode, latents.decode)


def same_latents(a, b):
    """Whether two backbones diffuse the same latents: their VAEs' encoders and scales are equal,
    weight by weight."""
    if os.path.realpath(a.path) == os.path.realpath(b.path):
        return True
    scale = [
        (x.pipe.vae.config.scaling_factor, getattr(x.pipe.vae.config, "shift_factor", None))
        for x in (a, b)
    ]
    x, y = (backbone.pipe.vae.encoder.state_dict() for backbone in (a, b))
    return scale[0] == scale[1] and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
