"""What is no model, no data, no task, or does not go together, is said in a short message before anything is trained."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import Dataset

import distpro
from distpro.cli import main
from distpro.losses import DistillationLoss
from distpro.models import accepted, build_model
from tests import own_models
from tests.digits import settings as digits
from tests.runs.test_any_model import HERE, settings

GIVEN = {
    "a word for a model": ({"student": "resnet8"}, "student is str, not a torch.nn.Module"),
    "a class for a model": ({"teacher": own_models.Tagger}, "teacher is type, not a torch.nn.Module"),
    "numbers for data": ({"data": (1, 2)}, "data: the train part is int; it must be a torch.utils.data.Dataset or"),
    "a word for data": ({"data": "digits"}, "data is str: expected (train, test) or (train, validation, test)"),
    "one data set": ({"data": own_models.texts()[0]}, "data is Texts: expected (train, test) or"),
    "four data sets": ({"data": own_models.texts() * 2}, "data holds 6 parts: expected (train, test) or"),
    "a word for a task": ({"task": "tagging"}, "task is str, which has no headline, higher_is_better, model_arguments"),
    "a class for a task": ({"task": own_models.Tagging}, "task is the class Tagging: give one of it, Tagging(...)"),
}


class Silent(own_models.Tagging):
    response = property()  # as if there were none


class Misnamed(own_models.Tagging):
    headline = "accuracy"


class NoMetrics(own_models.Tagging):
    def metrics(self):
        return lambda output, batch: 0.0


@pytest.mark.parametrize("case", GIVEN)
def test_objects_that_are_none(case, tmp_path):
    objects, message = GIVEN[case]
    with pytest.raises(distpro.UserError) as caught:
        distpro.search(settings("texts", tmp_path), out=tmp_path / "run", **objects)
    assert message in str(caught.value) and len(str(caught.value)) < 250
    assert not (tmp_path / "run").exists()


def test_tasks_that_lack_something(tmp_path):
    config = settings("tagger", tmp_path, {"training": {"max_steps": 4}})
    with pytest.raises(distpro.UserError, match=r"task is Silent, which has no response \(needed: headline, "):
        distpro.search(config, task=Silent())
    with pytest.raises(distpro.UserError, match="metrics of the task is function, which has no update, state, merge"):
        distpro.search(config, task=NoMetrics())
    # not at the end of the training, but at its first evaluation
    with pytest.raises(distpro.UserError, match=r"the task's headline 'accuracy' is none of its metrics \(tags\)"):
        distpro.search(config, out=tmp_path / "run", task=Misnamed())
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def scores_of(output):
    return output["hidden"][..., :3]


class Elsewhere(own_models.Tagging):
    """The response is what the task says, not what the output calls logits."""

    def response(self, output):
        return scores_of(output)


def test_terms_are_built_for_the_tasks_own_response(tmp_path):
    """Three of the eight channels of ``hidden``: what `dkd` reads is (N, L, 3) of both models, and the search runs."""
    config = settings("tagger", tmp_path, {"pathways": None, "terms": [{"loss": "dkd"}], "training": {"max_steps": 2}})
    schedule = distpro.search(config, task=Elsewhere())
    assert schedule.keys == ("dkd",) and schedule.weights.isfinite().all()


class Short(DistillationLoss):
    taps = ("logits",)

    def forward(self, student, teacher):
        return (student - teacher).square().mean()


OWN = "tests.runs.test_wrong_parts"
WRITTEN = {
    "a loss without target": (
        {"terms": [{"loss": f"{OWN}:Short"}]},
        "Short.forward(student, teacher) is called as forward(student, teacher, target=..., index=...)",
    ),
    "a module for a loss": (
        {"terms": [{"loss": "torch.nn:MSELoss"}]},
        "loss 'torch.nn:MSELoss' is not a class derived from distpro.losses.DistillationLoss",
    ),
    "a function for a loss": ({"terms": [{"loss": f"{OWN}:scores_of"}]}, f"loss '{OWN}:scores_of' is not a class derived"),
    "accumulate": ({"training": {"accumulate": 2}}, "training.accumulate: a search's step is one batch"),
    "unknown optimiser": (
        {"training": {"optimizer": {"name": "admw"}}},
        "unknown optimiser 'admw'; did you mean 'adamw'? (allowed: adam, adamw, sgd, adadelta",
    ),
    "parameters of a known optimiser": (
        {"training": {"optimizer": {"name": "adamw", "params": {"amsgrad": True}}}},
        "training.optimizer.params: for other optimisers; adamw takes its parameters beside its name",
    ),
    "an optimiser that is none": (
        {"training": {"optimizer": {"name": f"{HERE}:Tagger"}}},
        f"optimiser '{HERE}:Tagger' is called with the parameters, lr and params: got an unexpected keyword argument",
    ),
    "an optimiser without the parameter": (
        {"training": {"optimizer": {"name": "torch.optim:RMSprop", "params": {"alpa": 0.9}}}},
        "optimiser 'torch.optim:RMSprop' has no parameter 'alpa'; did you mean 'alpha'?",
    ),
    "augment": ({"data": {"augment": ["flip"]}}, "augment is for distpro's own data sets; a Dataset augments itself"),
    "cache": ({"cache": {"folder": "cache"}}, "cache: for distpro's own data sets"),
    "classes": ({"data": {"classes": 2}}, f"classes: dataset '{HERE}:texts' brings its own samples as they are"),
    "data that are none": ({"data": {"name": f"{HERE}:Mean", "params": {"measure": 1, "count": None}}}, "'count'"),
    "a task that is none": ({"task": f"{HERE}:texts"}, f"task '{HERE}:texts' is tuple, which has no headline"),
    "a metric that is none": ({"metrics": [f"{HERE}:Tagging"]}, f"metric '{HERE}:Tagging' is Tagging, which has no update"),
    "unknown metric": ({"metrics": ["confsion"]}, "unknown metric 'confsion'; did you mean 'confusion'?"),
    "unknown task": ({"task": "segmentaton"}, "unknown task 'segmentaton'; did you mean 'segmentation'?"),
    "no such module": ({"data": {"name": "nowhere.at_all:texts"}}, "cannot import 'nowhere.at_all' (ModuleNotFoundError"),
    "no such name": ({"task": f"{HERE}:Taging"}, f"task '{HERE}:Taging': '{HERE}' has no 'Taging'; did you mean 'Tagging'?"),
    "a model that is none": ({"student": {"model": f"{HERE}:texts", "params": None}}, f"model '{HERE}:texts' gives tuple, not a torch.nn.Module"),
    "another task's labels": (
        {"data": {"name": f"{HERE}:tagged_texts"}},
        "classification needs a row of classes and one label per sample, got a response (8, 3) and targets (8, 7)",
    ),
    "another task's response": ({"task": "segmentation"}, "segmentation: labels are maps (N, H, W), got (8,)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_the_command_says_it_in_one_line(case, tmp_path, monkeypatch, capsys):
    change, message = WRITTEN[case]
    config = settings("texts", tmp_path, change)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(config))
    assert main(["search", "cfg.yaml", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("distpro: ") and len(said.splitlines()) == 1, said
    assert len(said) < 330 and not (tmp_path / "run" / "checkpoint.pt").exists()


class Sized(Dataset):
    """Noise of two classes, (3, 8, 8) and, of the odd ones from sample ``since`` on, (3, 8, 10)."""

    def __init__(self, since=16, collate_fn=None):
        self.since = since
        if collate_fn is not None:
            self.collate_fn = collate_fn

    def __len__(self):
        return 16

    def __getitem__(self, n):
        return torch.zeros(3, 8, 10 if n % 2 and n >= self.since else 8), n % 2


class Plain(nn.Module):
    """Without an ``__init__``; answers with two numbers of an image."""

    def forward(self, x):
        return x.flatten(1)[:, :2]


INSTANCE = nn.Linear(2, 2)


def sized():
    return Sized(0), Sized()


def sized_in_the_test():
    return Sized(), Sized(0)


def padded():
    def together(samples):
        return torch.stack([x[..., :8] for x, _ in samples]), torch.tensor([y for _, y in samples])

    return Sized(0, together), Sized(0, together)


def trained(tmp_path, **changes):
    config = {"student": {"model": "resnet8"}, "training": {"max_steps": 2, "batch_size": 8}, "device": "cpu"}
    config |= {"data": {"name": f"{OWN}:padded", "num_classes": 2}, "tracking": {"tensorboard": False}, **changes}
    return distpro.train(config, out=tmp_path / "run")


@pytest.mark.parametrize("name", ["sized", "sized_in_the_test"])
def test_images_of_several_sizes_are_refused_by_classification(name, tmp_path):
    said = r"differ in size, \(3, 8, 8\) and \(3, 8, 10\): resize them in the data set, or give it a collate_fn$"
    with pytest.raises(distpro.UserError, match=said):
        trained(tmp_path, data={"name": f"{OWN}:{name}", "num_classes": 2})
    assert 0 <= trained(tmp_path / "padded").metrics["accuracy"] <= 100


class SizedMaps(Sized):
    def __getitem__(self, n):
        image, _ = super().__getitem__(n)
        return image, torch.zeros(image.shape[1:], dtype=torch.int64)


class SizedDepths(SizedMaps):
    def __getitem__(self, n):
        image, labels = super().__getitem__(n)
        return image, 1.0 + labels


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_images_of_several_sizes_are_refused_by_maps(task):
    part = SizedMaps(0) if task == "segmentation" else SizedDepths(0)
    with pytest.raises(distpro.UserError, match=rf"^{task}: samples of a batch differ in size, .*resize them in the"):
        distpro.train({"task": task, "device": "cpu"}, student=nn.Conv2d(3, 2, 1), data=(part, part))


class Boxes(Dataset):
    """Three objects of the classes 1, 2 and 3."""

    def __len__(self):
        return 4

    def __getitem__(self, n):
        boxes = torch.tensor([[1.0, 1, 20, 20], [5, 5, 30, 30], [2, 9, 31, 31]])
        return torch.zeros(3, 32, 32), {"boxes": boxes, "labels": torch.tensor([1, 2, 3])}


def boxes():
    return Boxes(), Boxes()


def test_detectors_ask_for_the_kinds_of_objects(tmp_path):
    """A label above them would be read at a place that is not there. They may stand with the model, the background among them."""
    params = {"backbone": "mobilenet_v3_small", "channels": 32, "min_size": 32, "max_size": 32}
    config = {"task": "detection", "student": {"model": "fcos_fpn", "params": params}, "channels_last": False}
    with pytest.raises(distpro.UserError, match=r"^data.num_classes: how many classes fcos_fpn answers with is not"):
        trained(tmp_path, **config, data={"name": f"{OWN}:boxes"})
    said = r"there is a label 3, outside of the classes, 1 to 2"
    with pytest.raises(distpro.UserError, match=said):
        trained(tmp_path, **config, data={"name": f"{OWN}:boxes", "num_classes": 2})
    params["num_classes"] = 3
    with pytest.raises(distpro.UserError, match=said):
        trained(tmp_path, **config, data={"name": f"{OWN}:boxes"})


@pytest.mark.parametrize("model", ["resnet8", "torchvision:resnet18"])
def test_the_number_of_classes_of_ones_own_data_is_asked_for(model, tmp_path):
    """Also where a library's model would have a thousand of them by itself."""
    said = f"^data.num_classes: how many classes {model} answers with is not known"
    with pytest.raises(distpro.UserError, match=said):
        trained(tmp_path, student={"model": model}, data={"name": f"{OWN}:padded"})


def test_the_number_of_classes_may_stand_with_the_model(tmp_path):
    stated = {"student": {"model": "resnet8", "params": {"num_classes": 2}}, "data": {"name": f"{OWN}:padded"}}
    assert trained(tmp_path, **stated).metrics["accuracy"] >= 0


def test_models_that_take_no_parameters(tmp_path):
    with pytest.raises(distpro.UserError, match="INSTANCE' is an object of Linear: name the class, or a function"):
        trained(tmp_path, student={"model": f"{OWN}:INSTANCE"})
    assert isinstance(build_model(f"{OWN}:Plain", **accepted(f"{OWN}:Plain", {"num_classes": 2})), Plain)
    with pytest.raises(distpro.UserError, match="Plain' has no parameter 'width'"):
        build_model(f"{OWN}:Plain", width=3)
    with pytest.raises(distpro.UserError, match="there is nothing to train"):
        trained(tmp_path, student={"model": f"{OWN}:Plain"})


def test_metrics_of_one_name(tmp_path):
    config = digits(changes={"metrics": [f"{OWN}:Accuracy"], "training": {"max_steps": 1}})
    with pytest.raises(distpro.UserError, match="metrics: two give 'accuracy'"):
        distpro.train(config)


def Accuracy():
    return own_models.Mean(lambda output, batch: {"accuracy": torch.zeros(())})
