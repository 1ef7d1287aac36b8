"""The keys and values of a layer where vLLM keeps them, without a copy; and what a method keeps of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache import Summary
from ...common.errors import SparseFlashError


@dataclass(frozen=True)
class Pool:
    """Blocks of keys and values of all requests, as one row of tokens.

    Parameters
    ----------
    tokens : Tensor
        `[blocks * block, Hkv, D + Dv]`, a view of the host's cache: the keys, and behind them the values.
    block : int
        Tokens of a block.
    head : int
        D: numbers of a key.
    """

    tokens: Tensor
    block: int
    head: int

    @classmethod
    def of(cls, cache: Tensor, head: int) -> Pool:
        """The pool behind a cache `[blocks, Hkv, block, D + Dv]` whose tokens lie at one stride."""
        if cache.dim() != 4 or cache.shape[3] <= head:
            raise SparseFlashError(
                f"a KV cache {list(cache.shape)}; expected [blocks, KV heads, tokens of a block, keys and "
                f"values], with keys of {head}: this vLLM keeps its keys in another way"
            )
        if cache.stride(0) != cache.shape[2] * cache.stride(2):
            raise SparseFlashError(
                f"a KV cache {list(cache.shape)} of strides {list(cache.stride())}: its tokens do not lie at "
                "one stride; expected the layout LBNHC (layers, blocks, tokens, heads, numbers)"
            )
        return cls(cache.transpose(1, 2).flatten(0, 1), cache.shape[2], head)

    @property
    def keys(self) -> Tensor:
        """`[1, Hkv, tokens, D]`: a view, whatever is written later."""
        return self.tokens[..., : self.head].transpose(0, 1)[None]

    @property
    def values(self) -> Tensor:
        """`[1, Hkv, tokens, Dv]`, a view."""
        return self.tokens[..., self.head :].transpose(0, 1)[None]

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Put keys and values `[n, Hkv, D]` where the host says, `slots [n]`."""
        self.tokens[..., : self.head].index_copy_(0, slots, key)
        self.tokens[..., self.head :].index_copy_(0, slots, value)

    def gathered(self, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[1, Hkv, length, D]` of one request, copied out of its blocks."""
        rows = self.tokens.unflatten(0, (-1, self.block))[blocks].flatten(0, 1)[:length]
        whole = rows.transpose(0, 1)[None]
        return whole[..., : self.head], whole[..., self.head :]


@dataclass(frozen=True)
class Touched:
    """The pages that a step writes to.

    Parameters
    ----------
    pages : Tensor
        Integers `[n]`, each once.
    real : Tensor
        bool `[n, page]`: the lanes that hold a key of whoever owns the page now. A request fills its pages
        in order, so these are all lanes up to the last that is written; the others may hold what is left of
        a request that is gone.
    """

    pages: Tensor
    real: Tensor

    @classmethod
    def of(cls, slots: Tensor, page: int) -> Touched:
        """Those of the slots `[tokens]` that are written."""
        pages, place = torch.unique(slots // page, return_inverse=True)
        last = torch.zeros_like(pages).scatter_reduce_(0, place, slots % page, "amax")
        return cls(pages, torch.arange(page, device=slots.device) <= last[:, None])


class Kept:
    """A summary of every page of a pool, `[pages, Hkv, width]`, renewed where keys are written.

    It belongs to the pool, not to requests: blocks that are shared, handed on or filled anew carry theirs.
    """

    def __init__(self, summary: Summary, pool: Pool) -> None:
        self.summary, self.at = summary, pool.tokens.data_ptr()
        self._keys = pool.tokens[..., : pool.head].unflatten(0, (-1, summary.page))  # [pages,page,Hkv,D]
        like = summary.of(self._keys[:1].permute(2, 0, 1, 3)[None])  # [1,Hkv,1,width]
        with torch.inference_mode(False):  # what is made inside it could be written to there alone
            self.rows = torch.zeros(len(self._keys), *like.shape[1::2], dtype=like.dtype, device=like.device)

    def renew(self, touched: Touched) -> None:
        """Sum up the pages anew that a step has written to."""
        keys = self._keys[touched.pages].permute(2, 0, 1, 3)[None]  # [1,Hkv,n,page,D]
        self.rows[touched.pages] = self.summary.of(keys, touched.real[None])[0].transpose(0, 1)

    def of(self, pages: Tensor) -> Tensor:
        """`[B,Hkv,n,width]` of the pages `[B,n]` of requests."""
        own = self.rows.index_select(0, pages.flatten())
        return own.view(*pages.shape, *own.shape[1:]).transpose(1, 2)
