#!/usr/bin/env bash
# Makes an environment in .venv (or uses the active one if distpro is installed there) and passes the checks and tests.
#   bash tools/test.sh                      # everything
#   bash tools/test.sh -m "not slow"        # the fast tier, minutes on two cores
# Arguments go to pytest; without -n among them, two processes share the tests where pytest-xdist is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
python -m ruff check .
python -m ruff format --check .
python -m mypy distpro pathways
share=(-n 2)
for word in "$@"; do
    case $word in -n* | --numprocesses* | --pdb) share=() ;; esac
done
python -c "import xdist" 2>/dev/null || share=()
unset PYTHONDONTWRITEBYTECODE # the tests start hundreds of processes: each would compile all modules again
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # small tensors: more threads would only wait for each other
exec python -m pytest ${share[@]+"${share[@]}"} "$@"
