"""The data sets: shapes, binarisation, splits, and what is said of files that cannot be used."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets.utils import calculate_md5

from pyrogaps.datasets import CIFAR10, MNIST, NPZ, Digits, FashionMNIST, GreyImages, ImageData
from pyrogaps.errors import InputError

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


class Ramp(ImageData):
    """2,000 training images of 3 x 4 pixels with every grey value from 0 to 1, and some to test."""

    def read(self) -> GreyImages:
        grey = np.tile(np.linspace(0.0, 1.0, 12).reshape(3, 4), (2000, 1, 1))
        return GreyImages(grey, grey[:30], None)


class Half(ImageData):
    """Two images that are grey all over."""

    def read(self) -> GreyImages:
        return GreyImages(np.full((2, 3), 0.5), np.full((2, 3), 0.5))


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No data folder but the one a test names."""
    if "data_root" not in request.fixturenames:
        monkeypatch.delenv("PYROGAPS_DATA", raising=False)


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def write_idx(path: Path, images: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.array([0x0803, *images.shape], dtype=">u4")
    path.write_bytes(header.tobytes() + images.tobytes())


def refused(build: Callable[[], Any]) -> str:
    """The one line with which `build` refuses its input."""
    with pytest.raises(InputError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder with an MNIST of 50 training and 20 test images."""
    write_idx(tmp_path / "MNIST/raw" / TRAIN, random_bytes(50, 28, 28))
    write_idx(tmp_path / "MNIST/raw" / TEST, random_bytes(20, 28, 28))
    return tmp_path


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a CIFAR-10 of 10 images a file, whose checksums torchvision is told."""
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, calculate_md5(folder / name)]

    images = {"data": random_bytes(10, 3 * 32 * 32), "labels": [0] * 10}
    names = [f"data_batch_{number}" for number in range(1, 6)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write(name, images) for name in names])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", images)])
    _, checksum = write("batches.meta", {"label_names": ["cat"]})
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksum}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path


# Digits, and what all image data have in common.


def test_digits_are_binary_and_split() -> None:
    digits = Digits()
    assert digits.name == "Digits"
    assert digits.train.shape == (1400, *digits.image_shape) == (1400, 8, 8)
    assert digits.test.shape == (397, 8, 8)
    assert digits.validation is None
    assert set(digits.train.unique().tolist()) == {0.0, 1.0}


def test_digits_come_shuffled_each_once() -> None:
    from sklearn.datasets import load_digits

    digits = Digits(binarisation="continuous")
    ours = torch.cat([digits.train, digits.test]).flatten(1) * 16
    theirs = torch.from_numpy(load_digits().data)
    assert not torch.equal(ours, theirs.float())
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_static_threshold_is_above_a_half() -> None:
    image = Ramp(binarisation="static").train[0].flatten()
    assert image.tolist() == [0.0] * 6 + [1.0] * 6
    assert Half().train.sum() == 0


def test_continuous_keeps_the_grey_values() -> None:
    image = Ramp(binarisation="continuous").train[7].flatten()
    torch.testing.assert_close(image, torch.linspace(0.0, 1.0, 12))


def test_stochastic_pixels_are_bernoulli_of_their_grey_value() -> None:
    data = Ramp(binarisation="stochastic", seed=3)
    grey = torch.linspace(0.0, 1.0, 12).reshape(3, 4)
    assert set(data.train.unique().tolist()) == {0.0, 1.0}
    standard_error = (grey * (1 - grey) / len(data.train)).sqrt()
    # 10 pixels at 4.5 standard errors: such a test fails once in 15,000 seeds. Black and white leave no error.
    assert ((data.train.mean(0) - grey).abs() <= 4.5 * standard_error).all()
    # Draws of one pixel in successive images are independent: their correlation is within 4.5 of 1/sqrt(N).
    pixel = data.train[:, 1, 1] - data.train[:, 1, 1].mean()
    correlation = (pixel[1:] * pixel[:-1]).mean() / pixel.var()
    assert abs(correlation) < 4.5 / len(pixel) ** 0.5


def test_stochastic_draws_follow_the_seed_and_not_the_subset() -> None:
    data = Ramp(binarisation="stochastic", seed=1)
    assert torch.equal(data.train, Ramp(binarisation="stochastic", seed=1).train)
    assert torch.equal(data.train[:17], Ramp(binarisation="stochastic", seed=1, num_train=17, num_test=2).train)
    assert not torch.equal(data.train, Ramp(binarisation="stochastic", seed=2).train)
    assert not torch.equal(data.train[:30], data.test)


def test_draws_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Ramp(binarisation="stochastic").train
    monkeypatch.setattr("pyrogaps.datasets.images.BLOCK", 7)
    assert torch.equal(Ramp(binarisation="stochastic").train, whole)


def test_validation_is_the_end_of_the_training_images() -> None:
    whole = Digits(binarisation="continuous")
    split = Digits(binarisation="continuous", num_train=100, num_validation=300, num_test=5)
    assert split.validation is not None
    assert torch.equal(split.train, whole.train[:100])
    assert torch.equal(split.validation, whole.train[-300:])
    assert torch.equal(split.test, whole.test[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_have_the_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    assert Digits(num_train=2).train.dtype is dtype


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_train": 1401}, "Digits: num_train must be from 1 to 1400, got 1401"),
        ({"num_train": 0}, "Digits.num_train: must be a whole number of at least 1"),
        ({"num_test": -1}, "Digits.num_test: must be a whole number of at least 1"),
        ({"num_validation": 1400}, "num_validation must be from 0 to 1399"),
        ({"num_validation": -5}, "got -5"),
        ({"num_validation": 1000, "num_train": 401}, "num_train must be from 1 to 400"),
        (
            {"binarisation": "dynamic"},
            "Digits.binarisation: must be one of static, stochastic, continuous, got 'dynamic'",
        ),
        ({"seed": -1}, "Digits.seed: must be a whole number of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    assert said in refused(lambda: Digits(**settings))


# torchvision's sets.


def test_mnist_reads_idx_files(mnist: Path) -> None:
    data = MNIST(data_root=str(mnist), binarisation="continuous")
    assert data.train.shape == (50, 28, 28)
    assert data.test.shape == (20, 28, 28)
    torch.testing.assert_close(data.train, torch.from_numpy(random_bytes(50, 28, 28)) / 255)
    # Of bytes, 128 is the least above a half.
    assert torch.equal(MNIST(data_root=str(mnist)).train, (data.train * 255 >= 127.9).float())


def test_folder_comes_from_the_environment(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYROGAPS_DATA", str(mnist))
    assert len(MNIST().train) == 50
    message = refused(lambda: MNIST(data_root=str(mnist / "elsewhere")))
    assert str(mnist / "elsewhere/MNIST/raw" / TRAIN) in message


def test_missing_folder_file_and_name_are_said(mnist: Path) -> None:
    remedies = ("--data_root", "PYROGAPS_DATA", "--download")
    unnamed = refused(lambda: MNIST())
    assert f"MNIST/raw/{TRAIN}" in unnamed and all(remedy in unnamed for remedy in remedies)
    other = refused(lambda: FashionMNIST(data_root=str(mnist)))
    assert other.startswith(f"FashionMNIST: there is no file {mnist / 'FashionMNIST/raw' / TRAIN}. ")
    assert all(remedy in other for remedy in remedies)
    (mnist / "MNIST/raw" / TEST).unlink()
    assert f"no file {mnist / 'MNIST/raw' / TEST}" in refused(lambda: MNIST(data_root=str(mnist)))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "not an idx file of images (0 bytes)"),
        (9, "not an idx file"),
        (5000, "truncated: 5000 bytes instead of 39216"),
    ],
)
def test_truncated_idx_is_refused(mnist: Path, size: int, said: str) -> None:
    path = mnist / "MNIST/raw" / TRAIN
    path.write_bytes(path.read_bytes()[:size])
    message = refused(lambda: MNIST(data_root=str(mnist)))
    assert message.startswith(f"MNIST: cannot read {path}: ") and said in message and "--download" in message


def test_other_files_under_mnists_name_are_refused(mnist: Path) -> None:
    path = mnist / "MNIST/raw" / TRAIN
    path.write_bytes(b"<!DOCTYPE html> no such page here")
    assert "not an idx file" in refused(lambda: MNIST(data_root=str(mnist)))
    write_idx(path, random_bytes(50, 28, 28))
    path.write_bytes(path.read_bytes() + b"more")
    assert "39220 bytes instead of 39216" in refused(lambda: MNIST(data_root=str(mnist)))


def test_unreadable_file_is_refused(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", deny)
    message = refused(lambda: MNIST(data_root=str(mnist)))
    assert f"cannot read {mnist / 'MNIST/raw' / TRAIN}: Permission denied. " in message


def test_download_only_fetches_what_is_missing(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def unreachable(root: Path, download: bool) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(datasets, "MNIST", unreachable)
    assert len(MNIST(data_root=str(mnist), download=True).train) == 50
    (mnist / "MNIST/raw" / TEST).unlink()
    message = refused(lambda: MNIST(data_root=str(mnist), download=True))
    assert message == f"MNIST: cannot download to {mnist}: no network at all"


def test_cifar_is_given_channels_first(cifar: Path) -> None:
    data = CIFAR10(data_root=str(cifar), binarisation="continuous")
    assert data.train.shape == (50, 3, 32, 32) == (50, *data.image_shape)
    expected = torch.from_numpy(random_bytes(10, 3 * 32 * 32).reshape(10, 3, 32, 32)) / 255
    torch.testing.assert_close(data.test, expected)
    assert torch.equal(CIFAR10(data_root=str(cifar)).test, (expected > 0.5).float())


def test_damaged_or_missing_cifar_is_refused(cifar: Path) -> None:
    path = cifar / "cifar-10-batches-py/data_batch_4"
    path.write_bytes(path.read_bytes()[:1000])
    message = refused(lambda: CIFAR10(data_root=str(cifar)))
    assert message.startswith(f"CIFAR10: cannot read {path}: it is damaged or truncated")
    path.unlink()
    message = refused(lambda: CIFAR10(data_root=str(cifar)))
    assert message.startswith(f"CIFAR10: there is no file {path}. ")
    assert "contains cifar-10-batches-py/" in message


# A user's own file.


@pytest.mark.parametrize(
    "images",
    [
        np.array([[0, 51], [255, 102]], dtype=np.uint8),
        np.array([[0, 51], [255, 102]], dtype=np.int64),
        np.array([[0.0, 0.2], [1.0, 0.4]], dtype=np.float32),
    ],
    ids=["bytes", "integers", "floats"],
)
def test_npz_reads_grey_values_of_any_type(tmp_path: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "mine.npz", train=images, test=images[:1])
    data = NPZ(path=str(tmp_path / "mine.npz"), binarisation="continuous")
    torch.testing.assert_close(data.train, torch.tensor([[0.0, 0.2], [1.0, 0.4]]))
    assert data.test.shape == (1, *data.image_shape) == (1, 2)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float64])
@pytest.mark.parametrize("binarisation", ["static", "stochastic", "continuous"])
def test_npz_takes_zeros_and_ones_as_they_are(tmp_path: Path, dtype: type, binarisation: Any) -> None:
    images = np.array([[0, 1], [1, 0]], dtype=dtype)
    np.savez(tmp_path / "mine.npz", train=images, test=images)
    data = NPZ(path=str(tmp_path / "mine.npz"), binarisation=binarisation)
    assert data.train.tolist() == [[0, 1], [1, 0]]


def test_npz_keys_channels_and_validation(tmp_path: Path) -> None:
    images = random_bytes(9, 4, 5, 3)
    np.savez_compressed(tmp_path / "mine.npz", a=images, b=images[:4], c=images[4:7])
    keys = {"train_key": "a", "test_key": "b", "validation_key": "c"}
    settings = {**keys, "channels_last": True, "binarisation": "continuous", "data_root": str(tmp_path)}
    data = NPZ(path="mine.npz", **settings)
    assert data.image_shape == (3, 4, 5)
    assert data.validation is not None
    torch.testing.assert_close(data.validation, torch.from_numpy(images[4:7]).permute(0, 3, 1, 2) / 255)
    fewer = NPZ(path="mine.npz", **settings, num_validation=2)
    assert fewer.validation is not None
    assert torch.equal(fewer.validation, data.validation[:2])
    assert torch.equal(fewer.train, data.train)
    assert NPZ(path="mine.npz", **settings, num_validation=0).validation is None


@pytest.mark.parametrize(
    ("arrays", "settings", "said"),
    [
        ({"train": random_bytes(2, 3)}, {}, "has no array 'test'. Its arrays: train"),
        ({"train_images": random_bytes(2, 3)}, {"train_key": "train_image"}, "Did you mean 'train_images'?"),
        ({"train": random_bytes(5)}, {}, "array 'train' of {path} cannot be used: expected shape (N, *image_shape)"),
        ({"train": np.ones((0, 3))}, {}, "got (0, 3)"),
        ({"train": np.array([["a", "b"]])}, {}, "expected numbers"),
        ({"train": np.array([[0.0, np.nan]])}, {}, "NaN or infinite"),
        ({"train": np.array([[0.0, 1.5]])}, {}, "floats from 0 to 1, got 0.0 to 1.5"),
        ({"train": np.array([[-1, 200]])}, {}, "integers from 0 to 255, got -1 to 200"),
        ({"train": random_bytes(2, 3)}, {"channels_last": True}, "channels_last needs arrays"),
        (
            {"train": random_bytes(2, 3), "test": random_bytes(2, 4)},
            {},
            "'test' have shape (4,), but those in 'train' have shape (3,)",
        ),
        ({"train": np.array([[None]], dtype=object)}, {}, "cannot read {path}"),
    ],
)
def test_npz_that_holds_no_images_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], settings: dict[str, Any], said: str
) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    message = refused(lambda: NPZ(path=str(path), **settings))
    assert message.startswith("NPZ: ") and str(path) in message
    assert said.format(path=path) in message


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_npz_is_refused(tmp_path: Path, save: Callable[..., None], share: float) -> None:
    path = tmp_path / "mine.npz"
    save(path, train=random_bytes(100, 8), test=random_bytes(100, 8))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert refused(lambda: NPZ(path=str(path))).startswith(f"NPZ: cannot read {path}: ")


def test_damaged_or_other_file_under_npzs_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, train=random_bytes(100, 8), test=random_bytes(100, 8))
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF
    path.write_bytes(content)
    assert "CRC" in refused(lambda: NPZ(path=str(path)))
    with path.open("wb") as file:
        np.save(file, random_bytes(3, 4))
    assert "it contains a single array" in refused(lambda: NPZ(path=str(path)))


def test_missing_npz_names_every_place_looked_in(tmp_path: Path) -> None:
    message = refused(lambda: NPZ(path="mine.npz", data_root=str(tmp_path)))
    assert message.startswith(f"NPZ: there is no file mine.npz or {tmp_path / 'mine.npz'}. ")
    assert re.search("--data_root.*PYROGAPS_DATA", message)
    assert "no file mine.npz. " in refused(lambda: NPZ(path="mine.npz"))


# The real files, where they are at hand.


@pytest.mark.parametrize(("data_set", "mean", "bright"), [(MNIST, 0.1307, 0.1), (FashionMNIST, 0.2860, 0.2)])
def test_real_images_have_the_known_mean(data_root: Path, data_set: type[MNIST], mean: float, bright: float) -> None:
    if not (data_root / data_set.__name__).is_dir():
        pytest.skip(f"no {data_set.__name__} in PYROGAPS_DATA")
    data = data_set(data_root=str(data_root), binarisation="continuous", num_test=1000)
    assert data.train.shape == (60000, 28, 28)
    assert data.test.shape == (1000, 28, 28)
    # The known mean is given to four digits.
    assert data.train.double().mean().item() == pytest.approx(mean, abs=5e-5)
    binary = data_set(data_root=str(data_root), num_train=5000).train
    assert torch.equal(binary, (data.train[:5000] > 0.5).float())
    assert bright < binary.mean() < bright + 0.2


def test_real_photographs_in_an_npz(data_root: Path) -> None:
    if not (data_root / "cifar10-jpeg-subset.npz").is_file():
        pytest.skip("no cifar10-jpeg-subset.npz in PYROGAPS_DATA")
    keys = {"train_key": "train_images", "test_key": "test_images"}
    data = NPZ(path="cifar10-jpeg-subset.npz", **keys, channels_last=True, binarisation="continuous")
    assert data.train.shape == (10000, 3, 32, 32)
    # The subset was drawn at random: its mean is within a few standard errors of CIFAR-10's.
    of_image = data.train.mean((2, 3))
    standard_error = of_image.std(0) / len(of_image) ** 0.5
    assert ((of_image.mean(0) - torch.tensor([0.4914, 0.4822, 0.4465])).abs() < 4 * standard_error).all()
