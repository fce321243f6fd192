#!/usr/bin/env bash
# Builds the operators on a CUDA machine, checks them against float64 there and times them. Needs no network.
#
#   kernels/bench/gpu.sh OUT [WHEELS]
#
# OUT receives build.log, tests.txt, tests.xml and kernels_cuda.json. WHEELS is a folder of wheels of what the
# machine lacks, such as the packages that the benchmark compares with; they are used for this run only.
#
#   PYTHON  interpreter with torch, triton, pytest, pybind11, ninja and setuptools (python3)
#   STEPS   of build, test and bench, for machines that are lent for minutes (all three)
#   OPS     operators to time (all)
#   SHAPES  smoke, paper or scale (paper)
#   DTYPES  (float32 bfloat16)
#
# Exit code 1 where a test failed or an operator was wrong; what can be measured still is.
# ATOMAS_GPU_TEST_DEVICE=cpu tries the script itself where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

[ $# -ge 1 ] || { sed -n '2,17s/^# \?//p' "$0"; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 1
python=${PYTHON:-python3}
steps=${STEPS:-build test bench}
device=${ATOMAS_GPU_TEST_DEVICE:-cuda}
export PYTHONPATH=$PWD/kernels

made=()
trap 'rm -rf "${made[@]}"' EXIT
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch sees no CUDA GPU; nothing was built, tested or timed" >&2
  exit 1
fi
if [ -z "${CUDA_HOME:-}" ] && ! command -v nvcc > /dev/null; then
  for home in /usr/local/cuda /usr/local/cuda-*; do
    [ ! -x "$home/bin/nvcc" ] || { export CUDA_HOME=$home; break; }
  done
fi
if [ $# -ge 2 ]; then
  site=$(mktemp -d)
  made+=("$site")
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$2"/*.whl || exit 1
  PYTHONPATH+=:$site
fi

failed=0
if [[ $steps == *build* ]]; then
  # Away from pyproject.toml, whose form a setuptools older than 77 refuses; nothing but extensions is built.
  tree=$(mktemp -d) && made+=("$tree") && ln -s "$PWD"/{setup.py,csrc,kernels,launcher,atomas} "$tree" || exit 1
  (cd "$tree" && ATOMAS_BUILD_NATIVE=1 ATOMAS_BUILD_CUDA=1 "$python" setup.py -q build_ext --inplace) > "$out/build.log" 2>&1 ||
    { tail -n 20 "$out/build.log" >&2; echo "gpu.sh: the build failed, see $out/build.log" >&2; exit 1; }
fi
if [[ $steps == *test* ]]; then
  "$python" -m pytest tests/gpu -q -p no:cacheprovider --junitxml "$out/tests.xml" 2>&1 | tee "$out/tests.txt" || failed=1
fi
if [[ $steps == *bench* ]]; then
  "$python" -m atomas_kernels.bench ${OPS:+--op $OPS} --device "$device" --shapes "${SHAPES:-paper}" \
    --dtype ${DTYPES:-float32 bfloat16} --seconds 2 --json "$out/kernels_$device.json" || failed=1
fi
exit $failed
