"""Every setting of the toy with its default, its presets, and the command-line flags made from them.

A setting belongs to the stage whose name it starts with: stage_key() names what a stage's result depends on, so that a
stage is done again exactly when one of its own settings, its data or an earlier stage has changed.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from flags import check_choices, check_limits, flag, option

COUNT, SHARE, RATE, GUIDANCE = (1, 10**7), (0, 1), (1e-12, 1e3), (-100, 100)


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are the `cpu` preset's."""

    dataset: str = option("auto", "auto, glyphs, mnist, fashion-mnist, cifar10 or folder", ("auto", "glyphs", "mnist", "fashion-mnist", "cifar10", "folder"))
    data_dir: str = option("data", "where the data set is, or is downloaded to; for folder: the folder of class folders")
    size: int = option(32, "height and width of the images, in pixels", limits=(8, 1024))
    limit: int = option(0, "use only so many training and so many test images (0: all)")
    max_bad_files: int = option(0, "of a folder: files that cannot be read and are left out, after a line about each; one more is an error")
    seed: int = option(0, "of every random draw", limits=(0, 2**31 - 1))
    checkpoint_seconds: float = option(60.0, "time between checkpoints: what a crash costs at the most")
    precision: str = option("auto", "of teacher and student: fp32, bf16 (mixed), or auto: bf16 on x86 CPUs (torch 2.11) and GPUs that are faster with it", ("auto", "fp32", "bf16"))
    deterministic: bool = option(False, "on CUDA: only algorithms that give the same bits every time (slower)")
    skip_nonfinite: int = option(0, "steps of a stage whose loss or gradient may be infinite or no number; they are skipped and counted")

    metric_steps: int = option(200, "training steps of the metric network", limits=COUNT)

    features: str = option("trained", "the discriminator's F: trained (a ViT, on this data) or dinov2 (torch.hub)", ("trained", "dinov2"))
    features_objective: str = option("denoise", "what F learns: classify, summarize, denoise or none (see toy/features.py)", ("classify", "summarize", "denoise", "none"))
    features_patch: int = option(4, "patch size of F", limits=COUNT)
    features_width: int = option(96, "channels of F", limits=COUNT)
    features_depth: int = option(3, "blocks of F; the heads read the patch embedding and every block", limits=COUNT)
    features_steps: int = option(300, "training steps of F", limits=COUNT)

    teacher_widths: tuple[int, ...] = option((32, 64, 128), "channels of the U-Net at each resolution", limits=COUNT)
    teacher_blocks: int = option(1, "residual blocks at each resolution, down and up", limits=COUNT)
    teacher_schedule: str = option("scaled_linear", "noise schedule: scaled_linear (Stable Diffusion's), linear, cosine", ("scaled_linear", "linear", "cosine"))
    teacher_zero_snr: bool = option(False, "rescale the schedule to zero terminal SNR (not with epsilon)")
    teacher_prediction: str = option("v", "what the U-Net predicts: v, epsilon or x_0", ("v", "epsilon", "x_0"))
    teacher_steps: int = option(950, "training steps of the teacher", limits=COUNT)
    teacher_batch: int = option(128, "its batch size", limits=COUNT)
    teacher_lr: float = option(1e-3, "its learning rate", limits=RATE)
    teacher_ema: float = option(0.995, "decay of its weights' moving average", limits=SHARE)
    teacher_label_dropout: float = option(0.1, "share of labels dropped, for classifier-free guidance", limits=SHARE)

    pairs_number: int = option(8000, "pairs of noise and image drawn from the teacher, for --start pairs", limits=COUNT)
    pairs_steps: int = option(10, "DPM-Solver++ steps that make such an image", limits=(1, 1000))
    pairs_guidance: float = option(2.0, "and the guidance", limits=GUIDANCE)

    start: str = option("pairs", "what the student starts as: pairs (taught the teacher's pairs and the data; not in the paper), or teacher (a copy)", ("pairs", "teacher"))
    start_steps: int = option(2000, "training steps on the pairs, and on the data below τ_n", limits=COUNT)
    start_terminal_share: float = option(0.65, "share of them that is on the pairs", limits=(1e-3, 1))
    start_lr: float = option(1.5e-3, "their learning rate; the batch size is ADD's", limits=RATE)

    distil_steps: int = option(500, "ADD iterations", limits=COUNT)
    distil_batch: int = option(64, "their batch size", limits=COUNT)
    distil_student_lr: float = option(4e-4, "the student's learning rate", limits=RATE)
    distil_heads_lr: float = option(6e-3, "the discriminator heads' learning rate", limits=RATE)
    distil_beta1: float = option(0.0, "Adam's beta_1 for both (beta_2 is 0.99)", limits=(0, 0.999))
    distil_ema: float = option(0.99, "decay of the student's moving average", limits=SHARE)
    distil_timesteps: tuple[int, ...] = option((199, 299, 399, 799), "T_student; pure noise stands in for the last")
    distil_terminal_share: float = option(0.0, "share of the student's draws at the last of them, in ADD (0: uniform, as in the paper)", limits=SHARE)
    distil_lambda: float = option(2.5, "weight of the distillation loss")
    distil_anchor: float = option(3.0, "weight of the start's own loss beside ADD's, on half a batch (0: none; not in the paper)")
    distil_gamma: float = option(1e-5, "weight of R1")
    distil_weight: str = option("exponential", "c(t): exponential, sds or nfsd", ("exponential", "sds", "nfsd"))
    distil_guidance: float = option(2.0, "the teacher's guidance in the distillation loss", limits=GUIDANCE)
    distil_teacher_steps: int = option(1, "DDIM steps of the teacher's target", limits=COUNT)
    distil_c_text: bool = option(True, "condition the heads on the class")
    distil_c_img: bool = option(False, "condition the heads on F's class token of x_0")
    distil_c_s: bool = option(True, "condition the heads on the student's timestep s (not in the paper)")
    distil_augment: tuple[str, ...] = option(("noise",), "DiffAugment before F: color, translation, cutout, noise", ("color", "translation", "cutout", "noise"))
    distil_head_width: int = option(32, "channels inside a head", limits=COUNT)
    distil_head_kernel: int = option(9, "taps of a head's circular convolution", limits=(1, 15))
    distil_deviation: bool = option(True, "show the heads how alike the images of a group are (not in the paper)")
    distil_c_map: int = option(32, "channels of a head's projection", limits=COUNT)

    eval_images: int = option(1000, "generated images that each figure is taken from", limits=(20, 10**6))
    eval_guidances: tuple[float, ...] = option((1.0, 1.5, 2.0), "the teacher's, of which the one that is best at --eval-search-steps is used", limits=GUIDANCE)
    eval_search_steps: int = option(10, "DDIM steps at which the guidance is chosen, if there are several; at most, and for 0, the last of --eval-steps", limits=(0, 1000))
    eval_steps: tuple[int, ...] = option((1, 4, 10, 50), "DDIM steps at which the teacher is scored, rising; the student is held against the last", limits=(1, 1000))

    def __post_init__(self):
        check_choices(self)
        check_limits(self)
        for name in ("teacher_widths", "distil_timesteps", "eval_guidances", "eval_steps"):
            if not getattr(self, name):
                raise ValueError(f"--{flag(name)}: empty; give at least one number")
        for name in ("eval_guidances", "eval_steps"):
            if list(getattr(self, name)) != sorted(set(getattr(self, name))):
                raise ValueError(f"--{flag(name)} {getattr(self, name)}: must rise strictly")
        if self.features_width % 4:
            raise ValueError(f"--features-width {self.features_width}: must be a multiple of 4, the heads of its attention")
        if self.size % self.features_patch:
            raise ValueError(f"--features-patch {self.features_patch}: must divide --size {self.size}")


PRESETS = {
    "cpu": {},
    "long": dict(
        metric_steps=400, features_depth=4, features_steps=1000, teacher_steps=4000, teacher_ema=0.999, pairs_number=16_000,
        start_steps=4000, distil_steps=4000, distil_ema=0.998, eval_images=2000, eval_search_steps=0,
    ),
    "gpu": dict(
        metric_steps=2000, features_depth=4, features_steps=5000, features_width=192, teacher_widths=(64, 128, 256), teacher_blocks=2,
        teacher_steps=15_000, teacher_ema=0.999, pairs_number=50_000, start_steps=10_000,
        distil_steps=8000, distil_batch=128,
        distil_head_width=96, distil_c_map=64, distil_ema=0.999, eval_images=5000, eval_search_steps=0,
    ),
    "tiny": dict(
        limit=256, metric_steps=4, features_width=16, features_depth=2, features_steps=4, teacher_widths=(8, 16),
        teacher_steps=6, teacher_batch=16, pairs_number=120, pairs_steps=2, start_steps=4, distil_steps=6, distil_batch=16, distil_head_width=8, distil_c_map=8,
        eval_images=64, eval_guidances=(1.0, 2.0), eval_search_steps=2, eval_steps=(1, 4),
    ),
}  # fmt: skip

STAGES = {  # what each stage's result depends on: fields that start with its name, and the stages before it
    "data": ((), ()),  # see stage_key
    "metric": (("data",), ()),
    "features": (("data",), ()),
    "teacher": (("data",), ("precision",)),
    "pairs": (("teacher",), ()),
    "start": (("pairs",), ("distil_timesteps", "distil_batch", "distil_ema")),
    "distil": (("features", "start"), ()),
    "eval": (("metric", "distil"), ()),
}


def stage_key(settings, stage, fingerprint):
    """A short hash of all that a stage's result depends on; fingerprint is the data's."""
    parents, names = STAGES[stage]
    own = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    own = {name: value for name, value in own.items() if name in names or name.split("_")[0] == stage}
    if stage == "data":
        own = {"fingerprint": fingerprint, "seed": settings.seed}
    text = json.dumps([own, [stage_key(settings, parent, fingerprint) for parent in parents]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
