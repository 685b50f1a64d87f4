"""What every registered relaxation owes: a soft matrix, a proved permutation, a file."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import padst_compiler as padst
from padst_compiler.layers import SparseLayer
from padst_compiler.permutation import GAP_LIMIT, FixedPermutation, SoftPermutation, gaps
from padst_compiler.relaxations import RELAXATIONS
from padst_compiler.relaxations.base import FactoredPermutation
from padst_compiler.relaxations.spelling import make, read_back

FORMS = ["sinkhorn", "gumbel", "autoshuffle", "low_rank", "low_rank:5", "clos:3", "clos:2"]
FORMS += ["blockwise:4", "blockwise"]
Forms = pytest.mark.parametrize("form", FORMS)


def soft_of(form: str, size: int = 16, seed: int = 0) -> SoftPermutation:
    return make(form, size, torch.Generator().manual_seed(seed))


def spread(soft: SoftPermutation, size: float, seed: int) -> SoftPermutation:
    """Move the parameters anywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in soft.parameters():
            parameter.mul_(0.0).add_(torch.randn(parameter.shape, generator=generator) * size)
    return soft


def slow_penalty(matrix: Tensor) -> float:
    """P(M), entry by entry."""
    lines = [*matrix.double().tolist(), *matrix.double().t().tolist()]
    return math.fsum(math.fsum(map(abs, line)) - math.hypot(*line) for line in lines)


def test_every_relaxation_is_tested() -> None:
    assert {form.partition(":")[0] for form in FORMS} == {kind.name for kind in RELAXATIONS}


@Forms
def test_forward_is_the_product_with_the_matrix_and_so_are_its_gradients(form: str) -> None:
    soft, x = spread(soft_of(form), 0.3, 1), torch.randn(2, 3, 16, requires_grad=True)
    upstream = torch.randn(2, 3, 16)
    matrix = soft.soft()
    wanted = torch.einsum("ji,bti->btj", matrix, x)
    found = soft(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(found, [x, *soft.parameters()], upstream)
    theirs = torch.autograd.grad(wanted, [x, *soft.parameters()], upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@Forms
def test_the_matrix_is_doubly_stochastic_and_starts_near_uniform(form: str) -> None:
    soft = soft_of(form)
    matrix = soft.soft().detach()
    assert matrix.shape == (16, 16) and matrix.dtype is torch.float32
    assert bool((matrix >= 0).all())
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(16), rtol=0, atol=1e-4)
    loose = 0.2 if form == "autoshuffle" else 0.02  # one column step only
    torch.testing.assert_close(matrix.sum(dim=0), torch.ones(16), rtol=0, atol=loose)
    assert soft.gap() > GAP_LIMIT
    assert float(matrix.max()) < 0.9


@Forms
def test_penalty_and_gaps_follow_the_definition(form: str) -> None:
    soft = spread(soft_of(form), 0.3, 2)
    if isinstance(soft, FactoredPermutation):
        parts = [block for blocks in soft.blocks() for block in blocks]
    else:
        parts = [soft.soft()]
    wanted = sum(slow_penalty(part.detach()) for part in parts)
    assert soft.penalty().item() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    if form != "gumbel":  # its gaps are those without noise
        worst = max(float(gaps(part.detach()).max()) for part in parts)
        assert soft.gap() == pytest.approx(worst, abs=1e-5)
    soft.penalty().backward()
    for parameter in soft.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
        assert bool((parameter.grad != 0).any())


@Forms
def test_hardening_always_ends_in_a_permutation(form: str) -> None:
    for seed in range(25):  # over all forms: 225 random points, from uniform to sharp
        soft = spread(soft_of(form, seed=seed), 0.02 * 1.3**seed, seed)
        perm = soft.harden().perm
        assert sorted(perm.tolist()) == list(range(16))


@Forms
def test_what_is_sharpened_and_balanced_decodes_to_its_argmax(form: str) -> None:
    soft = spread(soft_of(form), 0.2, 3).eval()
    for _ in range(60):
        soft.sharpen(1.3)
        soft.balance()
    assert soft.gap() < 0.02
    matrix, perm = soft.soft().detach(), soft.harden().perm
    assert torch.equal(matrix.argmax(dim=1), perm)
    x = torch.randn(4, 16)
    torch.testing.assert_close(soft(x), FixedPermutation(soft.harden())(x), rtol=0, atol=0.2)


@Forms
def test_annealing_sharpens(form: str) -> None:
    soft = spread(soft_of(form), 0.1, 4).eval()
    before = float(soft.penalty().detach())
    soft.anneal(2.0)
    assert float(soft.penalty().detach()) < before


@Forms
def test_the_generator_alone_decides_the_start(form: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (soft_of(form, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


@Forms
def test_count_says_how_many_numbers_it_learns(form: str) -> None:
    soft, (_, _, option) = soft_of(form, 36), form.partition(":")
    count = type(soft).count(36, int(option) if option else None)
    assert count == sum(p.numel() for p in soft.parameters())


@Forms
def test_settings_and_state_bring_it_back(form: str) -> None:
    soft = spread(soft_of(form), 0.3, 5)
    soft.resample()
    soft.sharpen(1.5)
    soft.anneal(1.1)
    twin = read_back(soft.name, 16, soft.settings())
    twin.load_state_dict(soft.state_dict())
    for other in (twin, copy.deepcopy(soft)):
        assert torch.equal(other.soft(), soft.soft())
        assert repr(other) == repr(soft) and "16, soft" in repr(soft)
    soft.resample()
    twin.resample()
    assert torch.equal(twin.soft(), soft.soft())


@Forms
def test_the_dtype_of_the_tokens_stays(form: str) -> None:
    soft, x = soft_of(form), torch.randn(3, 16)
    for dtype in (torch.bfloat16, torch.float32):
        assert soft(x.to(dtype)).dtype is dtype
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(soft.soft(), soft_of(form).soft(), rtol=0, atol=0)
        soft(x.bfloat16()).float().sum().backward()
    soft.bfloat16()
    assert soft(x.bfloat16()).dtype is torch.bfloat16 and soft.soft().dtype is torch.float32


def test_nan_is_never_hard() -> None:
    for form in FORMS:
        soft = soft_of(form)
        with torch.no_grad():
            next(soft.parameters()).view(-1)[0] = torch.nan
        assert not soft.gap() <= 1.0
        with pytest.raises(ValueError, match="Expected a finite soft permutation"):
            soft.harden()


# -- within a model --------------------------------------------------------------------------------


def sparse_net(form: str, **settings: Any) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    config = padst.SparseConfig("block:4", 0.5, form, **settings)
    made = padst.sparsify(net, config, filter_fn=lambda site: True)
    assert isinstance(made, nn.Sequential)
    return made


@Forms
def test_files_hold_it(form: str, tmp_path: Path) -> None:
    model = sparse_net(form)
    for layer in padst.sparse_layers(model).values():
        assert layer.soft_permutation is not None
        spread(layer.soft_permutation, 0.3, 6).sharpen(1.5)
    padst.save(model, tmp_path / "model.safetensors")
    x = torch.randn(5, 16)
    for target in (
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)),
        sparse_net(form, seed=1),
    ):
        loaded = padst.load(target, tmp_path / "model.safetensors")
        assert torch.equal(loaded(x), model(x))
        kinds = [type(layer.permutation) for layer in padst.sparse_layers(loaded).values()]
        assert kinds == [type(layer.permutation) for layer in padst.sparse_layers(model).values()]
    other = "identity" if form == "random" else "random"
    with pytest.raises(ValueError, match=f"permutation {form}, here {other}"):
        padst.load(sparse_net(other), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "form", [*FORMS[:1], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])]
)
def test_training_hardens_it_and_empties_the_optimiser(form: str) -> None:
    model = sparse_net(form)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    training = padst.DynamicSparsity(model, optimizer, total_steps=200, update_every=10)
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    for _ in range(200):
        optimizer.zero_grad()
        ((model(x) - target).square().mean() + training.penalty()).backward()
        optimizer.step()
    shares = training.soft_fraction()
    assert all(0.0 < share < 1.0 for share in shares.values()), shares
    for layer in padst.sparse_layers(model).values():
        assert isinstance(layer, SparseLayer) and isinstance(layer.permutation, FixedPermutation)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sinkhorn", "gumbel", "autoshuffle", "low_rank", "clos"])
def test_a_compiled_step_is_compiled_once_while_it_sharpens(form: str) -> None:
    model = sparse_net(form)
    counter = CompileCounter()
    step = torch.compile(lambda x: model(x).square().mean(), backend=counter, fullgraph=True)
    eager = copy.deepcopy(model)
    x = torch.randn(8, 16)
    for _ in range(4):
        step(x).backward()
        eager(x).square().mean().backward()
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
        for net in (model, eager):
            net.zero_grad()
            for layer in padst.sparse_layers(net).values():
                assert layer.soft_permutation is not None
                layer.soft_permutation.sharpen(1.2)
                layer.soft_permutation.anneal(1.1)
                layer.soft_permutation.resample()
    assert counter.frame_count == 1
