#!/usr/bin/env bash
# What only a GPU can say, in about ten minutes: the tests marked gpu, then the rates of GANs, segmenters, inference
# and selection beside their peers. Each part is cut off at its share of the time, and what it had written stays.
#
#     make gpu OUT=FOLDER                   with a network: installs nucseg and what tests need into .venv first
#     bash tests/bench/gpu.sh FOLDER        with what is there
#
# A machine without a network runs the second in a copy of this repository. PYTHON names the interpreter that has torch
# and pytest, python3 if it is not set, and PYTHONPATH, by full paths, what that lacks: of an unpacked bundle (`nucseg
# bundle`; its first start, such as `bash BUNDLE/start.sh status`, makes site/) that is
#
#     PYTHON=python3 PYTHONPATH=/path/to/BUNDLE/site bash tests/bench/gpu.sh FOLDER
#
# xdist makes it faster and beartype checks shapes where they are there. NUCSEG_DATA names the real images, if any
# (/path/to/BUNDLE/data), NUCSEG_WEIGHTS the encoders' weights (/path/to/BUNDLE/weights) where no package holds them.
set -uo pipefail
out=${1:?name a folder for the results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
cd "$(dirname "$0")/../.." || exit
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" -c '
import jaxtyping, pytest, torch
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name())' || exit 1

part() {  # NAME SECONDS COMMAND...: run it, keep what it prints, go on whatever happens
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  # An interrupt, after which pytest still tells what has failed so far.
  timeout --signal INT --kill-after 5 "$limit" "$@" > "$out/$name.txt" 2>&1 || code=$?
  echo "$name: exit $code after $((SECONDS - began)) of $limit s"
  tail -n 15 "$out/$name.txt" | sed 's/^/    /'
}

# Only the files that hold some: to collect all takes longer than to run these.
mapfile -t files < <(grep -lF '@pytest.mark.gpu' tests/test_*.py)
# In several processes: one whose recording fails spoils it for all tests after it.
side_by_side=()
"$python" -c 'import xdist' 2> /dev/null && side_by_side=(-n 4 --dist loadfile)
part kernels 60 "$python" -m pytest -q -W default -p no:cacheprovider tests/test_kernels.py
part tests 90 "$python" -m pytest -q -m gpu -W default -p no:cacheprovider "${side_by_side[@]}" "${files[@]}"
part norm 30 "$python" tests/bench/bench_norm.py --out "$out/norm.json"
part conv 30 "$python" tests/bench/bench_conv.py --out "$out/conv.json"
part gan 70 "$python" tests/bench/bench_gan.py --seconds 4 --out "$out/gan.json"
part hovernet 40 "$python" tests/bench/bench_training.py --seconds 0.5 \
  --only "hovernet batch 32 bf16, graph, channels-last" --out "$out/hovernet.json"
part mirrored 40 "$python" tests/bench/bench_training.py --seconds 0.5 \
  --only "hovernet mirrored batch 16 bf16, graph, channels-last" --out "$out/mirrored.json"
part training 90 "$python" tests/bench/bench_training.py --out "$out/training.json"
part inference 50 "$python" tests/bench/bench_inference.py --images 4 --size 4000
if [ -n "${NUCSEG_DATA:-}" ]; then
  part selection 75 "$python" tests/bench/bench_cps.py --random-weights --out "$out/selection.json"
fi
