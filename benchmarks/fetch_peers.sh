#!/usr/bin/env bash
# Gets the peers' wheels, none compiled, for a machine without a network:
#   benchmarks/fetch_peers.sh DIR
# There: python -m pip install --no-index --no-deps DIR/*.whl
# They need torch, triton and transformers 5.6.2 or newer; FlashInfer, in a version that needs no
# compiled package beside it, compiles its kernels with nvcc and ninja. PYTHON names the interpreter;
# it has torch, which the setups of mamba-ssm and FlashInfer ask for. Of mamba-ssm the compiled scan
# of Mamba-1 is left out.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: benchmarks/fetch_peers.sh DIR" >&2; exit 2; }
pip() { "${PYTHON:-python3}" -m pip "$@"; }
pip download --quiet --no-deps --only-binary=:all: --dest "$1" \
  fla-core==0.6.0 flash-linear-attention==0.6.0
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip wheel --quiet --no-deps \
  --no-build-isolation --no-binary :all: --wheel-dir "$1" mamba-ssm==2.3.2.post1 \
  flashinfer-python==0.3.1
pip download --quiet --only-binary=:all: --implementation py --abi none --platform any \
  --dest "$1" click einops filelock packaging pynvml requests tabulate tqdm
ls -l "$1"/*.whl
size=$(cat "$1"/*-none-any.whl | wc -c)
[ "$size" -le 10000000 ] || { echo "the wheels have $size bytes, more than 10 MB" >&2; exit 1; }
