#!/usr/bin/env bash
# The fast tests with the lowest versions that pyproject.toml names, in .venv-lowest, made with $PYTHON or a Python 3.10.
#   bash tools/lowest.sh [PYTEST ARGUMENTS]
#   bash tools/lowest.sh --make               # makes the environment alone
set -euo pipefail
cd "$(dirname "$0")/.."
unset VIRTUAL_ENV
lowest_python() {
    local found
    for found in ${PYTHON:+"$PYTHON"} python3.10 "$(pyenv prefix 3.10 2>/dev/null)/bin/python" python3; do
        if "$found" -c "import venv" 2>/dev/null; then
            echo "$found"
            return
        fi
    done
    echo "no Python found: name one in PYTHON" >&2
    return 1
}
if [ ! -f .venv-lowest/ready ]; then
    "$(lowest_python)" -m venv .venv-lowest
    source .venv-lowest/bin/activate
    python - >.venv-lowest/lowest.txt <<'END'
import re

text = open("pyproject.toml", encoding="utf-8").read().partition("\n[project]")[2]  # what builds is not what runs
bounds = re.findall(r'^    "([\w.-]+)>=([\w.]+)"|\["([\w.-]+)>=([\w.]+)"|, "([\w.-]+)>=([\w.]+)"', text, re.MULTILINE)
for name, version in sorted({pair for found in bounds for pair in zip(found[::2], found[1::2]) if pair[0]}):
    print(f"{name}=={version}")  # torch==2.8 is 2.8.0
END
    # One after the other: all bounds at once keep pip's resolver busy for longer than anybody waits.
    install=(python -m pip install --quiet --disable-pip-version-check --no-compile)
    grep '^torch==' .venv-lowest/lowest.txt >.venv-lowest/torch.txt
    "${install[@]}" -c .venv-lowest/torch.txt -e '.[demo,dev]'
    "${install[@]}" -r .venv-lowest/lowest.txt # it may warn of other packages' wishes
    touch .venv-lowest/ready
else
    source .venv-lowest/bin/activate
fi
[ "${1:-}" != --make ] || exit 0
python --version
cat .venv-lowest/lowest.txt
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n 2 -m "not slow" "$@"
