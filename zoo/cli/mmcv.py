"""`zoo install-mmcv`: the compiled part of mmsegmentation, which has no wheels for newer torch.

Its source package asks for a compiler of C++17, torch's headers for one of C++20; and its build asks for a setuptools that still
has pkg_resources. So the source is unpacked, those flags are changed, and it is built with tools of its own in a temporary
folder. What comes out is kept, and installed again from there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.common import bars, console
from zoo.errors import MissingPackageError, SaveError, ZooError

VERSION = "2.1.0"  # the newest that mmsegmentation 1.2 takes
TOOLS = ("setuptools<80", "wheel", "ninja")
FLAGS = re.compile(r"([-/]std[=:]c\+\+)1[47]")
STEP = re.compile(r"\[(\d+)/(\d+)\]")
PROGRAM = "#include <compare>\n#include <Python.h>\nint main() { return (1 <=> 2) < 0 ? 0 : 1; }\n"
BYTES_OF_A_JOB = 2 * 10**9
CHECK = "import mmcv.ops, mmseg, mmengine; print(mmcv.__version__, mmseg.__version__, mmengine.__version__)"


class BuildError(ZooError):
    """A build from source failed."""


def install_mmcv(
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Files compiled at once; default: as cores and memory allow.")
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="Folder that keeps what was built; default: ~/.cache/adapter-zoo/wheels.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Build even if it is there.")] = False,
) -> None:
    """Build mmcv and install it here, for mmsegmentation (pip install 'adapter-zoo[seg]' comes first).

    It compiles some 80 files for this torch, each about half a minute of one core. Operations are built for the CPU; the decode
    heads FCN, SegFormer and UPerNet need none of them, and run on a GPU as well.

    \b
      pip install 'adapter-zoo[seg]'
      zoo install-mmcv
    """
    out = console()
    if not again and (found := installed()) is not None:
        out.print(f"mmcv, mmseg and mmengine work together here: {found}", markup=False)
        return
    check_packages()
    kept = (wheels or Path("~/.cache/adapter-zoo/wheels")).expanduser() / _for_this_torch()
    wheel = next(iter(sorted(kept.glob(f"mmcv-{VERSION}-*.whl"))), None)
    if wheel is None or again:
        check_compiler()
        wheel = build(kept, jobs or default_jobs())
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--force-reinstall", str(wheel)], kept / "install.log")
    found = installed(loud=True)
    out.print(f"mmcv, mmseg and mmengine work together here: {found}", markup=False)


def installed(loud: bool = False) -> str | None:
    """The versions, if all three can be imported, in a process of its own; None if not.

    Raises:
        BuildError: they cannot, and it should be told (`loud`).
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip().splitlines()[-1]
    if not loud:
        return None
    reason = (done.stderr.strip().splitlines() or ["no reason is given"])[-1]
    more = ""
    if "libGL" in reason or "libgthread" in reason:
        more = " This machine has no display libraries: pip uninstall -y opencv-python; pip install opencv-python-headless."
    raise BuildError(f"mmcv is installed, and cannot be imported: {reason}.{more}")


def check_packages() -> None:
    """Raise MissingPackageError for what must be there before."""
    missing = [name for name in ("mmengine", "mmseg", "ftfy", "regex") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"The package '{missing[0]}' is not installed. Install the rest first: pip install 'adapter-zoo[seg]'"
        )
    if importlib.util.find_spec("pip") is None:
        raise MissingPackageError(
            "This environment has no pip, which builds the package: python -m ensurepip (of uv: uv pip install pip)."
        )


def check_compiler() -> str:
    """The compiler, after it has compiled a few lines of C++20 against Python's headers.

    Raises:
        MissingPackageError: there is none, or it is too old, or Python's headers are missing.
    """
    if sys.platform == "win32":
        raise MissingPackageError(
            "mmcv is not built on Windows here. Use WSL, or a wheel of OpenMMLab's for an older torch."
        )
    named = os.environ.get("CXX")
    found = next((c for c in ([named] if named else ["c++", "g++", "clang++"]) if shutil.which(c.split()[0])), None)
    how = (
        "xcode-select --install"
        if sys.platform == "darwin"
        else "apt install g++ python3-dev (Debian, Ubuntu), dnf install gcc-c++ python3-devel (Fedora)"
    )
    if found is None:
        what = (
            f"CXX names '{named}', which is not there"
            if named
            else "No C++ compiler (c++, g++, clang++) is on the path"
        )
        raise MissingPackageError(
            f"{what}, and mmcv has no wheel for this torch: it has to be compiled. Install one: {how}. Without it everything but "
            "mmsegmentation works: zoo.fit(task='segment') has a head of its own (head='dense')."
        )
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "try.cpp"
        source.write_text(PROGRAM)
        include = sysconfig.get_paths()["include"]
        command = [*found.split(), "-std=c++20", f"-I{include}", "-c", str(source), "-o", str(Path(place) / "try.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        line = next((x for x in done.stderr.splitlines() if "error" in x.lower()), "no reason is given")
        raise MissingPackageError(
            f"The compiler '{found}' does not compile C++20 against Python's headers: {line.strip()[:200]}. torch needs GCC 11, "
            f"Clang 14 or newer, and {include}/Python.h: {how}."
        )
    return found


def default_jobs() -> int:
    """As many as there are cores, if each can have two gigabytes."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = BYTES_OF_A_JOB
    return max(1, min(os.cpu_count() or 1, memory // BYTES_OF_A_JOB))


def _for_this_torch() -> str:
    """A folder's name that no other torch or Python shares."""
    from importlib.metadata import version

    return f"torch-{version('torch')}-py{sys.version_info[0]}{sys.version_info[1]}".replace("+", "-")


def build(kept: Path, jobs: int) -> Path:
    """Compile it; the wheel lies in `kept`.

    Raises:
        BuildError: pip or the compiler failed; the log is named. SaveError: the folder cannot be made.
    """
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"'{kept}' cannot be made: {error.strerror}. Name another folder with --wheels.") from error
    log = kept / "build.log"
    with tempfile.TemporaryDirectory() as temporary, bars(console(stderr=True)) as bar:
        task = bar.add_task(f"getting mmcv {VERSION} and what builds it", total=None)
        place, pip = Path(temporary), [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        tools = place / "tools"
        run([*pip, "install", "--target", str(tools), *TOOLS], log)
        known = os.pathsep.join(filter(None, [str(tools), os.environ.get("PYTHONPATH")]))
        environment = {
            **os.environ,
            "PYTHONPATH": known,
            "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
            "MMCV_WITH_OPS": "1",
            "FORCE_CUDA": "0",
            "CUDA_VISIBLE_DEVICES": "",  # where torch sees a GPU, it would ask for nvcc
            "MAX_JOBS": str(jobs),
            "CFLAGS": os.environ.get("CFLAGS", "-DNDEBUG -O2 -g0 -fwrapv -fPIC -Wno-deprecated-declarations"),
        }
        source = f"mmcv=={VERSION}"
        get = [*pip, "download", "--no-deps", "--no-binary", "mmcv", "--no-build-isolation", source, "-d", str(place)]
        run(get, log, environment)
        unpacked = patched(unpack(place))

        def seen(line: str) -> None:
            if step := STEP.search(line):
                done, total = int(step[1]), int(step[2])
                bar.update(task, completed=done, total=total, description=f"compiling ({jobs} at once)")
                if not bar.console.is_terminal and done % 10 == 0:  # a log shows no bar
                    bar.console.print(f"compiled {done} of {total}")

        make = [*pip, "wheel", "-v", "--no-build-isolation", "--no-deps", str(unpacked), "-w", str(place / "made")]
        run(make, log, environment, seen)
        (made,) = (place / "made").glob("mmcv-*.whl")
        wheel = kept / made.name
        shutil.copyfile(made, wheel.with_suffix(".part"))
        os.replace(wheel.with_suffix(".part"), wheel)
    return wheel


def unpack(place: Path) -> Path:
    """The folder of the source package that was downloaded."""
    (archive,) = place.glob("mmcv-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(place, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # type: ignore[arg-type]
    return place / archive.name.removesuffix(".tar.gz")


def patched(folder: Path) -> Path:
    """The same folder, whose compilers are asked for C++20, as torch's headers are written in."""
    file = folder / "setup.py"
    text = file.read_text(encoding="utf-8")
    changed, count = FLAGS.subn(r"\g<1>20", text)
    if not count:
        raise BuildError(
            f"mmcv's setup.py asks for no C++ standard as version {VERSION} did; this command does not know it."
        )
    file.write_text(changed, encoding="utf-8")
    return folder


def run(
    command: list[str],
    log: Path,
    environment: dict[str, str] | None = None,
    seen: Callable[[str], None] | None = None,
) -> None:
    """Run a command, its output into a log, each line shown to `seen`.

    Raises:
        BuildError: it failed; with the line that says why, and where the log is.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: deque[str] = deque(maxlen=2001)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            lines.append(line)
            if seen is not None:
                seen(line)
    if process.returncode:
        marks = ("error:", "ERROR", "Killed", "No space left", "internal compiler error")
        reason = next(
            (x.strip() for x in lines if any(m in x for m in marks)), lines[-1].strip() if lines else "no output"
        )
        memory = (
            " The memory did not suffice: try --jobs 1." if "Killed" in reason or "internal compiler" in reason else ""
        )
        raise BuildError(f"{' '.join(command[1:5])} failed: {reason[:300]}.{memory} All of it is in {log}.")
