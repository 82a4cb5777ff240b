"""Weights from files: wrappers, names of other implementations, real checkpoints, and files that do not fit."""

import argparse
import collections
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import nn

from distpro.build.models import build_network
from distpro.config.reading import read_config
from distpro.config.schema import ModelConfig
from distpro.models import build_model, load_checkpoint
from pathways import UserError

DATA = Path(os.environ.get("DISTPRO_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
CIFAR10 = {
    "resnet20": "resnet20-12fca82f.th",
    "resnet32": "resnet32-d509ac18.th",
    "resnet44": "resnet44-014dd654.th",
    "resnet56": "resnet56-4bfd9763.th",
}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def prefixed(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "best": 91.5},
        lambda state: {"model": state, "opt": {"lr": 0.1}},
        lambda state: {"net": state},
        lambda state: {"student": state},
        lambda state: {"model": {"state_dict": state}},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        lambda state: {"state_dict": prefixed("module.")(state)},
        lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        lambda state: {"epoch": 1, "model_state_dict": state, "optimizer_state_dict": {}},
        lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.")(state)},
        lambda state: {"state_dict": prefixed("model.")(state), "pytorch-lightning_version": "2"},
        lambda state: {**state, "total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, deeper=argparse.Namespace(a=[1]))},
        lambda state: {"model": state, "best": np.float64(91.2), "draws": np.random.default_rng(0).random(3)},
        lambda state: {"model": state, "optimizer": collections.defaultdict(dict, {0: {"step": 1}})},
        lambda state: {"model": state, "when": Path("a/b"), "count": collections.Counter("ab")},
        lambda state: {"model_ema": state},
    ],
)
def test_wrappers(wrap, tmp_path):
    source, target = build_model("resnet8"), build_model("resnet8")
    torch.save(wrap(source.state_dict()), tmp_path / "x.pt")
    assert load_checkpoint(target, tmp_path / "x.pt").ok
    assert same(source, target)


@pytest.mark.parametrize("name", ["x.pt", "x.tar"])
def test_guests_of_files_of_old_versions(name, tmp_path):
    source, target = build_model("resnet8"), build_model("resnet8")
    content = {"state_dict": source.state_dict(), "best": np.float32(3.5), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=False)
    assert load_checkpoint(target, tmp_path / name).ok
    assert same(source, target)


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema", "model_ema_state_dict", "averaged_model"])
@pytest.mark.parametrize(("weights", "taken"), [(None, 0), ("model", 0), ("ema", 1)])
def test_a_moving_average_beside_the_weights(averaged, weights, taken, tmp_path, capsys):
    trained, mean, target = (build_model("resnet8") for _ in range(3))
    torch.save(
        {"state_dict": trained.state_dict(), averaged: prefixed("module.")(mean.state_dict())}, tmp_path / "x.pt"
    )
    load_checkpoint(target, tmp_path / "x.pt", weights=weights)
    assert same((trained, mean)[taken], target)
    said = capsys.readouterr().err
    assert (said == "") == (weights is not None)
    assert weights is not None or f"'state_dict' is taken; it also holds a moving average, '{averaged}'" in said


@pytest.mark.parametrize(
    ("key", "weights", "message"),
    [
        ("state_dict", "ema", "holds no moving average"),
        ("model_ema", "model", "holds a moving average only, 'model_ema'"),
    ],
)
def test_weights_that_are_not_there(key, weights, message, tmp_path):
    torch.save({key: build_model("resnet8").state_dict()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        load_checkpoint(build_model("resnet8"), tmp_path / "x.pt", weights=weights)


def _with(model, name, value):
    return {**model.state_dict(), name: value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda m: {"student": m.state_dict(), "teacher": m.state_dict()}, "a student's weights and a teacher's"),
        (lambda m: _with(m, "conv1.weight", m.conv1.weight.detach() * torch.nan), "conv1.weight is not finite"),
        (
            lambda m: {name: value.to("meta") for name, value in m.state_dict().items()},
            r"conv1.weight has no values, only a shape \(device meta\)",
        ),
        (
            lambda m: _with(m, "conv1.weight", m.conv1.weight.detach().to_sparse()),
            r"conv1.weight is stored as sparse_coo: save it with .to_dense\(\)",
        ),
        (
            lambda m: _with(m, "conv1.weight", m.conv1.weight.detach().to(torch.int8)),
            "conv1.weight is int8 in the file, float32 in the model",
        ),
    ],
)
def test_weights_that_cannot_be_meant(content, message, tmp_path):
    model = build_model("resnet8")
    torch.save(content(model), tmp_path / "x.pt")
    target = build_model("resnet8")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_checkpoint(target, tmp_path / "x.pt")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model, "epoch": 3}])
def test_a_model_saved_whole(wrap, tmp_path):
    torch.save(wrap(build_model("resnet8")), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"whole object .* torch.save\(model.state_dict\(\), FILE\)"):
        load_checkpoint(build_model("resnet8"), tmp_path / "x.pt")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_one_name_of_a_tied_weight_is_enough(tmp_path):
    torch.save({"embed.weight": torch.ones(5, 3)}, tmp_path / "x.pt")
    model = Tied()
    assert load_checkpoint(model, tmp_path / "x.pt").ok
    assert model.head.weight is model.embed.weight and model.head.weight.eq(1).all()
    torch.save({}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_checkpoint(model, tmp_path / "x.pt")


def test_safetensors_in_capitals(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, target = build_model("resnet8"), build_model("resnet8")
    safetensors.save_file(source.state_dict(), tmp_path / "X.SAFETENSORS")
    load_checkpoint(target, tmp_path / "X.SAFETENSORS")
    assert same(source, target)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, target = build_model("resnet8"), build_model("resnet8")
    safetensors.save_file(source.state_dict(), tmp_path / "x.safetensors")
    load_checkpoint(target, str(tmp_path / "x.safetensors"))
    assert same(source, target)
    (tmp_path / "x.safetensors").write_bytes(b"no safetensors file")
    with pytest.raises(UserError, match="x.safetensors: cannot be read"):
        load_checkpoint(target, tmp_path / "x.safetensors")


def test_parallel_model_keeps_its_prefix(tmp_path):
    source, target = nn.DataParallel(build_model("resnet8")), nn.DataParallel(build_model("resnet8"))
    torch.save(source.state_dict(), tmp_path / "x.pt")
    load_checkpoint(target, tmp_path / "x.pt")
    assert same(source, target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs"),
    [  # ours → the name in RepDistiller's checkpoints
        ("ResNet50", {"fc.": "linear.", ".downsample.": ".shortcut."}),
        ("wrn_16_2", {"block1.": "block1.layer.", "block2.": "block2.layer.", ".shortcut.": ".convShortcut."}),
        ("vgg8", {"fc.": "classifier."}),
        ("mobilenet_v2", {"fc.": "classifier.0."}),
        ("shufflenet_v1", {"fc.": "linear."}),
        ("shufflenet_v2", {"fc.": "linear."}),
    ],
)
def test_names_of_other_implementations(name, theirs, tmp_path):
    source, target = build_model(name), build_model(name)
    state = source.state_dict()
    for ours, other in theirs.items():
        assert any(ours in key for key in state)
        state = {key.replace(ours, other): value for key, value in state.items()}
    torch.save({"model": state}, tmp_path / "x.pth")
    load_checkpoint(target, tmp_path / "x.pth")
    assert same(source, target)


def test_a_users_aliases(tmp_path):
    class Net(nn.Module):
        checkpoint_aliases = {"classifier.": "head."}

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

    torch.save({"classifier.weight": torch.ones(2, 2), "classifier.bias": torch.ones(2)}, tmp_path / "x.pt")
    net = Net()
    load_checkpoint(net, tmp_path / "x.pt")
    assert net.head.weight.eq(1).all()


@pytest.mark.parametrize("name", CIFAR10)
def test_cifar10_checkpoints(name):
    path = DATA / "checkpoints" / CIFAR10[name]
    if not path.is_file():
        pytest.skip(f"no {path} (set DISTPRO_DATA)")
    assert load_checkpoint(build_model(name, num_classes=10, shortcut="zero_pad"), path).ok


def test_cifar100_checkpoint():
    path = DATA / "checkpoints" / "cifar100_resnet56_18epochs.pt"
    if not path.is_file():
        pytest.skip(f"no {path} (set DISTPRO_DATA)")
    assert load_checkpoint(build_model("resnet56", num_classes=100), path).ok


def cifar10_test_images(per_class):
    """The first images of each class: normalised (10·n, 3, 32, 32), labels (10·n,)."""
    images, labels = [], []
    with zipfile.ZipFile(DATA / "cifar10" / "test.zip") as archive:
        for label in range(10):
            name = min(n for n in archive.namelist() if n.startswith(f"test/{label}_"))
            mosaic = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            rows, columns = mosaic.shape[0] // 32, mosaic.shape[1] // 32
            tiles = mosaic.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
            images.append(torch.from_numpy(tiles[:per_class].copy()))
            labels += [label] * per_class
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.cat(images) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.tensor(labels)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar10" / "test.zip").is_file(), reason=f"no CIFAR-10 in {DATA} (set DISTPRO_DATA)")
@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_loaded_weights_classify():
    """The file's ResNet-20 has 91.5 % on these images: 500 of them are within four standard errors, 5 points."""
    model = build_model("resnet20", num_classes=10, shortcut="zero_pad").eval()
    load_checkpoint(model, DATA / "checkpoints" / CIFAR10["resnet20"])
    images, labels = cifar10_test_images(50)
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).double().mean().item() == pytest.approx(0.915, abs=0.05)


def test_no_such_file(tmp_path):
    for name in ("absent.pt", "absent.safetensors"):
        with pytest.raises(UserError, match=f"{name}: no such file"):
            load_checkpoint(build_model("resnet8"), tmp_path / name)


def test_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    torch.save({"state_dict": Trap()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt: holds more than tensors"):
        load_checkpoint(build_model("resnet8"), tmp_path / "x.pt")
    assert not (tmp_path / "was run").exists()


def touch(path):
    Path(path).touch()


def test_code_beside_the_weights_is_not_run_either(tmp_path):
    class Trap:
        def __reduce__(self):
            return touch, (str(tmp_path / "was run"),)

    source, target = build_model("resnet8"), build_model("resnet8")
    torch.save({"state_dict": source.state_dict(), "beside": Trap()}, tmp_path / "x.pt")
    load_checkpoint(target, tmp_path / "x.pt")
    assert same(source, target) and not (tmp_path / "was run").exists()


def test_damaged_file(tmp_path):
    torch.save(build_model("resnet8").state_dict(), tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-100]):
        (tmp_path / "x.pt").write_bytes(damaged)
        with pytest.raises(UserError, match="x.pt: "):
            load_checkpoint(build_model("resnet8"), tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no state dict but list"),
        ({"epoch": 3, "weights": {}}, r"holds no state dict \(its keys: epoch, weights\)"),
        ({"model": {}}, r"holds no state dict \(its keys: none\)"),
    ],
)
def test_no_state_dict(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        load_checkpoint(build_model("resnet8"), tmp_path / "x.pt")


def test_what_does_not_fit_is_said(tmp_path):
    state = build_model("resnet8", num_classes=10).state_dict()
    del state["conv1.weight"]
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "x.pt")
    model = build_model("resnet8", num_classes=100)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(UserError) as error:
        load_checkpoint(model, tmp_path / "x.pt")
    for part in (
        "x.pt does not fit ResNet",
        "1 missing (conv1.weight)",
        "1 unexpected (more)",
        "2 of another shape (fc.weight: [10, 64] in the file, [100, 64] in the model",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    report = load_checkpoint(model, tmp_path / "x.pt", strict=False)
    assert not report.ok
    assert report.missing == ("conv1.weight",)
    assert report.unexpected == ("more",)
    assert report.mismatched == (("fc.weight", (10, 64), (100, 64)), ("fc.bias", (10,), (100,)))
    left = {"conv1.weight", "fc.weight", "fc.bias"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in left else state[name])


def test_long_lists_are_cut(tmp_path):
    torch.save(build_model("resnet14").state_dict(), tmp_path / "x.pt")
    with pytest.raises(UserError) as error:
        load_checkpoint(build_model("resnet8"), tmp_path / "x.pt")
    assert str(error.value).endswith(
        "36 unexpected (layer1.1.conv1.weight, layer1.1.bn1.weight, layer1.1.bn1.bias, ...)"
    )


# Parts


def test_a_part_begins_with_a_classifiers_weights(tmp_path, capsys):
    """torchvision's ResNet-18 file into segmentation-models-pytorch's encoder of the same names, without its head."""
    pytest.importorskip("segmentation_models_pytorch")
    classifier = build_model("torchvision:resnet18")
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    config = {"model": "smp:FPN", "params": {"encoder_name": "resnet18"}}
    config["part_checkpoints"] = {"encoder": str(tmp_path / "resnet18.pth")}
    torch.manual_seed(0)
    begun = build_network(ModelConfig(**config), {"num_classes": 3})
    torch.manual_seed(0)
    random = build_network(ModelConfig(**{**config, "part_checkpoints": {}}), {"num_classes": 3})
    theirs = classifier.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in begun.encoder.state_dict().items())
    assert same(begun.decoder, random.decoder) and not same(begun.encoder, random.encoder)
    assert "2 of its weights have no place in ResNetEncoder and are left out (fc.weight, fc.bias)" in (
        "".join(capsys.readouterr())
    )
    unloaded = build_network(ModelConfig(**config), {"num_classes": 3}, load=False)
    assert not same(unloaded.encoder, classifier)


def test_a_part_of_a_part(tmp_path, capsys):
    """The file's model holds the part at a place of its own."""
    torch.manual_seed(0)
    whole = nn.ModuleDict({"deep": nn.ModuleDict({"body": build_model("resnet8")}), "head": nn.Linear(2, 2)})
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "whole.pt")
    torch.manual_seed(1)
    body = build_model("resnet8")
    report = load_checkpoint(body, tmp_path / "whole.pt", part="encoder")
    assert same(body, whole["deep"]["body"]) and report.unexpected == ("head.weight", "head.bias")


def test_a_part_is_not_taken_for_its_neighbour(tmp_path):
    """Stages of one shape, whose names differ in their number alone."""
    torch.manual_seed(0)
    stages = nn.ModuleDict({f"layer{n}": nn.Sequential(nn.Conv2d(2, 2, 1)) for n in (1, 2, 3)})
    torch.save(stages.state_dict(), tmp_path / "stages.pt")
    for name in ("layer2", "encoder.layer3"):
        made = nn.Sequential(nn.Conv2d(2, 2, 1))
        load_checkpoint(made, tmp_path / "stages.pt", part=name)
        assert same(made, stages[name.rpartition(".")[2]])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"layer3": "resnet8.pt"}, "resnet8.pt does not fit Sequential: .* of another shape"),
        ({"layer9": "resnet8.pt"}, "no module 'layer9'"),
        ({"fc": "linear.pt"}, "does not fit Linear: 2 missing"),
        ({"layer1": "nowhere.pt"}, "part_checkpoints: nothing at nowhere.pt"),
        ({"layer1.0": "stages.pt"}, r"several parts of it have the names of 'layer1.0' \(a, b\): save the one"),
    ],
)
def test_parts_that_do_not_fit(parts, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(build_model("resnet8").state_dict(), "resnet8.pt")
    torch.save({"linear": torch.zeros(3, 2)}, "linear.pt")
    stage = build_model("resnet8x4").layer1[0]
    torch.save(nn.ModuleDict({"a": stage, "b": stage}).state_dict(), "stages.pt")
    with pytest.raises(UserError, match=message):
        build_network(ModelConfig(model="resnet8x4", part_checkpoints=parts), {})


def test_a_teacher_needs_all_of_its_weights():
    given = {"student": {"model": "resnet8"}, "teacher": {"model": "resnet8", "part_checkpoints": {"layer1": "a.pt"}}}
    with pytest.raises(UserError, match=r"teacher\.part_checkpoints: only a student has some"):
        read_config(given)
