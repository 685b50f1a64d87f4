"""Random graphs over all rules, folded and compared with what they were in float64."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional as F

from padst_compiler.ops import LINEAR
from padst_compiler.passes.cancel_inverse import CancelInverse
from padst_compiler.passes.drop_identity import DropIdentity
from padst_compiler.passes.fold_permutations import FoldPermutations
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

permute = torch.ops.padst.permute
Rewrite = Callable[..., Any]
MOST = 1500  # numbers in a tensor
PIPELINES: dict[str, tuple[Any, ...]] = {
    "alone": (FoldPermutations(),),
    "twice": (FoldPermutations(), CancelInverse(), DropIdentity(), FoldPermutations()),
}


class Program:
    """Random steps on two inputs, an index and frozen tensors; ``run`` takes them again."""

    def __init__(self, seed: int, steps: int) -> None:
        self.rng = random.Random(seed)
        self.source = torch.Generator().manual_seed(seed)
        self.inputs = [self.number(2, 3, 8), self.number(2, 4, 2, 2)]
        self.inputs.append(torch.randint(0, 5, (2, 3), generator=self.source))
        self.frozen: dict[str, Tensor] = {}
        self.maps: dict[int, list[str]] = {}
        self.steps: list[tuple[Callable[..., Any], tuple[int | str, ...]]] = []
        self.pool = list(self.inputs)
        self.used: set[int] = set()
        self.moved = 0.0
        rules = [getattr(self, name) for name in dir(self) if name.startswith("try_")]
        self.try_linear(0)
        while len(self.steps) < steps:
            rule = self.try_permute if self.rng.random() < 0.35 else self.rng.choice(rules)
            rule(self.pick())
        self.outputs = [at for at in range(3, len(self.pool)) if at not in self.used]
        self.seen = [self.rng.random() < 0.3 for _ in self.outputs]

    def run(self, *inputs: Tensor, **frozen: Tensor) -> tuple[Tensor, ...]:
        pool = list(inputs)
        for function, where in self.steps:
            made = function(*(frozen[w] if isinstance(w, str) else pool[w] for w in where))
            pool += made if isinstance(made, tuple | list) else [made]
        # Some results leave as they are, others as sums that see no order.
        return tuple(
            pool[at] if seen else pool[at].square().sum()
            for at, seen in zip(self.outputs, self.seen, strict=True)
        )

    # -- drawing ---------------------------------------------------------------------------------

    def number(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.source)

    def pick(self, *fits: Callable[[Tensor], bool]) -> int:
        found = [
            at
            for at, value in enumerate(self.pool)
            if value.is_floating_point() and all(fit(value) for fit in fits)
        ]
        late = found[-4:] if self.rng.random() < 0.7 else found
        return self.rng.choice(late) if late else -1

    def keep(self, tensor: Tensor) -> str:
        name = f"f{len(self.frozen)}"
        self.frozen[name] = tensor
        return name

    def add(self, function: Callable[..., Any], *where: int | str) -> None:
        given = [self.frozen[w] if isinstance(w, str) else self.pool[w] for w in where]
        made = function(*given)
        new = list(made) if isinstance(made, tuple | list) else [made]
        if any(t.numel() > MOST or t.numel() == 0 or t.dim() > 6 for t in new):
            return
        self.steps.append((function, where))
        self.used |= {w for w in where if isinstance(w, int)}
        self.pool += new

    def map_of(self, size: int) -> str:
        known = self.maps.setdefault(size, [])
        if known and self.rng.random() < 0.5:
            return self.rng.choice(known)
        kind = self.rng.randrange(4)
        perm = torch.randperm(size, generator=self.source)
        halves = [n for n in range(2, size) if size % n == 0]
        if kind == 0 and halves:  # whole blocks
            side = self.rng.choice(halves)
            blocks = torch.randperm(size // side, generator=self.source)
            perm = (blocks[:, None] * side + torch.arange(side)).flatten()
        elif kind == 1 and known:
            perm = self.frozen[self.rng.choice(known)].argsort()
        elif kind == 2:
            perm = torch.arange(size).roll(self.rng.randrange(size))
        known.append(self.keep(perm))
        return known[-1]

    def dim(self, at: int) -> int:
        return self.rng.randrange(self.pool[at].dim())

    # -- the rules -------------------------------------------------------------------------------

    def try_permute(self, at: int) -> None:
        if self.pool[at].dim():
            before = len(self.steps)
            self.add(permute, at, self.map_of(self.pool[at].shape[-1]))
            self.moved += self.pool[at].numel() * 8 * (len(self.steps) - before)

    def try_pointwise(self, at: int) -> None:
        act: Callable[[Tensor], Tensor] = self.rng.choice(
            [torch.relu, torch.tanh, torch.sigmoid, F.gelu, F.silu, torch.clone, torch.neg]
        )
        self.add(act, at)

    def try_together(self, at: int) -> None:
        def fits(value: Tensor) -> bool:
            try:
                torch.broadcast_shapes(value.shape, self.pool[at].shape)
            except RuntimeError:
                return False
            return True

        other = self.pick(fits)
        kinds: list[Callable[..., Tensor]] = [torch.add, torch.sub, torch.maximum]
        kinds.append(lambda a, b: a * b.tanh())
        kinds.append(lambda a, b: torch.where(a.isfinite(), b, a))
        self.add(self.rng.choice(kinds), at, other)

    def try_residual(self, at: int) -> None:
        shape = self.pool[at].shape
        other = self.pick(lambda value: value.shape == shape)
        self.add(torch.add, *self.rng.sample([at, other], 2))

    def try_constant(self, at: int) -> None:
        shape = list(self.pool[at].shape)
        shape = [n if self.rng.random() < 0.7 else 1 for n in shape][self.rng.randrange(3) :]
        kinds: list[Callable[..., Tensor]] = [torch.add, torch.mul]
        kinds.append(lambda a, b: torch.where(b > 0, a, b))
        self.add(self.rng.choice(kinds), at, self.keep(self.number(*shape)))

    def try_linear(self, at: int) -> None:
        if self.pool[at].dim() < 1:
            return
        width, rows = self.pool[at].shape[-1], self.rng.choice([1, 4, 6, 8, 12, 16])
        weight = self.keep(self.number(rows, width) / math.sqrt(width))
        bias = [self.keep(self.number(rows))] if self.rng.random() < 0.5 else []
        self.add(F.linear, at, weight, *bias)

    def try_structured(self, at: int) -> None:
        shapes = [Shape(n, width) for n in (4, 8, 12, 16) for width in self.pool[at].shape[-1:]]
        kinds: list[Structure] = [Block(2), Block(4), FanIn(), Unstructured(), NM(m=4), Diagonal()]
        if not shapes or shapes[0].in_features % 4:
            return
        structure, shape = self.rng.choice(kinds), self.rng.choice(shapes)
        dense = self.number(shape.out_features, shape.in_features)
        indices = structure.select(dense, structure.kept(shape, 0.5))
        values = structure.pack(dense, indices)
        op, rows = LINEAR[structure.name], shape.out_features
        bias = [self.keep(self.number(rows))] if self.rng.random() < 0.5 else []
        names = [self.keep(values), self.keep(indices), *bias]
        self.add(lambda x, v, i, b=None: op(x, v, i, b, rows).tanh(), at, *names)

    def try_view(self, at: int) -> None:
        shape = list(self.pool[at].shape)
        for _ in range(self.rng.randint(1, 3)):
            place = self.rng.randrange(len(shape) + 1)
            halves = [n for n in range(1, 13) if place < len(shape) and shape[place] % n == 0]
            if self.rng.random() < 0.5 and place + 1 < len(shape):
                shape[place : place + 2] = [shape[place] * shape[place + 1]]
            elif halves:
                first = self.rng.choice(halves)
                shape[place : place + 1] = [first, shape[place] // first]
        self.add(lambda x: x.reshape(shape), at)

    def try_transpose(self, at: int) -> None:
        order = self.rng.sample(range(self.pool[at].dim()), self.pool[at].dim())
        self.add(lambda x: x.permute(order), at)

    def try_cat(self, at: int) -> None:
        if not self.pool[at].dim():
            return
        dim = self.dim(at)
        rest = [n for d, n in enumerate(self.pool[at].shape) if d != dim]
        other: int | str = self.pick(
            lambda v: (
                v.dim() == len(rest) + 1 and [n for d, n in enumerate(v.shape) if d != dim] == rest
            )
        )
        if self.rng.random() < 0.3:
            other = self.keep(self.number(*self.pool[at].shape))
        stacks = other != at and not isinstance(other, str) and self.rng.random() < 0.3
        if stacks and self.pool[at].shape == self.pool[int(other)].shape:
            self.add(lambda a, b: torch.stack([a, b], dim), at, other)
        else:
            self.add(lambda a, b: torch.cat([a, b], dim), at, other)

    def try_split(self, at: int) -> None:
        if not self.pool[at].dim():
            return
        dim, kind = self.dim(at), self.rng.randrange(4)
        size = self.pool[at].shape[dim]
        if kind == 0 and size % 2 == 0:
            self.add(lambda x: x.chunk(2, dim), at)
        elif kind == 1 and size > 2:
            first = self.rng.randrange(1, size)
            self.add(lambda x: x.split([first, size - first], dim), at)
        elif kind == 2 and size <= 4:
            self.add(lambda x: x.unbind(dim), at)
        else:
            which = self.rng.randrange(size)
            self.add(lambda x: x.select(dim, which), at)

    def try_slice(self, at: int) -> None:
        if not self.pool[at].dim():
            return
        dim = self.dim(at)
        size = self.pool[at].shape[dim]
        start, step = self.rng.randrange(size), self.rng.choice([1, 1, 1, 2])
        stop = self.rng.randint(start + 1, size)
        taken = (*(slice(None),) * dim, slice(start, stop, step))
        positions = torch.tensor(self.rng.sample(range(size), size))
        kinds = [lambda x: x[taken], lambda x: x.narrow(dim, start, stop - start)]
        self.add(self.rng.choice([*kinds, lambda x: x.index_select(dim, positions)]), at)

    def try_norm(self, at: int) -> None:
        count = self.rng.randint(1, min(2, max(1, self.pool[at].dim() - 1)))
        if self.pool[at].dim():
            shape = list(self.pool[at].shape)[-count:]
            names = [self.keep(self.number(*shape)) for _ in range(self.rng.choice([0, 2]))]
            self.add(lambda x, *w: F.layer_norm(x, shape, *w), at, *names)

    def try_softmax(self, at: int) -> None:
        if self.pool[at].dim():
            dim = self.dim(at)
            kinds = [lambda x: x.softmax(dim), lambda x: x.log_softmax(dim)]
            kinds += [lambda x: x.flip(dim), lambda x: x.roll(1, dim), lambda x: x.cumsum(dim)]
            self.add(self.rng.choice([*kinds, lambda x: x.sort(dim).values]), at)

    def try_reduce(self, at: int) -> None:
        if not self.pool[at].dim():
            return
        dims = self.rng.sample(range(self.pool[at].dim()), self.rng.randint(1, self.pool[at].dim()))
        keep = self.rng.random() < 0.6
        kinds: list[Callable[..., Tensor]] = [torch.sum, torch.mean, torch.amax, torch.logsumexp]
        kind = self.rng.choice(kinds)
        self.add(lambda x: kind(x, dims, keepdim=keep), at)

    def try_gate(self, at: int) -> None:
        dims = [d for d, n in enumerate(self.pool[at].shape) if n % 2 == 0]
        if dims:
            dim = self.rng.choice(dims)
            self.add(lambda x: F.glu(x, dim), at)

    def try_repeat(self, at: int) -> None:
        if not self.pool[at].dim():
            return
        dim = self.dim(at)
        times = [2 if d == dim else 1 for d in range(self.pool[at].dim())]
        kinds = [lambda x: x.repeat(times), lambda x: x.repeat_interleave(2, dim)]
        self.add(self.rng.choice(kinds), at)

    def try_write(self, at: int) -> None:
        """Write a part of a tensor into a copy of another."""
        shape = self.pool[at].shape
        other = self.pick(lambda value: value.shape == shape)
        if not shape:
            return
        dim = self.dim(at)
        start = self.rng.randrange(shape[dim])
        stop = self.rng.randint(start + 1, shape[dim])
        part = (*(slice(None),) * dim, slice(start, stop))

        def into(x: Tensor, y: Tensor) -> Tensor:
            written = x.clone()
            written[part] = y[part]
            return written

        kinds = [into, lambda x, y: torch.select_scatter(x, y.select(dim, start), dim, start)]
        kinds.append(lambda x, y: torch.slice_scatter(x, y[part], dim, start, stop))
        self.add(self.rng.choice(kinds), at, other)

    def try_length(self, at: int) -> None:
        if self.pool[at].dim():
            dim = self.dim(at)
            self.add(lambda x: x / (1 + torch.linalg.vector_norm(x, dim=dim, keepdim=True)), at)

    def try_more_channels(self, at: int) -> None:
        at = self.pick(lambda value: value.dim() == 4)
        if at < 0:
            return
        channels, kind = self.pool[at].shape[1], self.rng.randrange(5)
        if kind == 0:
            self.add(F.prelu, at, self.keep(self.number(channels)))
        elif kind == 1 and channels % 2 == 0:
            self.add(lambda x: F.channel_shuffle(x, 2), at)
        elif kind == 2 and channels % 4 == 0:
            self.add(lambda x: F.pixel_shuffle(x, 2), at)
        elif kind == 3:
            rows = self.rng.choice([2, 4, 8])
            weight = self.keep(self.number(channels, rows, 1, 1))
            self.add(lambda x, w: F.conv_transpose2d(x, w), at, weight)
        else:
            self.add(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), at)

    def try_expand(self, at: int) -> None:
        place = self.rng.randint(0, self.pool[at].dim())
        times = self.rng.choice([1, 2, 3])
        if self.rng.random() < 0.3:
            self.add(lambda x: x.squeeze(), at)
            return
        shape = list(self.pool[at].shape)
        shape.insert(place, times)
        self.add(lambda x: x.unsqueeze(place).expand(shape), at)

    def try_attention(self, at: int) -> None:
        at = self.pick(lambda v: v.dim() == 3 and v.shape[-1] % 4 == 0)
        if at < 0:
            return
        batch, tokens, width = self.pool[at].shape
        heads, kind = self.rng.choice([1, 2, 4]), self.rng.randrange(5)
        causal, whole = self.rng.random() < 0.3, self.rng.random() < 0.6
        names = [self.keep(self.number(3 * width, width) / width)]
        maps = [self.map_of(width) for _ in range(3)] if kind < 2 else []

        def attend(x: Tensor, w: Tensor, *perms: Tensor) -> Tensor:
            parts = F.linear(x, w).split(width, -1)
            q, k, v = parts
            if perms:
                q, k, v = (permute(part, p) for part, p in zip(parts, perms, strict=True))
            if kind == 3:
                both = F.linear(x, w).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
                q, k, v = both.unbind(0)
            elif kind == 4 and heads > 1:  # half as many heads of keys and values
                q = q.view(batch, tokens, heads, -1).transpose(1, 2)
                halves = (t[..., : width // 2].unflatten(-1, (heads // 2, -1)) for t in (k, v))
                k, v = (t.transpose(1, 2).repeat_interleave(2, 1) for t in halves)
            else:
                q, k, v = (t.view(batch, tokens, heads, -1).transpose(1, 2) for t in (q, k, v))
            if whole:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            else:
                out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
            return out.transpose(1, 2).reshape(batch, tokens, width)

        before = len(self.steps)
        self.add(attend, at, *names, *maps)
        self.moved += len(maps) * self.pool[at].numel() * 8 * (len(self.steps) - before)

    def try_product(self, at: int) -> None:
        a = self.pool[at]
        if a.dim() < 2:
            return
        other = self.pick(lambda v: v.dim() == a.dim() and v.shape[-1] == a.shape[-1])
        if self.pool[other].shape[:-2] == a.shape[:-2]:
            self.add(lambda x, y: (x @ y.transpose(-1, -2)).tanh(), at, other)

    def try_experts(self, at: int) -> None:
        at = self.pick(lambda v: v.dim() == 3)
        if at >= 0:
            weight = self.number(self.pool[at].shape[0], self.pool[at].shape[2], 4)
            self.add(lambda x, w: torch.bmm(x, w).tanh(), at, self.keep(weight))

    def try_embedding(self, at: int) -> None:
        self.add(lambda i, t: F.embedding(i, t), 2, self.keep(self.number(5, 8)))

    def try_channels(self, at: int) -> None:
        at = self.pick(lambda v: v.dim() == 4)
        channels = self.pool[at].shape[1]
        vectors = [self.keep(self.number(channels).abs() + 0.1) for _ in range(4)]
        kind = self.rng.randrange(6)
        if kind == 0:
            weight = self.keep(self.number(self.rng.choice([1, 4, 6]), channels, 1, 1))
            self.add(lambda x, w: F.conv2d(x, w).tanh(), at, weight)
        elif kind == 1:
            weight = self.keep(self.number(channels, 1, 3, 3))
            self.add(
                lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=channels).tanh(),
                *(at, weight, vectors[0]),
            )
        elif kind == 2:
            self.add(lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b), at, *vectors)
        elif kind == 3 and channels % 2 == 0:
            self.add(lambda x, w, b: F.group_norm(x, 2, w, b), at, *vectors[:2])
        elif kind == 4 and min(self.pool[at].shape[2:]) > 1:
            pools: list[Callable[..., Tensor]] = [F.avg_pool2d, F.max_pool2d]
            pool = self.rng.choice(pools)
            self.add(lambda x: pool(x, 2), at)
        else:
            self.add(lambda x: F.adaptive_avg_pool2d(x, 1), at)


def moved(graph: fx.Graph) -> float:
    """Return how many bytes of data that depend on an input are moved."""
    live = set([node for node in graph.nodes if node.op == "placeholder"][:3])
    total = 0.0
    for node in graph.nodes:
        if node.op == "call_function" and any(source in live for source in node.all_input_nodes):
            live.add(node)
            if node.target is permute.default:
                value = node.meta["val"]
                total += value.numel() * value.element_size()
    return total


def check(rewrite: Rewrite, seed: int, steps: int, pipeline: str) -> tuple[float, float]:
    program = Program(seed, steps)
    expected = program.run(*program.inputs, **program.frozen)
    folds = PIPELINES[pipeline]
    result = rewrite(folds, program.run, *program.inputs, compare=False, **program.frozen)
    module = result.graph.owning_module
    actual = module(*program.inputs, *program.frozen.values())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    after = moved(result.graph)
    assert after <= program.moved, (seed, steps)
    return program.moved, after


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(3, 14))
def test_random_graphs_keep_their_numbers(rewrite: Rewrite, seed: int, steps: int) -> None:
    check(rewrite, seed, steps, "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [*range(10), *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(10, 20))],
)
def test_two_thousand_random_graphs_keep_their_numbers(rewrite: Rewrite, part: int) -> None:
    rng = random.Random(part)
    sums = [0.0, 0.0]
    for seed in range(part * 100, part * 100 + 100):
        pipeline = rng.choice(sorted(PIPELINES))
        before, after = check(rewrite, seed, rng.randint(4, 16), pipeline)
        sums[0] += before
        sums[1] += after
    assert sums[1] < 0.8 * sums[0]  # most of them disappear
