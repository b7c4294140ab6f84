"A training that can be left alone: killed, out of disk, spread over processes, it ends where an undisturbed one does."

import collections
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import made_run
import numpy as np
import pytest
import torch
from made_run import assert_alike, outcome
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig

import cmi_mtl.train as T
from cmi_mtl import batches, build, checkpoints, encoders, loop, scores
from cmi_mtl.config import paper_config
from cmi_mtl.core import InputError
from cmi_mtl.datasets import load_dataset
from cmi_mtl.encoders import build_tokenizer
from cmi_mtl.model import CMIMTL
from cmi_mtl.records import publish
from cmi_mtl.settings import make_settings

HERE = Path(__file__).resolve().parent


def environment(**more):
    path = os.pathsep.join(
        filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")])
    )
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def settings(top):
    return made_run.settings(top, save_every=2)


@pytest.fixture(scope="module")
def alone(settings, top):
    "What an undisturbed run leaves."
    T.train(settings, top / "undisturbed")
    return outcome(top / "undisturbed")


def states(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "checkpoints").iterdir())}


@pytest.fixture
def stopped(settings, tmp_path, monkeypatch):
    "The folder of a run that was stopped by SIGTERM in its second epoch."
    with monkeypatch.context() as m:
        step, calls = loop.train_step, []

        def terminated(run, rows):
            calls.append(1)
            if len(calls) == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(run, rows)

        m.setattr(loop, "train_step", terminated)
        with pytest.raises(loop.Stopped, match="goes on from") as e:
            T.train(settings, tmp_path / "run")
    assert e.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (tmp_path / "run/record.json").exists()
    assert [name[:17] for name in states(tmp_path / "run")][-1] == "epoch-0002-000003"
    return tmp_path / "run"


# ---------------------------------------------------------------- killed


def test_killed_twenty_times(top, capsys):
    done = subprocess.run(
        [sys.executable, HERE / "made_run.py", top],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    places = collections.Counter((how, place) for how, place, _ in told["kills"])
    with capsys.disabled():
        print(
            f"\n{len(told['kills'])} kills of {told['runs']} runs in {told['seconds']:.0f} s (one left alone: {told['alone']:.0f} s):",
            ", ".join(f"{n} {how} at {place}" for (how, place), n in sorted(places.items())),
        )
    assert len(told["kills"]) == 20 and places["SIGKILL", "half a checkpoint"] >= 4
    assert {code for how, _, code in told["kills"] if how == "SIGKILL"} == {-signal.SIGKILL}
    codes = {code for how, _, code in told["kills"] if how == "SIGTERM"}
    assert codes <= {143, -signal.SIGTERM}  # the latter outside the epochs
    alone = outcome(top / "alone")
    assert alone["record"]["settings"]["anneal"] == "linear"
    assert alone["record"]["test_scorings"] == 1
    assert [r["epoch"] for r in alone["history"]] == [1, 2, 3]
    for k in range(told["runs"]):
        killed = outcome(top / f"killed{k}")
        # killed while it scored the test split, it scored it again, and says so
        assert killed["record"]["test_scorings"] >= 1
        killed["record"]["test_scorings"] = 1
        assert_alike(killed, alone)
        # an empty folder is all that a kill at the very end may leave
        left = [p.name for p in (top / f"killed{k}").rglob("*") if p.suffix in (".pt", ".part")]
        assert not left, left


def test_command_line_stops_at_sigterm(top, tmp_path):
    s = made_run.settings(top)
    given = [
        x
        for k, v in dict(
            dataset="table",
            preset="tiny",
            data_root=s.data_root,
            epochs=500,
            batch_size=8,
            save_every=1,
            model_options=json.dumps(s.model_options),
        ).items()
        for x in ("-p", k, str(v))
    ]
    command = [sys.executable, "-m", "cmi_mtl.train", "--out", tmp_path / "run", *given]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    end = time.monotonic() + 120
    while (
        not list(tmp_path.glob("run/checkpoints/*.pt"))
        and process.poll() is None
        and time.monotonic() < end
    ):
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM; the same command goes on from" in out and "Traceback" not in err
    again = subprocess.run(
        [*command, "-p", "seed", "1"], env=environment(), capture_output=True, encoding="utf-8"
    )
    assert (
        again.returncode == 2
        and "error: " in again.stderr
        and "seed is 0 there, 1 here" in again.stderr
    )


# ---------------------------------------------------------------- stopped, and what then happens to the checkpoint


def test_goes_on_after_sigterm(stopped, settings, alone, capsys):
    T.train(replace(settings, save_every=3), stopped)
    assert "going on from epoch 2, step 3" in capsys.readouterr().out
    assert_alike(outcome(stopped), alone)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "not torch"])
def test_damaged_checkpoint(stopped, settings, alone, damage, recwarn):
    newest = max((stopped / "checkpoints").iterdir())
    whole = newest.read_bytes()
    if damage == "missing":
        newest.unlink()
    else:
        newest.write_bytes(
            {
                "flipped": whole[:500] + bytes([whole[500] ^ 4]) + whole[501:],
                "cut": whole[:-9],
                "not torch": b"x",
            }[damage]
        )
    T.train(settings, stopped)
    warned = [
        str(w.message)
        for w in recwarn
        if "is damaged (its checksum is wrong); the one before it is tried" in str(w.message)
    ]
    assert len(warned) == (damage != "missing")
    assert_alike(outcome(stopped), alone)


def test_a_damaged_checkpoint_is_not_kept_in_reserve(tmp_path):
    files = checkpoints.Checkpoints(tmp_path / "checkpoints", {"seed": 0})
    for k in (1, 2, 3):
        files.save(f"epoch-{k}", {"x": torch.zeros(1)})
    files.files()[-1].write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="is damaged"):
        files.load()
    files.save("epoch-3", {"x": torch.zeros(1)})
    assert [f.name[:7] for f in files.files()] == ["epoch-2", "epoch-3"]
    assert files.files()[0].read_bytes() != b"damaged"


def test_no_whole_checkpoint(stopped, settings, alone):
    for p in (stopped / "checkpoints").iterdir():
        p.write_bytes(p.read_bytes()[:-1])
    before = states(stopped)
    message = "none of its checkpoints is whole. Start anew with restart=true"
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(InputError, match=message):
        T.train(settings, stopped)
    assert states(stopped) == before
    T.train(replace(settings, restart=True), stopped)
    assert_alike(outcome(stopped), alone)


def test_foreign_checkpoint(stopped, settings, monkeypatch, top):
    before = states(stopped)
    other = made_run.settings(top, save_every=2, epochs=4, learning_rate=0.5)
    with pytest.raises(InputError) as e:
        T.train(other, stopped)
    for part in (
        "epochs is 3 there, 4 here",
        "learning_rate is 0.01 there, 0.5 here",
        "another folder, or restart=true",
    ):
        assert part in str(e.value)
    monkeypatch.setattr(checkpoints, "FORMAT", 3)
    with pytest.raises(InputError, match="format is 2 there, 3 here"):
        T.train(settings, stopped)
    monkeypatch.undo()
    changed = load_dataset("table", settings.data_root)
    with pytest.raises(InputError, match="data is '.*' there"):
        T.train(settings, stopped, [replace(changed[0], answer="no"), *changed[1:]])
    made = build.build_model

    def larger(*args):
        model = made(*args)
        model.extra = torch.nn.Parameter(torch.zeros(3))
        return model

    monkeypatch.setattr(T, "build_model", larger)
    with pytest.raises(InputError, match="another version of the model"):
        T.train(settings, stopped)
    assert states(stopped) == before


def test_restart(stopped, settings, alone, capsys):
    T.train(replace(settings, restart=True), stopped)
    assert "going on" not in capsys.readouterr().out
    assert_alike(outcome(stopped), alone)


def test_a_stopped_restart_goes_on_without_it(settings, alone, tmp_path, monkeypatch, capsys):
    T.train(replace(settings, epochs=1), tmp_path)  # it gives way
    (tmp_path / ".record.json.x.part").touch()
    with pytest.raises(InputError, match="epochs is 1 there, 3 here"):
        T.train(settings, tmp_path)
    assert (tmp_path / ".record.json.x.part").exists()  # a run that is refused touches nothing
    step = loop.train_step

    def terminated(run, rows):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(run, rows)

    with monkeypatch.context() as m:
        m.setattr(loop, "train_step", terminated)
        with pytest.raises(loop.Stopped, match="the same command without restart goes on from"):
            T.train(replace(settings, restart=True), tmp_path)
    T.train(settings, tmp_path)
    assert "going on from epoch 1, step 1" in capsys.readouterr().out
    done = outcome(tmp_path)
    assert done["record"].pop("test_scorings") == 2 and not list(tmp_path.glob(".*.part"))
    done["record"]["test_scorings"] = 1
    assert_alike(done, alone)


def test_a_wrong_option_beside_restart_loses_nothing(stopped, settings, alone):
    before = states(stopped)
    wrong = replace(settings, restart=True, model_options={"num_querys": 3})
    with pytest.raises(InputError, match="num_querys"):
        T.train(wrong, stopped)
    assert states(stopped) == before
    T.train(settings, stopped)
    assert_alike(outcome(stopped), alone)


def test_full_disk(stopped, settings, alone, monkeypatch):
    before = states(stopped)
    (stopped / "checkpoints/checkpoint.part").symlink_to("/dev/full")
    with pytest.raises(
        InputError,
        match=r"no checkpoint can be written .* MB are free\). Make room and run it again",
    ):
        T.train(settings, stopped)
    assert states(stopped) == before

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(T, "write_jsonl", full)
        with pytest.raises(InputError, match="the disk: it is full .* Make room and run it again"):
            T.train(settings, stopped)
    T.train(settings, stopped)
    done = outcome(stopped)
    assert done["record"].pop("test_scorings") == 2  # the disk was full after the first
    done["record"]["test_scorings"] = 1
    assert_alike(done, alone)


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
@pytest.mark.parametrize("why", ["No space left on device", "Disk quota exceeded"])
def test_full_disk_or_quota_is_said(settings, tmp_path, monkeypatch, kind, why):
    def full(*args):
        raise kind(f"{why} (os error)")

    monkeypatch.setattr(T, "prepare_samples", full)
    with pytest.raises(InputError, match=f"the disk: it is full .{why}.* Make room"):
        T.train(settings, tmp_path)


def test_loss_that_is_not_a_number(stopped, settings, alone, monkeypatch):
    step = loop.gradients

    def bad(run, rows):
        losses = step(run, rows)
        if run.progress.step == 4:
            next(p for p in run.trained if p.grad is not None).grad[0] = math.inf
        return losses

    with monkeypatch.context() as m:
        m.setattr(loop, "gradients", bad)
        with pytest.raises(
            FloatingPointError, match="epoch 2, step 4: loss or gradients are not finite"
        ):
            T.train(settings, stopped)
    T.train(settings, stopped)
    assert_alike(outcome(stopped), alone)


def test_validation_decides_nothing(settings, alone, tmp_path, monkeypatch):
    "However the epochs validate, the last weights are kept."
    validated = []

    def falling(run, rows):
        validated.append(run.progress.epoch)
        return {"validation": 90.0 - 20 * run.progress.epoch, "validation_loss": 1.0}

    monkeypatch.setattr(loop, "validate", falling)
    T.train(settings, tmp_path)
    falls, stays = outcome(tmp_path), alone
    assert validated == [1, 2, 3] and [r["validation"] for r in falls["history"]] == [70, 50, 30]
    for part in ("weights", "predictions", "config"):
        assert_alike(falls[part], stays[part])
    # by the last weights
    assert_alike(falls["record"]["validation"], stays["record"]["validation"])


def test_a_trial_never_looks_at_the_test_split(settings, alone, tmp_path, monkeypatch):
    asked, predict = set(), loop.predict

    def watched(run, rows, *args, **kwargs):
        asked.update(run.data.samples[i].split for i in rows)
        return predict(run, rows, *args, **kwargs)

    for module in (loop, scores):
        monkeypatch.setattr(module, "predict", watched)
    record = T.train(settings, tmp_path / "trial", trial=True)
    assert asked == {"validation"}
    assert sorted(p.name for p in (tmp_path / "trial").iterdir()) == [
        "history.jsonl",
        "record.json",
    ]
    assert record["experiment"] == "trial" and record["test_scorings"] == 0
    assert not {"test", "test_generated", "nearest_question"} & record.keys()
    assert_alike(record["validation"], alone["record"]["validation"])
    everything = replace(settings, train_on="train+validation")
    with pytest.raises(InputError, match="no validation split is held out"):
        T.train(everything, tmp_path / "none", trial=True)
    assert not (tmp_path / "none").exists()


def test_trained_on_all_but_test(settings, alone, tmp_path):
    T.train(replace(settings, train_on="train+validation"), tmp_path)
    record, splits = outcome(tmp_path)["record"], made_run.SPLITS
    assert record["validation"] is None and record["temperature"] == 1
    assert not any("validation" in row or "validation_loss" in row for row in record["history"])
    both = splits["train"] + splits["validation"]
    assert record["data"]["questions"] == {"train": both, "validation": 0, "test": splits["test"]}
    assert alone["record"]["data"]["questions"] == splits and alone["record"]["temperature"] != 1


def test_a_step_of_the_paper_preset(top, tmp_path, monkeypatch):
    "Its shapes and its recipe; layers are few and narrow, words its own, so that no weights are needed."
    asked = ["where is it", "what is it", "is it well", "is it large", "left side lung yes no"]
    words = build_tokenizer(asked)
    monkeypatch.setattr(build.AutoTokenizer, "from_pretrained", lambda folder: words)
    monkeypatch.setattr(build, "with_pretrained_encoders", lambda config, **weights: CMIMTL(config))
    narrow = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    image = dict(model_type="clip_vision_model", patch_size=16, image_size=64, **narrow)
    text = dict(model_type="roberta", vocab_size=len(words), pad_token_id=words.pad_token_id)
    text |= narrow
    offline = paper_config(offline=True)
    t5 = offline.generator | dict(d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=1)

    def config(answers, **options):
        return paper_config(answers, offline=True, **options)

    monkeypatch.setattr(build, "paper_config", config)
    sizes = dict(
        image_encoder=image,
        text_encoder=text,
        generator=t5,
        hidden_size=32,
        image_size=64,
        qformer_layers=2,
        qformer_heads=2,
        projection_size=16,
    )
    made_run.settings(top)  # writes the table
    s = make_settings(
        "table",
        "paper",
        data_root=str(top / "table.csv"),
        device="cpu",
        mixed_precision="no",
        epochs=1,
        model_options=sizes,
    )
    started = build.build_model(s, batches.prepare_samples(s, None))
    begun = {n: x.clone() for n, x in started.state_dict().items()}
    with pytest.MonkeyPatch.context() as m:
        rates, step = [], loop.train_step

        def told(run, rows):
            rates.extend({g["lr"] for g in run.optimiser.param_groups})
            return step(run, rows)

        m.setattr(loop, "train_step", told)
        record = T.train(s, tmp_path)
    c, after = started.config, load_file(tmp_path / "model/model.safetensors")
    assert (c.num_queries, c.fusion_layers) == (32, 2)
    assert (c.classifier_loss, c.query_start) == ("bce", "nothing")
    assert not c.global_path and c.fvta and c.cifr and c.ffae
    assert s.batch_size == 64 > made_run.SPLITS["train"] and s.anneal == "linear"  # one step
    assert sorted(rates) == pytest.approx([2.5e-6, 12.5e-6, 125e-6], rel=1e-4)  # half way down
    row, moved = record["history"][0], {n for n, x in after.items() if not torch.equal(x, begun[n])}
    assert all(math.isfinite(row[k]) for k in ("loss", "cls", "vtc", "gen", "type"))
    for part in (
        "image_encoder",
        "text_encoder",
        "fvta",
        "cifr",
        "classifier",
        "type_head",
        "generator",
    ):
        assert any(name.startswith(part) for name in moved), part


def test_finished_run_is_done_anew(settings, alone, tmp_path):
    for k in (1, 2):
        record = T.train(settings, tmp_path)
        assert record["test_scorings"] == k and not (tmp_path / "checkpoints").exists()
        again = outcome(tmp_path)
        again["record"]["test_scorings"] = 1
        assert_alike(again, alone)  # and: the same settings give the same record


def test_results_of_other_settings_are_not_replaced(settings, tmp_path):
    "And files that no run has left stay, also where a restart replaces the run."
    foreign = [tmp_path / name for name in ("checkpoints/my.ckpt", "tensorboard/notes", "my.txt")]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("work", encoding="utf-8")
    one, two = replace(settings, epochs=1), replace(settings, epochs=2)
    T.train(one, tmp_path)
    before = (tmp_path / "record.json").read_bytes()
    with pytest.raises(InputError, match="a finished run of its own: epochs is 1 there, 2 here"):
        T.train(two, tmp_path)
    assert (tmp_path / "record.json").read_bytes() == before
    assert T.train(replace(two, restart=True), tmp_path)["test_scorings"] == 2
    assert all(path.read_text(encoding="utf-8") == "work" for path in foreign)


def test_a_scoring_that_was_killed_is_counted(settings, alone, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(T, "score_test", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                T.train(settings, tmp_path)
    assert T.train(settings, tmp_path)["test_scorings"] == 3
    done = outcome(tmp_path)
    done["record"]["test_scorings"] = 1
    assert_alike(done, alone)


def test_restart_hides_no_scoring(settings, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(T, "score_test", killed)
        with pytest.raises(KeyboardInterrupt):
            T.train(settings, tmp_path)
    begun_anew = replace(settings, restart=True)
    with monkeypatch.context() as patch:
        patch.setattr(T, "fit", killed)  # its checkpoints are thrown away by then
        with pytest.raises(KeyboardInterrupt):
            T.train(begun_anew, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))
    assert T.train(settings, tmp_path)["test_scorings"] == 2
    assert T.train(begun_anew, tmp_path)["test_scorings"] == 3


def test_what_is_added_to_a_record_is_there_at_once(settings, tmp_path, monkeypatch):
    "A run that is killed after its record was written is finished."

    def killed(files):
        if files.files():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            T.train(settings, tmp_path, also=lambda rows: {"rows": len(rows)})
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["rows"] == record["test"]["overall"]["questions"]


@pytest.mark.parametrize("variant", ["audit_test_epoch", "audit_all"])
def test_no_trial_of_a_variant_that_looks(settings, tmp_path, variant):
    with pytest.raises(InputError, match="it looks at the test split"):
        T.train(replace(settings, variant=variant), tmp_path / "trial", trial=True)
    assert not (tmp_path / "trial").exists()


def test_no_trial_over_a_finished_run(settings, tmp_path):
    def refused():
        with pytest.raises(InputError, match="holds a finished run.* another folder"):
            T.train(settings, tmp_path, trial=True)

    (tmp_path / "model").mkdir()
    refused()
    (tmp_path / "model").rmdir()  # for room
    record = tmp_path / "record.json"
    record.write_text('{"experiment": "train"}', encoding="utf-8")
    refused()
    assert record.read_text(encoding="utf-8") == '{"experiment": "train"}'


def test_no_trial_over_an_unfinished_run(stopped, settings, tmp_path, monkeypatch, capsys):
    before = states(stopped)
    with pytest.raises(InputError, match="holds an unfinished run.* another folder"):
        T.train(settings, stopped, trial=True)
    assert states(stopped) == before
    with monkeypatch.context() as m:
        m.setattr(T, "finish", lambda *args: pytest.fail("killed at the end"))
        with pytest.raises(pytest.fail.Exception):
            T.train(settings, tmp_path / "trial", trial=True)
    T.train(settings, tmp_path / "trial", trial=True)  # one of its own it goes on with
    assert "going on from epoch 4, step 0" in capsys.readouterr().out


def test_killed_while_it_clears_up(settings, alone, tmp_path, monkeypatch):
    "The newest checkpoint goes last: the older one would hide that the test split was scored."
    unlink = os.unlink

    def killed(path, *args, **kwargs):
        unlink(path, *args, **kwargs)
        if str(path).endswith(".pt"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        begin = checkpoints.Checkpoints.clear

        def clear(files):
            if files.files():
                patch.setattr(os, "unlink", killed)
            begin(files)

        patch.setattr(checkpoints.Checkpoints, "clear", clear)
        with pytest.raises(KeyboardInterrupt):
            T.train(settings, tmp_path)
    assert [f.name[:7] for f in (tmp_path / "checkpoints").iterdir()] == ["scoring"]
    assert T.train(settings, tmp_path)["test_scorings"] == 2
    done = outcome(tmp_path)
    done["record"]["test_scorings"] = 1
    assert_alike(done, alone)


def test_numbers_too_small_for_a_float_are_zero_while_it_trains(settings, tmp_path, monkeypatch):
    "A CPU computes with them many times slower. Elsewhere in the process they stay what they are."
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot do without them")
    seen, step = [], loop.train_step

    def product():
        return (torch.tensor([1e-40]) * 1).item()

    def watched(run, rows):
        seen.append(product())
        return step(run, rows)

    monkeypatch.setattr(loop, "train_step", watched)
    T.train(settings, tmp_path)
    assert set(seen) == {0} and product() > 0


def test_a_wrong_option_is_said_before_data_are_loaded(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(T, "prepare_samples", lambda *a: pytest.fail("data were loaded"))
    for wrong in (dict(model_options={"alhpa": 1}), dict(device="cuda:99")):
        with pytest.raises(InputError, match="alhpa|cuda:99"):
            T.train(replace(settings, **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["", "model", "checkpoints"])
def test_a_file_where_a_folder_belongs(settings, tmp_path, monkeypatch, name):
    monkeypatch.setattr(T, "fit", None)  # said before anything is trained
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name if name else tmp_path / "file"
    path.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=f"{path.name}: .*[Gg]ive another"):
        T.train(settings, tmp_path / ("run" if name else "file"))


def test_a_record_that_was_cut_off(settings, tmp_path):
    (tmp_path / "record.json").write_text('{"test_sco', encoding="utf-8")
    with pytest.raises(InputError, match="record.json: it was cut off"):
        T.train(settings, tmp_path)
    with pytest.raises(InputError, match="record.json: it was cut off"):
        publish(tmp_path, tmp_path / "records")


def test_a_second_run_in_a_folder_waits_its_turn(stopped, settings, alone):
    before = states(stopped)
    with T.alone_in(stopped), pytest.raises(InputError, match="another run is at work there"):
        T.train(settings, stopped)
    assert states(stopped) == before
    T.train(settings, stopped)
    assert_alike(outcome(stopped), alone)


def test_a_second_run_touches_nothing_of_the_first(stopped, settings):
    "A file that the first is about to give its name, and the folder that the second brought."
    written = stopped / ".history.jsonl.1.part"
    written.write_text("half", encoding="utf-8")
    with T.alone_in(stopped), pytest.raises(InputError, match="another run is at work there"):
        T.train(settings, stopped)
    assert written.read_text(encoding="utf-8") == "half"
    T.train(settings, stopped)
    assert not written.exists(), "nobody is at work there: it is of a process that was killed"


def test_a_run_that_fails_at_once_leaves_no_folder(settings, tmp_path):
    wrong = replace(settings, model_options={"blocks": "three"})
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError):
        T.train(wrong, tmp_path / "mine/new/run")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
    assert not list((tmp_path / "mine").iterdir()), "its folders are left"


def damage(path):
    "Cut a file in half; take a folder away."
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "cmi_mtl_processor.json",
        "tokenizer.json",
        "generator_tokenizer",
        "generator_tokenizer/tokenizer.json",
    ],
)
def test_a_damaged_model_is_named(settings, alone, top, tmp_path, name):
    shutil.copytree(top / "undisturbed/model", tmp_path / "model")
    damage(tmp_path / "model" / name)
    with pytest.raises(InputError, match=r"model[\w/.]*: the saved model is damaged"):
        CMIMTL.from_pretrained(tmp_path / "model")


def test_a_model_without_processor_says_what_is_missing(settings, alone, top, tmp_path):
    shutil.copytree(top / "undisturbed/model", tmp_path / "model")
    (tmp_path / "model/cmi_mtl_processor.json").unlink()
    with pytest.raises(InputError, match="a folder that holds cmi_mtl_processor.json"):
        CMIMTL.from_pretrained(tmp_path / "model").answer(None, "Is it well?")


def test_a_record_of_another_table_is_not_overwritten(settings, alone, top, tmp_path):
    target = publish(top / "undisturbed", tmp_path)
    assert publish(top / "undisturbed", tmp_path) == target  # the same once more
    other = json.loads(target.read_text(encoding="utf-8"))
    other["data"]["sha256_questions"] = "0" * 64
    target.write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(InputError, match="record of another table"):
        publish(top / "undisturbed", tmp_path)
    assert json.loads(target.read_text(encoding="utf-8")) == other


def test_tensorboard(settings, alone, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    T.train(replace(settings, tensorboard=True), tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert_alike(outcome(tmp_path), alone)
    for name in ("loss", "vtc", "validation", "validation_loss"):
        last = board.Scalars(name)[-1]
        assert last.step == 3 and math.isclose(last.value, alone["history"][-1][name], rel_tol=1e-5)


# ---------------------------------------------------------------- several processes

PROGRAM = """
    import sys
    import cmi_mtl.train as T
    from cmi_mtl import batches, loop
    in_order, init = loop.epoch_batches, batches.QuestionSet.__init__
    def closed_first(run, epoch):                       # so that the first process gets no open question
        out = [rows[run.data.type_labels[rows].argsort(stable=True)] for rows in in_order(run, epoch)]
        none_open = [not run.data.type_labels[rows.tensor_split(2)[0]].any() for rows in out]
        run.accelerator.print("first half without an open question:", any(none_open), flush=True)
        return out
    def unknown_answers(self, *args):
        init(self, *args)
        self.labels[1::7] = -1
    loop.epoch_batches, batches.QuestionSet.__init__ = closed_first, unknown_answers
    sys.exit(T.main())
"""


def test_two_processes_are_one_with_twice_the_batch(top, tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")

    def ran(name, processes, batch_size):
        # Batch normalisation, which the tiny encoder has, would take its means over a process' own share.
        alone = AutoConfig.for_model("convnext", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
        options = {"dropout": 0.0, "image_encoder": alone.to_dict()}
        s = made_run.settings(top, batch_size=batch_size, learning_rate=1e-3, model_options=options)
        given = dict(
            dataset="table",
            preset="tiny",
            data_root=s.data_root,
            epochs=3,
            device="cpu",
            augment=0,
            learning_rate=1e-3,
            batch_size=batch_size,
            model_options=json.dumps(s.model_options),
        )
        launcher = (
            [
                "-m",
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_processes",
                "2",
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
                "--main_process_port",
                "0",
            ]
            if processes == 2
            else []
        )
        command = [sys.executable, *launcher, tmp_path / "program.py", "--out", tmp_path / name]
        command += [x for k, v in given.items() for x in ("-p", k, str(v))]
        done = subprocess.run(command, env=environment(), capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-3000:]
        assert (
            done.stdout.count("first half without an open question: True") == 3
            and done.stdout.count("epoch   3/3") == 1
        )
        return json.loads((tmp_path / name / "record.json").read_text(encoding="utf-8")), outcome(
            tmp_path / name
        )

    (one, a), (two, b) = ran("one", 1, 14), ran("two", 2, 7)
    assert (one["processes"], two["processes"]) == (1, 2) and one["parameters"] == two["parameters"]
    parts = ("loss", "cls", "vtc", "gen", "type", "validation_loss")
    far = max(
        abs(x[k] - y[k]) for x, y in zip(a["history"], b["history"], strict=True) for k in parts
    )
    print(f"largest difference of a loss over 3 epochs: {far:.1e}")
    assert len(a["history"]) == 3 and far < 1e-4
    said = [[row["qid"] for row in x["predictions"]] for x in (a, b)]
    assert said[0] == said[1] and len(said[0]) == made_run.SPLITS["test"]
    assert (
        one["test"] == two["test"] and one["validation"]["overall"] == two["validation"]["overall"]
    )


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_an_empty_variable_of_a_launcher_counts_as_none(top, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "")
    s = made_run.settings(top)
    given = dict(
        dataset="table",
        preset="tiny",
        data_root=s.data_root,
        epochs=1,
        batch_size=8,
        device="cpu",
        model_options=json.dumps(s.model_options),
    )
    assert (
        T.main(["--out", str(tmp_path), *(x for k, v in given.items() for x in ("-p", k, str(v)))])
        == 0
    )
    assert (tmp_path / "record.json").exists()


# ---------------------------------------------------------------- tokens that are kept


def encode(name, delay=0.0):
    "Encode ten inputs by way of the cache; how many were computed here."
    torch.set_num_threads(1)
    encoder, computed = torch.nn.Linear(4, 3), []
    torch.nn.init.ones_(encoder.weight), torch.nn.init.zeros_(encoder.bias)
    encoder.config = type("Config", (), {"to_diff_dict": lambda self: {"name": name}})()

    def batch(rows):
        computed.append(rows)
        time.sleep(delay)
        with torch.no_grad():
            return encoder(torch.arange(40.0).view(10, 1, 4))[rows]

    tokens = encoders.encode_once(
        encoder, {}, [str(i) for i in range(10)], batch, (1, 3), batch_size=5
    )
    return len(computed), np.array(tokens)


def test_two_processes_encode_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CMI_MTL_CACHE", str(tmp_path))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        (a, x), (b, y) = pool.starmap(encode, [("shared", 0.3)] * 2)
    assert (
        sorted([a, b]) == [0, 2]
        and np.array_equal(x, y)
        and x.shape == (10, 1, 3)
        and x[9, 0, 0] == 36 + 37 + 38 + 39
    )
    assert len(list((tmp_path / "tokens").glob("*/tokens.npy"))) == 1


@pytest.mark.parametrize("name", ["tokens.npy", "meta.json"])
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-3], lambda b: b[:-1] + bytes([b[-1] ^ 8]), None],
    ids=["cut", "flipped", "missing"],
)
def test_damaged_tokens_are_computed_anew(tmp_path, monkeypatch, name, damage):
    monkeypatch.setenv("CMI_MTL_CACHE", str(tmp_path))
    first = encode("mine")
    path = next(tmp_path.rglob(name))
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    second, third = encode("mine"), encode("mine")
    assert (
        (first[0], second[0], third[0]) == (2, 2, 0)
        and np.array_equal(first[1], second[1])
        and np.array_equal(first[1], third[1])
    )


def test_frozen_run_with_and_without_kept_tokens(top, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CMI_MTL_CACHE", str(tmp_path / "cache"))
    calls, encode_image = [], CMIMTL.encode_image
    monkeypatch.setattr(
        CMIMTL, "encode_image", lambda self, x: calls.append(len(x)) or encode_image(self, x)
    )
    options = dict(
        freeze_encoders=True,
        augment=0.0,
        learning_rate=1e-3,
        model_options={"image_size": 96, "dropout": 0.0},
    )
    history, looked = {}, {}
    for kept in (True, False):
        calls.clear()
        T.train(made_run.settings(top, encode_once=kept, **options), tmp_path / str(kept))
        history[kept], looked[kept] = (
            [
                json.loads(x)
                for x in (tmp_path / f"{kept}/history.jsonl")
                .read_text(encoding="utf-8")
                .splitlines()
            ],
            sum(calls),
        )
    tried = 1  # the black picture that build_model sends through
    pictures, questions = 8, made_run.SPLITS
    each_epoch, at_the_end = (
        questions["train"] + questions["validation"],
        questions["validation"] + questions["test"],
    )
    # each once, one to learn the tokens' shape, and the blank one
    assert looked[True] == tried + pictures + 2
    assert 3 * pictures <= looked[False] - tried <= 3 * each_epoch + at_the_end
    for a, b in zip(history[True], history[False]):
        assert math.isclose(a["loss"], b["loss"], rel_tol=2e-2)
    mean = {kept: sum(r["seconds"] for r in rows[1:]) / 2 for kept, rows in history.items()}
    size = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("tokens.npy"))
    with capsys.disabled():
        print(
            f"\nseconds an epoch from the second on: {mean[True]:.2f} with kept tokens ({size / 1e3:.0f} kB), {mean[False]:.2f} without"
        )
