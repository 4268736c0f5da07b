"""Builds fastfpl._C from csrc/*.cpp; everything else is said in pyproject.toml.

Without a working C++ compiler the package still installs, and `fastfpl doctor` says why the module
is absent. FASTFPL_REQUIRE_NATIVE=1 makes that an error.
"""

import os
import sys
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
REQUIRED = os.environ.get("FASTFPL_REQUIRE_NATIVE", "0") not in ("", "0")

if sys.platform == "win32":
    COMPILE, LINK = ["/O2", "/std:c++17", "/EHsc"], []
else:
    # The speed of -ffast-math without its price: as a link flag that one makes the whole process
    # flush denormals to zero when the module is imported.
    COMPILE = [
        "-O3",
        "-std=c++17",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-g0",
    ]
    LINK = ["-pthread"]
    if sys.platform == "linux":
        COMPILE.append("-fopenmp")
        LINK.append("-fopenmp")
    else:
        COMPILE.append("-fopenmp-simd")


class BuildNative(build_ext):
    """Leaves a note beside the place of a module that could not be built."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        if self.editable_mode:
            target = HERE / "fastfpl" / target.name
        note = target.parent / "_C.missing.txt"
        note.unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except Exception as error:
            if not REQUIRED:
                # An older module would answer for sources that did not compile.
                target.unlink(missing_ok=True)
                note.parent.mkdir(parents=True, exist_ok=True)
                why = f"{type(error).__name__}: {error}"
                if len(why) > 160:  # the whole command line: its ends say which compiler, and how
                    why = f"{why[:60]} ... {why[-90:]}"
                note.write_text(why + "\n", encoding="utf-8")
            raise


ParallelCompile(default=0).install()  # a file a core: each holds clones for three processors

setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "fastfpl._C",
            sources=sorted(p.relative_to(HERE).as_posix() for p in HERE.glob("csrc/*.cpp")),
            depends=sorted(p.relative_to(HERE).as_posix() for p in HERE.glob("csrc/*.h")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
            language="c++",
            optional=not REQUIRED,
        )
    ],
)
