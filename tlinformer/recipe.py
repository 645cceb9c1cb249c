"""What a training run is made of: its device, its text and its model."""

from __future__ import annotations

import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import safe_open
from tokenizers import Tokenizer

from .baseline import TransformerForCausalLM
from .checkpoint import WEIGHTS, load_config
from .config import VARIANTS, TLinFormerConfig
from .data import TokenFile, dataset_files, load_tokenizer, tokenize_files, train_tokenizer
from .distributed import rank
from .model import CausalLM, TLinFormerForCausalLM
from .settings import TrainConfig


def autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: bfloat16 where ``name`` says so, or is "auto" on a GPU; else None."""
    wants = name == "bfloat16" or (name == "auto" and device.type == "cuda")
    return torch.bfloat16 if wants else None


@dataclass(frozen=True)
class Corpus:
    """Tokenizer, token files, and the model's sizes with the vocabulary filled in."""

    tokenizer: Tokenizer
    train: TokenFile
    valid: TokenFile | None
    model_config: TLinFormerConfig

    def fingerprint(self) -> dict[str, Any]:
        """Tells one corpus from another, wherever its files lie."""
        return {
            "tokenizer": zlib.crc32(self.tokenizer.to_str().encode()),
            "train_data": zlib.crc32(self.train.array().data),
            "valid_data": zlib.crc32(self.valid.array().data) if self.valid else None,
        }


def _check_writable(output: Path) -> None:
    """Refuses, before anything is computed or created, an output that could not be written."""
    place = output
    try:
        place = next(p for p in (output, *output.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"--output is {str(output)!r}, but no file can be made in {place}: {error.strerror}; "
            "name a directory that can be written"
        ) from error


def prepare_corpus(config: TrainConfig, progress: Progress | None = None) -> Corpus:
    """Loads or trains the tokenizer and tokenises what is not token files yet.

    Token files of text go to ``output``/tokens and are reused by the next run there.

    Raises:
        ValueError, FileNotFoundError: no text, unreadable text, a vocabulary that is too small,
            or an output that cannot be written.
    """
    run = Path(config.output)
    _check_writable(run)
    train_data, valid_data = config.train_data, config.valid_data
    if config.dataset:
        files = dataset_files(
            config.dataset,
            config.dataset_config,
            config.dataset_column,
            config.dataset_separator,
            run / "tokens",
        )
        train_data, valid_data = files["train"], valid_data or files["validation"]
    if not train_data:
        raise ValueError(
            "train_data is empty; name a text file (--train-data) or a dataset (--dataset)"
        )
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    elif rank() > 0 or (run / "checkpoint.pt").is_file():  # trained by the first process, or before
        tokenizer = load_tokenizer(run / "tokenizer.json")
    elif any(path.endswith(".bin") for path in train_data):
        raise ValueError("train_data is a token file; name the tokenizer that made it")
    elif "vocab_size" not in config.model:
        raise ValueError(
            "neither tokenizer nor model.vocab_size is given; name one with --tokenizer, or a size "
            "with --vocab-size"
        )
    else:
        task = progress.add_task("training the tokenizer", total=None) if progress else None
        tokenizer = train_tokenizer(train_data, config.model["vocab_size"])
        if progress and task is not None:
            progress.remove_task(task)
        run.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(run / "tokenizer.json"))

    def tokens(name: str, files: tuple[str, ...]) -> TokenFile:
        if len(files) == 1 and files[0].endswith(".bin"):
            return TokenFile.load(files[0])
        return tokenize_files(tokenizer, files, run / "tokens" / f"{name}.bin", progress)

    train = tokens("train", train_data)
    valid = tokens("valid", valid_data) if valid_data else None
    needed = tokenizer.get_vocab_size(with_added_tokens=True)
    for file in (train, valid):
        if file is not None and file.vocab_size != needed:
            raise ValueError(
                f"{file.path} was made with a vocabulary of {file.vocab_size}, the tokenizer "
                f"has {needed}; tokenise the text again"
            )
    variant = config.architecture if config.architecture in VARIANTS else VARIANTS[0]
    model = TLinFormerConfig.from_dict({"vocab_size": needed, **config.model, "variant": variant})
    if model.vocab_size < needed:
        raise ValueError(f"model.vocab_size is {model.vocab_size}; the tokenizer has {needed}")
    return Corpus(tokenizer, train, valid, model)


def build_model(architecture: str, config: TLinFormerConfig) -> CausalLM:
    """A new model; ``architecture`` is one of ARCHITECTURES."""
    if architecture == "transformer":
        return TransformerForCausalLM(config)
    return TLinFormerForCausalLM(replace(config, variant=architecture))


def load_model(
    directory: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> CausalLM:
    """The saved model of whichever architecture. Errors as `CausalLM.from_pretrained`."""
    load_config(directory)  # says in words when this is no model directory
    kind: type[CausalLM] = TLinFormerForCausalLM
    path = Path(directory) / WEIGHTS
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("architecture") == "TransformerForCausalLM":
                    kind = TransformerForCausalLM
        except Exception:  # from_pretrained words it
            pass
    return kind.from_pretrained(directory, dtype=dtype, device=device)
