"""What setup.py decides and says before it compiles anything."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("tlinformer_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, cwd=ROOT, **environment):
    """Runs Python in `cwd`; returns its exit status and all it printed."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout


def test_every_source_file_is_listed_once(build):
    folders = ("runtime", "cpu", "c_api", "python", "cuda")
    found = sorted(
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / "csrc" / folder).rglob("*")
        if path.suffix in (".cpp", ".cu")
    )
    assert sorted(build.sources(*folders)) == found
    assert "csrc/python/ops.cpp" in build.sources("python")


def test_cuda_obstacles_are_named(build):
    cublas = ("/opt/cuda/lib64", "libcublasLt.so")
    assert build.cuda_obstacles(["csrc/cuda/backend.cpp"], "13.0", "/opt/cuda", cublas) == ""
    words = build.cuda_obstacles([], None, None, None)
    for part in ("no CUDA sources", "torch is a CPU build", "no CUDA toolkit", "no cuBLASLt"):
        assert part in words
    assert build.cuda_obstacles(["a.cu"], "13.0", None, cublas).startswith("there is no CUDA tool")


def test_cublas_is_found_in_the_toolkit(build, tmp_path):
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libcublasLt.so.13").touch()
    assert build.find_cublas(str(tmp_path)) == (str(tmp_path / "lib64"), "libcublasLt.so.13")


def test_architectures_become_options_of_nvcc(build):
    assert build.gencode("80;90a") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    for wrong in ("", "hopper", "9.0"):
        with pytest.raises(SystemExit, match=f"TLINFORMER_CUDA_ARCHS='{wrong}' is not a list"):
            build.gencode(wrong)


@pytest.mark.parametrize(("setting", "cuda"), [("auto", True), ("0", False), ("1", True)])
def test_cuda_setting_where_cuda_can_be_built(build, setting, cuda, capsys):
    assert build.use_cuda(setting, "") is cuda
    assert capsys.readouterr().out == ""


def test_auto_falls_back_to_the_cpu_and_says_so_in_a_line(build, capsys):
    assert not build.use_cuda("auto", "there is no CUDA toolkit")
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert "CPU backend only: there is no CUDA toolkit" in output
    assert not build.use_cuda("0", "there is no CUDA toolkit")
    assert capsys.readouterr().out == ""


def test_required_cuda_that_cannot_be_built_is_an_error(build):
    with pytest.raises(SystemExit, match=r"TLINFORMER_CUDA=1 .* there is no CUDA toolkit"):
        build.use_cuda("1", "there is no CUDA toolkit")


@pytest.mark.parametrize("setting", ["", "yes", "2", "AUTO"])
def test_unknown_cuda_setting_is_an_error(build, setting):
    with pytest.raises(SystemExit, match=f"TLINFORMER_CUDA='{setting}' is not one of auto, 0, 1"):
        build.use_cuda(setting, "")


def test_setup_reads_the_setting_from_the_environment():
    status, output = run("setup.py", "--version", TLINFORMER_CUDA="maybe")
    assert status != 0
    assert output.splitlines()[-1].endswith("'maybe' is not one of auto, 0, 1")


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3one9tlin_stepEv' for 'sm_90a'
ptxas info    : Function properties for _ZN3one9tlin_stepEv
    0 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 376 bytes cmem[0]
"""


def test_unexplained_spills_fail(tmp_path):
    log = tmp_path / "log"
    check = ("tests/check_spills.py", str(log))
    log.write_text(PTXAS.format(stores=4, loads=8))
    status, output = run(*check)
    assert status == 1 and "tlin_stepEv (sm_90a): 12 bytes: NOT EXPLAINED" in output
    log.write_text(PTXAS.format(stores=4, loads=8) + PTXAS.format(stores=0, loads=0))
    assert run(*check) == (0, "1 kernels, at most 168 registers; 0 spill without explanation\n")
    log.write_text("ninja: no work to do.\n")
    assert run(*check)[0] == 1


def test_missing_compiler_is_named():
    status, output = run("setup.py", "--version", CXX="no-such-compiler -O1")
    assert status != 0
    assert "no C++ compiler: 'no-such-compiler -O1' is not on PATH" in output


@pytest.mark.parametrize("package", ["torch", "scipy_openblas32"])
def test_missing_build_requirement_is_named(package):
    hide = f"import sys, runpy; sys.modules[{package!r}] = None; runpy.run_path('setup.py')"
    status, output = run("-c", hide)
    assert status != 0
    assert "Traceback" not in output
    assert f"cannot build: import of {package}" in output
    assert "pip install -U torch setuptools ninja scipy-openblas32" in output


def test_import_without_the_compiled_module_says_how_to_build_it(tmp_path):
    (tmp_path / "tlinformer").mkdir()
    source = (ROOT / "tlinformer/__init__.py").read_text()
    (tmp_path / "tlinformer/__init__.py").write_text(source)
    # -S: without site-packages, where an installed tlinformer would be found.
    status, output = run("-S", "-c", "from tlinformer import _C", cwd=tmp_path)
    assert status != 0
    assert "ImportError: tlinformer's compiled module is not in" in output.splitlines()[-1]
    assert "pip install ." in output.splitlines()[-1]


def test_import_alone_loads_neither_torch_nor_the_compiled_module():
    code = "import sys, tlinformer; print([m in sys.modules for m in ('torch', 'tlinformer._C')])"
    assert run("-c", code) == (0, "[False, False]\n")


def test_unknown_names_are_attribute_errors():
    import tlinformer

    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        _ = tlinformer.Motor
    assert set(tlinformer.__all__) <= set(dir(tlinformer))


def test_the_module_links_the_stable_part_of_torch_only():
    from tlinformer import _C

    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True)
    needed = [
        line.split("[")[1].rstrip("]") for line in dynamic.stdout.splitlines() if "NEEDED" in line
    ]
    assert "libtorch_cpu.so" in needed
    assert not {"libtorch_python.so", "libtorch.so", "libc10.so"} & set(needed)
    symbols = subprocess.run(["nm", "-DuC", _C.__file__], capture_output=True, text=True).stdout
    assert "aoti_torch_" in symbols
    assert not [line for line in symbols.splitlines() if "c10::" in line or "at::" in line]


def test_a_cpp_project_finds_the_library_of_the_package(tmp_path):
    status, folder = run("-m", "tlinformer", "info", "--cmake-dir")
    assert status == 0, folder
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    source = ROOT / "tests/consumer"
    configure = [cmake, "-S", source, "-B", tmp_path, f"-Dtlinformer_DIR={folder.strip()}"]
    for command in (
        [*configure, "-DKIND=static"],
        [cmake, "--build", tmp_path],
        [tmp_path / "consumer", ROOT / "models/tlinformer-prose-8m"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.split()) == 8
