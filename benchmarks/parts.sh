#!/usr/bin/env bash
# All of the peers' rows on a GPU, in parts of some minutes, the most telling first:
#   benchmarks/parts.sh 1      # then 2, 3, ... 10; a part that did not end goes on when called again
#   benchmarks/parts.sh all    # one after the other, each to its end
# Rows go to benchmarks/results/. Parts 5 and 9 need the wheels of fetch_peers.sh; with them
# FlashInfer is tried for every Transformer. PYTHON names the interpreter with the CUDA build of
# tlinformer.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { "${PYTHON:-python3}" benchmarks "$@" ${to_the_end:+--seconds 1000000}; }
memory() { "${PYTHON:-python3}" benchmarks memory "$@"; }
linear="gla gated-deltanet mamba2"
export TRITON_CACHE_AUTOTUNING=1 FLA_CONV_BACKEND=triton  # Mamba-2 has no other here
# Triton compiles all variants of a kernel before it tries them, minutes for each of these peers: all
# at once first, and their choices, made beside each other, are not kept.
compile() {
  local scratch peer
  scratch=$(mktemp -d)
  trap 'kill $(jobs -p) 2> /dev/null' EXIT
  for peer in $linear; do
    (unset TRITON_CACHE_AUTOTUNING
     export FLA_CACHE_RESULTS=0
     run "$1" --peers "$peer" --histories 1024 --calls 2 --json "$scratch/$peer.json") &
  done
  wait
  trap - EXIT
  rm -r "$scratch"
}
case ${1:-} in
  1) run decode --peers engine transformer naive-concatenate naive-recompute ;;
  2) run prefill --peers engine transformer --seconds 120
     run cache --peers engine tlinformer-pytorch transformer sliding-window \
       --sizes 41m d512 1.3b 7b --histories 0 1024 4096 16384 131072 524288 1048576 10000000 ;;
  3) run decode --peers tlinformer-pytorch sliding-window --seconds 100
     run prefill --peers tlinformer-pytorch sliding-window --seconds 80 ;;
  4) run decode --peers engine --histories 10000000
     run prefill --peers engine --histories 10000000 --calls 3
     memory
     memory --prompt 10000000 --generated 1000 ;;
  5) compile decode
     compile prefill
     run decode --peers $linear --histories 1024 1048576 --seconds 300
     run prefill --peers $linear --seconds 120
     run cache --peers $linear --seconds 60 ;;
  6) run batch ;;
  7) run decode --sizes d512 --peers engine tlinformer-pytorch transformer --seconds 120
     run prefill --sizes d512 --peers engine transformer --seconds 70 ;;
  8) run decode --sizes 1.3b --peers engine transformer --histories 1024 16384 131072 1048576 \
       --seconds 100
     run prefill --sizes 1.3b --peers engine transformer --histories 1024 16384 131072 1048576 \
       --calls 3 --seconds 90 ;;
  9) run decode --sizes 1.3b 7b --peers $linear --histories 16384 --seconds 200
     run batch --sizes d512 --peers engine transformer --seconds 60 ;;
  10) run decode --sizes 7b --peers engine transformer --histories 1024 16384 131072 1048576 \
        --seconds 100
      run prefill --sizes 7b --peers engine transformer --histories 1024 16384 131072 1048576 \
        --calls 3 --seconds 80 ;;
  all) export to_the_end=1
       for part in {1..10}; do bash benchmarks/parts.sh "$part"; done ;;
  *) echo "usage: benchmarks/parts.sh 1-10|all" >&2; exit 2 ;;
esac
