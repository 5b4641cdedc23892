"""A public teacher, in the place of one that the run trains: diffusers' unconditional DDPM of small
images, such as google/ddpm-cifar10-32 (Ho et al. 2020)."""

import json

import torch
from torch import nn

from add import Denoiser, NoiseSchedule
from common.checkpoints import read_last, write
from common.errors import brief
from toy.teacher import Standardize

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x_0"}
PIXELS = Standardize(0.0, 1.0)  # such models diffuse pixels in [-1, 1] as they are


class PublicUNet(nn.Module):
    """diffusers' UNet2DModel as the toy calls its own U-Net: f(x_t, t, label), whose label is
    ignored. With bf16, convolutions and products are taken in bfloat16."""

    def __init__(self, unet, description, classes, bf16):
        super().__init__()
        self.unet, self.description = unet, description
        self.classes, self.bf16, self.blocks = classes, bf16, unet.config.layers_per_block
        channels = unet.config.block_out_channels
        self.map_channels = [c for c in channels for _ in range(self.blocks)] + [channels[-1]]

    def forward(self, x_t, t, label):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            return self.unet(x_t, t).sample.to(x_t.dtype)

    def encode(self, x_t, t, label):
        """[(B, map_channels[k], H', W')]: what each residual block of the down path, with its
        attention, and the middle give, finest first."""
        unet, maps = self.unet, []
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            embedding = unet.time_embedding(unet.time_proj(t).to(x_t.dtype))
            h = unet.conv_in(x_t)
            for block in unet.down_blocks:
                h, states = block(hidden_states=h, temb=embedding)
                maps += states[: self.blocks]  # without the one that is downsampled
            maps.append(unet.mid_block(h, embedding))
            return [h.to(x_t.dtype) for h in maps]


def make_public(description, classes, bf16):
    """The Denoiser of a description ({"unet", "scheduler"}: diffusers' configurations as JSON),
    with random weights."""
    from diffusers import DDPMScheduler, UNet2DModel

    unet = UNet2DModel.from_config(json.loads(description["unet"]))
    scheduler = DDPMScheduler.from_config(json.loads(description["scheduler"]))
    return Denoiser(
        PublicUNet(unet, description, classes, bf16),
        NoiseSchedule.from_betas(scheduler.betas),
        PREDICTIONS[scheduler.config.prediction_type],
        PIXELS,
        PIXELS.inverse,
        PIXELS.clip,
    )


def fetch(name, shape):
    """(description, the U-Net's weights) of a diffusers pipeline: a Hub name, or a folder.
    ValueError, in one line, where it cannot be had or draws other images than (C, H, W)."""
    try:
        from diffusers import DDPMPipeline
    except ImportError as error:
        missing = f"needs {error.name}; python -m pip install -r full/requirements.txt"
        raise ValueError(f"--teacher {name}: {missing}") from error
    try:
        pipe = DDPMPipeline.from_pretrained(name)
        config, prediction = pipe.unet.config, pipe.scheduler.config.prediction_type
        draws = (config.in_channels, config.sample_size, config.sample_size)
    except Exception as error:  # whatever a missing file, network or certificate raises
        raise ValueError(
            f"--teacher {name}: no diffusers DDPM pipeline can be loaded ({brief(error)}); "
            "name one of the Hub or a folder, or leave the flag out"
        ) from error
    timesteps = pipe.scheduler.config.num_train_timesteps
    rescaled = pipe.scheduler.config.get("rescale_betas_zero_snr")  # not every scheduler has it
    for unfit, what in (
        (config.class_embed_type or config.num_class_embeds, "has classes"),
        (config.out_channels != config.in_channels, "predicts variances, too"),
        (config.center_input_sample, "centres its input (center_input_sample)"),
        (timesteps != 1000, f"has {timesteps} timesteps, not 1000"),
        (rescaled and prediction == "epsilon", "predicts epsilon at zero terminal SNR"),
    ):
        if unfit:
            raise ValueError(f"--teacher {name}: {what}; name another pipeline")
    if prediction not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise ValueError(f"--teacher {name}: predicts {prediction}; name one that predicts {known}")
    if draws != tuple(shape):
        mine, its = ("×".join(map(str, x)) for x in (shape, draws))
        raise ValueError(f"--teacher {name}: draws {its}, but the data is {mine}")
    description = {"unet": pipe.unet.to_json_string(), "scheduler": pipe.scheduler.to_json_string()}
    return description, pipe.unet.state_dict()


def public_teacher(stage):
    """The frozen Denoiser of settings.teacher. It is fetched once and kept in the stage's folder,
    as a teacher that was trained would be."""
    settings, path = stage.settings, stage.folder / "checkpoint.pt"
    state = read_last(path)
    if not state or state.get("key") != stage.key:
        description, weights = fetch(settings.teacher, stage.data.train_images.shape[1:])
        ema = {f"module.unet.{name}": weight for name, weight in weights.items()}
        progress = {"key": stage.key, "step": 0, "finished": True}
        state = progress | {"description": description, "ema": ema}
        stage.folder.mkdir(parents=True, exist_ok=True)
        write(path, state)
    classes, bf16 = len(stage.data.classes), settings.precision == "bf16"
    denoiser = make_public(state["description"], classes, bf16)
    weights = {name.removeprefix("module."): weight for name, weight in state["ema"].items()}
    denoiser.network.load_state_dict(weights)
    return denoiser.to(stage.device).eval().requires_grad_(False)
