#!/usr/bin/env bash
# First contact with a GPU: what cannot be seen without one, in order of value, as much as fits into 9 minutes.
#
#   here:            bash benchmarks/gpu_wheels.sh            fills .whl/
#   on the GPU:      bash benchmarks/gpu_check.sh             .whl carried along; $OUT gets results.jsonl and logs
#   some parts:      PARTS="agree steps" bash benchmarks/gpu_check.sh
#   without a GPU:   REHEARSE=1 OUT=/tmp/out bash benchmarks/gpu_check.sh
#   afterwards:      python benchmarks/gpu_report.py FOLDER   (the one that it names at its end)
#
# $PYTHON runs everything (python3). What it lacks is installed from .whl/ to $SITE, and nothing else is. Exit code 2: nothing
# could be asked; 1: a part failed.
# A part has its own limit (or $MOST seconds) and that of all (SECONDS_IN_ALL); one that fails or hangs does not stop the next, and what it
# found by then is kept.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$SECONDS failed=0
slower=1
[ "${REHEARSE:-}" != 0 ] || REHEARSE=
[ -z "${REHEARSE:-}" ] || slower=5 # a CPU, shared with others
in_all=${SECONDS_IN_ALL:-$((540 * slower))}
KNOWN="machine agree tests steps peer demo kernels"
PARTS=${PARTS:-$KNOWN}
for name in $PARTS; do
  case " $KNOWN " in *" $name "*) ;; *) echo "gpu_check: PARTS must be among $KNOWN; got $name" >&2; exit 2 ;; esac
done
case " $PARTS " in *" machine "*) ;; *) PARTS="machine $PARTS" ;; esac # a report names the card
export PYTHON=${PYTHON:-python3} OUT=${OUT:-$(mktemp -d)} SITE=${SITE:-/tmp/site} REHEARSE=${REHEARSE:-}
export SMALL=${REHEARSE:+--rehearse}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export MPLCONFIGDIR=${MPLCONFIGDIR:-/tmp/matplotlib}
[ -z "$REHEARSE" ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=
mkdir -p "$OUT"
[ ! -s "$OUT/results.jsonl" ] || mv "$OUT/results.jsonl" "$OUT/results-$(date +%s).jsonl" # of an earlier call
: > "$OUT/results.jsonl"

note() { printf '%s\n' "$1" | tee -a "$OUT/results.jsonl"; }

# part NAME LIMIT COMMAND...: what it prints goes to $OUT/log, or to a log of its own; how it ended to results.jsonl
part() {
  local name=$1 limit=${MOST:-$(($2 * slower))} left=$((in_all - (SECONDS - began))) start=$SECONDS code=0 log="$OUT/log"
  case $1 in tests | steps | peer) log="$OUT/$1.log" ;; esac
  shift 2
  case " $PARTS install " in *" ${name%%.*} "*) ;; *) return 0 ;; esac
  if [ "$left" -lt 15 ]; then
    note "{\"part\": \"$name\", \"name\": \"end\", \"skipped\": \"$left s were left\"}"
    return 0
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name: at most $limit s"
  echo "== $name: $*" >> "$log"
  timeout -k 5 "$limit" "$@" >> "$log" 2>&1 &
  local group=$! # timeout leads a process group of its own
  wait "$group" || code=$?
  kill -KILL -- "-$group" 2> /dev/null # what outlives it would hold the GPU's memory
  note "{\"part\": \"$name\", \"name\": \"end\", \"rc\": $code, \"seconds\": $((SECONDS - start))}"
  [ "$code" = 0 ] || failed=1
  [ "$code" = 0 ] || tail -n 15 "$log" | cut -c1-300
}

# Prints what $PYTHON lacks for the parts; fails where it lacks something.
lacks() {
  "$PYTHON" - <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

needed = "torch torchvision lightning torchmetrics transformers peft hydra omegaconf pydantic sam2 iopath portalocker pycocotools"
needed += " scipy cv2 skimage pyarrow matplotlib PIL safetensors jaxtyping beartype hypothesis pytest requests regex"
missing = [name for name in needed.split() if find_spec(name) is None]
least = {"torch": (2, 11), "transformers": (5, 19), "tokenizers": (0, 22), "safetensors": (0, 8)}
for name, low in least.items():
    try:
        have = version(name)
        if tuple(int(part) for part in have.split("+")[0].split(".")[:2]) < low:
            missing.append(f"{name}>={'.'.join(map(str, low))} (it has {have})")
    except PackageNotFoundError:
        missing.append(name) if name not in missing else None
if missing:
    print(f"{sys.executable} must have {', '.join(missing)}")
sys.exit(0 if missing else 1)
PY
}

# Whether TRL, the peer, is neither here nor can be had by uv.
lacks_peer() {
  ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("trl") is None)' && ! command -v uv .uv/bin/uv > /dev/null
}

install() {
  local these version
  these=$(cksum .whl/*.whl)
  [ "$these" != "$(cat "$SITE/.these" 2> /dev/null)" ] || return 0 # a warm machine has them
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" .whl/*.whl || return
  # The checkout is on the path and not installed: its version stands here.
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1)
  mkdir -p "$SITE/segrl-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: segrl\nVersion: %s\n' "$version" > "$SITE/segrl-$version.dist-info/METADATA"
  echo "$these" > "$SITE/.these"
}

machine() {
  uname -a; nproc; df -h / /tmp; free -g
  nvidia-smi || echo "no nvidia-smi"
  "$PYTHON" -m pip list --format=freeze
  "$PYTHON" benchmarks/gpu_parts.py machine $SMALL
}

# The tests of what a GPU alone does; rehearsed, the same tests on a CPU.
tests() {
  local code=0
  local files
  mapfile -t files < <(grep -rl --include='*.py' 'mark\.gpu' tests) # others may need what is not here
  "$PYTHON" -m pytest -m gpu $SMALL -rA -q --durations=10 -p no:cacheprovider "${files[@]}" > "$OUT/tests.tmp" 2>&1 || code=$?
  cat "$OUT/tests.tmp"
  "$PYTHON" - "$OUT/tests.tmp" <<'PY' >> "$OUT/results.jsonl"
import json, re, sys

for line in open(sys.argv[1]):
    if found := re.match(r"(PASSED|FAILED|ERROR|SKIPPED) (.*)", line):
        print(json.dumps({"part": "tests", "name": found[2][:300], "outcome": found[1]}))
PY
  rm -f "$OUT/tests.tmp"
  return "$code"
}

# TRL has an environment of its own where this one lacks it.
peer() {
  local python=("$PYTHON") ask='import grpo_step; print(*grpo_step.peers_python(), sep="\n")'
  "$PYTHON" -c 'import trl' 2> /dev/null || mapfile -t python < <(cd benchmarks && "$PYTHON" -c "$ask")
  "${python[@]}" benchmarks/gpu_parts.py peer $SMALL
}

# demo PRECISION UPDATES: the command that a newcomer types
demo() {
  local runs start=$SECONDS code=0 updates=$2 more=(trainer.accelerator=gpu data.test_length=32)
  runs=$(mktemp -d)
  [ -z "$REHEARSE" ] || updates=2 more=(trainer.accelerator=cpu data.test_length=4 data.batch_size=2 data.workers=0 test_before=false)
  "$PYTHON" -m segrl.train +experiment=demo trainer.max_steps="$updates" trainer.precision="$1" logger=csv paths.runs="$runs" \
    "${more[@]}" || code=$?
  "$PYTHON" - "$runs" "$1" "$updates" "$code" $((SECONDS - start)) <<'PY' | tee -a "$OUT/results.jsonl"
import json, sys
from pathlib import Path

runs, precision, updates, code, seconds = sys.argv[1:]
line = {"part": "demo", "name": precision, "updates": int(updates), "rc": int(code), "wall_s": int(seconds)}
kept = ("step", "reward/total", "rollout/fault_rate", "policy/grad_norm")
for file in Path(runs).rglob("history.jsonl"):
    said = [row for row in map(json.loads, file.read_text().splitlines()) if "reward/total" in row]
    for name, row in (("first", said[:1]), ("last", said[-1:])):
        line[name] = {key: row[0].get(key) for key in kept} if row else None
for file in Path(runs).rglob("metrics.json"):
    line["metrics"] = json.loads(file.read_text())
print(json.dumps(line)[:4000])
PY
  rm -rf "$runs"
  return "$code"
}
export -f install machine tests demo peer

export PYTHONPATH="$PWD/src"
if { lacks > /dev/null || lacks_peer; } && compgen -G '.whl/*.whl' > /dev/null; then
  part install 60 bash -c install
  PYTHONPATH="$PYTHONPATH:$SITE"
fi
if missing=$(lacks) || ! "$PYTHON" -c pass; then
  echo "gpu_check: ${missing:-PYTHON must name a Python that runs; got $PYTHON}; benchmarks/gpu_wheels.sh fills .whl/ with what has to be carried along" >&2
  exit 2
fi
for name in $PARTS; do
  case $name in
    machine) part machine 60 bash -c machine ;;
    tests) part tests 180 bash -c tests ;;
    agree) part agree 60 "$PYTHON" benchmarks/gpu_parts.py agree $SMALL ;;
    demo)
      part demo.float32 80 bash -c "demo 32-true 50"
      part demo.bfloat16 70 bash -c "demo bf16-mixed 30"
      ;;
    kernels) part kernels 60 "$PYTHON" benchmarks/gpu_parts.py kernels $SMALL ;;
    steps) part steps 170 "$PYTHON" benchmarks/gpu_parts.py steps $SMALL --seconds 130 ;;
    peer) part peer 130 bash -c peer ;;
  esac
done

echo "== $((SECONDS - began)) s; in $OUT:"
ls -l "$OUT"
"$PYTHON" benchmarks/gpu_report.py "$OUT/results.jsonl" --print | head -n 120
[ -n "$REHEARSE" ] || echo "file it with: python benchmarks/gpu_report.py $OUT"
exit "$failed"
