"""What a run writes into its folder, and in which order."""

from __future__ import annotations

import pytest

from distpro.config.reading import read_config
from distpro.runs import folder
from tests.digits import settings


def test_where_the_config_is_the_rest_is_too(tmp_path, monkeypatch):
    """A folder with a config has begun, and is gone on with: what is not there then would never be."""
    write, written = folder.write_atomically, []

    def killed(content, path, *rest):
        if len(written) == last:
            raise KeyboardInterrupt
        write(content, path, *rest)
        written.append(path.name)

    monkeypatch.setattr(folder, "write_atomically", killed)
    for last in (1, 2):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            folder.record(read_config(settings()), tmp_path / str(last), {"samples": 3})
        assert "config.yaml" not in written
    last = 9
    written.clear()
    folder.record(read_config(settings()), tmp_path / "whole", {"samples": 3})
    assert sorted(written) == ["config.yaml", "data.json", "environment.json"]
