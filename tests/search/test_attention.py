"""Hypergradients through attention: DeiT's scaled dot products, token pathways and distillation token, in float64 against autograd
through the actual updates and against real trainings."""

from __future__ import annotations

import copy

import pytest
import torch

from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.models import build_model, stage_taps
from distpro.objective import Objective, Term
from distpro.search.estimators import obstacle, second_obstacle
from pathways import build_pathways
from tests.search.test_hypergradient import relative
from tests.search.test_sweep import Horizon

pytest.importorskip("timm")


class Transformers(Horizon):
    """A wider and deeper teacher; AdamW, three steps."""

    def __init__(self):
        teacher, student = (self.network(*of).double() for of in ((0, 18, 3), (1, 12, 2)))
        generator = torch.Generator().manual_seed(5)
        draws = [torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator) for _ in range(4)]
        *self.batches, self.validation = [batch_of(x, torch.randint(4, (6,), generator=generator)) for x in draws]
        ours, theirs = list(stage_taps(student).post), list(stage_taps(teacher).post)
        attention = "blocks.1.attn.attn_drop:input"
        terms = [
            *build_pathways(teacher.eval(), student, draws[0], theirs, ours, "matched", ["tokens"], "l2"),
            Term(build_loss("deit", [(4,)], [(4,)], hard=False), "deit", ["head_dist"], ["logits"]),
            Term(build_loss("l2", [(3, 6, 6)], [(3, 6, 6)]), "attention", [attention], [attention]),
        ]
        student.blocks[0].attn.fused_attn = True  # the other one's attention is a tap
        self.objective = Objective(teacher, student, [t.double() for t in terms], draws[0])
        self.params = self.objective.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.params, 1e-2, eps=1e-3, weight_decay=0.1)
        self.max_norm, self.clip_by, self.scale = 0.7, "all", 2.0
        self.weights = torch.rand(len(terms), dtype=torch.float64, generator=generator) + 0.1
        self.start = copy.deepcopy((self.objective.state_dict(), self.optimizer.state_dict()))

    @staticmethod
    def network(seed, width, depth):
        torch.manual_seed(seed)
        model = build_model("deit", 4, img_size=8, patch_size=4, embed_dim=width, depth=depth, num_heads=3, fused=False)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        return model


@pytest.fixture(scope="module")
def case():
    return Transformers()


def test_forward_mode_is_exact(case):
    truth = case.estimate("unrolled")
    assert (
        truth.abs().min() > 1e-9
    )  # of every term, the distillation token's among them: its head is not the one validated
    assert relative(case.estimate("forward_mode"), truth) < 1e-8
    assert relative(case.differences(), truth) < 1e-5


@pytest.mark.slow
def test_the_sweep_is_exact(case):
    assert relative(case.estimate_all("sweep")[1], case.estimate_all("unrolled")[1]) < 1e-8


def test_both_are_chosen(case):
    """Attention has its rules in its plain form, which the estimators take."""
    assert obstacle(case.objective.float(), batch_of(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))) == ""
    assert second_obstacle(case.objective, batch_of(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))) == ""
    case.objective.double()
