"""From a trained model to one whose layers share: what the shared keys and values start from.

`fits.py` and `joint.py` find how they follow from one another; here that goes into the weights of
the query and output projections. Nothing is added to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.pipeline.training.fits import Fit, Observed, as_pairs, fit_pair
from kvsmith.pipeline.training.joint import fit_group

Start = Literal["keep_first", "average", "least_squares", "joint"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@torch.no_grad()
def convert(
    model: PreTrainedModel, owner: Sequence[int], start: Start, seen: Observed | None = None
) -> None:
    """Set the weights that a model starts from when its layers begin to share.

    Args:
        model: changed in place; its layers do not share yet.
        owner: for each layer the layer whose tokens it will read.
        start: `keep_first` leaves the owner's keys and values; `average` gives it the mean of its
            group's projections, with the gains of their norms; `least_squares` fits readers to
            what the owner has, `joint` chooses what the owner has to fit all of its group.
        seen: for the last two.

    Raises:
        ValueError: the architecture's projections cannot be folded.
    """
    if start == "keep_first":
        return
    attention = [module for module, _ in _layers(model)]
    if start == "average":
        _average(model, owner)
        return
    assert seen is not None
    if start == "joint":
        for own in sorted(set(owner)):
            members = [layer for layer, o in enumerate(owner) if o == own]
            if len(members) > 1:
                _join(attention, members, seen)
        return
    for reader, own in enumerate(owner):
        if reader != own:
            _fold(attention[reader], fit_pair(seen, reader, own))


def _join(attention: Sequence[Any], members: Sequence[int], seen: Observed) -> None:
    own = attention[members[0]].k_proj, attention[members[0]].v_proj
    keys, values, fits = fit_group(seen, members, any(p.bias is not None for p in own))
    for project, made in zip(own, (keys, values), strict=True):
        width = project.weight.shape[1]
        project.weight.copy_(made[:, :width])
        if project.bias is not None:
            project.bias.copy_(made[:, width])
    for layer, fit in zip(members, fits, strict=True):
        _fold(attention[layer], fit)


def _layers(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """Attention module and the norm before it, of every layer of a Llama-like model."""
    decoder: Any = model.get_decoder()
    found = [
        (getattr(layer, "self_attn", None), getattr(layer, "input_layernorm", None))
        for layer in getattr(decoder, "layers", [])
    ]
    plain = found and all(
        all(hasattr(a, n) for n in PROJECTIONS) and not hasattr(a, "q_norm") and norm is not None
        for a, norm in found
    )
    rotary = getattr(model.config.get_text_config(), "partial_rotary_factor", None) or 1.0
    if not plain or rotary != 1.0 or model.config.model_type in ("glm", "cohere", "cohere2"):
        where, remedy = f"model ({model.config.model_type})", "Use uptrain.start=keep_first."
        expected = "q, k, v, o with full half-split RoPE and no norm between"
        raise ValueError(explain(where, "attention", expected, "another", remedy))
    return found


def _average(model: PreTrainedModel, owner: Sequence[int]) -> None:
    layers = _layers(model)
    for own in sorted(set(owner)):
        group = [layers[layer] for layer, o in enumerate(owner) if o == own]
        for name in ("k_proj", "v_proj"):
            whole = [getattr(a, name).weight.float() * norm.weight.float() for a, norm in group]
            gain = group[0][1].weight.float()
            safe = torch.where(gain.abs() < 1e-6, torch.full_like(gain, 1e-6), gain)
            target = getattr(group[0][0], name)
            target.weight.copy_(torch.stack(whole).mean(0) / safe)
            if target.bias is not None:
                target.bias.copy_(torch.stack([getattr(a, name).bias for a, _ in group]).mean(0))


def _fold(attention: Any, fit: Fit) -> None:
    """Put a fit into the reader's q and o; query heads move to the KV head that they will read."""
    heads, dim = fit.alpha.shape[0], 2 * fit.alpha.shape[1]
    for part in (attention.q_proj.weight, attention.q_proj.bias):
        if part is None:
            continue
        rows = part.float().view(heads, -1, dim, part.shape[1] if part.dim() == 2 else 1)
        turned = as_pairs(rows.transpose(2, 3)) * fit.alpha.conj()[:, None, None]
        turned = torch.cat([turned.real, turned.imag], -1).transpose(2, 3)
        moved = torch.empty_like(turned)
        moved[list(fit.head)] = turned
        part.copy_(moved.reshape(part.shape))
    weight = attention.o_proj.weight
    columns = weight.float().view(weight.shape[0], heads, -1, dim)
    mixed = torch.einsum("ohgd,hed->ohge", columns, fit.matrix)
    moved = torch.empty_like(mixed)
    moved[:, list(fit.head)] = mixed
    weight.copy_(moved.reshape(weight.shape))
