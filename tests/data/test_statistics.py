"""Mean and standard deviation of images: of the whole training part, stored once, and checked."""

import json

import numpy as np
import pytest
from PIL import Image

from distpro.data import load_data
from distpro.data.statistics import DATA, Statistics, check_statistics, stated_by, stored_facts
from pathways.registry import UserError


@pytest.fixture
def stored(tmp_path):
    """Images whose brightness goes with their class, so that a part of the classes has another mean."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = (rng.integers(0, 80, (90, 4, 4, 3)) + 80 * y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    return tmp_path / "set.npz", x / 255


@pytest.mark.parametrize("part", [{}, {"samples": 12}, {"classes": [2]}, {"classes": 2, "samples": 7, "seed": 5}])
def test_they_are_the_whole_training_parts_whatever_is_kept_of_it(part, stored):
    path, pixels = stored
    data = load_data("npz", path, **part)
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-12)
    assert data.facts == {**data.signature, "mean": list(data.mean), "std": list(data.std)}


@pytest.mark.parametrize("part", [{}, {"samples": 4}, {"stream": True}, {"stream": True, "samples": 4}])
def test_they_are_those_of_a_folder_streamed_or_not(part, tmp_path):
    rng, pixels = np.random.default_rng(1), []
    for kind in ("train", "test"):
        for name, level in (("a", 0), ("b", 150)):
            (tmp_path / kind / name).mkdir(parents=True)
            for n in range(5):
                image = (rng.integers(0, 100, (6, 6, 3)) + level).astype(np.uint8)
                Image.fromarray(image).save(tmp_path / kind / name / f"{n}.png")
                pixels += [image / 255] if kind == "train" else []
    data = load_data("folder", tmp_path, **part)
    np.testing.assert_allclose(data.mean, np.stack(pixels).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, np.stack(pixels).std((0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([127.0], [60.0], "divide them by 255"),
        ([0.5], [60.0], "divide them by 255"),
        ([float("nan")], [0.2], "must be finite"),
        ([0.5], [float("inf")], "must be finite"),
    ],
)
def test_other_units_are_refused(mean, std, message):
    with pytest.raises(UserError, match=message):
        check_statistics(mean, std)


def test_close_is_within_a_grey_level():
    one = Statistics((0.5, 0.4), (0.2, 0.2))
    assert one.close_to(Statistics((0.501, 0.399), (0.2, 0.203)))
    assert not one.close_to(Statistics((0.51, 0.4), (0.2, 0.2)))
    assert not one.close_to(Statistics((0.5, 0.4), (0.2, 0.21)))
    assert not one.close_to(Statistics((0.5,), (0.2,)))


def test_what_a_folder_says(tmp_path):
    assert stored_facts(tmp_path) == {} and stated_by({}) is None and stated_by({"mean": [], "std": []}) is None
    (tmp_path / DATA).write_text(json.dumps({"name": "x", "mean": [0.25], "std": [0.5]}))
    assert stated_by(stored_facts(tmp_path)) == Statistics((0.25,), (0.5,))
    (tmp_path / DATA).write_text("{")
    with pytest.raises(UserError, match="data.json: not readable"):
        stored_facts(tmp_path)
