"""What the documents show works: their links, whole programs, and their generated tables."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from tlinformer.cli.info import find_cmake_package

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/paper/README.md",
    ROOT / "models/tlinformer-prose-8m/README.md",
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(document: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    found = set()
    for title in re.findall(r"^#+ +(.+)$", text, flags=re.M):
        letters = (c for c in title.lower() if c in " -_" or unicodedata.category(c)[0] in "LN")
        found.add("".join(letters).replace(" ", "-"))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    own = [link for link in links if not link.startswith("http")]
    for link in own:
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def blocks(name: str, language: str) -> list[str]:
    """Programs of a document, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S)


def test_the_readmes_python_runs() -> None:
    (program,) = blocks("README.md", "python")
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    text, counts = result.stdout.rstrip("\n").rsplit("\n", 1)
    hits, slides, cache_bytes = map(int, counts.split())
    assert text.strip() and hits + slides >= 99 and cache_bytes > 0


@pytest.mark.parametrize(
    ("document", "language"),
    [("README.md", "cpp"), ("docs/embedding.md", "cpp"), ("docs/embedding.md", "c")],
)
def test_programs_of_other_languages_run(document: str, language: str, tmp_path: Path) -> None:
    program = blocks(document, language)[0]
    (tmp_path / f"mine.{language}").write_text(program)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\n"
        f"project(mine LANGUAGES CXX {'C' if language == 'c' else ''})\n"
        "find_package(tlinformer 0.1 CONFIG REQUIRED)\n"
        f"add_executable(mine mine.{language})\n"
        "target_link_libraries(mine PRIVATE tlinformer::tlinformer)\n"
    )
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake
    build = tmp_path / "build"
    for command in (
        [cmake, "-S", tmp_path, "-B", build, f"-Dtlinformer_DIR={find_cmake_package()}"],
        [cmake, "--build", build],
        [build / "mine", ROOT / "models/tlinformer-prose-8m"],
    ):
        # Programs look for the shipped model beside them, and leave files where they run.
        folder = ROOT if document == "README.md" else tmp_path
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert result.returncode == 0, result.stdout + result.stderr
    tokens = result.stdout.split()
    assert len(tokens) >= 20 and all(token.isdigit() for token in tokens)


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure was edited by hand: making all tables again changes nothing."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = importlib.import_module("report")
    pictures = dict.fromkeys(report.figures.PICTURES, lambda *_: None)
    monkeypatch.setattr(report.figures, "PICTURES", pictures)
    for name in report.TABLES:
        assert report.filled(name) == (ROOT / name).read_text(), name
