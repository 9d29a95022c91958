"""`ImageData`: images read from anywhere, cut to size, binarised and split into train, validation and test."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from pyrogaps.errors import InputError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Binarisation: TypeAlias = Literal["static", "stochastic", "continuous"]

# Images turned into floats at once, so that memory beyond the result stays small.
BLOCK = 4096
# Each has its own stream of draws.
PARTS = ("train", "test", "validation")


class GreyImages(NamedTuple):
    """Images as they are read, each array `(N, *image_shape)`: bytes from 0 to 255, bools, or floats from 0 to 1."""

    train: Array
    test: Array
    validation: Array | None = None


@dataclass(kw_only=True, eq=False)
class ImageData(ABC):
    """Images in `.train`, `.test` and perhaps `.validation`: float tensors `(N, *image_shape)`, values from 0 to 1.

    Args:
        binarisation: "static" sets a pixel to 1 where its grey value g exceeds 1/2, "stochastic" draws each pixel
            once from Bernoulli(g), "continuous" keeps g. Colour images have one such value per channel.
        seed: of the stochastic draws; an image's do not depend on how many images are asked for.
        num_train: how many training images, from the first on; None for all.
        num_validation: how many validation images; None for all of the set's own, if it has any, else for none.
            A set that has none of its own gives up its last training images for them.
        num_test: how many test images, from the first on; None for all.

    Raises `InputError` for a setting out of range, and for files that cannot be used.
    """

    binarisation: Binarisation = "static"
    seed: int = 0
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None
    train: Tensor = field(init=False, repr=False)
    validation: Tensor | None = field(init=False, repr=False)
    test: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.binarisation not in get_args(Binarisation):
            known = ", ".join(get_args(Binarisation))
            raise InputError(f"{self.name}: binarisation is one of {known}, got '{self.binarisation}'")
        if self.seed < 0:
            raise InputError(f"{self.name}: seed is 0 or more, got {self.seed}")
        grey = self._cut(self.read())
        self.train, self.test = self._pixels(grey.train, "train"), self._pixels(grey.test, "test")
        self.validation = None if grey.validation is None else self._pixels(grey.validation, "validation")

    @abstractmethod
    def read(self) -> GreyImages:
        """All the images there are; raises `InputError` where they cannot be read."""

    @property
    def name(self) -> str:
        """What messages call the data set."""
        return type(self).__name__

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image: `(height, width)`, or `(channels, height, width)` in colour."""
        return tuple(self.train.shape[1:])

    def _cut(self, grey: GreyImages) -> GreyImages:
        """The images asked for."""
        train, test, validation = grey
        if validation is None and self.num_validation:
            if not 0 < self.num_validation < len(train):
                raise InputError(
                    f"{self.name}: num_validation is taken from the {len(train)} training images "
                    f"and must leave some, got {self.num_validation}"
                )
            train, validation = np.split(train, [len(train) - self.num_validation])
        if validation is not None:
            validation = None if self.num_validation == 0 else self._first("num_validation", validation)
        return GreyImages(self._first("num_train", train), self._first("num_test", test), validation)

    def _first(self, setting: str, images: Array) -> Array:
        number: int | None = getattr(self, setting)
        if number is not None and not 1 <= number <= len(images):
            raise InputError(f"{self.name}: {setting} is from 1 to the {len(images)} images there are, got {number}")
        return images[:number]

    def _pixels(self, images: Array, part: str) -> Tensor:
        """`images`, binarised, as a float tensor of the same shape."""
        # NumPy promises that RandomState's stream never changes, which it does not of its newer generators.
        random = np.random.RandomState([self.seed, PARTS.index(part)])
        pixels = torch.empty(images.shape, dtype=torch.get_default_dtype())
        for start in range(0, len(images), BLOCK):
            block = grey_values(images[start : start + BLOCK])
            if self.binarisation == "static":
                block = block > 0.5
            elif self.binarisation == "stochastic":
                block = random.random_sample(block.shape) < block
            pixels[start : start + BLOCK] = torch.from_numpy(block)
        return pixels


def grey_values(images: Array) -> Array:
    """`images`, as `GreyImages` holds them, as floats from 0 to 1."""
    return images / 255.0 if images.dtype == np.uint8 else images.astype(np.float64)
