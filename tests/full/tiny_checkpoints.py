"""Tiny, randomly initialised checkpoints in the real classes and folder layouts, which the real
loading code reads."""

import random

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from full.random_weights import byte_tokenizer, scheduler, write_text_tower


def text_config(width, act="quick_gelu", projection=None):
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_act=act,
        projection_dim=projection or width,
    )


def vae(seed, scaling=0.18215):
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=scaling,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
    )


def write_sd(folder, prediction="epsilon", seed=0, width=32):
    """Like SD1.5 (epsilon) or SD2.1 (v): one text encoder."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )
    StableDiffusionPipeline(
        vae=vae(seed),
        text_encoder=CLIPTextModel(text_config(width)).eval(),
        tokenizer=byte_tokenizer(),
        unet=unet,
        scheduler=scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_sdxl(folder, seed=0):
    """Like SDXL: two text encoders, pooled text and size conditions, a latent space of its own."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=72,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
    )
    StableDiffusionXLPipeline(
        vae=vae(seed + 1, 0.13025),
        text_encoder=CLIPTextModel(text_config(32)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(40, "gelu", 40)).eval(),
        tokenizer=byte_tokenizer(),
        tokenizer_2=byte_tokenizer("!"),
        unet=unet,
        scheduler=scheduler("epsilon"),
    ).save_pretrained(folder)
    return folder


def write_dino(folder, width=24, seed=0):
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def write_open_clip(folder, width=16):
    """A folder that open_clip's local-dir: schema reads."""
    torch.manual_seed(0)
    write_text_tower(
        folder,
        {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        width,
    )
    return folder


def write_taesd(folder):
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(folder)
    return folder


def write_images(folder, count=12, size=(80, 72), seed=0):
    """A folder of smooth random JPEGs with captions beside them."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    for i in range(count):
        colours = [tuple(draw.randrange(256) for _ in range(3)) for _ in range(16)]
        image = Image.new("RGB", (4, 4))
        image.putdata(colours)
        image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03d}.jpg")
        (folder / f"{i:03d}.txt").write_text(f"colours number {i}")
    return folder
