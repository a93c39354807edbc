"""Make the locks that `make` installs: exact versions for each Python of pyproject.toml, requirements/lock-py<version>.txt.

    python scripts/lock.py [3.11 ...]        (or: make lock)

The resolver is uv's, in its universal form: one file for all platforms, in which what only some of them need stands behind a
marker (torch's CUDA libraries: Linux on x86_64). A line is dropped if its marker holds on none of `PLATFORMS`, and the marker is
dropped if it holds on all. No index, path or local version label (`+cpu`) gets into a file. An existing lock is not a starting
point: every version is the newest that the ranges of pyproject.toml allow. Run the suite before committing what comes out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parents[1]
PLATFORMS = [
    {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"},
    {"sys_platform": "linux", "platform_machine": "aarch64", "platform_system": "Linux", "os_name": "posix"},
    {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin", "os_name": "posix"},
    {"sys_platform": "win32", "platform_machine": "AMD64", "platform_system": "Windows", "os_name": "nt"},
]
EXTRAS = ("demo", "dev", "seg")
LINE = re.compile(r"([\w.\[\],-]+)==([\w.!]+)(?:\s*;\s*(.+))?")


def pythons() -> list[str]:
    """The Python versions of pyproject.toml's classifiers."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)


def resolve(version: str) -> str:
    """uv's answer for all extras that `make` installs.

    Raises:
        RuntimeError: no versions fit together; with uv's explanation.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lock.txt"
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"]
        command += [word for extra in EXTRAS for word in ("--extra", extra)]
        options = ["--universal", "--python-version", version, "--no-annotate", "--no-header", "--no-emit-index-url"]
        place = ["--no-config", "--quiet", "--output-file", str(out)]
        done = subprocess.run([*command, *options, *place], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return out.read_text(encoding="utf-8")


def lines(resolved: str, version: str) -> list[str]:
    """The lines of a lock.

    Raises:
        RuntimeError: a line that is no exact version of a package.
    """
    places = [{**p, "python_version": version, "python_full_version": f"{version}.99"} for p in PLATFORMS]
    found = []
    for line in filter(None, (text.strip() for text in resolved.splitlines())):
        match = LINE.fullmatch(line)
        if match is None:
            raise RuntimeError(f"'{line}' is no exact version that everybody can install.")
        name, exact, marker = match.groups()
        holds = [marker is None or Marker(marker).evaluate(place) for place in places]
        if all(holds):
            found.append(f"{name}=={exact}")
        elif any(holds):
            found.append(f"{name}=={exact} ; {marker}")
    return found


def main(wanted: list[str]) -> int:
    """Write the locks; a Python for which there is none is named, and installs by the ranges."""
    missing = 0
    for version in wanted or pythons():
        path = ROOT / "requirements" / f"lock-py{version.replace('.', '')}.txt"
        try:
            found = lines(resolve(version), version)
        except RuntimeError as error:
            print(f"{version}: no lock. {error}", file=sys.stderr)
            path.unlink(missing_ok=True)
            missing += 1
            continue
        path.parent.mkdir(exist_ok=True)
        head = f"# What `make` installs on Python {version}. Made by `make lock`; see scripts/lock.py.\n"
        path.write_text(head + "\n".join(found) + "\n", encoding="utf-8")
        print(f"{version}: {len(found)} packages in {path.relative_to(ROOT)}")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
