"""Trains add.ADD on Stable Diffusion with accelerate, on one process, with DDP, or with FSDP2."""

import contextlib
import json
import math
import signal
import time

import torch
from tqdm import tqdm

from add import Batch
from common.device import peak_memory
from common.health import heads_log, student_log, watch
from common.stopping import Stopped, postponed_signals
from full import checkpoint, data, export, pictures
from full.parts import Parts, TrainingError
from full.settings import NFSD_NEGATIVE

REMEMBERED = 200  # iterations of which the log says who has won
SHOWN = ("adversarial", "distillation", "hinge", "images_per_second")  # beside the progress bar


class Trainer(Parts):
    """Iterations, and the loop around them."""

    # One iteration --------------------------------------------------------------------------------

    def make_batch(self, raw):
        """add.Batch of what the loader gives: every network's own conditions."""
        images, captions = raw["image"].to(self.device), raw["caption"]
        n, teacher, size = len(images), self.teacher_backbone, self.settings.resolution
        batch = Batch(images, self.backbone.with_sizes(self.backbone.text(captions), size))
        if teacher is not self.backbone:
            batch.teacher_cond = teacher.with_sizes(teacher.text(captions), size)
        if self.settings.teacher_guidance != 1 or self.settings.weight == "nfsd":
            batch.null_cond = self._null(n)
        if self.settings.weight == "nfsd":
            batch.negative_cond = teacher.with_sizes(teacher.repeated(NFSD_NEGATIVE, n), size)
        batch.c_text = self.text_features(captions) if self.text_features else None
        batch.c_img = self.image_features.summary(images) if self.image_features else None
        return batch

    def iteration(self, batches):
        """One step of both optimisers on a list of micro-batches: (the log's tensors, the last
        student's half). The log is None where the step was skipped: it was not finite."""
        heads, halves, logs, n = self.add.discriminator.heads, [], [], len(batches)
        for i, batch in enumerate(batches):
            # One power iteration of the spectral norm for all micro-batches, as for a whole batch.
            heads.train(i == 0)
            last = i == n - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.network):
                halves.append(half := self.add.student_half(batch, self.generator))
                gradients = watch(half)
                self.accelerator.backward(half.loss / n)
            half.loss, half.views = half.loss.detach(), {}
            log = student_log(half, len(self.add.teacher.schedule)) | {"student_loss": half.loss}
            logs.append(log | {name: n * x for name, x in gradients.items()})  # of the loss itself
        for i, half in enumerate(halves):
            heads.train(i == 0)
            other = self.add.discriminator_half(half)
            (other.loss / n).backward()
            logs[i] |= heads_log(other) | {"discriminator_loss": other.loss.detach()}
        self.average_heads()
        log = {name: torch.stack([x[name].float() for x in logs]).mean() for name in logs[0]}
        log |= self._clip()
        self.step += 1
        return (log if self._update(log) else None), half

    def _clip(self):
        """Clip the student's gradient; return the norms before clipping, for the log."""
        norm = self.accelerator.clip_grad_norm_(self.trained, self.settings.clip or math.inf)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        heads = [p.grad for p in self.add.discriminator.heads.parameters()]
        return {
            "gradient_norm": torch.as_tensor(norm, device=self.device).detach(),
            "gradient_heads": torch.nn.utils.get_total_norm(heads),
        }

    def _update(self, log):
        """Step both optimisers and the average if all is finite; return whether it was."""
        settings, finite = self.settings, self._is_finite(log)
        rise = min(1.0, self.step / max(1, settings.warm_up))
        for optimizer, lr in (
            (self.optimizer, settings.student_lr),
            (self.heads_optimizer, settings.heads_lr),
        ):
            if finite:
                for group in optimizer.param_groups:
                    group["lr"] = lr * rise
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if finite:
            self.ema.update(self.step)
        return finite

    def _is_finite(self, log):
        """Whether losses and gradients are numbers. If not, and too often: TrainingError, which
        names them. The gradients are every process's, so that all of them agree."""
        norms = log["gradient_norm"], log["gradient_heads"].to(log["gradient_norm"])
        if torch.stack(norms).isfinite().all():
            return True
        self.nonfinite += 1
        if self.nonfinite > self.settings.skip_nonfinite:
            bad = ", ".join(name for name, x in log.items() if not x.isfinite())
            good = checkpoint.saved(self.folder)
            raise TrainingError(
                f"step {self.step}: not finite: {bad}; the last good checkpoint: "
                f"{good[-1] if good else 'none yet'}; --skip-nonfinite N skips N such steps"
            )
        return False

    def average_heads(self):
        """The heads' gradients, averaged over the processes in one message."""
        if self.accelerator.num_processes > 1:
            gradients = [p.grad for p in self.add.discriminator.heads.parameters()]
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            parts = flat.split([g.numel() for g in gradients])
            for g, part in zip(gradients, parts, strict=True):
                g.copy_(part.view_as(g))

    # The loop -------------------------------------------------------------------------------------

    def run(self):
        """Train to settings.steps, then write the pipeline; returns its folder. Stopped, after
        saving, on SIGINT and SIGTERM."""
        settings, main = self.settings, self.accelerator.is_main_process
        bar = tqdm(
            initial=self.step, total=settings.steps, desc="ADD", disable=not main, smoothing=0.05
        )
        began, images = time.time(), 0
        with postponed_signals() as stopped, contextlib.closing(bar):
            while self.step < settings.steps:
                raw = self.raw_batches()
                self.skipped += sum(r["skipped"] for r in raw)
                log, half = self.iteration([batch := self.make_batch(r) for r in raw])
                images += settings.batch * settings.accumulate * self.accelerator.num_processes
                bar.update()
                # Summed over the processes, so that all of them decide alike.
                stop, skipped = self.sum_of(len(stopped), self.skipped)
                if skipped > settings.max_bad_files:
                    raise TrainingError(
                        f"--max-bad-files {settings.max_bad_files}: {skipped:.0f} samples could "
                        f"not be read, by step {self.step}"
                    )
                if log:
                    won = self.accelerator.reduce(log["discriminator_won"], "mean")
                    # Nothing is read here: that would wait for the GPU.
                    self.won = torch.cat([self.won, won[None] > 0.5])[-REMEMBERED:]
                if self.is_due(settings.log_every) or self.step == settings.steps:
                    row = self.log_row(log, images / (time.time() - began), int(skipped))
                    bar.set_postfix({k: f"{row[k]:.3g}" for k in SHOWN if k in row})
                    began, images = time.time(), 0
                if stop or self.is_due(settings.save_every) or self.step == settings.steps:
                    checkpoint.save(self)
                if self.is_due(settings.validate_every):
                    self.validate(half, batch)
                if stop and self.step < settings.steps:
                    raise Stopped(stopped[0] if stopped else signal.SIGTERM)
        return self.finish()

    def finish(self):
        """Write the pipeline, with the average of the weights; returns its folder."""
        with self.ema.swapped():
            state = checkpoint.network_state(self)
        folder = self.folder / "pipeline"
        if self.accelerator.is_main_process:
            export.save_pipeline(folder, self.backbone, state, self.settings)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return folder

    def is_due(self, every):
        """Whether this step is one of every so many; 0: none is."""
        return every > 0 and self.step % every == 0

    def sum_of(self, *numbers):
        """Numbers, each summed over the processes."""
        if self.accelerator.num_processes == 1:
            return numbers
        counts = torch.tensor(numbers, dtype=torch.float32, device=self.device)
        return self.accelerator.reduce(counts, "sum").tolist()

    def raw_batches(self):
        """As many batches of the loader as are accumulated. DataError, in one line, from whichever
        process."""
        if self.batches is None:
            # A loader draws a seed, which a resumed run would draw once more.
            with torch.random.fork_rng(devices=[]):
                self.batches = iter(self.loader)
        try:
            return [next(self.batches) for _ in range(self.settings.accumulate)]
        except data.DataError as error:  # a worker's comes with its traceback
            line = str(error).rstrip().splitlines()[-1]
            raise data.DataError(line.removeprefix("full.data.DataError: ")) from error

    def validate(self, half, batch):
        """Grids of the validation prompts in 1, 2 and 4 steps with the average, and of the
        reconstruction targets."""
        with self.ema.swapped(), torch.no_grad():
            grids = pictures.validation(self.add.student, self.backbone, self.settings)
        if self.sharded:
            # A forward without a backward leaves the root's weights gathered: those of the average.
            self.network.reshard()
        grids["targets"] = pictures.targets(batch, half, self.add, self.settings)
        if self.accelerator.is_main_process:
            pictures.write(grids, self.folder / "pictures", self.step)
            for tracker in self.accelerator.trackers:
                if tracker.name == "wandb":
                    images = {name: [image] for name, image in grids.items()}
                    tracker.log_images(images, step=self.step)
                else:
                    images = {name: image[None] for name, image in grids.items()}
                    tracker.log_images(images, step=self.step, dataformats="NHWC")

    def log_row(self, log, speed, skipped):
        """A line of the log: the iteration's values, averaged over the processes, and the state of
        the run."""
        accelerator = self.accelerator
        row = {k: accelerator.reduce(v, "mean").item() for k, v in (log or {}).items()}
        row |= {
            "images_per_second": speed,
            "skipped": skipped,
            "nonfinite": self.nonfinite,
            "memory_gib": peak_memory(self.device),
            "discriminator_won": (self.won.float().mean() > 0.5).item(),
        }
        if accelerator.is_main_process:
            if row["discriminator_won"]:
                tqdm.write(
                    f"step {self.step}: the discriminator has won: it classifies 95 % of tokens "
                    f"correctly; lower --heads-lr (now {self.settings.heads_lr})"
                )
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step} | row) + "\n")
            accelerator.log(row, step=self.step)
        return row
