"""Tensors in containers: their names, their copies, and taps that read them before something overwrites them."""

from collections import OrderedDict, defaultdict
from dataclasses import InitVar, dataclass, field
from functools import cached_property

import pytest
import torch
from torch import nn

from pathways import Call, Tapped, UserError, response_of, tap
from pathways.call import map_tensors
from pathways.containers import alike, copied, entries, entry
from pathways.taps import parse_tap
from tests.pathways.containers import (
    Block,
    Detector,
    ModelOutput,
    Neck,
    Overwritten,
    Pair,
    TextClassifier,
    pictures,
    text,
)
from tests.pathways.reference import READERS, by_hooks, by_tapped_hooks

pytestmark = pytest.mark.usefixtures("trusted_tests")


def t(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)


@dataclass
class Plain:
    a: torch.Tensor
    b: tuple


EVERY_KIND = {
    "bare": (t(1), [""]),
    "tuple": ((t(1), 3, None, (t(2), t(3))), ["0", "3.0", "3.1"]),
    "list": ([t(1), {"x": t(2)}], ["0", "1.x"]),
    "dict": ({"x": t(1), 7: [t(2)], "none": None}, ["x", "7.0"]),
    "ordered": (OrderedDict(out=t(1), aux=t(2)), ["out", "aux"]),
    "default": (defaultdict(list, x=[t(1)]), ["x.0"]),
    "named tuple": (Pair(t(1), {"mean": t(2)}), ["main", "rest.mean"]),
    "dataclass": (Plain(t(1), (t(2),)), ["a", "b.0"]),
    "model output": (
        ModelOutput(logits=t(1), hidden_states=(t(2), t(3))),
        ["logits", "hidden_states.0", "hidden_states.1"],
    ),
    "nothing": (("word", {}), []),
}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_names_copies_and_comparison_of_every_kind(kind):
    value, names = EVERY_KIND[kind]
    assert list(entries(value)) == names
    for name in names:
        assert entry(value, name or None, "tap") is entries(value)[name] or len(names) > 1
    copy = copied(value)
    assert type(copy) is type(value) and alike(value, copy) and list(entries(copy)) == names
    assert all(
        a is not b and torch.equal(a, b) for a, b in zip(entries(value).values(), entries(copy).values(), strict=True)
    )
    if names:
        changed = map_tensors(lambda x: x + 1, value)
        assert not alike(value, changed) and alike(value, changed, None) and not alike(value, changed, 0.1)
        assert not alike(value, map_tensors(lambda x: x.double(), value)) and not alike(value, (value,))
        assert alike(map_tensors(lambda x: x / 0, value), map_tensors(lambda x: x / 0, value))


class Two(tuple):
    """With arguments of its own, and something beside its items."""

    def __new__(cls, a, b):
        made = super().__new__(cls, (a, b))
        made.name = "two"
        return made


class Named(list):
    def __init__(self, name, *items):
        super().__init__(items)
        self.name = name


def test_tuples_and_lists_that_are_made_in_ways_of_their_own():
    for value in (Two(t(1), (t(2),)), Named("two", t(1), (t(2),))):
        changed = map_tensors(lambda x: x + 1, value)
        assert type(changed) is type(value) and changed.name == "two" and alike(list(changed), [t(2), (t(3),)])
        assert alike(list(value), [t(1), (t(2),)])
    largest = torch.max(t(1, 3).view(1, 2), 1)
    assert map_tensors(lambda x: x + 1, largest).values == 4 and type(largest) is type(map_tensors(abs, largest))
    assert map_tensors(abs, largest.values.shape) == torch.Size([1])


@dataclass(init=False)
class Headed:
    """Made from something else than its fields."""

    logits: torch.Tensor

    def __init__(self, head, hidden):
        self.logits = head(hidden)
        self.hidden = hidden


@dataclass(frozen=True)
class Normed:
    """Frozen, and changes what it is given."""

    x: torch.Tensor
    scale: InitVar[float] = 2.0
    size: torch.Tensor = field(init=False)

    def __post_init__(self, scale):
        object.__setattr__(self, "x", self.x / scale)
        object.__setattr__(self, "size", self.x.sum())

    @cached_property
    def twice(self):
        return 2 * self.x


@dataclass(frozen=True)
class Slotted:
    __slots__ = ("x",)
    x: torch.Tensor


def test_dataclasses_that_are_made_in_ways_of_their_own():
    headed, normed, slotted = Headed(lambda h: 3 * h, t(1, 2)), Normed(t(4, 8)), Slotted(t(1))
    assert normed.twice.tolist() == [4, 8]
    changed = map_tensors(lambda x: x + 1, headed)
    assert type(changed) is Headed and changed.logits.tolist() == [4, 7] and changed.hidden.tolist() == [2, 3]
    changed = map_tensors(lambda x: x.double(), normed)
    assert changed.x.tolist() == [2, 4] and changed.size == 6 and changed.twice.tolist() == [4, 8]
    assert {x.dtype for x in (changed.x, changed.size, changed.twice)} == {torch.float64}
    assert map_tensors(lambda x: x + 1, slotted).x == 2
    output = map_tensors(lambda x: x + 1, ModelOutput(logits=t(1)))
    assert output["logits"] is output.logits and output.logits == 2 and list(output) == ["logits"]
    assert headed.logits.tolist() == [3, 6] and normed.x.dtype is torch.float32 and slotted.x == 1  # left alone


def test_differences_of_containers_are_noticed():
    for a, b in [
        ({"out": t(1)}, OrderedDict(out=t(1))),
        ({"out": t(1)}, {"aux": t(1)}),
        ((t(1), t(2)), (t(1),)),
        ((t(1), 3), (t(1), 4)),
        (t(1), t(1, 1)),
        (t(1), 1.0),
        (torch.tensor([True]), torch.tensor([False])),
    ]:
        assert not alike(a, b, 1e-4)


def test_one_tensor_in_two_places_stays_one():
    x = t(1, 2)
    a, b, c = copied((x, x, t(1, 2)))
    assert a is b and a is not x and c is not a
    assert entry((x, {"again": x}), None, "tap") is x
    unchanged = {"state": []}
    assert copied(unchanged) is unchanged


@pytest.mark.parametrize(
    "value, key, message",
    [
        ((t(1), t(2)), None, "here gives several tensors; add the key of one in brackets: 0, 1"),
        ({"a": t(1), "b": (t(2), t(3))}, None, "a, b.0, b.1"),
        ({"a": t(1), "b": (t(2), t(3))}, "b", "several tensors.*: b.0, b.1"),
        ({"hidden": t(1), "b": t(2)}, "hiden", "no tensor 'hiden'; did you mean 'hidden'.*there are: hidden, b"),
        (t(1), "0", "there is no '0' in a tensor"),
        ([], None, "gives list, not a tensor"),
        (None, "a", "gives NoneType, not a tensor"),
        ([t(i) for i in range(30)], None, r"18, 19, ... \(30 in all\)"),
    ],
)
def test_unclear_keys_are_answered_with_the_keys_there_are(value, key, message):
    with pytest.raises(UserError, match=message):
        entry(value, key, "here")


@pytest.mark.parametrize(
    "output, expected",
    [
        (t(1), 1),
        ((t(1),), 1),
        ({"loss": t(0), "logits": t(1)}, 1),
        (ModelOutput(logits=t(1), hidden_states=(t(2),)), 1),
        (OrderedDict(aux=t(0), out=t(1)), 1),
        ({"out": t(0), "logits": t(1)}, 1),
        ({"anything": [t(1)]}, 1),
    ],
)
def test_the_response_of_an_output(output, expected):
    assert response_of(output).item() == expected


@pytest.mark.parametrize(
    "output, message",
    [
        ((t(1), t(2)), r"several tensors \(0, 1\).*'logits\[1\]'"),
        ({"boxes": t(1), "scores": t(2)}, r"several tensors \(boxes, scores\)"),
        ([{"boxes": t(1), "scores": t(2)}], r"\(0.boxes, 0.scores\)"),
        ({"logits": None}, "gives dict, not a tensor"),
        (3, "gives int, not a tensor"),
    ],
)
def test_an_output_without_clear_response_is_an_error(output, message):
    with pytest.raises(UserError, match=message):
        response_of(output)


@pytest.mark.parametrize(
    "name, parsed",
    [
        ("a.b[c]", ("a.b", "output", "c")),
        ("a:input[1]", ("a", "input", "1")),
        ("a:input[1.0]", ("a", "input", "1.0")),
        ("a:pre_relu[out]", ("a", "pre_relu", "out")),
        ("[logits]", ("", "output", "logits")),
        ("logits[out]", ("logits", "output", "out")),
        ("", ("", "output", None)),
    ],
)
def test_tap_names(name, parsed):
    assert parse_tap(name) == parsed


# Taps of models


@READERS
@pytest.mark.parametrize("kind", Block.KINDS)
def test_a_tap_of_a_container_is_what_it_was_when_given(read, kind):
    torch.manual_seed(0)
    model, x = Overwritten(kind).eval(), torch.randn(2, 3, 8, 8)
    expected, plain = model.block.conv(x), model(x)
    assert (expected < 0).any()
    output, features = read(model, [model.name], x)
    assert torch.equal(features[model.name], expected) and torch.equal(output, plain)
    with pytest.raises(UserError, match="several tensors"):
        by_hooks(model, ["block"], x)
    (gradient,) = torch.autograd.grad(output.sum(), features[model.name])
    assert torch.equal(gradient != 0, expected > 0)


@pytest.mark.parametrize("kind", Block.KINDS)
def test_the_model_goes_on_with_the_same_kind_of_container(kind):
    model, x, kinds = Overwritten(kind), torch.randn(2, 3, 8, 8), []
    take = model.take
    model.take = lambda output: kinds.append(type(output)) or take(output)
    model(x), by_hooks(model, [model.name], x)
    assert kinds[0] is kinds[1]


class Sum(nn.Module):
    def forward(self, xs, scale=None):
        return xs[0].relu_() + xs[1]


class Joins(nn.Module):
    """A module that is given a list, and overwrites what is in it."""

    def __init__(self):
        super().__init__()
        self.conv, self.sum = nn.Conv2d(3, 4, 3), Sum()

    def forward(self, x):
        y = self.conv(x)
        return self.sum([y, y.detach() * 2]).mean((2, 3))


@READERS
def test_an_input_in_a_list_is_what_it_was_when_given(read):
    torch.manual_seed(0)
    model, x = Joins(), torch.randn(2, 3, 8, 8)
    y, plain = model.conv(x), model(x)
    for name, expected in {
        "sum:input[0]": y,
        "sum:input[1]": 2 * y,
        "sum:input[xs.1]": 2 * y,
        "sum:input[0.1]": 2 * y,
    }.items():
        output, features = read(model, [name], x)
        assert torch.equal(features[name], expected) and torch.equal(output, plain)
    with pytest.raises(UserError, match="'sum:input' gives several tensors.*: 0, 1"):
        by_hooks(model, ["sum:input"], x)
    with pytest.raises(UserError, match=r"no tensor '5'.*there are: 0, 1"):
        by_hooks(model, ["sum:input[5]"], x)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.last = Mix(), nn.Linear(3, 2)

    def forward(self, a, b):
        y = self.mix(a * 2, other=b * 3, scale=2)
        return self.last(input=y)


class Mix(nn.Module):
    def forward(self, hidden, other, scale):
        return hidden.relu_() + other.mul_(scale)


@READERS
def test_arguments_by_keyword(read):
    torch.manual_seed(0)
    model, a, b = Keywords(), torch.randn(4, 3), torch.randn(4, 3)
    names = ["mix:input[0]", "mix:input[hidden]", "mix:input[other]", "mix:input[1]", "last:input"]
    expected = [2 * a, 2 * a, 3 * b, 3 * b, (2 * a).relu() + 6 * b]
    for call in ((a, b), {"b": b, "a": a}, Call((a,), {"b": b})):
        output, features = _read(read, model, names, call)
        assert all(torch.equal(features[n], e) for n, e in zip(names, expected, strict=True))
        assert torch.equal(output, model(a, b))
    with pytest.raises(UserError, match="'mix:input' gives several tensors.*: 0, other"):
        with tap(model, ["mix:input"]):
            model(a, b)


def _read(read, model, names, inputs):
    call = Call.of(inputs)
    if read is by_hooks:
        with tap(model, names) as taps:
            output = call.run(model)
        return output, dict(taps)
    tapped = Tapped(model, names, inputs)
    if read is by_tapped_hooks:
        tapped._function = None
        handle = model.register_forward_hook(lambda *_: None)
        tapped = Tapped(model, names, inputs)
        handle.remove()
    assert tapped.traced is (read is not by_tapped_hooks)
    result = call.run(tapped)
    tapped.remove()
    return result


def test_a_traced_model_is_told_what_it_does_not_take():
    tapped = Tapped(Keywords(), ["mix"], (torch.randn(4, 3), torch.randn(4, 3)))
    assert tapped.traced
    for wrong in ({"c": torch.zeros(1, 3)}, {}, {"a": torch.zeros(1, 3), "b": torch.zeros(1, 3)}):
        with pytest.raises(TypeError):
            tapped(torch.zeros(1, 3), **wrong)


@pytest.mark.slow
def test_logits_are_chosen_by_rule_or_key():
    class Net(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.fc, self.form = nn.Linear(4, 3), form

        def forward(self, x):
            return self.form(x, self.fc(x))

    x = torch.randn(2, 4)
    for form, names in [
        (lambda f, y: {"features": f, "logits": y}, ["logits", "[logits]", "logits[logits]", ""]),
        (lambda f, y: OrderedDict(aux=f, out=y), ["logits", "[out]", "logits[out]"]),
        (lambda f, y: ModelOutput(logits=y, hidden_states=(f,)), ["logits", "[logits]"]),
        (lambda f, y: (f, y), ["logits[1]", "[1]"]),
        (lambda f, y: [y], ["logits", "", "[0]"]),
    ]:
        model = Net(form)
        for name in names:
            for tapped in (Tapped(model, [name]), Tapped(model, [name], x), Tapped(model, [name], x, output=False)):
                assert torch.equal(tapped(x)[1][name], model.fc(x)), name
                tapped.remove()
            with tap(model, [name]) as taps:
                model(x)
            assert torch.equal(taps[name], model.fc(x))
    with pytest.raises(UserError, match=r"several tensors \(0, 1\), none of them called 'logits' or 'out'"):
        by_hooks(Net(lambda f, y: (f, y)), ["logits"], x)


def test_torchs_own_tuples():
    model = nn.Sequential(OrderedDict(lstm=nn.LSTM(3, 4), last=_First()))
    x = torch.randn(5, 2, 3)
    expected, (_, cell) = model.lstm(x)
    for example in (None, x):
        tapped = Tapped(model, ["lstm[0]", "lstm[1.1]"], example)
        features = tapped(x)[1]
        assert torch.equal(features["lstm[0]"], expected) and torch.equal(features["lstm[1.1]"], cell)
        tapped.remove()
    with pytest.raises(UserError, match="several tensors.*: 0, 1.0, 1.1"):
        by_hooks(model, ["lstm"], x)


class _First(nn.Module):
    def forward(self, x):
        return x[0]


def test_pre_relu_in_a_container():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.fc(x)
            return {"mean": y.mean(), "out": self.relu(y)}

    model, x = nn.Sequential(Stage()), torch.randn(3, 4)
    expected = model[0].fc(x)
    with tap(model, ["0:pre_relu[out]", "0[out]"]) as taps:
        model(x)
    assert torch.equal(taps["0:pre_relu[out]"], expected) and torch.equal(taps["0[out]"], expected.relu())
    assert torch.equal(Tapped(model, ["0:pre_relu[out]"])(x)[1]["0:pre_relu[out]"], expected)
    with pytest.raises(UserError, match="'0' does not end in a ReLU"):
        by_hooks(model, ["0:pre_relu[mean]"], x)


def test_a_text_model_is_read_by_hooks():
    torch.manual_seed(0)
    model, batch = TextClassifier().eval(), text()
    names = [
        "encoder[last_hidden_state]",
        "encoder.layer.0",
        "encoder.layer.1:input[hidden_states]",
        "encoder.layer.3.attention:input[attention_mask]",
        "encoder.layer.3.attention[1]",
        "embeddings",
    ]
    plain = model(**batch)
    tapped = Tapped(model, names, batch)
    assert not tapped.traced
    output, features = tapped(**batch)
    assert type(output) is ModelOutput and alike(output, plain)
    hidden = model.encoder(model.embeddings(batch["input_ids"]), batch["attention_mask"]).hidden_states
    assert torch.equal(features["encoder[last_hidden_state]"], hidden[-1])
    assert torch.equal(features["encoder.layer.0"], hidden[1])
    assert torch.equal(features["encoder.layer.1:input[hidden_states]"], hidden[1])
    assert torch.equal(features["encoder.layer.3.attention:input[attention_mask]"], batch["attention_mask"])
    assert features["encoder.layer.3.attention[1]"].shape == (2, 5, 5)
    tapped.remove()
    with tap(model, ["logits", "logits[hidden_states.4]"]) as taps:
        model(**batch)
    assert torch.equal(taps["logits"], plain.logits)
    for name, keys in {
        "encoder": "last_hidden_state, hidden_states.0",
        "encoder.layer.0.attention": "0, 1",
        "encoder.layer.0.attention:input": "hidden_states, attention_mask",
    }.items():
        with pytest.raises(UserError, match=f"'{name}' gives several tensors.*: {keys}"), tap(model, [name]):
            model(**batch)


def test_a_detector_gives_losses_and_boxes():
    torch.manual_seed(0)
    model, images = Detector().eval(), pictures()
    plain = model(images)
    tapped = Tapped(model, ["backbone", "neck[fine]"], Call((images,)))
    assert not tapped.traced
    output, features = tapped(images)
    assert alike(output, plain) and features["neck[fine]"].shape == features["backbone"].shape == (2, 4, 8, 8)
    losses, _ = tapped.train()(images, targets=[{}, {}])
    assert list(losses) == ["boxes", "scores"]
    with pytest.raises(UserError, match="0.boxes, 0.scores, 1.boxes"), tap(model.eval(), ["logits"]):
        model(images)


def test_a_tapped_neck_keeps_its_order():
    neck, x = Neck(), torch.randn(1, 4, 8, 8)
    tapped = Tapped(neck, ["inner"], x)
    output, _ = tapped(x)
    assert tapped.traced and type(output) is OrderedDict and alike(output, neck(x))
