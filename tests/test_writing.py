"""Lines that are added whole, and folders that a process has for itself."""

import json
import resource
import signal
import subprocess
import sys

import pytest

from files.writing import add_line, lock, locked, put_line
from tests.conftest import ROOT
from utils import UserError


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_added_in_order(tmp_path):
    for number in range(3):
        add_line(tmp_path / "lines", {"number": number})
    assert lines_of(tmp_path / "lines") == [{"number": 0}, {"number": 1}, {"number": 2}]


@pytest.mark.parametrize("cut", ['{"a": 1}\n{"b', '{"b', '{"a": 1}\n{"b": 2}'])
def test_a_line_that_was_cut_does_not_swallow_the_next(cut, tmp_path):
    path = tmp_path / "lines"
    path.write_text(cut)
    add_line(path, {"c": 3})
    assert path.read_text() == cut + '\n{"c": 3}\n'


def test_a_line_that_finds_no_room_leaves_nothing(tmp_path):
    path = tmp_path / "lines"
    add_line(path, {"a": "x" * 50})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(OSError, match="File too large") as raised:
            add_line(path, {"b": "y" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(path)
    assert path.read_bytes() == before


def test_a_line_replaces_the_one_with_its_keys(tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"run": "old row, without a part"}\nno JSON\n[1]\n')
    for run, part, score in (("a", 0, 1), ("a", 1, 2), ("b", 0, 3), ("a", 0, 4)):
        put_line(path, {"run": run, "part": part, "score": score}, ("run", "part"))
    kept = path.read_text().splitlines()
    assert kept[:3] == ['{"run": "old row, without a part"}', "no JSON", "[1]"]
    assert [json.loads(line)["score"] for line in kept[3:]] == [2, 3, 4]


def in_another_process(code, *arguments):
    command = [sys.executable, "-c", f"import sys; from pathlib import Path\n{code}", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_folder_has_one_writer(tmp_path):
    """Until the process ends, however it does; a process it forked does not keep the folder."""
    code = (
        "from files.writing import lock; import os, time; lock(Path(sys.argv[1])); os.fork() and print(1, flush=True)"
    )
    other = in_another_process(f"{code}; time.sleep(60)", tmp_path)
    assert other.stdout.readline() == "1\n"
    with pytest.raises(UserError, match="another process writes in"):
        lock(tmp_path)
    other.kill()
    other.wait()
    assert lock(tmp_path) is not None


def test_lines_that_processes_put_at_once_are_all_there(tmp_path):
    code = (
        "from files.writing import put_line\n"
        "for part in range(40):\n"
        "    for score in (1, 2):\n"
        "        row = {'run': sys.argv[2], 'part': part, 'score': score}\n"
        "        put_line(Path(sys.argv[1]), row, ('run', 'part'))\n"
    )
    writers = [in_another_process(code, tmp_path / "lines", name) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0], [writer.stderr.read() for writer in writers]
    rows = lines_of(tmp_path / "lines")
    assert len(rows) == 80
    assert {row["score"] for row in rows} == {2}


def test_a_folder_can_be_waited_for(tmp_path):
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass
