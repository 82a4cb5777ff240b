#!/usr/bin/env bash
# From nothing to a table: teacher, search, retrains of every control on the embedded digits, three seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
start=$SECONDS
export OMP_NUM_THREADS=1
rm -rf runs/quickstart
echo "1/3 the teacher"
python -m distpro.cli train search_configs/digits_teacher.yaml --out runs/quickstart/teacher threads=1
echo "2/3 searches and retrains (logs in runs/quickstart)"
python tools/study.py studies/quickstart.yaml --results runs/quickstart | grep '^quickstart: '   # its table comes last
echo "3/3 what was learned"
python -m distpro.cli inspect runs/quickstart/search-0/alpha.pt
echo
echo "figure: $(python -m distpro.cli plot runs/quickstart/search-0/alpha.pt | head -1)"
echo "curves: tensorboard --logdir runs"
echo
grep '^|' runs/quickstart/quickstart.md
echo "table: runs/quickstart/quickstart.md (with its commands), done in $((SECONDS - start)) s"
