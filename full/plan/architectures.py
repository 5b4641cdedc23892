"""The networks of a run on torch's meta device: real shapes without weights, for plan.py. Names are
built from the configurations below, folders and cached hub repositories from their json files;
nothing is downloaded."""

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    ViTConfig,
)

from add import NoiseSchedule
from common.errors import brief
from full.backbones import PIPELINES, Backbone, BackboneError
from full.features import IMAGE_NETWORKS, VisionTransformer, open_clip_source, unit_scale
from full.settings import BACKBONES, from_name

META = torch.device("meta")
# The published config.json files of the checkpoints, without what is diffusers' default.
_SD = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2)
UNETS = {
    "sd15": dict(_SD, cross_attention_dim=768, attention_head_dim=8),
    "sd21": dict(
        _SD,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    "sdxl": dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)


def text_config(hidden, layers, heads, act):
    """The configuration of a CLIP text encoder, with projection."""
    return CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        projection_dim=hidden,
        vocab_size=49408,
        max_position_embeddings=77,
    )


CLIP_L = 768, 12, 12, "quick_gelu"
OPEN_CLIP_H, BIG_G = (1024, 23, 16, "gelu"), (1280, 32, 20, "gelu")
TEXT_ENCODERS = {"sd15": [CLIP_L], "sd21": [OPEN_CLIP_H], "sdxl": [CLIP_L, BIG_G]}
_S = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
_L = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
VITS = {
    "dinov2-s": Dinov2Config(**_S, image_size=518, patch_size=14),
    "dinov2-l": Dinov2Config(**_L, image_size=518, patch_size=14),
    "dino-s": ViTConfig(**_S, intermediate_size=1536, image_size=224, patch_size=16),
    "clip-l": CLIPVisionConfig(**_L, intermediate_size=4096, image_size=224, patch_size=14),
}
SHORT = {
    repository: name for names in (BACKBONES, IMAGE_NETWORKS) for name, repository in names.items()
}


class Schedule(NoiseSchedule):
    """α and σ by shape alone: on the meta device there is no t whose range could be checked."""

    def __init__(self, T=1000):
        nn.Module.__init__(self)
        self.register_buffer("alpha", torch.empty(T, device=META), persistent=False)
        self.register_buffer("sigma", torch.empty(T, device=META), persistent=False)
        self.has_zero_terminal_snr = False

    def coefficients(self, t):
        """(α_t, σ_t), (B, 1, 1, 1), for t (B,)."""
        return self.alpha[t][:, None, None, None], self.sigma[t][:, None, None, None]


def _read(load, what, names):
    """load(), which reads configurations. BackboneError, in one line with the remedy, if they are
    not here."""
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(
            f"{what}: no such network on this machine ({brief(error)}); --plan downloads "
            "nothing: give a folder, fetch it with `hf download`, or choose one of "
            f"{', '.join(names)}"
        ) from error


def _folder(name, file):
    """The folder that has the file of a name: itself, or one in the hub's cache. OSError if there
    is neither. The hub's loaders would go to the network even with local_files_only, to report who
    calls."""
    found = Path(name, file) if Path(name).is_dir() else try_to_load_from_cache(name, file)
    if not isinstance(found, (str, Path)) or not Path(found).is_file():
        raise OSError(f"no {file} there, neither in a folder nor in the hub's cache")
    return str(Path(found).parent)


def _freeze(network, dtype):
    # diffusers' own .to warns of a loss of precision.
    return nn.Module.to(network.requires_grad_(False).eval(), dtype)


class MetaBackbone(Backbone):
    """backbones.Backbone without weights. BackboneError if the name's configuration is not on this
    machine."""

    def __init__(self, name, dtype):
        name = SHORT.get(name, name)
        self.name, self.path, self.device = name, from_name(name), META
        self.schedule, self.prediction = Schedule(), "epsilon"  # no other changes a shape
        with META:
            parts = self._build() if name in UNETS else _read(self._load, name, BACKBONES)
            unet, vae, self.texts, self.is_xl = parts
        for network in (unet, vae, *self.texts):
            _freeze(network, dtype)
        self.pipe = SimpleNamespace(
            unet=unet, vae=vae, config=SimpleNamespace(force_zeros_for_empty_prompt=True)
        )

    def _build(self):
        kinds = CLIPTextModel, CLIPTextModelWithProjection
        texts = [
            kind(text_config(*c)) for kind, c in zip(kinds, TEXT_ENCODERS[self.name], strict=False)
        ]
        return (
            UNet2DConditionModel(**UNETS[self.name]),
            AutoencoderKL(**VAE),
            texts,
            self.name == "sdxl",
        )

    def _load(self):
        path = _folder(self.path, "model_index.json")
        index = DiffusionPipeline.load_config(path)
        if index.get("_class_name") not in PIPELINES:
            raise ValueError(f"it is a {index.get('_class_name')}, not {' or '.join(PIPELINES)}")
        is_xl = index["_class_name"] == PIPELINES[1]
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(path, subfolder="unet")
        )
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(path, subfolder="vae"))
        kinds = {"text_encoder": CLIPTextModel} | (
            {"text_encoder_2": CLIPTextModelWithProjection} if is_xl else {}
        )
        texts = [
            kind(CLIPTextConfig.from_pretrained(path, subfolder=n)) for n, kind in kinds.items()
        ]
        return unet, vae, texts, is_xl

    @torch.no_grad()
    def text(self, prompts):
        """Conditions of B prompts, whose tokens are shapes too."""
        outputs = []
        for network in self.texts:
            shape = len(prompts), network.config.max_position_embeddings
            ids = torch.zeros(shape, dtype=torch.long, device=META)
            outputs.append(network(ids, output_hidden_states=self.is_xl))
        if not self.is_xl:
            return {"encoder_hidden_states": outputs[0].last_hidden_state}
        embeds = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
        return {
            "encoder_hidden_states": embeds,
            "added_cond_kwargs": {"text_embeds": outputs[1].text_embeds},
        }

    def read_unet(self, settings, dtype):
        """A U-Net of the same shape: there are no weights to read."""
        return nn.Module.to(UNet2DConditionModel.from_config(self.pipe.unet.config), dtype)

    def load_tiny_decoder(self, name):
        """TAESD for SD and SDXL, which is diffusers' default AutoencoderTiny, or a folder's."""
        with META:
            if name == "taesd":
                return _freeze(AutoencoderTiny(), self.pipe.vae.dtype)
            config = _read(
                lambda: AutoencoderTiny.load_config(_folder(name, "config.json")),
                f"--vae {name}",
                ("kl", "taesd"),
            )
            return _freeze(AutoencoderTiny.from_config(config), self.pipe.vae.dtype)


def vit(name, dtype, size, what):
    """features.VisionTransformer without weights."""
    name = SHORT.get(name, name)

    def load():
        config = VITS.get(name) or AutoConfig.from_pretrained(_folder(name, "config.json"))
        config = getattr(config, "vision_config", config)  # of a whole CLIP
        if config.model_type not in ("dinov2", "vit", "clip_vision_model"):
            raise ValueError(f"it is a {config.model_type}; DINOv2, ViT and CLIP are known")
        return (
            CLIPVisionModel(config)
            if config.model_type == "clip_vision_model"
            else AutoModel.from_config(config)
        )

    with META:
        return VisionTransformer(
            _freeze(_read(load, f"--{what} {name}", VITS), dtype), size, what=what
        )


class MetaTextFeatures:
    """features.TextFeatures without weights: open_clip's text tower by MODEL/WEIGHTS, or a
    folder's."""

    def __init__(self, name, dtype):
        import open_clip

        def load():
            model, weights = open_clip_source(name)
            if weights is None:
                folder = _folder(name.removeprefix("hf-hub:"), "open_clip_config.json")
                model = f"local-dir:{folder}"
            config = open_clip.get_model_config(model)
            # Of any size: it is thrown away.
            vision = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
            return open_clip.CLIP(
                config["embed_dim"], vision_cfg=vision, text_cfg=config["text_cfg"]
            )

        with META:
            self.network = _read(load, f"--c-text {name}", ("ViT-g-14/laion2b_s12b_b42k", "none"))
        self.network.visual = None
        _freeze(self.network, dtype)
        self.width = self.network.text_projection.shape[1]

    @torch.no_grad()
    def __call__(self, prompts):
        ids = torch.zeros(len(prompts), self.network.context_length, dtype=torch.long, device=META)
        return unit_scale(self.network.encode_text(ids).float())
