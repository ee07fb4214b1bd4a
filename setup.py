"""The parts of the build that pyproject.toml cannot express: the folder of savl.kernels, and two optional libraries.

savl._C is the C++ extension. It compiles against the stable ABI of libtorch and links nothing else of torch, so one
build works with every torch from STABLE_ABI on. Where it cannot be built, the installation prints a warning and
installs the pure Python package.

savl/_cuda.so holds the CUDA kernels. It is a separate library because a torch without CUDA could not load it. It is
built where nvcc is found, whether or not torch has CUDA. Without it, everything else of savl works.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from setuptools import Extension, find_packages, setup

STABLE_ABI = (2, 10)
# -ffp-contract=fast: a * b + c is one instruction where the processor has it.
COMPILE_ARGUMENTS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast"]
ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "savl/_cuda.so"
nvcc = SimpleNamespace(**runpy.run_path(str(ROOT / "csrc/cuda/nvcc.py"), run_name="nvcc"))


def warn(reason: str, without: str = "C++ extension") -> None:
    """Print which library is missing from this build, and why. pip shows the output only with ``-v``."""
    consequence, needed = {
        "C++ extension": (
            "Everything works, with PyTorch's own operations in place of the fused CPU kernels.",
            "GCC or\n  Clang with C++20, torch >= 2.10 and pybind11",
        ),
        "CUDA kernels": (
            "Everything works; on a GPU, gaussian_posterior and channel_modulation use PyTorch's own operations.",
            "a CUDA\n  toolkit of version 12.0 or newer, with nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda",
        ),
    }[without]
    rule = "*" * 100
    print(
        f"\n{rule}\n"
        f"WARNING: savl is built WITHOUT its {without}: {reason}\n"
        f"  {consequence}\n"
        f"  The messages of the compiler, if it ran, are above. To build the {without}, install {needed},\n"
        "  then install savl again.\n"
        f"{rule}\n",
        file=sys.stderr,
        flush=True,
    )


def is_set(variable: str | None) -> bool:
    """Return whether an environment variable is set to something other than 0."""
    return (variable or "") not in ("", "0")


def packages() -> dict[str, Any]:
    """Return the packages. The folder kernels/ is installed as ``savl.kernels``, never as ``kernels``."""
    return {
        "packages": [
            *find_packages(include=["savl", "savl.*"]),
            "savl.kernels",
            *(f"savl.kernels.{name}" for name in find_packages("kernels")),
        ],
        "package_dir": {"savl.kernels": "kernels"},
    }


def files(*patterns: str) -> list[str]:
    """Return the files below the root of the project that match a pattern, as sorted relative paths."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def without_folders(*roots: str | Path) -> list[str]:
    """Return compiler flags that remove the folders from file names in error messages."""
    # Where two flags match, the later one applies: torch may be in a virtual environment below the project.
    return [f"-ffile-prefix-map={root}/=" for root in (ROOT, *roots)]


def build_cuda_library(
    toolkit: Any, architectures: Any, version: str, torch_root: Path, folder: Path, target: Path
) -> None:
    """Compile and link savl/_cuda.so.

    Args:
        toolkit: The `nvcc.Toolkit` to compile with.
        architectures: The architectures to compile for.
        version: The version of savl.
        torch_root: The folder of the package torch, which need not have CUDA.
        folder: The folder for intermediate files. Files of an earlier build are used again where they are up to date.
        target: The path of the library.
    """
    major, minor = STABLE_ABI
    facts = {
        "version": version,
        "stable_abi": f"{major}.{minor}",
        "architectures": [str(each) for each in architectures],
        "compiler": f"nvcc {toolkit.version}",
        "runtime": toolkit.runtime,
    }
    text = json.dumps("savl_cuda_facts=" + json.dumps(facts))  # a JSON string is a valid C++ string
    (folder / "generated").mkdir(parents=True, exist_ok=True)
    (folder / "generated/cuda_facts.h").write_text(f"#pragma once\n#define SAVL_CUDA_FACTS {text}\n", encoding="utf-8")
    sources = ROOT / "csrc/cuda"
    kernels = toolkit.compile([sources / name for name in nvcc.SOURCES], folder, [nvcc.gencode(architectures)])
    host_flags = [
        f"-I{folder / 'generated'}",
        f"-I{torch_root / 'include'}",
        *(f"-Xcompiler={flag}" for flag in without_folders(torch_root / "include")),
        "-DUSE_CUDA",  # without it, torch's header does not declare the function that returns the stream
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        f"-DSAVL_FACTS_DIGEST={hashlib.sha256(text.encode()).hexdigest()[:16]}",  # other facts: compile again
    ]
    host = toolkit.compile([sources / "library.cpp"], folder, host_flags)
    toolkit.link([path for path, _ in kernels + host], target, torch_root / "lib", folder)


def extension() -> dict[str, Any]:
    """Return the arguments of `setup` that build ``savl._C``, or none where it cannot be built."""
    if is_set(os.environ.get("SAVL_NO_EXTENSION")):
        warn("SAVL_NO_EXTENSION is set")
        return {}
    if sys.platform == "win32":
        warn("the kernels use vector extensions of GCC and Clang, which MSVC does not have")
        return {}
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except Exception as error:  # a broken torch raises more than ImportError
        warn(f"{type(error).__name__}: {error}")
        return {}

    wanted_architectures = os.environ.get("SAVL_CUDA_ARCHS", "")
    if wanted_architectures.strip():
        nvcc.parse_architectures(wanted_architectures)  # a wrong value is an error, not a warning

    class BuildExtensionOrWarn(BuildExtension):
        """Build both libraries. A failure prints a warning and does not stop the installation."""

        def build_extensions(self) -> None:
            for module in self.extensions:  # the version is only in pyproject.toml
                module.define_macros.append(("SAVL_VERSION", self.distribution.get_version()))
            try:
                super().build_extensions()
            except Exception as error:  # such as no compiler, or one that is too old
                self.forget_earlier_builds()
                warn(f"{type(error).__name__}: {error}")
                return
            self.build_cuda()

        def build_cuda(self) -> None:
            """Build the CUDA library, or print a warning."""
            self.forget(CUDA_LIBRARY)
            if is_set(os.environ.get("SAVL_NO_CUDA")):
                warn("SAVL_NO_CUDA is set", "CUDA kernels")
                return
            try:
                toolkit = nvcc.Toolkit.find()
                if toolkit is None:
                    warn("no nvcc found", "CUDA kernels")
                    return
                architectures = toolkit.architectures(os.environ.get("SAVL_CUDA_ARCHS"))
                version = self.distribution.get_version()
                # The temporary folder of an editable build is deleted afterwards, so objects are kept in build/cuda.
                folder = ROOT / "build/cuda" if self.editable_mode else Path(self.build_temp, "cuda").absolute()
                target = Path(ROOT if self.inplace or self.editable_mode else self.build_lib, CUDA_LIBRARY)
                build_cuda_library(toolkit, architectures, version, Path(torch.__file__).parent, folder, target)
            except Exception as error:  # such as a toolkit that is too old, or a host compiler too new for it
                self.forget(CUDA_LIBRARY)
                warn(f"{type(error).__name__}: {error}", "CUDA kernels")

        def forget_earlier_builds(self) -> None:
            """Remove the libraries of an earlier build, which would be installed as if this build had made them."""
            for module in self.extensions:
                self.forget(self.get_ext_filename(self.get_ext_fullname(module.name)))
            self.forget(CUDA_LIBRARY)

        def forget(self, library: str) -> None:
            """Remove one library of an earlier build."""
            Path(self.build_lib, library).unlink(missing_ok=True)
            if self.inplace or self.editable_mode:
                (ROOT / library).unlink(missing_ok=True)

    sanitizers = []
    if wanted := os.environ.get("SAVL_SANITIZE"):  # such as address,undefined; see .ci/sanitize
        # -O2 and -g take three times as long to compile. -fexpensive-optimizations fuses products and sums as -O2 does.
        # -fno-wrapv: Python's own -fwrapv would hide overflows.
        sanitizers = [f"-fsanitize={wanted}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        sanitizers += ["-O1", "-fexpensive-optimizations", "-fno-wrapv", "-g1", "-DSAVL_EMULATE_AVX512"]
    torch_root = Path(torch.__file__).parent
    major, minor = STABLE_ABI
    module = Extension(
        "savl._C",
        # The kernels take longest to compile and come first, so that no processor waits for them at the end.
        sources=sorted(files("csrc/*.cpp", "csrc/cpu/*.cpp"), key=lambda path: Path(path).stem[:8] != "kernels_"),
        depends=files("csrc/**/*.h", "csrc/**/*.inl"),
        # pybind11 comes first: torch's include folder has another version of it.
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc"), str(torch_root / "include")],
        library_dirs=[str(torch_root / "lib")],
        # There is no rpath: savl imports torch first, and the loader uses the library that torch has loaded.
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000")],
        extra_compile_args=[
            *COMPILE_ARGUMENTS,
            *without_folders(torch_root / "include", pybind11.get_include()),
            *sanitizers,
        ],
        extra_link_args=sanitizers,
        language="c++",
        optional=True,  # after a failed build, setuptools must not look for the library
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtensionOrWarn}}


setup(**packages(), **extension())
