"""Pages: the tensors that hold a run of encoded tokens of one layer, for all rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvsmith.codec import Codec

Page = dict[str, torch.Tensor]


def new_page(codec: Codec, tokens: int, like: torch.Tensor) -> Page:
    """Empty tensors for `tokens` tokens of as many rows as `like` has, on its device."""
    rows, infos = like.shape[0], codec.page(tokens, like.dtype)
    return {
        name: torch.zeros((rows, *info.shape), dtype=info.dtype, device=like.device)
        for name, info in infos.items()
    }


def write(page: Page, codec: Codec, offset: int, x: torch.Tensor) -> None:
    """Encode tokens [B, H, T, D] into a page from token `offset` on."""
    for name, part in codec.encode(x).items():
        _tokens(page[name], name, codec, offset, offset + x.shape[2]).copy_(part)


def read(pages: Sequence[Page], codec: Codec, start: int, stop: int) -> torch.Tensor:
    """Decode tokens [start, stop), counted from the first page; both at block boundaries.

    Returns:
        [B, H, stop - start, D] in the dtype that the codec decodes to.
    """
    whole = pages[0] if len(pages) == 1 else {n: _join(n, codec, pages) for n in pages[0]}
    return codec.decode({n: _tokens(t, n, codec, start, stop) for n, t in whole.items()})


def _token_dim(name: str, codec: Codec) -> int:
    """Dimension of a page tensor that counts tokens (or groups of them)."""
    if name in ("scale", "zero"):
        return 1 if codec.format.axis == "token" and not codec.format.group else 2
    return 1 if name in ("index", "value") else 2


def _tokens(tensor: torch.Tensor, name: str, codec: Codec, start: int, stop: int) -> torch.Tensor:
    """View of the tokens [start, stop) of a page tensor."""
    if name in ("scale", "zero") and codec.format.axis == "channel":
        start, stop = start // codec.format.group, -(-stop // codec.format.group)
    return tensor.narrow(_token_dim(name, codec), start, stop - start)


def _join(name: str, codec: Codec, parts: Sequence[Page]) -> torch.Tensor:
    return torch.cat([p[name] for p in parts], dim=_token_dim(name, codec))
