#!/usr/bin/env bash
# Gets the peers' wheels, pure Python, for a machine without a network:
#   benchmarks/fetch_peers.sh DIR
# There: python -m pip install --no-index --no-deps DIR/*.whl
# They need torch, triton, einops and transformers 5.6.2 or newer. PYTHON names the interpreter; it
# has torch, which the setup of mamba-ssm asks for. Of that the compiled scan of Mamba-1 is left out.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: benchmarks/fetch_peers.sh DIR" >&2; exit 2; }
pip() { "${PYTHON:-python3}" -m pip "$@"; }
pip download --quiet --no-deps --only-binary=:all: --dest "$1" \
  fla-core==0.6.0 flash-linear-attention==0.6.0
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip wheel --quiet --no-deps \
  --no-build-isolation --no-binary mamba-ssm --wheel-dir "$1" mamba-ssm==2.3.2.post1
ls -l "$1"/*.whl
size=$(cat "$1"/fla_core-*.whl "$1"/flash_linear_attention-*.whl "$1"/mamba_ssm-*.whl | wc -c)
[ "$size" -le 10000000 ] || { echo "the wheels have $size bytes, more than 10 MB" >&2; exit 1; }
