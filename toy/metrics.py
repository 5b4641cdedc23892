"""Measures of generated images, in the features of a small classifier trained apart
(networks.MetricNet).

None of them is FID: the feature space is this toy's own, so values compare only within one run
folder's metric network.
"""

import math
import statistics

import torch
from torch.nn import functional

from common.augment import AUGMENTATIONS
from toy.data import to_float
from toy.loop import fit
from toy.networks import MetricNet

NEIGHBOURS = 5  # k of the k-NN precision and recall
GROUPS = 10  # of the jackknife
# 97.5 % quantiles of Student's t distribution, by degrees of freedom.
STUDENT_T = dict(
    enumerate((12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=1)
)


def train_metric_net(stage):
    """The classifier whose features the metrics use, trained on the training images; returns
    (network, seconds)."""
    data, settings, device = stage.data, stage.settings, stage.device
    torch.manual_seed(settings.seed_of("metric"))
    channels, classes = data.train_images.shape[1], len(data.classes)
    network = MetricNet(channels, classes, settings.metric_width, settings.metric_depth).to(device)
    network(to_float(data.train_images[:2]).to(device))  # gives the lazy layer its size

    def loss_of(images, labels, generator):
        for name in settings.metric_augment:
            images = AUGMENTATIONS[name](images, generator)
        return {"loss": functional.cross_entropy(network(images), labels)}

    label, decay = "metric network", 0.01
    seconds = fit(stage, "metric", label, [network], loss_of, lr=2e-3, weight_decay=decay)
    return network.eval().requires_grad_(False), seconds


@torch.no_grad()
def embed(network, images, device, batch=500):
    """(features (N, 64), predicted classes (N,)) of float images, both on the CPU."""
    features, classes = [], []
    for chunk in images.split(batch):
        f = network.features(chunk.to(device))
        features.append(f.cpu())
        classes.append(network.classify(f).argmax(1).cpu())
    return torch.cat(features), torch.cat(classes)


def frechet_distance(x, y):
    """‖μ_x - μ_y‖² + tr(Σ_x + Σ_y - 2 (Σ_x Σ_y)^½) of two feature sets (N, D), (M, D) (Heusel et
    al. 2017)."""
    x, y = x.double(), y.double()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    # The product of two positive semidefinite matrices has real eigenvalues of at least 0; rounding
    # may disagree.
    root_trace = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return (apart + cov_x.trace() + cov_y.trace() - 2 * root_trace).item()


def coverage_of(x, manifold, k=NEIGHBOURS):
    """Share of x (N, D) within the k-NN balls of manifold's points (M, D): Kynkäänniemi et al.
    2019."""
    # The k-th neighbour of a point in its own set: the nearest is the point itself.
    radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values
    return (torch.cdist(x, manifold) <= radius).any(1).float().mean().item()


def within_class_variance(x, labels):
    """Mean over the classes of the total variance of x (N, …) among the samples of that class.
    Classes of one sample do not count; nan if there are no others."""
    classes, counts = labels.unique(return_counts=True)
    variances = [x[labels == c].flatten(1).var(0).sum() for c in classes[counts > 1]]
    return torch.stack(variances).mean().item() if variances else math.nan


def margin(metric, x):
    """Half of the 95 % confidence interval of metric(x) over samples x (N, …): the jackknife, which
    leaves out a tenth of x at a time (Efron & Tibshirani 1993, §11).

    A bootstrap draws some samples twice. That adds to a Fréchet distance, and k-NN metrics then
    count a sample as its own neighbour.
    """
    parts = x.tensor_split(GROUPS)  # in a row, so that all classes stay equally frequent
    without = [metric(torch.cat([*parts[:i], *parts[i + 1 :]])) for i in range(GROUPS)]
    return STUDENT_T[GROUPS - 1] * (GROUPS - 1) / math.sqrt(GROUPS) * statistics.stdev(without)


def closeness(features, real_features):
    """{"fd", "precision", "recall"} of generated features (N, D). Precision and recall use as many
    real ones as there are generated ones, if there are so many: both depend on the number."""
    real = real_features[: len(features)]
    return {
        "fd": frechet_distance(features, real_features),
        "precision": coverage_of(features, real),
        "recall": coverage_of(real, features),
    }


def measure(network, images, labels, real_features, device):
    """All metrics of generated images with the class they were asked for: closeness and the rest.
    fd_margin, recall_margin: see margin."""
    features, predicted = embed(network, images, device)
    real = real_features[: len(features)]
    return closeness(features, real_features) | {
        "fd_margin": margin(lambda x: frechet_distance(x, real_features), features),
        "accuracy": (predicted == labels).float().mean().item(),
        "recall_margin": margin(lambda x: coverage_of(real, x), features),
        "variance_pixels": within_class_variance(images, labels),
        "variance_features": within_class_variance(features, labels),
    }
