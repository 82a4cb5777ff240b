"""Wrong use of the response- and relation-based losses ends in one message that says what is wrong."""

from __future__ import annotations

import pytest
import torch

from distpro.losses import build_loss
from pathways.registry import UserError


@pytest.mark.parametrize(
    ("name", "student", "teacher", "params", "message"),
    [
        ("kd", [(10,)], [(100,)], {}, r"one shape, got \(10,\) \(student\) and \(100,\)"),
        ("tf_kd", [], [], {"form": "virtul"}, "did you mean 'virtual'"),
        ("logit_std", [], [], {"of": "rkd"}, "of must be kd or dkd"),
        ("logit_std", [], [], {"betta": 2}, "loss 'kd' has no parameter 'betta'"),
        ("logit_std", [], [], {"beta": 2.0}, "loss 'kd' has no parameter 'beta'"),
        ("skd", [], [], {"form": "papr"}, "did you mean 'paper'"),
        ("mlkd", [], [], {"temperatures": []}, "at least one temperature"),
        ("ctkd", [], [], {"warmup_steps": 0}, "warmup_steps must be at least 1"),
        ("hnd", [(3, 4, 4)] * 2, [(3, 4, 4)] * 2, {}, "reads one tensor per model, got 2"),
        ("ghnd", [(3, 4, 4)], [(3, 8, 8)], {}, "one shape"),
        ("fsp", [(3, 4, 4)] * 2, [(3, 8, 8), (4, 8, 8)], {}, "one shape"),
        ("fsp", [], [], {"form": "mean"}, "form must be mse or norm"),
        ("cc", [], [], {}, "one student shape per teacher shape"),
        ("cc", [(4,)], [(4,)], {"form": "gausian"}, "did you mean 'gaussian'"),
        ("crd", [(4,)], [(4,)], {}, "n_data"),
        ("crd", [(4,)], [(4,)], {"n_data": 3, "labels": [0, 1]}, "labels must be n_data = 3 numbers, got 2"),
        ("crd", [(4,)], [(4,)], {"n_data": 2, "labels": [1, 1]}, "no negatives"),
        ("sskd", [(4,)], [(4,)], {}, "logits and embedding"),
        ("srrl", [(4,)], [(5,)], {}, r"classifier, the teacher's last linear layer \(5"),
        ("srrl", [(4,)], [(5,)], {"classifier": torch.nn.Linear(4, 3)}, "classifier"),
        ("srd", [(4,)], [(5,)], {}, "logits and a feature"),
        ("dist_plus", [(4,), (3, 4, 4)], [(4,), (5, 4, 4)], {}, "one shape"),
    ],
)
def test_wrong_construction_is_explained(name, student, teacher, params, message):
    with pytest.raises(UserError, match=message):
        build_loss(name, student, teacher, **params)


@pytest.mark.parametrize(
    ("name", "params", "student", "teacher", "message"),
    [
        ("dkd", {}, (4, 5), (4, 5), "needs the labels"),
        ("kd", {"ce_weight": 0.1}, (4, 5), (4, 5), "needs the labels"),
        ("kd", {}, (4, 5), (4, 6), "one shape"),
        ("kd", {}, (4, 5, 2, 2), (4, 5, 4, 4), "one shape"),
        ("pkt", {}, (4, 5), (3, 5), "4 student and 3 teacher rows"),
        ("rkd", {}, (1, 5), (1, 5), "at least 2 samples, got 1"),
        ("skd", {}, (1, 5), (1, 5), "at least 2 samples, got 1"),
        ("cc", {"feat_dim": None}, (1, 5), (1, 5), "at least 2 samples, got 1"),
        ("cc", {"feat_dim": None}, (4, 5), (4, 6), "give feat_dim"),
        ("fsp", {}, (4, 5, 2, 2), (4, 5, 2, 2), "needs two or more"),
        ("dist_plus", {}, (4, 5), (4, 5), r"two tensors per model \(logits, map\), got 1"),
    ],
)
def test_wrong_inputs_are_explained(name, params, student, teacher, message):
    with pytest.raises(UserError, match=message):
        build_loss(name, **params)(torch.randn(student), torch.randn(teacher))


def test_crd_and_sskd_explain_what_the_batch_lacks():
    with pytest.raises(UserError, match="pass index"):
        build_loss("crd", [(4,)], [(4,)], n_data=5)(torch.randn(2, 4), torch.randn(2, 4))
    inputs = [torch.randn(4, 5), torch.randn(4, 6)]
    with pytest.raises(UserError, match="got 4 rows for 4 labels"):
        build_loss("sskd", head=False)(inputs, inputs, target=torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("name", ["fsp", "dist_plus", "srd"])
def test_tokens_where_maps_are_read_are_refused(name):
    shapes = [(10,), (17, 8)] if name != "fsp" else [(17, 8), (17, 8)]
    with pytest.raises(UserError, match=rf"{name}' reads .*map.* \(C, H, W\), got \(17, 8\)"):
        build_loss(name, shapes, shapes)
