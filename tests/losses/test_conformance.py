"""What every registered loss has to do. A new loss needs an entry in one of the example tables, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distpro.losses import LOSSES, DistillationLoss, available_losses, build_loss
from pathways.registry import UserError
from tests.losses import examples_feature_dense, examples_response_relation

EXAMPLES = {**examples_feature_dense.EXAMPLES, **examples_response_relation.EXAMPLES}
LABEL_SHAPES = {"ifvd": (16, 16)}  # of one sample; () for all others
ROWS_PER_LABEL = {"sskd": 4}
BATCH = 4

# Their backward pass is no derivative of their forward pass, by definition of the method.
NO_DERIVATIVE = {"afd": "the attention of the sum over pairs is detached"}
EQUAL_SIZES = {"ghnd", "hnd"}  # refuse maps of different sizes, as their definition compares them element by element

names = pytest.mark.parametrize("name", available_losses())


class Sample:
    """A built loss and inputs for it."""

    def __init__(self, name: str, batch: int = BATCH, dtype: torch.dtype = torch.float32, scale=(1, 1)):
        torch.manual_seed(0)
        example = EXAMPLES[name]
        shapes = [
            _scaled(example[f"{side}_shapes"], by) for side, by in zip(("student", "teacher"), scale, strict=True)
        ]
        self.loss: DistillationLoss = build_loss(name, *shapes, **example["params"])
        if dtype != torch.float32:
            self.loss.to(dtype)
        rows = batch * ROWS_PER_LABEL.get(name, 1)
        self.student, self.teacher = ([torch.randn(rows, *s, dtype=dtype) for s in side] for side in shapes)
        self.target = torch.randint(3, (batch, *LABEL_SHAPES.get(name, ())))
        self.index = torch.arange(batch)

    def __call__(self, student: list[Tensor] | None = None) -> Tensor:
        student = self.student if student is None else student
        return self.loss(_unwrap(student), _unwrap(self.teacher), target=self.target, index=self.index)

    def tracked(self) -> Sample:
        for x in (*self.student, *self.teacher):
            x.requires_grad_()
        return self


def _unwrap(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    return tensors[0] if len(tensors) == 1 else tensors


def _scaled(shapes, by):
    return [(s[0], *(by * n for n in s[1:])) if len(s) == 3 else s for s in shapes]


@names
def test_has_an_example_and_its_facts(name):
    assert name in EXAMPLES
    kind = LOSSES[name]
    assert kind.__module__ == f"distpro.losses.{name}"
    assert kind.title and kind.formula and kind.reads and str(kind.year) in kind.paper
    assert kind.family in ("response", "feature", "relation", "dense")
    assert kind.stages == 1 or callable(kind.pretrain)


@names
def test_is_a_finite_scalar_whose_gradient_reaches_every_student_tensor_and_no_teacher_tensor(name):
    sample = Sample(name).tracked()
    value = sample()
    assert value.shape == () and value.isfinite()
    value.backward()
    assert all(s.grad is not None and s.grad.isfinite().all() and s.grad.any() for s in sample.student)
    assert all(t.grad is None for t in sample.teacher)


@names
def test_gradient_is_the_derivative(name):
    """In float64, and by the student's tensors; random draws and state are put back before each evaluation."""
    if name in NO_DERIVATIVE:
        pytest.skip(NO_DERIVATIVE[name])
    sample = Sample(name, dtype=torch.float64)
    sample()  # sets what is fixed by the first call
    loss = sample.loss

    def value(*student: Tensor) -> Tensor:
        sample.loss = copy.deepcopy(loss)
        torch.manual_seed(1)
        return sample(list(student))

    student = [s.requires_grad_() for s in sample.student]
    assert torch.autograd.gradcheck(value, student, fast_mode=True)


@names
def test_bfloat16_autocast_gives_nearly_the_same(name):
    """Layers of the loss's own run in bfloat16; what compares the tensors does not."""
    exact, rough = Sample(name), Sample(name)
    exact.student, exact.teacher = ([x.bfloat16().float() for x in side] for side in (exact.student, exact.teacher))
    rough.student, rough.teacher = ([x.bfloat16() for x in side] for side in (rough.student, rough.teacher))
    rough.tracked()
    torch.manual_seed(1)
    expected = exact()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = rough()
    own_layers = any(True for _ in rough.loss.parameters())
    torch.testing.assert_close(value.float(), expected, rtol=0.05 if own_layers else 1e-5, atol=0.0)
    value.backward()
    assert all(s.grad is not None and s.grad.isfinite().all() for s in rough.student)


@names
def test_batch_of_one_works_or_is_refused(name):
    sample = Sample(name, batch=1).tracked()
    try:
        value = sample()
    except UserError as error:
        assert "batch" in str(error) or "rows" in str(error)
    else:
        value.backward()
        assert value.isfinite() and all(s.grad is None or s.grad.isfinite().all() for s in sample.student)


@names
@pytest.mark.parametrize("scale", [(2, 1), (1, 2)], ids=["student_larger", "teacher_larger"])
def test_maps_of_different_sizes(name, scale):
    if not any(len(s) == 3 for s in EXAMPLES[name]["student_shapes"]):
        pytest.skip("reads no maps")
    if name in EQUAL_SIZES:
        with pytest.raises(UserError, match="one shape"):
            Sample(name, scale=scale)
        return
    sample = Sample(name, scale=scale).tracked()
    value = sample()
    value.backward()
    assert value.isfinite() and all(s.grad.isfinite().all() for s in sample.student)


@names
def test_forward_and_backward_need_no_value_on_the_host(name):
    """Tensors without content: any ``.item()`` or truth value of a tensor, which stalls an accelerator, raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        sample = Sample(name).tracked()
        sample().backward()


@names
def test_unknown_parameter_is_refused(name):
    example = EXAMPLES[name]
    with pytest.raises(UserError, match="no parameter 'temperatur_'"):
        build_loss(name, example["student_shapes"], example["teacher_shapes"], **{"temperatur_": 1})
