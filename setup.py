"""The packages; everything else stands in pyproject.toml, which cannot say that configs/ belongs into the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dinalrm_jax*"]), "dinalrm_jax.shipped.configs"],
    package_dir={"dinalrm_jax.shipped.configs": "configs"},
)
