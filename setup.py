"""Packaging of qmigd.

Two things here are not as usual, and have to stay so:

- ``package_dir``: without it ``pip install -e .`` installs an import hook, which
  Twisted's plugin finder does not see, and ``twistd`` would not list qmigd;
- ``twisted.plugins`` has no ``__init__.py``, here or in ``twisted/``: one of our own
  would overwrite Twisted's, and uninstalling qmigd would take it away.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """Return the version, read and not imported: nothing that qmigd needs is here yet."""
    text = (HERE / "qmigd" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise ValueError("qmigd/__init__.py has no __version__.")
    return found[1]


def readme() -> str:
    """Return the description for people."""
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="qmigd",
    version=version(),
    description="Live migration of QEMU guests, with everything negotiated",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="The qmigd authors",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Twisted",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: System :: Emulators",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    install_requires=[
        "automat >= 24.8",
        "backports.zstd >= 1.0; python_version < '3.14'",
        "cryptography >= 47",
        "numpy >= 1.24",
        "pyopenssl >= 24.1",
        "rich >= 13",
        "service-identity >= 24.1",
        "twisted >= 24.7",
        "zope.interface >= 6",
    ],
    package_dir={"": "."},
    packages=[*find_packages(include=["qmigd", "qmigd.*"]), "twisted.plugins"],
    package_data={"qmigd": ["py.typed"]},
    zip_safe=False,
    entry_points={
        "console_scripts": ["qmigctl = qmigd.cli.main:main"],
        "qmigd.features": [
            "ktls = qmigd.features.ktls:feature",
            "mptcp = qmigd.features.mptcp:feature",
            "multifd = qmigd.features.multifd:feature",
            "postcopy-ram = qmigd.features.postcopy:feature",
            "postcopy-preempt = qmigd.features.preempt:feature",
            "rdma = qmigd.features.rdma:feature",
            "rdma-pin-all = qmigd.features.rdma:pin_all",
            "tls = qmigd.features.tls:feature",
            "zero-copy-receive = qmigd.features.zero_copy_receive:feature",
            "zero-copy-send = qmigd.features.zero_copy_send:feature",
        ],
    },
)
