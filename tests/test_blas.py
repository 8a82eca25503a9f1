"""No BLAS is trusted that was not proved on this CPU. Each library here is a real shared object."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mlxq.machine import blas_proof
from mlxq.machine.blas_library import MLX_ROUTINES, _symbol_table
from mlxq.machine.blas_proof import Verdict, prove, verdict
from mlxq.machine.versions import installed_version
from tests.shared_objects import (
    SUPPORTED,
    defined_symbols,
    processor,
    undefined_symbols,
    write_changed,
    write_library,
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not SUPPORTED or installed_version("mlx-cpu") is None,
    reason="only the Linux CPU wheel of MLX carries a reference BLAS",
)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person may have set for their own runs would choose other libraries and kernels."""
    for name in ("MLXQ_BLAS", "OPENBLAS_CORETYPE", "LD_LIBRARY_PATH", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)


def wheel_library() -> Path:
    """The library of the installed package."""
    spec = find_spec("scipy_openblas32")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs scipy-openblas32")
    return next(Path(spec.submodule_search_locations[0], "lib").resolve().glob("libscipy_openblas*.so"))


def run(code: str, cache: Path, **environment: str) -> Any:
    """What ``code`` prints last, as JSON, in a process that has not imported MLX yet."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MLXQ_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


CHOOSE = f"""
import ctypes, dataclasses, json, sys
from mlxq.machine import blas
info = blas.load_blas()
early = "mlx.core" in sys.modules
import mlx.core as mx
address = lambda library, name: ctypes.cast(getattr(library, name, None), ctypes.c_void_p).value
ours, everyones = ctypes.CDLL(info.path), ctypes.CDLL(None)
# The symbols that answer for the whole process, as MLX's libraries see them.
reached = [address(everyones, n) in (address(ours, n), address(ours, "scipy_" + n)) for n in {MLX_ROUTINES}]
a = mx.arange(12, dtype=mx.float32).reshape(3, 4)
print(json.dumps({{**dataclasses.asdict(info), "early": early, "product": (a @ a.T).tolist(),
                  "reached": all(reached), "again": blas.load_blas() == info}}))
"""
PRODUCT = [[14.0, 38.0, 62.0], [38.0, 126.0, 214.0], [62.0, 214.0, 366.0]]


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    """Where a library lies that stands first, as the installed package's would."""
    folder = tmp_path / "site" / "scipy_openblas32" / "lib"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('the package must not be imported')")
    return folder / "libscipy_openblas.so"


def test_every_routine_that_mlx_takes_is_known() -> None:
    spec = find_spec("mlx")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    carried = [f for f in (folder.parent / "mlx_cpu.libs").iterdir() if f.name.startswith(("libblas", "liblapack"))]
    assert len(carried) == 2
    given = set().union(*map(defined_symbols, carried))
    assert undefined_symbols(folder / "lib" / "libmlx.so") & given == set(MLX_ROUTINES)


def test_mlx_computes_with_the_packaged_library(tmp_path: Path) -> None:
    found = run(CHOOSE, tmp_path)
    assert (found["name"], found["path"], found["passed_over"]) == ("OpenBLAS", str(wheel_library()), [])
    assert found["kernel"]
    assert found["reached"]
    assert not found["early"]
    assert found["product"] == PRODUCT
    assert found["again"]


def test_where_the_system_gives_no_memory_file_a_temporary_one_serves(tmp_path: Path) -> None:
    wheel_library()
    found = run("import os\ndel os.memfd_create\n" + CHOOSE, tmp_path / "cache", TMPDIR=str(tmp_path))
    assert found["reached"]
    assert [left.name for left in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("what_they_do", "why"),
    [
        ("crash", "crashes on this CPU (SIGILL)"),
        ("nothing", "computes a product of 5x7 and 7x3 wrong"),
        ("hang", "hangs: it had not finished a few small matrices after 5 s"),
    ],
)
def test_a_library_that_fails_is_found_out(
    tmp_path: Path, what_they_do: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas_proof, "TIME_LIMIT_S", 5 if what_they_do == "hang" else 60)
    library = write_library(tmp_path / "libopenblas.so", MLX_ROUTINES, what_they_do)
    assert prove(library) == Verdict(why)


def test_a_library_that_lacks_a_routine_is_found_out(tmp_path: Path) -> None:
    library = write_library(tmp_path / "libopenblas.so", MLX_ROUTINES[:-5], "nothing")
    assert prove(library) == Verdict("lacks dsyevd_, cheevd_, sgeev_ and 2 more routines, which MLX needs")


def test_why_a_library_does_not_load_may_lie_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    found = prove(tmp_path / "text.so")
    assert (found.fault or "").startswith("does not load: ")
    assert not found.lasting


def test_a_real_library_with_one_wrong_routine_is_found_out(tmp_path: Path) -> None:
    # A Cholesky factor that is the product of a triangle with itself: same arguments, other numbers.
    changed = write_changed(tmp_path / "openblas.so", wheel_library(), "scipy_spotrf_", now="scipy_slauum_")
    assert prove(changed) == Verdict("computes a Cholesky factor wrong")
    # The same way to change a library, with a routine that does the same.
    same = write_changed(tmp_path / "same.so", wheel_library(), "scipy_spotrf_", now="scipy_spotrf2_")
    assert prove(same) == Verdict(None)


def test_the_next_library_is_tried_and_the_run_goes_on(tmp_path: Path, packaged: Path) -> None:
    write_library(packaged, MLX_ROUTINES, "crash")
    second = tmp_path / "lib" / "libopenblas.so.0"
    second.parent.mkdir()
    shutil.copy(wheel_library(), second)
    environment = {"PYTHONPATH": str(packaged.parents[2]), "LD_LIBRARY_PATH": str(second.parent)}
    for _ in range(2):  # proved, then remembered
        found = run(CHOOSE, tmp_path / "cache", **environment)
        assert found["path"] == str(second)
        assert found["passed_over"] == [{"library": str(packaged), "why": "crashes on this CPU (SIGILL)"}]
        assert found["reached"]
        assert found["product"] == PRODUCT


def test_where_none_works_mlx_keeps_its_own(tmp_path: Path, packaged: Path) -> None:
    write_library(packaged, MLX_ROUTINES, "nothing")
    without = "from mlxq.machine import blas\nblas._FOLDERS = ()\n"
    found = run(without + CHOOSE, tmp_path, PYTHONPATH=str(packaged.parents[2]))
    assert (found["name"], found["path"], len(found["passed_over"])) == ("built in", None, 1)
    assert found["product"] == PRODUCT


def cannot_prove(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a proof fails, and says so; what is remembered does not."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_verdict_is_remembered_until_something_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = tmp_path / "good.so", write_library(tmp_path / "bad.so", MLX_ROUTINES, "nothing")
    shutil.copy(wheel_library(), good)
    wrong = Verdict("computes a product of 5x7 and 7x3 wrong")
    assert [verdict(good), verdict(bad)] == [Verdict(None), wrong]
    with monkeypatch.context() as later:
        cannot_prove(later)
        assert [verdict(good), verdict(bad)] == [Verdict(None), wrong]
        later.setenv("OPENBLAS_CORETYPE", "Nehalem")
        assert "could not be tried" in (verdict(good).fault or "")
    # Other bytes of the same size, dated back.
    state = good.stat()
    with good.open("r+b") as file:
        file.write(bad.read_bytes())
    os.utime(good, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (good.stat().st_size, good.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert verdict(good) == wrong


def test_a_failure_is_believed_for_a_day(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = write_library(tmp_path / "bad.so", MLX_ROUTINES, "nothing")
    found = verdict(bad)
    ((key, kept),) = json.loads((cache / "blas.json").read_text()).items()
    cannot_prove(monkeypatch)
    assert verdict(bad) == found
    (cache / "blas.json").write_text(json.dumps({key: {**kept, "at": kept["at"] - 2 * 86400}}))
    assert "could not be tried" in (verdict(bad).fault or "")


@pytest.mark.parametrize("damage", ["", "{", "[]", '"KEY"', '{"KEY": null}', '{"KEY": {"fault": null}}', "[" * 100_000])
def test_what_is_damaged_is_not_believed(
    tmp_path: Path, cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = write_library(tmp_path / "bad.so", MLX_ROUTINES, "nothing")
    found = verdict(bad)
    kept = cache / "blas.json"
    whole = json.loads(kept.read_text())
    kept.write_text(damage.replace("KEY", next(iter(whole))))
    assert verdict(bad) == found
    assert json.loads(kept.read_text()).keys() == whole.keys()


def test_without_a_cache_that_can_be_written_it_is_proved_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "file" / "cache"))
    bad = write_library(tmp_path / "bad.so", MLX_ROUTINES, "nothing")
    assert verdict(bad) == verdict(bad) == Verdict("computes a product of 5x7 and 7x3 wrong")


def test_two_runs_at_once_both_choose(tmp_path: Path) -> None:
    wheel_library()
    environment = {**os.environ, "MLXQ_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", CHOOSE], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [json.loads(one.communicate()[0])["reached"] for one in both] == [True, True]
    assert [left.name for left in tmp_path.iterdir()] == ["blas.json"]
    assert len(json.loads((tmp_path / "blas.json").read_text())) == 1


def mlxq(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlxq", *arguments],
        env={**os.environ, "MLXQ_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
    )


def test_env_shows_library_kernel_speed_and_what_was_passed_over(tmp_path: Path, packaged: Path) -> None:
    write_library(packaged, MLX_ROUTINES, "crash")
    second = tmp_path / "libopenblas.so.0"
    shutil.copy(wheel_library(), second)
    environment = {"PYTHONPATH": str(packaged.parents[2]), "LD_LIBRARY_PATH": str(tmp_path), "COLUMNS": "400"}
    blas = json.loads(mlxq("env", "--json", cache=tmp_path / "cache", **environment).stdout)["blas"]
    assert blas["path"] == str(second)
    assert blas["kernel"]
    assert blas["gflops"] > 0
    assert blas["passed_over"] == [{"library": str(packaged), "why": "crashes on this CPU (SIGILL)"}]
    shown = " ".join(mlxq("env", cache=tmp_path / "cache", **environment).stdout.split())
    for expected in (blas["path"], blas["kernel"], "GFLOP/s", "crashes on this CPU (SIGILL)"):
        assert expected in shown


def test_mlxq_blas_overrides(tmp_path: Path) -> None:
    library = tmp_path / "mine.so"
    shutil.copy(wheel_library(), library)
    (tmp_path / "link.so").symlink_to(library)
    assert run(CHOOSE, tmp_path, MLXQ_BLAS=str(tmp_path / "link.so"))["path"] == str(library)
    found = run(CHOOSE, tmp_path, MLXQ_BLAS="none")
    assert (found["path"], found["passed_over"], found["product"]) == (None, [], PRODUCT)


def test_mlxq_blas_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    write_library(tmp_path / "bad.so", MLX_ROUTINES, "crash")
    for asked, why in (
        (str(tmp_path / "bad.so"), "crashes on this CPU (SIGILL)"),
        (str(tmp_path / "gone.so"), "no such file"),
        (__file__, "does not load: "),
    ):
        done = mlxq("env", cache=tmp_path / "cache", MLXQ_BLAS=asked)
        assert (done.returncode, done.stdout) == (2, "")
        error, hint = done.stderr.splitlines()
        assert error.startswith(f"error: MLXQ_BLAS={asked}: {why}")
        assert "MLXQ_BLAS=none" in hint


def test_a_blas_that_the_process_was_started_with_stays(tmp_path: Path) -> None:
    library = write_library(tmp_path / "preloaded.so", ("cblas_sgemm",), "nothing")
    found = run(CHOOSE, tmp_path, LD_PRELOAD=str(library))
    assert (found["name"], found["path"]) == ("preloaded", None)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("qemu-x86_64") is None, reason="needs an emulator of x86-64"
)
def test_on_a_cpu_without_avx512_the_library_chooses_other_kernels(tmp_path: Path) -> None:
    wheel_library()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec qemu-x86_64 -cpu Haswell {os.path.realpath(sys.executable)} "$@"\n')
    python.chmod(0o755)
    start = f"import sys\nsys.path[:] = {sys.path}\nsys.executable = {str(python)!r}\n"
    patient = "from mlxq.machine import blas_proof\nblas_proof.TIME_LIMIT_S = 120\n"
    done = subprocess.run(
        [python, "-c", start + patient + CHOOSE],
        env={**os.environ, "MLXQ_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["kernel"], found["passed_over"], found["product"]) == ("Haswell", [], PRODUCT)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pip") is None, reason="needs pip")
def test_the_wheel_for_arm64_has_every_routine_that_mlx_takes_there(tmp_path: Path) -> None:
    tags = [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in (27, 28, 35)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *tags),
            *("--dest", str(tmp_path), "scipy-openblas32", "mlx-cpu"),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no package index at hand: {done.stderr.strip().splitlines()[-1]}")
    for wheel in tmp_path.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path)
    library, mlx = tmp_path / "scipy_openblas32/lib/libscipy_openblas.so", tmp_path / "mlx/lib/libmlx.so"
    assert [processor(library), processor(mlx)] == [183, 183]
    assert {f"scipy_{name}" for name in MLX_ROUTINES} <= defined_symbols(library)
    carried = [*(tmp_path / "mlx_cpu.libs").glob("libblas*"), *(tmp_path / "mlx_cpu.libs").glob("liblapack*")]
    assert undefined_symbols(mlx) & set().union(*map(defined_symbols, carried)) == set(MLX_ROUTINES)
    table = tmp_path / "table.so"
    table.write_bytes(_symbol_table(dict.fromkeys(MLX_ROUTINES, 1 << 40), library.read_bytes()[:64]))
    assert processor(table) == 183
