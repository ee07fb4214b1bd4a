"""What pyproject.toml cannot say: where savl.kernels lives, and an extension module that is allowed to fail.

The extension compiles against libtorch's stable ABI and links nothing else of torch, so one build serves
every torch from STABLE_ABI on. A machine that cannot build it gets the pure Python package and a warning.

The CUDA kernels are a library of their own, savl/_cuda.so, which a torch without CUDA could not load. They are built
where nvcc is, whatever torch is there; without them savl lacks nothing else.
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
# fp-contract: a * b + c is one instruction where the processor has it. The vectors of csrc/cpu are an extension of GCC
# and Clang; another compiler fails, and savl is installed without its extension.
COMPILE_ARGUMENTS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast"]
ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "savl/_cuda.so"
nvcc = SimpleNamespace(**runpy.run_path(str(ROOT / "csrc/cuda/nvcc.py"), run_name="nvcc"))


def warn(reason: str, without: str = "C++ extension") -> None:
    """Print what savl is installed without, and why (pip shows this only with ``-v``)."""
    consequence, needed = {
        "C++ extension": (
            "It is complete and runs on PyTorch's own operations; only the fused kernels are missing.",
            "a C++20\n  compiler, torch >= 2.10 and pybind11",
        ),
        "CUDA kernels": (
            "It is complete; on a GPU, gaussian_posterior and channel_modulation run on PyTorch's own operations.",
            "a CUDA\n  toolkit from 12.0 on, whose nvcc is in CUDA_HOME, on the PATH or in /usr/local/cuda",
        ),
    }[without]
    rule = "*" * 100
    print(
        f"\n{rule}\n"
        f"WARNING: savl is built WITHOUT its {without}: {reason}\n"
        f"  {consequence}\n"
        f"  What the compiler said, if there is one, stands above. To build the {without.split()[-1]}, have {needed},\n"
        "  and install savl again.\n"
        f"{rule}\n",
        file=sys.stderr,
        flush=True,
    )


def is_set(variable: str | None) -> bool:
    """Whether an environment variable that switches something off says so."""
    return (variable or "") not in ("", "0")


def packages() -> dict[str, Any]:
    """List the packages; the folder kernels/ is installed as ``savl.kernels``, never as ``kernels``."""
    return {
        "packages": [
            *find_packages(include=["savl", "savl.*"]),
            "savl.kernels",
            *(f"savl.kernels.{name}" for name in find_packages("kernels")),
        ],
        "package_dir": {"savl.kernels": "kernels"},
    }


def files(*patterns: str) -> list[str]:
    """Return the files under the project's root that match, relative to it, in a stable order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def without_folders(*roots: str | Path) -> list[str]:
    """Return the compiler flags that leave the folders out of the file names which error messages hold."""
    # Of two that match, the later one counts: torch may lie below the project, in a virtual environment.
    return [f"-ffile-prefix-map={root}/=" for root in (ROOT, *roots)]


def build_cuda_library(
    toolkit: Any, architectures: Any, version: str, torch_root: Path, folder: Path, target: Path
) -> None:
    """Compile and link savl/_cuda.so.

    Args:
        toolkit: `nvcc.Toolkit` to do it with.
        architectures: Those to compile for.
        version: Of savl.
        torch_root: Where the package torch lies; it need not have CUDA.
        folder: For what comes in between; what is there from before is used where it still fits.
        target: The library.
    """
    major, minor = STABLE_ABI
    facts = {
        "version": version,
        "stable_abi": f"{major}.{minor}",
        "architectures": [str(each) for each in architectures],
        "compiler": f"nvcc {toolkit.version}",
        "runtime": toolkit.runtime,
    }
    text = json.dumps("savl_cuda_facts=" + json.dumps(facts))  # a string of JSON is one of C++ too
    (folder / "generated").mkdir(parents=True, exist_ok=True)
    (folder / "generated/cuda_facts.h").write_text(f"#pragma once\n#define SAVL_CUDA_FACTS {text}\n", encoding="utf-8")
    sources = ROOT / "csrc/cuda"
    kernels = toolkit.compile([sources / name for name in nvcc.SOURCES], folder, [nvcc.gencode(architectures)])
    host_flags = [
        f"-I{folder / 'generated'}",
        f"-I{torch_root / 'include'}",
        *(f"-Xcompiler={flag}" for flag in without_folders(torch_root / "include")),
        "-DUSE_CUDA",  # the stream is declared only then
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        f"-DSAVL_FACTS_DIGEST={hashlib.sha256(text.encode()).hexdigest()[:16]}",  # compile again where they differ
    ]
    host = toolkit.compile([sources / "library.cpp"], folder, host_flags)
    toolkit.link([path for path, _ in kernels + host], target, torch_root / "lib", folder)


def extension() -> dict[str, Any]:
    """Describe ``savl._C``, or return nothing where it cannot be built."""
    if is_set(os.environ.get("SAVL_NO_EXTENSION")):
        warn("SAVL_NO_EXTENSION is set")
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
        nvcc.parse_architectures(wanted_architectures)  # a mistake of the user's is an error, not a warning

    class BuildExtensionOrWarn(BuildExtension):
        """Compile with ninja where it is; turn any failure into a warning."""

        def build_extensions(self) -> None:
            for module in self.extensions:  # the version has one source, pyproject.toml
                module.define_macros.append(("SAVL_VERSION", self.distribution.get_version()))
            try:
                super().build_extensions()
            except Exception as error:  # no compiler, a compiler too old, a linker error, ...
                self.forget_earlier_builds()
                warn(f"{type(error).__name__}: {error}")
                return
            self.build_cuda()

        def build_cuda(self) -> None:
            """Build the CUDA library, or warn."""
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
                # An editable build has no folder of its own that is there the next time.
                folder = ROOT / "build/cuda" if self.editable_mode else Path(self.build_temp, "cuda").absolute()
                target = Path(ROOT if self.inplace or self.editable_mode else self.build_lib, CUDA_LIBRARY)
                build_cuda_library(toolkit, architectures, version, Path(torch.__file__).parent, folder, target)
            except Exception as error:  # a toolkit too old, or one that the host compiler is too new for, ...
                self.forget(CUDA_LIBRARY)
                warn(f"{type(error).__name__}: {error}", "CUDA kernels")

        def forget_earlier_builds(self) -> None:
            """Remove what an earlier build left behind: it would be installed in place of this one."""
            for module in self.extensions:
                self.forget(self.get_ext_filename(self.get_ext_fullname(module.name)))
            self.forget(CUDA_LIBRARY)

        def forget(self, library: str) -> None:
            """Remove one library."""
            Path(self.build_lib, library).unlink(missing_ok=True)
            if self.inplace or self.editable_mode:
                (ROOT / library).unlink(missing_ok=True)

    sanitizers = []
    if wanted := os.environ.get("SAVL_SANITIZE"):  # for example address,undefined; see .ci/sanitize
        # -O2 and -g compile three times as long; products and sums are fused as they are at -O2. Python has -fwrapv,
        # under which no overflow would be found.
        sanitizers = [f"-fsanitize={wanted}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        sanitizers += ["-O1", "-fexpensive-optimizations", "-fno-wrapv", "-g1", "-DSAVL_EMULATE_AVX512"]
    torch_root = Path(torch.__file__).parent
    major, minor = STABLE_ABI
    module = Extension(
        "savl._C",
        sources=files("csrc/*.cpp", "csrc/cpu/*.cpp"),
        depends=files("csrc/**/*.h", "csrc/**/*.inl"),
        # pybind11 first: torch carries a copy of its own, of another version.
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc"), str(torch_root / "include")],
        library_dirs=[str(torch_root / "lib")],
        # No rpath: the library is the one that the running torch has loaded, so torch is imported first.
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000")],
        extra_compile_args=[
            *COMPILE_ARGUMENTS,
            *without_folders(torch_root / "include", pybind11.get_include()),
            *sanitizers,
        ],
        extra_link_args=sanitizers,
        language="c++",
        optional=True,  # setuptools must not look for the library after a failed build
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtensionOrWarn}}


setup(**packages(), **extension())
