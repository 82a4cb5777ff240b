#!/usr/bin/env bash
# What a machine with a GPU is asked, within ten minutes, into one folder of small files:
#   bash tools/gpu.sh [FOLDER]               # default runs/gpu; results of an earlier call in it are removed
#   bash tools/gpu.sh --plan                 # says what it would do, the seconds that each part is expected to take, and its limit in brackets
#   bash tools/gpu.sh --rehearse [FOLDER]    # on the CPU at toy size, with SLACK (6) times the time
#   PARTS="teacher kd" bash tools/gpu.sh     # these parts alone
# Parts: the environment; beside each other the tests marked cuda, and a teacher, a KD training and a search; then one by one where a step
# waits (profile_gpu), bench_train plain and compiled, several trainings on one card (bench_seeds), bench_horizon and bench_search. Each
# has its time limit, and one that fails does not stop the others; the status is that of the worst. Data: cifar10.npz in $DISTPRO_DATA if it
# is there, else made up. Runs from the sources with $PYTHON (default python3); installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=cuda plan= total=0 SLACK=${SLACK:-1}
case ${1:-} in
    --plan) plan=1 && shift ;;
    --rehearse) device=cpu SLACK=6 DISTPRO_TEST_DEVICE=cpu && export DISTPRO_TEST_DEVICE && shift ;;
esac
out=${1:-runs/gpu}
case $out in
    -*) echo "gpu.sh: unknown option '$out' (usage: bash tools/gpu.sh [--plan | --rehearse] [FOLDER])" >&2 && exit 2 ;;
esac
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

part() { # NAME SECONDS LIMIT COMMAND...: its output in NAME.log, a line in summary.txt
    local name=$1 took=$2 limit=$(($3 * SLACK)) start=$SECONDS status=0 word=ok
    shift 3
    [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return 0
    if [ -n "$plan" ]; then
        [ "$name" = tests ] || total=$((total + took)) # which run beside others
        printf '%-14s %4d s [%3d]  %s\n' "$name" "$took" "$limit" "$(tr -s ' \n' ' ' <<<"$*" | cut -c1-90)"
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    case $status in
        0) ;;
        5) [ "$name" = tests ] && word="no tests" || word="failed (5)" ;;
        124 | 137) word="stopped after $limit s" ;;
        *) word="failed ($status)" ;;
    esac
    [ "$word" = ok ] || [ "$word" = "no tests" ] || touch "$out/.failed"
    printf '%-14s %-22s %4d s\n' "$name" "$word" $((SECONDS - start)) | tee -a "$out/summary.txt"
}

if [ -z "$plan" ]; then
    if [ -n "$(ls -A "$out" 2>/dev/null)" ] && [ ! -f "$out/summary.txt" ]; then
        echo "gpu.sh: $out holds something else than results of gpu.sh, which would be removed: give a new folder" >&2
        exit 2
    fi
    rm -rf "$out"
    mkdir -p "$out" && out=$(cd "$out" && pwd) && touch "$out/summary.txt" || exit 2
fi

part environment 7 30 "$python" - "$out" <<'END'
import json, platform, subprocess, sys
from pathlib import Path

import torch

from distpro.runs.folder import environment

facts = {**environment(), "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    facts |= {"gpu": gpu.name, "memory": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"}
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
Path(sys.argv[1], "environment.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
print(json.dumps(facts, indent=1, default=str))
END

workers=$((($(nproc) + 1) / 2))
tests() { part tests 95 150 "$python" -m pytest -m cuda -p no:cacheprovider -rs -n "$workers" --durations=10 tests; }
if [ -n "$plan" ]; then tests; else tests & fi

data=${DISTPRO_DATA:-}/cifar10.npz
if [ ! -f "$data" ]; then
    data=$out/made_up.npz
    part data 2 20 "$python" - "$data" <<'END'
import sys

import numpy as np

# Ten classes of a pattern each, under noise: to be learned, not to be learned at once.
draw = np.random.default_rng(0)
patterns = draw.normal(size=(10, 32, 32, 3))
arrays = {}
for part, count in (("train", 10000), ("test", 1000)):
    labels = draw.integers(0, 10, count)
    images = 128 + 20 * patterns[labels] + 60 * draw.normal(size=(count, 32, 32, 3))
    arrays |= {f"x_{part}": images.clip(0, 255).astype(np.uint8), f"y_{part}": labels}
np.savez(sys.argv[1], **arrays)
END
fi

short=(--device "$device" "data.root=\"$data\"" tracking.tensorboard=false training.epochs=2)
[ "$device" = cpu ] && short+=(data.samples=500 training.batch_size=16 training.max_steps=4 threads=1)
pair=("teacher.checkpoint=\"$out/teacher/student.pt\"")
part teacher 25 60 "$python" -m distpro train search_configs/cifar10_resnet56_resnet20.yaml --out "$out/teacher" \
    student.model=resnet56 "${short[@]}"
part kd 25 60 "$python" -m distpro retrain retrain_configs/cifar10_kd.yaml --out "$out/kd" "${pair[@]}" "${short[@]}"
part search 60 80 "$python" -m distpro search search_configs/cifar10_resnet56_resnet20.yaml --out "$out/search" \
    "${pair[@]}" "${short[@]}"
wait

bench=(--device "$device" --threads 1) many=(--steps 20 --rounds 5 --workers "$workers") few=() small=()
[ "$device" = cpu ] && bench+=(--rounds 1 --batch 8) many=() few=(--steps 1 --repeats 1 --batch 8) small=(--steps 1 --batch 8)
methods=(plain kd at review distpro)
part profile 36 60 "$python" tools/profile_gpu.py --device "$device" --threads 1 "${small[@]}"
part bench_train 42 60 "$python" tools/bench_train.py --json "$out/bench_train.json" --methods "${methods[@]}" --precision float32 \
    "${many[@]}" "${bench[@]}"
part bench_graphs 80 100 "$python" tools/bench_train.py --json "$out/bench_graphs.json" --methods plain kd --precision float32 \
    --compile reduce-overhead "${many[@]}" "${bench[@]}"
part bench_bf16 42 60 "$python" tools/bench_train.py --json "$out/bench_bf16.json" --methods "${methods[@]}" "${many[@]}" "${bench[@]}"
part bench_seeds 33 60 "$python" tools/bench_seeds.py --json "$out/bench_seeds.json" --seeds 8 "${bench[@]}"
part bench_horizon 24 40 "$python" tools/bench_horizon.py --device "$device" "${few[@]}"
part bench_search 160 180 "$python" tools/bench_search.py --json "$out/bench_search.json" "${bench[@]}"

[ -n "$plan" ] && echo "in all about $(((total + 59) / 60)) minutes" && exit
echo "results in $out"
[ ! -e "$out/.failed" ]
