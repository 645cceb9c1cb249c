"""What test_distributed.py runs in each of two processes: `torchrun torchrun_worker.py JOBS.json`.

A job is {"config": settings, "resume": bool, "stop": step at which process 1 gets SIGTERM or null};
what each process saw is written beside the run.
"""

import json
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from tlinformer import distributed
from tlinformer.settings import TrainConfig
from tlinformer.train import Interrupted, _Run, train

torch.set_num_threads(1)
seen = {}
whole_step = _Run.train_step


def train_step(self):
    result = whole_step(self)
    if self.step + 1 == seen["stop"] and distributed.rank() == 1:
        signal.raise_signal(signal.SIGTERM)
    moments = [s["exp_avg"] for s in self.optimizer.state.values()]
    local = [m.to_local() if isinstance(m, DTensor) else m for m in moments]
    seen["optimizer"] = sum(m.numel() for m in local) / sum(m.numel() for m in moments)
    return result


_Run.train_step = train_step
with distributed.process_group(torch.device("cpu")):
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config, seen = TrainConfig.from_dict(job["config"]), {"stop": job["stop"]}
        try:
            summary = train(config, resume=job["resume"])
            seen["summary"] = {k: summary[k] for k in ("steps", "best_step", "valid_loss")}
        except Interrupted as error:
            seen["stopped"] = str(error)
        Path(f"{config.output}.{distributed.rank()}.json").write_text(json.dumps(seen))
