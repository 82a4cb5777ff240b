"""Golden cases of the response- and relation-based losses: file -> ``Case``."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.losses.golden import Arrays, Case


def _logits(loss: str, target: bool = False, **params) -> Case:
    return Case(loss, ("logits_s",), ("logits_t",), params, target="labels" if target else None)


def _embeddings(loss: str, inputs: tuple[str, str] = ("f_s", "f_t"), **params) -> Case:
    return Case(loss, inputs[:1], inputs[1:], params)


def _flow(form: str) -> Case:
    return Case("fsp", ("s0", "s1", "s2", "s3"), ("t0", "t1", "t2", "t3"), {"form": form})


def _tf_kd(form: str, **params) -> Case:
    teacher = ("logits_t",) if form == "self" else ()
    return Case("tf_kd", ("logits_s",), teacher, {"form": form, **params}, target="labels")


def _crd_params(arrays: Arrays) -> dict[str, float]:
    n_data, feat_dim = arrays["param.crd.contrast.memory_v1"].shape
    nce_k, nce_t, *_, nce_m = arrays["param.crd.contrast.params"].tolist()
    return {"n_data": n_data, "feat_dim": feat_dim, "nce_k": int(nce_k), "nce_t": nce_t, "nce_m": nce_m}


def _crd_calls(loss, arrays: Arrays) -> Tensor:
    """Two successive calls; the bank and the normalisation are also compared between them."""
    index = arrays["contrast_idx"]
    assert torch.equal(index[:, 0], arrays["idx"])
    loss.normalizer.copy_(arrays["param.crd.contrast.params"][2:4])
    first = loss(arrays["f_s"], arrays["f_t"], index=index)
    for own, name in (("memory_s", "mid.memory_v1"), ("memory_t", "mid.memory_v2")):
        torch.testing.assert_close(getattr(loss, own), arrays[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.normalizer, arrays["mid.params"][2:4], rtol=1e-5, atol=0)
    second = loss(arrays["f_s2"], arrays["f_t2"], index=index)
    torch.testing.assert_close(loss.normalizer, arrays["after.crd.contrast.params"][2:4], rtol=1e-5, atol=0)
    return torch.stack([first, second])


def _sskd_parts(loss, arrays: Arrays) -> Tensor:
    student, teacher = [[arrays[f"{name}_{side}"] for name in ("logits", "rep")] for side in "st"]
    parts = torch.stack(loss.parts(student, teacher, arrays["labels"]))
    torch.testing.assert_close(parts.detach(), arrays["parts"], rtol=1e-5, atol=0)
    return loss(student, teacher, target=arrays["labels"])


CASES: dict[str, Case] = {
    "dist_seg": _logits("dist"),
    "fsp": _flow("mse"),
    "fsp_maxpool": _flow("norm"),
    "pkt": _embeddings("pkt"),
    "rkd": _embeddings("rkd"),
    "rkd_d": _embeddings("rkd", w_a=0.0),
    "rkd_a": _embeddings("rkd", w_d=0.0),
    "sp": _embeddings("sp"),
    "cc": _embeddings("cc", ("e_s", "e_t"), feat_dim=None),
    "cc_embed": Case(
        "cc",
        ("f_s",),
        ("f_t",),
        params=lambda arrays: {"feat_dim": len(arrays["param.embed_s.linear.bias"])},
        prefixes={"embed_s.linear": "embed_s", "embed_t.linear": "embed_t"},
    ),  # fmt: skip
    "cckd_gaussian": _embeddings("cc", ("e_s", "e_t"), form="gaussian", feat_dim=None),
    "cckd_bilinear": _embeddings("cc", ("e_s", "e_t"), form="bilinear", feat_dim=None),
    "crd": Case(
        "crd",
        ("f_s",),
        ("f_t", "f_t2"),
        _crd_params,
        teacher_shapes=[(40,)],
        prefixes={
            "crd.embed_s.linear": "embed_s",
            "crd.embed_t.linear": "embed_t",
            "crd.contrast.memory_v1": "memory_s",
            "crd.contrast.memory_v2": "memory_t",
            "crd.contrast.params": None,
        },
        call=_crd_calls,
    ),  # fmt: skip
    "sskd": Case(
        "sskd",
        ("logits_s", "rep_s"),
        ("logits_t", "rep_t"),
        {"tf_ratio": 0.75, "head": False},
        target="labels",
        call=_sskd_parts,
    ),  # fmt: skip
}

for _classes in ("c10", "c100"):
    CASES |= {
        f"kd_{_classes}": _logits("kd"),
        f"kd_ce_{_classes}": _logits("kd", target=True, ce_weight=0.1),
        f"sg_kdlogits_{_classes}_a5": _logits("kd_logits", target=True),
        f"sg_kdlogits_{_classes}_a8": _logits("kd_logits", target=True, coeff=0.8),
        f"dkd_{_classes}_b8": _logits("dkd", target=True),
        f"dkd_{_classes}_b2": _logits("dkd", target=True, beta=2.0),
        f"dist_{_classes}_tau1": _logits("dist"),
        f"dist_{_classes}_tau4": _logits("dist", tau=4.0),
        f"tfkd_self_{_classes}": _tf_kd("self"),
        f"tfkd_reg_{_classes}_m1": _tf_kd("virtual"),
        f"tfkd_reg_{_classes}_m100": _tf_kd("virtual", multiplier=100.0),
    }
