"""What pyproject.toml cannot say: the native parts, and conf/ inside a wheel.

The native parts are plain C++ called through ctypes, compiled where caco is installed. optional: where no compiler is, the
install goes on and the slower paths serve.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

# Nothing here may depend on the processor that compiles, so no -march=native: what a better processor runs is chosen when
# it runs.
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-pthread"]


class WithConf(build_py):
    """A wheel carries conf/ as caco/conf; in a checkout it lies beside the package, where one reads it (caco/config/composition.py).

    Done by hand and not by an entry of package-dir, with which setuptools would make of an editable install an import hook.
    A hook is asked after the path: in the folder above a clone named caco, Python would take that clone for the package.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file in Path("conf").rglob("*.yaml"):
                target = Path(self.build_lib, "caco", file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))


setup(
    cmdclass={"build_py": WithConf},
    ext_modules=[
        Extension(
            "caco.banks.kernels._kernel", ["caco/banks/kernels/kernel.cpp"],
            depends=["caco/banks/kernels/kernel.h", "caco/banks/kernels/amx.h", "caco/banks/kernels/amx_tiles.h"], language="c++", optional=True,
            extra_compile_args=FLAGS, extra_link_args=["-pthread"],
        ),
        Extension(
            "caco.data.views._views", ["caco/data/views/views.cpp"], depends=["caco/data/views/jpeg.h"], language="c++", optional=True,
            # a * b + c is never contracted: every machine makes the same bits. No value is infinite or undefined.
            extra_compile_args=[*FLAGS, "-ffp-contract=off", "-ffinite-math-only", "-fno-signed-zeros"],
            extra_link_args=["-pthread"],
        ),
    ],
)  # fmt: skip
