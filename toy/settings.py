"""Every setting of the toy: defaults, presets, and the command-line flags that come from them.

A setting belongs to the stage whose name it starts with: stage_key() names what a stage's result
depends on, so that a stage is done again exactly when one of its own settings, its data or an
earlier stage has changed.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from common.augment import AUGMENTATIONS
from common.flags import check_choices, check_limits, check_rising, flag, option, show

DATASETS = ("auto", "glyphs", "mnist", "fashion-mnist", "cifar10", "folder")
FEATURES = ("convolutional", "classifier", "denoiser", "dino", "untrained", "teacher")
FEATURES += ("dinov2", "efficientnet")  # pretrained
# What is drawn, each with a seed of its own: --seed plus its place here.
DRAWS = ("data", "metric", "features", "teacher", "distil")  # by the stages
DRAWS += ("noise", "steps", "pictures", "fid", "pairs")
COUNT, SHARE, RATE, GUIDANCE = (1, 10**7), (0, 1), (1e-12, 1e3), (-100, 100)


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are the `cpu` preset's."""

    dataset: str = option(
        "auto", "auto (mnist, else glyphs), glyphs, mnist, fashion-mnist, cifar10, folder", DATASETS
    )
    data_dir: str = option(
        "data",
        "where the data set is, or is downloaded to; for folder: the folder of class folders",
    )
    size: int = option(32, "height and width of the images, in pixels", limits=(8, 1024))
    flip: str = option(
        "auto",
        "mirror half of the training images: true, false, or auto: of CIFAR-10 alone",
        ("auto", "true", "false"),
    )
    limit: int = option(
        0, "use at most this many training images and this many test images (0: all)"
    )
    max_bad_files: int = option(
        0,
        "unreadable files that a folder may contain; each is reported and left out",
    )
    seed: int = option(0, "seed of all random numbers", limits=(0, 2**31 - 1))
    checkpoint_seconds: float = option(
        60.0, "time between checkpoints: what a crash costs at the most"
    )
    precision: str = option(
        "auto",
        "of teacher and student: fp32, bf16 (mixed), or auto: bf16 on x86 CPUs (torch 2.11) and "
        "GPUs that are faster with it",
        ("auto", "fp32", "bf16"),
    )
    deterministic: bool = option(
        False, "on CUDA: only algorithms that give the same bits every time (slower)"
    )
    skip_nonfinite: int = option(
        0,
        "per stage, skip and count up to this many steps whose loss or gradient is infinite or NaN",
    )

    metric_steps: int = option(200, "training steps of the metric network", limits=COUNT)
    metric_width: int = option(
        32, "the metric network's channels at the finest resolution", limits=COUNT
    )
    metric_depth: int = option(1, "its convolutions per resolution", limits=COUNT)
    metric_augment: tuple[str, ...] = option(
        (), "augmentation of its training images: color, translation, cutout", tuple(AUGMENTATIONS)
    )

    teacher: str = option(
        "train",
        "train, or the Hub name or folder of a public diffusers DDPM without classes, such as "
        "google/ddpm-cifar10-32 (needs full/requirements.txt)",
    )
    teacher_widths: tuple[int, ...] = option(
        (32, 64, 128), "channels of the U-Net at each resolution", limits=COUNT
    )
    teacher_blocks: int = option(1, "residual blocks at each resolution, down and up", limits=COUNT)
    teacher_schedule: str = option(
        "scaled_linear",
        "noise schedule: scaled_linear (Stable Diffusion's), linear, cosine",
        ("scaled_linear", "linear", "cosine"),
    )
    teacher_zero_snr: bool = option(
        False, "rescale the schedule to zero terminal SNR (not with epsilon)"
    )
    teacher_prediction: str = option(
        "v", "what the U-Net predicts: v, epsilon or x_0", ("v", "epsilon", "x_0")
    )
    teacher_steps: int = option(950, "training steps of the teacher", limits=COUNT)
    teacher_batch: int = option(128, "the teacher's batch size", limits=COUNT)
    teacher_lr: float = option(1e-3, "the teacher's learning rate", limits=RATE)
    teacher_ema: float = option(
        18_000, "half-life of the moving average of its weights, in images", limits=COUNT
    )
    teacher_dropout: float = option(
        0.0, "dropout in the teacher's residual blocks", limits=(0, 0.99)
    )
    teacher_label_dropout: float = option(
        0.1, "share of labels dropped, for classifier-free guidance", limits=SHARE
    )

    features: str = option(
        "convolutional",
        "the discriminator's F: convolutional (a small classifier), or classifier, denoiser or "
        "dino (ViTs), each trained here on the data; untrained (a ViT); teacher (its encoder); "
        "dinov2 or efficientnet (torch.hub)",
        FEATURES,
    )
    features_patch: int = option(4, "patch size of F, a ViT", limits=COUNT)
    features_width: int = option(
        96,
        "channels of F, a ViT; a convolutional F has half, one and two times as many at its three "
        "resolutions",
        limits=COUNT,
    )
    features_depth: int = option(
        3, "blocks of F, a ViT; the heads read the patch embedding and every block", limits=COUNT
    )
    features_steps: int = option(150, "training steps of F; a ViT needs about 600", limits=COUNT)

    distil_init: str = option(
        "pretrained",
        "what the student starts from: pretrained, or random (Table 1c)",
        ("pretrained", "random"),
    )
    distil_widths: tuple[int, ...] = option(
        (),
        "channels of the student's U-Net, if not the teacher's; then a second teacher, of that "
        "size, is what it starts from (Table 1e)",
        limits=COUNT,
    )
    distil_steps: int = option(1200, "ADD iterations", limits=COUNT)
    distil_batch: int = option(32, "batch size of ADD", limits=COUNT)
    distil_student_lr: float = option(1e-4, "the student's learning rate", limits=RATE)
    distil_heads_lr: float = option(4e-3, "the discriminator heads' learning rate", limits=RATE)
    distil_beta1: float = option(0.0, "Adam's beta_1 for both (beta_2 is 0.99)", limits=(0, 0.999))
    distil_ema: float = option(
        6_000, "half-life of the moving average of the student's weights, in images", limits=COUNT
    )
    distil_timesteps: tuple[int, ...] = option(
        (249, 499, 749, 999), "T_student; at the last the student's input is pure noise"
    )
    distil_lambda: float = option(10.0, "weight of the distillation loss (the paper's: 2.5)")
    distil_gamma: float = option(1e-5, "weight of R1")
    distil_weight: str = option(
        "exponential", "c(t): exponential, sds or nfsd", ("exponential", "sds", "nfsd")
    )
    distil_guidance: float = option(
        1.0, "the teacher's guidance in the distillation loss", limits=GUIDANCE
    )
    distil_teacher_steps: int = option(1, "DDIM steps of the teacher's target", limits=COUNT)
    distil_c_text: bool = option(True, "condition the heads on the class")
    distil_c_img: bool = option(True, "condition the heads on F's summary of x_0")
    distil_augment: tuple[str, ...] = option(
        (), "DiffAugment before F: color, translation, cutout", tuple(AUGMENTATIONS)
    )
    distil_head_width: int = option(32, "channels inside a head", limits=COUNT)
    distil_head_kernel: int = option(9, "taps of a head's circular convolution", limits=(1, 15))
    distil_c_map: int = option(32, "channels of a head's projection", limits=COUNT)
    distil_local_norm: bool = option(True, "local batch norm in the heads")

    eval_images: int = option(
        1000, "generated images that each number is taken from", limits=(20, 10**6)
    )
    eval_guidances: tuple[float, ...] = option(
        (2.0, 3.0),
        "guidances to try for the teacher; the best at --eval-search-steps is used",
        limits=GUIDANCE,
    )
    eval_search_steps: int = option(
        0,
        "DDIM steps at which the guidance is chosen; 0 or too many: the last of --eval-steps",
        limits=(0, 1000),
    )
    eval_steps: tuple[int, ...] = option(
        (1, 4, 10, 50),
        "DDIM steps at which the teacher is scored, rising; the student is compared with the last",
        limits=(1, 1000),
    )

    inception: str = option(
        "none",
        "also measure FID on Inception's features: none, auto (download its weights), or a file of "
        "torch-fidelity's weights (needs full/requirements.txt)",
    )
    inception_images: int = option(
        10_000, "generated images that an FID is taken from", limits=(20, 10**6)
    )

    def seed_of(self, draws):
        """The seed of one of DRAWS. "noise" is what the scored images start from, "steps" the fresh
        noise in a student's further steps, "pairs" the draws of rivals/pairs.py."""
        return self.seed + DRAWS.index(draws)

    @property
    def of_students_size(self):
        """The settings of a teacher that is as large as the student."""
        widths = self.distil_widths or self.teacher_widths
        return dataclasses.replace(self, teacher_widths=widths)

    @property
    def for_second_teacher(self):
        """The settings of what a student of another size starts from; None if nothing does."""
        if not self.distil_widths or self.distil_init == "random":
            return None
        return self.of_students_size

    @property
    def conditional(self):
        """Whether the teacher knows classes; public ones do not."""
        return self.teacher == "train"

    def __post_init__(self):
        check_choices(self)
        check_limits(self)
        if not self.teacher_widths:
            raise ValueError("--teacher-widths: empty; give at least one number")
        check_rising(self, "eval_guidances", "eval_steps", "distil_timesteps")
        if self.distil_timesteps[-1] >= 1000:
            raise ValueError(
                f"--distil-timesteps {show(self.distil_timesteps)}: the last must be at most 999; "
                "the schedules have T = 1000"
            )
        if self.teacher_zero_snr and self.teacher_prediction == "epsilon":
            raise ValueError(
                "--teacher-zero-snr true: not with --teacher-prediction epsilon, whose x_0 is "
                "singular there; take v or x_0"
            )
        if self.distil_weight == "nfsd" and self.distil_teacher_steps != 1:
            raise ValueError(
                f"--distil-teacher-steps {self.distil_teacher_steps}: must be 1 with "
                "--distil-weight nfsd"
            )
        if not self.conditional and (self.distil_guidance != 1 or self.distil_weight == "nfsd"):
            raise ValueError(
                f"--teacher {self.teacher}: has no classes, so no --distil-guidance other than 1 "
                "and no --distil-weight nfsd"
            )
        for name in ("teacher_widths", "distil_widths"):
            # The teacher's encoder, as F, folds its finest maps once more.
            widths, least = getattr(self, name), 2 ** max(2, len(getattr(self, name)))
            if self.size % least or any(width % 8 for width in widths):
                raise ValueError(
                    f"--{flag(name)} {show(widths)}: each must be a multiple of 8, and --size "
                    f"{self.size} a multiple of {least} for this many resolutions"
                )
        for name, usual in (("distil_widths", ()), ("distil_init", "pretrained")):
            if getattr(self, name) != usual and not self.conditional:
                given = f"--{flag(name)} {show(getattr(self, name))}"
                raise ValueError(f"{given}: not with --teacher {self.teacher}; leave one out")
        least = 16 if self.features == "convolutional" else 4  # groups of its norm; attention heads
        if self.features_width % least:
            raise ValueError(
                f"--features-width {self.features_width}: must be a multiple of {least} with "
                f"--features {self.features}"
            )
        if self.size % self.features_patch:
            raise ValueError(
                f"--features-patch {self.features_patch}: must divide --size {self.size}"
            )


PRESETS = {
    "cpu": {},
    "long": dict(
        metric_steps=400,
        teacher_steps=4000,
        teacher_ema=90_000,
        features_depth=4,
        features_steps=1000,
        distil_steps=4000,
        distil_batch=64,
        distil_ema=40_000,
        eval_images=2000,
    ),
    # For CIFAR-10 on two CPU cores, where it has not run to its end (toy/README.md: an estimate).
    "cifar-cpu": dict(
        flip="true",
        metric_steps=8000,
        metric_width=48,
        metric_depth=2,
        metric_augment=("translation",),
        teacher_steps=8000,
        teacher_ema=200_000,
        features="classifier",  # the best F that was tried in colour: toy/experiments.md
        features_depth=4,
        features_steps=3000,
        distil_steps=4000,
        distil_batch=64,
        distil_ema=50_000,
        eval_images=2000,
        eval_guidances=(2.0, 3.0, 4.0, 5.0),
        eval_search_steps=10,
    ),
    "gpu": dict(
        metric_steps=2000,
        teacher_widths=(128, 256, 256),
        teacher_blocks=2,
        teacher_steps=40_000,
        teacher_batch=256,
        teacher_lr=2e-4,
        teacher_ema=500_000,
        teacher_dropout=0.1,
        features_depth=4,
        features_steps=5000,
        features_width=192,
        distil_steps=20_000,
        distil_batch=256,
        distil_heads_lr=1e-4,
        distil_ema=100_000,
        distil_head_width=128,
        distil_c_map=64,
        eval_images=5000,
    ),
    "tiny": dict(
        limit=256,
        metric_steps=4,
        teacher_widths=(8, 16),
        teacher_steps=6,
        teacher_batch=16,
        features_width=16,
        features_depth=2,
        features_steps=4,
        distil_steps=6,
        distil_batch=16,
        distil_head_width=8,
        distil_c_map=8,
        eval_images=64,
        eval_guidances=(1.0, 2.0),
        eval_search_steps=2,
        eval_steps=(1, 4),
    ),
}

# What each stage's result depends on: the stages before it, and fields besides those that start
# with its name.
STAGES = {
    "data": ((), ()),  # see stage_key
    "metric": (("data",), ("flip",)),
    "teacher": (("data",), ("precision", "flip")),
    "features": (("data",), ("flip",)),
    "second": ((), ()),  # a second teacher, see stage_key
    "distil": (("teacher", "second", "features"), ()),
    "eval": (("metric", "distil"), ("inception", "inception_images")),
}


def stage_key(settings, stage, fingerprint):
    """A short hash of all that a stage's result depends on; fingerprint is the data's."""
    if stage == "second":
        second = settings.for_second_teacher
        return stage_key(second, "teacher", fingerprint) if second else ""
    parents, names = STAGES[stage]
    fields = [f.name for f in dataclasses.fields(settings)]
    mine = [name for name in fields if name in names or name.split("_")[0] == stage]
    own = {name: getattr(settings, name) for name in mine}
    if stage == "data":
        own = {"fingerprint": fingerprint, "seed": settings.seed}
    keys = [stage_key(settings, parent, fingerprint) for parent in parents]
    text = json.dumps([own, keys], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
