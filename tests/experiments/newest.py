"""What is newest together, and what breaks with it: `make newest`, or `python -m tests.experiments.newest --resolve`.

The upper bounds of pyproject.toml are left out, pip resolves the rest for the CPU, and what is newer than the constraints is
printed. Without `--resolve` it is installed into an environment beside, and the fast tests run there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

from tests.fill import CUDA_BUILDS

HOUSE = Path(__file__).resolve().parents[2]
CONSTRAINTS = HOUSE / "launch" / "constraints" / "cpu.txt"
EXTRAS = ("cpu", "dev")


def unbound(requirement: str) -> str:
    """Return a requirement without what keeps newer versions out: upper bounds, and exact versions.

    Example: `unbound("trl>=1.16,<1.17")` is "trl>=1.16"
    """
    bare, _, marker = requirement.partition(";")
    found = re.match(r"^\s*([\w.-]+(?:\[[^\]]*\])?)(.*)$", bare)
    assert found is not None
    name, bounds = found.groups()
    kept = [b.strip() for b in bounds.split(",") if b.strip() and not re.match(r"(<|==|~=|!=)", b.strip())]
    lowest = [f">={b.strip()[2:]}" for b in bounds.split(",") if b.strip().startswith("==")]
    return f"{name}{','.join(kept + lowest)}" + (f";{marker}" if marker else "")


def requirements() -> list[str]:
    """Return what is installed for the CPU and for tests, without upper bounds."""
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    waiting, found = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])], []
    for line in waiting:
        if own := re.match(rf"{project['name']}\[(.*)\]", line):
            waiting += [one for extra in own[1].split(",") for one in extras[extra]]
        else:
            found.append(unbound(line))
    return sorted(set(found))


def pinned(text: str) -> dict[str, str]:
    """Return the versions of a constraints file, by name as packages are compared."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pairs = (line.partition("==") for line in lines if "==" in line)
    return {_plain(name): version for name, _, version in pairs}


def changes(resolved: dict[str, str], tested: dict[str, str]) -> list[str]:
    """Return a line for each package that is another version than the one tested, or is new."""
    return [
        f"{name}: {tested.get(name, 'new')} -> {version}"
        for name, version in sorted(resolved.items())
        if tested.get(name) != version
    ]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class UnresolvedError(RuntimeError):
    """What pip says where it finds no versions that go together, in one line."""


def why(said: str) -> str:
    """Return the last error of what pip said, and what it is about.

    Example: `why("ERROR: No matching distribution found for a>=3")` is "No matching distribution found for a>=3"
    """
    errors = [line.removeprefix("ERROR: ").strip() for line in said.splitlines() if line.startswith("ERROR: ")]
    return errors[-1] if errors else (said.strip().splitlines() or ["pip failed and said nothing"])[-1]


def resolve(python: Path, wanted: Sequence[str], report: Path) -> dict[str, str]:
    """Return what pip would install, by name. Raises UnresolvedError where nothing fits together."""
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "-qq",
        "--dry-run",
        "--ignore-installed",
        "--report",
        str(report),
    ]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnresolvedError(why(done.stderr))
    found = json.loads(report.read_text())["install"]
    return {_plain(one["metadata"]["name"]): one["metadata"]["version"] for one in found}


def main() -> int:
    """Resolve, print what changed, install beside and test unless only resolving; return the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=HOUSE / "build" / "newest", help="environment, report")
    arguments.add_argument("--resolve", action="store_true", help="install nothing")
    given = arguments.parse_args()
    out, python = given.out.resolve(), given.out.resolve() / "bin" / "python"
    if not python.exists():
        venv.create(out, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qq", "--upgrade", "pip>=25.1"], check=True)
    try:
        resolved = resolve(python, requirements(), out / "report.json")
    except UnresolvedError as error:
        print(f"newest: nothing fits together: {error}", file=sys.stderr)
        return 1
    changed = changes(resolved, pinned(CONSTRAINTS.read_text()))
    print(f"{len(resolved)} packages, {len(changed)} other than tested:", *changed, sep="\n")
    if given.resolve:
        return 0
    exact = [f"{name}=={version}" for name, version in resolved.items()]
    subprocess.run([str(python), "-m", "pip", "install", "-qq", *exact], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-qq", "--no-deps", "-e", str(HOUSE)], check=True)
    subprocess.run([str(python), "-m", "pip", "uninstall", "-qq", "-y", *CUDA_BUILDS], check=True)
    tests = [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadscope", "-m", "not slow and not gpu"]
    done = subprocess.run(tests, cwd=HOUSE, capture_output=True, text=True, check=False)
    broken = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(*broken, (done.stdout.splitlines() or ["no test ran"])[-1], sep="\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
