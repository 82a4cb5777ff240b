"""The teacher cache gives back what it was given, bit for bit, or nothing."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from torch import nn

from distpro.batch import batch_of
from distpro.models import build_model
from distpro.objective import Objective, Term
from distpro.train import cache as module
from distpro.train.cache import TeacherCache, digest, digest_data
from pathways import UserError
from tests.pairs import Distance, network

N = 20
MADE_FOR = {"teacher weights": "0123456789abcdef" * 2, "model": "resnet56", "seed": 3, "augment": ["crop", "flip"]}
LOGITS = {"logits": torch.zeros(2, 5)}


def open_cache(folder, taps=None, epochs=1, index=None, made_for=MADE_FOR, **options):
    index = torch.arange(N) if index is None else index
    return TeacherCache(folder, index, epochs, taps or LOGITS, made_for, **options)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def same(found, expected):
    """Shape, dtype, strides and bits."""
    return (
        found.shape == expected.shape
        and found.dtype == expected.dtype
        and found.stride() == expected.stride()
        and torch.equal(bits(found), bits(expected))
    )


def noise(shape, dtype=torch.float32):
    """Any bits: with infinities, NaN and their payloads, denormal numbers."""
    raw = torch.randint(256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype)


def test_other_answers_of_the_same_weights_are_noticed(tmp_path):
    torch.manual_seed(0)
    taps = {"a": torch.randn(2, 3, 4, 4), "logits": torch.randn(2, 5)}

    def opened(**changed):
        return open_cache(tmp_path / "c", taps, answers={**taps, **changed})

    opened()
    opened(logits=taps["logits"] + 1e-3 * torch.randn(2, 5))  # rounding
    opened(a=taps["a"].contiguous(memory_format=torch.channels_last))
    for wrong in (20 * taps["logits"], taps["logits"].flip(0), taps["logits"] + 0.1, taps["logits"] * float("nan")):
        with pytest.raises(UserError, match="what differs: what the teacher answers at 'logits', .*code has changed"):
            opened(logits=wrong)
    with pytest.raises(UserError, match="what differs: seed [(]was 3, is 4[)];"):
        open_cache(tmp_path / "c", taps, answers={**taps, "a": 2 * taps["a"]}, made_for={**MADE_FOR, "seed": 4})
    open_cache(tmp_path / "c", taps)


def test_a_cache_of_before_the_answers_were_kept_is_read(tmp_path):
    open_cache(tmp_path / "c")
    open_cache(tmp_path / "c", answers=LOGITS)


# What comes back


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
)
@pytest.mark.parametrize("shape", [(7,), (1,), (3, 4, 5), (2, 3)])
def test_bits_come_back(tmp_path, dtype, shape):
    torch.manual_seed(0)
    cache = open_cache(tmp_path / "c", {"a": torch.zeros(2, *shape, dtype=dtype)})
    whole = noise((N, *shape), dtype)
    cache.write(torch.arange(N), 0, {"a": whole})
    index = torch.tensor([3, 19, 0, 3])
    assert same(cache.read(index, 0)["a"], whole[index])


LAYOUTS = {
    "contiguous": lambda n: torch.randn(n, 6, 4, 4),
    "channels last": lambda n: torch.randn(n, 6, 4, 4).contiguous(memory_format=torch.channels_last),
    "channels last, one channel": lambda n: torch.randn(n, 1, 4, 4).contiguous(memory_format=torch.channels_last),
    "channels last, pooled": lambda n: torch.randn(n, 4, 4, 6).permute(0, 3, 1, 2).mean((2, 3), keepdim=True),
    "heads of attention": lambda n: torch.randn(n, 5, 3, 4).transpose(1, 2),
    "tokens before batch": lambda n: torch.randn(7, n, 4).transpose(0, 1),
    "one of the tokens": lambda n: torch.randn(n, 7, 4)[:, 2],
    "every other column": lambda n: torch.randn(n, 3, 8)[:, :, ::2],
    "one number": lambda n: torch.randn(n),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("views", [1, 4])
def test_strides_come_back_for_any_batch_size(tmp_path, layout, views):
    make = LAYOUTS[layout]
    cache = open_cache(tmp_path / "c", {"a": make(2 * views)}, views=views)
    for batch in (5, 2, N):
        index = torch.randperm(N)[:batch]
        given = make(batch * views)
        cache.write(index, 0, {"a": given})
        assert same(cache.read(index, 0)["a"], given)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", "vgg8", "mobilenet_v2", "shufflenet_v2"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_tensors_of_a_teacher_come_back(tmp_path, name, channels_last, precision):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    teacher = build_model(name, num_classes=10).eval().to(memory_format=layout)
    x = torch.randn(6, 3, 32, 32).contiguous(memory_format=layout)
    term = Term(Distance(), "t", ["2"], [*teacher.stage_taps.pre, teacher.stage_taps.embedding, "logits"])
    objective = Objective(teacher, network(0), [term], precision=precision)
    cache = open_cache(tmp_path / "c", objective.run_teacher(batch_of(x[:2])))
    assert set(cache.taps) == {*term.teacher_taps}
    for index in (torch.arange(6), torch.tensor([5])):
        given = objective.run_teacher(batch_of(x[index]))
        cache.write(index, 0, given)
        found = cache.read(index, 0)
        assert all(same(found[tap], given[tap]) for tap in given)


def test_views_of_a_sample_stay_together(tmp_path):
    cache = open_cache(tmp_path / "c", views=4)
    rows = torch.arange(3 * 4 * 5.0).view(12, 5)
    cache.write(torch.tensor([1, 8, 4]), 0, {"logits": rows})
    assert torch.equal(cache.read(torch.tensor([4, 1]), 0)["logits"], torch.cat([rows[8:], rows[:4]]))


def test_what_is_read_is_a_copy(tmp_path):
    cache = open_cache(tmp_path / "c")
    index = torch.arange(3)
    cache.write(index, 0, {"logits": torch.ones(3, 5)})
    cache.read(index, 0)["logits"].zero_()
    assert cache.read(index, 0)["logits"].min() == 1


# What is there


def test_a_batch_is_read_only_if_all_of_it_is_there(tmp_path):
    cache = open_cache(tmp_path / "c")
    assert cache.read(torch.tensor([4]), 0) is None
    cache.write(torch.tensor([4, 6]), 0, {"logits": torch.zeros(2, 5)})
    assert torch.equal(cache.read(torch.tensor([6, 4]), 0)["logits"], torch.zeros(2, 5))
    assert cache.read(torch.tensor([4, 5]), 0) is None


def test_epochs_are_apart_and_repeat(tmp_path):
    cache, index = open_cache(tmp_path / "c", epochs=3), torch.arange(4)
    for epoch in range(3):
        assert cache.read(index, epoch) is None
        cache.write(index, epoch, {"logits": torch.full((4, 5), float(epoch))})
    for epoch in range(9):
        assert cache.read(index, epoch)["logits"].unique().tolist() == [epoch % 3]


def test_samples_by_their_numbers(tmp_path):
    """A choice of samples takes the room of that choice."""
    cache = open_cache(tmp_path / "c", index=torch.tensor([40_000, 7, 12]))
    assert cache.bytes == 3 * (5 * 4 + 8)
    cache.write(torch.tensor([12, 40_000]), 0, {"logits": torch.tensor([[1.0] * 5, [2.0] * 5])})
    assert cache.read(torch.tensor([40_000, 12]), 0)["logits"][:, 0].tolist() == [2, 1]
    assert cache.read(torch.tensor([7]), 0) is None
    for stranger in (8, 40_001, 10**9, -1):
        with pytest.raises(UserError, match=f"no sample {stranger}"):
            cache.read(torch.tensor([7, stranger]), 0)
        with pytest.raises(UserError, match=f"no sample {stranger}"):
            cache.write(torch.tensor([7, stranger]), 0, {"logits": torch.zeros(2, 5)})


def test_going_on(tmp_path):
    first = open_cache(tmp_path / "c", epochs=2)
    first.write(torch.arange(8), 1, {"logits": torch.full((8, 5), 3.0)})
    second = open_cache(tmp_path / "c", epochs=2)
    assert second.read(torch.arange(8), 1)["logits"].unique() == 3
    second.write(torch.arange(8, N), 1, {"logits": torch.full((12, 5), 4.0)})
    assert first.read(torch.arange(N), 1)["logits"].sum() == 5 * (8 * 3 + 12 * 4)


def test_description_and_size(tmp_path):
    taps = {"logits": torch.zeros(2, 5), "map": torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)}
    cache = open_cache(tmp_path / "c", taps, epochs=4, index=torch.arange(2000))
    assert cache.bytes == 4 * 2000 * (5 * 4 + 3 * 4 * 4 * 2 + 8)
    assert cache.bytes == sum(f.stat().st_size for f in (tmp_path / "c").glob("*.bin"))
    assert cache.describe() == f"teacher cache {tmp_path}/c: 992 kB for 2,000 samples x 4 epochs, 0% filled"
    for epoch, count in enumerate((2000, 961)):
        cache.write(
            torch.arange(count),
            epoch,
            {"logits": torch.ones(count, 5), "map": taps["map"].repeat(1000, 1, 1, 1)[:count]},
        )
    assert cache.describe().endswith("37% filled")


def test_an_empty_cache_takes_no_room(tmp_path):
    cache = open_cache(tmp_path / "c", {"map": torch.zeros(2, 64, 8, 8)}, epochs=10, index=torch.arange(50_000))
    assert cache.bytes > 8e9
    assert sum(f.stat().st_blocks * 512 for f in (tmp_path / "c").iterdir()) < 1e6


# Damage


def fill(cache):
    cache.write(torch.arange(N), 0, {"logits": torch.randn(N, 5, generator=torch.Generator().manual_seed(0))})
    return cache.read(torch.arange(N), 0)["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("name, width", [("tap-0.bin", 20), ("sums.bin", 8)])
def test_a_changed_bit_makes_the_row_absent(tmp_path, name, width):
    whole = fill(open_cache(tmp_path / "c"))
    path = tmp_path / "c" / name
    sound = path.read_bytes()
    for bit in range(width * 8):
        damaged = bytearray(sound)
        damaged[4 * width + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        cache = open_cache(tmp_path / "c")
        assert cache.read(torch.tensor([4]), 0) is None
        assert torch.equal(cache.read(torch.tensor([3, 5]), 0)["logits"], whole[[3, 5]])
    cache.write(torch.tensor([4]), 0, {"logits": whole[4:5]})
    assert torch.equal(cache.read(torch.arange(N), 0)["logits"], whole)


def test_data_that_never_reached_the_disk_are_absent(tmp_path):
    """After a power failure a file may have holes where rows were written."""
    fill(open_cache(tmp_path / "c"))
    (tmp_path / "c" / "tap-0.bin").write_bytes(bytes(N * 20))
    cache = open_cache(tmp_path / "c")
    assert all(cache.read(torch.tensor([n]), 0) is None for n in range(N))


@pytest.mark.parametrize("name", ["tap-0.bin", "sums.bin"])
@pytest.mark.parametrize("damage", ["shorter", "longer", "gone"])
def test_a_file_of_another_size_is_an_error(tmp_path, name, damage):
    fill(open_cache(tmp_path / "c"))
    path = tmp_path / "c" / name
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + (1 if damage == "longer" else -1))
    with pytest.raises(UserError, match=f"{name}: the cache is damaged.*remove the folder"):
        open_cache(tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": "other"}', b"null"])
def test_a_damaged_description_is_an_error(tmp_path, content):
    open_cache(tmp_path / "c")
    (tmp_path / "c" / "cache.json").write_bytes(content)
    with pytest.raises(UserError, match="c: cache.json is damaged or of another version; remove the folder"):
        open_cache(tmp_path / "c")


def test_foreign_places(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    for place in ("photos", "file", "file/below"):
        with pytest.raises(UserError, match=f"{place}: no teacher cache, and none can be made there"):
            open_cache(tmp_path / place)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cat.png", "file", "photos"]


def test_an_empty_folder_and_a_link_to_one_will_do(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    whole = fill(open_cache(tmp_path / "b"))
    assert torch.equal(open_cache(tmp_path / "a").read(torch.arange(N), 0)["logits"], whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# Another teacher, other data


CHANGES = {
    "teacher weights": ({"made_for": MADE_FOR | {"teacher weights": "f" * 32}}, "teacher weights;"),
    "model": ({"made_for": MADE_FOR | {"model": "resnet110"}}, "model (was 'resnet56', is 'resnet110');"),
    "seed": ({"made_for": MADE_FOR | {"seed": 4}}, "seed (was 3, is 4);"),
    "augment": ({"made_for": MADE_FOR | {"augment": []}}, "augment (was ['crop', 'flip'], is []);"),
    "two": ({"made_for": MADE_FOR | {"seed": 4, "mean": 0.5}}, "seed (was 3, is 4), mean (new);"),
    "less": ({"made_for": {k: v for k, v in MADE_FOR.items() if k != "seed"}}, "seed (not asked for now);"),
    "epochs": ({"epochs": 2}, "epochs (was 1, is 2);"),
    "views": ({"views": 4}, "views (was 1, is 4);"),
    "samples": ({"index": torch.arange(N - 1)}, "samples (was 20, is 19), sample numbers;"),
    "order": ({"index": torch.arange(N).flip(0)}, "sample numbers;"),
    "dtype": ({"taps": {"logits": LOGITS["logits"].half()}}, "tap 'logits' (was 'float32 (5,), strides"),
    "shape": ({"taps": {"logits": torch.zeros(2, 6)}}, "tap 'logits' (was 'float32 (5,), strides"),
    "layout": ({"taps": {"logits": torch.zeros(5, 2).t()}}, "tap 'logits' (was 'float32 (5,), strides"),
    "taps": ({"taps": {"layer1": torch.zeros(2, 5)}}, "tap 'logits' (not asked for now), tap 'layer1' (new);"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_made_for_something_else_is_refused_by_name(tmp_path, change):
    whole = fill(open_cache(tmp_path / "c"))
    options, message = CHANGES[change]
    with pytest.raises(UserError, match=f"c: this .*, what differs: {re.escape(message)}") as error:
        open_cache(tmp_path / "c", **options)
    assert "; remove the folder or name another" in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(open_cache(tmp_path / "c").read(torch.arange(N), 0)["logits"], whole)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    cache = open_cache(tmp_path / "c")
    for wrong in (torch.zeros(2, 6), torch.zeros(2, 5, dtype=torch.float64)):
        with pytest.raises(UserError, match=r"tap 'logits': .*holds float32 \(5,\)"):
            cache.write(torch.arange(2), 0, {"logits": wrong})
    with pytest.raises(ValueError):
        cache.write(torch.arange(3), 0, {"logits": torch.zeros(2, 5)})
    assert cache.describe().endswith("0% filled")
    with pytest.raises(UserError, match="tap 'a': cannot cache"):
        open_cache(tmp_path / "d", {"a": torch.zeros(2, 1).expand(2, 5)})


# Room on the disk


Usage = namedtuple("Usage", "total used free")


def test_no_room_is_said_before_anything_is_made(tmp_path, monkeypatch):
    taps, index = {"map": torch.zeros(2, 64, 8, 8)}, torch.arange(1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**7))
    with pytest.raises(UserError, match=r"needs 16.4 MB, but 10 MB are free.*another disk, or cache fewer epochs"):
        open_cache(tmp_path / "deep" / "c", taps, index=index)
    assert not list(tmp_path.iterdir())


def test_what_is_written_needs_no_room_again(tmp_path, monkeypatch):
    taps, index = {"map": torch.zeros(2, 64, 8, 8)}, torch.arange(1000)
    cache = open_cache(tmp_path / "c", taps, index=index)
    cache.write(index[:500], 0, {"map": torch.randn(500, 64, 8, 8)})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage(10**9, 0, 9 * 10**6))
    assert "50% filled" in open_cache(tmp_path / "c", taps, index=index).describe()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage(10**9, 0, 8 * 10**6))
    with pytest.raises(UserError, match="but 8 MB are free"):
        open_cache(tmp_path / "c", taps, index=index)


@pytest.mark.slow
def test_a_disk_that_fills_up_is_an_error_and_leaves_no_row(tmp_path):
    """Bounded here by the largest file that a process may write."""
    code = (
        "import resource, signal, torch; from tests.train.test_cache import open_cache, UserError\n"
        f"cache = open_cache({str(tmp_path / 'c')!r})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (210, 210))\n"  # in the middle of row 10
        "cache.write(torch.arange(10), 0, {'logits': torch.ones(10, 5)})\n"
        "try: cache.write(torch.arange(10, 20), 0, {'logits': torch.ones(10, 5)})\n"
        "except UserError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tap-0.bin: cannot be written" in result.stdout
    cache = open_cache(tmp_path / "c")
    assert cache.read(torch.arange(10), 0)["logits"].min() == 1
    assert all(cache.read(torch.tensor([n]), 0) is None for n in range(10, 20))


# Killed, and several at a time


TAPS = {"a": torch.zeros(2, 3000), "b": torch.zeros(2, 7)}


def value(index, epoch):
    """What a row holds in these tests: its own numbers."""
    number = (index + 1000.0 * epoch)[:, None]
    return {"a": number + torch.arange(3000) / 4, "b": number * torch.arange(7)}


def check_rows(cache):
    """How many rows are present; each has to be right."""
    present = 0
    for epoch in range(cache.epochs):
        for n in range(cache.samples):
            index = torch.tensor([n])
            found = cache.read(index, epoch)
            if found is not None:
                present += 1
                expected = value(index, epoch)
                assert all(torch.equal(found[tap], expected[tap]) for tap in expected)
    return present


def write_forever(folder, seed, begun):
    torch.set_num_threads(1)
    cache = open_cache(folder, TAPS, epochs=3, index=torch.arange(200))
    generator = torch.Generator().manual_seed(seed)
    while True:
        index, epoch = torch.randperm(200, generator=generator)[:16], int(torch.randint(3, (), generator=generator))
        cache.write(index, epoch, value(index, epoch))
        begun.set()


@pytest.mark.slow
@pytest.mark.parametrize("writers", [1, 2])
def test_rows_are_right_after_kill_9(tmp_path, writers):
    context = multiprocessing.get_context("fork")
    present = [0]
    for round_number in range(8):
        begun = [context.Event() for _ in range(writers)]
        processes = [
            context.Process(target=write_forever, args=(tmp_path / "c", 10 * round_number + n, event))
            for n, event in enumerate(begun)
        ]
        for process in processes:
            process.start()
        assert all(event.wait(30) for event in begun)
        time.sleep(random.Random(round_number).uniform(0, 0.01))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        present.append(check_rows(open_cache(tmp_path / "c", TAPS, epochs=3, index=torch.arange(200))))
    assert present == sorted(present) and 0 < present[1]


def make(folder, seed, start, results):
    """Wait for the others, then open the cache."""
    start.wait()
    try:
        open_cache(folder, made_for=MADE_FOR | {"seed": seed})
        results.put(seed)
    except UserError as error:
        results.put(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(1, 1, 1), (1, 2, 3)])
def test_only_one_of_several_makes_the_folder(tmp_path, seeds):
    context = multiprocessing.get_context("fork")
    for round_number in range(5):
        folder, start, results = tmp_path / f"c{round_number}", context.Barrier(len(seeds)), context.Queue()
        processes = [context.Process(target=make, args=(folder, seed, start, results)) for seed in seeds]
        for process in processes:
            process.start()
        opened = [results.get(timeout=30) for _ in seeds]
        for process in processes:
            process.join()
        winner = json.loads((folder / "cache.json").read_text())["seed"]
        refused = [text for text in opened if text != winner]
        assert len(refused) == (0 if len(set(seeds)) == 1 else 2)
        assert all(f"seed (was {winner}, is" in text for text in refused)
    assert len(list(tmp_path.iterdir())) == 5  # nothing of the losers is left


@pytest.mark.parametrize("moment", ["disk_usage", "write_atomically"])
def test_a_cache_that_another_makes_meanwhile_is_compared(tmp_path, monkeypatch, moment):
    owner = module.shutil if moment == "disk_usage" else module
    original = getattr(owner, moment)

    def other_process(*args):
        monkeypatch.undo()
        open_cache(tmp_path / "c", made_for=MADE_FOR | {"seed": 4})
        return original(*args)

    monkeypatch.setattr(owner, moment, other_process)
    with pytest.raises(UserError, match=r"seed \(was 4, is 3\)"):
        open_cache(tmp_path / "c")


def test_a_reader_never_sees_half_of_a_row(tmp_path):
    """Two processes write different values to the same rows, as two machines may that round differently."""
    context = multiprocessing.get_context("fork")
    cache = open_cache(tmp_path / "c", {"a": torch.zeros(2, 3000)}, index=torch.arange(4))
    index = torch.arange(4)

    def write(number):
        torch.set_num_threads(1)
        mine = open_cache(tmp_path / "c", {"a": torch.zeros(2, 3000)}, index=torch.arange(4))
        while True:
            mine.write(index, 0, {"a": torch.full((4, 3000), number)})

    processes = [context.Process(target=write, args=(number,)) for number in (1.0, 2.0)]
    for process in processes:
        process.start()
    seen = set()
    end = time.monotonic() + 20
    while len(seen) < 2 and time.monotonic() < end:
        for _ in range(200):
            found = cache.read(index, 0)
            for row in found["a"] if found is not None else ():
                (only,) = row.unique().tolist()
                seen.add(only)
    for process in processes:
        process.kill()
        process.join()
    assert seen == {1.0, 2.0}


# Hashes


def test_digest_sees_the_state_and_nothing_else():
    model = network(0)
    first = digest(model)
    assert digest(network(0)) == first == digest(network(0).to(memory_format=torch.channels_last).eval())
    assert digest(network(1)) != first
    assert digest(network(0).double()) != first
    assert digest(nn.Sequential(model)) != first  # other names
    for tensor in model.state_dict().values():
        before = tensor.clone()
        tensor.view(-1)[-1] += 1
        assert digest(model) != first
        tensor.copy_(before)
    assert digest(model) == first
    weight = model[0].weight.data
    weight.view(torch.int32).view(-1)[0] ^= 1  # one bit
    assert digest(model) != first


def test_digest_of_zero_is_not_that_of_minus_zero():
    model = nn.Linear(1, 1, bias=False)
    digests = set()
    for number in (0.0, -0.0):
        nn.init.constant_(model.weight, number)
        digests.add(digest(model))
    assert len(digests) == 2


def test_digest_by_hand():
    """A later version has to know the caches of this one again."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).view(2, 3))
        model.bias.fill_(0.5)
    expected = hashlib.blake2b(digest_size=16)
    for head, numbers in (("bias torch.float32 (2,)", [0.5] * 2), ("weight torch.float32 (2, 3)", range(6))):
        expected.update(head.encode() + b"\n" + hashlib.blake2b(struct.pack(f"={len(numbers)}f", *numbers)).digest())
    assert digest(model) == expected.hexdigest()


def test_digest_of_data():
    images = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    labels, index = torch.arange(10), torch.arange(10)
    first = digest_data(images, labels, index)
    assert digest_data(images.contiguous(memory_format=torch.channels_last), labels.clone(), index) == first
    changed = images.clone()
    changed[9, 2, 7, 7] ^= 1
    others = [(changed, labels, index), (images, labels.flip(0), index), (images, labels, index + 1)]
    others.append((images.view(10, 3, 4, 16), labels, index))
    assert first not in {digest_data(*other) for other in others}


def test_digest_of_more_than_one_piece(monkeypatch):
    images = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(module, "_PIECE", 100)
    first = digest_data(images, torch.arange(10), torch.arange(10))
    swapped = images.clone().view(-1)
    swapped[:100], swapped[100:200] = images.view(-1)[100:200], images.view(-1)[:100]
    assert digest_data(swapped.view_as(images), torch.arange(10), torch.arange(10)) != first


def test_a_training_reads_what_the_teacher_says(tmp_path):
    """Losses with a filled cache are those without one, to the bit."""
    torch.manual_seed(0)
    objective = Objective(network(0), network(1), [Term(Distance(), "t", ["5"], ["5"])])
    x, y = torch.randn(N, 3, 8, 8), torch.randint(4, (N,))
    cache = open_cache(tmp_path / "c", objective.run_teacher(batch_of(x[:2])))
    cache.write(torch.arange(N), 0, objective.run_teacher(batch_of(x)))
    index = torch.randperm(N)
    plain = objective.training_pass(batch_of(x[index], y[index]), weights=[0.5]).loss
    cached = objective.training_pass(batch_of(x[index], y[index]), weights=[0.5], teacher=cache.read(index, 0)).loss
    assert torch.equal(plain, cached)


def test_a_removed_folder_is_made_again(tmp_path):
    fill(open_cache(tmp_path / "c"))
    shutil.rmtree(tmp_path / "c")
    assert open_cache(tmp_path / "c").read(torch.arange(2), 0) is None
