"""One run at a time in a folder."""

import sys

import pytest

from distpro.runs.lock import locked
from pathways.registry import UserError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no flock")


def test_a_second_holder_is_refused_while_the_first_lives(tmp_path):
    with locked(tmp_path):
        for shared in (False, True):
            with pytest.raises(UserError, match="another process is running in this folder"), locked(tmp_path, shared):
                pass
    with locked(tmp_path):
        pass


def test_holders_may_share(tmp_path):
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True):
        with pytest.raises(UserError), locked(tmp_path):
            pass


@pytest.mark.parametrize("writes", [False, True])
def test_a_new_folder_goes_where_nothing_was_written(tmp_path, writes):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        if writes:
            (folder / "x").touch()
    assert folder.exists() == writes and (tmp_path / "a").exists() == writes
