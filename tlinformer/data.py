"""Text to training batches: byte-level BPE, token files on disk, packed sequences.

Text files are UTF-8, plain or compressed (``.xz``, ``.gz``); ``<|endoftext|>`` separates documents.
A token file is raw little-endian uint16 or uint32 (``name.bin``) beside a small ``name.json``.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
BLOCK = 1 << 18  # characters read at a time
# The pre-tokenizer never joins a visible character to the space after it, so cutting between
# the two changes no token.
SAFE_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def _open_bytes(path: Path) -> IO[bytes]:
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    return opener(path, "rb")


def read_text(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields the text of ``path`` in pieces of about 256 K characters that join to the whole.

    Raises FileNotFoundError, and ValueError when the bytes are not UTF-8 or not valid xz or gzip.
    """
    path, kept = Path(path), ""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such text file")
    try:
        with _open_bytes(path) as raw:
            # newline="" keeps \r\n as it is: tokenising must lose nothing.
            stream = io.TextIOWrapper(raw, encoding="utf-8", newline="")
            while block := stream.read(BLOCK):
                kept += block
                if cut := SAFE_CUT.match(kept):
                    yield cut.group()
                    kept = kept[cut.end() :]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); convert it first") from error
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged {path.suffix} file ({error})") from error
    if kept:
        yield kept


def train_tokenizer(files: Iterable[str | os.PathLike[str]], vocab_size: int) -> Tokenizer:
    """Learns a byte-level BPE of ``vocab_size`` entries, ``<|endoftext|>`` (id 0) among them.

    Any text survives encoding and decoding unchanged. Raises ValueError when ``vocab_size`` is
    below 257 (256 bytes and the separator).
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is below 257 (256 bytes and {END_OF_TEXT})")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (p for file in files for piece in read_text(file) for p in piece.split(END_OF_TEXT))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads ``tokenizer.json``, or a directory that holds it or GPT-2's vocab.json + merges.txt.

    Raises FileNotFoundError when neither is there, ValueError when the file cannot be read.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    pair = [path / "vocab.json", path / "merges.txt"]
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if all(part.is_file() for part in pair):
            return _byte_level(models.BPE.from_file(*map(str, pair)))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from error
    raise FileNotFoundError(f"{path}: neither tokenizer.json nor vocab.json with merges.txt there")


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) int64: bytes of text each token decodes to; special tokens count 0.

    Exact also where a character spans two tokens, since byte-level tokens spell one byte a symbol.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        lengths[index] = 0 if index in special else len(token)
    return lengths


def dataset_files(
    name: str, config: str | None, column: str, separator: str, folder: Path
) -> dict[str, tuple[str, ...]]:
    """Writes the splits "train" and "validation" of a data set to text files in ``folder``, once.

    Args:
        name, config: as `datasets.load_dataset` takes them.
        column: whose text is written, with ``separator`` between two rows.

    Returns:
        the files of each split; none for a validation split that is not there.

    Raises:
        ImportError: the package datasets is missing.
        ValueError: the data set, its split train or the column is not there.
    """
    key = f"{zlib.crc32(repr((name, config, column, separator)).encode()):08x}"
    paths = {split: folder / f"dataset-{key}-{split}.txt" for split in ("train", "validation")}
    if not paths["train"].is_file():  # written last
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"dataset is {name!r}, but the package that reads it is missing: pip install "
                "datasets, or name text files with --train-data"
            ) from error
        try:
            splits = datasets.load_dataset(name, config)
        except Exception as error:  # of many libraries: no network, no such name, no such file
            raise ValueError(f"dataset {name!r} cannot be loaded: {error}") from error
        if "train" not in splits:
            raise ValueError(f"dataset {name!r} has the splits {list(splits)}; it needs train")
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("validation", "train"):
            if split in splits:
                _write_rows(splits[split], column, separator, paths[split])
    return {split: (str(path),) if path.is_file() else () for split, path in paths.items()}


def _write_rows(rows: Any, column: str, separator: str, path: Path) -> None:
    if column not in rows.column_names:
        raise ValueError(f"dataset_column is {column!r}; the columns are {rows.column_names}")
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8", newline="") as file:
        for number, row in enumerate(rows.select_columns(column)):
            file.write(separator * bool(number) + row[column])
    os.replace(partial, path)


@dataclass(frozen=True)
class TokenFile:
    """Tokens on disk, memory-mapped: what ``name.json`` says about ``name.bin``."""

    path: str
    dtype: str
    tokens: int
    bytes: int  # UTF-8 bytes of the text, separators left out
    vocab_size: int
    fingerprint: str  # of the tokenizer and the source files

    def array(self) -> np.ndarray:
        """(tokens,) uint16 or uint32, read-only, backed by the file."""
        return np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenFile:
        """Opens ``name.bin``. Raises FileNotFoundError or ValueError (description and size)."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such token file")
        try:
            about = json.loads(path.with_suffix(".json").read_text())
            file = cls(**{**about, "path": str(path)})
            size = file.tokens * np.dtype(file.dtype).itemsize
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: its .json does not describe it ({error})") from error
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, its .json says {size}")
        if not size:
            raise ValueError(f"{path} is empty; name a file with tokens")
        return file


def tokenize_files(
    tokenizer: Tokenizer,
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    progress: Progress | None = None,
) -> TokenFile:
    """Writes the tokens of ``files`` to ``output`` (``.bin``), a separator between two files.

    Does nothing when ``output`` was made from the same files (path, size, time) with the same
    tokenizer. Files are written beside and moved in place, so an interrupted run leaves no half.
    """
    output, paths = Path(output).with_suffix(".bin"), [Path(file) for file in files]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"no such text file: {', '.join(missing) or '(none given)'}")
    about = [tokenizer.to_str()]
    about += [f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths]
    fingerprint = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    with contextlib.suppress(OSError, ValueError):
        if (cached := TokenFile.load(output)).fingerprint == fingerprint:
            return cached
    separator = tokenizer.token_to_id(END_OF_TEXT)
    if separator is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT}, which separates documents")
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    tokens = text_bytes = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(f".{os.getpid()}.tmp")
    try:
        with partial.open("wb") as sink:
            task = progress.add_task("tokenising", total=None) if progress else None
            for number, path in enumerate(paths):
                pieces: Iterator[str] = chain([END_OF_TEXT] if number else [], read_text(path))
                while batch := list(islice(pieces, 16)):  # encoded in parallel
                    encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
                    ids = np.array([i for e in encoded for i in e.ids], dtype)
                    sink.write(ids.tobytes())
                    tokens += len(ids)
                    text_bytes += sum(len(p.replace(END_OF_TEXT, "").encode()) for p in batch)
                    if progress and task is not None:
                        text = f"tokenising {path.name}: {tokens:,} tokens"
                        progress.update(task, description=text)
            if progress and task is not None:
                progress.update(task, total=1, completed=1)
        if not tokens:
            raise ValueError(f"{paths[0]} is empty; name a file with text")
        file = TokenFile(str(output), dtype.name, tokens, text_bytes, vocab_size, fingerprint)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    output.with_suffix(".json").write_text(json.dumps(asdict(file), indent=2) + "\n")
    return file


class PackedSequences:
    """Windows of ``length`` + 1 tokens cut from one long stream, shuffled anew each epoch.

    Neighbouring windows share one token, so that each token is a target once; documents are packed
    end to end and a window may span several. Where an epoch's windows start (a shift of up to two
    lengths) and their order depend on (seed, epoch) alone: the stream of all epochs is addressed
    by one counter, and a resumed run sees exactly what an uninterrupted one would.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int = 0):
        windows = (len(tokens) - 1) // length if length > 0 else 0
        if windows < 1:
            raise ValueError(
                f"the text has {len(tokens)} tokens, too few for one sequence of {length} + 1; "
                "give more text or a smaller sequence_length"
            )
        self.tokens, self.length, self.seed = tokens, length, seed
        # One window less than fits leaves room to shift all of them.
        self.windows = max(1, windows - 1)
        self._starts = lru_cache(maxsize=2)(self.starts)

    def __len__(self) -> int:
        """Sequences in an epoch."""
        return self.windows

    def starts(self, epoch: int) -> np.ndarray:
        """(sequences in an epoch,) int64: first token of each window, in the epoch's order."""
        random = np.random.default_rng([self.seed, epoch])
        shift = random.integers(len(self.tokens) - self.windows * self.length)
        return random.permutation(self.windows) * self.length + shift

    def batch(self, first: int, count: int) -> torch.Tensor:
        """(count, length + 1) int64: sequences number ``first`` … of the stream of all epochs."""
        rows = []
        for number in range(first, first + count):
            start = self._starts(number // self.windows)[number % self.windows]
            rows.append(self.tokens[start : start + self.length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))
