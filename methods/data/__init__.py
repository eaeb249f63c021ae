"""Data sets by name, each in three seeded splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..names import unknown_name
from ..plugins import plugins
from ..user_code import import_callable
from .camvid import read_camvid
from .cifar import read_cifar10, read_cifar100
from .cityscapes import read_cityscapes, read_scenes
from .coco import read_box_scenes, read_coco
from .digits import read_digits
from .entry import MAX_BYTES, Data, DatasetEntry, ImageSize, Request
from .fashion_mnist import read_fashion_mnist
from .image_data import ImageData, Source, Split
from .image_folder import read_image_folder
from .in_memory import load_in_memory
from .masks import load_masks
from .own import own_images
from .split import check_fractions
from .voc import read_voc
from .voc_masks import read_voc_masks

__all__ = [
    "DATASETS",
    "MAX_BYTES",
    "Data",
    "DatasetEntry",
    "ImageData",
    "ImageSize",
    "Request",
    "Split",
    "dataset_names",
    "find_dataset",
    "load_data",
    "normalise_name",
    "own_images",
]


def _read_dota(root: Path | None) -> tuple[Source, Source | None]:
    try:
        from .dota import read_dota
    except ImportError as error:
        raise ValueError(
            "`data.name` (=dota) must find shapely, which cuts oriented boxes: "
            f"{error}. Install it with `pip install 'prune-search[detection]'`."
        ) from error
    return read_dota(root)


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(
        description="1,797 handwritten digits, grey, from scikit-learn",
        num_classes=10,
        image_size=8,
        where="inside scikit-learn",
        read=read_digits,
        crop_fraction=1 / 16,
        horizontal_flip=False,
        task="classification",
        load=load_in_memory,
    ),
    "fashion_mnist": DatasetEntry(
        description="70,000 pieces of clothing, grey",
        num_classes=10,
        image_size=28,
        where="data.root, $PRUNE_SEARCH_DATA, Debian's dataset-fashion-mnist, or a download",
        read=read_fashion_mnist,
        crop_fraction=1 / 16,
        horizontal_flip=True,
        task="classification",
        load=load_in_memory,
    ),
    "cifar10": DatasetEntry(
        description="60,000 photographs of 10 classes, colour",
        num_classes=10,
        image_size=32,
        where="data.root, $PRUNE_SEARCH_DATA, or a download",
        read=read_cifar10,
        crop_fraction=1 / 8,
        horizontal_flip=True,
        task="classification",
        load=load_in_memory,
    ),
    "cifar100": DatasetEntry(
        description="60,000 photographs of 100 classes, colour",
        num_classes=100,
        image_size=32,
        where="data.root, $PRUNE_SEARCH_DATA, or a download",
        read=read_cifar100,
        crop_fraction=1 / 8,
        horizontal_flip=True,
        task="classification",
        load=load_in_memory,
    ),
    "image_folder": DatasetEntry(
        description="your own images, one folder a class",
        num_classes=None,
        image_size=224,
        where="data.root: class folders, or train/ and test/ (or val/) that hold class folders",
        read=read_image_folder,
        crop_fraction=1 / 8,
        horizontal_flip=True,
        task="classification",
        load=load_in_memory,
    ),
    "camvid": DatasetEntry(
        description="701 street scenes of 360 x 480 pixels, 11 classes, as SegNet has them",
        num_classes=11,
        image_size=(360, 480),
        where="data.root or $PRUNE_SEARCH_DATA: train/, trainannot/ and so on",
        read=read_camvid,
        crop_fraction=0.0,
        horizontal_flip=True,
        task="segmentation",
        load=load_masks,
    ),
    "cityscapes": DatasetEntry(
        description="5,000 street scenes of 1024 x 2048 pixels, 19 classes",
        num_classes=19,
        image_size=(512, 1024),
        where="data.root or $PRUNE_SEARCH_DATA: leftImg8bit/ and gtFine/",
        read=read_cityscapes,
        crop_fraction=0.0,
        horizontal_flip=True,
        task="segmentation",
        load=load_masks,
    ),
    "voc_segmentation": DatasetEntry(
        description="2,913 photographs of Pascal VOC 2012 with masks, 21 classes",
        num_classes=21,
        image_size=(512, 512),
        where="data.root or $PRUNE_SEARCH_DATA: VOC2012/",
        read=read_voc_masks,
        crop_fraction=0.0,
        horizontal_flip=True,
        task="segmentation",
        load=load_masks,
    ),
    "scenes_segmentation": DatasetEntry(
        description="2,400 made scenes of Fashion-MNIST's clothing with masks, 11 classes",
        num_classes=11,
        image_size=128,
        where="made from Fashion-MNIST, kept in data.root or the cache",
        read=read_scenes,
        crop_fraction=0.0,
        horizontal_flip=True,
        task="segmentation",
        load=load_masks,
    ),
    "scenes": DatasetEntry(
        description="2,400 made scenes of Fashion-MNIST's clothing with boxes, 10 classes",
        num_classes=10,
        image_size=128,
        where="made from Fashion-MNIST, kept in data.root or the cache",
        read=read_box_scenes,
        crop_fraction=0.0,
        horizontal_flip=True,
        task="detection",
        load=load_in_memory,
    ),
    "coco": DatasetEntry(
        description="photographs with boxes in COCO's format, such as COCO 2017",
        num_classes=None,
        image_size=640,
        where="data.root: annotations/instances_train.json (or with a year), and images",
        read=read_coco,
        crop_fraction=0.0,
        horizontal_flip=True,
        task="detection",
        load=load_in_memory,
    ),
    "voc": DatasetEntry(
        description="photographs with boxes in the format of Pascal VOC",
        num_classes=None,
        image_size=320,
        where="data.root: Annotations/, JPEGImages/ and ImageSets/Main/, as in VOC2007",
        read=read_voc,
        crop_fraction=0.0,
        horizontal_flip=True,
        task="detection",
        load=load_in_memory,
    ),
    "dota": DatasetEntry(
        description="aerial photographs with boxes at any angle, in DOTA's format, in tiles",
        num_classes=None,
        image_size=640,
        where="data.root: train/images/ and train/labelTxt/, and the same in val/",
        read=_read_dota,
        crop_fraction=0.0,
        horizontal_flip=True,
        task="detection",
        load=load_in_memory,
    ),
}


def normalise_name(name: str) -> str:
    """`fashion-mnist` and `fashion_mnist` are one name; `module:callable` stays.

    Raises:
        ValueError: If no data set has the name.
    """
    if ":" in name or name in plugins("datasets", DATASETS):
        return name
    key = name.replace("-", "_")
    if key not in DATASETS:
        raise ValueError(unknown_name("data.name", name, dataset_names()))
    return key


def dataset_names() -> tuple[str, ...]:
    """Ours, and those of installed plug-ins."""
    return (*DATASETS, *plugins("datasets", DATASETS))


def find_dataset(name: str) -> DatasetEntry:
    """The entry of a data set: ours, a plug-in's, or what the user's `module:callable` returns.

    Raises:
        ValueError: If there is none of that name, or it is no `DatasetEntry`.
    """
    key = normalise_name(name)
    if key in DATASETS:
        return DATASETS[key]
    if ":" in key:
        found: object = import_callable(key, "data.name", "data set")
    else:
        found = plugins("datasets", DATASETS)[key].load()
    entry = _called(name, found) if callable(found) else found
    if not isinstance(entry, DatasetEntry):
        raise ValueError(
            f"`data.name` (={name}) must be a DatasetEntry, or a function without arguments that "
            f"returns one: it is a {type(entry).__name__}. Return what "
            "`prunesearch.methods.data.own_images` returns."
        )
    return entry


def _called(name: str, function: Callable[[], object]) -> object:
    try:
        return function()
    except (Exception, SystemExit) as error:  # whatever a foreign function raises
        raise ValueError(
            f"`data.name` (={name}) must be callable without arguments: it stopped with "
            f"{type(error).__name__}: {error}. Correct the function."
        ) from error


def load_data(
    name: str,
    *,
    root: str | Path | None = None,
    image_size: ImageSize | None = None,
    channels: int = 3,
    split: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    limit: int | None = None,
    memory_bytes: int = MAX_BYTES,
    workers: int = 0,
) -> Data:
    """Reads a data set.

    A data set's own test split stays the test split; `split[0] : split[1]` then divides the rest.

    Args:
        name: One of `DATASETS`, of a plug-in, or `module:callable`.
        root: Folder with the files; by default where the data set's entry says.
        image_size: Height and width in pixels, or one number for both; by default the data set's
            own.
        channels: Channels of the images: grey is repeated, RGB is turned into grey for 1.
        split: Fractions of training, validation and test images.
        seed: Seed of the split.
        limit: Most images in train and val together, for quick runs; test stays whole.
        memory_bytes: Most that the images may take in memory. More is read from disk again and
            again where that is possible (image_folder), else refused.
        workers: Processes that decode it then.

    Returns:
        The data; the same arguments give the same data on every machine. Its class is that of the
        data set's task (`ImageData` for classification).

    Raises:
        ValueError: If an argument is wrong, or the files are missing or unreadable.
    """
    name = normalise_name(name)
    entry = find_dataset(name)
    check_fractions(split)
    folder = None if root is None else Path(root).expanduser()
    size = _check_size(image_size, entry.image_size)
    request = Request(name, folder, size, channels, split, seed, limit, memory_bytes, workers)
    return entry.load(entry, request)


def _check_size(image_size: ImageSize | None, default: ImageSize) -> ImageSize:
    if image_size is None:
        return default
    sides = (image_size,) if isinstance(image_size, int) else image_size
    if min(sides) < 1:
        shown = image_size if isinstance(image_size, int) else list(image_size)
        raise ValueError(
            f"`data.image_size` (={shown}) must be at least 1: it is the height and width in "
            f"pixels. Use {default}, or leave it out."
        )
    return image_size
