#!/usr/bin/env bash
# Downloads the peers' wheels, pure Python, for a machine without a network:
#   benchmarks/fetch_peers.sh DIR
# There: python -m pip install --no-index --no-deps --find-links DIR fla-core flash-linear-attention
# They need torch, triton, einops and transformers 5.6.2 or newer. PYTHON names the interpreter.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: benchmarks/fetch_peers.sh DIR" >&2; exit 2; }
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --dest "$1" \
  fla-core==0.6.0 flash-linear-attention==0.6.0
ls -l "$1"/*.whl
size=$(cat "$1"/fla_core-*.whl "$1"/flash_linear_attention-*.whl | wc -c)
[ "$size" -le 10000000 ] || { echo "the wheels have $size bytes, more than 10 MB" >&2; exit 1; }
