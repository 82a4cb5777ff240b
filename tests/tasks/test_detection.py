"""Detection's metrics against COCO's own evaluation and by hand, its losses, and the detectors that it is for."""

from __future__ import annotations

import contextlib
import io
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torchvision.ops import roi_align

from distpro.batch import Batch
from distpro.losses import build_loss
from distpro.models import build_model
from distpro.objective import Objective, Term
from distpro.search.estimators import ESTIMATORS, obstacle, second_obstacle
from distpro.search.estimators.base import TrainingStep
from distpro.tasks import Detection
from distpro.tasks.detection import Found
from distpro.train.evaluation import evaluate
from distpro.train.state import random_state
from pathways import UserError

SMALL = {"num_classes": 3, "channels": 32, "min_size": 64, "max_size": 96}
MODELS = {
    "fcos": lambda: build_model("fcos_fpn", backbone="mobilenet_v3_small", **SMALL),
    "retinanet": lambda: build_model("retinanet_fpn", **SMALL),
    "fasterrcnn": lambda: build_model("fasterrcnn_fpn", hidden=32, rpn_post_nms_top_n_train=50, **SMALL),
    "ssdlite": lambda: build_model("torchvision:ssdlite320_mobilenet_v3_large", num_classes=3),
    "torchvision's fasterrcnn": lambda: build_model(
        "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=3, min_size=64, max_size=96
    ),
}


def box(*corners):
    return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


def truth(boxes, labels=None, crowd=None):
    count = len(boxes)
    return {
        "boxes": boxes,
        "labels": torch.ones(count, dtype=torch.int64) if labels is None else torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.zeros(count, dtype=torch.int64) if crowd is None else torch.tensor(crowd, dtype=torch.int64),
    }


def said(boxes, scores, labels=None):
    count = len(boxes)
    return {
        "boxes": boxes,
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.ones(count, dtype=torch.int64) if labels is None else torch.tensor(labels, dtype=torch.int64),
    }


IMAGE = torch.zeros(3, 200, 200)


def measured(pairs):
    """Metrics of [(predictions, truths)], one pair a batch."""
    metrics = Detection().metrics()
    for found, wanted in pairs:
        metrics.update(found, Batch([IMAGE] * len(wanted), wanted, len(wanted)))
    return metrics


def noisy(seed, images=12, classes=3):
    """Truths, some of them crowds and some images without any, and predictions that are about right, wrong, or of another class."""
    draw = np.random.default_rng(seed)
    wanted, found = [], []
    for _ in range(images):
        count = draw.integers(0, 5)
        corners = draw.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corners, corners + draw.uniform(5, 40, (count, 2))], 1)
        labels, crowd = draw.integers(1, classes + 1, count), (draw.uniform(size=count) < 0.15).astype(int)
        wanted.append(truth(torch.tensor(boxes).float().reshape(-1, 4), labels.tolist(), crowd.tolist()))
        near = boxes + draw.normal(0, 3, boxes.shape)
        far = np.sort(draw.uniform(0, 100, (3, 2, 2)), 1).reshape(3, 4)
        everything = np.concatenate([near, near + draw.normal(0, 2, near.shape), far])
        guessed = np.concatenate([labels, labels, draw.integers(1, classes + 1, 3)])
        guessed[: count // 2] = draw.integers(1, classes + 1, count // 2)
        everything = torch.tensor(everything).float()
        everything[:, 2:] = torch.maximum(everything[:, 2:], everything[:, :2] + 1)
        found.append(said(everything, draw.uniform(0, 1, len(everything)).tolist(), guessed.tolist()))
    return found, wanted


def by_coco(found, wanted):
    """The numbers of COCO's evaluation itself."""
    api = pytest.importorskip("faster_coco_eval")

    def rows(images, **more):
        listed = []
        for image, entry in enumerate(images):
            for n in range(len(entry["boxes"])):
                left, top, right, bottom = entry["boxes"][n].tolist()
                sides = right - left, bottom - top
                row = {"image_id": image, "category_id": int(entry["labels"][n]), "bbox": [left, top, *sides]}
                row |= {"id": len(listed) + 1, "area": sides[0] * sides[1]}
                row |= {name: convert(entry[key][n]) for name, (key, convert) in more.items()}
                listed.append(row)
        return listed

    coco = api.COCO(
        {
            "images": [{"id": n} for n in range(len(wanted))],
            "categories": [{"id": n} for n in range(1, 4)],
            "annotations": rows(wanted, iscrowd=("iscrowd", int)),
        }
    )
    with contextlib.redirect_stdout(io.StringIO()):
        answers = coco.loadRes(rows(found, score=("scores", float)))
        evaluation = api.COCOeval_faster(coco, answers, "bbox")
        evaluation.run()
    return {name: 100 * evaluation.stats[n] for n, name in enumerate(("map", "map50", "map75"))}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_are_coco_s(seed):
    found, wanted = noisy(seed)
    expected = by_coco(found, wanted)
    assert 5 < expected["map"] < 95
    split = [(found[:5], wanted[:5]), (found[5:], wanted[5:])]
    assert measured(split).compute() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_by_hand():
    """Two truths. The surest prediction overlaps the first by 0.8 (80 of 100 pixels), the second one nothing, the third is the
    second truth itself. Up to IoU .80 the hits are 1, 0, 1: precision 1 to recall 1/2 (51 of the 101 points), then 2/3. Above,
    the first is none: 0, 0, 1: precision 1/3 to recall 1/2, then 0."""
    wanted = [truth(box([0, 0, 10, 10], [20, 20, 40, 40]))]
    found = [said(box([0, 0, 10, 8], [60, 60, 70, 70], [20, 20, 40, 40]), [0.9, 0.8, 0.7])]
    below, above = (51 + 50 * 2 / 3) / 101, 51 / 3 / 101
    computed = measured([(found, wanted)]).compute()
    assert computed["map50"] == computed["map75"] == pytest.approx(100 * below, abs=1e-4)
    # .50, .55, ..., .75 and .80 (an overlap of the threshold itself counts), then .85, .90, .95
    assert computed["map"] == pytest.approx(100 * (7 * below + 3 * above) / 10, abs=1e-4)


def test_processes_together_are_one_pass():
    found, wanted = noisy(0)
    whole = measured([(found, wanted)])
    parts = [measured([(found[n::2], wanted[n::2])]) for n in range(2)] + [Detection().metrics()]
    states = [part.state() for part in parts]
    for part in parts:
        part.merge(states)
        assert part.compute() == pytest.approx(whole.compute(), abs=1e-6)
    assert Detection().metrics().compute() == {}


def test_nothing_found_and_nothing_to_find():
    nothing = said(box(), [])
    assert measured([([nothing], [truth(box([0, 0, 5, 5]))])]).compute()["map"] == 0
    with pytest.raises(UserError, match="no image of the evaluation has a box"):
        measured([([nothing], [truth(box())])]).compute()
    with pytest.raises(UserError, match="no image of the evaluation has a box of one object"):
        measured([([nothing], [truth(box([0, 0, 5, 5]), [1], [1])])]).compute()
    with pytest.raises(UserError, match="must give a list with objects per image, got dict"):
        measured([({"loss": torch.zeros(())}, [truth(box())])])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (truth(box([0, 0, 5, 5]), [0]), "a label 0, outside of the classes"),
        (truth(box([30, 0, 5, 5])), "is empty or outside of its image"),
        (truth(box([0, 0, float("nan"), 5])), "is empty or outside of its image"),
        ({**truth(box([0, 0, 5, 5])), "labels": torch.ones(0, dtype=torch.int64)}, r"got \(1, 4\) and \(0,\)"),
    ],
)
def test_truths_are_checked_where_no_loss_is_computed(wrong, message):
    with pytest.raises(UserError, match=message):
        measured([([said(box(), [])], [wrong])])


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"needs torchmetrics and faster-coco-eval: pip install 'distpro\[detection\]'"):
        measured([([said(box(), [])], [truth(box([0, 0, 5, 5]))])]).compute()


# Losses


def test_boxes_of_any_precision():
    """As NumPy and JSON give them: FCOS' matcher takes float32 alone."""
    batch = batch_of(1, 2)
    doubled = [{**target, "boxes": target["boxes"].double()} for target in batch.target]
    given = Detection().call(Batch(batch.inputs, doubled, 2), True).args[1]
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(given, batch.target, strict=True))
    assert {target["boxes"].dtype for target in given} == {torch.float32}


def batch_of(*counts, seed=0):
    """Images of different sizes with so many bright boxes each."""
    draw = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for n, count in enumerate(counts):
        image = 0.2 * torch.rand(3, 60 + 6 * n, 80 - 8 * n, generator=draw)
        corners = torch.randint(0, 20, (count, 2), generator=draw).float()
        boxes = torch.cat([corners, corners + 30], 1)
        for left, top, right, bottom in boxes.int().tolist():
            image[:, top:bottom, left:right] += 0.5
        images.append(image)
        targets.append(truth(boxes, torch.randint(1, 3, (count,), generator=draw).tolist()))
    return Batch(images, targets, len(images), torch.arange(len(images)))


def test_the_loss_is_the_weighted_sum_of_the_model_s_own():
    losses = {"one": torch.tensor(2.0, requires_grad=True), "two": torch.tensor([3.0])}
    assert Detection().loss(losses, batch_of(1)).item() == 5
    assert Detection(weights={"two": 0.5}).loss(losses, batch_of(1)).item() == 3.5
    assert Detection().parts(losses) == losses and Detection().parts([]) == {}
    with pytest.raises(UserError, match=r"the model has no loss 'twoo'; did you mean 'two'\? \(allowed: one, two\)"):
        Detection(weights={"twoo": 1}).loss(losses, batch_of(1))
    with pytest.raises(UserError, match="weights.two must be a number of at least 0, got -1"):
        Detection(weights={"two": -1})
    with pytest.raises(UserError, match="the model gave no losses by name in training mode, but list"):
        Detection().loss([], batch_of(1))


def test_what_is_no_batch_of_images_is_refused():
    with pytest.raises(UserError, match="detection needs a list of images, got Tensor"):
        Detection().call(Batch(torch.zeros(2, 3, 8, 8), None, 2), False)
    with pytest.raises(UserError, match="a mapping with boxes and labels per image as target"):
        Detection().call(Batch([torch.zeros(3, 8, 8)], torch.zeros(1), 1), True)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            {"boxes": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)},
            r"with no object \(0, 4\) and \(0,\), got \(0,\)",
        ),
        ({"boxes": torch.zeros(1, 4), "labels": torch.ones(2, dtype=torch.int64)}, r"got \(1, 4\) and \(2,\)"),
        (truth(box([1, 1, 1, 5])), r"the box \[1.0, 1.0, 1.0, 5.0\] is empty or outside of its image of 9x8"),
        (truth(box([1, 1, 5, 5], [20, 1, 30, 5])), r"the box \[20.0, 1.0, 30.0, 5.0\] is empty or outside"),
        (truth(box([1, 1, 5, float("nan")])), "is empty or outside"),
    ],
)
def test_targets_that_nothing_can_be_learned_from(target, said):
    with pytest.raises(UserError, match=f"^detection: .*{said}"):
        Detection().call(Batch([torch.zeros(3, 8, 9)], [target], 1), True)


def test_a_box_over_the_edge_and_an_image_without_objects_are_taken():
    images = [torch.zeros(3, 8, 9)] * 2
    targets = [truth(box([-2, 1, 5, 12])), truth(box())]
    assert len(Detection().call(Batch(images, targets, 2), True).args) == 2
    with pytest.raises(UserError, match="2 images have 1 targets"):
        Detection().call(Batch(images, targets[:1], 2), True)


def test_labels_that_cannot_be():
    task = Detection()

    class Data:
        num_classes = 2

    assert task.model_arguments(Data()) == {"num_classes": 3}
    for labels in ([0], [3]):
        batch = Batch([torch.zeros(3, 9, 9)], [truth(box([0, 0, 5, 5]), labels)], 1)
        with pytest.raises(
            UserError,
            match=rf"detection: there is a label {labels[0]}, outside of the classes, 1 to 2 \(0 is the backgr",
        ):
            task.call(batch, True)
    batch = Batch([torch.zeros(3, 9, 9)], [{"boxes": box([0, 0, 5, 5]), "labels": torch.ones(1)}], 1)
    with pytest.raises(UserError, match="detection: labels are class numbers, int64, got float32"):
        task.call(batch, True)


def test_crowds_count_in_evaluation_alone():
    batch = Batch([torch.zeros(3, 9, 9)], [truth(box([0, 0, 5, 5], [1, 1, 8, 8]), [1, 2], [0, 1])], 1)
    (_, targets), _ = Detection().call(batch, True)
    assert targets[0].keys() == {"boxes", "labels"} and targets[0]["labels"].tolist() == [1]
    # what is found within a crowd is neither right nor wrong
    found = said(box([0, 0, 5, 5], [2, 2, 8, 8], [1, 1, 8, 7]), [0.5, 0.9, 0.8], [1, 2, 2])
    assert measured([([found], batch.target)]).compute()["map"] == pytest.approx(100)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_detector_trains_with_images_without_boxes(name):
    torch.manual_seed(0)
    model, task = MODELS[name]().train(), Detection()
    for counts in ((2, 0), (0, 0)):
        batch = batch_of(*counts)
        loss = task.loss(task.call(batch, True).run(model), batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients if g is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcos", "fasterrcnn"])
def test_an_evaluation_s_loss_leaves_no_trace(name):
    """It is that of training mode with BatchNorm as in evaluation, the same each time, whatever is drawn elsewhere."""
    torch.manual_seed(0)
    student, task, batch = MODELS[name](), Detection(), batch_of(2, 0, 1)
    objective = Objective(None, student, [], task=task, example_input=task.call(batch, False))
    buffers = {key: value.clone() for key, value in student.state_dict().items()}
    modes, state = [m.training for m in student.modules()], random_state(student)

    class Loader:
        def epoch(self, epoch):
            return iter([batch])

    found = evaluate(objective, task.metrics(), Loader())
    torch.testing.assert_close(random_state(student), state, equal_nan=True, rtol=0, atol=0)
    assert [m.training for m in student.modules()] == modes
    assert all(torch.equal(value, buffers[key]) for key, value in student.state_dict().items())
    assert found.keys() == {"map", "map50", "map75", "loss"}
    torch.manual_seed(5)
    assert evaluate(objective, task.metrics(), Loader()) == found
    student.eval()
    for module in student.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = sum(student(batch.inputs, [{k: t[k] for k in ("boxes", "labels")} for t in batch.target]).values())
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert "loss" not in evaluate(objective, Detection(with_loss=False).metrics(), Loader()) or task.with_loss
    assert Detection(with_loss=False).predict(student.eval(), batch).losses is None
    assert isinstance(task.predict(student, batch), Found)


# Hypergradients


def objective_of(name, taps):
    torch.manual_seed(0)
    student, teacher, task, batch = MODELS[name](), MODELS[name](), Detection(), batch_of(2, 1)
    shapes = [(1, 1, 1)]
    terms = [Term(build_loss("at", shapes, shapes), tap, [tap], [tap]) for tap in taps]
    return Objective(teacher, student, terms, example_input=task.call(batch, False), task=task), batch


def passes_tangents_on():
    """Whether tangents of maps get through torchvision's roi_align at all: not in 0.23."""
    with forward_ad.dual_level():
        maps = forward_ad.make_dual(torch.rand(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
        try:
            roi_align(maps, [box(0, 0, 3, 3)], 2)
        except RuntimeError:
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "taps", "forward", "second"),
    [
        ("fcos", ["backbone[0]", "backbone[1]"], "", ""),
        ("retinanet", ["backbone[0]"], "", ""),
        ("ssdlite", ["backbone.features.0"], "", ""),
        ("fasterrcnn", ["backbone[0]", "backbone[2]"], "", "roi_align"),
        (
            "fasterrcnn",
            ["backbone[0]", "roi_heads.box_roi_pool"],
            "not its derivative at roi_heads.box_roi_pool",
            None,  # the two models' regions are not as many
        ),
    ],
)
def test_what_a_detector_s_operators_allow(name, taps, forward, second):
    """Behind a pyramid's maps roi_align has no say in their tangents; it has in the second derivatives of the loss."""
    if name == "fasterrcnn" and not passes_tangents_on():
        forward = "jvp is not implemented"
    objective, batch = objective_of(name, taps)
    answer = obstacle(objective, batch)
    assert forward in answer and bool(forward) == bool(answer)
    if second is not None:
        assert second_obstacle(objective, batch) == second


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcos", "fasterrcnn"])
def test_forward_mode_and_finite_differences_agree(name):
    if name == "fasterrcnn" and not passes_tangents_on():
        pytest.skip("no forward-mode pass leads through this torchvision's roi_align")
    found = []
    for estimator, params in (("forward_mode", {}), ("finite_difference", {"epsilon": 1e-7})):
        objective, batch = objective_of(name, ["backbone[0]", "backbone[1]", "backbone[2]"])
        objective.double()
        batch = batch.to(lambda t: t.double() if t.is_floating_point() else t)
        optimizer = torch.optim.SGD(objective.trainable_parameters(), lr=1e-4)
        estimator = ESTIMATORS.build(estimator, objective, optimizer, **params)
        weights = torch.tensor([1.0, 2.0, 3.0]).double()
        state = random_state(objective.student)
        theta = {p: p.detach().clone() for p in objective.trainable_parameters()}
        estimator.before_pass()
        done = objective.training_pass(batch, weights.tolist(), capture=estimator.needs_views)
        done.loss.backward()
        step = TrainingStep(batch, weights, 1.0, theta, state, done)
        estimator.before_step(step)
        optimizer.step()
        found.append(estimator(step, [batch_of(1, 2, seed=1).to(lambda t: t.double() if t.is_floating_point() else t)]))
    assert (found[0] != 0).all()
    assert ((found[0] - found[1]).norm() / found[0].norm()).item() < 1e-3
