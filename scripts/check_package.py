"""Builds saelab as a release would be, and tests what was built: `make package`.

The source archive and the wheel are built from the repository's files, checked by twine, and held against the list of
these files. The wheel is installed in an environment of its own; the tests come from the unpacked archive.

Two shortcuts keep this at about a minute. That environment borrows the packages of the one that runs this script,
after pip has resolved the wheel's own requirements against them: torch is not installed twice. And all tests are
collected, but one in so many of each file runs (`--one-in 1`: all): `make test` has run them all from the repository,
and a file that an archive lacks is found by comparing lists, not by tests.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".ci/", ".github/")
"""of the repository, but of no use in an archive"""


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> None:
    """Run a command that must succeed, without what the caller's environment adds to Python's path.

    A quiet one's output is shown only if it fails.
    """
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    done = subprocess.run(words, cwd=cwd, env=clean_environment(), capture_output=quiet, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout or ''}{done.stderr or ''}{words[:4]} must succeed, and ended with {done.returncode}.")


def clean_environment() -> dict[str, str]:
    """The environment without what would put another saelab, or another make, before the installed one."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS")}
    return env | {"HF_HUB_OFFLINE": "1"}


def list_files() -> list[str]:
    """The repository's files as they lie in the working tree, new ones among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted({name for name in names if name and (ROOT / name).is_file()})


def copy_files(names: list[str], to: Path) -> None:
    """Copy the files, so that nothing a former build left behind (egg-info, build/) has a say in this one."""
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)


def check_contents(names: list[str], sdist: Path, wheel: Path) -> None:
    """Every file of the package must be in the wheel, and every file but CI's in the archive."""
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    lacking = {
        sdist.name: [name for name in names if name not in in_sdist and not name.startswith(LEFT_OUT)],
        wheel.name: [name for name in names if name not in in_wheel and name.startswith("saelab/")],
    }
    for archive_name, missing in lacking.items():
        if missing:
            sys.exit(
                f"{archive_name} must hold the repository's files, and lacks {len(missing)}: {', '.join(missing[:5])}. "
                "Add them to MANIFEST.in, those of the package to `package-data` in pyproject.toml."
            )


def install(wheel: Path, folder: Path, constraints: Path) -> Path:
    """Install the wheel in a new environment that sees the packages of this one; the new one's interpreter.

    The wheel goes in before there is anything to see, so that pip has no saelab to find there, and none to replace.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check")
    run(*pip, "--no-deps", wheel, cwd=folder)
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
    (Path(site) / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    run(*pip, "--no-index", "-c", constraints, "saelab[dev]", cwd=folder)
    return python


def check_import(python: Path, sdist: Path) -> None:
    """saelab must be the installed one, in the archive's version, and its command must start."""
    code = "import saelab, sys; print(saelab.__version__); sys.exit(not saelab.__file__.startswith(sys.prefix))"
    command, env = [python, "-c", code], clean_environment()
    found = subprocess.run(command, cwd=python.parent, env=env, check=True, capture_output=True, text=True)
    if f"saelab-{found.stdout.strip()}.tar.gz" != sdist.name:
        sys.exit(f"`saelab.__version__` must be that of {sdist.name}, got {found.stdout.strip()}.")
    run(python.parent / "saelab", "--help", cwd=python.parent, quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt", help="versions that pip may take")
    parser.add_argument("--one-in", type=int, default=12, help="of so many tests of a file, one runs")
    args, pytest_args = parser.parse_known_args()
    if not (ROOT / ".git").exists():
        sys.exit(f"An archive is held against the repository's list of files, which {ROOT} lacks. Run this in a clone.")
    names = list_files()
    with tempfile.TemporaryDirectory(prefix="saelab-package-") as name:
        folder = Path(name)
        copy_files(names, folder / "source")
        build = ("build", "--no-isolation", "--outdir", folder / "dist")  # setuptools is here: nothing is fetched
        run(sys.executable, "-m", *build, folder / "source", cwd=folder, quiet=True)
        (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=folder)
        check_contents(names, sdist, wheel)
        python = install(wheel, folder / "venv", args.constraints.resolve())
        check_import(python, sdist)
        shutil.unpack_archive(sdist, folder)
        tests = folder / sdist.name.removesuffix(".tar.gz")
        shutil.rmtree(tests / "saelab")  # else its tests would find it before the installed one
        run(python, "-m", "pytest", "-q", "--one-in", str(args.one_in), *pytest_args, "tests", cwd=tests)


if __name__ == "__main__":
    main()
