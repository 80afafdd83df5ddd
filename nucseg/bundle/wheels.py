"""Packages that a machine without a network lacks, carried as wheels and unpacked there without pip.

Fetching uses pip here, for the Python of the other machine. Unpacking is zipfile and nothing else, so it runs on a bare
Python: ``python -m nucseg.bundle.wheels WHEELS SITE``, after which SITE goes on PYTHONPATH and SITE/share/jupyter on
JUPYTER_PATH.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

# What stages need beyond torch, torchvision, timm, scikit-image, scikit-learn, pandas, matplotlib and typer.
RUN = ("jaxtyping", "wadler-lindig", "defusedxml", "pooch", "platformdirs")
# What notebooks need beyond that: papermill, a kernel, HTML. Left out although their packages name them, because
# nothing here imports them: debugpy, jedi and parso (10 MB), and the front ends of ipywidgets. Later versions of
# wcwidth are compiled, and twenty times as large.
NOTEBOOKS = (
    *("papermill", "entrypoints", "tenacity", "nbclient", "nbformat", "fastjsonschema", "jsonschema"),
    *("jsonschema-specifications", "referencing", "rpds-py", "jupyter-client", "jupyter-core", "pyzmq", "tornado"),
    *("traitlets", "ipykernel", "comm", "nest-asyncio2", "matplotlib-inline", "ipython", "ipython-pygments-lexers"),
    *(
        "prompt-toolkit",
        "wcwidth==0.2.14",
        "stack-data",
        "asttokens",
        "executing",
        "pure-eval",
        "pexpect",
        "ptyprocess",
    ),
    *("ipywidgets", "nbconvert", "beautifulsoup4", "soupsieve", "bleach", "webencodings", "tinycss2"),
    *("jupyterlab-pygments", "mistune", "pandocfilters"),
)
DEFAULT = (*RUN, *NOTEBOOKS)
# pip matches the number after manylinux_2_ exactly, so every glibc from 2.17 to 2.28 is named.
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"),
)


class WheelError(RuntimeError):
    """Wheels could not be had."""


def fetch(names: Iterable[str], folder: str | Path, python: str = "3.12") -> list[Path]:
    """Put wheels into a folder.

    Parameters
    ----------
    names
        Packages, ``NAME`` or ``NAME==VERSION``, or paths of wheels that are at hand. A package that is installed here
        is taken in the same version, so what travels is what was tested. Dependencies are not followed.
    folder
        Where the wheels go.
    python
        Version of Python on the other machine, ``"3.12"``: linux, x86-64, glibc 2.28 or newer.

    Raises
    ------
    WheelError
        When pip finds no such wheel or no network; the message says what pip said and what to do.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = []
    for name in names:
        if not name.endswith(".whl"):
            wanted.append(_pinned(name))
        elif Path(name).is_file():
            shutil.copyfile(name, folder / Path(name).name)
        else:
            raise WheelError(f"no wheel {name}")
    if wanted:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", python, *platforms, "--dest", str(folder), *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise WheelError(
                f"pip could not fetch the wheels for Python {python}: {'; '.join(said[-2:])}\nWithout a network, name "
                "the files of wheels (--wheel PATH.whl, repeated), or take none: --wheel none"
            )
    return sorted(folder.glob("*.whl"))


def unpack(wheels: str | Path, site: str | Path) -> None:
    """Unpack every wheel of a folder into one folder, complete or not at all; if that exists, it is left as it is.

    Data files land where pip puts them below a prefix (``site/share/jupyter``); scripts are left out.
    """
    site = Path(site)
    if site.is_dir():
        return
    site.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{site.name}.", suffix=".part", dir=site.parent))
    try:
        part.chmod(0o755)
        for wheel in sorted(Path(wheels).glob("*.whl")):
            with zipfile.ZipFile(wheel) as zipped:
                zipped.extractall(part)
            for data in part.glob("*.data"):
                for kind in ("purelib", "platlib", "data"):
                    if (data / kind).is_dir():
                        shutil.copytree(data / kind, part, dirs_exist_ok=True)
                shutil.rmtree(data)
        try:
            os.replace(part, site)
        except OSError:  # another process was faster
            if not site.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _pinned(name: str) -> str:
    if "==" in name:
        return name
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def main(arguments: Sequence[str]) -> None:
    """Unpack the first folder's wheels into the second."""
    wheels, site = arguments
    unpack(wheels, site)


if __name__ == "__main__":
    main(sys.argv[1:])
