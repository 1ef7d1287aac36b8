"""`sf.scan`, windows with attended pads, cyclic scans, learned links, rows of tables."""

import math

import pytest
import torch
from torch import nn

import sparseflash as sf
from nn_cases import one_thread
from sparseflash.nn.orion import grouped

_one_thread = pytest.fixture(autouse=True)(one_thread)


def sequential(decay, x, initial=None):
    y = torch.zeros_like(x[:, 0]) if initial is None else initial
    rows = []
    for t in range(x.shape[1]):
        y = decay.expand(x.shape)[:, t] * y + x[:, t]
        rows.append(y)
    return torch.stack(rows, 1)


# ---------------------------------------------------------------- scan


@pytest.mark.parametrize("T", [1, 2, 3, 63, 129])
@pytest.mark.parametrize("shape", [(2,), (2, 3), (1, 4, 2)])
def test_a_scan_is_its_recurrence_forward_and_backward(T, shape, generator):
    B, *rest = shape
    x = torch.randn(B, T, *rest, generator=generator, dtype=torch.float64).requires_grad_()
    decay = torch.rand(B, T, *rest, generator=generator, dtype=torch.float64).requires_grad_()
    initial = torch.randn(B, *rest, generator=generator, dtype=torch.float64).requires_grad_()
    given = (decay, x, initial)
    got, want = sf.scan(decay, x, initial=initial), sequential(*given)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    dy = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(got, given, dy), torch.autograd.grad(want, given, dy)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sf.scan(decay, x), sequential(decay, x))


def test_a_scan_has_second_gradients_transforms_and_a_full_graph(generator):
    x = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    decay = torch.rand(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(sf.scan, (decay, x))
    mapped = torch.func.vmap(lambda row: sf.scan(decay[None], row[None])[0])(x)
    torch.testing.assert_close(mapped, sf.scan(decay, x))
    grad = torch.func.grad(lambda d: sf.scan(d, x.detach()).square().sum())(decay.detach())
    want = torch.autograd.grad(sf.scan(decay, x).square().sum(), decay)[0]
    torch.testing.assert_close(grad, want)
    torch.compiler.reset()
    compiled = torch.compile(sf.scan, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(decay, x), sf.scan(decay, x))


def test_a_long_scan_keeps_its_precision_and_half_sums_in_fp32(generator):
    x = torch.randn(1, 5000, 2, generator=generator)
    decay = 1 - 1e-3 * torch.rand(1, 5000, 2, generator=generator)
    want = sequential(decay.double(), x.double())
    off, own = (float((y - want).abs().max()) for y in (sf.scan(decay, x), sequential(decay, x)))
    assert off <= 2 * own
    half = sf.scan(decay.bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, sequential(decay.bfloat16().float(), x.bfloat16().float()).bfloat16())


def test_a_scan_of_nothing_and_what_it_refuses():
    for shape in ((2, 0, 3), (0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        y = sf.scan(torch.ones(()), x, initial=torch.ones(shape[:1] + shape[2:]))
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
    x = torch.zeros(2, 4, 3)
    for given, said in (
        ((x, x[0, 0]), r"x: .*expected \[B, T, ...\]"),
        ((x.long(), x), "decay: .*expected floating point"),
        ((x[:, :3], x), r"does not broadcast to x, \[2, 4, 3\]"),
    ):
        with pytest.raises(sf.SparseFlashError, match=said):
            sf.scan(*given)
    with pytest.raises(sf.SparseFlashError, match=r"initial: .*expected \[2, 3\]"):
        sf.scan(x, x, initial=x)


# ---------------------------------------------------------------- HRSAM


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (8, 12), (7, 5), (9, 13)])
def test_every_token_has_one_slot_and_whole_windows_have_no_pads(grid, shifted):
    layer = sf.nn.HRSAMAttention(16, 2, window=4, shifted=shifted)
    layer.grid = grid
    T = math.prod(grid)
    token, place = layer.slots(T)
    real = token[token < T]
    assert sorted(real.tolist()) == list(range(T)) and token.shape[1] == 16
    if not shifted and all(n % 4 == 0 for n in grid):
        assert bool((token < T).all())
    y, x = place.unbind(-1)
    assert bool((y // 4 == (y // 4)[:, :1]).all()) and bool((x // 4 == (x // 4)[:, :1]).all())


def test_tokens_meet_inside_their_window_and_pads_are_attended(generator):
    layer = sf.nn.HRSAMAttention(16, 2, window=4, shifted=True, columns=6, dtype=torch.float64)
    layer.reset(generator)
    x = torch.randn(1, 42, 16, generator=generator, dtype=torch.float64)
    influence = torch.zeros(42, 42, dtype=torch.bool)
    with torch.no_grad():
        y = layer(x)
        for t in range(42):
            other = x.clone()
            other[:, t] += 1
            influence[:, t] = (layer(other) != y)[0].any(-1)
        row, column = (torch.arange(42) // 6 + 2) // 4, (torch.arange(42) % 6 + 2) // 4
        assert torch.equal(influence, (row[:, None] == row) & (column[:, None] == column))
        layer.pad += 1
        changed = (layer(x) != y)[0].any(-1).view(7, 6)
        assert bool(changed[:2].all()) and not bool(changed[2:6, 2:].any())


def test_a_patch_gives_the_same_in_a_larger_image(generator):
    """What is learned on small images holds on large ones: the same keys, the same number of them."""
    layer = sf.nn.HRSAMAttention(32, 4, window=8)
    layer.reset(generator)
    large = torch.randn(1, 64, 64, 32, generator=generator)
    small = large[:, 16:32, 24:40]
    with torch.no_grad():
        layer.grid = (64, 64)
        whole = layer(large.flatten(1, 2)).view(1, 64, 64, 32)[:, 16:32, 24:40]
        layer.grid = (16, 16)
        alone = layer(small.flatten(1, 2)).view(1, 16, 16, 32)
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pixels", [2048, 4096])
def test_a_block_gives_patches_of_large_images_what_they_have_in_one_of_512_pixels(pixels, generator):
    """Patches of 16 pixels; windows of 16 x 16 that are cut at the same places."""
    blocks, side = sf.nn.HRSAMBlocks(32, 2, 1, scans=()).eval(), pixels // 16
    large = torch.randn(1, side, side, 32, generator=generator)
    with torch.no_grad():
        whole = blocks(large.flatten(1, 2), grid=(side, side)).view(1, side, side, 32)
        for top, left in ((0, 0), (side - 32, 32)):
            here = slice(top, top + 32), slice(left, left + 32)
            alone = blocks(large[:, *here].flatten(1, 2), grid=(32, 32)).view(1, 32, 32, 32)
            torch.testing.assert_close(whole[:, *here], alone, atol=1e-5, rtol=1e-5)


def test_the_last_token_reaches_the_first_from_the_second_round_on(generator):
    for repeats, heard in ((1, False), (2, True)):
        layer = sf.nn.CyclicScan(16, 1, state=4, repeats=repeats)
        layer.reset(generator)
        x = torch.randn(1, 30, 16, generator=generator)
        other = x.clone()
        other[:, -1] += 1
        with torch.no_grad():
            assert bool((layer(x)[:, 0] != layer(other)[:, 0]).any()) is heard


def test_without_gradients_a_scan_holds_a_chunk_at_a_time(generator, monkeypatch):
    layer = sf.nn.CyclicScan(16, 1, state=4)
    layer.reset(generator)
    x = torch.randn(2, 50, 16, generator=generator)
    want = layer(x).detach()
    monkeypatch.setattr("sparseflash.nn.hrsam.CHUNK", 7)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)


def test_blocks_train_and_a_wrong_grid_is_refused(generator):
    blocks = sf.nn.HRSAMBlocks(16, 2, 3, window=4, scans=(2,))
    x = torch.randn(2, 48, 16, generator=generator)
    blocks(x, grid=(6, 8)).square().sum().backward()
    assert all(bool(p.grad.any()) for p in blocks.parameters() if p.grad is not None)
    assert [layer.shifted for layer in blocks.blocks] == [False, True, False]
    with pytest.raises(sf.SparseFlashError, match="is not 48 tokens"):
        blocks(x, grid=(6, 9))


# ---------------------------------------------------------------- Sparsifiner


def test_all_keys_are_dense_attention(generator):
    x = torch.randn(2, 30, 32, generator=generator)
    layers = [
        sf.nn.SparsifinerAttention(32, 4, tokens=30, keep=1.0, phase=p) for p in ("sparse", "reconstruct")
    ]
    for layer in layers:
        layer.reset(torch.Generator().manual_seed(1))
    torch.testing.assert_close(layers[0](x), layers[1](x))


@pytest.mark.parametrize("T", [30, 600])
def test_every_query_sees_its_budget_and_cls_sees_all(T, generator):
    layer = sf.nn.SparsifinerAttention(32, 4, tokens=600, keep=0.2)
    layer.reset(generator)
    x = torch.randn(1, T, 32, generator=generator)
    links = layer.links(x)
    assert bool(links[:, :, 0].all()) and bool((links[:, :, 1:].sum(-1) == math.ceil(0.2 * T)).all())
    q, k, v = (layer.split(project(x)) for project in (layer.query, layer.key, layer.value))
    want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=links)
    torch.testing.assert_close(layer(x), layer.end(want), atol=1e-5, rtol=1e-5)


def test_the_predictor_finds_the_links_of_attention_of_low_rank(generator):
    """Queries ask for groups of keys; after learning most true links are found, by chance few."""
    T, keep = 48, 0.25
    layer = sf.nn.SparsifinerAttention(32, 1, tokens=T, keep=keep, mixtures=8, phase="reconstruct")
    layer.reset(generator)
    with torch.no_grad():
        for project in (layer.query, layer.key):
            project.weight.copy_(torch.eye(32))
            project.bias.zero_()
    names = nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=-1)
    own = [layer.low_query.weight, layer.low_key.weight, layer.mixer, layer.basis]
    optimizer = torch.optim.Adam(own, lr=1e-2)

    def draw():
        """Tokens of four kinds, each in its quarter; every token asks for its own kind."""
        kind = torch.arange(T) // 12
        return 6 * names[kind][None] + 0.3 * torch.randn(8, T, 32, generator=generator)

    def recall():
        x = draw()
        q, k = (layer.split(project(x)) for project in (layer.query, layer.key))
        truth = sf.selection.top_k((q @ k.mT)[:, :, 1:], layer.budget(T))
        layer.phase = "sparse"
        found = layer.links(x)[:, :, 1:]
        layer.phase = "reconstruct"
        return float((truth & found).sum() / truth.sum())

    before = recall()
    for _ in range(150):
        layer(draw())
        optimizer.zero_grad()
        layer.aux_loss.backward()
        optimizer.step()
    assert before < 0.5 < 0.95 < recall()


def test_without_its_loss_the_predictor_has_no_gradient(generator):
    layer = sf.nn.SparsifinerAttention(32, 4, tokens=30, weight=0.0)
    layer.reset(generator)
    layer(torch.randn(2, 30, 32, generator=generator)).square().sum().backward()
    assert layer.basis.grad is None and layer.mixer.grad is None and bool(layer.query.weight.grad.any())
    with pytest.raises(sf.SparseFlashError, match="has 31 tokens, the layer was made for tokens=30"):
        layer(torch.randn(2, 31, 32))


# ---------------------------------------------------------------- Orion


def test_groups_are_means_of_what_there_is(generator):
    x = torch.randn(2, 10, 3, generator=generator)
    want = torch.stack([x[:, at : at + 4].mean(1) for at in (0, 4, 8)], 1)
    torch.testing.assert_close(grouped(x, 4), want)
    torch.testing.assert_close(grouped(x, 1), x)


def test_rows_of_a_table_are_apart_and_learn(generator):
    torch.manual_seed(0)
    rows = sf.nn.MultiScaleRows(16, 2, scales=(1, 4), cls=2, global_=1, window=2)
    for block in rows.modules():
        if isinstance(block, nn.Linear):
            nn.init.normal_(block.weight, std=0.2)
    cells = torch.randn(2, 3, 10, 16, generator=generator)
    out = rows(cells)
    other = cells.clone()
    other[0, 1] += 1
    changed = (rows(other) != out).any(-1)
    assert changed.tolist() == [[False, True, False], [False, False, False]]
    out.square().sum().backward()
    assert all(bool(p.grad.any()) for p in rows.parameters())
    for bad in (cells[0], None):
        with pytest.raises(sf.SparseFlashError, match=r"expected \[B, rows, features, width\]"):
            rows(bad)


def test_test_rows_never_write_the_memory(generator):
    torch.manual_seed(0)
    memory = sf.nn.PerceiverMemory(16, 2, latents=4)
    for block in memory.modules():
        if isinstance(block, nn.Linear):
            nn.init.normal_(block.weight, std=0.2)
    rows = torch.randn(2, 9, 16, generator=generator)
    with torch.no_grad():
        out = memory(rows, train=6)
        other = rows.clone()
        other[:, 7] += 1
        assert (memory(other, train=6) != out).any(-1)[0].tolist() == [False] * 7 + [True, False]
        other = rows.clone()
        other[:, 2] += 1
        assert bool((memory(other, train=6) != out).any(-1).all())
        order = [0, 1, 2, 3, 4, 5, 8, 6, 7]
        torch.testing.assert_close(memory(rows[:, order], train=6), out[:, order])
    with pytest.raises(sf.SparseFlashError, match="train=10: expected a number of the rows"):
        memory(rows, train=10)
