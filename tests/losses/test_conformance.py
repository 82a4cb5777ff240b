"""What every registered loss has to do. A new loss needs an entry in one of the example tables, and nothing else."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distpro.losses import LOSSES, DistillationLoss, available_losses, build_loss
from pathways.registry import UserError
from tests.losses import examples_feature_dense, examples_response_relation, examples_tokens

EXAMPLES = {
    **examples_feature_dense.EXAMPLES,
    **examples_response_relation.EXAMPLES,
    **examples_tokens.EXAMPLES,
}
OF_MAPS = [name for name in available_losses() if name not in examples_tokens.EXAMPLES]
LABEL_SHAPES = {"ifvd": (16, 16)}  # of one sample; () for all others
BATCH = 4

# What the words of `taps` stand for, of both models; cwd reads the logits of a dense task.
PLACES = {"stages": [(6, 8, 8), (8, 4, 4)], "last": [(8, 4, 4)], "embedding": [(8,)], "logits": [(5,)]}
DENSE_LOGITS = {"cwd"}

# Options without which another has no effect.
TOGETHER: dict[tuple[str, str], dict[str, Any]] = {
    ("cc", "gamma"): {"form": "gaussian"},
    ("logit_std", "alpha"): {"of": "dkd"},
    ("logit_std", "beta"): {"of": "dkd"},
    ("semckd", "soft"): {"batch_size": 8},
    ("tf_kd", "correct"): {"form": "virtual"},
}
SCALARS = [(name, scalar) for name in available_losses() for scalar in LOSSES[name].scalars]

# Their backward pass is no derivative of their forward pass, by definition of the method.
NO_DERIVATIVE = {"afd": "the attention of the sum over pairs is detached"}
EQUAL_SIZES = {"ghnd", "hnd"}  # refuse maps of different sizes, as their definition compares them element by element

names = pytest.mark.parametrize("name", available_losses())


class Sample:
    """A built loss and inputs for it."""

    def __init__(self, name: str, batch: int = BATCH, dtype: torch.dtype = torch.float32, scale=(1, 1), **params):
        torch.manual_seed(0)
        example = EXAMPLES[name]
        shapes = [
            _scaled(example[f"{side}_shapes"], by) for side, by in zip(("student", "teacher"), scale, strict=True)
        ]
        self.loss: DistillationLoss = build_loss(name, *shapes, **example["params"] | params)
        if dtype != torch.float32:
            self.loss.to(dtype)
        rows = batch * rows_of(self.loss)
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


def rows_of(loss: DistillationLoss) -> int:
    """Rows of a batch per sample."""
    return {"": 1, "rotations": 4}[loss.expand]


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
    assert kind.taps and set(kind.taps) <= set(PLACES)
    assert kind.before_relu in ("neither", "teacher", "both") and (
        "stages" in kind.taps or kind.before_relu == "neither"
    )
    assert kind.pretrain_reads in (("teacher", "both") if kind.stages == 2 else ("",))
    assert set(kind.needs) <= set(inspect.signature(kind).parameters)


@pytest.mark.parametrize("name", OF_MAPS)
def test_reads_its_default_taps(name):
    shapes = [shape for tap in LOSSES[name].taps for shape in PLACES[tap]]
    if name in DENSE_LOGITS:
        shapes = [(*shape, 4, 4) for shape in shapes]
    sample = Sample(name)
    loss = build_loss(name, shapes, shapes, **EXAMPLES[name]["params"])
    student, teacher = ([torch.randn(BATCH * rows_of(loss), *s, requires_grad=True) for s in shapes] for _ in range(2))
    loss(_unwrap(student), _unwrap(teacher), target=sample.target, index=sample.index).backward()
    assert all(s.grad is not None and s.grad.isfinite().all() for s in student)


@names
@pytest.mark.parametrize("given", ["target", "index"])
def test_needs_labels_and_sample_numbers_where_it_says(name, given):
    sample = Sample(name)
    needed = getattr(sample.loss, f"needs_{given}")
    setattr(sample, given, None)
    if needed:
        with pytest.raises(UserError, match="target|index"):
            sample()
    else:
        assert sample().isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in available_losses() if not LOSSES[name].signed])
def test_is_negative_only_where_it_says(name):
    """By descent, on what it reads and on its own parameters. Rounding aside."""
    sample = Sample(name, dtype=torch.float64).tracked()
    optimizer = torch.optim.Adam([*sample.student, *sample.teacher, *sample.loss.parameters()], lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        value = sample()
        assert value >= -1e-9
        value.backward()
        optimizer.step()


@pytest.mark.parametrize("name", [n for n in available_losses() if LOSSES[n].pretrain_reads])
def test_first_stage_trains_from_what_it_reads(name):
    sample = Sample(name).tracked()
    student = [] if sample.loss.pretrain_reads == "teacher" else _unwrap(sample.student)
    value = sample.loss.pretrain(student, _unwrap(sample.teacher), target=sample.target)
    value.backward()
    trained = [*sample.student, *sample.loss.parameters()]
    assert value.isfinite() and any(x.grad is not None and x.grad.any() for x in trained)
    assert all(t.grad is None for t in sample.teacher)


@pytest.mark.parametrize(("name", "scalar"), SCALARS)
def test_a_scalar_set_later_is_the_scalar_given_at_first(name, scalar):
    """The second of two calls is compared, as a memory's momentum shows there only."""
    together = TOGETHER.get((name, scalar), {})
    before, later = (Sample(name, dtype=torch.float64, **together) for _ in range(2))
    value = getattr(later.loss, scalar)
    other = 0.6 * value + 0.17 if isinstance(value, float) else [0.6 * x + 0.17 for x in value]
    setattr(later.loss, scalar, other)
    first = Sample(name, dtype=torch.float64, **together, **{scalar: other})

    def second_call(sample):
        torch.manual_seed(1)
        sample()
        return sample()

    torch.testing.assert_close(second_call(later), second_call(first), rtol=1e-12, atol=0)
    assert (second_call(later) - second_call(before)).abs() > 1e-6 * second_call(before).abs()


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


@pytest.mark.slow
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
