"""The settings of a training run; importing them loads neither torch nor the model."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .config import VARIANTS

ARCHITECTURES = (*VARIANTS, "transformer")


def setting(default: Any, help: str, *, free: bool = False) -> Any:
    """A field of TrainConfig; a resumed run may change it if ``free``."""
    return field(default=default, metadata={"help": help, "free": free})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run, checked where they enter; the defaults are the paper's recipe (§4).

    Raises:
        ValueError: naming the field, its value and the limit it breaks.
    """

    output: str = setting("run", "Directory of the run.", free=True)
    train_data: tuple[str, ...] = setting(
        (),
        "Text to train on: .txt, .txt.xz, .txt.gz files (repeat the option for each), or one "
        ".bin token file.",
        free=True,
    )
    valid_data: tuple[str, ...] = setting(
        (), "Held-out text, likewise; without it there is no early stopping.", free=True
    )
    dataset: str | None = setting(
        None,
        "Instead of train_data: a data set of the datasets library, by its name on the Hugging "
        "Face Hub or its directory; its split validation serves as valid_data.",
        free=True,
    )
    dataset_config: str | None = setting(
        None, "Configuration of the data set, such as wikitext-103-raw-v1.", free=True
    )
    dataset_column: str = setting("text", "Column of the data set that holds the text.", free=True)
    dataset_separator: str = setting(
        "<|endoftext|>",
        "What to put between two rows of the data set; nothing ('') where a row is only a line "
        "of a document, as in WikiText.",
        free=True,
    )
    tokenizer: str | None = setting(
        None,
        "tokenizer.json, or a directory with it or with GPT-2's vocab.json and merges.txt; "
        "without it a byte-level BPE of vocab_size entries is trained on train_data.",
        free=True,
    )
    architecture: str = setting("tlinformer", f"One of {', '.join(ARCHITECTURES)}.")
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of TLinFormerConfig.", "free": False}
    )
    sequence_length: int = setting(1024, "Tokens predicted in a sequence.")
    batch_size: int = setting(256, "Sequences in an optimizer step.")
    micro_batch_size: int | None = setting(
        None,
        "Sequences in a forward pass of one process; gradients accumulate up to batch_size "
        "(default: all).",
        free=True,
    )
    epochs: float = setting(10.0, "Passes over the training text, unless steps is given.")
    steps: int | None = setting(None, "Optimizer steps, instead of epochs.")
    learning_rate: float = setting(3e-4, "Peak of the schedule: linear warm-up, cosine to 0.")
    warmup_steps: int | None = setting(
        None, "Steps of warm-up (default: 2000, or a tenth of the run if that is less)."
    )
    weight_decay: float = setting(0.06, "AdamW weight decay, on matrices only.")
    grad_clip: float = setting(1.0, "Largest norm of the gradient.")
    eval_interval: int = setting(250, "Steps between two scorings of the held-out text.")
    eval_tokens: int | None = setting(
        None, "Score only so many tokens of the held-out text, from all over it (default: all)."
    )
    patience: int = setting(
        0, "Stop after so many scorings without improvement; 0 never does.", free=True
    )
    checkpoint_interval: int = setting(1000, "Steps between two checkpoints.", free=True)
    log_interval: int = setting(10, "Steps between two lines of metrics.jsonl.", free=True)
    seed: int = setting(0, "Seed of the weights, the order of the data and dropout.")
    device: str = setting("auto", "auto (CUDA when there is one), cpu, cuda or cuda:1.", free=True)
    dtype: str = setting("auto", "auto (bfloat16 on CUDA), bfloat16 (autocast) or float32.")
    compile: bool = setting(False, "Compile the model with torch.compile.", free=True)
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, more time.", free=True
    )
    strategy: str = setting(
        "ddp",
        "Under torchrun: ddp (every process holds the model) or fsdp (parameters, gradients and "
        "optimizer sharded, by FSDP2).",
        free=True,
    )
    tensorboard: bool = setting(
        False, "Write event files for TensorBoard to the run's directory.", free=True
    )
    peak_tflops: float | None = setting(
        None,
        "Peak of one device in TFLOP/s, for MFU (default: known for some GPUs in bfloat16).",
        free=True,
    )
    save_dtype: str = setting("float32", "Type of the weights in best/: float32 or bfloat16.")

    def __post_init__(self) -> None:
        sizes = ("sequence_length", "batch_size", "micro_batch_size", "epochs", "steps")
        intervals = ("eval_interval", "eval_tokens", "checkpoint_interval", "log_interval")
        for name in (*sizes, *intervals, "learning_rate", "grad_clip", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        for name in ("warmup_steps", "weight_decay", "patience", "seed"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        for name, allowed in {
            "architecture": ARCHITECTURES,
            "dtype": ("auto", "bfloat16", "float32"),
            "strategy": ("ddp", "fsdp"),
            "save_dtype": ("bfloat16", "float32"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        if self.dataset and self.train_data:
            raise ValueError(
                f"dataset is {self.dataset!r} and train_data {list(self.train_data)}; name only one"
            )
        if "variant" in self.model:
            raise ValueError("model has the field variant; set architecture instead")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The settings in ``values``. Raises ValueError naming unknown fields and wrong types."""
        known, clean = get_type_hints(cls), {}
        for name, value in values.items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; known are {sorted(known)}"
                raise ValueError(f"unknown setting {name!r}{hint}")
            clean[name] = _coerce(name, value, known[name])
        return cls(**clean)

    def to_dict(self) -> dict[str, Any]:
        """Every setting, in types that YAML knows; `from_dict` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def check_resumes(self, saved: Mapping[str, Any]) -> None:
        """Raises ValueError naming the settings that keep this run from continuing ``saved``."""
        mine = self.to_dict()
        changed = [
            f"{f.name} (saved {saved.get(f.name)!r}, now {mine[f.name]!r})"
            for f in fields(self)
            if not f.metadata["free"] and saved.get(f.name) != mine[f.name]
        ]
        if changed:
            what = ", ".join(changed)
            raise ValueError(f"cannot resume with a different {what}; begin another run (--output)")


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind``; YAML reads 1e-3 as text and 1 as an integer."""
    choices = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in choices:
        return None
    target = choices[0]
    plain = get_origin(target) or target
    if plain is tuple:
        items = [value] if isinstance(value, (str, Path)) else value
        if isinstance(items, (list, tuple)):
            return tuple(str(item) for item in items)
    elif plain is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif plain is str and isinstance(value, Path):
        return str(value)
    elif isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
        return dict(value) if plain is dict else value
    raise ValueError(f"{name} is {value!r}; it must be of type {getattr(plain, '__name__', plain)}")
