"""What a run is made of: accelerator, networks, optimisers, moving average, data.

The student is what accelerate prepares, and what FSDP2 may shard. The heads are small: every
process has all of them, for under FSDP2 R1's second backward would meet freed or stale weights.
"""

import contextlib
import os
import sys
import uuid
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from add import ADD, ADDConfig, Discriminator, DiscriminatorHeads, Student
from common.augment import Augmented
from full import backbones, data
from full.features import TeacherEncoder, TextFeatures, VisionTransformer, load_vit
from full.settings import torch_dtype


class TrainingError(ValueError):
    """A run that cannot start or go on; the message is one line."""


def make_accelerator(settings, folder):
    """accelerate's Accelerator. TrainingError if the launched processes do not see each other."""
    if settings.precision == "bf16" and not torch.cuda.is_available():
        print(
            "--precision bf16: without a CUDA GPU this is slow, on most processors slower than "
            "--precision fp32",
            file=sys.stderr,
        )
    # TF32 where arithmetic is float32: heads, the U-Net's last layer.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision={"bf16": "bf16", "fp32": "no"}[settings.precision],
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # The others wait while the first writes 41 GB of SDXL; NCCL's ten minutes may be short.
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),
        ],
    )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    # Some launches start processes that think they are alone.
    if accelerator.num_processes != asked:
        raise TrainingError(
            f"{asked} processes were launched and each is alone; without GPUs set "
            "ACCELERATE_USE_CPU=true and use torchrun"
        )
    return accelerator


def check_shared(accelerator, folder):
    """TrainingError unless every process sees what the first one writes into a folder that is
    there."""
    if accelerator.num_processes == 1:
        return
    trace = folder / f".shared-{broadcast_object_list([uuid.uuid4().hex])[0]}"
    if accelerator.is_main_process:
        trace.touch()
    accelerator.wait_for_everyone()
    unseen = torch.tensor([float(not trace.exists())], device=accelerator.device)
    unseen = int(accelerator.reduce(unseen, "sum").item())
    if accelerator.is_main_process:
        trace.unlink()
    if unseen:
        raise TrainingError(
            f"--out {folder}: {unseen} of {accelerator.num_processes} processes do not see what "
            "the first one writes there; name a folder that all machines share"
        )


class Ema:
    """Moving average of the trainable parameters, shards included. decay 0: the parameters
    themselves."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay = parameters, decay
        self.shadows = [p.detach().clone() for p in parameters] if decay else []

    def _pairs(self):
        return zip(self.shadows, self.parameters if self.decay else [], strict=True)

    @torch.no_grad()
    def update(self, step):
        """Take the parameters of an iteration in; the decay rises with the first ones."""
        decay = min(self.decay, (1 + step) / (10 + step))  # the first steps are soon forgotten
        for shadow, p in self._pairs():
            shadow.lerp_(p, 1 - decay)

    @torch.no_grad()
    def restart(self):
        """Begin anew from the parameters as they are."""
        for shadow, p in self._pairs():
            shadow.copy_(p)

    @contextlib.contextmanager
    def swapped(self):
        """Inside, the network has the average and this has the network's parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for shadow, p in self._pairs():
            kept = p.detach().clone()
            p.copy_(shadow)
            shadow.copy_(kept)


class Parts:
    """Everything that settings name, loaded and prepared; step counts iterations."""

    def __init__(self, settings, accelerator, folder):
        self.settings, self.accelerator, self.folder = settings, accelerator, folder
        self.device, rank = accelerator.device, accelerator.process_index
        self.step, self.skipped, self.nonfinite, self.batches = 0, 0, 0, None
        # Of the last iterations: had the discriminator won?
        self.won = torch.zeros(0, dtype=torch.bool, device=self.device)
        # The data first: mistakes there are cheap.
        self.loader = data.make_loader(settings, rank, accelerator.num_processes)
        seed = settings.seed * 100_003 + rank
        self.generator = torch.Generator(self.device).manual_seed(seed)
        torch.manual_seed(settings.seed)
        self.add = self._make_add(torch_dtype(settings.precision)).to(self.device).train()
        self._make_optimizers()
        torch.manual_seed(seed)  # F's crops

    def _make_add(self, frozen):
        """add.ADD; frozen is the dtype of all that is not trained."""
        settings, variant = self.settings, self.settings.variant
        self.backbone = backbones.Backbone(settings.backbone, frozen, self.device, variant)
        latents = self.backbone.load_latents(settings)
        self.teacher_backbone, teacher_latents, shared = self.backbone, latents, True
        if settings.teacher and settings.teacher != settings.backbone:
            self.teacher_backbone = backbones.Backbone(
                settings.teacher, frozen, self.device, variant
            )
            teacher_latents = self.teacher_backbone.load_latents(settings)
            shared = backbones.same_latents(self.backbone, self.teacher_backbone)
            # Its configuration is still read; the student has weights of its own.
            self.backbone.pipe.unet.to("meta")
        denoiser = backbones.make_student_denoiser(self.backbone, latents, settings)
        student = Student(denoiser, settings.timesteps)
        teacher = backbones.make_teacher(self.teacher_backbone, teacher_latents)
        if settings.compile:
            student.denoiser.network.compile()
            teacher.network.compile()
        if settings.features == "teacher" and not shared:
            raise TrainingError(
                f"--features teacher: {settings.teacher} and {settings.backbone} have different "
                "latents; choose another --features or --teacher"
            )
        discriminator = self._make_discriminator(frozen, teacher)
        return ADD(student, teacher, discriminator, self._make_config(shared))

    def _null(self, n):
        """∅ for n samples, for the teacher."""
        backbone = self.teacher_backbone
        return backbone.with_sizes(backbone.null(n), self.settings.resolution)

    def _make_features(self, dtype, teacher):
        settings = self.settings
        if settings.features != "teacher":
            network = load_vit(settings.features, dtype, "features")
            return VisionTransformer(network, settings.features_size, settings.features_crop)
        if settings.checkpointing:
            teacher.network.unet.enable_gradient_checkpointing()
        seed = settings.seed * 100_003 + 50_000 + self.accelerator.process_index
        return TeacherEncoder(teacher, self._null, seed, self.device)

    def _make_conditions(self, dtype):
        """(what makes c_text, what makes c_img), None for those that the heads do not get."""
        settings, text, image = self.settings, None, None
        if settings.c_text != "none":
            text = TextFeatures(settings.c_text, dtype, self.device)
        if settings.c_img != "none":
            image = VisionTransformer(load_vit(settings.c_img, dtype, "c-img"), what="c-img")
            image.to(self.device)
        return text, image

    def _make_discriminator(self, dtype, teacher):
        settings, self.features = self.settings, self._make_features(dtype, teacher)
        self.text_features, self.image_features = self._make_conditions(dtype)
        heads = DiscriminatorHeads(
            self.features.channels,
            text_dim=self.text_features.width if self.text_features else 0,
            image_dim=self.image_features.width if self.image_features else 0,
            hidden=settings.head_width or None,
        )
        seen = self.features
        if settings.augmentations:
            seen = Augmented(seen, settings.augmentations, self.generator)
        return Discriminator(seen, heads)

    def _make_config(self, shared):
        s = self.settings
        return ADDConfig(
            lambda_=s.lambda_,
            gamma=s.gamma,
            weight=s.weight,
            guidance=s.teacher_guidance,
            teacher_steps=s.teacher_steps,
            space=s.space,
            shared_latents=shared,
        )

    def _make_optimizers(self):
        """Both optimisers and the average, once accelerate has prepared the student."""
        settings, accelerator, denoiser = self.settings, self.accelerator, self.add.student.denoiser
        trained = [p for p in denoiser.network.parameters() if p.requires_grad]
        betas, kind = (settings.beta1, 0.99), torch.optim.AdamW
        if settings.optimizer == "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit as kind
            except ImportError as error:
                raise TrainingError(
                    "--optimizer adamw8bit: needs bitsandbytes; pip install bitsandbytes"
                ) from error
        optimizer = kind(
            trained, lr=settings.student_lr, betas=betas, weight_decay=settings.weight_decay
        )
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        self.sharded = plugin is not None
        if self.sharded and settings.precision == "bf16":
            # accelerate's own policy rounds ε, and averages in bfloat16.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        self.network, self.optimizer = accelerator.prepare(denoiser.network, optimizer)
        denoiser.network = self.network
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.ema = Ema(self.trained, settings.ema)

        heads = self.add.discriminator.heads
        if accelerator.num_processes > 1:
            for tensor in (*heads.parameters(), *heads.buffers()):
                torch.distributed.broadcast(tensor.data, 0)
        self.heads_optimizer = torch.optim.Adam(
            heads.parameters(), lr=settings.heads_lr, betas=betas
        )
