"""The native parts, compiled where caco is installed; everything else about the package is in pyproject.toml.

Each is plain C++ called through ctypes. optional: where no compiler is, the install goes on and the slower paths serve.
"""

from setuptools import Extension, setup

# Nothing here may depend on the processor that compiles, so no -march=native: what a better processor runs is chosen when
# it runs.
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-pthread"]

setup(
    ext_modules=[
        Extension(
            "caco.banks._kernel", ["caco/banks/kernel.cpp"],
            depends=["caco/banks/kernel.h", "caco/banks/amx.h", "caco/banks/amx_tiles.h"], language="c++", optional=True,
            extra_compile_args=FLAGS, extra_link_args=["-pthread"],
        ),
        Extension(
            "caco.data._views", ["caco/data/views.cpp"], depends=["caco/data/jpeg.h"], language="c++", optional=True,
            # a * b + c is never contracted: every machine makes the same bits. No value is infinite or undefined.
            extra_compile_args=[*FLAGS, "-ffp-contract=off", "-ffinite-math-only", "-fno-signed-zeros"],
            extra_link_args=["-pthread"],
        ),
    ]
)  # fmt: skip
