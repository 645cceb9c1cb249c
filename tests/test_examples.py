"""The C++ examples: the tokenizer's ids and the generated text are those of Python."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tlinformer.cli import main
from tlinformer.cli.info import find_cmake_package
from tlinformer.data import load_tokenizer, read_text

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "models/tlinformer-prose-8m"
BOOK = ROOT / "examples/new-testament.txt.xz"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the examples, built with the library that the package brings."""
    folder = tmp_path_factory.mktemp("examples")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake
    found = f"-Dtlinformer_DIR={find_cmake_package()}"
    for command in (
        [cmake, "-S", ROOT / "examples/cpp", "-B", folder, found],
        [cmake, "--build", folder, "-j2"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def random_texts() -> list[str]:
    """Texts of every plane of Unicode, with much white space, controls and apostrophes."""
    draw = random.Random(5)
    special = [
        *" \t\n\r'\u2019\u00a0\u3000\u2028\u200b\ufeff\u0000\u0007\u001f\u007f\u0085",
        "'ll",
        "'RE",
    ]
    texts = []
    for _ in range(3000):
        parts = []
        for _ in range(draw.randint(1, 30)):
            top = draw.choice((0x80, 0x800, 0x3000, 0x10000, 0x110000))
            code = draw.randrange(top)
            parts.append(chr(code) if not 0xD800 <= code < 0xE000 else "e\u0301")
            parts.append(draw.choice(special) * draw.choice((0, 0, 1, 1, 2, 5)))
        texts.append("".join(parts))
    return texts


def test_token_ids_are_those_of_the_tokenizers_library(programs: Path) -> None:
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    joined = ["".join(every[at : at + 50]) for at in range(0, len(every), 50)]
    pairs = ["a " + " ".join(every[at : at + 50]) for at in range(0, 0x3000, 50)]
    plain = [
        "",
        " ",
        "   two  spaces\n\n\nthree lines \n",
        "it's we'll I'D they've''s '' 's",
        "<|endoftext|>a<|endoftext|><|endoftext|> b <|endoftex|>",
        "naïve Ünïcödé ½ ٣ Ⅷ 漢字かな 👩‍👩‍👧 e\u0301",
        "".join(list(read_text(BOOK))[:1]),
    ]
    texts = [*plain, *joined, *pairs, *random_texts()]
    result = subprocess.run(
        [programs / "tlin-tokenize", SHIPPED / "tokenizer.json"],
        input=b"\xff".join(text.encode() for text in texts),
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.decode().split("\n")[:-1]
    assert len(lines) == len(texts)
    for text, line, want in zip(
        texts, lines, load_tokenizer(SHIPPED).encode_batch(texts), strict=True
    ):
        assert [int(token) for token in line.split()] == want.ids, repr(text[:200])


@pytest.mark.parametrize("sampling", [("--temperature", "0"), ("--seed", "3")], ids=str)
def test_text_is_that_of_the_python_command_line(
    programs: Path,
    sampling: tuple[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(next(read_text(BOOK))[:20000], encoding="utf-8")
    options = ["--model", SHIPPED, "--prompt-file", prompt, "--max-new-tokens", "300"]
    options += ["--threads", "1", *sampling]
    result = subprocess.run(
        [programs / "tlin-generate", *options], capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    assert main(["generate", "--device", "cpu", *map(str, options)]) == 0
    text, summary = capfd.readouterr()
    assert result.stdout == text

    def shape(lines: str) -> list[str]:  # without what a clock says
        return re.sub(r"[\d.,]+", "#", lines).split()

    assert shape(result.stderr) == shape(summary)
    assert "300 tokens in" in result.stderr and "299 hits, 1 slide, " in result.stderr


def test_the_static_program_is_small(programs: Path) -> None:
    assert (programs / "tlin-generate").stat().st_size < 10 * 2**20


def test_a_wrong_tokenizer_is_refused(programs: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    good = json.loads((SHIPPED / "tokenizer.json").read_text())
    for change, words in (
        ({"normalizer": {"type": "NFC"}}, b"normalizer"),
        ({"model": {"type": "Unigram"}}, b"only BPE"),
        ({"pre_tokenizer": None}, b"only ByteLevel"),
    ):
        file.write_text(json.dumps(good | change))
        result = subprocess.run(
            [programs / "tlin-tokenize", file], input=b"text", capture_output=True
        )
        assert result.returncode == 1 and words in result.stderr
