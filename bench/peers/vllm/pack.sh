#!/usr/bin/env bash
# Packs vLLM 0.26.0 for a GPU machine without network: `bench/peers/vllm/pack.sh [FOLDER]`, from anywhere.
#
# Writes FOLDER/a and FOLDER/b (.peer/a and .peer/b by default), which setup.sh puts together. Each is less than 51 MB:
# 64 MiB travel at a time, the checkout among them. On that machine torch 2.11.0+cu130, Python 3.12 and transformers 5.17
# must be installed: 0.26.0 is the newest vLLM that is built for this torch. Dense models run; the kernels of others are
# left out.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
folder=$(realpath -m "${1:-$root/.peer}")
first_bytes=48500000
wheels=(
  annotated-doc==0.0.4 annotated-types==0.7.0 apache-tvm-ffi==0.1.10 astor==0.8.1 blake3==1.0.5 cachetools==7.1.6
  cbor2==6.1.3 cloudpickle==3.1.2 compressed-tensors==0.17.0 depyf==0.20.0 dill==0.4.0 distro==1.9.0 fastapi==0.136.3
  ijson==3.4.0 jiter==0.10.0 llguidance==1.7.6 loguru==0.7.3 msgspec==0.21.1 openai==2.48.0 openai-harmony==0.0.8
  partial-json-parser==0.2.1.1.post7 pybase64==1.4.3 pydantic==2.12.5 pydantic-core==2.41.5 pyzmq==27.1.0
  setproctitle==1.3.7 sniffio==1.3.1 starlette==1.3.1 typing-inspection==0.4.2 uvloop==0.22.1 xgrammar==0.2.7
)
left_out=(
  vllm/vllm-rs 'vllm/_moe_C*' 'vllm/_flashmla*' 'vllm/_qutlass*' 'vllm/_rust*' 'vllm/vllm_flash_attn/_vllm_fa2_C*'
  vllm/third_party/deep_gemm vllm/third_party/fmha_sm100 vllm/third_party/flashmla
)
large='vllm/_C_stable_libtorch*.so' # too large for one part

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$folder/a" "$folder/b"
mkdir -p "$folder/a" "$folder/b/wheels" "$work/tree"

# download FOLDER REQUIREMENT...: wheels for the GPU machine, whatever this one is.
download() {
  local into=$1 minor platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
  shift
  for minor in 17 24 26 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  python3 -m pip download -qq --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d "$into" "$@"
}

download "$work" vllm==0.26.0
download "$folder/b/wheels" "${wheels[@]}"
python3 -m zipfile -e "$work"/vllm-*.whl "$work/tree"
cd "$work/tree"
for pattern in "${left_out[@]}"; do
  # shellcheck disable=SC2086  # a pattern
  rm -rf $pattern
done
# shellcheck disable=SC2086
xz -T0 -3 -c $large >"$work/large.xz"
# shellcheck disable=SC2086
rm $large
tar cf - . | xz -T0 -3 >"$folder/b/rest.tar.xz"
head -c "$first_bytes" "$work/large.xz" >"$folder/a/large.xz.1"
tail -c "+$((first_bytes + 1))" "$work/large.xz" >"$folder/b/large.xz.2"
du -sm "$folder/a" "$folder/b"
