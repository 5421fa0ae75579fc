"""For tools that still run setup.py: the same package, built by scikit-build-core's setuptools face.

pip does not come here (pyproject.toml names the build backend), and only pip's way keeps its build folder and so
compiles just what has changed. Needs `pip install "setuptools>=77" scikit-build-core nanobind cmake ninja`, and
mpicxx on PATH.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["hvd_backup", "hvd_backup.*"]),
    package_data={"hvd_backup": ["py.typed", "*.pyi"]},
    cmake_source_dir=".",
)
