"""Run the suite on the newest releases of everything, and report what broke: what `make latest` does.

    python scripts/latest.py [--workers 2] [pytest arguments]        (in an environment of its own, which it fills)

The ranges of pyproject.toml end behind what was run; here their upper ends are left out, so that a release of somebody else
is met here and not by a newcomer. It prints which packages lie beyond the ranges and which tests fail with them. When all pass,
the upper ends move there, `make lock` follows, and README's line of versions. torch and torchvision are released as pairs, and
the newest of both need not be one: then torch is held at the newest that goes with the newest torchvision, and that is said.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("demo", "data", "multimodal", "audio", "export", "trackers", "dev")  # what `make test` installs
BY_DESIGN = "tests/house/test_lock.py::test_this_environment_is_within_the_ranges"


def asked() -> list[Requirement]:
    """What pyproject.toml asks for, with its ranges; each package once."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found: dict[str, Requirement] = {}
    for section in ("dependencies", *EXTRAS):
        match = re.search(rf"^{section} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
        if match is None:
            raise RuntimeError(f"pyproject.toml has no list '{section}'.")
        for one in map(Requirement, re.findall(r'"([^"]+)"', match[1])):
            if one.name != "adapter-zoo":
                before = found.get(one.name)
                found[one.name] = (
                    one if before is None else Requirement(f"{one.name}{one.specifier & before.specifier}")
                )
    return list(found.values())


def open_ended(requirement: Requirement) -> str:
    """The requirement without its upper ends."""
    kept = [str(s) for s in requirement.specifier if s.operator not in ("<", "<=", "==", "~=")]
    return f"{requirement.name}{SpecifierSet(','.join(kept))}"


def pip(*arguments: str) -> None:
    """Install with pip into this environment."""
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments], check=True
    )


def install() -> str:
    """Fill this environment; returns what was held back, or ""."""
    wanted = [open_ended(r) for r in asked()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "newest.txt"
        file.write_text("\n".join(wanted) + "\n", encoding="utf-8")
        pip("--upgrade", "--upgrade-strategy", "eager", "-r", str(file))
    pip("--no-deps", "--editable", str(ROOT))
    pair = [sys.executable, str(ROOT / "scripts" / "check_install.py")]
    if subprocess.run(pair).returncode == 0:
        return ""
    newest = _installed("torch")
    held = next(r for r in asked() if r.name == "torch")
    pip(f"torch{held.specifier}", "torchvision")
    subprocess.run(pair, check=True)
    return f"torch {newest} and the newest torchvision do not work together; torch {_installed('torch')} was taken."


def _installed(name: str) -> str:
    """The version in this environment, asked anew: it changes under this process."""
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def beyond() -> list[tuple[str, str, str]]:
    """(package, range, version) of what lies beyond the ranges."""
    found = []
    for requirement in asked():
        try:
            have = version(requirement.name).partition("+")[0]
        except PackageNotFoundError:
            have = "missing"
        if have == "missing" or not requirement.specifier.contains(have, prereleases=True):
            found.append((requirement.name, str(requirement.specifier), have))
    return found


def failures(report: Path) -> Counter[str]:
    """How many tests of each file failed, from pytest's JUnit report."""
    found: Counter[str] = Counter()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            found[str(case.get("classname"))] += 1
    return found


def main(arguments: list[str]) -> int:
    """Install, run, report; the exit code is pytest's."""
    workers = "2"
    if arguments[:1] == ["--workers"]:
        workers, arguments = arguments[1], arguments[2:]
    held = install()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", workers, "--deselect", BY_DESIGN, f"--junitxml={report}"]
        code = subprocess.run([*command, *arguments], cwd=ROOT).returncode
        broken = failures(report) if report.is_file() else Counter()
    print("\nThe newest releases, run now:")
    names = ("torch", "torchvision", "timm", "transformers", "diffusers", "open_clip_torch", "peft", "huggingface_hub")
    print("  " + ", ".join(f"{name} {version(name)}" for name in names))
    if held:
        print("  " + held)
    for name, allowed, have in beyond():
        print(f"  beyond the range: {name} {have} (pyproject.toml: {allowed})")
    if not beyond():
        print("  every one lies within the ranges of pyproject.toml")
    for where, number in broken.most_common():
        print(f"  {number} failed in {where}")
    print("  all tests passed" if code == 0 else f"  pytest ended with {code}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
