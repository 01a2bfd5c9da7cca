"""The native parts, compiled where caco is installed; everything else about the package is in pyproject.toml.

Each is plain C++ called through ctypes. optional: where no compiler is, the install goes on and the slower paths serve.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "caco.banks._kernel",
            ["caco/banks/kernel.cpp"],
            depends=["caco/banks/kernel.h"],
            extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno"],
            extra_link_args=["-pthread"],
            optional=True,
        ),
    ]
)
