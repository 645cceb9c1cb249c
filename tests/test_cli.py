"""The commands generate, plan and info as a user calls them, and what they say to bad input."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Place, make_config, make_model
from safetensors.torch import load_file, save_file

import tlinformer
from tlinformer import Engine, TLinFormerForCausalLM, plan_cache
from tlinformer.checkpoint import save
from tlinformer.cli import generate as generating
from tlinformer.cli import main
from tlinformer.data import load_tokenizer, train_tokenizer
from tlinformer.terminal import format_rate

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "models" / "tlinformer-prose-8m"
PROMPT = "In the beginning"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of random weights and a byte-level tokenizer; it slides every 4 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    train_tokenizer([text], 270).save(str(folder / "tokenizer.json"))
    save(make_model(make_config(vocab_size=270), dtype=torch.float32), folder)
    return folder


@pytest.fixture
def generate(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """`generate(*arguments)` -> (standard output, standard error) of a run that succeeds."""

    def run(*arguments: object) -> tuple[str, str]:
        code = main(["generate", "--threads", "1", "--device", "cpu", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out, err

    return run


Generate = Callable[..., tuple[str, str]]


def test_streamed_text_equals_json_text(generate: Generate) -> None:
    options = ("--model", SHIPPED, "--max-new-tokens", 24, "--seed", 3)
    streamed, summary = generate(PROMPT, *options)
    result, errors = generate(PROMPT, *options, "--json")
    assert streamed == json.loads(result)["text"] + "\n"
    assert errors == ""
    assert "\x1b" not in streamed + summary
    assert all(len(line) <= 80 for line in summary.splitlines())
    assert "7.9M parameters, bfloat16, 1 threads" in summary
    assert generate(PROMPT, *options, "--seed", 4)[0] != streamed


def test_greedy_text_is_the_engines(generate: Generate, place: Place) -> None:
    options = ("--model", SHIPPED, "--device", place.device, "--temperature", 0, "--json")
    result = json.loads(generate(PROMPT, *options, "--max-new-tokens", 16)[0])
    tokenizer = load_tokenizer(SHIPPED)
    model = TLinFormerForCausalLM.from_pretrained(SHIPPED, device=place.device)
    engine = Engine(model, max_context=64, num_threads=1)
    ids = tokenizer.encode(PROMPT).ids
    engine.prefill(torch.tensor([ids]))
    assert result["text"] == tokenizer.decode(engine.generate(16)[0].tolist())
    assert (result["prompt_tokens"], result["new_tokens"]) == (len(ids), 16)
    assert (result["hits"], result["slides"], result["slide_seconds"]) == (16, 0, 0)


def test_prompts_from_files_and_standard_input(
    generate: Generate, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model", tiny, "--max-new-tokens", 30)
    text = "the lazy fox — ü"
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    from_file, summary = generate("--prompt-file", tmp_path / "p.txt", *options)
    assert from_file == generate(text, *options)[0] == generate("--prompt-file", "-", *options)[0]
    assert re.search(r"slides, \d+\.\d\d s in all", summary)


def test_a_terminal_sees_the_prompts_end_and_the_slides(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def run(file: io.StringIO) -> str:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(f"sys.{name}", file)
        arguments = ["the lazy dog" * 50, "--model", str(tiny), "--max-new-tokens", "9"]
        assert main(["generate", *arguments]) == 0
        return re.sub(r"in \d.*|took .*", "", file.getvalue())  # no times

    monkeypatch.setattr(generating, "LONG", 60)  # no slide takes so long
    quiet = run(Terminal())
    monkeypatch.setattr(generating, "LONG", 0)
    shown = run(Terminal())
    assert "\x1b[2m..." + ("the lazy dog" * 50)[-300:] + "\x1b[0m" in shown
    note = r"\x1bD\x1b\[A\x1b7\r\n\x1b\[2K\x1b\[2m(|\[sliding: \d+% [a-z ]+\])\x1b\[0m\x1b8"
    notes = re.findall(note, shown)
    assert (
        len(notes) >= 4 and notes[-1] == "" and "[sliding: 100% of the context read again]" in notes
    )
    assert "sliding:" not in quiet and "sliding:" not in run(io.StringIO())
    assert re.sub(note, "", shown).split("\x1b[2m...")[1] == quiet.split("\x1b[2m...")[1]


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_interrupted_generation_keeps_its_text(
    json_option: list[str],
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt_at_5(
        self: Any, n: int, sampling: Any = None, *, on_token: Any = None, progress: Any = None
    ) -> Any:
        def count(sequence: int, token: int) -> None:
            on_token(sequence, token)
            drawn.append(token)
            if len(drawn) == 5:
                signal.raise_signal(signal.SIGINT)

        drawn: list[int] = []
        return original(self, n, sampling, on_token=count if on_token else None, progress=progress)

    original = Engine.generate
    monkeypatch.setattr(Engine, "generate", interrupt_at_5)
    arguments = ["generate", "the fox", "--model", str(tiny), "--max-new-tokens", "40"]
    assert main(arguments + json_option) == 130
    out, err = capsys.readouterr()
    assert "interrupted after 5 tokens" in err
    if json_option:
        assert json.loads(out)["new_tokens"] == 5
    else:
        assert len(out) > 1 and "generated  5 tokens" in err


def test_ctrl_c_while_reading_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("the quick brown fox " * 15000)
    command = [sys.executable, "-m", "tlinformer", "generate", "--model", str(SHIPPED)]
    process = subprocess.Popen(
        [*command, "--prompt-file", str(tmp_path / "long.txt"), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr is not None
    first = process.stderr.readline()  # reading starts after this line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert first.startswith("tlinformer-prose-8m: 7.9M parameters")
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_plan_shows_the_planned_bytes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TLinFormerForCausalLM.from_pretrained(tiny)
    arguments = [
        "--context",
        "2K",
        "--batch-size",
        "3",
        "--dtype",
        "float32",
        "--no-measure",
        "--json",
    ]
    for path in (tiny, tiny / "config.json"):
        assert main(["plan", str(path), *arguments]) == 0
        result = json.loads(capsys.readouterr().out)
        plan = plan_cache(model.config, max_context=2048, batch_size=3, dtype="float32")
        assert result["bytes"] == plan.bytes_by_region
        assert result["total_bytes"] == plan.total_bytes >= sum(result["bytes"].values())
        assert result["cache_bytes"] == plan.cache_bytes
        assert result["weights_bytes"] == 4 * sum(p.numel() for p in model.parameters())
        assert (result["context"], result["fits"]) == (2048, True)
        layers, width = model.config.num_layers, model.config.hidden_size
        assert result["standard_transformer_cache_bytes"] == 3 * 2048 * 2 * 4 * layers * width


def test_plan_says_what_does_not_fit(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny), "--context", "100G"]) == 1
    out = capsys.readouterr().out
    assert "TiB" in out
    assert "The longest context that fits: " in out
    assert "It does not fit: max_context = 107374182400" in out
    assert main(["plan", str(tiny), "--context", "100G", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_slow_rates_are_not_rounded_to_nothing() -> None:
    assert [format_rate(rate) for rate in (1234.5, 9.96, 0.432)] == ["1,234", "10", "0.43"]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    expected = "tlinformer python torch numpy engine threads cpus gpus advice"
    assert set(expected.split()) <= info.keys()
    assert info["engine"].startswith("CPU, ")
    assert main(["info"]) == 0
    assert info["torch"] in capsys.readouterr().out


def python(code: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a Python program."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_help_and_version_load_nothing_heavy() -> None:
    code = """if True:
        import sys
        from tlinformer.cli import main
        for arguments in (["--version"], ["--help"], ["train", "--help"], ["generate", "--help"]):
            assert main(arguments) == 0
        print([name for name in ("torch", "tokenizers", "yaml", "numpy") if name in sys.modules])
    """
    code, out, err = python(code)
    assert (code, err) == (0, "")
    assert out.startswith(f"tlinformer {tlinformer.__version__}\n") and out.endswith("\n[]\n")


@pytest.mark.parametrize("package", ["torch", "tokenizers", "typer"])
def test_a_missing_package_is_one_line_of_advice(package: str) -> None:
    hide = f"import sys; sys.modules[{package!r}] = None\nfrom tlinformer.cli import main\n"
    result = python(f"{hide}sys.exit(main(['generate', 'x', '--model', {str(SHIPPED)!r}]))")
    assert result == (1, "", f"error: the package {package} is missing: pip install {package}\n")


@pytest.mark.parametrize("package", ["torch", "tokenizers"])
def test_info_advises_on_a_missing_package(package: str) -> None:
    code, out, _ = python(
        f"""if True:
        import importlib.metadata as metadata, sys
        sys.modules[{package!r}], version = None, metadata.version
        def missing(name):
            if name == {package!r}:
                raise metadata.PackageNotFoundError(name)
            return version(name)
        metadata.version = missing
        from tlinformer.cli import main
        sys.exit(main(["info"]))
        """
    )
    assert code == 0 and f"- {package} is missing: pip install {package}\n" in out


@pytest.mark.parametrize("module", ["typer", "torch"])
def test_ctrl_c_at_start_up(module: str) -> None:
    result = python(
        f"""if True:
        import signal, sys
        class Finder:
            def find_spec(name, path, target=None):
                if name == {module!r}:
                    signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Finder)
        from tlinformer.cli import main
        sys.exit(main(["info"]))
        """
    )
    assert result == (130, "", "interrupted\n")


# What is wrong with the options: the arguments, parts of the message, the exit code.
BAD_OPTIONS: list[tuple[str, str, int]] = [
    ("generate", "no prompt; --prompt-file", 2),
    ("generate x --prompt-file y", "both a prompt and --prompt-file", 2),
    ("generate --prompt-file nowhere.txt", "nowhere.txt: no such text file", 2),
    ("generate --prompt-file {tmp}", "no such text file", 2),
    ("generate --prompt-file {tmp}/empty.txt", "empty.txt is empty; at least one character", 2),
    ("generate --prompt-file {tmp}/binary.txt", "binary.txt: not UTF-8; convert it", 2),
    ("generate --prompt-file {tmp}/damaged.xz", "damaged.xz: damaged .xz file", 2),
    ("generate x\udcff", "the prompt: not UTF-8", 2),
    ("generate x --max-new-tokens 0", "--max-new-tokens is 0; at least 1", 2),
    ("generate x --max-new-tokens -7", "--max-new-tokens is -7; at least 1", 2),
    ("generate x --max-new-tokens many", "--max-new-tokens; 'many'", 2),
    (
        "generate x --max-new-tokens 1000000000000",
        "error: max_context = 10000; needs; available",
        1,
    ),
    ("generate x --temperature -1", "temperature = -1; at least 0", 2),
    ("generate x --temperature nan", "temperature = nan; at least 0", 2),
    ("generate x --top-p 2", "top_p = 2; (0, 1]", 2),
    ("generate x --top-k -3", "top_k = -3; at least 0", 2),
    ("generate x --min-p 1.5", "min_p = 1.5; [0, 1]", 2),
    ("generate x --repetition-penalty 0", "repetition_penalty = 0; positive", 2),
    ("generate x --dtype int8", "dtype is int8; float32, bfloat16", 2),
    ("generate x --threads -1", "--threads is -1; takes 1 to; one a CPU", 2),
    ("generate x --device tpu", "device is 'tpu'; name auto, cpu, cuda", 2),
    ("generate x --device cuda:99", "device is 'cuda:99'; no such GPU", 2),
    (
        "generate x --model {tmp}/nowhere",
        "nowhere is not here; name a model directory with --model",
        2,
    ),
    ("generate {model}", "is a model; name it with --model", 2),
    ("bench decod", "decod is neither a model directory nor a suite: decode", 2),
    ("generate x --model {model}/config.json", "config.json is a file; name the directory", 2),
    ("bench {model} --threads 100000", "--threads is 100000; takes 1 to; one a CPU", 2),
    ("generate x --nonsense", "No such option: --nonsense", 2),
    ("generat x", "No such command 'generat'", 2),
    ("eval {model} {tmp}/empty.txt", "empty.txt is empty; name a file with text", 2),
    ("eval {model}", "is no file; name text files", 2),
    ("eval {tmp}/nowhere x.txt", "nowhere is no file; a model before them or with --model", 2),
    ("train --output {tmp}/empty.txt", "--output is; empty.txt'; Not a directory; name a", 2),
    ("train --output {tmp}/empty.txt/x", "empty.txt/x'; Not a directory; name a", 2),
    ("train --output /proc/x/run", "--output is '/proc/x/run'; in /proc: No such; name a", 2),
    ("plan {tmp}/nowhere", "nowhere: no such file; model directory", 2),
    ("plan {model}/model.safetensors", "model.safetensors is no usable config.json", 2),
    ("plan {model} --context 1.5M", "--context is '1.5M'; 4096 or 1M", 2),
    ("plan {model} --context 0", "max_context is 0; 1 to", 2),
    ("plan {model} --batch-size -2", "batch_size is -2; 1 to", 2),
    ("plan {model} --dtype int4", "dtype is int4; float32, bfloat16", 2),
    ("plan {model} --device tpu", "device is tpu; cpu and cuda", 2),
]


def check_error(arguments: list[str], message: str, code: int, capfd: Any) -> None:
    assert main(arguments) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    for part in message.split("; "):
        assert part in err


@pytest.mark.parametrize(("line", "message", "code"), BAD_OPTIONS, ids=lambda v: str(v)[:50])
def test_bad_options(
    line: str, message: str, code: int, tiny: Path, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "damaged.xz").write_bytes(b"no xz at all")
    arguments = [part.format(tmp=tmp_path, model=tiny) for part in line.split()]
    if arguments[0] == "generate" and "--model" not in arguments:
        arguments += ["--model", str(tiny)]
    check_error(arguments, message, code, capfd)


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _edit_header(folder: Path, **changes: object) -> None:
    """Replaces fields of norm.bias in the safetensors header."""
    raw = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header["norm.bias"].update(changes)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + raw[8 + size :]
    )


def _edit_weights(folder: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | changes, folder / "model.safetensors")


def _patch(folder: Path, at: int, data: bytes) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:at] + data + raw[at + len(data) :])


Spoil = Callable[[Path], Any]
BAD_MODELS: dict[str, tuple[Spoil, str, int]] = {
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08" + bytes(9)),
        "model.safetensors is no readable safetensors",
        2,
    ),
    "huge header": (
        lambda f: _patch(f, 0, struct.pack("<Q", 2**63)),
        "no readable safetensors; header too large",
        2,
    ),
    "offsets out of range": (
        lambda f: _edit_header(f, data_offsets=[2**40, 2**40 + 96]),
        "no readable safetensors; invalid offset",
        2,
    ),
    "overlap": (
        lambda f: _edit_header(f, data_offsets=[0, 96]),
        "no readable safetensors; invalid offset",
        2,
    ),
    "shape overflow": (lambda f: _edit_header(f, shape=[2**40, 2**40]), "overflow", 2),
    "integers": (lambda f: _edit_header(f, dtype="I32"), "norm.bias; int32; floating point", 2),
    "float8": (
        lambda f: _edit_weights(f, **{"norm.bias": torch.zeros(24).to(torch.float8_e4m3fn)}),
        "norm.bias is torch.float8_e4m3fn; torch.float64, torch.float32, torch.float16, torch.bfl",
        2,
    ),
    "wrong shape": (
        lambda f: _edit_weights(f, **{"norm.bias": torch.zeros(7)}),
        "norm.bias has shape (7,); (24,)",
        2,
    ),
    "unknown tensor": (
        lambda f: _edit_weights(f, extra=torch.zeros(7)),
        "1 unknown tensors: extra",
        2,
    ),
    "NaN": (
        lambda f: _edit_weights(f, **{"norm.bias": torch.full((24,), float("nan"))}),
        "contain NaN; position 1",
        1,
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{nope"), "config.json; line 1", 2),
    "unknown field": (lambda f: _edit_config(f, flash=1), "unknown config fields ['flash']", 2),
    "contradiction": (lambda f: _edit_config(f, num_attention_heads=5), "24; must divide it", 2),
    "other sizes": (lambda f: _edit_config(f, hidden_size=48), "has shape; config.json asks", 2),
    "billion layers": (lambda f: _edit_config(f, num_blocks=10**9), "too few for the 3000000", 2),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "neither tokenizer.json", 2),
    "spoilt tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "readable token", 2),
    "other tokenizer": (
        lambda f: shutil.copy(SHIPPED / "tokenizer.json", f),
        "tokenizer.json has 4,096 tokens, the model 270",
        2,
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(name: str, tiny: Path, tmp_path: Path, capfd: Any) -> None:
    spoil, message, code = BAD_MODELS[name]
    folder = shutil.copytree(tiny, tmp_path / "model")
    spoil(folder)
    check_error(["generate", "x", "--model", str(folder)], message, code, capfd)


def test_the_edits_alone_spoil_nothing(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    _edit_config(folder)
    _edit_weights(folder)
    _edit_header(folder)
    _patch(folder, 0, b"")
    before, after = (TLinFormerForCausalLM.from_pretrained(f) for f in (tiny, folder))
    assert after.config == before.config
    assert all(torch.equal(t, after.state_dict()[k]) for k, t in before.state_dict().items())


def test_a_saved_state_answers_other_prompts(
    generate: Generate, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state, options = tmp_path / "book.state", ("--model", tiny, "--seed", 5)
    book = "the lazy dog and the quick fox"
    text, _ = generate(book, *options, "--max-new-tokens", 20, "--save-state", state)
    assert generate(*options, "--max-new-tokens", 20, "--load-state", state)[0] == text
    again = tmp_path / "again.state"
    silent = ("--max-new-tokens", 0, "--load-state", state, "--save-state", again)
    written, summary = generate(*options, *silent)
    assert written == "" and f"saved {again}" in summary and "generated" not in summary
    assert again.read_bytes() == state.read_bytes()

    question = " jumps over"
    greedy = ("--temperature", 0, "--max-new-tokens", 9, "--json")
    got = json.loads(generate(question, *options, *greedy, "--load-state", state)[0])
    tokenizer = load_tokenizer(tiny)
    engine = Engine(TLinFormerForCausalLM.from_pretrained(tiny), max_context=200, num_threads=1)
    read, asked = (tokenizer.encode(t).ids for t in (book, question))
    engine.prefill(torch.tensor([read]))
    for token in asked:
        engine.step([token])
    assert got["text"] == tokenizer.decode(engine.generate(9)[0].tolist(), False)
    assert (got["loaded_tokens"], got["prompt_tokens"]) == (len(read), len(asked))
    _, summary = generate(question, *options, "--max-new-tokens", 9, "--load-state", state)
    assert f"{len(read)} saved and {len(asked)} tokens in " in summary
    _, summary = generate(*options, "--max-new-tokens", 1, "--load-state", state)
    assert re.search(rf"prompt +{len(read)} saved tokens in \d+\.\d\d s\n", summary)

    state.write_bytes(state.read_bytes()[:-1])
    missing = tmp_path / "missing"
    for arguments, code, words in (
        (("--load-state", state), 2, "cut off"),
        (("--load-state", missing), 1, f"error: {missing}: No such file"),
        (("--load-state", again, "--model", SHIPPED), 2, "saved by a model with"),
        ((PROMPT, "--save-state", missing / "x"), 1, "cannot be written"),
        ((PROMPT, "--max-new-tokens", 0), 2, "must be at least 1"),
    ):
        given = ("--model", tiny, "--device", "cpu", "--max-new-tokens", 2, *arguments)
        assert main(["generate", *map(str, given)]) == code
        assert words in capfd.readouterr().err


@pytest.mark.parametrize("chosen", [None, "7"])
def test_waiting_threads_spin_briefly(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", chosen or "")
    if chosen is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    assert main(["--version"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == (chosen or "1000")
