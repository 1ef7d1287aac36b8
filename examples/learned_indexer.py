"""Give a small byte-level model an indexer, train it, and see how much of the attention it finds.

    python examples/learned_indexer.py [text file] [--steps 300]

First the model learns with dense attention. Then its indexers learn from that attention, nothing else moves
(warm-up). Then all learn together while attention reads only what the indexers chose (sparse stage), as in
DeepSeek-V3.2. Recall is the share of dense attention on the chosen keys, on text that was held out; after the
first stage it is that of indexers that have learned nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseflash as sf
from sparseflash.train.data import stdlib

LENGTH, TOPK, WIDTH, HEADS, BATCH = 256, 24, 64, 4, 8
INDEX_HEADS, INDEX_DIM = 4, 16


class Block(nn.Module):
    """Attention with an indexer, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.index_q = nn.Linear(WIDTH, INDEX_HEADS * INDEX_DIM)
        self.index_k, self.index_w = nn.Linear(WIDTH, INDEX_DIM), nn.Linear(WIDTH, INDEX_HEADS)

    def forward(self, x: Tensor, stage: str) -> tuple[Tensor, Tensor, Tensor]:
        """The stream, the loss of the indexer, and its recall: of what it chose, of random keys."""
        y = self.norm(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        z = y.detach()  # the indexer learns from the attention, not from the language
        index = (self.index_q(z).unflatten(-1, (INDEX_HEADS, -1)).transpose(1, 2), self.index_k(z))
        index = (*index, self.index_w(z).transpose(1, 2))
        found = loss = x.new_zeros(())
        if stage == "sparse":
            chosen = sf.indexer_topk(*index, TOPK)
            plan = sf.Plan.from_choice(chosen, Tk=LENGTH, unique=True)
            o, lse = sf.attention(q, k, v, plan, return_lse=True)
            loss = sf.indexer_kl_loss(*index, q, k, lse, chosen)
        else:
            o, lse = sf.attention(q, k, v, causal=True, return_lse=True)
            if stage == "warm-up":
                loss = sf.indexer_kl_loss(*index, q, k, lse)
            if stage == "recall":
                found = recall(q, k, lse, index)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), loss, found


def recall(q: Tensor, k: Tensor, lse: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """Share of dense attention on what is chosen, of queries that have to choose: learned and random."""
    noise = [torch.randn_like(x) for x in index]
    shares = []
    for given in (index, noise):
        chosen = sf.indexer_topk(*given, TOPK)
        plan = sf.Plan.from_choice(chosen, Tk=LENGTH, unique=True)
        mass = sf.attention_stats(q, k, lse, plan, over="row")
        shares.append(mass[..., 2 * TOPK :].mean())
    return torch.stack(shares)


class Model(nn.Module):
    """Bytes in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor, stage: str = "dense") -> tuple[Tensor, Tensor, Tensor]:
        """Loss of the language, loss of the indexers, recall."""
        x = self.bytes(text[:, :-1]) + self.place.weight
        losses, found = [], []
        for block in self.blocks:
            x, loss, share = block(x, stage)
            losses.append(loss)
            found.append(share)
        language = F.cross_entropy(self.head(x).flatten(0, 1), text[:, 1:].flatten())
        return language, torch.stack(losses).sum(), torch.stack(found).mean(0)


def main(text: bytes, steps: int) -> dict[str, tuple[float, float]]:
    """Train in three stages; recall (learned, random) before and after each."""
    torch.manual_seed(0)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    generator = torch.Generator().manual_seed(0)

    def batch(piece: Tensor) -> Tensor:
        at = torch.randint(len(piece) - LENGTH - 1, (BATCH, 1), generator=generator)
        return piece[at + torch.arange(LENGTH + 1)]

    model, held_out, found = Model(), batch(data[cut:]), {}
    indexers = [p for name, p in model.named_parameters() if "index_" in name]
    for stage, learners in (
        ("dense", model.parameters()),
        ("warm-up", indexers),
        ("sparse", model.parameters()),
    ):
        optimizer = torch.optim.AdamW(learners, lr=2e-3)
        for _ in range(steps):
            language, loss, _ = model(batch(data[:cut]), stage)
            optimizer.zero_grad()
            (loss if stage == "warm-up" else language + loss).backward()
            optimizer.step()
        with torch.no_grad():
            language, _, share = model(held_out, "recall")
            found[stage] = (float(share[0]), float(share[1]))
        print(f"after {stage:8}: recall {share[0]:.3f}, of random keys {share[1]:.3f}, loss {language:.3f}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    main(given.text.read_bytes() if given.text else bytes(stdlib().train.tolist()), given.steps)
