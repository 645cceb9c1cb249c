"""Builds tlinformer._C, the one compiled module, from the globs of csrc/sources.txt.

TLINFORMER_CUDA=auto|0|1 (default auto) chooses the CUDA backend: where it can be built, never, or
else fail. TLINFORMER_CUDA_ARCHS="80;90a" (the default) names the GPU architectures to compile for;
TLINFORMER_CUDA_LIBRARY=<file.a> links csrc/cuda from a static library compiled elsewhere (CMake's
libtlinformer.a) instead. Everything else about the package stands in pyproject.toml.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent

try:
    import scipy_openblas32 as openblas
    import torch
    from torch.utils import cpp_extension

    if int(setuptools.__version__.split(".")[0]) < 77:
        raise ImportError(f"setuptools is {setuptools.__version__}, must be at least 77")
except ImportError as error:
    raise SystemExit(
        f"tlinformer: cannot build: {error}. pip's --no-build-isolation leaves the build "
        "requirements to you: pip install -U torch setuptools ninja scipy-openblas32"
    ) from None


def sources(*folders: str) -> list[str]:
    """Files of csrc/sources.txt below these folders of csrc/, relative to the repository."""
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    globs = [line for line in lines if line.split("/")[0] in folders]
    return sorted(str(p.relative_to(ROOT)) for glob in globs for p in (ROOT / "csrc").glob(glob))


def version() -> str:
    found = re.search(r'__version__ = "(.*)"', (ROOT / "tlinformer/__init__.py").read_text())
    assert found
    return found[1]


def find_toolkit() -> str | None:
    """The CUDA toolkit's folder; an nvcc on PATH may be a link or a script far away from it."""
    for folder in (cpp_extension.CUDA_HOME, "/usr/local/cuda"):
        if folder and Path(folder, "include/cuda_runtime.h").exists():
            return folder
    return None


def find_cublas(toolkit: str | None) -> tuple[str, str] | None:
    """Folder and file name of cuBLASLt: the toolkit's, or that of the wheel that torch brings.

    The name needs no search path at run time: torch has loaded a library of that name by then.
    """
    wheels = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (wheels and wheels.submodule_search_locations) or []]
    folders = [root / name / "lib" for root in roots for name in ("cu13", "cublas")]
    if toolkit:
        folders.insert(0, Path(toolkit) / "lib64")
    found = [file for folder in folders for file in sorted(folder.glob("libcublasLt.so*"))]
    return (str(found[0].parent), found[0].name) if found else None


def cuda_obstacles(
    cuda_sources: list[str],
    torch_cuda: str | None,
    toolkit: str | None,
    cublas: tuple[str, str] | None,
) -> str:
    """What stands in the way of a CUDA build, in words; empty when nothing does."""
    checks = {
        "this version has no CUDA sources (csrc/cuda)": cuda_sources,
        "the installed torch is a CPU build": torch_cuda,
        "there is no CUDA toolkit (nvcc on PATH, or CUDA_HOME)": toolkit,
        "there is no cuBLASLt (in the toolkit, or from pip install nvidia-cublas)": cublas,
    }
    return "; ".join(words for words, found in checks.items() if not found)


def use_cuda(setting: str, obstacles: str) -> bool:
    """Whether to build the CUDA backend; exits where `setting` is unknown or cannot be had."""
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"tlinformer: TLINFORMER_CUDA={setting!r} is not one of auto, 0, 1")
    if setting == "1" and obstacles:
        raise SystemExit(
            f"tlinformer: TLINFORMER_CUDA=1 asks for the CUDA backend, but {obstacles}. "
            "Mend that, or leave TLINFORMER_CUDA unset to build the CPU backend."
        )
    if setting == "auto" and obstacles:
        print(f"tlinformer: building the CPU backend only: {obstacles}")
    return setting != "0" and not obstacles


def require_compiler(command: str) -> None:
    if shutil.which(shlex.split(command)[0]) is None:
        raise SystemExit(
            f"tlinformer: no C++ compiler: {command!r} is not on PATH. Install g++ (9 or newer), "
            "or name another compiler in CXX."
        )


class BuildExtension(cpp_extension.BuildExtension):
    """Builds the module and, from the same objects, the C++ library in tlinformer/cpp.

    Keeps the object files, so that an editable install too compiles only what has changed.
    """

    def finalize_options(self) -> None:
        self.build_temp = str(ROOT / "build/extension")
        super().finalize_options()

    def run(self) -> None:
        super().run()
        package = Path("tlinformer" if self.inplace else f"{self.build_lib}/tlinformer")
        folders = (
            "runtime",
            "cpu",
            "c_api",
            *(["cuda"] if ("TLINFORMER_CUDA", "1") in self.macros else []),
        )
        objects = [f"{self.build_temp}/{Path(s).with_suffix('.o')}" for s in sources(*folders)]
        install_library(ROOT / package / "cpp", objects, cuda="cuda" in folders)

    @property
    def macros(self) -> list[tuple[str, str | None]]:
        return [macro for module in self.extensions for macro in module.define_macros]


def install_library(prefix: Path, objects: list[str], cuda: bool) -> None:
    """Fills `prefix` as CMake's install does: headers, static library, tlinformerConfig.cmake."""
    shutil.rmtree(prefix, ignore_errors=True)
    shutil.copytree(ROOT / "csrc/include", prefix / "include")
    package = prefix / "lib/cmake/tlinformer"
    package.mkdir(parents=True)
    library = prefix / "lib/libtlinformer.a"
    if cuda and (compiled := os.environ.get("TLINFORMER_CUDA_LIBRARY")):
        shutil.copyfile(compiled, library)  # CMake's, which holds the CPU's objects too
    else:
        subprocess.run(["ar", "rcs", str(library), *objects], check=True)
    cublas = find_cublas(find_toolkit()) if cuda else None
    values = {
        "version": version(),
        "cuda": "ON" if cuda else "OFF",
        "cublas_dir": cublas[0] if cublas else "",
        "blas": f"{openblas.get_lib_dir()}/lib{openblas.get_library()}.so",
        "blas_prefix": "scipy_",
        "openmp": "-fopenmp",
        "libdir": "lib",
        "includedir": "include",
        "to_prefix": "../../..",
    }
    for name in ("tlinformerConfig.cmake", "tlinformerConfigVersion.cmake"):
        text = (ROOT / f"cmake/{name}.in").read_text()
        (package / name).write_text(re.sub(r"@(\w+)@", lambda m: values[m[1]], text))


def gencode(architectures: str) -> list[str]:
    """nvcc's options for "80;90a"; exits on anything else than such numbers.

    Of plain numbers PTX goes in, too, which drivers compile for newer GPUs.
    """
    names = [name for name in re.split("[;, ]+", architectures) if name]
    if not names or not all(re.fullmatch(r"\d+[af]?", name) for name in names):
        raise SystemExit(
            f"tlinformer: TLINFORMER_CUDA_ARCHS={architectures!r} is not a list such as '80;90a'"
        )
    return [
        f"-gencode=arch=compute_{name},code={code}_{name}"
        for name in names
        for code in (("sm", "compute") if name.isdigit() else ("sm",))
    ]


def extension() -> setuptools.Extension:
    toolkit = find_toolkit()
    cublas = find_cublas(toolkit)
    obstacles = cuda_obstacles(sources("cuda"), torch.version.cuda, toolkit, cublas)
    cuda = use_cuda(os.environ.get("TLINFORMER_CUDA", "auto"), obstacles)
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    cpp_extension.CUDA_HOME = toolkit
    nvtx = Path(toolkit, "include") if toolkit else None  # for profilers' ranges
    compiled = os.environ.get("TLINFORMER_CUDA_LIBRARY")
    flags = ["-std=c++17", "-O3", "-g0"]
    module = make(
        "tlinformer._C",
        sources("runtime", "cpu", "c_api", "python", *(["cuda"] if cuda and not compiled else [])),
        include_dirs=[
            str(ROOT / "csrc/include"),
            str(ROOT / "csrc"),
            *([str(nvtx)] if nvtx and (nvtx / "nvtx3").is_dir() else []),
        ],
        library_dirs=[openblas.get_lib_dir()],
        define_macros=[
            ("TLINFORMER_VERSION", f'"{version()}"'),
            ("TLINFORMER_CBLAS_PREFIX", "scipy_"),
            ("TLINFORMER_OPENBLAS", "1"),
            *([("TLINFORMER_CUDA", "1")] if cuda else []),
        ],
        extra_compile_args={
            "cxx": [*flags, "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"],
            "nvcc": [
                *flags[:2],
                "-Xcompiler=-fvisibility=hidden",
                "-Werror=all-warnings",
                # torch switches the operators of both types off for its own sources.
                "-U__CUDA_NO_HALF_OPERATORS__",
                "-U__CUDA_NO_HALF2_OPERATORS__",
                "-U__CUDA_NO_HALF_CONVERSIONS__",
                "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
                *gencode(os.environ.get("TLINFORMER_CUDA_ARCHS", "80;90a")),
            ],
        },
        extra_objects=[compiled] if cuda and compiled else [],
        extra_link_args=["-fopenmp"],
    )
    # The stable ABI lives in torch_cpu and torch_cuda; the other libraries of torch would tie the
    # module to one version of it.
    stable = [x for x in module.libraries if x in ("torch_cpu", "torch_cuda", "cudart")]
    module.libraries = [openblas.get_library(), *stable]
    if cuda and cublas:
        folder, name = cublas
        module.library_dirs.append(folder)
        module.libraries.append(f":{name}")
        wheel = Path(folder).parent / "include"  # the headers, where the toolkit has none
        module.include_dirs.append(str(wheel))
    return module


if __name__ == "__main__":
    require_compiler(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    # pip of an environment that is not activated finds that environment's ninja this way.
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    setuptools.setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
