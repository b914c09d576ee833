"""Kernels in files: real ones, and what a full disk, a killed process or a neighbour leaves."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from pathlib import Path

import pytest

from pagoda_kernels.cpu import cache
from pagoda_kernels.cpu.cache import cache_folder, kernels_digest, read_kernel, write_kernel
from pagoda_kernels.cpu.compiled import Kernel

OTHER_USER = 65532


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path))
    cache.log_once.cache_clear()


def make_double():
    """A kernel that nothing was compiled for yet in this process."""

    def double(x: int) -> int:
        return 2 * x

    return Kernel(double)


def num_compiled(double) -> int:
    return sum(double.dispatcher.stats.cache_misses.values())


def kept_file() -> Path:
    (file,) = cache_folder().iterdir()
    return file


def test_a_kernel_is_compiled_once_for_all_processes():
    assert make_double()(21) == 42
    again = make_double()
    assert again(21) == 42
    assert num_compiled(again) == 0


def test_a_kernel_that_was_compiled_ahead_is_not_compiled_again(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "AHEAD_FOLDER", tmp_path)
    make_double()(1)
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "own"))
    again = make_double()
    assert again(21) == 42
    assert num_compiled(again) == 0
    assert not (tmp_path / "own").exists()


def test_the_folder_is_made_for_its_owner_alone():
    make_double()(1)
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    assert kept_file().stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: whole[: len(whole) // 2], lambda whole: whole[::-1]],
    ids=["empty", "truncated", "scrambled"],
)
def test_a_damaged_file_is_made_anew_with_one_warning_that_names_the_folder(damage, caplog):
    make_double()(1)
    file = kept_file()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING, "pagoda.kernels"):
        again = make_double()
        assert again(21) == 42
        assert num_compiled(again) == 1
        read_kernel(cache_folder(), file.name)
        file.write_bytes(b"")
        read_kernel(cache_folder(), file.name)
    (record,) = caplog.records
    assert f"Damaged files of compiled kernels in {cache_folder()}" in record.message
    make_double()(1)
    assert read_kernel(cache_folder(), file.name) is not None


def test_a_full_disk_leaves_no_half_file_and_one_warning(caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING, "pagoda.kernels"):
        # The writes of this process fail beyond 100 bytes, as they do where no room is left.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            first, second = make_double(), make_double()
            assert first(21) == second(21) == 42
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (record,) = caplog.records
    assert f"cannot be kept in {cache_folder()}" in record.message
    assert list(cache_folder().iterdir()) == []


def test_a_kernel_is_compiled_where_no_folder_can_be_made(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "file"))
    assert make_double()(21) == 42
    assert f"cannot be kept in {cache_folder()}: Not a directory" in caplog.text


def test_a_folder_that_others_can_write_to_is_not_used(caplog):
    make_double()(1)
    file = kept_file()
    cache_folder().chmod(0o777)
    again = make_double()
    assert again(21) == 42
    assert num_compiled(again) == 1
    assert f"The compiled kernels in {cache_folder()} are not used: others may write" in caplog.text
    cache_folder().chmod(0o755)
    assert read_kernel(cache_folder(), file.name) is not None
    file.chmod(0o666)
    assert read_kernel(cache_folder(), file.name) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_what_another_user_put_there_is_not_used(caplog):
    make_double()(1)
    file = kept_file()
    os.chown(file, OTHER_USER, OTHER_USER)
    assert read_kernel(cache_folder(), file.name) is None
    os.chown(file, 0, 0)
    os.chown(cache_folder(), OTHER_USER, OTHER_USER)
    assert read_kernel(cache_folder(), file.name) is None
    before = file.stat().st_mtime_ns
    assert num_compiled_after_call() == 1
    assert file.stat().st_mtime_ns == before


def num_compiled_after_call() -> int:
    double = make_double()
    assert double(21) == 42
    return num_compiled(double)


def test_kernels_are_kept_by_the_contents_of_all(monkeypatch, tmp_path):
    kept = cache_folder()
    assert kept.parent == tmp_path / "kernels"
    copies = tmp_path / "source"
    shutil.copytree(Path(cache.__file__).parent, copies)
    (copies / "rms_norm.py").write_text("# another kernel")
    monkeypatch.setattr(cache, "__file__", copies / "cache.py")
    kernels_digest.cache_clear()
    try:
        assert cache_folder() != kept
    finally:
        kernels_digest.cache_clear()


def test_a_written_file_can_be_read_and_no_other(tmp_path):
    folder = tmp_path / "kernels" / "x"
    write_kernel(folder, "a", b"content")
    assert read_kernel(folder, "a") == b"content"
    assert read_kernel(folder, "b") is None
    assert read_kernel(tmp_path / "missing", "a") is None
