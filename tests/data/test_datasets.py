"""Data sets by name: arrays, digits, CIFAR as torchvision lays it out."""

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from distpro.data import Loader, load_data, split
from pathways.registry import UserError

DATA = Path(os.environ.get("DISTPRO_DATA") or Path(__file__).parents[3] / "shared" / "data")
NAMES = ["ant", "bee", "cat"]


def arrays(count=60, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count, 4, 6, 3), np.uint8)
    y = np.arange(count) % 3
    third = count // 3
    return {"x_train": x[third:], "y_train": y[third:], "x_test": x[:third], "y_test": y[:third], "names": NAMES}


@pytest.fixture
def npz(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays())
    return tmp_path / "set.npz"


def test_npz_holds_what_was_stored(npz):
    stored, data = arrays(), load_data("npz", npz)
    for part in ("train", "test"):
        found = getattr(data, part)
        assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), stored[f"x_{part}"])
        assert np.array_equal(found.labels.numpy(), stored[f"y_{part}"])
        assert np.array_equal(found.index.numpy(), np.arange(len(stored[f"y_{part}"])))
    assert (data.names, data.num_classes, data.image_shape) == (NAMES, 3, (3, 4, 6))


def test_mean_and_std_are_those_of_the_training_images(npz):
    data, pixels = load_data("npz", npz), arrays()["x_train"] / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-12)
    assert load_data("npz", npz, mean=[0.5] * 3).mean == (0.5, 0.5, 0.5)
    assert load_data("npz", npz, mean=[0.5] * 3).std == data.std


def test_classes_and_samples(npz):
    data = load_data("npz", npz, classes=["cat", "ant"], samples=12)
    assert data.names == ["cat", "ant"]
    assert data.train.labels.bincount().tolist() == [6, 6]
    stored = torch.from_numpy(arrays()["y_train"])[data.train.index]
    assert torch.equal(stored, torch.tensor([2, 0])[data.train.labels])
    assert set(data.test.labels.tolist()) == {0, 1}


def test_names_default_to_the_labels(tmp_path):
    np.savez(tmp_path / "set.npz", **{k: v for k, v in arrays().items() if k != "names"})
    assert load_data("npz", tmp_path / "set.npz").names == ["0", "1", "2"]


def test_signature_is_plain_and_states_what_was_loaded(npz):
    signature = load_data("npz", npz).signature
    assert {k: v for k, v in signature.items() if k != "sha256"} == {
        "name": "npz", "train": 40, "test": 20, "classes": 3, "image_shape": [3, 4, 6],
    }  # fmt: skip
    assert signature == load_data("npz", npz).signature


def test_signature_tells_sets_apart(npz, tmp_path):
    swapped, renamed = arrays(), arrays()
    swapped["y_train"][[0, 1]] = swapped["y_train"][[1, 0]]
    renamed["names"] = ["ant", "bee", "cow"]
    for name, content in (("swapped", swapped), ("renamed", renamed), ("other", arrays(seed=1))):
        np.savez(tmp_path / f"{name}.npz", **content)
    loads = [load_data("npz", tmp_path / f"{name}.npz") for name in ("set", "swapped", "renamed", "other")]
    loads += [load_data("npz", npz, samples=30, seed=seed) for seed in (0, 1)]
    assert len({data.signature["sha256"] for data in loads}) == 6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.zeros((40, 4, 6, 3), np.float32)}, r"x_train must be uint8 .* got float32 \(40, 4, 6, 3\)"),
        (
            {"x_train": np.zeros((40, 4), np.uint8)},
            r"x_train must be uint8 \(N, H, W, C\) or \(N, H, W\), got uint8 \(40, 4\)",
        ),
        ({"x_train": np.zeros((40, 4, 6), np.uint8)}, r"x_train are \(4, 6, 1\), those of x_test \(4, 6, 3\)"),
        (
            {"x_train": np.zeros((40, 3, 9, 3), np.uint8)},
            r"x_train: \(40, 3, 9, 3\) may be \(N, C, H, W\) or \(N, H, W, C\)",
        ),
        ({"x_train": np.zeros((40, 1, 9, 1), np.uint8)}, r"x_train: \(40, 1, 9, 1\) may be"),
        (
            {"x_train": np.zeros((40, 5, 8, 8), np.uint8)},
            r"x_train: \(40, 5, 8, 8\) may be .*; store images as \(N, H, W, C\)",
        ),
        ({"x_test": np.zeros((20, 5, 5, 3), np.uint8)}, r"x_train are \(4, 6, 3\), those of x_test \(5, 5, 3\)"),
        ({"y_train": np.zeros(39, np.int64)}, "y_train must be 40 labels"),
        ({"y_train": np.zeros(40)}, "y_train must be 40 labels from 0, got float64"),
        ({"y_train": np.full(40, -1)}, "y_train must be 40 labels"),
        ({"names": ["ant", "bee"]}, "2 names, but the labels go up to 2"),
        ({"y_train": np.array([{}] * 40)}, "not a readable .npz of plain arrays"),
    ],
)
def test_wrong_npz(tmp_path, change, message):
    content = {k: v for k, v in {**arrays(), **change}.items() if v is not None}
    np.savez(tmp_path / "set.npz", **content)
    with pytest.raises(UserError, match=message):
        load_data("npz", tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("store", "channels"),
    [
        (lambda x: x.transpose(0, 3, 1, 2), 3),
        (lambda x: x[..., 0], 1),
        (lambda x: x[..., :1], 1),
        (lambda x: x[..., :1].transpose(0, 3, 1, 2), 1),
        (lambda x: x[..., [0, 1]], 2),
        (lambda x: x[..., [0, 1, 2, 0, 1]], 5),
    ],
    ids=["channels first", "grey", "grey, last", "grey, first", "two channels", "five channels"],
)
def test_layouts(tmp_path, store, channels):
    """Every pixel is where it was; grey images have three channels, or one if asked for."""
    stored = arrays()
    plain = {part: stored[f"x_{part}"] for part in ("train", "test")}
    stored |= {f"x_{part}": store(x) for part, x in plain.items()}
    np.savez(tmp_path / "set.npz", **stored)
    data = load_data("npz", tmp_path / "set.npz")
    shown = [0, 0, 0] if channels == 1 else [0, 1, 2, 0, 1][:channels]
    for part, x in plain.items():
        assert np.array_equal(getattr(data, part).images.permute(0, 2, 3, 1).numpy(), x[..., shown])
    assert data.image_shape == (len(shown), 4, 6) and len(data.mean) == len(shown)
    if channels == 1:
        kept = load_data("npz", tmp_path / "set.npz", channels=1)
        assert np.array_equal(kept.train.images[:, 0].numpy(), plain["train"][..., 0])
    else:
        with pytest.raises(UserError, match=f"channels is 1, but the images have {channels}"):
            load_data("npz", tmp_path / "set.npz", channels=1)


def test_channels_of_npz_are_1_or_3(npz):
    for wrong in (2, "grey"):
        with pytest.raises(UserError, match="channels"):
            load_data("npz", npz, channels=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [123.675, 116.28, 103.53]}, r"in 0-1 units.*got \[123.675, 116.28, 103.53\].*divide them by 255"),
        ({"std": [58.395, 57.12, 57.375]}, "in 0-1 units"),
        ({"mean": [0.5, 0.5, 0.5], "std": [0.5, 1.5, 0.5]}, "in 0-1 units"),
        ({"mean": [float("nan"), 0.5, 0.5]}, "mean and std must be finite"),
    ],
)
def test_mean_and_std_in_other_units(npz, options, message):
    with pytest.raises(UserError, match=message):
        load_data("npz", npz, **options)


def test_mean_and_std_that_leave_images_as_they_are(npz):
    assert load_data("npz", npz, mean=[0.0] * 3, std=[1.0] * 3).std == (1.0, 1.0, 1.0)


def test_damaged_npz(npz):
    content = npz.read_bytes()
    for cut in (b"", content[:100], content[:-30], content[:2000] + b"damage" + content[2006:]):
        npz.write_bytes(cut)
        with pytest.raises(UserError, match="set.npz: not a readable .npz"):
            load_data("npz", npz)


def test_relative_root_is_found_under_the_data_folder(npz, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("DISTPRO_DATA", raising=False)
    with pytest.raises(UserError, match=r"nothing at set.npz; \$DISTPRO_DATA is not set"):
        load_data("npz", "set.npz")
    monkeypatch.setenv("DISTPRO_DATA", str(tmp_path))
    assert load_data("npz", "set.npz").num_classes == 3
    with pytest.raises(UserError, match=f"nothing at sat.npz or at {tmp_path}/sat.npz"):
        load_data("npz", "sat.npz")


def test_wrong_names_and_options():
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        load_data("cifar-10")
    with pytest.raises(UserError, match="did you mean 'image_size'"):
        load_data("digits", imagesize=16)
    with pytest.raises(UserError, match="dataset 'npz' needs 'root'"):
        load_data("npz")


@pytest.mark.parametrize("size", [8, 16, 32])
def test_digits_are_the_digits_of_scikit_learn(size):
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    data = load_data("digits", image_size=size)
    assert data.image_shape == (3, size, size)
    images, labels = (torch.cat([getattr(s, a) for s in (data.train, data.test)]) for a in ("images", "labels"))
    repeat = size // 8
    assert torch.equal(images, images[:, :1, ::repeat, ::repeat].repeat(1, 3, 1, 1)
                       .repeat_interleave(repeat, 2).repeat_interleave(repeat, 3))  # fmt: skip
    grey = (images[:, 0, ::repeat, ::repeat].double() * 16 / 255).round().long().flatten(1)
    rows = torch.cat([grey, labels[:, None]], 1).tolist()
    assert sorted(rows) == sorted(np.column_stack([bunch.data, bunch.target]).astype(int).tolist())


def test_digits_are_split_by_class():
    data = load_data("digits")
    train, test = data.train.labels.bincount(), data.test.labels.bincount()
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert ((test - 0.2 * (train + test)).abs() < 1).all()
    assert load_data("digits", seed=1).signature == data.signature


@pytest.mark.parametrize("size", [0, 12])
def test_digits_of_an_impossible_size(size):
    with pytest.raises(UserError, match=f"multiple of 8, got {size}"):
        load_data("digits", image_size=size)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'distpro\[demo\]'"):
        load_data("digits")


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Small files of CIFAR-100's format, whose checksums are not looked at. Returns the folder and the content."""
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})
    rng = np.random.default_rng(0)
    content = {
        part: {"data": rng.integers(0, 256, (n, 3072), np.uint8), "fine_labels": [i % 2 for i in range(n)]}
        for part, n in (("train", 8), ("test", 4))
    }
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, value in {**content, "meta": {"fine_label_names": ["apple", "bear"]}}.items():
        (folder / name).write_bytes(pickle.dumps(value))
    return tmp_path, content


def test_cifar_is_read_from_its_own_layout(cifar):
    root, content = cifar
    data = load_data("cifar100", root)
    for part in ("train", "test"):
        found = getattr(data, part)
        assert np.array_equal(found.images.numpy(), content[part]["data"].reshape(-1, 3, 32, 32))
        assert found.labels.tolist() == content[part]["fine_labels"]
    assert data.names == ["apple", "bear"]
    np.testing.assert_allclose(np.array(data.mean) * 255, [125.3, 123.0, 113.9])
    np.testing.assert_allclose(np.array(data.std) * 255, [63.0, 62.1, 66.7])


def test_cifar_is_found_in_the_data_folder_without_a_root(cifar, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("DISTPRO_DATA", str(cifar[0]))
    assert len(load_data("cifar100").train) == 8


def test_missing_and_incomplete_cifar(cifar):
    root, _ = cifar
    with pytest.raises(UserError, match=r"nothing at .*/cifar-10-batches-py; unpack .* or set download: true"):
        load_data("cifar10", root)
    (root / "cifar-100-python" / "test").unlink()
    with pytest.raises(UserError, match="cifar-100-python is incomplete or damaged"):
        load_data("cifar100", root)


def read_mosaics(path):
    """Tiles of 32x32, labels and class names of a packed CIFAR file."""
    from PIL import Image

    images, labels, names = [], [], {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            label, rest = Path(name).stem.split("_", 1)
            names[int(label)] = rest.rsplit("_", 1)[0]
            mosaic = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            rows, columns = mosaic.shape[0] // 32, mosaic.shape[1] // 32
            images.append(mosaic.reshape(rows, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3))
            labels += [int(label)] * (rows * columns)
    return np.concatenate(images), np.array(labels), [names[k] for k in sorted(names)]


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar10" / "test.zip").exists(), reason="needs the CIFAR-10 pack in $DISTPRO_DATA")
def test_real_cifar_images(tmp_path):
    x, y, names = read_mosaics(DATA / "cifar10" / "test.zip")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:8000], order[8000:]
    path = tmp_path / "cifar10.npz"
    np.savez(path, x_train=x[train], y_train=y[train], x_test=x[test], y_test=y[test], names=names)
    data = load_data("npz", path, samples=2000)
    assert data.names[:3] == ["airplane", "automobile", "bird"]
    # published statistics of the CIFAR-10 training set; 2000 images estimate them
    np.testing.assert_allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=0.02)
    np.testing.assert_allclose(data.std, (0.2470, 0.2435, 0.2616), atol=0.02)

    search, validation = split(data.train, 0.8, seed=0)
    assert (len(search), len(validation)) == (1600, 400)
    loader = Loader(search, 128, mean=data.mean, std=data.std, augment=["crop", "flip"], shuffle=True, drop_last=False)
    batches = list(loader.epoch(0))
    index = torch.cat([b.index for b in batches])
    assert torch.equal(index.sort().values, search.index)
    assert torch.equal(torch.cat([b.target for b in batches]), torch.from_numpy(y[train])[index])
    pixels = torch.cat([b.inputs for b in batches]).transpose(0, 1).flatten(1)
    assert pixels.mean(1).abs().max() < 0.5 and (pixels.std(1) - 1).abs().max() < 0.3  # black borders move them
