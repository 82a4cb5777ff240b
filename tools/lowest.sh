#!/usr/bin/env bash
# The fast tests with the lowest versions that pyproject.toml names, in .venv-lowest, made with $PYTHON (default python3.10).
#   bash tools/lowest.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -f .venv-lowest/ready ]; then
    "${PYTHON:-python3.10}" -m venv .venv-lowest
    source .venv-lowest/bin/activate
    python - >.venv-lowest/lowest.txt <<'END'
import re

text = open("pyproject.toml", encoding="utf-8").read()
bounds = re.findall(r'^    "([\w.-]+)>=([\w.]+)"|\["([\w.-]+)>=([\w.]+)"|, "([\w.-]+)>=([\w.]+)"', text, re.MULTILINE)
for name, version in sorted({pair for found in bounds for pair in zip(found[::2], found[1::2]) if pair[0]}):
    print(f"{name}=={version}")  # torch==2.8 is 2.8.0
END
    # One after the other: all bounds at once keep pip's resolver busy for longer than anybody waits.
    grep '^torch==' .venv-lowest/lowest.txt >.venv-lowest/torch.txt
    python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/torch.txt -e '.[demo,dev]'
    python -m pip install --quiet --disable-pip-version-check -r .venv-lowest/lowest.txt # it may warn of other packages' wishes
    touch .venv-lowest/ready
else
    source .venv-lowest/bin/activate
fi
cat .venv-lowest/lowest.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n 2 -m "not slow" "$@"
