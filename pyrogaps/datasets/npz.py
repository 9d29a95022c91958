"""A user's own images in a NumPy archive."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from pyrogaps.datasets.folder import locate, reading
from pyrogaps.datasets.images import Array, GreyImages, ImageData
from pyrogaps.errors import InputError


@dataclass(kw_only=True, eq=False)
class NPZ(ImageData):
    """Images in an npz file, as `np.savez("mine.npz", train=..., test=...)` writes it.

    An array is `(N, *image_shape)` and holds integers from 0 to 255, zeros and ones (of any type), or floats from
    0 to 1.

    Args:
        path: the file; where it is not found from the current folder, it is looked for in the data folder.
        train_key: name of the training images in the file.
        test_key: name of the test images.
        validation_key: name of the validation images; None where the file has none.
        channels_last: whether images are stored as `(height, width, channels)`; they are given channels first.
        data_root: the data folder; None takes the environment variable PYROGAPS_DATA.
    """

    path: str
    train_key: str = "train"
    test_key: str = "test"
    validation_key: str | None = None
    channels_last: bool = False
    data_root: str | None = None

    def read(self) -> GreyImages:
        path = locate(self.name, self.path, self.data_root)
        with reading(self.name, path, "is it whole, and an npz file?"), path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array and no names")
            train, test = self._array(path, file, self.train_key), self._array(path, file, self.test_key)
            validation = None if self.validation_key is None else self._array(path, file, self.validation_key)
        for key, images in ((self.test_key, test), (self.validation_key, validation)):
            if images is not None and images.shape[1:] != train.shape[1:]:
                raise InputError(
                    f"{self.name}: {path}: images in '{key}' have shape {images.shape[1:]}, "
                    f"those in '{self.train_key}' {train.shape[1:]}"
                )
        return GreyImages(train, test, validation)

    def _array(self, path: Path, file: "np.lib.npyio.NpzFile", key: str) -> Array:
        if key not in file.files:
            near = get_close_matches(key, file.files, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(file.files) or 'none'}"
            raise InputError(f"{self.name}: {path} has no array '{key}'; {hint}")
        images = file[key]
        problem = _problem(images)
        if self.channels_last and not problem and images.ndim != 4:
            problem = f"channels_last needs arrays (N, height, width, channels), got shape {images.shape}"
        if problem:
            raise InputError(f"{self.name}: array '{key}' of {path} cannot be used: {problem}")
        return _canonical(np.moveaxis(images, -1, 1) if self.channels_last else images)


def _problem(images: Array) -> str | None:
    """Why `images` is no array of images, if it is not."""
    if images.ndim < 2 or images.size == 0:
        return f"images are (N, *image_shape) with at least one pixel, got shape {images.shape}"
    if images.dtype.kind not in "biuf":
        return f"expected numbers, got {images.dtype}"
    if not np.isfinite(images).all():
        return "it has NaN or infinite values"
    low, high, limit = images.min(), images.max(), 1 if images.dtype.kind == "f" else 255
    if low < 0 or high > limit:
        kind = "floats" if images.dtype.kind == "f" else "integers"
        return f"grey values are {kind} from 0 to {limit}, got {low} to {high}"
    return None


def _canonical(images: Array) -> Array:
    """`images` in one of the types of `GreyImages`."""
    if images.dtype.kind not in "iu":
        return images
    return images.astype(bool) if images.max() <= 1 else images.astype(np.uint8)
