"""Recall that has to be far: associative recall (`mqar`) over 4,096 tokens, no question near its answer.

A row lists its pairs, then comes filling that no pair consists of, and then questions among more filling: the
nearest is so many tokens behind the last pair that no window of the test reaches back. A key is asked for
several times; nothing after a question gives its answer away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import mqar

ENOUGH, SOLVED = 0.95, 0.99


@dataclass(frozen=True)
class FarTask(mqar.Task):
    """The rows.

    Parameters
    ----------
    vocabulary : int
        Of keys, values and filling together.
    length, pairs : int
        As for `mqar.Task`.
    filling : int
        Tokens that are neither keys nor values, the last ones of the vocabulary.
    gap : int
        Tokens between the last pair and the first question, at least.
    questions : int
        Of a row.
    """

    vocabulary: int = 320
    length: int = 4096
    pairs: int = 64
    filling: int = 64
    gap: int = 1024
    questions: int = 512

    def __post_init__(self) -> None:
        room = (self.length - 2 * self.pairs - self.gap) // 2
        if not 0 < self.questions <= room or self.pairs >= self.words // 2:
            raise ValueError(
                f"pairs={self.pairs}, questions={self.questions}: expected fewer pairs than keys and at most "
                f"{room} questions behind them"
            )

    @property
    def words(self) -> int:
        """Keys and values."""
        return self.vocabulary - self.filling

    def _lay_out(self, pairs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count, begin = len(pairs), 2 * self.pairs
        tokens = torch.randint(self.words, self.vocabulary, (count, self.length), generator=generator)
        tokens[:, :begin] = pairs.mT.flatten(1)
        slots = (self.length - begin - self.gap) // 2
        at = torch.rand(count, slots, generator=generator).topk(self.questions).indices * 2 + begin + self.gap
        which = torch.randint(self.pairs, (count, self.questions), generator=generator)
        asked, answers = (pairs[:, n].gather(1, which) for n in (0, 1))
        tokens.scatter_(1, at, asked)
        return tokens, torch.full_like(tokens, mqar.IGNORED).scatter_(1, at, answers)
