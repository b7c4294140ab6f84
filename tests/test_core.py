"What every chapter leans on, where it meets other processes and other projects."

import importlib.util
import pickle
import shutil
import subprocess

import pytest

from cmi_mtl import core
from cmi_mtl.core import InputError, NotWritable, Problem


@pytest.mark.parametrize("kind", [InputError, NotWritable])
@pytest.mark.parametrize("n", [1, 8])
def test_an_error_comes_whole_from_another_process(kind, n):
    sent = kind([Problem("a.csv", "is empty", "Write it")] * n, shown=3)
    came = pickle.loads(pickle.dumps(sent))
    assert type(came) is kind and str(came) == str(sent) and came.problems == sent.problems


def git(folder, *args):
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *names, *args], cwd=folder, check=True, capture_output=True)


def test_the_commit_of_a_project_around_is_not_ours(tmp_path):
    "As in an environment that lies in another repository, which ignores it."
    place = tmp_path / "project/.venv/cmi_mtl"
    place.mkdir(parents=True)
    shutil.copy(core.__file__, place)
    project = tmp_path / "project"
    (project / ".gitignore").write_text(".venv", encoding="utf-8")
    for step in (("init",), ("add", ".gitignore"), ("commit", "-m", "theirs")):
        git(project, *step)

    spec = importlib.util.spec_from_file_location("theirs", place / "core.py")
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    installed.device_name = str

    def said():
        p = installed.provenance("cpu")
        return p["commit"], p["tree_changed"]

    assert said() == (None, None)
    git(project, "add", "--force", ".venv/cmi_mtl")
    git(project, "commit", "-m", "with our code")
    commit, changed = said()
    assert len(commit) == 40 and changed is False
    (project / "more").touch()
    assert said() == (commit, True)
