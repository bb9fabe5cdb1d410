"""The C++ extension; everything static is in pyproject.toml.

SGSC_BUILD_EXT=auto|0|1   auto: a build that fails is a warning; 0: never build; 1: a build that fails is an error
SGSC_TORCH_DIR=DIR        the torch package folder to build against (default: the one installed here)
SGSC_SANITIZE=address,undefined
"""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).resolve().parent
MODE = os.environ.get("SGSC_BUILD_EXT", "auto")
MIN_TORCH = (2, 10)  # the first release with the stable-ABI parts that csrc/torch_ops.cpp uses
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded builds have no abi3


def find_torch() -> Path | None:
    """Find torch's folder without importing it: pip's isolated build hides it from sys.path, sysconfig does not."""
    given = os.environ.get("SGSC_TORCH_DIR")
    folders = [Path(given)] if given else [Path(p) / "torch" for p in sys.path if p]
    if not given:
        folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    for folder in folders:
        header = folder / "include/torch/headeronly/version.h"
        if header.is_file() and (folder / "include/torch/csrc/stable/library.h").is_file():
            words = [line.split() for line in header.read_text().splitlines()]
            version = {w[1]: int(w[2]) for w in words if w[:1] == ["#define"] and w[1].startswith("TORCH_VERSION_M")}
            if (version["TORCH_VERSION_MAJOR"], version["TORCH_VERSION_MINOR"]) >= MIN_TORCH:
                return folder
    return None


def extensions() -> list[Extension]:
    """Return the extension, or nothing where it cannot or shall not be built.

    Raises:
        SystemExit: If it must be built and there is no torch.
    """
    torch = find_torch() if MODE != "0" else None
    if torch is None:
        if MODE == "1":
            raise SystemExit("sgsc: SGSC_BUILD_EXT=1, but no torch>=2.10 was found; install torch first")
        if MODE != "0":
            warnings.warn("sgsc: no torch>=2.10 here; installing without the C++ extension", stacklevel=1)
        return []
    sanitize = os.environ.get("SGSC_SANITIZE")
    flags = ["-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
    flags += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # false in the AVX-512 headers of gcc 12
    flags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"] if sanitize else ["-O3", "-g0"]
    return [
        Extension(
            "sgsc._C",
            sources=sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").glob("*.cpp")),
            depends=sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").glob("*.[hi]*")),
            include_dirs=["csrc", str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000ULL")]
            + ([("Py_LIMITED_API", "0x030A0000")] if ABI3 else []),
            extra_compile_args=flags,
            extra_link_args=[f"-fsanitize={sanitize}"] if sanitize else [],
            py_limited_api=ABI3,
            optional=MODE != "1",
            language="c++",
        )
    ]


setup(ext_modules=extensions(), options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {})
