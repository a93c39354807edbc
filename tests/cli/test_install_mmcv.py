"""`zoo install-mmcv` up to where the compiler begins: what is missing is told, and what is there is not built again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from zoo.cli import app, mmcv
from zoo.errors import MissingPackageError


def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPackageError, match=r"No C\+\+ compiler.*(apt install g\+\+|xcode-select)"):
        mmcv.check_compiler()
    monkeypatch.setenv("CXX", "clang-77")
    with pytest.raises(MissingPackageError, match="CXX names 'clang-77'"):
        mmcv.check_compiler()


def test_a_compiler_that_cannot_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "old++"
    old.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('x.cpp:1:1: error: unrecognized option -std=c++20')\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(MissingPackageError, match=r"does not compile C\+\+20.*unrecognized option.*GCC 11"):
        mmcv.check_compiler()


def test_packages_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmcv, "installed", lambda loud=False: None)
    monkeypatch.setattr(mmcv.importlib.util, "find_spec", lambda name: None if name == "mmseg" else object())
    result = CliRunner().invoke(app, ["install-mmcv"])
    assert result.exit_code == 1 and "'mmseg' is not installed" in " ".join(result.output.split())


def test_what_works_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmcv, "installed", lambda loud=False: "2.1.0 1.2.2 0.10.7")
    result = CliRunner().invoke(app, ["install-mmcv"])
    assert result.exit_code == 0 and "2.1.0 1.2.2 0.10.7" in result.output


def test_a_wheel_that_was_kept_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[Any] = []
    answers = iter([None, "2.1.0 1.2.2 0.10.7"])
    monkeypatch.setattr(mmcv, "installed", lambda loud=False: next(answers))
    monkeypatch.setattr(mmcv, "check_packages", lambda: None)
    monkeypatch.setattr(mmcv, "run", lambda command, log: called.append(command))
    monkeypatch.setattr(mmcv, "build", lambda *_: pytest.fail("built again"))
    kept = tmp_path / mmcv._for_this_torch()
    kept.mkdir()
    (kept / "mmcv-2.1.0-cp311-cp311-linux_x86_64.whl").touch()
    result = CliRunner().invoke(app, ["install-mmcv", "--wheels", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert called[0][-1] == str(kept / "mmcv-2.1.0-cp311-cp311-linux_x86_64.whl") and "--no-deps" in called[0]


def test_the_source_is_asked_for_another_standard(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("a = ['-std=c++14']\nb = ['-std=c++17', '/std:c++17']\n")
    mmcv.patched(tmp_path)
    assert (tmp_path / "setup.py").read_text() == "a = ['-std=c++20']\nb = ['-std=c++20', '/std:c++20']\n"
    with pytest.raises(mmcv.BuildError, match="asks for no C"):
        mmcv.patched(tmp_path)


def test_a_build_that_breaks_says_why(tmp_path: Path) -> None:
    script = "print('[3/77] c++ a.cpp'); print('a.cpp:1: error: no such type'); print('more'); raise SystemExit(1)"
    seen: list[str] = []
    with pytest.raises(mmcv.BuildError, match=r"error: no such type.*build.log"):
        mmcv.run([sys.executable, "-c", script], tmp_path / "build.log", seen=seen.append)
    step = mmcv.STEP.search(seen[0])
    assert step and step[1] == "3" and step[2] == "77" and "more" in (tmp_path / "build.log").read_text()
