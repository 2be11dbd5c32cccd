#!/usr/bin/env bash
# One round on a GPU machine without network: `bench/gpu_round.sh tests` or `bench/gpu_round.sh bench`, from anywhere.
#
# Each takes less than 7 minutes: every part has a limit of its own and of what is left, and one that fails does not keep
# the next from running. Results lie in $OUT (a new folder if it is unset); the exit code is 1 if a part failed.
# GRAPHEXEC_COMMIT names the commit where the checkout travels without its history. Wheels in .whl/ are installed first.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

round=${1:-}
case "$round" in
tests | bench) ;;
*)
  echo "usage: bench/gpu_round.sh tests|bench" >&2
  exit 2
  ;;
esac
limit=${GPU_ROUND_SECONDS:-410}
OUT=${OUT:-$(mktemp -d)}
mkdir -p "$OUT"
export OUT PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=()

left() { echo $((limit - SECONDS)); }

# part NAME SECONDS COMMAND...: runs a command for at most so long and at most as long as the round has left.
part() {
  local name=$1 seconds=$2 code
  shift 2
  if (($(left) < seconds)); then seconds=$(left); fi
  if ((seconds < 10)); then
    echo "== $name: no time left"
    failed+=("$name (no time)")
    return
  fi
  echo "== $name (at most $seconds s): $*"
  timeout --signal=INT --kill-after=20 "$seconds" "$@"  # INT: pytest still writes what it has
  code=$?
  echo "== $name: exit code $code after $SECONDS s of the round"
  if ((code == 124 || code == 137)) && [[ -n ${may_run_out:-} ]]; then
    echo "== $name: the time ran out; no failure until then"
  elif ((code != 0)); then
    failed+=("$name ($code)")
  fi
}

install() {
  local path="$PWD"
  if compgen -G ".whl/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl ||
      failed+=("wheels")
    path="/tmp/site"
  fi
  export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}"
  if ! python3 -m pip install -q --no-deps --no-build-isolation --no-index -e . ||
    ! (cd / && python3 -c "import graphexec.capture, graphexec.kernels"); then
    echo "== not installed; it runs from its folder"
    export PYTHONPATH="$PWD:$PYTHONPATH"
  fi
  python3 -c "import bench.load, tests.support.checkpoints, examples.collatz" || failed+=("imports")
  python3 -c "import sys, torch; print(sys.version.split()[0], torch.__version__, torch.cuda.is_available())"
}

tests() {
  # The files that nothing else can show come first.
  part "tests" 400 python3 -m pytest tests/gpu/test_cuda_runtime.py tests/gpu/test_engine.py tests/gpu -q -rfEs --durations=10 --junitxml="$OUT/tests.xml"
  if (($(left) < 45)); then
    echo "== memcheck: no time left"
  elif ! command -v compute-sanitizer >/dev/null; then
    echo "== memcheck: there is no compute-sanitizer"
  else
    # A few launches of every kernel that moves slot state or attends. Allocations are not cached, or an access beyond
    # one of them would fall into its neighbour unseen.
    may_run_out=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "memcheck" 150 compute-sanitizer --tool memcheck --error-exitcode 9 \
      --target-processes application-only --log-file "$OUT/memcheck.log" python3 -m pytest -q -x \
      tests/gpu/test_kernel_step_state.py tests/gpu/test_attention_kernels.py \
      -k "hundreds_of_slots or every_combination_of_flags or counter_wraps or split_without_work"
    tail -n 20 "$OUT/memcheck.log" 2>/dev/null
  fi
}

bench() {
  part "host" 70 python3 -m pytest bench/test_host.py -q --benchmark-json="$OUT/host.json" \
    --benchmark-columns=median,mean,max,rounds
  part "decode" 240 python3 -m bench.decode --shape qwen3-0.6b --batch 1,64,256 --depth 1,0,2 --minutes 3.0 \
    --json "$OUT/decode-qwen3-0.6b.json"
  part "gpu" 130 python3 -m pytest bench/test_gpu.py -q -rs --benchmark-json="$OUT/gpu.json" \
    --benchmark-columns=median,mean,max,rounds
}

run() {
  install
  "$round"
  ls -l "$OUT"
  if ((${#failed[@]})); then
    echo "== failed: ${failed[*]}"
    return 1
  fi
  echo "== all parts of $round passed"
}
run 2>&1 | tee "$OUT/$round.log"
exit "${PIPESTATUS[0]}"
