"""The budget solver: exact, priced as the runtime allocates, from text to a bundle."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvsmith
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.hf import geometry, share
from kvsmith.pipeline.budget import BudgetOptions, assemble, levels, solve
from kvsmith.pipeline.budget.choices import Costs, costs, parameters_of
from kvsmith.pipeline.budget.run import request
from kvsmith.pipeline.budget.sensitivity import Meter
from kvsmith.pipeline.budget.solve import priced, smallest
from kvsmith.pipeline.calibrate import CalibrateConfig, run
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.config import load
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec
from tests.micro_model import write_model, write_text

# Unequal layers, one with a sliding window, one that reads another's tokens.
SHAPE = ModelGeometry(
    (
        LayerGeometry(2, 4, 16, 16),
        LayerGeometry(4, 4, 16, 8, window=600),
        LayerGeometry(2, 4, 16, 16),
        LayerGeometry(2, 4, 32, 32),
    ),
    owner=(0, 1, 0, 3),
)
CHOICES = levels(load_codec("nuq4_o1"), (2, 4), (0.0, 0.05), SHAPE)


def test_the_choice_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(1)
    for trial in range(40):
        loss = torch.rand((2, 2, 3), generator=generator, dtype=torch.float64)
        sides = torch.randint(0, 40, (2, 2, 3), generator=generator)
        sides -= sides.amin(-1, keepdim=True)
        price = Costs(fixed=100, sides=sides)
        budget = 100 + 7 * (trial % 14)
        every = (
            priced(((a, b), (c, d)), loss, price)
            for a, b, c, d in itertools.product(range(3), repeat=4)
        )
        best = min(s.loss for s in every if s.nbytes <= budget)
        found = solve(loss, price, budget)
        assert found.nbytes <= budget and found.loss == pytest.approx(best, rel=1e-9)
        assert solve(loss, price, budget) == found


def test_prices_add_up_to_what_the_runtime_allocates() -> None:
    price = costs(CHOICES, SHAPE, 5000)
    assert len(CHOICES) == 4 and price.sides.shape == (3, 2, 4)
    for picks in (((0, 0),) * 3, ((3, 1), (0, 2), (1, 3)), ((3, 3),) * 3):
        spec = CacheSpec(assemble(CHOICES, SHAPE, picks))
        total = cache_bytes(spec, SHAPE, 1, 5000, torch.bfloat16).total
        assert priced(picks, torch.zeros(3, 2, 4), price).nbytes == total
    assert smallest(price) == price.fixed


def test_keys_and_values_of_a_layer_share_a_window() -> None:
    generator = torch.Generator().manual_seed(2)
    for trial in range(25):
        loss = torch.rand((2, 2, 4), generator=generator, dtype=torch.float64)
        sides = torch.randint(0, 40, (2, 2, 4), generator=generator)
        price = Costs(fixed=100, sides=sides, windows=(0, 0, 64, 64))
        fair = [p for p in itertools.product(range(4), repeat=2) if p[0] // 2 == p[1] // 2]
        every = [priced((a, b), loss, price) for a, b in itertools.product(fair, repeat=2)]
        least = min(s.nbytes for s in every)
        assert smallest(price) == least
        budget = least + 6 * (trial % 12)
        found = solve(loss, price, budget)
        best = min(s.loss for s in every if s.nbytes <= budget)
        assert found.nbytes <= budget and found.loss == pytest.approx(best, rel=1e-9)
        assert all(pick in fair for pick in found.picks)
        with pytest.raises(ValueError, match=f"at least {least} bytes"):
            solve(loss, price, least - 1)


def test_windows_are_priced_as_the_runtime_allocates() -> None:
    wide = levels(load_codec("nuq4_o1"), (2, 4), (0.0,), SHAPE, recents=(64, 0))
    assert wide.names == ("2b w0", "4b w0", "2b w64", "4b w64")
    price = costs(wide, SHAPE, 900)
    assert price.windows == (0, 0, 64, 64)
    for picks in (((0, 0),) * 3, ((3, 2), (0, 1), (1, 0)), ((2, 3), (2, 2), (3, 2))):
        codec = assemble(wide, SHAPE, picks)
        for layer, (pick, _) in zip(SHAPE.owners, picks, strict=True):
            assert codec.at(layer).recent == price.windows[pick]
        total = cache_bytes(CacheSpec(codec), SHAPE, 1, 900, torch.bfloat16).total
        assert priced(picks, torch.zeros(3, 2, 4), price).nbytes == total
    # One window is that of the template or of all layers, and no level says so.
    assert levels(load_codec("nuq4_o1"), (2,), (0.0,), SHAPE, recents=(64,)).names == ("2b",)
    assert BudgetOptions().step == 32 and BudgetOptions(recents=(0, 64)).step == 8


def test_a_choice_names_only_the_layers_that_differ() -> None:
    codec = assemble(CHOICES, SHAPE, ((0, 1), (0, 1), (2, 0)))
    assert codec.k == CHOICES.codecs[0].k and codec.v == CHOICES.codecs[1].v
    assert [own.layer for own in codec.layers] == [3]
    assert codec.layers[0].k == CHOICES.codecs[2].k
    assert assemble(CHOICES, SHAPE, ((1, 1),) * 3) == CHOICES.codecs[1]
    fitted = [{f"layers.{i}.{s}.lut": torch.tensor([n]) for i in (0, 1, 3) for s in "kv"}
              for n in range(4)]  # fmt: skip
    own = parameters_of(fitted, SHAPE, ((0, 1), (0, 1), (2, 0)))
    assert {n: int(t) for n, t in own.items() if ".3." in n} == {
        "layers.3.k.lut": 2,
        "layers.3.v.lut": 0,
    }


def test_fractions_that_give_the_same_slots_are_one_level() -> None:
    narrow = ModelGeometry((LayerGeometry(1, 1, 16, 16),))
    assert levels(load_codec("nuq4_o1"), (3,), (0.0, 0.001, 0.01), narrow).names == ("3b",)


def test_fit_spends_the_budget_where_it_counts(micro_llama: Callable[..., Any]) -> None:
    model = micro_llama(layers=3).train()
    # What the first layer attends to is hardly seen, and the second layer's is seen eightfold.
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-3)
        model.model.layers[1].self_attn.o_proj.weight.mul_(8)
    texts = torch.randint(3, 97, (8, 64))
    options = {"length": 64, "windows": 4, "chunk": 16, "widths": (2, 4), "fractions": (0.0,)}
    bundle = kvsmith.fit(model, texts, bits=3.4, context=4096, **options)
    assert model.training
    shape = geometry(model.config)
    assert kvsmith.sizes.bits_per_element(bundle.spec, shape, 1, 4096, torch.bfloat16) <= 3.4
    first, second = bundle.spec.codec.at(0), bundle.spec.codec.at(1)
    assert first.k.quantizer.bits == first.v.quantizer.bits == 2
    assert 4 in (second.k.quantizer.bits, second.v.quantizer.bits)
    assert bundle.manifest.quality["kld_predicted"] > 0
    again = kvsmith.fit(model, texts, bits=3.4, context=4096, **options)
    assert again.manifest == bundle.manifest  # the checksums of the tensors among it
    model.eval()(input_ids=texts, past_key_values=bundle.cache(model), use_cache=True)


def test_layers_that_share_are_counted_and_chosen_once(micro_llama: Callable[..., Any]) -> None:
    model, ids = micro_llama(layers=4), torch.randint(3, 97, (8, 64))
    share(model, (0, 0, 2, 2))
    shape = geometry(model.config)
    options = {"length": 64, "windows": 4, "chunk": 16, "fractions": (0.0,), "context": 400}
    bundle = kvsmith.fit(model, ids, bits=5, widths=(2, 4), **options)
    uniform = kvsmith.fit(model, ids, bits=5, widths=(2,), **options)
    assert {own.layer for own in bundle.spec.codec.layers} <= {0, 2}
    # Bytes of two layers: what a cache of this model allocates, and too few for four.
    counted = cache_bytes(bundle.spec, shape, 1, 400, torch.bfloat16).total
    assert (
        shape.elements == 2 * shape.layers[0].elements and 8 * counted <= 5 * shape.elements * 400
    )
    apart = levels(load_codec("nuq4_o1"), (2,), (0.0,), geometry(micro_llama(layers=4).config))
    assert smallest(costs(apart, geometry(micro_llama(layers=4).config), 400)) > counted
    meter = Meter(model, ids[4:], 8, 16, 4)
    ours, theirs = (meter.kld(b.spec, b.parameters).mean() for b in (bundle, uniform))
    assert ours < theirs
    cache = bundle.cache(model.to(torch.bfloat16))
    model(input_ids=torch.randint(3, 97, (1, 400)), past_key_values=cache)
    assert cache.bytes().total == counted


def test_calibrate_writes_the_bundle_and_the_curve(
    tmp_path: Path, micro_llama: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "m", micro_llama)
    text = write_text(tmp_path / "t.txt")
    options = [
        f"model.path={model}",
        "data=textfile",
        f"data.path={text}",
        "codecs=[]",
        f"folder={tmp_path / 'c'}",
        f"bundles={tmp_path / 'b'}",
        "samples=4",
        "length=128",
        "fit.length=64",
        "fit.windows=2",
        "fit.check=2",
        "fit.points=3",
        "fit.widths=[2,4]",
        "fit.fractions=[0.0]",
        "fit.recents=[0,32]",
        "fit.context=400",
    ]
    run(load(CalibrateConfig, "calibrate", [*options, "target_bits=7", "curve=true"]), tmp_path)
    said = capsys.readouterr().out
    assert "best uniform cache of no more bytes" in said
    folder = next((tmp_path / "b" / "m").iterdir())
    assert folder.name.startswith("fit6.") and kvsmith.load(folder).spec.codec.k
    data = json.loads((tmp_path / "budget.json").read_text())
    assert data["chosen"][0]["bits"] <= 7 and len(data["uniform"]) == len(data["levels"])
    for name in ("budget.png", "curve.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    before = (tmp_path / "budget.json").read_bytes()
    run(load(CalibrateConfig, "calibrate", [*options, "target_bits=7", "curve=true"]), tmp_path)
    assert (tmp_path / "budget.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "bits", "message"),
    [
        ({}, 1.0, r"target_bits: budget must be at least 1\.\d+ all-in bits \([\d,]+ bytes\)"),
        ({"bytes": "1kB"}, None, r"fit\.bytes: budget must be at least .* got 1,000 bytes"),
        ({"bytes": "1GiB"}, 3.0, r"fit\.bytes: value must be null, got 1GiB\. Give one of"),
        ({"bytes": "much"}, None, r"fit\.bytes: value must be a size such as 20GiB"),
        ({"context": "long"}, 3.0, r"fit\.context: value must be a number of tokens"),
        ({}, -1.0, "target_bits: value must be positive, got -1.0"),
        ({}, float("nan"), "target_bits: value must be positive, got nan"),
        ({}, float("inf"), "target_bits: value must be positive, got inf"),
        ({"recents": (0, 0)}, 3.0, r"fit\.recents: value must be a list without repeats, got"),
        ({"recents": (16, -1)}, 3.0, r"fit\.recents: value must be at least 0, got -1"),
        ({"fractions": (-0.1,)}, 3.0, r"fit\.fractions: value must be at least 0, got -0\.1"),
        ({"chunk": 0}, 3.0, r"fit\.chunk: value must be at least 1, got 0"),
        ({"template": "none"}, 3.0, r"fit\.template: codec must be a codec that quantizes"),
        ({"template": "nuq9"}, 3.0, r"fit\.template: codec must be one of"),
        ({"widths": ()}, 3.0, r"fit\.widths: value must be a list without repeats, got \[\]"),
        ({"windows": 0}, 3.0, r"fit\.windows: value must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], bits: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        request(BudgetOptions(**options), bits, False, SHAPE)
    assert "\n" not in str(error.value)


def test_ranks_are_choices_too(micro_llama: Callable[..., Any]) -> None:
    wide = levels(load_codec("gear_nuq3"), (2, 3), (0.0,), SHAPE, (0, 2))
    assert wide.names == ("2b", "2b r2", "3b", "3b r2")
    terms = [c.k.low_rank for c in wide.codecs]
    assert terms[0] is None and terms[1] is not None and (terms[1].rank, terms[1].bits) == (2, 4)
    price = costs(wide, SHAPE, 4096).sides
    assert bool((price[..., 1] > price[..., 0]).all())
    model, tokens = micro_llama(head_dim=32), torch.randint(3, 97, (4, 256))
    options: dict[str, Any] = {"widths": (2,), "fractions": (0.0,), "windows": 2, "length": 256}
    # Two bits and a term of rank 2 everywhere is the most there is, and fits.
    bundle = kvsmith.fit(
        model, tokens, bits=8, context="4k", template="gear_nuq3", ranks=(0, 2), **options
    )
    sides = [bundle.spec.codec, *bundle.spec.codec.layers]
    assert any(side.low_rank for own in sides for side in (own.k, own.v))
    out = model(tokens[:1], past_key_values=bundle.cache(model)).logits
    assert bool(out.isfinite().all())
    with pytest.raises(ValueError, match=r"fit\.ranks: value must be at least 0"):
        BudgetOptions(ranks=(-1,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 3}, "fit.length: tokens of a window must be at least 8, and at most .* got 3"),
        ({"length": 65}, "fit.length: tokens .* at most the model's context of 64, got 65"),
        ({"prefill": 63}, r"fit.prefill: tokens must be between 1 and fit.length - 2 = 62, got 63"),
        ({"prefill": 0}, "fit.prefill: tokens must be between 1 and .* got 0"),
    ],
)
def test_windows_that_score_nothing_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetOptions(**options).window(64)
    assert BudgetOptions().window(64) == 64 and BudgetOptions(length=9).window(64) == 9


def test_nothing_asked_is_nothing_done(micro_llama: Callable[..., Any]) -> None:
    assert request(BudgetOptions(), None, False, SHAPE) is None
    with pytest.raises(ValueError, match="fit: budget must be given as bits= or bytes=, got noth"):
        kvsmith.fit(micro_llama(), torch.zeros((1, 600), dtype=torch.int64))
    with pytest.raises(ValueError, match="fit.texts: text must be at least 512 tokens"):
        kvsmith.fit(micro_llama(), torch.zeros((1, 5), dtype=torch.int64), bits=4)
