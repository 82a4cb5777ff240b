"""Which teacher tap may teach which student tap."""

import pytest

from pathways import UserError, connect

T, S = ["t1", "t2", "t3"], ["s1", "s2", "s3"]


@pytest.mark.parametrize(
    "rule, teacher, student, pairs",
    [
        ("all", T, S, [(i, j) for i in range(3) for j in range(3)]),
        ("all", T, S[:2], [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]),
        ("same", T, S, [(0, 0), (1, 1), (2, 2)]),
        ("review", T, S, [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]),
        ("review", T, S[:2], [(0, 0), (0, 1), (1, 1)]),
        ("review", T[:1], S, [(0, 0), (0, 1), (0, 2)]),
        ([["t3", "s1"], ("t1", "s2")], T, S, [(0, 1), (2, 0)]),
        ([], T, S, []),
    ],
)
def test_pairs_are_positions_teacher_major(rule, teacher, student, pairs):
    assert connect(rule, teacher, student) == pairs


def test_review_on_five_levels_has_the_fifteen_connections_of_imagenet():
    taps = list("abcde")
    pairs = connect("review", taps, taps)
    assert len(pairs) == 15 and all(i <= j for i, j in pairs)


@pytest.mark.parametrize(
    "rule, message",
    [
        ("revew", "unknown connection rule 'revew'; did you mean 'review'.*allowed: all, same, matched, review"),
        ([["tt1", "s1"]], "'tt1' is not a teacher tap; did you mean 't1'.*allowed: t1, t2, t3"),
        ([["t1", "t1"]], "'t1' is not a student tap"),
        ([["t1", "s1"], ["t1", "s1"]], "listed twice"),
        (["t1", "s1"], r"each entry is \[teacher tap, student tap\], got 't1'"),
        ([["t1"]], r"each entry is \[teacher tap, student tap\]"),
        ([3], r"each entry is \[teacher tap, student tap\], got 3"),
    ],
)
def test_errors(rule, message):
    with pytest.raises(UserError, match=message):
        connect(rule, T, S)


def test_same_needs_equally_many_taps():
    with pytest.raises(UserError, match="as many teacher as student taps, got 3 and 2"):
        connect("same", T, S[:2])
