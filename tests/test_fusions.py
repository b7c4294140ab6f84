"""Fusions inside the whole model: every variant trains at the shapes of both small presets, options
stay with the fusion they are meant for, and a registered fusion is saved and loaded."""

from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn
from transformers import AutoConfig

import cmi_mtl.config as C
import cmi_mtl.model as M
import cmi_mtl.train as T
from cmi_mtl.cifr import CIFR, FUSIONS
from cmi_mtl.core import InputError, seed_everything
from cmi_mtl.encoders import build_tokenizer
from cmi_mtl.lengths import masked_mean
from cmi_mtl.records import publish
from cmi_mtl.settings import ALONE, FULL_RATE, VARIANTS, make_settings

ANSWERS = ["yes", "no", "heart", "liver"]
WORDS = build_tokenizer(["is there a nodule in the left lung?", "which organ is enlarged?"])
OF_FUSIONS = [v for v, changes in VARIANTS.items() if "fusion" in changes and v not in FULL_RATE]
PUBLISHED = {"san": 1, "ban": 1, "mfb": 1, "co_attention": 6}
MAMBA = {"cross_mamba", "joint_mamba"}


class Film(nn.Module):
    "A reader's own fusion."

    def __init__(self, d, dropout=0.0, gain=1.0):
        super().__init__()
        self.shift, self.gain = nn.Linear(d, d), gain

    def forward(self, v, q, lengths):
        return v + self.gain * self.shift(masked_mean(q, lengths))[:, None], q


def compact_shapes(name):
    "DINOv2-small and MiniLM as they are for the fusion, with one layer and without their weights."
    size = dict(hidden_size=384, num_hidden_layers=1)
    if "dino" in name:
        return AutoConfig.for_model(
            "dinov2", num_attention_heads=6, patch_size=14, image_size=518, **size
        )
    return AutoConfig.for_model("bert", num_attention_heads=12, intermediate_size=1536, **size)


def configuration(preset, monkeypatch, **options):
    monkeypatch.setattr(C, "encoder_config", compact_shapes)
    make = {"tiny": C.tiny_config, "compact": C.compact_config}[preset]
    return make(ANSWERS, WORDS, **options)


@pytest.mark.parametrize("preset", ["tiny", "compact"])
@pytest.mark.parametrize("variant", OF_FUSIONS)
def test_every_fusion_variant_trains(preset, variant, monkeypatch):
    config = configuration(preset, monkeypatch, **VARIANTS[variant])
    assert config.fusion_layers == PUBLISHED.get(config.fusion, 2)
    lone = variant in ALONE
    assert (config.fvta, config.ffae, config.global_path) == (not lone,) * 3 and config.cifr
    seed_everything(0)
    net = M.freeze_encoders(M.CMIMTL(config).train())
    batch = C.example_batch(config, size=4)
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-4, weight_decay=0)
    for _ in range(2):
        loss = net(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in trained.values())
        optimiser.step()
    still = [n for n, p in trained.items() if torch.equal(p, before[n])]
    assert not still


@pytest.mark.parametrize("preset", ["tiny", "compact"])
def test_options_of_a_preset_stay_with_mamba(preset, monkeypatch):
    assert configuration(preset, monkeypatch).fusion_options == {"expand": 1}
    for fusion in FUSIONS:
        config = configuration(preset, monkeypatch, fusion=fusion)
        assert config.fusion_options == ({"expand": 1} if fusion in MAMBA else {})
        with torch.device("meta"):
            CIFR(config.hidden_size, fusion, **config.fusion_options)
    given = configuration(preset, monkeypatch, fusion="san", fusion_options={"hops": 3})
    assert given.fusion_options == {"hops": 3}
    given = configuration(preset, monkeypatch, fusion_options={"d_state": 4})
    assert given.fusion_options == {"d_state": 4}  # replaced, not mixed


SMALL = {
    "san": dict(hidden=24, attention=12),
    "ban": dict(hidden=24, glimpses=2),
    "mfb": dict(width=20, hidden=12),
    "film": dict(gain=2.0),
}


@pytest.mark.parametrize("fusion", [*FUSIONS, "film"])
def test_a_model_keeps_its_fusion(fusion, tmp_path, monkeypatch):
    monkeypatch.setitem(FUSIONS, "film", Film)
    options = SMALL.get(fusion, {})
    config = C.tiny_config(ANSWERS, WORDS, fusion=fusion, fusion_layers=1, fusion_options=options)
    nets = [M.CMIMTL(config).eval()]
    for folder in ("once", "twice"):
        nets[-1].save_pretrained(tmp_path / folder)
        nets.append(M.CMIMTL.from_pretrained(tmp_path / folder).eval())
    batch = C.example_batch(config)
    logits, *again = (net(**batch).logits for net in nets)
    for other in again:
        torch.testing.assert_close(other, logits)
    assert nets[-1].config.fusion_options == options


def test_a_fusion_that_is_not_registered_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(FUSIONS, "film", Film)
    M.CMIMTL(C.tiny_config(ANSWERS, WORDS, fusion="film")).save_pretrained(tmp_path)
    monkeypatch.delitem(FUSIONS, "film")
    with pytest.raises(InputError) as e:
        M.CMIMTL.from_pretrained(tmp_path)
    assert len(e.value.problems) == 1
    for part in (
        "fusion='film'",
        "import its module",
        "FUSIONS['film'] = YourBlock",
        "joint_mamba",
    ):
        assert part in str(e.value)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_mixed_precision_agrees(fusion):
    seed_everything(0)
    net, lengths = CIFR(64, fusion, 1, **SMALL.get(fusion, {})).eval(), torch.tensor([9, 4])
    v, q = torch.randn(2, 12, 64), torch.randn(2, 9, 64)
    whole = net(v, q, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(v, q, lengths)
    for a, b in zip(whole, half):
        assert b.isfinite().all()
        assert (a[:, :4] - b[:, :4]).norm() < 0.05 * a[:, :4].norm()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_question_without_words_spoils_no_batch(fusion):
    options = dict(fusion=fusion, fusion_layers=1, fusion_options=SMALL.get(fusion, {}))
    seed_everything(0)
    net = M.CMIMTL(C.tiny_config(ANSWERS, WORDS, **options)).eval()
    batch = C.example_batch(net.config, size=4)
    others = net(**batch).logits[1:]
    batch["attention_mask"][0] = 0
    out = net(**batch)
    torch.testing.assert_close(out.logits[1:], others, atol=1e-5, rtol=0)
    out.loss.backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert out.logits.isfinite().all() and out.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)


ONE_WAY = [(fusion, SMALL.get(fusion, {})) for fusion in FUSIONS]
BOTH_WAYS = [(fusion, {"bidirectional": True}) for fusion in sorted(MAMBA)]


@pytest.mark.parametrize("lengths", [(9, 0), (0, 9), (0, 0)], ids=str)
@pytest.mark.parametrize("fusion, options", ONE_WAY + BOTH_WAYS, ids=str)
def test_a_fusion_stays_finite_without_words(fusion, options, lengths):
    seed_everything(0)
    net = CIFR(64, fusion, 2, **options)
    v, q = (torch.randn(2, n, 64, requires_grad=True) for n in (12, 9))
    sequences = net(v, q, torch.tensor(lengths))
    sum(x.pow(2).sum() for x in sequences).backward()
    assert all(x.isfinite().all() for x in (*sequences, v.grad, q.grad))
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


# ---------------------------------------------------------------- from one cell to a row of the table

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs/experiments/fusion.ipynb"


def table_of(records, folder):
    "The table that experiments/fusion makes of published records, as CSV rows by variant."
    parameters = dict(dataset="phantom", records=str(records), folder=str(folder))
    names = {"get_ipython": lambda: None}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", ()):
            names.update(parameters)
    return names["numbers_of"](names["runs"], names["ROWS"]).set_index("variant"), names["said"]


def test_a_new_fusion_gets_its_row_in_the_table(tmp_path, monkeypatch):
    "One cell, one row of FUSIONS, one of VARIANTS; then a run on the tiny preset is published."
    monkeypatch.setitem(FUSIONS, "film", Film)
    monkeypatch.setitem(VARIANTS, "fusion_shift", dict(fusion="film"))
    data = dict(data_options={"n_images": 20, "size": 48}, epochs=1, device="cpu")
    settings = make_settings("phantom", "tiny", variant="fusion_shift", **data)
    T.train(settings, tmp_path / "run")
    publish(tmp_path / "run", tmp_path / "records")
    table, said = table_of(tmp_path / "records", tmp_path / "made")
    new, row = table.loc["fusion_shift"], said.set_index("fusion").loc["shift"]
    assert new.seeds == 1 and 0 <= new.overall <= 100 and new.trained > 0
    assert str(row.seeds) == "1" and f"{new.trained / 1e6:.2f}" == row["M trained"]
    assert table.seeds.drop("fusion_shift").eq(0).all()  # the others: "not run"
