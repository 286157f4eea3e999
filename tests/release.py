"""`python -m tests.release [PYTHON …]`: what is to be released, built and tried as users get it.

Builds the source distribution, and the wheel from it, and has twine check both. Then installs the
wheel into an empty environment for each Python, with the oldest jax and flax that the package
accepts and with the newest that the index has, and runs `tests/support/first_hour.py` there. Prints
a table; the status is 1 where anything failed. Needs the extra `release` and an index of packages.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRIAL = Path(__file__).parent / "support" / "first_hour.py"
PYTHONS = ("python3.11", "python3.12", "python3.13")


def oldest() -> list[str]:
    """The dependencies at their lower bounds: ["jax==…", "flax==…"]."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.sub(r">=", "==", requirement) for requirement in project["dependencies"]]


def newest() -> list[str]:
    return [requirement.partition("==")[0] for requirement in oldest()]


def run(*command: str | Path, cwd: Path | str = ROOT) -> str:
    """What the command printed. A failed command ends with its last lines in the error."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise RuntimeError(f"{' '.join(map(str, command[:4]))}: {' / '.join(said[-3:])}")
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel, made from the source distribution and not from the working tree."""
    run(sys.executable, "-m", "build", "--outdir", folder)
    files = sorted(folder.iterdir())
    print(*(f"built     {file.name}, {file.stat().st_size:,} bytes" for file in files), sep="\n")
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    print("twine     passed", flush=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def tried(python: str, wheel: Path, requirements: list[str]) -> str:
    """Versions and result of one empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(python, "-m", "venv", folder)
            own = Path(folder) / "bin" / "python"
            quiet = ("--disable-pip-version-check", "--quiet")
            run(own, "-m", "pip", *quiet, "install", wheel, *requirements)
            run(own, "-m", "pip", *quiet, "check")
            return run(own, "-I", TRIAL, cwd=folder).strip()
        except RuntimeError as error:
            return f"FAILED {error}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", default=PYTHONS)
    pythons = parser.parse_args(arguments).pythons
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        failed = 0
        for python in pythons:
            for name, requirements in (("oldest", oldest()), ("newest", newest())):
                result = tried(python, wheel, requirements)
                failed += "FAILED" in result
                print(f"{name}  {result}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
