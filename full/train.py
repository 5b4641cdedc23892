"""Trains add.ADD on Stable Diffusion with accelerate: one process, DDP, or FSDP2; checkpoints, log, validation.

The student is what accelerate prepares, and what FSDP2 may shard. The heads are small: every process has all of them and
their gradients are averaged by hand, for under FSDP2 R1's second backward would meet freed or stale weights.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import deque
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm

from add import ADD, ADDConfig, Batch, Discriminator, DiscriminatorHeads, Student
from common.augment import Augmented
from common.checkpoints import (
    CheckpointError,
    Stopped,
    one_line,
    peak_memory,
    postponed_signals,
    read,
    sync_folder,
    verify,
    write,
    write_text,
)
from common.health import heads_log, student_log, watch
from full import backbones, data, export, pictures
from full.features import TeacherEncoder, TextFeatures, VisionTransformer, load_vit
from full.settings import NFSD_NEGATIVE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KEEP, VERSION = 2, 1  # checkpoints that stay; their form
SHOWN = ("adversarial", "distillation", "hinge", "images_per_second")  # beside the progress bar


class TrainingError(Exception):
    """A run that cannot start or go on; the message is one line."""


def make_accelerator(settings, folder):
    """accelerate's Accelerator. TrainingError where the processes asked for are not to be had."""
    if settings.precision == "bf16" and not torch.cuda.is_available():
        print("--precision bf16: without a CUDA GPU this is slow, on most processors slower than --precision fp32", file=sys.stderr)
    torch.set_float32_matmul_precision("high")  # TF32 where arithmetic is float32: heads, the U-Net's last layer
    torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision={"bf16": "bf16", "fp32": "no"}[settings.precision],
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:  # some launches start several processes that each think they are alone
        raise TrainingError(
            f"{asked} processes were launched and each is alone; without GPUs set ACCELERATE_USE_CPU=true and use torchrun"
        )
    return accelerator


def repeat(cond, n):
    """A condition of one sample, for n."""
    return {k: repeat(c, n) for k, c in cond.items()} if isinstance(cond, dict) else cond.expand(n, *cond.shape[1:])


class Ema:
    """Moving average of the trainable parameters, shards included. decay 0: the parameters themselves."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay = parameters, decay
        self.shadows = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self, step):
        """Take the parameters of an iteration in; the decay rises with the first ones."""
        decay = min(self.decay, (1 + step) / (10 + step))  # the first steps are soon forgotten
        for shadow, p in zip(self.shadows, self.parameters if self.decay else [], strict=True):
            shadow.lerp_(p, 1 - decay)

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
        for shadow, p in zip(self.shadows, self.parameters if self.decay else [], strict=True):
            kept = p.detach().clone()
            p.copy_(shadow)
            shadow.copy_(kept)


class Trainer:
    """All that a run has: networks, optimisers, average, data, step."""

    def __init__(self, settings, accelerator, folder):
        self.settings, self.accelerator, self.folder, self.step = settings, accelerator, folder, 0
        self.device, rank = accelerator.device, accelerator.process_index
        frozen = DTYPES[settings.precision]
        self.loader = data.make_loader(settings, rank, accelerator.num_processes)  # first: mistakes there are cheap
        self.generator = torch.Generator(self.device).manual_seed(settings.seed * 100_003 + rank)
        torch.manual_seed(settings.seed)

        self.backbone = backbones.Backbone(settings.backbone, frozen, self.device, settings.variant)
        latents = self.backbone.load_latents(settings)
        self.teacher_backbone, teacher_latents, shared = self.backbone, latents, True
        if settings.teacher and settings.teacher != settings.backbone:
            self.teacher_backbone = backbones.Backbone(settings.teacher, frozen, self.device, settings.variant)
            teacher_latents = self.teacher_backbone.load_latents(settings)
            shared = backbones.same_latents(self.backbone, self.teacher_backbone)
            self.backbone.pipe.unet.to("meta")  # its configuration is still read; the student has weights of its own
        student = Student(backbones.make_student_denoiser(self.backbone, latents, settings), settings.timesteps)
        teacher = backbones.make_teacher(self.teacher_backbone, teacher_latents)
        if settings.compile:
            student.denoiser.network.compile()
            teacher.network.compile()
        if settings.features == "teacher" and not shared:
            raise TrainingError(f"--features teacher: {settings.teacher} and {settings.backbone} have other latents; take another F, or teacher")
        self.add = ADD(student, teacher, self._make_discriminator(frozen, teacher), self._make_config(shared)).to(self.device).train()

        network = student.denoiser.network
        trained = [p for p in network.parameters() if p.requires_grad]
        betas = (settings.beta1, 0.99)
        kind = torch.optim.AdamW
        if settings.optimizer == "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit as kind
            except ImportError as error:
                raise TrainingError("--optimizer adamw8bit: needs bitsandbytes; pip install bitsandbytes") from error
        optimizer = kind(trained, lr=settings.student_lr, betas=betas, weight_decay=settings.weight_decay)
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        self.sharded = plugin is not None
        if self.sharded and settings.precision == "bf16":  # accelerate's own policy rounds ε, and averages in bfloat16
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        student.denoiser.network = self.network
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.ema = Ema(self.trained, settings.ema)

        heads = self.add.discriminator.heads
        if accelerator.num_processes > 1:
            for tensor in (*heads.parameters(), *heads.buffers()):
                torch.distributed.broadcast(tensor.data, 0)
        self.heads_optimizer = torch.optim.Adam(heads.parameters(), lr=settings.heads_lr, betas=betas)
        torch.manual_seed(settings.seed * 100_003 + rank)  # F's crops
        self.skipped, self.nonfinite, self.batches = 0, 0, None
        self.won = deque(maxlen=200)  # of the last iterations: had the discriminator won?

    def _null(self, n):
        """∅ for n samples, for the teacher, with the sizes of an uncropped image."""
        size = self.settings.resolution
        sizes = torch.tensor([[size, size, 0, 0, size, size]]).expand(n, -1)
        return self.teacher_backbone.with_sizes(repeat(self.teacher_backbone.null(1), n), sizes)

    def _make_features(self, dtype, teacher):
        settings = self.settings
        if settings.features != "teacher":
            return VisionTransformer(load_vit(settings.features, dtype, "features"), settings.features_size, settings.features_crop)
        if settings.checkpointing:
            teacher.network.unet.enable_gradient_checkpointing()
        return TeacherEncoder(teacher, self._null, settings.seed * 100_003 + 50_000 + self.accelerator.process_index, self.device)

    def _make_discriminator(self, dtype, teacher):
        settings, features = self.settings, self._make_features(dtype, teacher)
        self.text_features = self.image_features = None
        if settings.c_text != "none":
            self.text_features = TextFeatures(settings.c_text, dtype, self.device)
        if settings.c_img != "none":
            self.image_features = VisionTransformer(load_vit(settings.c_img, dtype, "c-img"), what="c-img").to(self.device)
        heads = DiscriminatorHeads(
            features.channels,
            text_dim=self.text_features.width if self.text_features else 0,
            image_dim=self.image_features.width if self.image_features else 0,
            hidden=settings.head_width or None,
        )
        self.features = features
        augmented = Augmented(features, settings.augment, self.generator) if settings.augment else features
        return Discriminator(augmented, heads)

    def _make_config(self, shared):
        s = self.settings
        return ADDConfig(
            lambda_=s.lambda_, gamma=s.gamma, weight=s.weight, teacher_steps=s.teacher_steps, shared_latents=shared,
            guidance=s.guidance[0] if len(s.guidance) == 1 else s.guidance,
            space=s.space,
        )  # fmt: skip

    # One iteration ---------------------------------------------------------------------------------------------------

    def make_batch(self, raw):
        """add.Batch of what the loader gives: every network's own conditions."""
        images, captions, sizes = raw["image"].to(self.device), raw["caption"], raw["sizes"]
        n, teacher = len(images), self.teacher_backbone
        batch = Batch(images, self.backbone.with_sizes(self.backbone.text(captions), sizes))
        if teacher is not self.backbone:
            batch.teacher_cond = teacher.with_sizes(teacher.text(captions), sizes)
        if self.settings.guidance != (1.0,) or self.settings.weight == "nfsd":
            batch.null_cond = teacher.with_sizes(repeat(teacher.null(1), n), sizes)
        if self.settings.weight == "nfsd":
            batch.negative_cond = teacher.with_sizes(repeat(teacher.text([NFSD_NEGATIVE]), n), sizes)
        batch.c_text = self.text_features(captions) if self.text_features else None
        batch.c_img = self.image_features.summary(images) if self.image_features else None
        return batch

    def iteration(self, batches):
        """One step of both optimisers on a list of micro-batches; the log's tensors, and the last student's half."""
        settings, accelerator, heads = self.settings, self.accelerator, self.add.discriminator.heads
        halves, logs, n = [], [], len(batches)
        for i, batch in enumerate(batches):
            heads.train(i == 0)  # one power iteration of the spectral norm for all micro-batches, as for a whole batch
            with contextlib.nullcontext() if i == n - 1 else accelerator.no_sync(self.network):
                halves.append(half := self.add.student_half(batch, self.generator))
                gradients = watch(half)
                accelerator.backward(half.loss / n)
            half.loss, half.views = half.loss.detach(), {}
            log = student_log(half, len(self.add.teacher.schedule)) | {"student_loss": half.loss}
            logs.append(log | {name: n * x for name, x in gradients.items()})  # of the loss itself
        for i, half in enumerate(halves):
            heads.train(i == 0)
            other = self.add.discriminator_half(half)
            (other.loss / n).backward()
            logs[i] |= heads_log(other) | {"discriminator_loss": other.loss.detach()}
        self.average_heads()
        norm = accelerator.clip_grad_norm_(self.trained, settings.clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm, device=self.device)
        log = {name: torch.stack([x[name].float() for x in logs]).mean() for name in logs[0]}
        log["gradient_norm"] = norm.detach()
        log["gradient_heads"] = torch.nn.utils.get_total_norm([p.grad for p in heads.parameters()])
        self.step += 1
        if not self._is_finite(log):
            for optimizer in (self.optimizer, self.heads_optimizer):
                optimizer.zero_grad(set_to_none=True)
            return None, half
        rise = min(1.0, self.step / max(1, settings.warm_up))
        for optimizer, lr in ((self.optimizer, settings.student_lr), (self.heads_optimizer, settings.heads_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rise
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        return log, half

    def _is_finite(self, log):
        """Whether losses and gradients are numbers. If not, and too often: TrainingError, which names them. The gradients
        are every process's, so that all of them agree."""
        if torch.stack([log["gradient_norm"], log["gradient_heads"].to(log["gradient_norm"])]).isfinite().all():
            return True
        self.nonfinite += 1
        if self.nonfinite > self.settings.skip_nonfinite:
            bad = ", ".join(name for name, x in log.items() if not x.isfinite())
            last = sorted((self.folder / "checkpoints").glob("step_*[0-9]"))
            raise TrainingError(
                f"step {self.step}: not finite: {bad}; the last good checkpoint: {last[-1] if last else 'none yet'}; "
                "--skip-nonfinite N lets N such steps go by"
            )
        return False

    def average_heads(self):
        """The heads' gradients, averaged over the processes in one message."""
        if self.accelerator.num_processes > 1:
            gradients = [p.grad for p in self.add.discriminator.heads.parameters()]
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(part.view_as(g))

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def network_state(self):
        """The trainable parameters, whole and on the CPU; every process calls it, the first one has them."""
        if self.sharded:
            options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
            return dcp.get_model_state_dict(self.network, options=options)
        if not self.accelerator.is_main_process:
            return {}
        unwrapped = self.accelerator.unwrap_model(self.network, keep_torch_compile=False)
        return {k: p.detach().to("cpu", copy=True) for k, p in unwrapped.named_parameters() if p.requires_grad}

    def load_network_state(self, state):
        """The reverse of network_state; sharded, the first process has what all load."""
        if self.sharded:
            options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
            dcp.set_model_state_dict(self.network, state, options=options)
        else:
            unwrapped = self.accelerator.unwrap_model(self.network, keep_torch_compile=False)
            unwrapped.load_state_dict(state, strict=False)

    def _optimizer_options(self):
        return dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)

    def save(self):
        """folder/checkpoints/step_…: complete, or not there under that name; the last KEEP stay."""
        accelerator, target = self.accelerator, self.folder / "checkpoints" / f"step_{self.step:07d}"
        temporary = target.with_suffix(".tmp")
        network = self.network_state()
        with self.ema.swapped():
            average = self.network_state()
        inner = self.optimizer.optimizer
        if self.sharded:
            optimizer = dcp.get_optimizer_state_dict(self.network, inner, options=self._optimizer_options())
        else:
            optimizer = inner.state_dict()
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        own = {
            "data": self.loader.state_dict(), "generator": self.generator.get_state(), "torch": torch.get_rng_state(),
            "skipped": self.skipped, "nonfinite": self.nonfinite, "won": list(self.won),
        }  # fmt: skip
        if generator := getattr(self.features, "generator", None):
            own["features_generator"] = generator.get_state()
        failed = None
        try:
            if accelerator.is_main_process:
                write(temporary / "training.pt", {
                    "version": VERSION, "data": self.settings.data, "step": self.step, "processes": accelerator.num_processes,
                    "network": network, "average": average, "optimizer": optimizer,
                    "heads": self.add.discriminator.heads.state_dict(), "heads_optimizer": self.heads_optimizer.state_dict(),
                })  # fmt: skip
            write(temporary / f"process_{accelerator.process_index}.pt", own)
        except CheckpointError as error:
            failed = error
        if accelerator.reduce(torch.tensor([float(failed is not None)], device=self.device), "sum").item():  # all of them leave
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
            raise failed or CheckpointError(f"{temporary}: another process could not write its part")
        if accelerator.is_main_process:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            sync_folder(target.parent)
            for torn in target.parent.glob("step_*.tmp"):  # of saves that were killed
                shutil.rmtree(torn)
            for old in sorted(target.parent.glob("step_*[0-9]"))[:-KEEP]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def last_checkpoint(self):
        """The last checkpoint's folder of which every file is whole, or None; the first process looks for all."""
        found = [None]
        if self.accelerator.is_main_process:
            folders = sorted((self.folder / "checkpoints").glob("step_*[0-9]"), reverse=True)
            for folder in folders:
                try:
                    for file in folder.glob("*.pt"):
                        verify(file)
                    (folder / "training.pt").stat()
                except (CheckpointError, OSError) as error:
                    print(f"{one_line(error)}; looking for the checkpoint before it", file=sys.stderr, flush=True)
                else:
                    found = [str(folder)]
                    break
            if folders and found == [None]:
                found = [False]
        if (chosen := broadcast_object_list(found)[0]) is False:
            raise TrainingError(f"--resume auto: no checkpoint in {self.folder / 'checkpoints'} can be read; remove it to start over")
        return chosen

    def resume(self, where):
        """Go on from a checkpoint folder, or from the last whole one ("auto"; none there: from the start)."""
        found = where == "auto"
        if found and (where := self.last_checkpoint()) is None:
            return
        where, accelerator = Path(where), self.accelerator
        try:
            # One copy in memory for all processes of a machine; last_checkpoint() has verified what it found.
            state = read(where / "training.pt", mmap=True, check=not found)
            for name, now in (("version", VERSION), ("data", self.settings.data)):
                if state.get(name) != now:
                    raise TrainingError(f"--resume {where}: its {name} is {state.get(name)}, not {now}; start over in another --out")
            if state["processes"] != accelerator.num_processes:
                raise TrainingError(
                    f"--resume {where}: written by {state['processes']} processes, this run has {accelerator.num_processes}; start as many"
                )
            own = read(where / f"process_{accelerator.process_index}.pt")
        except CheckpointError as error:
            raise TrainingError(f"--resume {where}: {error}") from error
        try:
            self._load(state, own)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise TrainingError(f"--resume {where}: is of other networks or settings ({one_line(error)})") from error

    def _load(self, state, own):
        self.load_network_state(state["average"])
        for shadow, p in zip(self.ema.shadows, self.trained if self.ema.decay else [], strict=True):
            shadow.copy_(p.detach())
        self.load_network_state(state["network"])
        inner = self.optimizer.optimizer
        if self.sharded:
            dcp.set_optimizer_state_dict(self.network, inner, state["optimizer"], options=self._optimizer_options())
        else:
            inner.load_state_dict(state["optimizer"])
        self.add.discriminator.heads.load_state_dict(state["heads"])
        self.heads_optimizer.load_state_dict(state["heads_optimizer"])
        self.loader.load_state_dict(own["data"])
        self.generator.set_state(own["generator"])
        if "features_generator" in own:
            self.features.generator.set_state(own["features_generator"])
        torch.set_rng_state(own["torch"])
        self.step, self.skipped, self.nonfinite = state["step"], own["skipped"], own["nonfinite"]
        self.won.extend(own["won"])
        if not self.accelerator.is_main_process:
            return
        for later in (self.folder / "checkpoints").glob("step_*[0-9]"):  # what was done after the checkpoint is done again
            if int(later.name[5:]) > self.step:
                shutil.rmtree(later)
        log = self.folder / "log.jsonl"
        if log.exists():
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            write_text(log, "".join(line for line in lines if json.loads(line)["step"] <= self.step))

    # The loop --------------------------------------------------------------------------------------------------------

    def raw_batches(self):
        """As many batches of the loader as are accumulated. DataError, in one line, from whichever process."""
        if self.batches is None:
            with torch.random.fork_rng(devices=[]):  # a loader draws a seed, which a resumed run would draw once more
                self.batches = iter(self.loader)
        try:
            return [next(self.batches) for _ in range(self.settings.accumulate)]
        except data.DataError as error:  # a worker's comes with its traceback
            raise data.DataError(str(error).rstrip().splitlines()[-1].removeprefix("full.data.DataError: ")) from error

    def validate(self, half, batch):
        """Grids of the validation prompts in 1, 2 and 4 steps with the average, and of the reconstruction targets."""
        with self.ema.swapped(), torch.no_grad():
            grids = pictures.validation(self.add.student, self.backbone, self.settings)
        if self.sharded:  # a forward without a backward leaves the root's weights gathered: those of the average
            self.network.reshard()
        grids["targets"] = pictures.targets(batch, half, self.add, self.settings)
        if self.accelerator.is_main_process:
            pictures.write(grids, self.folder / "pictures", self.step)
            for tracker in self.accelerator.trackers:
                if tracker.name == "wandb":
                    tracker.log_images({name: [image] for name, image in grids.items()}, step=self.step)
                else:
                    batches = {name: image[None] for name, image in grids.items()}
                    tracker.log_images(batches, step=self.step, dataformats="NHWC")

    def log_row(self, log, speed, skipped):
        """A line of the log: the iteration's values, averaged over the processes, and the state of the run."""
        settings, accelerator = self.settings, self.accelerator
        row = {k: accelerator.reduce(v, "mean").item() for k, v in (log or {}).items()}
        row |= {"images_per_second": speed, "skipped": skipped, "nonfinite": self.nonfinite, "memory_gib": peak_memory(self.device)}
        row["discriminator_won"] = row_won = sum(self.won) > len(self.won) / 2
        if accelerator.is_main_process:
            if row_won:
                tqdm.write(f"step {self.step}: the discriminator has won: it tells 19 of 20 tokens right; lower --heads-lr than {settings.heads_lr}")
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step} | row) + "\n")
            accelerator.log(row, step=self.step)
        return row

    def run(self):
        """Train to settings.steps, then write the pipeline; returns its folder. Stopped, after saving, on SIGINT and SIGTERM."""
        settings, accelerator, main = self.settings, self.accelerator, self.accelerator.is_main_process
        bar = tqdm(initial=self.step, total=settings.steps, desc="ADD", disable=not main, smoothing=0.05)
        began, images = time.time(), 0
        with postponed_signals() as stopped, contextlib.closing(bar):
            while self.step < settings.steps:
                raw = self.raw_batches()
                self.skipped += sum(r["skipped"] for r in raw)
                log, half = self.iteration([batch := self.make_batch(r) for r in raw])
                images += settings.batch * settings.accumulate * accelerator.num_processes
                bar.update()
                # Every process has to come to the same decisions: all of them count.
                counts = torch.tensor([float(len(stopped)), float(self.skipped)], device=self.device)
                stop, skipped = accelerator.reduce(counts, "sum").tolist()
                if skipped > settings.max_bad_files:
                    raise TrainingError(f"--max-bad-files {settings.max_bad_files}: {skipped:.0f} samples could not be read, by step {self.step}")
                if log:
                    self.won.append(accelerator.reduce(log["discriminator_won"], "mean").item() > 0.5)
                if self.step % settings.log_every == 0 or self.step == settings.steps:
                    row = self.log_row(log, images / (time.time() - began), int(skipped))
                    bar.set_postfix({k: f"{row[k]:.3g}" for k in SHOWN if k in row})
                    began, images = time.time(), 0
                if settings.validate_every and self.step % settings.validate_every == 0:
                    self.validate(half, batch)
                if stop or self.step % settings.save_every == 0 or self.step == settings.steps:
                    self.save()
                if stop and self.step < settings.steps:
                    raise Stopped(stopped[0] if stopped else signal.SIGTERM)
        with self.ema.swapped():
            state = self.network_state()
        folder = self.folder / "pipeline"
        if main:
            export.save_pipeline(folder, self.backbone, state, settings)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return folder
