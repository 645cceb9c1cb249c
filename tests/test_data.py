"""Tokenizer, token files and packed sequences."""

import gzip
import json
import lzma
import sys
from dataclasses import asdict

import numpy as np
import pytest

from tlinformer import data
from tlinformer.data import END_OF_TEXT, PackedSequences, TokenFile

TEXT = (
    "The whale, the white whale!\r\nIt's 1851 — naïve café, 東京 🐋 \x00\x1f tab\t  \n\n  Next\n"
    + "Call me Ishmael. Some years ago, never mind how long precisely. " * 40
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(f"{TEXT}{END_OF_TEXT}{TEXT}".encode())
    return data.train_tokenizer([path], 300)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A data set in a directory: two rows to train on, one held out."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two\\n"}\n')
    (folder / "validation.jsonl").write_text('{"text": "three"}\n')
    return str(folder)


def test_a_data_set_becomes_text_files(rows, tmp_path):
    pytest.importorskip("datasets")
    files = data.dataset_files(rows, None, "text", END_OF_TEXT, tmp_path / "tokens")
    (train,), (valid,) = files["train"], files["validation"]
    assert "".join(data.read_text(train)) == f"one{END_OF_TEXT}two\n"
    assert "".join(data.read_text(valid)) == "three"
    lines = data.dataset_files(rows, None, "text", "", tmp_path / "tokens")
    assert "".join(data.read_text(lines["train"][0])) == "onetwo\n"
    with pytest.raises(ValueError, match=r"dataset_column is 'body'; the columns are \['text'\]"):
        data.dataset_files(rows, None, "body", "", tmp_path / "tokens")
    with pytest.raises(ValueError, match="dataset '/nowhere' cannot be loaded"):
        data.dataset_files("/nowhere", None, "text", "", tmp_path / "tokens")


def test_a_data_set_without_its_package_names_the_way_out(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets, or name text files"):
        data.dataset_files(rows, None, "text", "", tmp_path / "tokens")


@pytest.mark.parametrize("text", [TEXT, "", " ", "\n", "Ω\u2028\ud7ff\U0010ffff", "a" * 5000])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_vocabulary_has_the_size_asked_for(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.encode(f"a{END_OF_TEXT}b").ids.count(0) == 1


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size 256 is below 257"):
        data.train_tokenizer([], 256)


def test_byte_lengths_add_up_to_the_text(tokenizer):
    lengths = data.token_byte_lengths(tokenizer)
    ids = tokenizer.encode(TEXT + END_OF_TEXT).ids
    assert lengths[ids].sum() == len(TEXT.encode())
    assert lengths[0] == 0
    for token in ids:  # also where one character spans several tokens
        assert tokenizer.decode([token], skip_special_tokens=True).count("\ufffd") or (
            lengths[token] == len(tokenizer.decode([token]).encode())
        )


def test_gpt2_files_load_as_the_same_vocabulary(tokenizer, tmp_path):
    tokenizer.model.save(str(tmp_path))
    loaded = data.load_tokenizer(tmp_path)
    text = TEXT + END_OF_TEXT + "x"
    assert loaded.encode(text).ids == tokenizer.encode(text).ids
    assert loaded.decode(loaded.encode(text).ids, skip_special_tokens=False) == text


def test_a_saved_tokenizer_loads_from_file_or_directory(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert data.load_tokenizer(path).to_str() == tokenizer.to_str()


def test_unusable_tokenizers_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("suffix", ["txt", "txt.xz", "txt.gz"])
def test_compressed_and_plain_text_give_the_same_tokens(tokenizer, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(data, "BLOCK", 50)  # many pieces: cutting them must change no token
    path = tmp_path / f"a.{suffix}"
    pack = {"xz": lzma.compress, "gz": gzip.compress}.get(suffix.split(".")[-1], bytes)
    path.write_bytes(pack(TEXT.encode()))
    assert len(list(data.read_text(path))) > 10
    file = data.tokenize_files(tokenizer, [path, path], tmp_path / "out.bin")
    ids = tokenizer.encode(TEXT).ids
    assert file.array().tolist() == [*ids, 0, *ids]  # a separator between files
    assert (file.dtype, file.tokens, file.bytes) == (
        "uint16",
        2 * len(ids) + 1,
        2 * len(TEXT.encode()),
    )
    assert TokenFile.load(tmp_path / "out.bin") == file


def test_token_files_are_made_again_only_when_the_text_changes(tokenizer, tmp_path):
    source, output = tmp_path / "a.txt", tmp_path / "a.bin"
    source.write_text("one two three")
    first = data.tokenize_files(tokenizer, [source], output)
    stamp = output.stat().st_mtime_ns
    assert data.tokenize_files(tokenizer, [source], output) == first
    assert output.stat().st_mtime_ns == stamp
    source.write_text("one two three four")
    assert data.tokenize_files(tokenizer, [source], output).tokens > first.tokens


def test_damaged_input_is_named(tokenizer, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc \xff\xfe")
    with pytest.raises(ValueError, match=r"bad\.txt: not UTF-8"):
        list(data.read_text(tmp_path / "bad.txt"))
    for name, packed in {
        "bad.xz": lzma.compress(b"x" * 999),
        "bad.gz": gzip.compress(b"x" * 999),
    }.items():
        (tmp_path / name).write_bytes(packed[:-9])
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            list(data.read_text(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        data.tokenize_files(tokenizer, [tmp_path / "gone.txt"], tmp_path / "x.bin")


def test_empty_input_is_named(tokenizer, tmp_path):
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match=r"empty\.gz is empty; name a file with text"):
        data.tokenize_files(tokenizer, [tmp_path / "empty.gz"], tmp_path / "x.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["empty.gz"]
    (tmp_path / "a.txt").write_text(TEXT)
    file = data.tokenize_files(tokenizer, [tmp_path / "a.txt"], tmp_path / "a.bin")
    (tmp_path / "a.json").write_text(json.dumps(asdict(file) | {"tokens": 0}))
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.bin is empty; name a file with tokens"):
        TokenFile.load(tmp_path / "a.bin")


def test_a_truncated_token_file_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    file = data.tokenize_files(tokenizer, [tmp_path / "a.txt"], tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(file.array().tobytes()[:-2])
    with pytest.raises(ValueError, match=r"a\.bin has \d+ bytes, its \.json says"):
        TokenFile.load(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("count", "length"), [(101, 10), (110, 10), (11, 10), (19, 10), (25, 10), (2, 1)]
)
def test_each_epoch_covers_one_shifted_stretch_exactly_once(count, length):
    packed = PackedSequences(np.arange(count, dtype=np.uint16), length, seed=3)
    for epoch in range(4):
        rows = packed.batch(epoch * len(packed), len(packed)).numpy()
        assert rows.shape == (len(packed), length + 1)
        assert (np.diff(rows, axis=1) == 1).all()
        targets = np.sort(rows[:, 1:].ravel())
        assert (np.diff(targets) == 1).all()  # no target twice, none left out in between
        assert targets[-1] < count
        assert len(targets) > count - 2 * length - 1


def test_order_depends_on_seed_and_epoch_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    whole = PackedSequences(tokens, 10, seed=1).batch(0, 250)
    parts = PackedSequences(tokens, 10, seed=1)
    assert [*parts.batch(200, 50).tolist(), *parts.batch(0, 200).tolist()] == (
        whole[200:].tolist() + whole[:200].tolist()
    )
    assert not (whole[:98] == PackedSequences(tokens, 10, seed=2).batch(0, 98)).all()
    assert not (whole[:98] == whole[98:196]).all()


def test_too_little_text_says_what_to_do():
    with pytest.raises(
        ValueError, match=r"10 tokens.*sequence of 10 \+ 1.*smaller sequence_length"
    ):
        PackedSequences(np.arange(10), 10)
