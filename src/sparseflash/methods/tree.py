"""Tree attention: tokens are nodes of a tree."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.errors import PlanError, require
from ..plan import Plan
from ..plan.options import INTEGERS, doublings, host, is_count
from .base import Context, Method, Selection, begin, check_counts


@dataclass(frozen=True)
class Tree(Method):
    """Tokens are the nodes of a tree: each sees the context, its ancestors and itself.

    For drafts of speculative decoding that share prefixes, or branching rollouts, verified or trained in one
    pass. In depth-first order the descendants of a node directly follow it: each key expires where its
    subtree ends, which is a rule of the plan (`k_end`), without bits.

    Papers: Miao et al., "SpecInfer", arXiv 2305.09781 (topology-aware causal mask); Cai et al., "Medusa",
    arXiv 2401.10774 (tree attention).

    Parameters
    ----------
    parents : tuple of int, optional
        Parent of each node, -1 for a root, in any order of nodes; there is one query per node. Keys before
        those of the nodes are the context.
    branching : int
        Without parents: children of each node of a balanced tree, numbered level by level; 1 is a chain.

    Notes
    -----
    `ctx` keys: `parents`, integers [n], or [B, n] for a tree per sequence, replaces the one of the method;
    `q_offset`, the keys of the context (int or int32 tensor, 0-d or [B]): all but the last n by default. Keys
    after those of the nodes, such as unused cache slots, are hidden.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k = torch.randn(1, 2, 4, 32), torch.randn(1, 2, 6, 32)
    >>> sf.methods.Tree(parents=(-1, 0, 0, 1)).select(q, k).plan.to_dense()[0, 0].int().tolist()
    [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1]]
    """

    parents: tuple[int, ...] | None = None
    branching: int = 2

    reads = ("parents", "q_offset")
    paper = "arXiv 2305.09781"
    phases = ("training", "prefill")

    def __post_init__(self) -> None:
        check_counts(self, 1, "branching")
        if self.parents is not None:
            fits = isinstance(self.parents, tuple) and all(is_count(x, -1) for x in self.parents)
            require(
                (
                    fits,
                    lambda: (
                        f"parents={self.parents!r}: expected a tuple of ints >= -1; a tensor goes into ctx"
                    ),
                )
            )
            depth_first(torch.tensor(self.parents, dtype=torch.int64).view(1, -1))

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads; with a batch axis if trees differ."""
        n, Tk, device = q.shape[2], k.shape[2], q.device
        parents = self._parents(q, (ctx or {}).get("parents"))
        first = begin(ctx, q, default=Tk - n)
        if host(first):
            fits = bool(((first >= 0) & (first <= Tk - n)).all())
            said = f"a tree of {n} queries over {Tk} keys, the first at position {first.flatten().tolist()}"
            require((fits, lambda: f"{said}: expected the keys of its nodes, at least"))
        rank, end = (x[:, None] + first for x in depth_first(parents))
        node = torch.argsort(rank, dim=-1)
        token = torch.arange(Tk, device=device).expand(rank.shape[0], 1, -1)
        at = (token - first).clamp(-1, n)  # node of a key; -1 before the nodes, n after

        def keys(x: Tensor, before: Tensor | int, behind: Tensor | int) -> Tensor:
            """Expand a value per node to all keys, with `before` and `behind` for the other keys."""
            own = pad(x, (0, 1)).gather(-1, at.clamp(min=0))
            return torch.where(at < 0, before, torch.where(at < n, own, behind))

        forever = torch.iinfo(torch.int32).max
        in_order = Plan.from_expiry(
            keys(end.gather(-1, node), forever, 0), Tq=n, q_offset=first.flatten().int()
        )
        token_space = {
            "q_order": node,
            "k_order": keys(node + first, token, token),
            "q_pos": rank,
            "k_pos": keys(rank, token, token),
            "k_end": keys(end, forever, 0),
        }
        return Selection(replace(in_order, q_offset=0, **{n: x.int() for n, x in token_space.items()}))

    def _parents(self, q: Tensor, given: Tensor | None) -> Tensor:
        """Parents of the nodes, int64 [B|1, n]."""
        B, n = q.shape[0], q.shape[2]
        if given is None and self.parents is None:
            return (torch.arange(n, device=q.device)[None] - 1).div(self.branching, rounding_mode="floor")
        x = torch.tensor(self.parents, device=q.device) if given is None else given
        fits = isinstance(x, Tensor) and x.dtype in INTEGERS and x.shape in ((n,), (1, n), (B, n))
        said = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        require(
            (fits, lambda: f"parents: {said}; expected integers [{n}] or [{B}, {n}], one a query"),
            error=PlanError,
        )
        return x.long() if x.dim() == 2 else x.long()[None]


def depth_first(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each node in depth-first order, and the end of its subtree; int64 [B, n] each.

    `parents [B, n]`: -1 is a root; siblings keep their order. The Euler tour of the trees is a linked list of
    entries and exits; pointer jumping ranks it, without a loop over nodes. Example: parents (-1, 0, 0, 1) has
    order 0, 1, 3, 2: index (0, 1, 3, 2), end (4, 3, 4, 3).

    Raises
    ------
    PlanError
        If a parent is no node, or a node is its own ancestor.
    """
    B, n = parents.shape
    if host(parents) and parents.numel():
        low, high = (int(x) for x in torch.aminmax(parents))
        require(
            (
                low >= -1 and high < n,
                lambda: f"parents hold {low}..{high}: nodes are 0..{n - 1}, -1 is a root",
            ),
            error=PlanError,
        )
    root = B * n  # a virtual parent of all roots
    node = torch.arange(root, device=parents.device)
    shift = torch.arange(B, device=parents.device)[:, None] * n
    up = torch.where(parents < 0, root, parents + shift).flatten()
    ups = torch.cat([up, up.new_full((1,), root)])  # the virtual root is its own parent
    if host(parents):
        top = ups
        for _ in range(doublings(root) + 1):
            top = top[top]
        stuck = (top[:-1] != root).nonzero().flatten() % n
        if len(stuck):
            raise PlanError(f"parents: node {int(stuck[0])} is on a cycle, or below one; expected a tree")
    # link[x] enters node x: next is its first child, or its exit; link[root + 1 + x] exits x: next is its
    # sibling, or its parent's exit
    none = root + 1
    child = torch.full((root + 1,), none, device=up.device).scatter_reduce_(0, up, node, "amin")
    family, order = up.sort(stable=True)
    follows = torch.where(family[1:] == family[:-1], order[1:], none)
    sibling = torch.full((root + 1,), none, device=up.device).scatter_(0, order[:-1], follows)
    leave = torch.arange(root + 1, device=up.device) + root + 1
    after = torch.where(sibling < none, sibling, leave[ups])
    link = torch.cat([torch.where(child < none, child, leave), after])
    entries = (torch.arange(len(link), device=up.device) <= root).long()  # 1 per entry; becomes a suffix sum
    for _ in range(doublings(2 * root + 2)):
        entries, link = entries + entries[link], link[link]
    place = root - entries
    return place[:root].view(B, n) - shift, place[root + 1 : -1].view(B, n) - shift
