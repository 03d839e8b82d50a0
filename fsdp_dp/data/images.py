"""Images with labels: `digits` of scikit-learn, the data sets of torchvision; and any image as the tensor a model takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fsdp_dp.data.config import DataConfig
from fsdp_dp.data.rows import LabelledRows, fingerprint, held_out_names
from fsdp_dp.models.config import ImageModel

if TYPE_CHECKING:
    from PIL.Image import Image

INSTALL = "pip install 'fsdp-dp[data]'"


class ImageReader:
    """From a PIL image to float32 [channels, size, size], from -1 to 1: constants that do not depend on the data."""

    def __init__(self, channels: int, size: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"model.channels must be 1 (grey) or 3 (RGB) for images from files, found {channels}.")
        self.mode, self.channels, self.size = {1: "L", 3: "RGB"}[channels], channels, size

    def __call__(self, image: Image) -> Tensor:
        image = image.convert(self.mode)
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(self.size, self.size, self.channels).permute(2, 0, 1).float() / 127.5 - 1


def digits(config: DataConfig, model: ImageModel) -> tuple[LabelledRows, LabelledRows]:
    """1797 grey images of 8 x 8 pixels, ten classes, enlarged or repeated to what the model takes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f"data=digits needs the package scikit-learn: {INSTALL}") from error
    bunch = load_digits()
    held_out = held_out_names([fingerprint(image.tobytes()) for image in bunch.images], config.held_out_fraction)
    sides = [fingerprint(image.tobytes()) in held_out for image in bunch.images]
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    size, channels = model.image_size, model.channels
    if size != 8:
        images = F.interpolate(images, (size, size), mode="bilinear")
    images = images.expand(-1, channels, -1, -1)
    labels = bunch.target.tolist()
    train, test = ([i for i, side in enumerate(sides) if side is wanted] for wanted in (False, True))
    return LabelledRows(images, labels, train), LabelledRows(images, labels, test)


def torchvision_sets(config: DataConfig, model: ImageModel) -> tuple[LabelledRows, LabelledRows]:
    """A data set of torchvision that is already in the folder `data.path`: its training and its test part."""
    try:
        from torchvision import datasets
    except Exception as error:  # a build for another torch ends in a RuntimeError
        raise ValueError(
            f"data=torchvision needs the package torchvision, of the release that belongs to torch {torch.__version__} "
            f"({type(error).__name__}: {error}): see pytorch.org, or use data=hf_image, which does without"
        ) from error
    kind = getattr(datasets, str(config.name), None)
    if kind is None:
        raise ValueError(f"data.name={config.name}: torchvision.datasets has no such class, such as CIFAR10 or MNIST.")
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        parts: Sequence[dict[str, Any]] = ({"train": True}, {"train": False})
    elif "split" in parameters:
        parts = ({"split": "train"}, {"split": "test"})
    else:
        raise ValueError(f"data.name={config.name} has no training and test part; take one that has, or data=hf_image.")
    read = ImageReader(model.channels, model.image_size)
    try:
        train, test = (_labelled(kind(root=config.path, **part), read) for part in parts)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"data.path={config.path}: torchvision finds no {config.name} there ({error}). Fetch it once, where there is a "
            f'network: python -c "from torchvision.datasets import {config.name} as D; '
            f'D({config.path!r}, download=True)"'
        ) from error
    return train, test


def _labelled(dataset: Any, read: ImageReader) -> LabelledRows:
    labels = getattr(dataset, "targets", None)
    labels = getattr(dataset, "labels", None) if labels is None else labels
    if labels is None:
        labels = [label for _, label in dataset]
    return LabelledRows(dataset, [int(label) for label in labels], range(len(dataset)), lambda pair: read(pair[0]))
