"""Options and loader of each data set. To add a data set, add its dataclass here and to ``DATASETS``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from largebatch.config.augmentation import (
    ColorJitterConfig,
    ErasingConfig,
    RandAugmentConfig,
    ResizedCropConfig,
    augmentation_problems,
)
from largebatch.config.custom import Custom
from largebatch.config.options import option
from largebatch.errors import UserError

if TYPE_CHECKING:
    from largebatch.config.schema import Config


_SIDE = "the side in pixels to resize images to"


@dataclass
class ViewsConfig:
    """The two views of Barlow Twins, with the reference program's defaults. ``dataset.flip`` mirrors them too."""

    RATIO: ClassVar[tuple[float, float]] = (3 / 4, 4 / 3)  # of a crop's width to its height

    min_area: float = option(0.08, above=0, most=1)  # smallest crop, as a part of the image's area
    jitter: float = option(0.8, least=0, most=1)  # probability of changing brightness, contrast, saturation and hue
    gray: float = option(0.2, least=0, most=1)  # probability of removing colours
    blur: list[float] = option([1.0, 0.1], least=0, most=1, length=2)  # Gaussian blur, probability per view
    solarize: list[float] = option([0.0, 0.2], least=0, most=1, length=2)  # the same for inverting bright pixels


@dataclass
class DatasetConfig:
    """Options of every data set.

    ``loader`` names the function that returns training split, test split and class names. ``needs`` describes the
    options that can't be None. ``root_decides`` is True if ``root`` decides the images, and so the run's identity.
    ``copies`` is the number of training images in succession that come from one source; a validation set takes all or
    none of them. ``in_files`` is True if the images are encoded in files.
    """

    loader: ClassVar[str] = ""
    needs: ClassVar[dict[str, str]] = {}
    root_decides: ClassVar[bool] = False
    copies: ClassVar[int] = 1
    in_files: ClassVar[bool] = False

    name: str = MISSING
    root: str = "data"  # folder of the files or of the download
    download: bool = True  # download missing files if there is a network
    verify: bool = True  # compare files with published checksums, and check that every image can be read
    workers: int = option(2, least=0)  # decoding processes per rank, for images decoded while training
    location: str = option("auto", allowed=("auto", "device", "host"))  # of the pixels; auto: the device if they fit
    on_error: str = option("stop", allowed=("stop", "skip"))  # for unreadable images: stop, or skip and count them
    val_fraction: float = option(0.0, least=0, below=1)  # part of the training set held out as validation set
    train_size: int | None = option(None, least=1)  # images; None: unknown before loading
    test_size: int | None = option(None, least=1)
    num_classes: int | None = option(None, least=2)
    channels: int = option(3, allowed=(1, 3))  # 1: grey
    image_size: int | None = option(None, least=1, most=8192)  # side in pixels after resizing; None: the data set's own
    # Side in pixels to resize to before a crop of image_size: the centre, or a random resized crop. None: image_size.
    resize_size: int | None = option(None, least=1, most=8192)
    # Per channel, of pixels in 0..1; None: measure them on training images.
    mean: list[float] | None = option(None, least=0, most=1)
    std: list[float] | None = option(None, above=0)
    crop_padding: int = option(4, least=0)  # pixels of padding before a random crop; 0: off
    flip: bool = True  # random horizontal flip
    rotation: float = option(15.0, least=0, most=180)  # random rotation, degrees to either side; 0: off
    resized_crop: ResizedCropConfig = field(default_factory=ResizedCropConfig)
    color_jitter: ColorJitterConfig = field(default_factory=ColorJitterConfig)
    rand_augment: RandAugmentConfig = field(default_factory=RandAugmentConfig)
    erasing: ErasingConfig = field(default_factory=ErasingConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    # Images at an epoch's end that don't fill a batch. carry: they open the next epoch's first batch; keep: the last
    # batch is smaller; drop: they are left out.
    last_batch: str = option("carry", allowed=("carry", "keep", "drop"))
    default_epochs: int = option(100, least=1)  # without `epochs`, `steps` and a length of the mode's own

    @property
    def label(self) -> str:
        """Name of the data set in the names of runs."""
        return self.name

    @property
    def train_images(self) -> int | None:
        """Number of training images without the validation set; None: unknown before loading."""
        if self.train_size is None:
            return None
        return self.copies * round(self.train_size // self.copies * (1 - self.val_fraction))

    def side_of_crop(self, side: int) -> int:
        """Return the side of the network's images, which are cropped from images of ``side`` pixels."""
        return side if self.resize_size is None or self.image_size is None else self.image_size

    def needed(self, key: str) -> int:
        """Return an option of ``needs``. Raise a ``UserError`` if it is None."""
        value: int | None = getattr(self, key)
        if value is None:
            raise UserError(self._lacks(key))
        return value

    def _lacks(self, key: str) -> str:
        return f"dataset.{key}=null: dataset={self.name} needs {self.needs.get(key, 'a value')}"

    def check_sizes(self, train_size: int, test_size: int, num_classes: int) -> None:
        """Raise a ``UserError`` if the user gave a size that isn't that of the files.

        A data set's own default may differ from the files.
        """
        for key, size in {"train_size": train_size, "test_size": test_size, "num_classes": num_classes}.items():
            given = getattr(self, key)
            if given not in (None, size, getattr(type(self), key)):
                raise UserError(f"dataset.{key}={given}: the files have {size:,}. Fix: leave it out")

    def validation_sizes(self, sizes: Sequence[int]) -> list[int]:
        """Return the number of held-out sources of each class, for classes of ``sizes`` sources.

        Raises:
            UserError: if a class would have no source on one side.
        """
        count = sum(sizes) - round(sum(sizes) * (1 - self.val_fraction))
        try:
            return held_out(sizes, count)
        except UserError as error:
            raise UserError(f"dataset.val_fraction={self.val_fraction}: {error}") from None

    def problems(self, config: Config) -> list[str]:
        """Return one line for each conflict between options, or with the batch size."""
        problems = [self._lacks(key) for key in self.needs if getattr(self, key) is None]
        problems += [
            f"dataset.{key}={values}: must have one number per channel (dataset.channels={self.channels})"
            for key, values in {"mean": self.mean, "std": self.std}.items()
            if None not in (values, self.channels) and len(values or ()) != self.channels
        ]
        side = self.image_size or type(self).image_size
        if side is not None and self.crop_padding > side:
            problems.append(
                f"dataset.crop_padding={self.crop_padding}: some crops would have nothing of an image of "
                f"dataset.image_size={side}. Fix: at most {side}"
            )
        problems += augmentation_problems(self, config.mode.views)
        left = self.train_images if 0 <= self.val_fraction < 1 else None
        if left is not None and config.batch_size > left:
            without = " without the validation set" if self.val_fraction else ""
            problems.append(
                f"batch_size={config.batch_size}: larger than the training set; "
                f"{self.name} has {left} images{without}. Fix: batch_size={left} or less"
            )
        return problems


def held_out(sizes: Sequence[int], count: int) -> list[int]:
    """Return the number of held-out images of each class, ``count`` in all, for classes of ``sizes`` images.

    A class of n images gives ``n * count / N``, rounded down. The classes with the largest remainders give one more
    image each, until there are ``count`` (if remainders are equal, the first class).

    Raises:
        UserError: if a class would have no image on one side.
    """
    images = sum(sizes)
    held = [size * count // images for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda label: -(sizes[label] * count % images))
    for label in by_remainder[: count - sum(held)]:
        held[label] += 1
    for label, (size, part) in enumerate(zip(sizes, held, strict=True)):
        if size and part in (0, size):
            nothing = "the training set" if part else "the held-out part"
            raise UserError(
                f"holding out {count} of {images} images leaves no image of class {label}, which has {size}, in "
                f"{nothing}"
            )
    return held


@dataclass
class Digits(DatasetConfig):
    """scikit-learn's digits: 1,797 grey images of 8x8."""

    loader = "largebatch.data.builtin:load_digits"

    on_error: str = option("stop", allowed=("stop",))  # the images are in one file
    train_size: int | None = option(1437, allowed=(1437,))
    test_size: int | None = option(360, allowed=(360,))
    num_classes: int | None = option(10, allowed=(10,))
    channels: int = option(1, allowed=(1,))
    image_size: int | None = option(8, least=1, most=8192)


@dataclass
class DeformedDigits(Digits):
    """70,000 grey images of 16x16, made from scikit-learn's digits."""

    loader = "largebatch.data.deformed_digits:load_deformed_digits"
    copies = 40

    train_size: int | None = option(60_000, allowed=(60_000,))
    test_size: int | None = option(10_000, allowed=(10_000,))
    image_size: int | None = option(16, least=1, most=8192)


@dataclass
class Cifar10(DatasetConfig):
    """CIFAR-10: RGB images of 32x32."""

    loader = "largebatch.data.cifar:load_cifar"

    on_error: str = option("stop", allowed=("stop",))  # the images are in a few files
    train_size: int | None = option(50_000, least=1)
    test_size: int | None = option(10_000, least=1)
    num_classes: int | None = option(10, least=2)
    channels: int = option(3, allowed=(3,))
    image_size: int | None = option(32, least=1, most=8192)


@dataclass
class Cifar100(Cifar10):
    """CIFAR-100: RGB images of 32x32, with the fine classes."""

    num_classes: int | None = option(100, least=2)


@dataclass
class TinyImageNet(DatasetConfig):
    """Tiny ImageNet: RGB images of 64x64. Its labelled validation images are the test set."""

    loader = "largebatch.data.imagefolder:load_tinyimagenet"
    in_files = True

    train_size: int | None = option(100_000, least=1)
    test_size: int | None = option(10_000, least=1)
    num_classes: int | None = option(200, least=2)
    image_size: int | None = option(64, least=1, most=8192)


@dataclass
class ImageFolder(DatasetConfig):
    """Images in folders ``root/train/<class>/...`` and ``root/test/<class>/...``."""

    loader = "largebatch.data.imagefolder:load_imagefolder"
    in_files = True
    needs: ClassVar[dict[str, str]] = {"image_size": _SIDE}
    root_decides = True

    root: str = "data/imagefolder"
    image_size: int | None = option(64, least=1, most=8192)

    @property
    def label(self) -> str:
        return Path(self.root).name


@dataclass
class Arrow(ImageFolder):
    """Images in Arrow shards, the folder of ``save_to_disk`` of Hugging Face datasets."""

    loader = "largebatch.data.imagefolder:load_arrow"

    root: str = "data/arrow"


@dataclass
class ImageNet(DatasetConfig):
    """ImageNet-1k (ILSVRC 2012) as class folders."""

    loader = "largebatch.data.imagefolder:load_imagefolder"
    in_files = True
    needs: ClassVar[dict[str, str]] = {"image_size": _SIDE}

    root: str = "data/imagenet"
    train_size: int | None = option(1_281_167, least=1)
    test_size: int | None = option(50_000, least=1)
    num_classes: int | None = option(1000, least=2)
    image_size: int | None = option(224, least=1, most=8192)


@dataclass
class Synthetic(DatasetConfig):
    """Random images and labels for timing, by default in CIFAR-10's shape."""

    loader = "largebatch.data.builtin:load_synthetic"
    needs = dict.fromkeys(("train_size", "test_size", "num_classes", "image_size"), "a number")

    train_size: int | None = option(50_000, least=1)
    test_size: int | None = option(10_000, least=1)
    num_classes: int | None = option(10, least=2)
    on_error: str = option("stop", allowed=("stop",))  # there are no files
    image_size: int | None = option(32, least=1, most=8192)


@dataclass
class CustomDataset(Custom, DatasetConfig):
    """Any images in memory: ``target(**options)`` returns training data, test data and class names."""

    loader = "largebatch.data.custom:load_custom"
    group = "dataset"
    keys = ("root",)
    root_decides = True

    root: str = ""  # passed to the target if it isn't empty
    on_error: str = option("stop", allowed=("stop",))
    channels: int | None = option(None, allowed=(1, 3))  # type: ignore[assignment]  # None: those of the images


DATASETS: dict[str, type[DatasetConfig]] = {
    "digits": Digits,
    "deformed_digits": DeformedDigits,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "tinyimagenet": TinyImageNet,
    "imagefolder": ImageFolder,
    "arrow": Arrow,
    "imagenet": ImageNet,
    "synthetic": Synthetic,
}
LIBRARIES: dict[str, type[DatasetConfig]] = {"custom": CustomDataset}


def dataset_kind(dataset: Mapping[str, Any]) -> type[DatasetConfig] | None:
    """Return the dataclass of the data set's part of a configuration, or None if its name is unknown."""
    return LIBRARIES.get(str(dataset.get("library"))) or DATASETS.get(dataset["name"])
