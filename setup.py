"""Builds csrc/, the C++ CPU kernels, where torch and a compiler are at hand. All metadata is in pyproject.toml.

FASTLORA_BUILD_CSRC   0: pure Python. 1: fail where the kernels cannot be built. Unset: build them if possible.
FASTLORA_SANITIZE     1: address and undefined-behaviour sanitizers; run Python with
                      LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)".
"""

import os
import sys
from pathlib import Path

from setuptools import setup

HOW_TO_BUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."
WANTED = os.environ.get("FASTLORA_BUILD_CSRC", "")
ROOT = Path(__file__).resolve().parent


def say(reason):
    print(f"fastlora: C++ CPU kernels not built: {reason}. To build them: {HOW_TO_BUILD}", file=sys.stderr)


def extension_arguments():
    """The arguments of setup() that build csrc; empty for a pure-Python package."""
    if WANTED == "0":
        say("FASTLORA_BUILD_CSRC=0")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if WANTED == "1":
            raise
        say(f"torch is not importable here, as under pip's build isolation ({error})")
        return {}

    class BuildCsrc(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if WANTED == "1":
                    raise
                say(f"the compiler failed ({error})")
                self.extensions = []

    sanitize = []
    if os.environ.get("FASTLORA_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    csrc = CppExtension(
        "fastlora._C",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
        # Contraction off: a product and a sum are fused where the source says fma, on every compiler alike.
        extra_compile_args=[
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            "-ffp-contract=off",
            "-fvisibility=hidden",
            f"-ffile-prefix-map={ROOT}/=",
            *(["-g", "-O1", *sanitize] if sanitize else ["-g0", "-O3"]),
        ],
        extra_link_args=sanitize,
        py_limited_api=True,
    )
    return {
        "ext_modules": [csrc],
        "cmdclass": {"build_ext": BuildCsrc},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension_arguments())
