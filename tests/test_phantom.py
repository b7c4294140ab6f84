"The phantom data are the same by however many processes drawn, and whole or absent whoever is killed."

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cmi_mtl.phantom as phantom
from cmi_mtl.core import InputError
from cmi_mtl.phantom import load_phantom, make_phantom

HALF_WAY = """
import sys
from cmi_mtl.phantom import make_phantom
make_phantom(sys.argv[1], 3000, size=48, processes=int(sys.argv[2]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_one_and_two_processes_draw_the_same_bytes(tmp_path):
    for processes in (1, 2):
        make_phantom(tmp_path / str(processes), 24, seed=5, size=48, processes=processes)
    one, two = (contents(tmp_path / str(processes)) for processes in (1, 2))
    assert len(one) == 3 * 24 + 1
    assert one == two


def test_a_picture_does_not_depend_on_how_many_there_are(tmp_path):
    "Pictures have random numbers of their own: else no process could draw the last without the first."
    for n in (10, 14):
        make_phantom(tmp_path / str(n), n, size=48)
    few, more = (contents(tmp_path / str(n)) for n in (10, 14))
    assert [few[k] == more[k] for k in sorted(few) if k.startswith("images")] == [True] * 10


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_half_way_leaves_nothing_that_is_taken_as_whole(tmp_path, processes):
    "SIGKILL allows no clean-up: the part that is drawn stays, unread, until the next one draws."
    folder = tmp_path / "phantom-12-0-48-v0"
    drawing = subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, folder, str(processes)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".*/*/images/*.png")):
            assert drawing.poll() is None and time.monotonic() < deadline, "it never began to draw"
            time.sleep(0.01)
        drawing.kill()
        drawing.wait()
        assert not folder.exists()
        assert list(tmp_path.glob(".*.part-*")), "it was killed too late to matter"
    finally:
        with contextlib.suppress(ProcessLookupError):  # its workers, and itself if it never began
            os.killpg(drawing.pid, signal.SIGKILL)
    make_phantom(folder, 12, size=48)
    make_phantom(tmp_path / "afresh", 12, size=48)
    assert contents(folder) == contents(tmp_path / "afresh")
    assert not list(tmp_path.glob(".*.part-*"))  # what the killed one left is cleared away


def test_whoever_comes_second_waits_and_reads_what_the_first_drew(tmp_path, monkeypatch):
    draw_into, drawn = phantom._draw_into, []

    def slowly(folder, *settings):
        drawn.append(folder)
        time.sleep(0.5)
        draw_into(folder, *settings)

    monkeypatch.setattr(phantom, "_draw_into", slowly)
    with ThreadPoolExecutor() as both:
        first, second = both.map(lambda _: load_phantom(tmp_path, n_images=10, size=48), range(2))
    assert first == second
    assert len(drawn) == 1


def test_every_setting_has_a_folder_of_its_own(tmp_path):
    for options in ({}, {"seed": 1}, {"size": 50}, {"n_images": 11}):
        load_phantom(tmp_path, **{"n_images": 10, "size": 48, **options})
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 4


def test_the_door_finds_its_loader_without_an_import_of_it(tmp_path):
    code = """
import sys
from cmi_mtl.datasets import load_dataset
print(len(load_dataset("phantom", sys.argv[1], n_images=10, size=48)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(load_phantom(tmp_path, n_images=10, size=48))


def test_what_was_deleted_from_a_folder_is_named(tmp_path):
    samples = load_phantom(tmp_path, n_images=10, size=48)
    picture = samples[-1].image
    mask = next(r.mask for s in samples for r in s.regions if r.kind == "organ")
    for path in (picture, mask):
        Path(path).unlink()
    folder = Path(picture).parents[1]
    with pytest.raises(InputError) as e:
        load_phantom(tmp_path, n_images=10, size=48)
    assert {p.where for p in e.value.problems} == {picture, mask}
    assert all(
        p.remedy == f"Delete the folder {folder}: it is drawn anew" for p in e.value.problems
    )
