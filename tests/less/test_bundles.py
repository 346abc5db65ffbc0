"""One bundle carries a codec, an eviction and a trained state, in every combination."""

import pytest
import torch

import kvsmith
from kvsmith.bundle import Bundle, base_model
from kvsmith.eviction.policy import H2O, TOVA, Lambda
from kvsmith.hf import geometry, make_cache
from kvsmith.less.spec import MLP, Exponential, Less
from kvsmith.spec import CacheSpec, CodecSpec
from tests.less.test_state import CODECS, _all_parameters
from tests.runtime.models import build, run

PAIRS = [
    (Lambda(32), Less(Exponential(), rank=4)),
    (H2O(32, aging=1.0), Less(Exponential(), rank=4, ranks=(2, 6), store_dtype="int8")),
    (TOVA(32), Less(MLP(8), rank=3, store_dtype="float32")),
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("eviction", "less"), PAIRS, ids=lambda x: getattr(x, "kind", ""))
def test_what_is_loaded_decodes_the_same(codec, eviction, less, tmp_path):
    k, v = CODECS[codec]
    model = build("llama")
    spec = CacheSpec(
        CodecSpec(k, v, sinks=2, recent=4, block_size=4), eviction, page_size=16, less=less
    )
    own = _all_parameters(spec)
    base = base_model(model.config.to_dict(), geometry(model.config), "micro")
    path = Bundle.create(spec, own, base, None, None, "a test").save_pretrained(tmp_path / "b")
    loaded = kvsmith.load(path)
    assert loaded.spec == spec
    ids = torch.randint(3, 97, (2, 50))
    want = run(model, ids, make_cache(model, spec, own), (40,) + (1,) * 10, None)
    got = run(model, ids, loaded.cache(model), (40,) + (1,) * 10, None)
    assert torch.equal(got, want)
