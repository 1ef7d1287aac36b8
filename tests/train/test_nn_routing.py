"""How centroids of routing attention learn."""

import pytest
import torch
import torch.distributed as dist

import sparseflash as sf
from nn_cases import one_thread

_one_thread = pytest.fixture(autouse=True)(one_thread)


def layer(generator, **options):
    given = {"clusters": 3, "window": 8, "decay": 0.9, "dtype": torch.float64, **options}
    made = sf.nn.RoutingAttention(16, 4, **given)
    made.reset(generator)
    return made


@pytest.mark.parametrize("shared", [True, False])
def test_centroids_follow_the_formulas_of_a_scalar_loop(shared, generator):
    made = layer(generator, kv_heads=2, shared=shared)
    x = torch.randn(2, 20, 16, generator=generator, dtype=torch.float64)
    q, k = made.routed(x)
    mu, n, m = made.centroid.clone(), torch.zeros(2, 3).double(), torch.zeros(2, 3, 4).double()
    for h in range(2):
        for token in [*q[:, 2 * h : 2 * h + 2].reshape(-1, 4), *([] if shared else k[:, h].reshape(-1, 4))]:
            to = int((mu[h] @ token).argmax())
            n[h, to] += 1
            m[h, to] += token.detach()
    n, m = 0.9 * 1 + 0.1 * n, 0.9 * mu + 0.1 * m
    smooth = (n + 1e-5) / (n.sum(-1, keepdim=True) + 3e-5) * n.sum(-1, keepdim=True)
    made(x)
    assert torch.equal(made.centroid, mu)  # a forward changes nothing
    made.update()
    torch.testing.assert_close(made.centroid, m / smooth[..., None])
    torch.testing.assert_close(made.count, n)
    after = made.centroid.clone()
    made.update()  # the same tokens are not learned from twice
    made.eval()
    made(x)
    sf.nn.update(made)
    assert torch.equal(made.centroid, after)


@pytest.mark.parametrize("strict", [True, False])
def test_packed_documents_are_noted_as_one_batch(strict, generator):
    made = layer(generator, strict=strict)
    x = torch.randn(1, 20, 16, generator=generator, dtype=torch.float64)
    made(x)
    whole, loss = made._seen, made.aux_loss
    made(x, cu_seqlens=[0, 6, 6, 20])
    for a, b in zip(made._seen, whole):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(made.aux_loss, loss)


def test_planted_clusters_are_found(generator):
    made = sf.nn.RoutingAttention(16, 1, clusters=4, window=64, decay=0.9)
    made.reset(generator)
    centres = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:4] * 8
    kind = torch.randint(0, 4, (1, 256), generator=generator)

    def draw():
        return centres[kind] + 0.3 * torch.randn(1, 256, 16, generator=generator)

    made.start(draw())
    for _ in range(30):
        made(draw())
        made.update()
    label = made._scores(made.routed(draw())[0]).argmax(2)[0, 0]
    assert all(len(label[kind[0] == c].unique()) == 1 for c in range(4)) and len(label.unique()) == 4


def test_one_cluster_is_dense_attention_on_normed_queries(generator):
    x = torch.randn(2, 20, 16, generator=generator, dtype=torch.float64)
    by = [layer(generator, clusters=1, window=20, strict=strict) for strict in (True, False)]
    by[1].load_state_dict(by[0].state_dict())
    torch.testing.assert_close(by[0](x), by[1](x))


def test_two_processes_learn_what_one_learns_from_both(generator, monkeypatch):
    parts = torch.randn(2, 20, 16, generator=generator, dtype=torch.float64)
    one = layer(generator)
    two = [layer(generator) for _ in range(2)]
    for made in two:
        made.load_state_dict(one.state_dict())
    one(parts)
    one.update()
    sums = []
    for n, made in enumerate(two):
        made(parts[n : n + 1])
        sums.append(made._seen)
    others = iter([sums[1][0].clone(), sums[1][1].clone()])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.add_(next(others)))
    two[0].update()
    torch.testing.assert_close(two[0].centroid, one.centroid)
    torch.testing.assert_close(two[0].count, one.count)


def test_a_state_keeps_the_last_of_each_cluster(generator):
    made = layer(generator, clusters=2, window=3)
    state = made.new_state(1)
    with torch.no_grad():
        for part in torch.randn(1, 50, 16, generator=generator, dtype=torch.float64).split(7, 1):
            made(part, state=state)
    assert state.tensors["k"].shape[2] <= 6 and state.length == 50
