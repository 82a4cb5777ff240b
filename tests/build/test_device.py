"""Which precision a run computes in, and what is said of one that the device only emulates."""

from __future__ import annotations

import pytest
import torch
import yaml

import distpro
from distpro.build import device
from distpro.cli import main
from distpro.config.reading import read_config
from tests.digits import settings

ADVICE = "is emulated on this CPU, several times slower than float32; auto takes the fastest"


@pytest.fixture(autouse=True)
def nothing_said_yet():
    device._say_emulated.cache_clear()


@pytest.fixture
def units(monkeypatch):
    """Sets which arithmetic units the CPU has."""

    def having(*names):
        for name in ("avx512_bf16", "amx_tile", "amx_fp16"):
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in names, raising=False)

    return having


def config(**changes):
    return read_config({"device": "cpu", "student": {"model": "resnet8"}, **changes})


def test_the_default_is_the_fastest_of_the_device(units, capsys):
    for names, expected in (((), "float32"), (("avx512_bf16",), "bfloat16"), (("amx_tile",), "bfloat16")):
        units(*names)
        assert config().precision == "auto"
        assert device.settle_precision(config()).precision == expected
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("precision", "unit"), [("bfloat16", "avx512_bf16"), ("bfloat16", "amx_tile"), ("float16", "amx_fp16")]
)
def test_an_emulated_precision_is_taken_and_said_once(precision, unit, units, capsys):
    chosen = config(precision=precision)
    units(unit)
    device.note_emulation(chosen)
    assert capsys.readouterr().out == ""
    units()
    assert device.settle_precision(chosen) == chosen
    device.note_emulation(chosen)
    device.note_emulation(chosen)
    assert capsys.readouterr().out == f"precision: {precision} {ADVICE}\n"


def test_float32_is_nowhere_emulated(units, capsys):
    units()
    device.note_emulation(config(precision="float32"))
    assert capsys.readouterr().out == ""


def test_an_old_gpu_emulates_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(device, "device_of", lambda config: torch.device("cuda"))
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        device.note_emulation(config(precision="float16"))
        assert capsys.readouterr().out == ""
        device.note_emulation(config(precision="bfloat16"))
        assert capsys.readouterr().out == (
            "" if native else f"precision: bfloat16 {ADVICE}\n".replace("this CPU", "this GPU")
        )


@pytest.mark.parametrize("precision, said", [("bfloat16", True), ("float32", False), ("auto", False)])
def test_a_run_says_it_before_it_begins(precision, said, units, capsys):
    units()
    distpro.train(settings(changes={"device": "cpu", "precision": precision, "training": {"max_steps": 1}}))
    out = capsys.readouterr().out
    assert out.startswith(f"precision: bfloat16 {ADVICE}\n") == said
    assert out.count("emulated") == int(said)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mps", "device: 'mps' is a kind of device that runs are not made for (allowed: auto, cpu, cuda, cuda:N)"),
        ("xpu", "device: 'xpu' is a kind of device"),
        ("xpu:1", "device: 'xpu:1' is a kind of device"),
        ("meta", "device: 'meta' is a kind of device"),
        ("cpu:1", "device: 'cpu:1' asked for, but the machine has 1 of its kind, numbered from 0"),
        ("nonsense", "device: 'nonsense' is not a device (allowed: auto, cpu, cuda, cuda:N)"),
        ("cuda:", "device: 'cuda:' is not a device"),
    ],
)
def test_a_device_that_cannot_be_is_one_message(name, message, capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings(changes={"device": name})))
    for precision in ("auto", "float32"):
        assert main(["train", str(path), f"precision={precision}", "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"distpro: {message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("there", "message"), [(0, "CUDA is not available here"), (2, "the machine has 2 of its kind")]
)
def test_a_gpu_that_is_not_there(there, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(distpro.UserError, match=f"device: 'cuda:3' asked for, but {message}"):
        device.device_of(config(device="cuda:3"))
    if there:
        assert device.device_of(config(device="cuda:1")) == torch.device("cuda:1")
