#!/usr/bin/env bash
# Makes an environment in .venv (or uses the active one if distpro is installed there) and passes the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
python -m ruff check .
python -m ruff format --check .
exec python -m pytest "$@"
