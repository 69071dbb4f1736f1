"""Builds saelab as a release would be, and tests what was built: `make package`.

The source archive and the wheel are built from the repository's files, checked by twine, and held against these files
byte by byte. The wheel is installed in an environment of its own, where every module of it is imported; the tests come
from the unpacked archive.

Two shortcuts keep this at about a minute. That environment borrows the packages of the one that runs this script,
after pip has resolved the wheel's own requirements against them: torch is not installed twice. And few tests run
(`--one-in 1`: all): `make test` has run them all on the same bytes, so that one can only fail here for where it lies
or what it looks for beside it. One in so many runs of each file in `tests/`, which are about the whole repository, and
of the first file in every folder below.
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

IMPORT_ALL = """
import pkgutil, sys
from importlib import import_module
import saelab
for module in pkgutil.walk_packages(saelab.__path__, "saelab."):
    import_module(module.name)
print(saelab.__version__)
sys.exit(not saelab.__file__.startswith(sys.prefix))
"""


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


def check_contents(source: Path, names: list[str], sdist: Path, wheel: Path) -> None:
    """Every file of the package must be in the wheel, and every file but CI's in the archive, with its own bytes."""
    with tarfile.open(sdist) as archive:
        in_sdist = {file.name.partition("/")[2]: archive.extractfile(file).read() for file in archive if file.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name: archive.read(name) for name in archive.namelist()}
    wanted = {
        sdist.name: (in_sdist, [name for name in names if not name.startswith(LEFT_OUT)]),
        wheel.name: (in_wheel, [name for name in names if name.startswith("saelab/")]),
    }
    for archive_name, (held, files) in wanted.items():
        if missing := [name for name in files if name not in held]:
            sys.exit(
                f"{archive_name} must hold the repository's files, and lacks {len(missing)}: {', '.join(missing[:5])}. "
                "Add them to MANIFEST.in, those of the package to `package-data` in pyproject.toml."
            )
        if changed := [name for name in files if held[name] != (source / name).read_bytes()]:
            sys.exit(
                f"{archive_name} must hold the repository's files as they are, and changes {len(changed)}: "
                f"{', '.join(changed[:5])}. Take out of the build what writes them."
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
    """saelab must be the installed one, in the archive's version; its modules must load and its command start."""
    command, env = [python, "-c", IMPORT_ALL], clean_environment()
    found = subprocess.run(command, cwd=python.parent, env=env, check=True, capture_output=True, text=True)
    if f"saelab-{found.stdout.strip()}.tar.gz" != sdist.name:
        sys.exit(f"`saelab.__version__` must be that of {sdist.name}, got {found.stdout.strip()}.")
    run(python.parent / "saelab", "--help", cwd=python.parent, quiet=True)


def choose_tests(tests: Path, one_in: int) -> list[str]:
    """All tests, or files about the whole repository and the first of every package's, from the archive's folder."""
    if one_in == 1:
        return ["tests"]
    files = sorted((tests / "tests").rglob("test_*.py"))
    first = {path.parent: path for path in reversed(files)}
    return [str(path.relative_to(tests)) for path in files if path in (first[path.parent], tests / "tests" / path.name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt", help="versions that pip may take")
    parser.add_argument("--one-in", type=int, default=12, help="of so many tests of a chosen file, one runs")
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
        check_contents(folder / "source", names, sdist, wheel)
        python = install(wheel, folder / "venv", args.constraints.resolve())
        check_import(python, sdist)
        shutil.unpack_archive(sdist, folder)
        tests = folder / sdist.name.removesuffix(".tar.gz")
        shutil.rmtree(tests / "saelab")  # else its tests would find it before the installed one
        chosen = choose_tests(tests, args.one_in)
        run(python, "-m", "pytest", "-q", "--one-in", str(args.one_in), *pytest_args, *chosen, cwd=tests)


if __name__ == "__main__":
    main()
