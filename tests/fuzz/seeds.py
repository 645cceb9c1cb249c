"""Writes valid inputs of fuzz_checkpoint.cpp into a folder: python tests/fuzz/seeds.py FOLDER."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from tlinformer import Engine, TLinFormerConfig, TLinFormerForCausalLM

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
sizes = {"vocab_size": 3, "hidden_size": 2, "num_attention_heads": 1, "intermediate_size": 2}
for mode, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)):
    config = TLinFormerConfig(**sizes, num_blocks=1, block_depth=2)
    tensors = TLinFormerForCausalLM(config).to(dtype).state_dict()
    index = {"weight_map": {name: "shard" for name in tensors}}
    sections = (json.dumps(config.to_dict()).encode(), json.dumps(index).encode())
    prefixed = b"".join(len(text).to_bytes(2, "little") + text for text in sections)
    (folder / f"seed{mode}").write_bytes(bytes([mode]) + prefixed + save(tensors))
engine = Engine(TLinFormerForCausalLM(config), max_context=9, batch_size=2, num_threads=1)
engine.prefill([torch.tensor([1, 2]), torch.tensor([0, 1, 2, 1, 0])])
engine.save_state(folder / "state")
(folder / "state").write_bytes(bytes(5) + (folder / "state").read_bytes())
