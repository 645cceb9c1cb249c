"""Speed and memory of the engine and of its peers, in one run with what the machine can do.

    python benchmarks decode                        # a token between two slides
    python benchmarks prefill                       # a prompt, and the token that slides
    python benchmarks batch                         # tokens a second of many sequences
    python benchmarks cache                         # bytes of state, the longest context
    python benchmarks memory                        # the most memory taken, and its growth
    python benchmarks trace                         # what happens between two slides on a GPU
    python benchmarks state                         # a text's state as a file
    python benchmarks train-step --device cuda      # training beside a Transformer's
    python benchmarks decode --smoke                # the same in tiny, in seconds
    tlinformer bench decode                         # the same as python benchmarks decode
    python benchmarks/report.py                     # tables and pictures of all results

Rows go to benchmarks/results/SUITE-DEVICE.json as they are measured. The same command again
goes on where --seconds ended it; settings that do not fit are rows that say why.
docs/benchmarks.md says how peers are tuned and what is counted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# As the command line does: threads that wait sleep soon. GNU OpenMP reads it when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from measure import RESULTS
from sizes import SIZES

LENGTHS = {
    "cuda": [0, 2**10, 2**12, 2**14, 2**17, 2**19, 2**20],
    "cpu": [0, 2**10, 2**12, 2**14],
}
PROMPTS = {"cuda": [2**10, 2**14, 2**17, 2**19, 2**20], "cpu": [2**10, 2**12, 2**14]}
BATCHES = {"cuda": ([1, 4, 16, 64], [2**10, 2**15]), "cpu": ([1, 4], [2**10])}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Default values where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def options(suite: str, peers: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"tlinformer bench {suite}", formatter_class=Help)
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=["41m"], help="models")
    add("--peers", nargs="+", choices=peers, help="what is measured (default: all)")
    add("--histories", nargs="+", type=int, help="tokens before the window, whole windows")
    add("--batch-sizes", nargs="+", type=int, help="sequences")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and state; cuda: bfloat16")
    add("--calls", type=int, default=6, help="timed calls of each row")
    add("--seconds", type=float, default=220, help="after these no other row is begun")
    add(
        "--point-seconds",
        type=float,
        default=8,
        help="a row's timed calls take about this, at most",
    )
    add("--again", action="store_true", help="measure what the file has already, too")
    add("--json", type=Path, help="another file of results; with --smoke there is none else")
    add("--smoke", action="store_true", help="a tiny model on short histories")
    return parser


def resolve(args: argparse.Namespace, suite: str) -> None:
    args.suite, args.device = suite, torch.device(args.device)
    kind = args.device.type
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if kind == "cuda" else "float32"))
    lengths = (PROMPTS if suite == "prefill" else LENGTHS)[kind]
    batches, lengths = BATCHES[kind] if suite == "batch" else ([1], lengths)
    if args.smoke:
        args.sizes, lengths, args.calls, args.point_seconds = ["tiny"], [0, 64, 160], 2, 5
    else:
        args.json = args.json or RESULTS / f"{suite}-{kind}.json"
    args.histories = args.histories or lengths
    args.batch_sizes = args.batch_sizes or batches


def main(arguments: list[str]) -> int:
    suite, rest = (arguments or ["--help"])[0], arguments[1:]
    if suite == "train-step":
        import train

        train.main(rest)
        return 0
    if suite in ("memory", "trace", "state"):
        import engine_only

        engine_only.main(suite, rest)
        return 0
    from points import PEERS
    from suites import MEASURES, run

    if suite not in MEASURES:
        print(__doc__, file=sys.stdout if suite in ("-h", "--help") else sys.stderr)
        return 0 if suite in ("-h", "--help") else 2
    args = options(suite, list(PEERS)).parse_args(rest)
    # A token of the naive peers says it all.
    usual = [name for name in PEERS if suite == "decode" or not name.startswith("naive")]
    args.peers = args.peers or usual
    resolve(args, suite)
    if left := run(args):
        print(f"{left} rows are left: run the same command again")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
