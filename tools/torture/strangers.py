"""Promise 5: a stranger's file never runs code. Every attack would leave a file called canary."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from distpro import cli
from distpro.data.datasets import load_data
from distpro.data.tokens import build_tokenizer
from distpro.models import build_model, load_checkpoint
from distpro.runs.commands import retrain_config
from distpro.schedule import Schedule
from distpro.schedule_file import content_of
from pathways.registry import UserError
from torture.campaign import COMMON, TAUGHT, Campaign, fork, merged

HIDDEN = "not for strangers"


class Bomb:
    """What its pickle does when it is read: make the canary."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, ("touch canary",)


MODULE = "from pathlib import Path\nPath('canary').touch()\ndef build(*_, **__): raise SystemExit(3)\nLion = build\n"
NAMED = {
    "student": {"model": "stranger:build"},
    "task": "stranger:build",
    "metrics": ["stranger:build"],
    "data": {"name": "stranger:build"},
    "terms": [{"loss": "stranger:build"}],
    "training": {"optimizer": {"name": "stranger:build"}},
    "pathways": {"transforms": ["stranger:build"]},
}


def attacks(place: Path) -> dict[str, Callable[[], Any]]:
    """Each by what it is, as what a person would do with the file."""
    torch.manual_seed(0)
    ones = torch.ones(2, 1)
    schedule = Schedule(("a",), torch.zeros(1, 3, dtype=torch.int64), ones, ones, ("",), scales=torch.ones(1))
    found: dict[str, Callable[[], Any]] = {}
    for where in ("meta", "keys", "weights"):
        torch.save({**content_of(schedule), where: Bomb()}, place / f"{where}.pt")
        found[f"pickle in a schedule's {where}"] = lambda w=where: Schedule.load(f"{w}.pt")
    (place / "bare.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": Bomb()}, place / "weights.pt")
    torch.save({"x": Bomb()}, place / "old.pt", _use_new_zipfile_serialization=False)
    model = build_model("resnet8", num_classes=10)
    for name in ("bare", "weights", "old"):
        found[f"pickle in a checkpoint ({name})"] = lambda n=name: load_checkpoint(model, f"{n}.pt")
        found[f"pickle as a schedule ({name})"] = lambda n=name: Schedule.load(f"{n}.pt")
    for tag in ("object/apply:os.system [touch canary]", "object/new:os.system [touch canary]", "name:os.system"):
        path = place / f"{len(found)}.yaml"
        path.write_text(f"student: {{model: resnet8}}\nname: !!python/{tag}\n")
        found[f"YAML tag {tag.partition(' ')[0]}"] = lambda p=path: _cli("search", str(p), "--dry-run")
        found[f"YAML tag {tag.partition(' ')[0]} on the command line"] = lambda t=tag: _cli(
            "train", "plain.yaml", f"name=!!python/{t}", "--dry-run"
        )
    (place / "plain.yaml").write_text(yaml.safe_dump(COMMON))
    (place / "stranger.py").write_text(MODULE)
    for key, said in NAMED.items():
        config = merged(merged(COMMON, TAUGHT), {key: said})
        named = replace(schedule, meta={"config": config})
        named.save(place / f"named_{key}.pt")
        found[f"package.module:name in a schedule's {key}"] = lambda k=key: _refuses(
            lambda: retrain_config(None, Schedule.load(f"named_{k}.pt"), [])
        )
        found[f"the same, inspected ({key})"] = lambda k=key: _cli("inspect", f"named_{k}.pt")
        found[f"the same, as the space of a config ({key})"] = lambda k=key: _cli(
            "retrain", "plain.yaml", "--schedule", f"named_{k}.pt", "--dry-run"
        )
    bad = np.empty(2, object)
    bad[:] = [Bomb(), Bomb()]
    np.savez(place / "objects.npz", x_train=bad, y_train=bad, x_test=bad, y_test=bad)
    found["npz with objects"] = lambda: load_data("npz", "objects.npz")
    _archives(place)
    for name in ("links.tar", "up.tar", "up.zip", "links.zip"):
        found[f"members of {name} that lead out of it"] = lambda n=name: _shows_nothing(n)
    folder = place / "hf"
    folder.mkdir(exist_ok=True)
    auto = {"AutoConfig": "stranger.build", "AutoModel": "stranger.build", "AutoTokenizer": ["stranger.build", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Mine",
                "auto_map": auto,
                "chat_template": "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
            }
        )
    )
    (folder / "stranger.py").write_text(MODULE)
    found["tokenizer that wants trust_remote_code"] = lambda: build_tokenizer("hf", "torture", ["a b"])
    found["model that wants trust_remote_code"] = lambda: build_model("hf:hf", num_classes=2)
    torch.save(Bomb(), folder / "pytorch_model.bin")
    (place / "bert").mkdir(exist_ok=True)
    (place / "bert" / "config.json").write_text(
        json.dumps(
            {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
        )
    )
    torch.save({"x": Bomb()}, place / "bert" / "pytorch_model.bin")
    found["pickled weights of a transformers folder"] = lambda: build_model("hf:bert", num_classes=2, pretrained=True)
    return found


def _archives(place: Path) -> None:
    (place / "secret.txt").write_text(HIDDEN)
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    for kind in ("links", "up"):
        with tarfile.open(place / f"{kind}.tar", "w") as archive:
            for part in ("train", "test"):
                entry = tarfile.TarInfo(f"{part}/a/0.png")
                entry.size = len(image.getvalue())
                archive.addfile(entry, io.BytesIO(image.getvalue()))
                odd = tarfile.TarInfo(f"{part}/a/1.png" if kind == "links" else f"../{part}/a/../../../secret.txt")
                odd.type, odd.linkname = (
                    (tarfile.SYMTYPE, "../../secret.txt") if kind == "links" else (tarfile.REGTYPE, "")
                )
                archive.addfile(odd)
        with zipfile.ZipFile(place / f"{kind}.zip", "w") as packed:
            for part in ("train", "test"):
                packed.writestr(f"{part}/a/0.png", image.getvalue())
                odd_one = zipfile.ZipInfo(f"{part}/a/1.png" if kind == "links" else "../../secret.txt")
                odd_one.external_attr = 0o120777 << 16
                packed.writestr(
                    odd_one if part == "train" or kind == "links" else "../../other.txt",
                    "../../secret.txt" if kind == "links" else "x",
                )


def _shows_nothing(name: str) -> None:
    before = sorted(Path().rglob("*"))
    with contextlib.suppress(UserError):
        data = load_data("folder", name, image_size=8)  # decoded at once, or at each use
        for part in (data.train, data.test):
            with contextlib.suppress(UserError):
                if hasattr(part.images, "decode"):
                    part.images.decode(range(len(part)), threads=1)
    if sorted(Path().rglob("*")) != before:
        raise AssertionError("something was unpacked")


def _refuses(act: Callable[[], Any]) -> None:
    try:
        act()
    except UserError:
        return
    raise AssertionError("not refused")


def _cli(*arguments: str) -> None:
    status = cli.main(list(arguments))
    if status not in (0, 2):
        raise AssertionError(f"status {status}")


def attack(campaign: Campaign, most: int) -> None:
    """All of the attacks, each in a process of its own."""
    os.chdir(campaign.place)
    found = attacks(campaign.place)
    for (case, _), (name, act) in zip(campaign.cases("strangers", min(most, len(found))), found.items(), strict=False):
        canary = campaign.place / "canary"
        canary.unlink(missing_ok=True)

        def work(act: Callable[[], Any] = act) -> int:
            import sys

            sys.path.insert(0, str(campaign.place))
            os.environ["HF_HUB_OFFLINE"] = "1"
            try:
                act()
            except UserError as error:
                print(error)
                return 2
            return 0

        child = fork(work, limit=60)
        ok = not canary.exists() and child.status in (0, 2) and HIDDEN not in child.said
        campaign.end("strangers", case, name, ok, status=child.status, said=child.said[-400:])
