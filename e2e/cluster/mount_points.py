"""Empty folders that our mounts need to lie upon, and their removal when nothing lies there."""

from __future__ import annotations

from pathlib import Path


def make(folder: Path, record: Path) -> None:
    """Make a mount point where there is none, and write down first that it is ours to remove."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if missing:
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a") as file:
            file.writelines(f"{path}\n" for path in missing)
        folder.mkdir(parents=True)


def remove(record: Path) -> None:
    """Remove what `make` made and wrote down; what somebody has put something into stays."""
    if not record.exists():
        return
    for line in record.read_text().splitlines():
        try:
            Path(line).rmdir()
        except OSError:
            continue
    record.unlink()
