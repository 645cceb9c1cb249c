"""Two processes train what one process trains.

Each process takes half of a batch, so one process with micro-batches of that half adds up the same
two gradients, and a + b is b + a: DDP agrees to the last bit, with dropout and clipping. FSDP2
agrees likewise while the gradient's norm is below the limit; above it the norm scales the
gradient, and its squares are added up in another order (1e-6 is about ten roundings of these
weights). So are the gradients of more than two micro-batches.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import MODEL, assert_same_run, checkpoint, small_run

from tlinformer import distributed
from tlinformer.train import train

# A log line a step, because a mean over steps and processes is no sum of two.
FEW = {"steps": 4, "eval_interval": 2, "eval_tokens": 50, "checkpoint_interval": 2}
FEW["log_interval"] = 1
WORKER = Path(__file__).with_name("torchrun_worker.py")
# name: settings of the run in two processes, micro-batch of one process, absolute tolerance
RUNS = {
    "ddp": ({"strategy": "ddp", "grad_clip": 0.5}, 2, 0.0),
    "fsdp": ({"strategy": "fsdp", "grad_clip": 100.0}, 2, 0.0),
    "fsdp-clipped": ({"strategy": "fsdp", "grad_clip": 0.5}, 2, 1e-6),
    "fsdp-recomputed": (
        {"strategy": "fsdp", "grad_clip": 100.0, "gradient_checkpointing": True},
        2,
        0.0,
    ),
    "fsdp-transformer": (
        {"strategy": "fsdp", "grad_clip": 100.0, "architecture": "transformer"},
        2,
        0.0,
    ),
    "fsdp-accumulated": ({"strategy": "fsdp", "micro_batch_size": 1}, 1, 1e-6),
}


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """The folder with all runs in two processes: one start of torchrun costs seconds."""
    folder = tmp_path_factory.mktemp("two")

    def job(name, resume=False, stop=None, **changes):
        changes = {"micro_batch_size": None} | FEW | changes
        config = small_run(text, folder / name, **changes)
        return {"config": config.to_dict(), "resume": resume, "stop": stop}

    jobs = [job(name, **changes) for name, (changes, _, _) in RUNS.items()]
    fsdp = {"strategy": "fsdp", "grad_clip": 100.0}
    jobs.append(job("stopped", stop=3, **fsdp))
    jobs.append(job("moved", stop=3, **fsdp))
    jobs.append(job("moved", resume=True, strategy="ddp", grad_clip=100.0))
    jobs.append(job("untokenised", tokenizer=None))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    root = str(Path(distributed.__file__).parent.parent)
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(WORKER), str(folder / "jobs.json")],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def seen(folder, name):
    """What either process noted."""
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(runs, text, tmp_path, name):
    changes, micro_batch_size, tolerance = RUNS[name]
    changes = FEW | changes | {"micro_batch_size": micro_batch_size}
    one = small_run(text, tmp_path / "one", **changes)
    train(one)
    two = replace(one, output=str(runs / name))
    # Of FSDP's gradient the norm, which is logged, is added up in another order.
    assert_same_run(two, one, tolerance=tolerance, log_tolerance=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_processes_stop_together_and_another_number_of_them_goes_on(runs, text, tmp_path):
    """One process got the signal, both stop; one process goes on, or two with DDP."""
    for note in seen(runs, "stopped"):
        assert "stopped at step 3 of 4" in note["stopped"]
        assert "torchrun --nproc-per-node 2 -m tlinformer train" in note["stopped"]
    whole = small_run(text, tmp_path / "whole", **FEW, micro_batch_size=2, grad_clip=100.0)
    train(whole)
    moved, stopped = (replace(whole, output=str(runs / name)) for name in ("moved", "stopped"))
    assert_same_run(moved, whole, log_tolerance=1e-6)
    assert checkpoint(stopped)["step"] == 3
    train(stopped, resume=True)
    assert_same_run(stopped, whole, log_tolerance=1e-6)


def test_fsdp_shards_and_ddp_does_not(runs):
    assert [note["optimizer"] for note in seen(runs, "ddp")] == [1.0, 1.0]
    shares = [note["optimizer"] for note in seen(runs, "fsdp")]
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) < 0.6


def test_the_second_process_finds_the_tokenizer_that_the_first_one_trained(runs):
    summaries = [note["summary"] for note in seen(runs, "untokenised")]
    assert summaries[0] == summaries[1]
    assert (runs / "untokenised" / "best" / "tokenizer.json").is_file()


def test_a_batch_that_processes_cannot_share_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch_size is 4; it must be a multiple of the 3"):
        train(small_run(text, tmp_path / "run", model=MODEL))
