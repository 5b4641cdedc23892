"""The discriminator's feature network F: a small network trained on the run's data, the teacher's
own encoder, or one that others have trained.

Each maps images (B, C, H, W) in [-1, 1] to token maps [(B, N_k, C_k)]. It has `channels`, the list
of C_k, and `summary(images)`, an embedding (B, width) of whole images: c_img.
"""

import copy

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from add import randn_like
from common.augment import AUGMENTATIONS
from common.features import noised
from toy.loop import fit
from toy.networks import ConvNet, ViT
from toy.pretrained import DinoV2, EfficientNet

NOISE = 0.6  # most that an F which denoises is shown
TRAINED = ("classifier", "denoiser", "convolutional", "dino")  # what is trained here
PRETRAINED = {"dinov2": DinoV2, "efficientnet": EfficientNet}
DINO_MOMENTUM = 0.98  # of the moving average of weights, for hundreds of steps


class TeacherEncoder(nn.Module):
    """The frozen teacher's down path and middle on diffused images, as in LADD (Sauer et al. 2024)
    and DMD2.

    Images are diffused to t drawn uniformly from 0…599, each to its own, and get the empty
    condition. The draws have a generator of their own, which a resumed run restores. Maps of the
    finest resolution are folded 2×2 into channels: as they are, their heads would cost more than
    all the others together, and without them one step is softer.
    """

    def __init__(self, teacher, seed):
        super().__init__()
        self.teacher, network = teacher.eval(), teacher.network
        self.generator = torch.Generator(teacher.schedule.alpha.device).manual_seed(seed)
        channels = network.map_channels
        self.finest = network.blocks  # how many maps have the finest resolution
        self.channels = [4 * c for c in channels[: self.finest]] + channels[self.finest :]
        self.width = self.channels[-1]

    def _maps(self, x_t, t):
        return self.teacher.network.encode(x_t, t, torch.full_like(t, self.teacher.network.classes))

    def forward(self, images):
        z = self.teacher.encode(images)
        maps = self._maps(*noised(self.teacher.schedule, z, self.generator))
        maps[: self.finest] = [functional.pixel_unshuffle(x, 2) for x in maps[: self.finest]]
        return [rearrange(x, "b c h w -> b (h w) c") for x in maps]

    def summary(self, images):
        """(B, width): the middle's map of the image itself (t = 0, no noise), averaged over
        positions."""
        t = torch.zeros(len(images), dtype=torch.long, device=images.device)
        z, nothing = self.teacher.encode(images), torch.zeros_like(images)
        x_t = self.teacher.schedule.diffuse(z, nothing, t)
        return self._maps(x_t, t)[-1].mean((2, 3))


def make_features(stage):
    """(F, seconds), F frozen and on the device; (None, 0) where it is the teacher's encoder, which
    needs a teacher."""
    kind = stage.settings.features
    if kind == "teacher":
        return None, 0.0
    if kind in PRETRAINED:
        network, seconds = PRETRAINED[kind]().to(stage.device), 0.0
    else:
        network, seconds = make_network(stage), 0.0
    if kind == "dino":
        seconds = train_dino(stage, network)
    elif kind in TRAINED:
        seconds = train_to_classify(stage, network)
    return network.requires_grad_(False).eval(), seconds


def make_network(stage):
    """An untrained F for the data, on the device."""
    data, settings = stage.data, stage.settings
    torch.manual_seed(settings.seed_of("features"))
    channels, size, width = *data.train_images.shape[1:3], settings.features_width
    if settings.features == "convolutional":
        return ConvNet(channels, width).to(stage.device)
    vit = ViT(channels, size, settings.features_patch, width, settings.features_depth)
    return vit.to(stage.device)


def add_noise(images, generator):
    """Each image plus unit noise times a draw from 0…NOISE."""
    scale = NOISE * torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator)
    return images + scale * randn_like(images, generator)


def patches_of(images, patch):
    """(B, N, C patch²): the pixels that each of a ViT's tokens stands for, in the tokens' order."""
    return functional.unfold(images, patch, stride=patch).mT


def train(stage, networks, loss_of):
    """Fit networks, F first, to loss_of (loop.fit); returns the seconds."""
    return fit(stage, "features", "features F", networks, loss_of, lr=1e-3, weight_decay=0.05)


def train_to_classify(stage, network):
    """Train F's summary to name the class; returns the seconds.

    A "denoiser", a ViT, is shown noisy images besides. Each patch token learns to give its clean
    patch, and the summary to hold the whole clean image.
    """
    classes, image = len(stage.data.classes), stage.data.train_images[0]
    classify = nn.Linear(network.width, classes)
    if stage.settings.features != "denoiser":

        def loss_of(images, labels, generator):
            logits = classify(network.summary(images))
            return {"loss": functional.cross_entropy(logits, labels)}

        return train(stage, [network, classify], loss_of)

    rebuild = nn.Sequential(nn.Linear(network.width, 256), nn.GELU(), nn.Linear(256, image.numel()))
    patch = nn.Linear(network.width, len(image) * network.patch**2)

    def denoising_loss_of(images, labels, generator):
        tokens = network.states(add_noise(images, generator))[-1]
        summary, patches = tokens[:, 0], patches_of(images, network.patch)
        log = {"class": functional.cross_entropy(classify(summary), labels)}
        log["rebuild"] = functional.mse_loss(rebuild(summary), images.flatten(1))
        log["patch"] = functional.mse_loss(patch(tokens[:, 1:]), patches)
        return log | {"loss": 0.1 * log["class"] + 4 * log["rebuild"] + 4 * log["patch"]}

    return train(stage, [network, classify, rebuild, patch], denoising_loss_of)


def dino_loss(predicted, given, center):
    """DINO's cross-entropy (Caron et al. 2021, Eq. 1 and 4), a scalar, from the logits (B, K) of
    one view and the average network's of another; temperatures 0.1 and 0.04."""
    given = ((given - center) / 0.04).softmax(1)
    return -(given * (predicted / 0.1).log_softmax(1)).sum(1).mean()


def train_dino(stage, network, prototypes=256):
    """Train a ViT without labels by self-distillation (DINO); returns the seconds.

    Two augmented views of an image, as DiffAugment makes them, should get one code from the network
    and from its moving average. The average's codes are centred, so that they differ between
    images.
    """
    width = network.width
    head = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, prototypes)).to(
        stage.device
    )
    online = nn.Sequential(network, head)
    average = copy.deepcopy(online).requires_grad_(False)
    center = nn.Parameter(torch.zeros(prototypes, device=stage.device), requires_grad=False)

    def logits(networks, view):
        return networks[1](networks[0].summary(view))

    def loss_of(images, labels, generator):
        views = []
        for _ in range(2):
            view = images
            for augment in AUGMENTATIONS.values():
                view = augment(view, generator)
            views.append(view)
        with torch.no_grad():
            for mine, its in zip(average.parameters(), online.parameters(), strict=True):
                mine.lerp_(its, 1 - DINO_MOMENTUM)
            given = [logits(average, view) for view in views]
            mean = torch.cat(given).mean(0)
        predicted = [logits(online, view) for view in reversed(views)]
        pairs = zip(predicted, given, strict=True)
        loss = sum(dino_loss(p, g, center) for p, g in pairs) / 2
        center.lerp_(mean, 0.1)
        return {"loss": loss}

    holder = nn.ParameterList([center])
    return train(stage, [online, average, holder], loss_of)
