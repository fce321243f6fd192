"""Maps the three packages from their folders; everything else is declared in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["atomas", "atomas.*"]),
        *find_packages("kernels"),
        *find_packages("launcher"),
    ],
    package_dir={
        "atomas_kernels": "kernels/atomas_kernels",
        "atomas_launcher": "launcher/atomas_launcher",
    },
)
