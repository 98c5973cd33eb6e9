#!/usr/bin/env bash
# Fills .whl/ with what a GPU machine without a network lacks beside its own torch (2.11 or later) and Python 3.12: versions
# and hashes of uv.lock.
#   bash benchmarks/gpu_wheels.sh          then carry .whl and run: bash benchmarks/gpu_check.sh
# TARGET=3.13 is for a machine with that Python. PEER=0 leaves out TRL and what it stands on (not in uv.lock).
# PYTHON=python3.11 or later, with pip and venv, does the work.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
TARGET=${TARGET:-3.12}
WHEELS=(transformers peft hydra-core omegaconf pydantic pydantic-core annotated-types typing-inspection typing-extensions
  pycocotools beartype
  regex portalocker)
SOURCES=(antlr4-python3-runtime iopath sam2) # they publish no wheel; all are pure Python
# TRL asks for no newer pyarrow than 21 with this datasets; both are new enough for TRL 1.16.
PEERS=(trl==1.16.0 datasets==4.7.0 dill==0.4.0 multiprocess==0.70.18 xxhash==4.1.0 pandas==3.1.1 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0)

new=$(mktemp -d)
git rev-parse HEAD > "$new/commit" # the GPU machine may have no git history
[ -z "$(git status --porcelain)" ] || echo "with changes" >> "$new/commit"
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT

# "name==version --hash=... --hash=..." of the lock; of two versions the newer, which is the one without vLLM
locked() {
  "$PYTHON" - "$@" <<'PY'
import re, sys, tomllib

packages = tomllib.load(open("uv.lock", "rb"))["package"]
for name in sys.argv[1:]:
    found = [p for p in packages if p["name"] == name]
    if not found:
        sys.exit(f"gpu_wheels: uv.lock has no {name}")
    newest = max(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p["version"])])
    files = [*newest.get("wheels", []), *([newest["sdist"]] if "sdist" in newest else [])]
    print(f"{name}=={newest['version']}", *(f"--hash={file['hash']}" for file in files))
PY
}

"$PYTHON" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install -q setuptools wheel
binary=(--no-deps --only-binary=:all: --python-version "$TARGET" --implementation cp
  --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64
  --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$new")
locked "${WHEELS[@]}" > "$work/wheels.txt"
"${pip[@]}" download -q "${binary[@]}" --require-hashes -r "$work/wheels.txt"
locked "${SOURCES[@]}" > "$work/sources.txt"
# Without build isolation, or sam2 would fetch a torch of several GB to build nothing with it.
SAM2_BUILD_CUDA=0 "${pip[@]}" wheel -q --no-deps --no-binary=:all: --no-build-isolation --require-hashes -w "$new" -r "$work/sources.txt"
[ "${PEER:-1}" = 0 ] || "${pip[@]}" download -q "${binary[@]}" "${PEERS[@]}"

rm -rf .whl && mv "$new" .whl
for wheel in .whl/*.whl; do
  case $wheel in
    *-none-any.whl | *-cp"${TARGET/./}"-*x86_64.whl | *-abi3-*x86_64.whl) ;;
    *) echo "gpu_wheels: $wheel does not fit Python $TARGET on x86-64" >&2; exit 1 ;;
  esac
done
twice=$(ls .whl | sed 's/-.*//' | sort | uniq -d)
[ -z "$twice" ] || { echo "gpu_wheels: two versions of $twice" >&2; exit 1; }
ls -l .whl/*.whl | awk 'NR > 0 {printf "%9.1f KB  %s\n", $5 / 1024, $9}'
tree=$(git ls-files -co --exclude-standard -z | xargs -0 du -cb 2> /dev/null | awk '$2 == "total" {s += $1} END {print s + 0}')
wheels=$(du -cb .whl/*.whl | awk 'END {print $1}')
awk -v t="$tree" -v w="$wheels" 'BEGIN { m = 2^20; printf "tree %.1f + wheels %.1f = %.1f MiB\n", t / m, w / m, (t + w) / m }'
