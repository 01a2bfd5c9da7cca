"""The native parts, compiled where caco is installed; everything else about the package is in pyproject.toml.

Each is plain C++ called through ctypes. optional: where no compiler is, the install goes on and the slower paths serve.
"""

from setuptools import setup

setup(ext_modules=[])
