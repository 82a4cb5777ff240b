"""Promise 4: garbage gets one short message, status 2, and nothing else: no traceback, no hang, no code run, bounded memory."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from distpro import build, cli
from distpro.config.reading import read_config
from distpro.config.stages import stages_of
from distpro.data.datasets import load_data
from distpro.data.tokens import build_tokenizer
from distpro.models import build_model, load_checkpoint
from distpro.schedule import Schedule
from distpro.train.checkpoint import read_checkpoint
from pathways.registry import UserError
from torture.campaign import COMMON, TAUGHT, Campaign, fork, merged
from torture.mutations import WORDS, change, mutate_bytes, mutate_zip

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 100  # attacks of a case
SECONDS = 20  # of one attack
MEGABYTES = 3000  # of a child, torch and all

# Configs


def shipped() -> list[Path]:
    return [
        path for folder in ("search_configs", "retrain_configs") for path in sorted((ROOT / folder).rglob("*.yaml"))
    ]


def configs(campaign: Campaign, most: int) -> None:
    """Mutated configs: bytes of the shipped ones, values and keys of their contents, and examples drawn from the schema."""
    files = shipped()
    for case, draw in campaign.cases("configs", most):
        _chunk(campaign, "configs", case, lambda d=draw: _mutated_configs(campaign.place, d, files), _read_config)


def _mutated_configs(place: Path, draw: random.Random, files: list[Path]) -> Iterator[tuple[str, Path]]:
    for n in range(CHUNK):
        file = draw.choice(files)
        path = place / f"{n}.yaml"
        kind = draw.choice(("bytes", "words", "values", "schema"))
        if kind == "bytes":
            path.write_bytes(mutate_bytes(_text(file).encode(), draw))
        elif kind == "words":
            text = _text(file)
            for _ in range(draw.randrange(1, 4)):
                at = draw.randrange(len(text) + 1)
                text = text[:at] + draw.choice(WORDS) + text[at + draw.choice((0, 0, 1, 5)) :]
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        else:
            known = read_config(merged(COMMON, TAUGHT)).model_dump(mode="json")
            content = known if kind == "schema" else yaml.safe_load(_text(file))
            if kind == "values" and draw.random() < 0.8:
                content = merged(merged(COMMON, TAUGHT), content)
            for _ in range(draw.choice((1, 1, 2, 5))):
                change(content, draw)
            path.write_text(yaml.dump(content))
        yield f"{kind} of {file.name}", path


def _text(file: Path) -> str:
    """A shipped config that finds its base from anywhere."""
    return re.sub(r"(?m)^base: *(\S+)", lambda found: f"base: {file.parent / found[1]}", file.read_text())


def _read_config(path: Path) -> int:
    """What a search or a retrain does with its config before it loads anything, by the command line."""

    def dry_run(config: Any, searching: bool) -> None:
        for stage in stages_of(config):
            build.check_names(stage.config)

    cli._dry_run = dry_run
    which = "search" if path.stem[-1] in "02468" else "retrain"
    return cli.main([which, str(path), "--dry-run"])


# Files


def files(campaign: Campaign, most: int) -> None:
    """Mutated schedules, checkpoints, weights, arrays, images, annotations, texts and tokenizers."""
    place = campaign.place
    if not (place / "alpha.pt").exists():
        _make_corpus(place)
    for case, draw in campaign.cases("files", most):
        kind = list(READERS)[case % len(READERS)]
        name, read = READERS[kind]
        _chunk(campaign, "files", case, lambda d=draw, f=name: _mutated_files(place, f, d), read, kind)


def _make_corpus(place: Path) -> None:
    def work() -> int:
        import os

        os.chdir(place)
        torch.manual_seed(0)
        torch.save(build_model("resnet14", num_classes=10).state_dict(), "teacher.pt")
        Path("run.yaml").write_text(yaml.safe_dump(merged(merged(COMMON, TAUGHT), {"training": {"epochs": 1}})))
        assert cli.main(["search", "run.yaml", "--out", "run"]) == 0
        for name in ("alpha.pt", "checkpoint.pt"):
            shutil.copy(f"run/{name}", name)
        torch.save(build_model("resnet8", num_classes=10).state_dict(), "weights.pt")
        draw = np.random.default_rng(0)
        arrays = {f"x_{p}": draw.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8) for p in ("train", "test")}
        np.savez("plain.npz", **arrays, y_train=np.arange(12) % 3, y_test=np.arange(12) % 3)
        np.savez_compressed("packed.npz", **arrays, y_train=np.arange(12) % 3, y_test=np.arange(12) % 3)
        for part in ("train", "test"):
            for label in ("a", "b"):
                folder = Path("images", part, label)
                folder.mkdir(parents=True, exist_ok=True)
                for suffix in ("png", "jpg", "webp", "tif", "ppm", "bmp"):
                    Image.fromarray(draw.integers(0, 255, (9, 8, 3), dtype=np.uint8)).save(folder / f"0.{suffix}")
        with zipfile.ZipFile("images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path("images").rglob("*.png")):
                archive.write(path, path.relative_to("images"))
        lines = ["file,width,height,class,xmin,ymin,xmax,ymax"]
        Path("boxes/images").mkdir(parents=True, exist_ok=True)
        for n in range(6):
            Image.fromarray(draw.integers(0, 255, (9, 8, 3), dtype=np.uint8)).save(f"boxes/images/{n}.png")
            lines.append(f"{n}.png,8,9,cat,1,1,5,6")
        Path("boxes/boxes.csv").write_text("\n".join(lines) + "\n")
        images = [{"id": n, "file_name": f"{n}.png", "width": 8, "height": 9} for n in range(6)]
        boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 4, 5], "iscrowd": 0} for n in range(6)]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
        Path("boxes/instances.json").write_text(json.dumps(content, indent=1))
        Path("texts").mkdir(exist_ok=True)
        words = "the quick brown fox jumps over a lazy dog while it rains in spain again".split()
        sentences = [" ".join(words[n % 5 :: 2]) for n in range(40)]
        for part in ("train", "dev"):
            rows = "".join(f"{text}\t{n % 2}\n" for n, text in enumerate(sentences))
            Path(f"texts/{part}.tsv").write_text("sentence\tlabel\n" + rows)
        tokenizer = build_tokenizer({"train": {"size": 100}}, "torture", sentences)
        tokenizer.fast.save_pretrained("tokenizer")
        return 0

    child = fork(work)
    assert child.status == 0, child.said[-3000:]


def _mutated_files(place: Path, name: str, draw: random.Random) -> Iterator[tuple[str, Path]]:
    original = place / name
    for n in range(CHUNK):
        scratch = place / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        victim = original
        if original.is_dir():
            shutil.copytree(original, scratch)
            found = sorted(p for p in original.rglob("*") if p.is_file())
            victim = draw.choice(found)
            target = scratch / victim.relative_to(original)
        else:
            scratch.mkdir()
            target = scratch / original.name
        data = victim.read_bytes()
        repacked = victim.suffix in (".pt", ".npz", ".zip") and draw.random() < 0.6
        if repacked:
            data = mutate_zip(data, draw)
        elif victim.suffix == ".json" and draw.random() < 0.6:
            content = json.loads(data)
            for _ in range(draw.choice((1, 1, 3))):
                change(content, draw)
            data = json.dumps(content, default=str).encode()
        elif draw.random() < 0.1:
            data = data[: n * 1024 % (len(data) + 1)]
        else:
            data = mutate_bytes(data, draw)
        target.write_bytes(data)
        yield f"{victim.name}{', repacked' if repacked else ''}", scratch if original.is_dir() else target


def _load(name: str, **params: Any) -> Callable[[Path], int]:
    def read(path: Path) -> int:
        data = load_data(name, path, **params)
        for part in (data.train, data.test):
            for row in range(len(part)) if not hasattr(part, "images") else ():
                part[row]
            images = getattr(part, "images", None)
            if hasattr(images, "decode"):
                images.decode(range(len(images)), threads=1)
        return 0

    return read


def _schedule(path: Path) -> int:
    Schedule.load(path)
    return cli.main(["inspect", str(path)])


def _weights(path: Path) -> int:
    load_checkpoint(build_model("resnet8", num_classes=10), path)
    return 0


_TRAINER: list[Any] = []


def _checkpoint(path: Path) -> int:
    """Read by a trainer that it was made for."""
    if not _TRAINER:
        from distpro.build import build_data, build_search

        config = read_config(path.parents[1] / "run.yaml", [f"teacher.checkpoint={path.parents[1] / 'teacher.pt'}"])
        with contextlib.redirect_stdout(io.StringIO()):
            _TRAINER.append(build_search(config, build_data(config), path.parent))
    _TRAINER[0].folder = path.parent
    read_checkpoint(path)
    _TRAINER[0].resume()
    return 0


def _tokenizer(path: Path) -> int:
    found = build_tokenizer(str(path), "torture", ["the fox"])
    list(found.encode(["the quick brown fox"], None))
    return 0


READERS: dict[str, tuple[str, Callable[[Path], int]]] = {
    "schedule": ("alpha.pt", _schedule),
    "checkpoint": ("checkpoint.pt", _checkpoint),
    "weights": ("weights.pt", _weights),
    "arrays": ("plain.npz", _load("npz")),
    "packed arrays": ("packed.npz", _load("npz")),
    "images": ("images", _load("folder", image_size=8)),
    "zipped images": ("images.zip", _load("folder", image_size=8)),
    "boxes": ("boxes", _load("boxes_csv", test=2)),
    "COCO": (
        "boxes",
        _load("coco", images="images", annotations="instances.json", splits={"train": "x", "test": "x"}),
    ),
    "tokenizer": ("tokenizer", _tokenizer),
}


# What every attack of these goes through


def _chunk(
    campaign: Campaign,
    part: str,
    case: int,
    attacks: Callable[[], Iterator[tuple[str, Path]]],
    read: Callable[[Path], int],
    what: str = "",
) -> None:
    kept = campaign.place / f"found_{part}_{campaign.seed}_{case}"

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, resource.RLIM_INFINITY))
        warnings.filterwarnings("ignore", module="PIL")  # as the command line does
        found, refused = [], 0
        for n, (name, path) in enumerate(attacks()):
            wrong, status = _attack(read, path)
            refused += status == 2
            if wrong:
                found.append(f"{name}: {wrong}")
                kept.mkdir(exist_ok=True)
                target = kept / f"{n}_{path.name}"
                if len(found) < 10:
                    shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
        sys.__stdout__.write(json.dumps({"found": found, "refused": refused}) + "\n")  # type: ignore[union-attr]
        return 0

    child = fork(work, limit=CHUNK * SECONDS)
    try:
        said = json.loads(child.said.splitlines()[-1])
    except (ValueError, IndexError):
        said = {"found": [f"ended with {child.status}: {child.said[-1500:]}"], "refused": 0}
    if child.megabytes > MEGABYTES:
        said["found"].append(f"took {child.megabytes:.0f} MB")
    facts = {"count": CHUNK, "refused": said["refused"], "megabytes": round(child.megabytes)}
    campaign.end(
        part, case, what or part, not said["found"], found=said["found"][:10], failed=len(said["found"]), **facts
    )


def _attack(read: Callable[[Path], int], path: Path) -> tuple[str, int]:
    """What is wrong with how a file was met, or ""; and the status that the command line ends with."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"no answer after {SECONDS} s")

    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = read(path)
            except UserError as error:
                status = cli._failed(str(error))
            except OSError as error:
                status = cli._failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in where if "/distpro/" in frame.filename or "/pathways/" in frame.filename][-1:]
        place = f" in {Path(own[0].filename).name}:{own[0].lineno}" if own else ""
        return f"{type(error).__name__}: {str(error)[:150]}{place}", 1
    finally:
        signal.alarm(0)
    said = [line for line in err.getvalue().splitlines() if not line.startswith("distpro: note: ")]
    if status == 0:
        return "", 0
    if status != 2:
        return f"status {status}", status
    if not 1 <= len(said) <= 5 or not said[0].startswith("distpro: "):
        return f"{len(said)} lines: {said[:6]}", 2
    if any(word in err.getvalue() for word in ("Traceback", "object at 0x")) or len(err.getvalue()) > 6000:
        return f"a message of {len(err.getvalue())} characters: {err.getvalue()[:200]}", 2
    if any(not c.isprintable() and c != "\n" for c in err.getvalue()):
        return f"a message with control characters: {err.getvalue()[:200]!r}", 2
    return "", 2
