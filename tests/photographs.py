"""Real photographs as a folder of PNG files: tiles of $DISTPRO_DATA/cifar10/test.zip, by class."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

SIDE = 32


def write_photographs(data_folder: Path, root: Path, counts: dict[str, int], classes: int = 10) -> Path:
    """``root/<part>/<class>/N.png``, or ``root/<class>/N.png`` for the part "". Different ones in each part. Skips where there are none."""
    archive = data_folder / "cifar10" / "test.zip"
    if not archive.is_file():
        pytest.skip(f"no {archive}")
    with zipfile.ZipFile(archive) as packed:
        for name in sorted(packed.namelist()):
            label, rest = Path(name).stem.split("_", 1)
            title, number = rest.rsplit("_", 1)
            if int(label) >= classes or number != "0":
                continue
            try:
                mosaic = Image.open(io.BytesIO(packed.read(name))).convert("RGB")
            except OSError as error:
                pytest.skip(f"this Pillow reads no AVIF ({error})")
            across, tile = mosaic.width // SIDE, 0
            for part, count in counts.items():
                folder = root / part / title
                folder.mkdir(parents=True, exist_ok=True)
                for _ in range(count):
                    left, top = tile % across * SIDE, tile // across * SIDE
                    mosaic.crop((left, top, left + SIDE, top + SIDE)).save(folder / f"{tile}.png")
                    tile += 1
    return root
