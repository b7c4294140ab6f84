"The audit: each departure changes what it says and nothing else, and nobody else looks at the test split."

import json
from dataclasses import replace
from pathlib import Path

import made_run
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import cmi_mtl.train as T
from cmi_mtl import batches, build, checkpoints, loop, scores
from cmi_mtl.audit import FirstToken, depart, load_audited
from cmi_mtl.core import InputError
from cmi_mtl.departures import AUDIT, DEPARTURES, base_of, changes_of, looked, watches_test
from cmi_mtl.model import CMIMTL
from cmi_mtl.records import publish
from cmi_mtl.run import run_notebook
from cmi_mtl.settings import VARIANTS, make_settings

ROOT = Path(__file__).resolve().parent.parent
LOOKS = ("audit_test_epoch", "audit_all", "audit_paper_all")
RANDOM = ("audit_random_cifr", "audit_all", "audit_paper_random_cifr", "audit_paper_all")
PADS = ("audit_padded_generator", "audit_padded_scan", "audit_all", "audit_paper_all")
NEW_ANSWER = "spleen"  # stands in the test split alone


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def samples(top):
    "Eight training questions, so one step an epoch; a long question and a new answer in the test split."
    rows = batches.prepare_samples(made_run.settings(top), None)
    train = [x for x in rows if x.split == "train"][:8]
    held, test = ([x for x in rows if x.split == split] for split in ("validation", "test"))
    test[0] = replace(test[0], answer=NEW_ANSWER)
    test[1] = replace(test[1], question=f"{test[1].question} Or is it not well but large and dark?")
    return [*train, *held, *test]


def settings(top, variant, **given):
    return made_run.settings(top, variant=variant, epochs=2, **given)


@pytest.fixture(scope="module")
def trained(top, samples):
    "Folder and record of a run of two steps, for each variant that is asked for."
    done = {}

    def run(variant):
        if variant not in done:
            with pytest.MonkeyPatch.context() as m:
                m.setattr(scores, "sentence_vectors", lambda texts, **_: torch.ones(len(texts), 1))
                done[variant] = T.train(settings(top, variant), top / variant, samples)
        return top / variant, done[variant]

    return run


@pytest.fixture
def begun(top, samples, tmp_path):
    "A run of the variant that has not made a step."

    def begin(variant, **given):
        s = settings(top, variant, **given)
        model, accelerator = build.build_model(s, samples), Accelerator(cpu=True)
        data = batches.QuestionSet(samples, model, False, accelerator.device)
        rows = [i for i, x in enumerate(samples) if x.split == "train"]
        return loop.start_run(
            s,
            data,
            model,
            rows,
            accelerator,
            checkpoints.Progress(),
            checkpoints.Checkpoints(tmp_path / "checkpoints", {}),
        )

    return begin


# ---------------------------------------------------------------- each variant


@pytest.mark.parametrize("variant", AUDIT)
def test_trains_and_says_so(trained, variant):
    folder, record = trained(variant)
    kept = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    on = AUDIT[variant]["departures"]
    assert kept["settings"]["variant"] == variant
    assert kept["audit"]["base"] == base_of(variant)
    assert kept["audit"]["departures"] == {d: DEPARTURES[d].says for d in on}
    assert len(kept["history"]) == 2 and kept["test_scorings"] == 1
    saved, again = load_file(folder / "model/model.safetensors"), load_audited(folder / "model")
    assert again.config.audit == variant
    for name, weight in again.state_dict().items():
        if name in saved:
            torch.testing.assert_close(weight, saved[name])
    assert saved.keys() <= again.state_dict().keys()
    built = build.model_from_record(kept)
    assert built.state_dict().keys() == again.state_dict().keys()
    assert type(built.classifier) is type(again.classifier)
    assert type(built.generator) is type(again.generator)


@pytest.mark.parametrize("variant", AUDIT)
def test_differs_from_its_base_in_what_it_says_alone(begun, samples, variant):
    base, run = begun(base_of(variant)), begun(variant)
    more_answers = "6a" in AUDIT[variant]["departures"]
    changed = {
        k for k in vars(run.settings) if getattr(run.settings, k) != getattr(base.settings, k)
    }
    assert changed == {"variant", *changes_of(variant, "settings")}
    fields = build.model_record(run.core, "tiny")
    odd = {k for k, v in build.model_record(base.core, "tiny").items() if fields[k] != v}
    may = (
        {*changes_of(variant, "options"), "answers", "shapes"}
        if more_answers or variant in RANDOM
        else {*changes_of(variant, "options")}
    )
    assert odd <= may
    one, other = base.core.state_dict(), run.core.state_dict()
    assert {k.split(".")[0] for k in one.keys() ^ other.keys()} == (
        {"cifr"} if variant in RANDOM else set()
    )
    grown = {k for k in other if one[k].shape != other[k].shape}
    assert grown == (
        {"classifier.head.4.weight", "classifier.head.4.bias"} if more_answers else set()
    )
    if not more_answers:  # a larger head draws more random numbers
        for k in other:
            assert torch.equal(one[k], other[k]), k
    rows = torch.arange(4)
    batches = [r.data.batch(rows)["input_ids"] for r in (base, run)]
    wider = batches[1].shape[1] > batches[0].shape[1]
    assert wider == (variant in PADS)
    L = batches[0].shape[1]
    assert torch.equal(batches[0], batches[1][:, :L]) and not batches[1][:, L:].any()
    slow = "5" in AUDIT[variant]["departures"]
    rates = [
        {
            n: g["initial_lr"]
            for g in r.optimiser.param_groups
            for p in g["params"]
            for n, x in r.core.named_parameters()
            if x is p
        }
        for r in (base, run)
    ]
    for name, rate in rates[1].items():
        share = 0.2 if slow and name.startswith(("fvta.qformer.", "generator.t5.")) else 1
        assert rate == pytest.approx(share * rates[0][name]), name


def test_other_variants_are_as_they_were(trained, samples):
    folder, record = trained("cmi_mtl")
    assert "audit" not in record and all("test" not in row for row in record["history"])
    model = CMIMTL.from_pretrained(folder / "model")
    assert NEW_ANSWER not in model.config.answers and not hasattr(model.config, "audit")
    assert depart(model, "cmi_mtl") is model and type(model.classifier) is not FirstToken


# ---------------------------------------------------------------- what single departures do


def test_random_cifr_is_new_each_time_and_never_saved(trained, begun, samples):
    folder, _ = trained("audit_random_cifr")
    assert not any("cifr" in k for k in load_file(folder / "model/model.safetensors"))
    run, base = begun("audit_random_cifr"), begun("cmi_mtl")

    def asked(r, step):
        r.progress.step = step
        return loop.predict(r, [0, 1, 2])[0]

    assert (asked(run, 0) - asked(run, 1)).abs().max() > 1e-5
    torch.testing.assert_close(asked(base, 0), asked(base, 1))
    assert not list(run.core.cifr.parameters())


@pytest.mark.parametrize("variant", ["audit_first_token", "audit_paper_first_token"])
def test_first_token_gives_A_no_gradient(begun, variant):
    run, base = begun(variant), begun(base_of(variant))
    length = run.core.config.num_queries
    for r, is_zero in ((run, True), (base, False)):
        ids = torch.arange(5, 5 + length).repeat(2, 1)
        out = r.core(torch.randn(2, 3, 32, 32), ids, torch.ones_like(ids))
        out.logits.logsumexp(1).sum().backward()
        for block in r.core.cifr.blocks:
            assert (block.branch.A_log.grad.norm().item() == 0) == is_zero
            assert (block.branch.conv.weight.grad[:, 0, :-1].norm().item() == 0) == is_zero
            assert block.branch.in_proj.weight.grad.norm() > 0


def test_vocabulary_has_the_test_answers(trained):
    (_, with_test), (_, without) = trained("audit_test_answers"), trained("cmi_mtl")
    assert with_test["data"]["answers"] == without["data"]["answers"] + 1
    assert with_test["data"]["ceiling"]["overall"] == 100 > without["data"]["ceiling"]["overall"]


@pytest.mark.parametrize(
    "variant,part", [("audit_padded_generator", "gen"), ("audit_padded_scan", "cls")]
)
def test_padding_counts(begun, variant, part):
    def losses(run, longer):
        batch = loop.to_inputs(run.data.batch(torch.arange(4)), run, False)
        for k in ("input_ids", "attention_mask"):
            batch[k] = torch.nn.functional.pad(batch[k], (0, longer))
        with torch.no_grad():
            return run.core.eval()(**batch).losses[part].item()

    run, base = begun(variant), begun("cmi_mtl")
    assert losses(base, 0) == pytest.approx(losses(base, 8), abs=1e-5)
    assert abs(losses(run, 0) - losses(run, 8)) > 1e-5


def test_clipping_in_the_forward_pass_is_no_clipping(begun):
    def weights(variant, inside=False, **given):
        run = begun(variant, warmup=0.0, **given)
        if inside:

            def clip(*_):
                torch.nn.utils.clip_grad_norm_(run.core.parameters(), 1e-3)

            run.core.register_forward_pre_hook(clip)
        for _ in range(2):
            loop.train_step(run, run.rows)
        return torch.cat([p.detach().flatten() for p in run.trained])

    published, nothing = weights("audit_no_clipping", inside=True), weights("audit_no_clipping")
    real = weights("cmi_mtl", clip=1e-7)  # Adam minds the size of a gradient near its epsilon
    torch.testing.assert_close(published, nothing, rtol=1e-5, atol=1e-6)
    assert (real - nothing).norm() > 0.1 * (nothing - begun_weights(begun)).norm()


def begun_weights(begun):
    return torch.cat([p.detach().flatten() for p in begun("cmi_mtl").trained])


def test_settings_of_a_departure_give_way_to_given_ones():
    assert make_settings(variant="audit_no_clipping").clip == 1e9
    assert make_settings(variant="audit_no_clipping", clip=1.0).clip == 1.0
    assert make_settings(variant="audit_first_token").clip == make_settings().clip
    for variant in ("audit_no_such", ["audit_all"]):
        with pytest.raises(InputError, match="audit_first_token"):
            make_settings(variant=variant)


def test_a_module_that_is_off_cannot_be_changed(begun):
    with pytest.raises(InputError, match="this model has no cifr"):
        begun("audit_random_cifr", model_options={"cifr": False})


def test_what_draws_while_it_predicts_draws_the_same_after_a_resume(begun):
    run, logits = begun("audit_random_cifr"), []
    for seed in (0, 1):  # a resumed run comes to its prediction in another state
        torch.manual_seed(seed)
        logits.append(loop.predict(run, [0, 1])[0])
    torch.testing.assert_close(*logits)


# ---------------------------------------------------------------- the test split


def watched(top, samples, tmp_path, monkeypatch, variant):
    "Of each prediction before the end of training, how many test rows it had; and all rows trained on."
    test = {i for i, x in enumerate(samples) if x.split == "test"}
    seen, learned, fitting = [], set(), []
    fit, predict, step = loop.fit, loop.predict, loop.train_step

    def watch_fit(*args):
        fitting.append(1)
        fit(*args)
        fitting.clear()

    def watch_predict(run, rows, *args, **given):
        if fitting:
            seen.append(len(test & set(rows)))
        return predict(run, rows, *args, **given)

    def watch_step(run, rows):
        learned.update(rows.tolist())
        return step(run, rows)

    monkeypatch.setattr(T, "fit", watch_fit)
    monkeypatch.setattr(loop, "train_step", watch_step)
    for module in (loop, scores):
        monkeypatch.setattr(module, "predict", watch_predict)
    monkeypatch.setattr(scores, "sentence_vectors", lambda texts, **_: torch.ones(len(texts), 1))
    record = T.train(settings(top, variant), tmp_path / "run", samples)
    assert not learned & test
    return seen, record


@pytest.mark.parametrize("variant", ["cmi_mtl", "pooled", "cmi_mtl_paper", "audit_test_answers"])
def test_is_closed_until_the_end(top, samples, tmp_path, monkeypatch, variant):
    seen, record = watched(top, samples, tmp_path, monkeypatch, variant)
    assert len(seen) == 2 and not any(seen), "only validation is scored after an epoch"
    assert not any(k.startswith("test") for row in record["history"] for k in row)


def test_no_variant_but_three_may_look():
    assert [v for v in (*VARIANTS, *AUDIT) if watches_test(v)] == list(LOOKS)
    assert not set(AUDIT) & set(VARIANTS)


def test_the_best_epoch_is_chosen_on_test_and_training_is_the_same(
    top, samples, trained, tmp_path, monkeypatch
):
    (folder, base) = trained("cmi_mtl")
    seen, record = watched(top, samples, tmp_path, monkeypatch, "audit_test_epoch")
    assert sorted(seen) == [0, 0, 8, 8]
    curve = [row["test"] for row in record["history"]]
    told = record["audit"]
    assert (told["best"], told["last"], told["epochs"]) == (max(curve), curve[-1], 2)
    right = looked(record["history"], 8)
    predictions = [
        json.loads(x)
        for x in (tmp_path / "run/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert right[-1].tolist() == [p["correct"] for p in predictions]
    for a, b in zip(base["history"], record["history"]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    weights = [load_file(x / "model/model.safetensors") for x in (folder, tmp_path / "run")]
    made_run.assert_alike(*weights)


# ---------------------------------------------------------------- the experiment


def test_the_notebook_reads_published_records(trained, tmp_path):
    for variant in ("cmi_mtl", "audit_test_epoch", "audit_first_token", "audit_all"):
        publish(trained(variant)[0], tmp_path / "records")
    parameters = {"dataset": "table", "records": str(tmp_path / "records")}
    run_notebook(ROOT / "nbs/experiments/audit.ipynb", tmp_path / "out/audit.ipynb", parameters)
    table = pd.read_csv(tmp_path / "out/audit_table.csv").set_index("variant")
    assert table.seeds[["audit_first_token", "audit_random_cifr"]].tolist() == [1, 0]
    record = trained("audit_test_epoch")[1]
    assert table.accuracy["audit_test_epoch"] == pytest.approx(record["audit"]["best"])
    gain = record["audit"]["best"] - record["audit"]["last"]
    assert table.against_base["audit_test_epoch"] == pytest.approx(gain, abs=1e-3)
    text = (tmp_path / "out/audit_table.md").read_text(encoding="utf-8")
    sentences = [x for x in text.splitlines() if x.startswith("- **")]
    assert len(sentences) == 5 and "best of 2 epochs" in sentences[3]
    assert "no effect by construction" in text and "not run" in sentences[0]
    assert (tmp_path / "out/audit_table.svg").is_file()
