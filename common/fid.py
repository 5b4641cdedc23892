"""FID as others measure it."""

from pickle import UnpicklingError

import torch

from common.errors import brief


def load_fid(path):
    """torchmetrics' FID on torch-fidelity's 2048 Inception features, resized as in the original,
    that is, without antialiasing. path: a file of its weights; empty: they are downloaded.
    ValueError where they cannot be had."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        missing = f"needs {error.name}; python -m pip install -r full/requirements.txt"
        raise ValueError(f"--inception: {missing}") from error
    try:
        # Read here first, for the library unpickles anything: what passes is weights and nothing
        # else.
        if path:
            torch.load(path, map_location="cpu", weights_only=True)
        else:
            torch.hub.load_state_dict_from_url(
                url, map_location="cpu", check_hash=True, weights_only=True
            )
        options = {"antialias": False, "reset_real_features": False}
        return FrechetInceptionDistance(feature_extractor_weights_path=path or None, **options)
    except (
        OSError,
        RuntimeError,
        LookupError,
        EOFError,
        UnpicklingError,
        AttributeError,
        TypeError,
    ) as error:
        where = f"{path}: no Inception weights" if path else "(automatic): the download failed"
        raise ValueError(
            f"--inception {where} ({brief(error)}); fetch {url} and name that file"
        ) from error
