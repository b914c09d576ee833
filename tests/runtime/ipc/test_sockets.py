from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagoda_runtime.errors import FatalError
from pagoda_runtime.ipc.sockets import SocketFolder, remove_abandoned

HOLDER = (
    "import time; from pagoda_runtime.ipc.sockets import SocketFolder;"
    "folder = SocketFolder(); print(folder.path, flush=True); time.sleep(60)"
)
LATER = 3600.0


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_the_folder_of_a_killed_process_goes_at_the_next_start_and_no_living_ones(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None
    folder = Path(holder.stdout.readline().strip())
    assert folder.parent == tmp_path
    try:
        remove_abandoned(tmp_path, time.time() + LATER)
        assert folder.exists()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    # Another process may be about to lock a young one.
    remove_abandoned(tmp_path, time.time())
    assert folder.exists()
    os.utime(folder, (0, 0))
    own = SocketFolder()
    assert not folder.exists()
    own.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_folders_of_other_users_and_files_stay(tmp_path):
    theirs, link = tmp_path / "pagoda-engine-theirs", tmp_path / "pagoda-engine-link"
    theirs.mkdir()
    os.chown(theirs, 65532, 65532)
    link.symlink_to(theirs)
    remove_abandoned(tmp_path, time.time() + LATER)
    assert sorted(tmp_path.iterdir()) == [link, theirs]


def test_a_place_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(FatalError, match="TMPDIR") as caught:
        SocketFolder()
    assert caught.value.reason == "DiskFull"
