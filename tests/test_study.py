"""A study that is killed and goes on, whose runs fail, whose settings change, that is cloned: the
command as a person uses it, with runs of seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_data
import nbformat
import psutil
import pytest
import yaml

from cmi_mtl.blocks import SMOKE
from cmi_mtl.core import RECORD_SCHEMA, InputError, write_json
from cmi_mtl.plan import copy_command, planned_tables
from cmi_mtl.study import check, main

ROOT = Path(__file__).resolve().parent.parent
SMALL = SMOKE[0].settings
OVQA = {"preset": "tiny", "epochs": 1, "batch_size": 4}
FAILING = {**SMALL, "device": "cuda:77"}  # what a machine has is seen when a run begins


def block(dataset, variant, settings, **more):
    return {
        "experiment": "small",
        "variants": [variant],
        "datasets": [dataset],
        "settings": settings,
        **more,
    }


BLOCKS = [
    block("phantom", "pooled", SMALL, phantom_seeds=2),
    block("phantom", "no_cifr", FAILING),
    block("ovqa", "pooled", OVQA),
]
NAMES = ["phantom/pooled/seed0", "phantom/pooled/seed1", "ovqa/pooled/seed0"]


def small_tables(top):
    "Write the notebook that makes the table of the blocks above: it lists its records."
    source = """from pathlib import Path
text = " ".join(sorted(p.name for p in Path(records).glob(f"*-{dataset}-*.json")))
Path(folder, f"small_{dataset}.md").write_text(text, encoding="utf-8")"""
    given = 'dataset = "phantom"\nrecords = "."\nfolder = "."'
    cells = [nbformat.v4.new_code_cell(x) for x in (given, source)]
    cells[0].metadata["tags"] = ["parameters"]
    path = top / "nbs/experiments/small.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    metadata = {"kernelspec": kernel}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)


def command(*args):
    return [sys.executable, "-m", "cmi_mtl.study", *map(str, args)]


def options(top, out=subprocess.PIPE):
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CMI_MTL_DATA": str(top / "data"),
        "HF_HUB_OFFLINE": "1",
    }
    return dict(cwd=top, env=env, stdout=out, stderr=subprocess.STDOUT, encoding="utf-8")


def start(top, *args):
    "(exit code, what was said) of the study of `top`/few.json."
    whole = command("phantom", "ovqa", "--study", "few.json", "-j", 2, *args)
    done = subprocess.run(whole, **options(top))
    return done.returncode, done.stdout


def record(top, name):
    return top / "runs/few/runs/train" / name / "record.json"


def published(top, name):
    return top / f"runs/few/figures/records/train-{name.replace('/', '-')}.json"


def settings_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["settings"]


def began(said):
    return sorted(line.split()[2] for line in said.splitlines() if " begins " in line)


def children_of(process):
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A folder whose study was killed, with all its processes, when one run had ended and another
    was on its way, and was started again: the folder, the time of the first record before that,
    and (exit code, what was said) of the second start."""
    top = tmp_path_factory.mktemp("a study")
    others = shutil.ignore_patterns("[!t]*.ipynb")
    shutil.copytree(ROOT / "nbs/experiments", top / "nbs/experiments", ignore=others)
    small_tables(top)
    made_data.write(made_data.ovqa_files(), top / "data/ovqa")
    write_json(top / "few.json", BLOCKS)
    with open(top / "said.txt", "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command("phantom", "ovqa", "--study", "few.json", "-j", 1),
            start_new_session=True,
            **options(top, out),
        )

    def said():
        return (top / "said.txt").read_text(encoding="utf-8")

    wait(lambda: len(began(said())) > 1 and not process.poll())
    wait(lambda: any("ipykernel" in " ".join(p.cmdline()) for p in children_of(process)))
    left = children_of(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # a kernel has a session of its own; it ends when it sees that it is alone
    psutil.wait_procs(left, timeout=60)
    assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert began(said()) == sorted(NAMES[:2])
    assert [record(top, n).exists() for n in NAMES] == [True, False, False]
    return top, record(top, NAMES[0]).stat().st_mtime_ns, start(top)


def wait(until, seconds=300):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


def test_killed_study_goes_on(studied):
    top, before, (code, said) = studied
    assert began(said) == sorted([*NAMES[1:], "phantom/no_cifr/seed0"]), said
    assert "4 runs, 1 of them finished, 3 left" in said
    assert record(top, NAMES[0]).stat().st_mtime_ns == before
    assert all(published(top, name).exists() for name in NAMES)
    assert settings_of(published(top, NAMES[2]))["dataset"] == "ovqa"
    table = (top / "runs/few/figures/small_ovqa.md").read_text(encoding="utf-8")
    assert table == "train-ovqa-pooled-seed0.json"


def test_failed_run_is_named_and_stops_nothing(studied):
    top, _, (code, said) = studied
    assert code == 1
    end = said[said.index("1 failed; the same command tries them again:") :].split()
    log = Path(end[-1])
    assert end[-2] == "phantom/no_cifr/seed0:"
    assert log == Path("runs/few/runs/train/phantom/no_cifr/seed0/log.txt")
    assert "cuda:77" in (top / log).read_text(encoding="utf-8")
    # logs are not for the terminal
    assert "Traceback" not in said and "epoch" not in said and len(said.splitlines()) < 12, said
    assert sum(" FAILED " in line for line in said.splitlines()) == 1


def test_clone_with_its_records_has_nothing_to_do_but_what_changed(studied, tmp_path):
    top, clone = studied[0], tmp_path / "clone"

    def runs(folder, names):
        return ["runs"] if Path(folder).name == "few" else []

    shutil.copytree(top, clone, ignore=runs)
    blocks = [BLOCKS[0], {**BLOCKS[2], "settings": {**OVQA, "epochs": 2}}]  # none that fails
    write_json(clone / "few.json", blocks)
    left = record(clone, NAMES[2]).parent / "checkpoints"
    left.mkdir(parents=True)
    (left.parent / "fingerprint.txt").write_text("of other settings", encoding="utf-8")
    shutil.copy(record(top, NAMES[2]), left.parent)  # finished, with one epoch less
    before = {name: published(clone, name).stat().st_mtime_ns for name in NAMES}
    code, said = start(clone)
    assert code == 0 and began(said) == ["ovqa/pooled/seed0"], said
    assert "its published record differs in settings.epochs" in said
    for gone in ("checkpoints", "record.json"):
        assert said.count(f"deletes runs/few/runs/train/{NAMES[2]}/{gone}: ") == 1, said
    assert not left.exists()
    assert "3 runs, 2 of them finished, 1 left" in said
    kept = [n for n in NAMES if published(clone, n).stat().st_mtime_ns == before[n]]
    assert kept == NAMES[:2] and settings_of(published(clone, NAMES[2]))["epochs"] == 2
    assert not record(clone, NAMES[0]).exists()


def tree(top):
    return {p: p.stat().st_mtime_ns for p in top.rglob("*")}


def test_a_dry_run_writes_and_deletes_nothing(tmp_path):
    shutil.copytree(ROOT / "nbs/experiments", tmp_path / "nbs/experiments")
    small_tables(tmp_path)
    write_json(tmp_path / "few.json", BLOCKS[:1])
    left = record(tmp_path, NAMES[0]).parent
    made_data.write({"checkpoints/state": b"", "fingerprint.txt": b"of other settings"}, left)
    write_json(published(tmp_path, NAMES[1]), {"schema": RECORD_SCHEMA})  # not whole
    before = tree(tmp_path)
    done = subprocess.run(command("phantom", "--study", "few.json", "-pn"), **options(tmp_path))
    assert done.returncode == 0 and tree(tmp_path) == before, done.stdout
    assert "rule train_0" in done.stdout and "rule table_0" in done.stdout
    assert "differs in settings, model, processes" in done.stdout


def test_folders_that_cannot_be_made_are_named(of_tables, capsys):
    Path("runs").write_text("in the way", encoding="utf-8")
    assert main(["phantom", "--study", "selection", "--tables"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: runs") and "Allow writing there" in said and "\n" not in said[:-1]
    )


def test_tables_of_nothing_are_refused(of_tables, capsys):
    before = tree(of_tables)
    assert main(["phantom", "ovqa", "--tables"]) == 2 and tree(of_tables) == before
    said = capsys.readouterr().err
    assert "dataset='ovqa': figures/records has no record of it" in said and "phantom" not in said
    names = {
        t["name"]: t["skip"] for t in planned_tables(["phantom", "ovqa"], "selection", Path("."))
    }
    assert names["table selection phantom"] is None
    assert names["table selection ovqa"] == "figures/records/*-ovqa-*.json"


def test_the_maps_of_a_study_publish_nothing(monkeypatch):
    monkeypatch.chdir(ROOT)
    (row,) = planned_tables(["phantom"], "interpretability", Path("."))
    assert "-p checkpoint" in row["command"]
    assert "-p records" not in row["command"] and "publish_to" not in row["command"]


def test_an_experiment_without_a_notebook_stops_before_the_first_run(tmp_path, capsys, monkeypatch):
    said = refused(capsys, monkeypatch, tmp_path, [{**BLOCKS[0], "experiment": "smal"}])
    assert "experiment='smal': no notebook" in said and not (tmp_path / "runs").exists()


def refused(capsys, monkeypatch, top, blocks):
    "What the command says that stops, in this process, before the first run."
    write_json(top / "few.json", blocks)
    small_tables(top)
    monkeypatch.chdir(top)
    monkeypatch.setenv("CMI_MTL_DATA", str(top / "nowhere"))
    assert main(["phantom", "ovqa", "--study", "few.json"]) == 2
    assert not list(top.glob("runs/few/runs/train/*"))
    return "".join(capsys.readouterr())


def test_wrong_settings_stop_before_the_first_run(tmp_path, capsys, monkeypatch):
    wrong = [
        BLOCKS[0],
        block("phantom", "no_such", SMALL),
        block("phantom", "cmi_mtl", {"epochs": 0}),
    ]
    said = refused(capsys, monkeypatch, tmp_path, wrong)
    for part in ("3 problems found", "epochs=0", "variant='no_such'", "dataset='ovqa'"):
        assert part in said
    assert not (tmp_path / "runs").exists()


def test_outside_the_folder_of_the_makefile_nothing_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["phantom", "--tables"]) == 2
    said = "".join(capsys.readouterr())
    assert "Go to the Makefile's folder" in said and "made" not in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def of_tables(tmp_path, monkeypatch):
    "A folder with braces in its name, of a study's tables, in which a test works."
    top = tmp_path / "a {x}"
    shutil.copytree(ROOT / "nbs/experiments", top / "nbs/experiments")
    write_json(top / "figures/records/train-phantom-pooled-seed0.json", {})
    monkeypatch.chdir(top)
    return top


@pytest.mark.parametrize("more, code", [(["-n"], 0), (["-n", "--bogus"], 1)])
def test_what_snakemake_says_counts(of_tables, more, code):
    "Braces in a path are no wildcards; an option that it does not know is no success."
    command = ["phantom", "--study", "selection", "--tables", *more]
    assert main(command) == code


def test_a_record_that_goes_makes_its_tables_anew(of_tables):
    def made():
        return [t["made"] for t in planned_tables(["phantom"], "selection", Path("."))]

    before = made()
    assert made() == before
    Path("figures/records/train-phantom-pooled-seed0.json").unlink()
    assert made() != before


def test_a_copy_that_fails_is_no_table(tmp_path):
    folder, to = tmp_path / "from", tmp_path / "it's to"
    made_data.write({"a_phantom.md": b"page", "a_phantom.svg": b"s", "b_slake.md": b"no"}, folder)

    def copied():
        line = copy_command(folder, "a_phantom.*", to)
        return subprocess.run(["sh", "-c", line], stderr=subprocess.DEVNULL).returncode

    assert copied() == 1
    to.mkdir()
    assert copied() == 0
    assert sorted(p.name for p in to.iterdir()) == ["a_phantom.md", "a_phantom.svg"]
    assert (to / "a_phantom.md").read_bytes() == b"page"


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_no_runs_at_once_is_refused(jobs, capsys):
    with pytest.raises(SystemExit) as e:
        main(["phantom", "-j", jobs])
    assert e.value.code == 2 and "give 1 or more" in capsys.readouterr().err


def test_missing_data_stop_before_the_first_run(tmp_path, capsys, monkeypatch):
    assert "OVQA is given out" in refused(capsys, monkeypatch, tmp_path, BLOCKS)


@pytest.mark.parametrize(
    "model, part",
    [
        ({"fusion": "magic"}, "unknown fusion"),
        ({"num_queries": 15}, "is no square"),
        ({"fvtaa": True}, "model option 'fvtaa'"),
        ({"fusion_options": {"speed": 1}}, "speed"),
        ({"image_encoder": {"model_type": "efficientnet"}}, "no model can be built"),
    ],
)
def test_model_options_are_tried(tmp_path, model, part):
    write_json(tmp_path / "s.json", [block("slake", "cmi_mtl", {"model_options": model})])
    with pytest.raises(InputError, match=part):
        check(["slake"], str(tmp_path / "s.json"))


def test_tables_are_planned_without_what_takes_seconds_to_load(tmp_path):
    "`make tables` stays under a minute: no models' library, no grammar of web addresses."
    shutil.copytree(ROOT / "nbs/experiments", tmp_path / "nbs/experiments")
    write_json(tmp_path / "figures/records/train-phantom-pooled-seed0.json", {})
    code = """
import sys
from cmi_mtl.study import start
assert start(["phantom"], only_tables=True, more=["-n"]) == 0
print([m for m in ("torch", "transformers", "lark") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], **options(tmp_path))
    assert done.stdout.splitlines()[-1] == "[]", done.stdout[-2000:]


@pytest.mark.parametrize("given", [["--profile", "p"], ["--profile=p"]])
def test_a_profile_says_how_many_at_once(monkeypatch, given):
    monkeypatch.setattr("cmi_mtl.study.start", lambda *args: args[2])
    assert main(["phantom", *given]) is None and main(["phantom"]) == os.cpu_count()


def test_slurm_profile_plans_the_jobs(studied, tmp_path):
    "A dry run: a job for each run, with what the profile asks for. No slurm is at hand."
    top, clone = studied[0], tmp_path / "clone"
    shutil.copytree(top, clone, ignore=shutil.ignore_patterns("runs"))
    code, said = start(clone, "--profile", "nbs/experiments/slurm", "--dry-run")
    assert code == 0, said
    text = (ROOT / "nbs/experiments/slurm/config.yaml").read_text(encoding="utf-8")
    profile = yaml.safe_load(text)
    assert profile["executor"] == "slurm"
    jobs = [text for text in said.split("\n[") if "rule train_" in text]
    assert len(jobs) == 4
    for text in jobs:
        for k in ("mem_mb", "runtime", "cpus_per_task"):
            assert f"{k}={profile['default-resources'][k]}" in text
