#!/usr/bin/env bash
# Nsight Compute over the kernels of one token, one slide or one prefill of the engine:
#   benchmarks/ncu.sh token [HISTORY=16384] [SIZE=41m]    # SIZE is a name in benchmarks/sizes.py
#   benchmarks/ncu.sh slide 131072 d512
# Writes ncu-WHAT.ncu-rep, for ncu-ui, and prints it. Sources are shown in a build that keeps line
# numbers (docs/profiling.md). PYTHON names the interpreter with the CUDA build of tlinformer.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-token} history=${2:-16384} model=${3:-41m}

# A token is a chain of short kernels: where do warps wait? A slide is wide ones: which unit is full?
kernels=regex:.
case $what in
  token) kernels=regex:tlin_ sections="SpeedOfLight LaunchStats Occupancy SchedulerStats WarpStateStats SourceCounters MemoryWorkloadAnalysis" ;;
  slide | prefill) sections="SpeedOfLight SpeedOfLight_RooflineChart ComputeWorkloadAnalysis MemoryWorkloadAnalysis MemoryWorkloadAnalysis_Tables LaunchStats Occupancy WarpStateStats" ;;
  *) echo "usage: benchmarks/ncu.sh token|slide|prefill [HISTORY] [SIZE]" >&2; exit 2 ;;
esac
command -v ncu > /dev/null || { echo "ncu is missing: it comes with the CUDA toolkit or with Nsight Compute" >&2; exit 1; }

program='
import sys
sys.path.insert(0, "benchmarks")
import torch
from peers import EnginePeer
from sizes import config_of, random_ids
from tlinformer import Engine
what, history, config = sys.argv[1], int(sys.argv[2]), config_of(sys.argv[3])
model = EnginePeer.make(config, torch.device("cuda"), torch.bfloat16)
history = history // config.generation_window * config.generation_window
ids = random_ids(config, 1, history)
engine = Engine(model, max_context=history + 16)
for once_more in (False, True):  # the second time nothing happens that happens only once
    if what == "prefill" and once_more:
        torch.cuda.profiler.start()
    engine.prefill(ids)
    torch.cuda.profiler.stop()
    if what == "slide" and once_more:
        torch.cuda.profiler.start()
    engine.step(ids[:, 0])  # the first token of a window slides
    torch.cuda.profiler.stop()
    engine.generate(4)
if what == "token":
    torch.cuda.profiler.start()
    engine.generate(1)
    torch.cuda.profiler.stop()
'
# Real clocks; a token finds little of what it reads in L2, so ncu may flush it before each kernel.
# 200 kernels tell a slide: it repeats the same ones for every piece of the history.
exec ncu --profile-from-start off --kernel-name "$kernels" --launch-count 200 \
  $(printf -- '--section %s ' $sections) --clock-control none --import-source yes \
  --force-overwrite --export "ncu-$what" --print-details all \
  "${PYTHON:-python}" -c "$program" "$what" "$history" "$model"
