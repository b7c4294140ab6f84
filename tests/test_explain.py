"Explanations on every kind of encoder, on the layout of SLAKE, of saved models, of bad files."

import json
from dataclasses import replace

import made_data
import numpy as np
import pytest
import torch
from made_run import assert_alike
from PIL import Image
from transformers import AutoConfig

from cmi_mtl.block_influence import token_influence
from cmi_mtl.cifr import SelectiveBranch
from cmi_mtl.config import CMIMTLProcessor, tiny_config
from cmi_mtl.core import InputError
from cmi_mtl.datasets import load_dataset
from cmi_mtl.encoders import build_tokenizer
from cmi_mtl.explain import encode_question, explain, explain_encoded, methods_for
from cmi_mtl.grounding import (
    deletion_insertion,
    faithfulness,
    grounding_table,
    measure_grounding,
    region_mask,
    reliance,
    sanity_checks,
    untrained,
)
from cmi_mtl.model import CMIMTL, freeze_encoders
from cmi_mtl.samples import Region
from cmi_mtl.words import explain_question

VIT = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    patch_size=8,
    image_size=48,
)
ENCODERS = {
    "convnext": lambda: AutoConfig.for_model(
        "convnext", num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], patch_size=4
    ),
    "dinov2": lambda: AutoConfig.for_model("dinov2", **VIT),
    "vit": lambda: AutoConfig.for_model("vit", **VIT),
    "clip": lambda: AutoConfig.for_model("clip_vision_model", **VIT),
    "vit of another size": lambda: AutoConfig.for_model("vit", **VIT | {"image_size": 32}),
    "clip of another size": lambda: AutoConfig.for_model(
        "clip_vision_model", **VIT | {"image_size": 32}
    ),
}
ANSWERS = ["yes", "no", "left", "right", "upper zone"]


def model_with(encoder="convnext", seed=0, **options):
    torch.manual_seed(seed)
    words = build_tokenizer(["is the right lung healthy ? where is the heart", *ANSWERS])
    model = CMIMTL(
        tiny_config(
            ANSWERS, words, image_encoder=ENCODERS[encoder]().to_dict(), image_size=48, **options
        )
    )
    model.processor = CMIMTLProcessor.for_model(model.config, words)
    return model.eval()


def noise(width=60, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("pool", [1, 2])
def test_all_maps_on_every_encoder(encoder, pool):
    model = model_with(encoder, image_pool=pool)
    assert ("attention_rollout" in methods_for(model)) == (encoder != "convnext")
    for method in methods_for(model):
        answer = "upper zone" if method == "grad_cam_text" else None
        m = explain(model, noise(), "Is the right lung healthy?", method, answer)
        assert (
            m.values.shape == (40, 60) and m.grid.shape == (6 // pool,) * 2 and m.method == method
        )
        assert np.isfinite(m.grid).all() and (m.grid >= 0).all() and m.values.min() >= 0
        assert m.scale == 0 or abs(m.values.max() - 1) < 1e-6
    assert explain(
        model, noise(), "Where is the heart?", "query_attention"
    ).grid.sum() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"fusion_options": {"bidirectional": True}},
        {"fvta": False},
        {"num_queries": 7, "query_start": "mean", "qformer_layers": 3},
    ],
)
def test_attention_maps_whatever_the_options(options):
    model = model_with(**options)
    for method in ("hidden_attention", "gate"):
        m = explain(model, noise(), "Where is the heart?", method)
        assert m.grid.sum() == pytest.approx(1, abs=1e-4)  # shares of attention, over all patches


def hooks_and_attention(model):
    "How many hooks of ours hang on the model's modules, and by what its Q-Former attends."
    hooks = [
        h for m in model.modules() for h in {**m._forward_hooks, **m._forward_pre_hooks}.values()
    ]
    ours = [h for h in hooks if not h.__module__.startswith("transformers")]
    return len(ours), model.fvta.qformer.layers.config._attn_implementation


def test_explaining_leaves_the_model_as_it_was():
    model = model_with().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = [explain(model, noise(), "Where is the heart?", m).values for m in methods_for(model)]
    again = [explain(model, noise(), "Where is the heart?", m).values for m in methods_for(model)]
    explain_question(model, noise(), "Where is the heart?")
    for a, b in zip(first, again):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert hooks_and_attention(model) == (0, "sdpa") and model.training


@pytest.mark.parametrize("method", ["query_attention", "hidden_attention", "gate"])
def test_an_error_on_the_way_leaves_the_model_as_it_was(method, monkeypatch):
    model = model_with()
    encoded = encode_question(model, noise(), "Where is the heart?")

    def broken(*args, **named):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.classifier.head, "forward", broken)  # behind all that is noted
    with pytest.raises(RuntimeError, match="no memory"):
        explain_encoded(encoded, method, "yes")
    assert hooks_and_attention(model) == (0, "sdpa")


@pytest.mark.parametrize("encoder", ["convnext", "dinov2"])
def test_an_encoded_question_is_asked_again_with_other_inputs(encoder):
    encoded = encode_question(model_with(encoder), noise(), "Where is the heart?")
    assert (encoded.lead, encoded.side) == ((0, 6) if encoder == "convnext" else (1, 6))
    words = encoded.input_ids.repeat(3, 1)
    words[1] = words[1].flip(0)
    with torch.no_grad():
        one, many = encoded.output().logits, encoded.output(input_ids=words).logits
    assert many.shape == (3, len(ANSWERS))
    torch.testing.assert_close(many[[0, 2]], one.expand(2, -1), rtol=1e-4, atol=1e-5)
    assert (many[1] - one).abs().max() > 1e-4


@pytest.mark.parametrize("bidirectional", [False, True])
def test_influence_is_of_each_item_of_a_batch(bidirectional):
    torch.manual_seed(0)
    branch, x = SelectiveBranch(16, bidirectional=bidirectional), torch.randn(3, 7, 16)
    with torch.no_grad():
        together, alone = token_influence(branch, x), [token_influence(branch, i[None]) for i in x]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)
    assert (together.triu(1).sum() > 0) == bidirectional


def test_words_of_a_question_by_answer():
    model = model_with()
    parts = [explain_question(model, noise(), "Where is the heart?", a) for a in ("yes", "no")]
    assert [[w for w, _ in p] for p in parts] == [["where", "is", "the", "heart", "?"]] * 2
    assert max(abs(a - b) for (_, a), (_, b) in zip(*parts)) > 1e-4


def test_frozen_encoders_and_half_of_the_parameters():
    model = freeze_encoders(model_with("dinov2"))
    answers = [explain(model, noise(), "Where is the heart?", answer=a) for a in ANSWERS]
    assert len({m.scale for m in answers}) > 1  # the map depends on the answer that is explained


def test_answer_is_explained_that_is_named():
    model = model_with()
    assert (
        explain(model, noise(), "Where is the heart?").answer
        == model.answer(noise(), "Where is the heart?").answer
    )
    assert explain(model, noise(), "Where is the heart?", answer="The Left.").answer == "The Left."
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        explain(model, noise(), "Where?", answer="purple")


@pytest.mark.parametrize(
    "image, message",
    [("nowhere.png", "no such image file"), (np.zeros((4, 4, 2)), "an array of shape")],
)
def test_bad_pictures(image, message):
    with pytest.raises(InputError, match=message):
        explain(model_with(), image, "Where is the heart?")


def test_model_without_processor_or_vocabulary():
    model = model_with()
    model.processor = None
    with pytest.raises(InputError, match="processor"):
        explain(model, noise(), "Where?")
    model = model_with()
    model.config.answers = []
    with pytest.raises(InputError, match="vocabulary"):
        explain(model, noise(), "Where?")


def test_saved_model_gives_the_same_map(tmp_path):
    model = model_with()
    model.save_pretrained(tmp_path)
    again = CMIMTL.from_pretrained(tmp_path)
    a, b = (explain(m, noise(), "Where is the heart?") for m in (model, again))
    assert a.answer == b.answer and np.allclose(a.grid, b.grid, atol=1e-6)


def test_untrained_is_another_model_of_the_same_kind():
    model = model_with()
    other, same = untrained(model, 3), untrained(model, 3)

    def state(m):
        return torch.cat([p.flatten() for p in m.parameters()])

    assert torch.equal(state(other), state(same)) and not torch.equal(state(other), state(model))
    assert other.config.answers == model.config.answers and other.processor is model.processor


def test_grounding_on_the_layout_of_slake(tmp_path):
    made_data.write(made_data.slake_files(), tmp_path)
    samples = load_dataset("slake", tmp_path)
    rows = measure_grounding(model_with(), samples, rival=untrained(model_with()))
    assert [r["qid"] for r in rows] == [s.qid for s in samples if s.regions] and len(rows) >= 2
    assert json.loads(json.dumps(rows)) == rows  # plain values: they go into a file as they are
    for r in rows:
        assert (
            0 < r["area"] < 1
            and r["kind"] == "organ"
            and r["pointing: chance"] == r["energy: chance"] == r["area"]
        )
        assert all(0 <= v <= 1 for k, v in r.items() if ": " in k)


def test_rival_explains_the_answer_of_the_model(tmp_path, monkeypatch):
    made_data.write(made_data.slake_files(), tmp_path)
    samples, model = load_dataset("slake", tmp_path), model_with()
    rival, explained = untrained(model), []

    def noted(encoded, *args):
        heat = explain_encoded(encoded, *args)
        explained.append((encoded.model is rival, heat.answer))
        return heat

    monkeypatch.setattr("cmi_mtl.grounding.explain_encoded", noted)
    with torch.no_grad():
        rival.classifier.head[-1].bias[ANSWERS.index("upper zone")] += 100
    measure_grounding(model, samples, rival=rival)
    by_model = [answer for is_rival, answer in explained if not is_rival]
    assert [answer for is_rival, answer in explained if is_rival] == by_model
    s = samples[0]
    assert explain(rival, s.image, s.question).answer not in by_model  # its own would be another


def test_table_without_a_rival(tmp_path):
    made_data.write(made_data.slake_files(), tmp_path)
    rows = measure_grounding(model_with(), load_dataset("slake", tmp_path))
    lines = grounding_table(rows, ("chance", "centre")).splitlines()
    assert {line.count("|") for line in lines} == {7} and "untrained" not in lines[0]
    assert lines[2].startswith(f"| all with a region | {len(rows)} | pointing |")
    assert lines[5] == "| focal finding, correct | 0 | pointing | - | - | - |"


def test_region_mask_joins_boxes_and_masks(tmp_path):
    made_data.write(made_data.slake_files(), tmp_path)
    s = next(s for s in load_dataset("slake", tmp_path) if s.regions)
    box = Region("made", (40.6, -3.0, 30.0, 8.0))
    mask = region_mask(replace(s, regions=(box,)), 48, 40)
    assert mask[:5, 41:].all() and mask.sum() == 5 * 7  # cut at the picture's edge
    for beside in ((-30, 5, 10, 10), (5, -30, 10, 10), (60, 5, 9, 9)):
        assert not region_mask(replace(s, regions=(Region("made", beside),)), 48, 40).any()
    assert region_mask(s, 48, 40).any() and not region_mask(replace(s, regions=()), 48, 40).any()
    with_mask = next(s for s in load_dataset("slake", tmp_path) if any(r.mask for r in s.regions))
    with pytest.raises(InputError, match="48 x 40, its picture 20 x 20"):
        region_mask(with_mask, 20, 20)


def test_sanity_and_faithfulness_are_reproducible(tmp_path):
    made_data.write(made_data.slake_files(), tmp_path)
    samples, model = load_dataset("slake", tmp_path)[:2], model_with()
    for measure in (
        lambda: sanity_checks(model, samples),
        lambda: faithfulness(model, samples, steps=4),
    ):
        assert_alike(measure(), measure())
    assert all(r["weights"] == pytest.approx(1) for r in sanity_checks(model, samples, rival=model))


def test_measures_of_a_model_in_half_precision(tmp_path):
    made_data.write(made_data.slake_files(), tmp_path)
    samples, model = load_dataset("slake", tmp_path)[:2], model_with()
    whole, asked = (
        faithfulness(model, samples, steps=2),
        reliance(model, samples[0], samples[1].image),
    )
    model.bfloat16()
    for a, b in zip(whole, faithfulness(model, samples, steps=2)):
        assert b["deletion: centre"] == pytest.approx(a["deletion: centre"], abs=0.02)
    half = reliance(model, samples[0], samples[1].image)
    assert half["fall"] == pytest.approx(asked["fall"], abs=0.02)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_picture_has_one_map_however_it_comes(tmp_path, kind):
    "By path, as PIL image and as array, the map's own steps included."
    a = np.random.default_rng(0).integers(0, np.iinfo(kind).max // 9, (20, 30)).astype(kind)
    Image.fromarray(a).save(tmp_path / "a.png")
    model, results = model_with(), []
    for source in (tmp_path / "a.png", Image.open(tmp_path / "a.png"), a):
        heat = explain(model, source, "Where is the heart?")
        curves = deletion_insertion(
            model, source, "Where is the heart?", heat.values, heat.answer, steps=2
        )
        results.append((heat.values, *curves))
    assert results[0][0].shape == (20, 30)
    for other in results[1:]:
        for x, y in zip(results[0], other):
            np.testing.assert_allclose(x, y, atol=1e-5)
