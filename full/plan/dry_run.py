"""full/train.py's own iteration on torch's meta device, where tensors have shapes and no values:
operations and live bytes of every part. The method and the networks run as they are. Only
what meta tensors lack is modelled: autocast and fused attention.
"""

import contextlib
import dataclasses
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from add import ADD, Student
from common.meter import Meter
from full.backbones import Float32Conv2d, make_student_denoiser, make_teacher
from full.parts import Ema
from full.plan.architectures import META, MetaBackbone, MetaTextFeatures, vit
from full.plan.labels import HEADS, Labelled
from full.settings import torch_dtype

aten = torch.ops.aten


def _norm(x, *statistics):
    return torch.empty_like(x), x.new_empty(statistics), x.new_empty(statistics)


def _norm_backward(x, weight, mask):
    return tuple(
        torch.empty_like(t) if wanted else None
        for t, wanted in zip((x, weight, weight), mask, strict=True)
    )


SHAPES = {  # outputs for which torch's own meta functions take half of the time
    aten.addmm.default: lambda bias, a, b: a.new_empty(len(a), b.shape[1]),
    aten.native_layer_norm.default: lambda x, shape, *_: _norm(
        x, *x.shape[: -len(shape)], *[1] * len(shape)
    ),
    aten.native_group_norm.default: lambda x, w, b, n, c, size, groups, eps: _norm(x, n, groups),
    aten.native_layer_norm_backward.default: lambda g, x, s, m, r, w, b, mask: _norm_backward(
        x, w, mask
    ),
    aten.native_group_norm_backward.default: lambda g, x, m, r, w, n, c, s, groups, mask: (
        _norm_backward(x, w, mask)
    ),
}


class MetaMeter(Meter):
    """A Meter that starts in part HEADS, and works out shapes faster."""

    def __init__(self):
        super().__init__(HEADS)

    def compute(self, func, args, kwargs):
        """Run the operation, or work out its shapes."""
        return SHAPES.get(func, func)(*args, **kwargs)


def fused_attention():
    """A context where attention never holds the N×N matrix, as on CUDA. A mask changes neither
    bytes nor operations."""
    kernel = aten._scaled_dot_product_flash_attention
    return mock.patch.object(
        F, "scaled_dot_product_attention", lambda q, k, v, *args, **kwargs: kernel(q, k, v)[0]
    )


class Autocast:
    """What accelerate's bf16 autocast does to a float32 network: layers that multiply take bf16,
    and keep the cast of a trained weight until forward ends; norms give float32. meter() counts the
    casts as copies."""

    def __init__(self, network, meter):
        self.forward, self.meter, self.casts, self.inside = network.forward, meter, {}, False
        for m in network.modules():
            if isinstance(m, nn.Linear):
                m.forward = lambda x, m=m: F.linear(
                    x.bfloat16(), self.cast(m.weight), self.cast(m.bias)
                )
            elif isinstance(m, nn.Conv2d) and not isinstance(m, Float32Conv2d):
                m.forward = lambda x, m=m: m._conv_forward(
                    x.bfloat16(), self.cast(m.weight), self.cast(m.bias)
                )
            elif isinstance(m, (nn.GroupNorm, nn.LayerNorm)):
                m.forward = lambda x, m=m: type(m).forward(m, x.float())
        network.forward = self

    def __call__(self, *args):
        self.inside = True
        out = self.forward(*args).float()
        self.casts, self.inside = {}, False
        return out

    def cast(self, p):
        """p in bfloat16; kept until the call ends if it needs a gradient, as torch.autocast keeps
        it. None stays None."""
        if p is None or p.dtype == torch.bfloat16:
            return p
        if p in self.casts:
            return self.casts[p]
        cast = p.bfloat16()
        self.meter().add(cast, "copies")
        if self.inside and p.requires_grad:
            self.casts[p] = cast
        return cast


class DryRun(Labelled):
    """A Trainer whose networks have no weights. whole_gradients: they stay between iterations, as
    DDP's buckets do. cuda: the optimisers work as on CUDA, on all tensors at once; else as on
    CPUs."""

    def __init__(self, settings, whole_gradients=False, cuda=True):
        # Neither of these changes a shape.
        settings = dataclasses.replace(settings, zero_snr="false", features_crop=0.0)
        self.settings, self.device, self.step, self.generator = settings, META, 0, None
        self.whole_gradients, self.meter = whole_gradients, None
        frozen = torch_dtype(settings.precision)
        self.accelerator = SimpleNamespace(
            num_processes=1,
            process_index=0,
            no_sync=lambda m: contextlib.nullcontext(),
            backward=torch.Tensor.backward,
            clip_grad_norm_=nn.utils.clip_grad_norm_,
        )
        self.backbone = self.teacher_backbone = MetaBackbone(settings.backbone, frozen)
        if settings.teacher and settings.teacher != settings.backbone:
            self.teacher_backbone = MetaBackbone(settings.teacher, frozen)
        with META:
            self.latents = [
                b.load_latents(settings) for b in (self.backbone, self.teacher_backbone)
            ]
            student = Student(
                make_student_denoiser(self.backbone, self.latents[0], settings), settings.timesteps
            )
            teacher = make_teacher(self.teacher_backbone, self.latents[1])
        discriminator = self._make_discriminator(frozen, teacher)
        discriminator.heads.to(META)  # late: spectral norm starts with many small steps
        # Whether two backbones share latents, their weights would tell: the dearer is assumed.
        shared = self.backbone is self.teacher_backbone
        self.add = ADD(student, teacher, discriminator, self._make_config(shared)).train()
        self.network, heads = student.denoiser.network, list(discriminator.heads.parameters())
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.ema = Ema(self.trained, settings.ema)
        self.heads_optimizer, self.heads_states = adam(torch.optim.Adam, heads, cuda)
        if settings.optimizer == "adamw":
            self.optimizer, self.states = adam(torch.optim.AdamW, self.trained, cuda)
        else:
            # bitsandbytes: two bytes a parameter, two float32 for each block of 256, no temporary.
            self.optimizer = torch.optim.SGD(self.trained, foreach=False)
            sizes = (2 * p.numel() + 8 * -(-p.numel() // 256) for p in self.trained)
            self.states = [torch.empty(size, dtype=torch.uint8, device=META) for size in sizes]
        # What Float32Conv2d does, without autocast.
        for last in (self.network.unet.conv_out, teacher.network.unet.conv_out):
            last.forward = lambda x, m=last: m._conv_forward(
                x.float(), m.weight.float(), m.bias.float()
            )
        if settings.precision == "bf16":
            Autocast(self.network, lambda: self.meter)
        self.label_parts()

    def _make_features(self, dtype, teacher):
        s = self.settings
        if s.features == "teacher":
            return super()._make_features(dtype, teacher)
        return vit(s.features, dtype, s.features_size, "features")

    def _make_conditions(self, dtype):
        s = self.settings
        text = MetaTextFeatures(s.c_text, dtype) if s.c_text != "none" else None
        return text, vit(s.c_img, dtype, 0, "c-img") if s.c_img != "none" else None

    def _is_finite(self, log):
        return True  # what has no value cannot be asked

    # Measuring ------------------------------------------------------------------------------------

    def frozen(self):
        """Every network that has no gradient. Of the U-Nets only the teacher's is kept."""
        networks = [self.add.discriminator.features, *(latents.decoder for latents in self.latents)]
        networks += [self.image_features, self.text_features and self.text_features.network]
        networks += [self.teacher_backbone.pipe.unet]
        networks += [
            n for b in (self.backbone, self.teacher_backbone) for n in (b.pipe.vae, *b.texts)
        ]
        return [n for n in networks if n]

    def measure(self, batch):
        """({(part, precision): operations}, {part: {kind: bytes at its peak}}, {"half", "inputs":
        bytes}) of an iteration of one micro-batch; the last: what the student's half hands on, and
        what it was given."""
        self.meter, heads, size = (
            MetaMeter(),
            self.add.discriminator.heads,
            self.settings.resolution,
        )
        buckets = [torch.empty_like(p) for p in self.trained] if self.whole_gradients else []
        for p, bucket in zip(self.trained, buckets or [None] * len(self.trained), strict=True):
            p.grad = bucket
        for kind, tensors in {
            "frozen": [t for n in self.frozen() for t in (*n.parameters(), *n.buffers())],
            "weights": self.network.parameters(),
            "gradients": buckets,
            "optimiser": self.states,
            "average": self.ema.shadows,
            "heads": [*heads.parameters(), *heads.buffers(), *self.heads_states],
        }.items():
            for t in tensors:
                self.meter.add(t, kind)
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p, kind=kind: self.meter.add(p.grad, kind))
            for kind, parameters in (("gradients", self.trained), ("heads", heads.parameters()))
            for p in parameters
        ]
        with self.meter, fused_attention():
            raw = {"image": torch.empty(batch, 3, size, size, device=META), "caption": [""] * batch}
            inputs = self.make_batch(raw)
            _, half = self.iteration([inputs])
        for hook in hooks:
            hook.remove()
        handed = {name: x for name, x in vars(half).items() if x is not inputs.x_0}
        return (
            self.meter.flops,
            self.meter.peaks,
            {"half": size_of(handed), "inputs": size_of(vars(inputs))},
        )


def adam(kind, parameters, foreach):
    """(optimiser, its states), as in the middle of a run. foreach needs a temporary as large as the
    parameters."""
    optimizer = kind(parameters, foreach=foreach)
    for p in parameters:
        moments = {name: torch.empty_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0)} | moments
    return optimizer, [state[name] for state in optimizer.state.values() for name in moments]


def size_of(x):
    """Bytes of the tensors in nested dictionaries and lists."""
    if torch.is_tensor(x):
        return x.untyped_storage().nbytes()
    return (
        sum(map(size_of, x.values() if isinstance(x, dict) else x))
        if isinstance(x, (dict, list))
        else 0
    )
