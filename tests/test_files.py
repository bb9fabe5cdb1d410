"""A file is the old one or the new one, whole, whatever stops the writer."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sgsc.files import write_atomically


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
def test_what_was_written_is_there_and_nothing_else(tmp_path, data):
    write_atomically(tmp_path / "a", b"old")
    write_atomically(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == data
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_the_old_file_survives_an_error_at_any_step(tmp_path, monkeypatch, step, error):
    write_atomically(tmp_path / "a", b"old")
    calls = []

    def fails(*args, **kwargs):
        calls.append(step)
        raise error

    if step == "write":
        real = Path.open

        def open_full(self, *args, **kwargs):
            file = real(self, *args, **kwargs)
            monkeypatch.setattr("sgsc.files.os.fsync", lambda handle: None)
            file.raw.truncate(2)
            return Full(file)

        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *how):
                self.file.close()

            write = fails

        monkeypatch.setattr(Path, "open", open_full)
    elif step == "fsync":
        monkeypatch.setattr("sgsc.files.os.fsync", fails)
    else:
        monkeypatch.setattr(Path, step, fails)
    with pytest.raises(type(error), match="No space" if isinstance(error, OSError) else None):
        write_atomically(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert calls == [step]
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_the_data_is_on_the_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    """Order: write, fsync of the file, rename, fsync of the folder."""
    seen = []
    fsync, replace = os.fsync, Path.replace

    def watch(handle):
        seen.append("folder" if os.path.isdir(f"/dev/fd/{handle}") else "file")  # noqa: PTH112
        fsync(handle)

    monkeypatch.setattr("sgsc.files.os.fsync", watch)
    monkeypatch.setattr(Path, "replace", lambda self, to: (seen.append("rename"), replace(self, to))[1])
    write_atomically(tmp_path / "a", b"new")
    assert seen == ["file", "rename", "folder"]


def test_permissions_are_those_that_the_umask_leaves(tmp_path):
    for mask in (0o022, 0o077, 0o027):
        before = os.umask(mask)
        try:
            write_atomically(tmp_path / "a", b"new")
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_that_is_not_there_or_a_folder_in_the_way_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "a", b"")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "b", b"")
    assert names(tmp_path) == ["b"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_and_keeps_its_file(tmp_path):
    write_atomically(tmp_path / "a", b"old")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="denied"):
            write_atomically(tmp_path / "a", b"new")
    finally:
        tmp_path.chmod(0o755)
    assert (tmp_path / "a").read_bytes() == b"old"


# files.py is run by itself, so that a process is there in a few hundredths of a second
LOOP = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
for n in range(10**9):
    files.write_atomically(Path(sys.argv[2]), bytes([n % 256]) * 3_000_000)
    print(n, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    make, path = random.Random(0), tmp_path / "a"
    home = Path(__file__).parents[1] / "sgsc" / "files.py"
    torn = 0
    for _ in range(20):
        command = [sys.executable, "-S", "-E", "-c", LOOP, str(home), str(path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert child.stdout.readline()  # it saves by now
            time.sleep(make.random() * 0.02)
        finally:
            child.kill()
            last = child.stdout.read().split()[-1:]
            child.stdout.close()
            child.wait()
        data = path.read_bytes()
        assert len(data) == 3_000_000
        assert set(data) == {data[0]}
        if last:
            assert data[0] in (int(last[0]) % 256, (int(last[0]) + 1) % 256)  # what was said to be saved, or the next
        torn += len(names(tmp_path)) > 1
        for part in tmp_path.glob(".a.*.part"):
            part.unlink()
    assert torn > 0, "no kill fell into a save: the test shows nothing"
