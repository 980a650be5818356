"""The compiled part of the package; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

# Not a Python module but a library that cake.kernels loads. Optional: without a C compiler that knows
# the GNU dialect, torch's own kernels serve.
KERNELS = Extension(
    "cake.kernels._matrix",
    ["cake/kernels/matrix.c"],
    depends=sorted(str(path) for path in Path("cake/kernels").glob("*.h")),
    # Without the second, gcc computes exponentials one by one: both sides of a choice might raise a flag.
    extra_compile_args=["-O3", "-fno-trapping-math", "-std=c11"],
    libraries=["m"],
    optional=True,
)

setup(ext_modules=[] if sys.platform == "win32" else [KERNELS])
