"""Break distpro on purpose, and count what holds: docs/reliability.md has the promises.

    python tools/torture --minutes 60                  # all parts; what the file of results holds is not tried again
    python tools/torture --only kill --minutes 5
    python tools/torture --render docs/results/torture.jsonl

Every case is drawn from ``--seed`` and its own number, so that one that fails is tried again with ``--only PART --case N``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torture.campaign import Campaign, import_all, rows  # noqa: E402
from torture.parts import PARTS  # noqa: E402
from torture.report import as_markdown  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", choices=list(PARTS), action="append")
    parser.add_argument("--case", type=int, help="the one case of a part that is tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("runs/torture/results.jsonl"))
    parser.add_argument("--place", type=Path, help="where the runs are; default: a temporary folder")
    parser.add_argument(
        "--render", type=Path, metavar="RESULTS", help="print the counts of a file of results, and do nothing"
    )
    options = parser.parse_args()
    if options.render:
        print(as_markdown(rows(options.render)))
        return 0
    names = options.only or list(PARTS)
    import_all()
    results = options.results.resolve()
    results.parent.mkdir(parents=True, exist_ok=True)
    before = len(rows(results))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        place = (options.place or Path(scratch)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        for n, name in enumerate(names):
            share = (options.minutes * 60 - (time.monotonic() - START)) / (len(names) - n)
            attack, most = PARTS[name]
            (place / name).mkdir(exist_ok=True)
            attack(Campaign(results, options.seed, time.monotonic() + share, place / name, options.case), most)
    new = rows(results)[before:]
    print(as_markdown(new))
    return 0 if all(row["ok"] for row in new) else 1


START = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
