"""Build wheel and source distribution into a folder, and refuse what is missing or too much.

python .ci/check_build.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "lightning_mnp"
# What a source distribution is no use without, and what is not for users.
NEEDED = {"CHANGELOG.md", "LICENSE", "README.md", "docs/index.md", "pyproject.toml"}
FOLDERS = {"benchmarks", "docs", "examples", "lightning_mnp", "tests"}
CONFIGURATIONS = "examples"  # in the wheel, they are a folder of the package
UNWANTED = ("benchmarks/results/", "benchmarks/weights/", "docs/_build/", "docs/reference/modules/")


def package_files() -> set[str]:
    """List the files that make up the package, as paths from the root."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / PACKAGE).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def configurations() -> set[str]:
    """List the configurations that users name by `package:`, as paths from the root."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / CONFIGURATIONS).rglob("*.yaml")
    }


def wheel_faults(names: set[str], package: set[str]) -> Iterator[str]:
    """Compare a wheel's files with the package's."""
    for name in sorted(package - names):
        yield f"the wheel lacks {name}"
    for name in sorted(names - package):
        if not name.split("/")[0].endswith(".dist-info"):
            yield f"the wheel has {name}, which is no part of the package"


def sdist_faults(names: set[str], package: set[str]) -> Iterator[str]:
    """Look through the files of a source distribution, as paths from its root."""
    for name in sorted((package | NEEDED) - names):
        yield f"the source distribution lacks {name}"
    for name in sorted(names):
        folder, slash, _ = name.partition("/")
        is_known = not slash or folder in FOLDERS
        if not is_known or name.startswith(UNWANTED) or "__pycache__" in name:
            yield f"the source distribution has {name}, which is not for users"


def wheel_names(path: Path) -> set[str]:
    """List the files in a wheel."""
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def sdist_names(path: Path) -> set[str]:
    """List the files in a source distribution, without the folder that holds them all."""
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def main(folder: Path) -> int:
    """Build, check and print; 1 if something is wrong."""
    python = [sys.executable, "-m"]
    command = [*python, "build", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
        return 1
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    package, others = package_files(), configurations()
    in_wheel = package | {f"{PACKAGE}/{name}" for name in others}
    faults = [
        *wheel_faults(wheel_names(wheel), in_wheel),
        *sdist_faults(sdist_names(sdist), package | others),
    ]
    for fault in faults:
        print(f"FAILURE: {fault}")
    command = [*python, "twine", "--no-color", "check", "--strict", str(wheel), str(sdist)]
    return int(bool(faults)) or subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
