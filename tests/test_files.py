"""Files are whole or absent, and run nothing."""

import argparse
import errno
import os
import stat
import zipfile

import pytest
import torch

from distpro import files as checkpoint
from distpro.files import Unread, load_safely, remove_leftovers, save_atomically, write_atomically
from pathways import UserError

CONTENT = {"weights": torch.arange(6.0).view(2, 3), "step": 3, "name": "a", "nested": [1.5, None, {"b": True}]}


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "down" / "last.pt"
    save_atomically(CONTENT, path)
    loaded = load_safely(path)
    assert torch.equal(loaded.pop("weights"), CONTENT["weights"])
    assert loaded == {k: v for k, v in CONTENT.items() if k != "weights"}
    assert files(path.parent) == ["last.pt"]


@pytest.mark.parametrize("data, stored", [("α = 1\n", "α = 1\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_text_and_bytes(tmp_path, data, stored):
    write_atomically(data, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == stored


def test_a_shorter_file_replaces_a_longer_one(tmp_path):
    write_atomically("long " * 100, tmp_path / "file")
    write_atomically("short", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "short"
    assert files(tmp_path) == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_who_may_read_the_file_is_left_to_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically("x", tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_full_disk_is_said_of_a_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError) as caught:
        save_atomically(CONTENT, tmp_path / "checkpoint.pt")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "checkpoint.pt"))
    assert files(tmp_path) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, failing, error):
    path = tmp_path / "last.pt"
    write_atomically("old", path)

    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint.os, failing, fail)
    with pytest.raises(type(error)):
        write_atomically("new", path)
    with pytest.raises(type(error)):
        write_atomically("new", tmp_path / "other.pt")
    monkeypatch.undo()
    assert path.read_text() == "old" and files(tmp_path) == ["last.pt"]


def test_content_that_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_atomically(CONTENT, path)
    with pytest.raises((AttributeError, TypeError, RuntimeError, OSError, ValueError)):
        save_atomically({"f": lambda: None}, path)
    assert load_safely(path)["step"] == 3 and files(tmp_path) == ["last.pt"]


def test_the_data_is_on_disk_before_the_old_file_goes(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(checkpoint.os, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    write_atomically("x", tmp_path / "file")
    assert calls == ["fsync", "replace"]


def test_tensors_come_back_on_the_cpu_and_share_nothing_with_the_file(tmp_path):
    path = tmp_path / "last.pt"
    save_atomically(CONTENT, path)
    loaded = load_safely(path)
    path.unlink()
    assert loaded["weights"].device.type == "cpu" and loaded["weights"].sum() == 15


class Exploit:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_objects_are_refused_and_not_built(tmp_path):
    path, marker = tmp_path / "last.pt", tmp_path / "was-here"
    torch.save({"weights": torch.zeros(1), "x": Exploit(marker)}, path)
    with pytest.raises(UserError, match="last.pt: holds more than tensors and plain values"):
        load_safely(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match="last.pt: holds more than tensors and plain values"):
        load_safely(path)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_bytes_are_an_error_and_nothing_else(tmp_path):
    """Every file with some bytes overwritten either loads or is answered with a UserError."""
    path, generator = tmp_path / "last.pt", torch.Generator().manual_seed(0)
    for legacy in (False, True):
        torch.save(CONTENT, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        refused = 0
        for _ in range(300):
            data = bytearray(whole)
            for position in torch.randint(len(data), (4,), generator=generator).tolist():
                data[position] = int(torch.randint(256, (1,), generator=generator))
            path.write_bytes(data)
            try:
                load_safely(path)
            except UserError as error:
                refused += 1
                assert str(error).startswith(str(path)) and "\n" not in str(error)
        assert refused > 30


def test_missing_files(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            load_safely(path)


def test_a_folder_is_no_file_and_what_is_in_it_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file, it is a folder without student.pt$"):
        load_safely(tmp_path)
    save_atomically(CONTENT, tmp_path / "student.pt")
    with pytest.raises(UserError, match="it is a folder: .*student.pt\\?$"):
        load_safely(tmp_path)


def test_objects_beside_weights_are_refused_unless_only_weights_are_wanted(tmp_path):
    torch.save({"weights": torch.ones(2), "beside": argparse.Namespace(a=1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        load_safely(tmp_path / "x.pt")
    found = load_safely(tmp_path / "x.pt", weights=True)
    assert torch.equal(found["weights"], torch.ones(2)) and type(found["beside"]) is Unread
    with pytest.raises(UserError, match="holds more than tensors"):  # what was let in once is not let in again
        load_safely(tmp_path / "x.pt")


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    """torch.load compares no checksums."""
    path = tmp_path / "x.pt"
    torch.save({"weight": torch.ones(1000)}, path)
    whole = path.read_bytes()
    at = whole.index(torch.ones(1000).numpy().tobytes()) + 2001
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert not torch.equal(torch.load(path, weights_only=True)["weight"], torch.ones(1000))
    for weights in (False, True):
        with pytest.raises(UserError, match="x.pt: damaged: .*data/0 does not fit its checksum"):
            load_safely(path, weights=weights)


def test_files_without_checksums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(10)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load_safely(tmp_path / "x.pt")["weight"], torch.ones(10))


def test_a_packed_archive_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))
    with pytest.raises(UserError, match="x.pt: is a packed archive"):
        load_safely(tmp_path / "x.pt")


def test_the_file_before_is_kept(tmp_path):
    path, before = tmp_path / "x.pt", tmp_path / "x.previous.pt"
    for number in range(3):
        save_atomically({"number": number}, path, kept_as=before)
        assert load_safely(path)["number"] == number
        assert before.exists() == (number > 0)
    assert load_safely(before)["number"] == 1
    assert files(tmp_path) == ["x.previous.pt", "x.pt"]


def test_what_killed_writers_leave_is_removed(tmp_path):
    (tmp_path / "trials").mkdir()
    lock = "turn.lock4c3d5a56-2c6b-4cfa-b319-e03d590162b4.rename"  # Optuna's, on its way to be removed
    for name in (".checkpoint.pt.0123abcd", "trials/.alpha.pt.ffffffff", ".hidden", "kept.0123abcd", lock):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, age=60)  # of a folder that others write to
    assert (tmp_path / ".checkpoint.pt.0123abcd").exists()
    os.utime(tmp_path / ".checkpoint.pt.0123abcd", (0, 0))
    remove_leftovers(tmp_path, age=60)
    assert not (tmp_path / ".checkpoint.pt.0123abcd").exists() and (tmp_path / "trials/.alpha.pt.ffffffff").exists()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".hidden", "kept.0123abcd"]
