"""Builds activemark_fast._native with CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    """An extension whose sources and flags are CMakeLists.txt's business."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Runs CMake with Ninja and puts the module where setuptools expects it.

    CMakeLists.txt's own options, all named ACTIVEMARK_…, are taken from the environment.
    """

    def build_extension(self, ext: Extension) -> None:
        """Configure and build one extension; a failing compiler raises CalledProcessError."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        executable = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        configure = [
            executable,
            # The tools of an earlier isolated build are gone, so nothing it cached can be trusted.
            "--fresh",
            "--log-level=NOTICE",
            "-G",
            "Ninja",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            *(f"-D{name}={value}" for name, value in os.environ.items() if name.startswith("ACTIVEMARK_")),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([executable, "--build", str(build)], check=True)


setup(ext_modules=[CMakeExtension("activemark_fast._native")], cmdclass={"build_ext": CMakeBuild})
