"The smallest training there is, and ways to disturb it: `python tests/made_run.py folder` plays the kill test."

import json
import math
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import made_data
import torch
from safetensors.torch import load_file

import cmi_mtl.train as T
from cmi_mtl import checkpoints, loop, scores
from cmi_mtl.core import read_jsonl
from cmi_mtl.model import CMIMTL
from cmi_mtl.settings import CHANGES_NO_NUMBER, make_settings

MODEL = dict(
    hidden_size=16,
    image_size=32,
    num_queries=4,
    qformer_layers=2,
    qformer_heads=2,
    projection_size=8,
    fusion_layers=1,
    fusion_options={"d_state": 4},
    dropout=0.1,
)
SPLITS = dict(train=36, validation=10, test=8)


def settings(folder, **given):
    "Settings for a table of invented questions, which is written into `folder` where it is missing."
    folder = Path(folder)
    if not (folder / "table.csv").exists():
        made_data.write(
            {f"{i}.png": made_data.picture(i, (32, 32), "PNG") for i in range(8)}, folder
        )
        kinds = [
            ("OPEN", "Where is it?", "left side"),
            ("CLOSED", "Is it well?", "yes"),
            ("CLOSED", "Is it large?", "no"),
            ("OPEN", "What is it?", "lung"),
            ("CLOSED", "Is it dark?", "yes"),
        ]
        rows = [
            f"{i % 8}.png,{kinds[i % 5][1][:-1]} {split} {i}?,{kinds[i % 5][2]},{kinds[i % 5][0]},{split}"
            for split, n in SPLITS.items()
            for i in range(n)
        ]
        (folder / "table.csv").write_text(
            "\n".join(["image,question,answer,answer_type,split", *rows]), encoding="utf-8"
        )
    model = {**MODEL, **given.pop("model_options", {})}
    return make_settings(
        "table",
        "tiny",
        data_root=str(folder / "table.csv"),
        device="cpu",
        **{**dict(epochs=3, batch_size=8, learning_rate=1e-2, model_options=model), **given},
    )


def outcome(folder):
    "What a finished run leaves, without times and provenance."
    folder = Path(folder)
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    for k in ("time", "seconds", "commit", "tree_changed"):
        record.pop(k)
    for row in record["history"]:
        row.pop("seconds")
    for k in CHANGES_NO_NUMBER:
        record["settings"].pop(k)
    history = [
        json.loads(line)
        for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for row in history:
        row.pop("seconds")
    config = json.loads((folder / "model/config.json").read_text(encoding="utf-8"))
    return {
        "record": record,
        "history": history,
        "predictions": read_jsonl(folder / "predictions.jsonl"),
        "config": config,
        "weights": load_file(folder / "model/model.safetensors"),
    }


def assert_alike(a, b, place="outcome"):
    """Two outcomes agree: names, texts and counts exactly; numbers and weights to rounding, which grows over the steps of a run.

    Between two kinds of processor, weights of these runs differ by up to 2e-4, numbers in the records by less."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{place}: {sorted(a.keys() ^ b.keys())}"
        for k in a:
            assert_alike(a[k], b[k], f"{place}, {k}")
    elif isinstance(a, list):
        assert len(a) == len(b), f"{place}: {len(a)} and {len(b)} entries"
        for i, (x, y) in enumerate(zip(a, b)):
            assert_alike(x, y, f"{place}, {i}")
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda m: f"{place}: {m}")
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3), f"{place}: {a} and {b}"
    else:
        assert a == b, f"{place}: {a!r} and {b!r}"


def disturb(moment, action, only=None):
    """Call `action` at the given tick, counting all, or `only` those of one place. A tick comes before each step, each forward pass without gradients, each file that is put in
    its place or deleted, half way through each checkpoint, and before each part of what a run leaves."""
    ticks = iter(range(1, 10**6))

    def tick(place):
        if only in (None, place) and next(ticks) == moment:
            action(place)

    def before(owner, name):
        old = getattr(owner, name)

        def new(*args, **kwargs):
            tick(name)
            return old(*args, **kwargs)

        setattr(owner, name, new)

    for owner, name in (
        (loop, "train_step"),
        (loop, "predict"),
        (scores, "predict"),
        (os, "replace"),
        (Path, "unlink"),
        (T, "finish"),
        (T, "write_jsonl"),
        (loop, "write_jsonl"),
        (T, "write_json"),
        (checkpoints.Checkpoints, "clear"),
        (CMIMTL, "save_pretrained"),
        (T, "build_model"),
    ):
        before(owner, name)
    save = torch.save

    def halting(state, f):
        start = f.tell()
        save(state, f)
        size = f.tell()
        f.seek(start + (size - start) // 2)
        f.truncate()
        f.flush()
        tick("half a checkpoint")
        f.seek(start)
        f.truncate()
        save(state, f)

    torch.save = halting


def in_child(work):
    "Run `work` in a fork of this process; its exit status as os.waitpid gives it."
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as e:
            code = e.code
        except BaseException as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def kill_and_go_on(top, kills=20, seed=0, longest=14):
    """A run left alone, in `top`/alone, and runs in `top`/killed0, … that are killed and started again until there have been
    `kills` kills. Where and how each was killed, and the number of runs."""
    torch.set_num_threads(1)
    rng, done, runs = random.Random(seed), [], 0
    s = settings(top, save_every=2, anneal="linear", fvta_factor=0.5, augment=0.1)
    start = time.perf_counter()
    assert in_child(lambda: T.train(s, top / "alone")) == 0
    alone = time.perf_counter() - start
    while len(done) < kills:
        how, moment = (
            rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]),
            rng.randint(1, longest),
        )
        delay, only = rng.choice([0, rng.random() / 50]), None
        if len(done) % 5 == 0:
            how, moment, delay, only = signal.SIGKILL, rng.randint(1, 2), 0, "half a checkpoint"

        def action(place):
            (top / "place").write_text(place, encoding="utf-8")

            def kill():
                return os.kill(os.getpid(), how)

            kill() if delay == 0 else threading.Timer(delay, kill).start()

        def work():
            disturb(moment, action, only)
            T.train(s, top / f"killed{runs}")

        status = in_child(work)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if code in (-signal.SIGKILL, -signal.SIGTERM, 143):
            done.append((how.name, (top / "place").read_text(encoding="utf-8"), code))
        elif code:
            raise RuntimeError(f"the run failed after {done}")
        finished = (top / f"killed{runs}/record.json").exists() and not list(
            (top / f"killed{runs}").rglob("*.pt")
        )
        runs += finished  # it may be killed after its end, too
    if not finished:
        assert in_child(lambda: T.train(s, top / f"killed{runs}")) == 0
    return {
        "kills": done,
        "runs": runs + (not finished),
        "seconds": time.perf_counter() - start,
        "alone": alone,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(kill_and_go_on(Path(sys.argv[1]))))
