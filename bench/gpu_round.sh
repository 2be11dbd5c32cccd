#!/usr/bin/env bash
# One round on a GPU machine without network: `bench/gpu_round.sh ROUND`, from anywhere.
#
#   tests                         tests that need a GPU, and a memory check of the kernels
#   bench, bench-8b               decode steps at every batch and depth, by shape; capture
#   context, context-8b           the same with prompts of 1,000 and 8,000 tokens
#   mixed                         prompts alone, and steps with prompt chunks beside decoding requests
#   serving                       requests that arrive in time
#   startup                       process start to first token, by compile mode, cold and warm
#   kernels                       attention and products over tiles, sampling by variant
#   calls                         what the host, the driver and single replays cost (pytest-benchmark)
#   peer-unpack                   puts away what lies in .peer/a and .peer/b (bench/peers/vllm/pack.sh), and sets vLLM up
#                                 once both have come: they are too large to travel together
#   peer, peer-8b, peer-context   vLLM and graphexec, by shape, and with prompts of 1,000 tokens
#   peer-serving                  vLLM and graphexec under the same arrivals
#   peer-torch                    transformers' continuous batching, torch.compile, and graphexec
#
# Each takes less than 7 minutes: every part has a limit of its own and of what is left, and one that fails does not keep
# the next from running. Results lie in $OUT (a new folder if it is unset), named as bench/results/h200/ wants them; the
# exit code is 1 if a part failed. GRAPHEXEC_COMMIT names the commit where the checkout travels without its history.
# Wheels in .whl/ are installed first.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

rounds="tests|bench|bench-8b|context|context-8b|mixed|serving|startup|kernels|calls"
rounds+="|peer-unpack|peer|peer-8b|peer-context|peer-serving|peer-torch"
round=${1:-}
if [[ -z $round || $round == *"|"* || "|$rounds|" != *"|$round|"* ]]; then
  echo "usage: bench/gpu_round.sh $rounds" >&2
  exit 2
fi
limit=${GPU_ROUND_SECONDS:-410}
OUT=${OUT:-$(mktemp -d)}
BENCH_ROUND="$round $(date -u +%Y-%m-%dT%H:%M:%SZ)" # in every file: which were measured together
mkdir -p "$OUT"
export OUT BENCH_ROUND PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
parts=${PEER_PARTS:-/tmp/graphexec_peer}
site=${PEER_SITE:-/tmp/vllm_site}
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
  BENCH_STARTED=$(date +%s.%N) timeout --signal=INT --kill-after=20 "$seconds" "$@" # INT: pytest still writes what it has
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
    # A few launches of every kernel that moves slot state, attends or multiplies. Allocations are not cached, or an
    # access beyond one of them would fall into its neighbour unseen.
    may_run_out=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "memcheck" 150 compute-sanitizer --tool memcheck --error-exitcode 9 \
      --target-processes application-only --log-file "$OUT/memcheck.log" python3 -m pytest -q -x \
      tests/gpu/test_kernel_step_state.py tests/gpu/test_attention_kernels.py tests/gpu/test_linear.py \
      -k "hundreds_of_slots or every_combination_of_flags or counter_wraps or split_without_work or sides_of_the_limit"
    tail -n 20 "$OUT/memcheck.log" 2>/dev/null
  fi
}

# decode MINUTES FILE WORD...: a measurement that begins nothing after so many minutes, and has the round to end in.
decode() {
  local minutes=$1 file=$2
  shift 2
  part "$file" 400 python3 -m bench.decode --minutes "$minutes" --json "$OUT/$file.json" "$@"
}

bench() { decode 5.8 decode-qwen3-0.6b --shape qwen3-0.6b --depth 1,0,2; }
bench-8b() { decode 5.5 decode-qwen3-8b --shape qwen3-8b --depth 1,0,2 --traced-steps 64; }
context() { decode 4.8 context-qwen3-0.6b --shape qwen3-0.6b --batch 1,64,256 --prompt 1000,8000 --kv-gib 75 --depth 1 --no-captures; }
context-8b() { decode 4.8 context-qwen3-8b --shape qwen3-8b --batch 1,8,64 --prompt 1000,8000 --kv-gib 40 --depth 1 --no-captures; }

mixed() { part "mixed" 200 python3 -m bench.mixed --json "$OUT/mixed-qwen3-0.6b.json"; }
serving() {
  part "serving" 200 python3 -m bench.serving --rate 10,40,80,120 --json "$OUT/serving-qwen3-0.6b-graphexec.json"
}

startup() {
  part "startup" 400 python3 -m bench.startup --shape qwen3-0.6b --compile layer,model,off --minutes 4.5 \
    --json "$OUT/startup-qwen3-0.6b.json"
}

kernels() {
  part "attention" 170 python3 -m bench.attention_sweep --minutes 2.5 --json "$OUT/attention.json"
  part "linear" 150 python3 -m bench.linear_sweep --minutes 2 --json "$OUT/linear.json"
  part "sampling" 120 python3 -m bench.sampling_sweep --json "$OUT/sampling.json"
}

calls() {
  part "host" 90 python3 -m pytest bench/test_host.py -q --benchmark-json="$OUT/host.json" \
    --benchmark-columns=median,mean,max,rounds
  part "gpu" 200 python3 -m pytest bench/test_gpu.py -q -rs --benchmark-json="$OUT/gpu.json" \
    --benchmark-columns=median,mean,max,rounds
}

# Both are kept outside of the checkout: of that, the next call brings another copy.
peer-unpack() {
  local name
  mkdir -p "$parts"
  for name in a b; do
    if [[ -d .peer/$name ]]; then rm -rf "${parts:?}/$name" && mv ".peer/$name" "$parts/$name"; fi
  done
  if [[ -d $parts/a && -d $parts/b ]]; then
    part "vLLM's set-up" 300 bash bench/peers/vllm/setup.sh "$parts/a" "$parts/b" "$site"
  else
    echo "== there is $(ls "$parts") so far; bring the other part of .peer/, too"
  fi
}

# beside SHAPE NAME VLLM_SECONDS WORD...: vLLM first, since it is the one that may fail to start; WORDs are for both.
beside() {
  local shape=$1 name=$2 seconds=$3
  shift 3
  if [[ -e $site/.complete ]]; then
    PYTHONPATH="$site:$PWD" part "vllm, $name" "$seconds" python3 -m bench.peers.vllm.bench --shape "$shape" --traced \
      --json "$OUT/$name-vllm.json" "$@"
  else
    echo "== vLLM is not set up: peer-unpack comes first"
    failed+=("vllm")
  fi
  ours "$shape" "$name" "$@"
}

# ours SHAPE NAME WORD...: graphexec on the same card in the same minutes.
ours() {
  local shape=$1 name=$2
  shift 2
  part "graphexec, $name" 290 python3 -m bench.decode --shape "$shape" --depth 1 --no-captures --traced-steps 64 \
    --minutes 4 --json "$OUT/$name-graphexec.json" "$@"
}

peer() { beside qwen3-0.6b peer-qwen3-0.6b 220; }
peer-8b() { beside qwen3-8b peer-qwen3-8b 240; }
peer-context() { beside qwen3-0.6b peer-context-qwen3-0.6b 220 --batch 1,64,256 --prompt 1000; }

peer-serving() {
  local rates=(--rate 10,40,80,120,160,200 --seconds 6)
  if [[ -e $site/.complete ]]; then
    PYTHONPATH="$site:$PWD" part "vllm, serving" 220 python3 -m bench.peers.vllm.serving "${rates[@]}" --minutes 2 \
      --json "$OUT/serving-qwen3-0.6b-vllm.json"
  else
    echo "== vLLM is not set up: peer-unpack comes first"
    failed+=("vllm")
  fi
  part "graphexec, serving" 160 python3 -m bench.serving "${rates[@]}" --minutes 1.5 \
    --json "$OUT/serving-qwen3-0.6b-graphexec.json"
}

peer-torch() {
  part "torch.compile" 170 python3 -m bench.peers.compiled --batch 1,64 --traced --minutes 1.2 --json "$OUT/peer-torch-qwen3-0.6b-compiled.json"
  part "transformers" 100 python3 -m bench.peers.transformers_batching --batch 1,8,64 --traced --minutes 0.6 \
    --json "$OUT/peer-torch-qwen3-0.6b-transformers.json"
  ours qwen3-0.6b peer-torch-qwen3-0.6b
}

run() {
  if [[ $round != peer-unpack ]]; then install; fi
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
