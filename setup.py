"""The native parts, compiled where caco is installed; everything else about the package is in pyproject.toml.

Each is plain C++ called through ctypes. optional: where no compiler is, the install goes on and the slower paths serve.
"""

from setuptools import Extension, setup

# Nothing here may depend on the processor that compiles: no -march=native, and a * b + c is never contracted, so that
# every machine makes the same bits. What an AVX2 processor runs is chosen when the library is loaded.
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-pthread"]

setup(
    ext_modules=[
        Extension(
            "caco.data._views", ["caco/data/views.cpp"], language="c++", optional=True,
            extra_compile_args=FLAGS, extra_link_args=["-pthread"],
        ),
    ]
)  # fmt: skip
