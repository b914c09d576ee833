"""A GGUF file is converted once, and again when it has changed."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pagoda_runtime.convert import cache
from pagoda_runtime.convert.testing import write_gguf
from pagoda_runtime.errors import FatalError


def converted(path: Path) -> Path:
    return cache.converted(path, keep_blocks=True)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "tiny.gguf", "llama")


def test_whoever_asks_gets_the_folder_of_one_conversion(source, caplog):
    caplog.set_level("INFO")
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(converted, [source] * 4))
    (folder,) = folders
    assert (folder / "config.json").is_file()
    assert (folder / "model.safetensors").is_file()
    assert sum(message.startswith("Converting") for message in caplog.messages) == 1


def test_a_changed_file_is_converted_again_and_its_old_folder_goes(source):
    old = converted(source)
    os.utime(source, (1, 1))
    new = converted(source)
    assert new != old
    assert [path for path in new.parent.iterdir() if path.is_dir()] == [new]


def test_the_folder_of_blocks_is_beside_that_without(source):
    with_blocks = converted(source)
    without = cache.converted(source, keep_blocks=False)
    assert without != with_blocks == converted(source)


def test_a_conversion_that_was_cut_off_is_done_again(source):
    folder = converted(source)
    folder.rename(folder.with_name(folder.name + ".partial"))
    (folder.parent / f"{folder.name}.partial" / "model.safetensors").unlink()
    assert converted(source) == folder
    assert (folder / "model.safetensors").is_file()


def test_a_cache_that_cannot_be_written_is_named(source, tmp_path):
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(FatalError) as caught:
        converted(source)
    assert caught.value.reason == "DiskFull"
    assert "PAGODA_CACHE" in caught.value.message
