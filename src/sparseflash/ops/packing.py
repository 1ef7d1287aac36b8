"""Pack examples into one row, and recover document edges from position ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ._arguments import describe

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class PackingCollator:
    """A `collate_fn` without padding: the examples of a batch become one row `[1, total]`.

    The batch has the argument names of Transformers models, so `model(**batch)` works if the model's
    attention keeps documents apart; `cu_seq_lens_q` is the `cu_seqlens` of `Plan.from_documents`.

    Parameters
    ----------
    separator_id : int
        Label of the first token of every example, and the value that the loss ignores. Otherwise a shifted
        loss predicts the first token of an example from the last token of the previous one.
    position_start : int
        Position of the first token of every example (2 for models that number from `padding_idx + 1`).

    References
    ----------
    Kundu et al., Enhancing training efficiency using packing with Flash Attention
    (https://arxiv.org/abs/2407.09105).

    Examples
    --------
    >>> import sparseflash as sf
    >>> batch = sf.PackingCollator()([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    >>> for name, x in batch.items():
    ...     print(name, x.tolist() if hasattr(x, "tolist") else x)
    input_ids [[5, 6, 7, 8, 9]]
    labels [[-100, 6, 7, -100, 9]]
    position_ids [[0, 1, 2, 0, 1]]
    cu_seq_lens_q [0, 3, 5]
    cu_seq_lens_k [0, 3, 5]
    max_length_q 3
    max_length_k 3
    """

    separator_id: int = -100
    position_start: int = 0

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Pack examples: mappings with `input_ids` (and `labels`), or the token ids themselves, 1-d."""
        require((len(examples) > 0, "PackingCollator: an empty batch; expected at least one example"))
        given = [x if isinstance(x, Mapping) else {"input_ids": x} for x in examples]
        tokens = [_ids(x, "input_ids", n) for n, x in enumerate(given)]
        labels = [_ids(x, "labels", n) if "labels" in x else t for n, (x, t) in enumerate(zip(given, tokens))]
        for n, (t, y) in enumerate(zip(tokens, labels)):
            require(
                (
                    len(t) == len(y),
                    lambda: f"example {n}: {len(t)} input_ids and {len(y)} labels; expected one each",
                )
            )
        lengths = [len(t) for t in tokens]
        edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        ids, targets = torch.cat(tokens), torch.cat(labels)
        begins = edges[:-1][edges[:-1] < edges[1:]].long()  # an empty example has no first token
        at = torch.arange(len(ids))
        first = torch.zeros_like(at)
        first[begins] = begins
        batch: dict[str, Any] = {
            "input_ids": ids,
            "labels": targets.index_fill(0, begins, self.separator_id),
            "position_ids": at - first.cummax(0).values + self.position_start,
        }
        batch = {name: x[None] for name, x in batch.items()}
        batch |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
        return batch | {"max_length_q": max(lengths), "max_length_k": max(lengths)}


def _ids(example: Mapping[str, Any], name: str, n: int) -> Tensor:
    if name not in example:
        raise SparseFlashError(
            f"example {n} has {', '.join(map(str, example)) or 'nothing'}: expected {name}"
        )
    x = example[name]
    ids = x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=None if len(x) else torch.int64)
    good = ids.dim() == 1 and ids.dtype in INTEGERS
    require(
        (good, lambda: f"example {n}: {name} is {describe(ids)}; expected a row of integers, one a token")
    )
    return ids.long()


def cu_seqlens_of(position_ids: Tensor) -> Tensor:
    """Recover document edges of a packed row: a document begins where positions do not count up by one.

    Parameters
    ----------
    position_ids : Tensor
        Integers `[total]` or `[1, total]`; every document may begin at any position.

    Returns
    -------
    Tensor
        int32 `[documents + 1]`, on the same device. Its size depends on values, so the call synchronises with
        an accelerator. An example of length 0 leaves no trace.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> sf.cu_seqlens_of(torch.tensor([[0, 1, 0, 0, 1, 2]])).tolist()
    [0, 2, 3, 6]
    """
    good = isinstance(position_ids, Tensor) and position_ids.dtype in INTEGERS
    row = good and (position_ids.dim() == 1 or (position_ids.dim() == 2 and position_ids.shape[0] == 1))
    require(
        (
            row,
            lambda: f"position_ids: {describe(position_ids)}; expected one packed row of integers [total]",
        )
    )
    flat = position_ids.reshape(-1)
    before, own = flat[:-1], flat[1:]
    goes_on = (own == before + 1) & (own > before)  # not the wrap from a dtype's maximum to its minimum
    goes_on = torch.nn.functional.pad(goes_on, (1, 1))[: len(flat) + 1]
    return (~goes_on).nonzero().flatten().to(torch.int32)
