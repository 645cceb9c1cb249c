"""Builds tlinformer._C, the one compiled module, from the globs of csrc/sources.txt.

TLINFORMER_CUDA=auto|0|1 (default auto) chooses the CUDA backend: where it can be built, never, or
else fail. Everything else about the package stands in pyproject.toml.
"""

import os
import shlex
import shutil
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


def cuda_obstacles(cuda_sources: list[str], torch_cuda: str | None, toolkit: str | None) -> str:
    """What stands in the way of a CUDA build, in words; empty when nothing does."""
    checks = {
        "this version has no CUDA sources (csrc/cuda)": cuda_sources,
        "the installed torch is a CPU build": torch_cuda,
        "there is no CUDA toolkit (nvcc on PATH, or CUDA_HOME)": toolkit,
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
    """Keeps its object files, so that an editable install too compiles only what has changed."""

    def finalize_options(self) -> None:
        self.build_temp = str(ROOT / "build/extension")
        super().finalize_options()


def extension() -> setuptools.Extension:
    obstacles = cuda_obstacles(sources("cuda"), torch.version.cuda, cpp_extension.CUDA_HOME)
    cuda = use_cuda(os.environ.get("TLINFORMER_CUDA", "auto"), obstacles)
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    flags = ["-std=c++17", "-O3", "-g0"]
    module = make(
        "tlinformer._C",
        sources("runtime", "cpu", "python", *(["cuda"] if cuda else [])),
        include_dirs=[str(ROOT / "csrc/include"), str(ROOT / "csrc")],
        library_dirs=[openblas.get_lib_dir()],
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # the stable ABI of torch 2.10
            ("TLINFORMER_CBLAS_PREFIX", "scipy_"),
            ("TLINFORMER_OPENBLAS", "1"),
        ],
        extra_compile_args={
            "cxx": [*flags, "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"],
            "nvcc": [*flags[:2], "-Xcompiler=-fvisibility=hidden"],
        },
        extra_link_args=["-fopenmp"],
    )
    # The stable ABI lives in torch_cpu and torch_cuda; the other libraries of torch would tie the
    # module to one version of it.
    stable = [x for x in module.libraries if x in ("torch_cpu", "torch_cuda", "cudart")]
    module.libraries = [openblas.get_library(), *stable]
    return module


if __name__ == "__main__":
    require_compiler(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    # pip of an environment that is not activated finds that environment's ninja this way.
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    setuptools.setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
