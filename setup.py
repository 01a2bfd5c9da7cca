"""What pyproject.toml cannot say: the native parts, and conf/ inside a wheel.

The native parts are plain C++ called through ctypes, compiled where caco is installed. optional: where no compiler is,
the install goes on and the slower paths serve.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

# Nothing here may depend on the processor that compiles, so no -march=native: what a better processor runs is chosen
# when it runs.
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-pthread"]


def native_part(name: str, **options) -> Extension:
    """Made of all the C++ in the folder that it belongs to; it is compiled again when one of its headers changes."""
    folder = Path(*name.split(".")[:-1])
    sources, headers = (sorted(path.as_posix() for path in folder.glob(kind)) for kind in ("*.cpp", "*.h"))
    return Extension(
        name, sources, depends=headers, language="c++", optional=True, extra_link_args=["-pthread"], **options
    )


class WithConf(build_py):
    """A wheel carries conf/ as caco/conf; in a checkout it lies beside the package, where one reads it
    (caco/config/composition.py).

    Done by hand and not by an entry of package-dir, with which setuptools would make of an editable install an import
    hook. A hook is asked after the path: in the folder above a clone named caco, Python would take that clone for the
    package.
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
        native_part("caco.banks.kernels._kernel", extra_compile_args=FLAGS),
        # a * b + c is never contracted: every machine makes the same bits. No value is infinite or undefined.
        native_part(
            "caco.data.views._views",
            extra_compile_args=[*FLAGS, "-ffp-contract=off", "-ffinite-math-only", "-fno-signed-zeros"],
        ),
    ],
)
