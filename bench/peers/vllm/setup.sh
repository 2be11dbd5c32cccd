#!/usr/bin/env bash
# Unpacks on the GPU machine what pack.sh has packed: `bench/peers/vllm/setup.sh A B [SITE]`, with its two folders.
#
# vLLM then lies in SITE (/tmp/vllm_site by default), beside what is installed: run with PYTHONPATH=SITE. A second call
# finds it there.
set -euo pipefail
first=${1:?usage: setup.sh A B [SITE]}
second=${2:?usage: setup.sh A B [SITE]}
site=${3:-/tmp/vllm_site}
if [[ -e $site/.complete ]]; then exit 0; fi
mkdir -p "$site"
tar xJf "$second/rest.tar.xz" -C "$site"
cat "$first/large.xz.1" "$second/large.xz.2" | xz -dc >"$site/vllm/_C_stable_libtorch.abi3.so"
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$second"/wheels/*.whl
touch "$site/.complete"
