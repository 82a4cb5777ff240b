"""Golden cases of the feature-based and dense losses: file -> ``Case``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distpro.losses.ft import unit_distance
from distpro.losses.ifvd import pixel_kd
from distpro.losses.ofd import partial_l2
from tests.losses.golden import Arrays, Case


def _channels(arrays: Arrays, parameter: str) -> int:
    return arrays[f"param.{parameter}"].shape[0]


def _vid(arrays: Arrays) -> dict[str, int]:
    return {"mid_channels": _channels(arrays, "vid.regressor.0.weight")}


def _factors(form: str, p: int) -> Case:
    return Case("ft", ("factor_s",), ("factor_t",), {"form": form, "p": p}, call=_factor_distance)


def _factor_distance(loss, arrays: Arrays) -> Tensor:
    return loss.distance(arrays["factor_s"], arrays["factor_t"])


def _reconstruction(loss, arrays: Arrays) -> Tensor:
    return F.mse_loss(loss.paraphraser(arrays["f_t"]), arrays["f_t"])


def _margins(arrays: Arrays) -> dict[str, list[Tensor]]:
    return {"margins": [arrays[f"margin{i}"] for i in (1, 2, 3)]}


def _abf(fuse: bool, training: bool = True, upscale: int = 1) -> Case:
    """A two-level loss whose shallow (``fuse``) or deep ABF is the one in the file: 12 -> 16 -> 20 channels."""
    size = (8 * upscale, 8 * upscale)
    student = [(12, 8, 8), (16, 4, 4)] if fuse else [(16, 16, 16), (12, 8, 8)]
    teacher = [(20, *size), (20, 4, 4)] if fuse else [(20, 16, 16), (20, *size)]
    position = 1 if fuse else 0

    def probe(loss, arrays: Arrays) -> Tensor:
        target = arrays["target"]
        out, residual = loss.abfs[position](arrays["x"], arrays.get("y"), target.shape[2:])
        return F.mse_loss(out, target) + 0.1 * residual.square().mean()

    return Case(
        "review",
        ("x", "y") if fuse else ("x",),
        params=lambda arrays: {"mid_channels": _channels(arrays, "abf.conv1.0.weight")},
        student_shapes=student,
        teacher_shapes=teacher,
        prefixes={"abf": f"abfs.{position}"},
        call=probe,
        training=training,
    )


HINT = Case("hint", ("f_s",), ("f_t",), prefixes={"regress": "regressors.0"})
VID = Case("vid", ("f_s",), ("f_t",), _vid, prefixes={"vid": "gaussians.0"})
REVIEW = Case("review", ("f1", "f2", "f3", "f4"), ("t1", "t2", "t3", "t4"), prefixes={"net.abfs": "abfs"})
OFD = Case("ofd", ("s1", "s2", "s3"), ("t1", "t2", "t3"), _margins, prefixes={"connectors.connectors": "connectors"})
THREE = (("s1", "s2", "s3"), ("t1", "t2", "t3"))

CASES: dict[str, Case] = {
    "hint_same": HINT,
    "hint_halve": HINT,
    "hint_double": HINT,
    "hint_shrink": HINT,
    "at_same": Case("at", ("f_s",), ("f_t",)),
    "at_s_larger": Case("at", ("f_s",), ("f_t",)),
    "at_s_smaller": Case("at", ("f_s",), ("f_t",)),
    "at_zagoruyko": Case("at", ("f_s",), ("f_t",)),
    "at_paper": Case("at", ("f_s",), ("f_t",), {"form": "paper"}),
    "at_list": Case("at", *THREE),
    "nst_same": Case("nst", ("f_s",), ("f_t",)),
    "nst_s_larger": Case("nst", ("f_s",), ("f_t",)),
    "nst_s_smaller": Case("nst", ("f_s",), ("f_t",)),
    "vid_same": VID,
    "vid_s_larger": VID,
    "vid_s_smaller": VID,
    "ft_same_p1": _factors("attention", 1),
    "ft_same_p2": _factors("attention", 2),
    "ft_s_larger_p1": _factors("attention", 1),
    "ft_s_larger_p2": _factors("attention", 2),
    "ft_s_smaller_p1": _factors("attention", 1),
    "ft_s_smaller_p2": _factors("attention", 2),
    "ft_flat_p1": _factors("flat", 1),
    "ft_flat_p2": _factors("flat", 2),
    "ft_chain": Case(
        "ft", ("f_s",), ("f_t",), prefixes={"translator.encoder": "translator", "paraphraser": "paraphraser"}
    ),
    "ft_init": Case(
        "ft",
        ("f_t",),
        student_shapes=[(12, 8, 8)],
        teacher_shapes=[(24, 8, 8)],
        prefixes={"paraphraser": "paraphraser"},
        call=_reconstruction,
    ),  # fmt: skip
    "ab": Case("ab", *THREE),
    "ab_connector": Case("ab", ("s1", "s2"), ("t1", "t2"), prefixes={"connector.connectors": "connectors"}),
    "dab": Case("dab", *THREE),
    "ofd_same": OFD,
    "ofd_pool": OFD,
    "ofd_official": Case(
        "ofd",
        ("source",),
        ("target",),
        call=lambda loss, arrays: partial_l2(arrays["source"], arrays["target"], arrays["margin"]),
    ),  # fmt: skip
    "hcl": Case("hcl", ("s1", "s2", "s3", "s4", "s5"), ("t1", "t2", "t3", "t4", "t5")),
    "abf_first": _abf(fuse=False),
    "abf_fuse": _abf(fuse=True),
    "abf_fuse_eval": _abf(fuse=True, training=False),
    "abf_fuse_up": _abf(fuse=True, upscale=2),
    "reviewkd_equal": REVIEW,
    "reviewkd_mismatch": REVIEW,
    "kdsvd": Case("kdsvd", *THREE),
    "pad_l2": Case(
        "pad_l2",
        ("e_s",),
        ("e_t",),
        call=lambda loss, arrays: loss.distance(arrays["e_s"], arrays["e_t"], arrays["log_var"]),
    ),  # fmt: skip
    "ickd": Case("ickd", ("f_s",), ("f_t",)),
    "kta_p1": Case(
        "ktaad",
        ("f_s",),
        ("f_t",),
        {"p": 1},
        call=lambda loss, arrays: unit_distance(arrays["f_s"], arrays["f_t"], loss.p),
    ),  # fmt: skip
    "kta_p2": Case(
        "ktaad",
        ("f_s",),
        ("f_t",),
        {"p": 2},
        call=lambda loss, arrays: unit_distance(arrays["f_s"], arrays["f_t"], loss.p),
    ),  # fmt: skip
    "kta_affinity": Case(
        "ktaad", ("f_s",), ("f_t",), call=lambda loss, arrays: loss.affinity(arrays["f_s"], arrays["f_t"])
    ),
    "ifvd": Case("ifvd", ("f_s",), ("f_t",), {"num_classes": 5}, target="target"),
    "ifvd_pixel_kd": Case(
        "ifvd",
        ("logits_s",),
        ("logits_t",),
        {"num_classes": 5},
        call=lambda loss, arrays: pixel_kd(arrays["logits_s"], arrays["logits_t"]),
    ),  # fmt: skip
}
