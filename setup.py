"""Builds the native libraries by calling CMake; everything else is in pyproject.toml and CMakeLists.txt.

Without a C++ compiler the package still installs: its pure-PyTorch reference serves, and both this build and the first
use say so in one line. FASTFISHER_BUILD=0 skips the build, FASTFISHER_BUILD=1 makes a missing tool an error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
WANTED = os.environ.get("FASTFISHER_BUILD", "auto")


def missing_tool() -> str | None:
    """The first tool of the build that this machine lacks."""
    compiler = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([compiler] if compiler else ["c++", "g++", "clang++"])):
        return "a C++ compiler"
    return next((tool for tool in ("cmake", "ninja") if not shutil.which(tool)), None)


class CMakeBuild(build_ext):
    """One CMake configure, build and install into the place where setuptools wants the extension."""

    def run(self) -> None:
        """Builds, or says in one line why not."""
        missing = missing_tool()
        if WANTED == "0" or (missing and WANTED != "1"):
            reason = "FASTFISHER_BUILD=0" if WANTED == "0" else f"{missing} was not found"
            print(f"fastfisher: no compiled kernels ({reason}); the PyTorch reference will serve.", file=sys.stderr)
            self.extensions.clear()
            return
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = Path(self.build_temp).resolve()
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={prefix}"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        """The files installed, for the record of an installation."""
        return [str(path) for path in (Path(self.build_lib) / "fastfisher").glob("*.so")]


setup(ext_modules=[Extension("fastfisher._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
