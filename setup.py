"""What pyproject.toml cannot say: where savl.kernels lives, and an extension module that is allowed to fail.

The extension compiles against libtorch's stable ABI and links nothing else of torch, so one build serves
every torch from STABLE_ABI on. A machine that cannot build it gets the pure Python package and a warning.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

STABLE_ABI = (2, 10)
# fp-contract: a * b + c is one instruction where the processor has it. The vectors of csrc/cpu are an extension of GCC
# and Clang; another compiler fails, and savl is installed without its extension.
COMPILE_ARGUMENTS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast"]
ROOT = Path(__file__).resolve().parent


def warn(reason: str) -> None:
    """Print why savl is installed without its extension (pip shows this only with ``-v``)."""
    rule = "*" * 100
    print(
        f"\n{rule}\n"
        f"WARNING: savl is built WITHOUT its C++ extension: {reason}\n"
        "  It is complete and runs on PyTorch's own operations; only the fused CPU kernels are missing.\n"
        "  What the compiler said, if there is one, stands above. To build the extension, have a C++20\n"
        "  compiler, torch >= 2.10 and pybind11, and install savl again.\n"
        f"{rule}\n",
        file=sys.stderr,
        flush=True,
    )


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


def extension() -> dict[str, Any]:
    """Describe ``savl._C``, or return nothing where it cannot be built."""
    if os.environ.get("SAVL_NO_EXTENSION", "") not in ("", "0"):
        warn("SAVL_NO_EXTENSION is set")
        return {}
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except Exception as error:  # a broken torch raises more than ImportError
        warn(f"{type(error).__name__}: {error}")
        return {}

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

        def forget_earlier_builds(self) -> None:
            """Remove what an earlier build left behind: it would be installed in place of this one."""
            for module in self.extensions:
                library = self.get_ext_filename(self.get_ext_fullname(module.name))
                Path(self.build_lib, library).unlink(missing_ok=True)
                if self.editable_mode:
                    (ROOT / library).unlink(missing_ok=True)

    sanitizers = []
    if wanted := os.environ.get("SAVL_SANITIZE"):  # for example address,undefined; see .ci/sanitize
        sanitizers = [f"-fsanitize={wanted}", "-fno-omit-frame-pointer", "-O1", "-g", "-DSAVL_EMULATE_AVX512"]
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
        extra_compile_args=[*COMPILE_ARGUMENTS, *sanitizers],
        extra_link_args=sanitizers,
        language="c++",
        optional=True,  # setuptools must not look for the library after a failed build
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtensionOrWarn}}


setup(**packages(), **extension())
