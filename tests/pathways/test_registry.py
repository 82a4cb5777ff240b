"""Names become objects; wrong names are answered."""

import pytest

from pathways import DISTANCES, TRANSFORMS, Registry, UserError
from pathways.registry import nearest


@pytest.fixture
def shapes():
    shapes = Registry("shape")

    @shapes.register("square")
    def square(side, scale=1):
        return scale * side * side

    @shapes.register("circle")
    class Circle:
        def __init__(self, radius=1.0):
            self.radius = radius

    @shapes.register("any")
    def anything(**options):
        return options

    return shapes


def test_a_registry_is_a_mapping_in_alphabetical_order(shapes):
    assert list(shapes) == ["any", "circle", "square"] and len(shapes) == 3
    assert "square" in shapes and "squares" not in shapes
    assert shapes["square"](3) == 9


def test_build(shapes):
    assert shapes.build("square", 3, scale=2) == shapes.build("square", side=3, scale=2) == 18
    assert shapes.build("circle", radius=2.0).radius == 2.0
    assert shapes.build("any", name_of_my_own=1) == {"name_of_my_own": 1}


@pytest.mark.parametrize(
    "name, args, params, message",
    [
        ("sqare", (), {}, "unknown shape 'sqare'; did you mean 'square'.*allowed: any, circle, square"),
        ("zzz", (), {}, r"unknown shape 'zzz' \(allowed"),
        (
            "square",
            (),
            {"sides": 3},
            "shape 'square' has no parameter 'sides'; did you mean 'side'.*allowed: side, scale",
        ),
        ("circle", (), {"self": 3}, "shape 'circle' has no parameter 'self'.*allowed: radius"),
        ("square", (), {}, "shape 'square': missing a required argument: 'side'"),
        ("square", (3,), {"side": 3}, "shape 'square': multiple values for argument 'side'"),
    ],
)
def test_errors(shapes, name, args, params, message):
    with pytest.raises(UserError, match=message):
        shapes.build(name, *args, **params)


def test_an_error_of_the_entry_itself_is_passed_on(shapes):
    with pytest.raises(TypeError, match="multiply"):
        shapes.build("square", "a")


def test_a_name_is_given_once(shapes):
    with pytest.raises(ValueError, match="shape 'square' is registered already"):
        shapes.register("square")(len)
    assert shapes.build("square", side=2) == 4


@pytest.mark.parametrize(
    "name, allowed, answer",
    [
        ("HLC", ["hcl", "l2"], "; did you mean 'hcl'?"),
        ("Conv1X1", ["conv1x1", "conv3x3"], "; did you mean 'conv1x1'?"),
        ("resnet", ["ResNet20"], "; did you mean 'ResNet20'?"),
        ("banana", ["hcl", "l2"], ""),
        ("x", [], ""),
        (3, ["3x3"], ""),
    ],
)
def test_nearest(name, allowed, answer):
    assert nearest(name, allowed) == answer


def test_what_the_docs_promise_is_registered():
    assert {"l1", "l2", "smooth_l1", "hcl", "attention", "cosine"} <= set(DISTANCES)
    assert {"identity", "conv1x1", "conv3x3", "attention", "tokens"} <= set(TRANSFORMS)
