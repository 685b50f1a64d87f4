import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from padst_compiler.config import SparseConfig
from padst_compiler.layers import SparseLinear
from padst_compiler.plan import Plan, plan
from padst_compiler.structures import Block


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 10))


def decisions(made: Plan) -> dict[str, str]:
    return {site.name: site.decision for site in made.sites}


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64, n_positions=16)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def test_the_table_says_everything() -> None:
    made = plan(mlp(), torch.ones(3, 64), structure="block:16", sparsity=0.75)
    assert str(made) == repr(made)
    lines = str(made).splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert cells[0] == [
        "site",
        "kind",
        "shape",
        "tokens",
        "decision",
        "structure",
        "sparsity",
        "permutation",
        "why",
    ]
    assert cells[2][:8] == [
        "0",
        "linear",
        "128x64",
        "3",
        "sparse",
        "block:16",
        "0.750 -> 0.750",
        "learned (input)",
    ]
    assert cells[3][7] == "learned (output)"
    assert cells[4][4:] == ["dense", "", "", "", "output head: no layer reads its 10 features"]
    assert lines[-1] == (
        "2 of 3 sites sparse: 16,384 of 17,024 linear weights (96.2%), 72.2% of all are zero; "
        "8,192 more numbers while permutations are soft; 96.2% of 102,144 linear FLOPs, "
        "100.0% without what is dense by default."
    )


def test_without_inputs_there_are_no_tokens_and_flops() -> None:
    made = plan(mlp())
    assert made.linear_flops is None
    assert "tokens" not in str(made) and "FLOPs" not in str(made)


def test_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(mlp())
    assert capsys.readouterr().out == ""
    made.print()
    assert capsys.readouterr().out == f"{made}\n"


def test_it_is_plain_json() -> None:
    made = plan(mlp(), torch.ones(3, 64), structure="nm:2:4")
    read = json.loads(json.dumps(made.to_dict()))
    assert read["version"] == 1 and read["linear_flops"] == made.linear_flops
    first = read["sites"][0]
    assert (first["name"], first["shape"], first["structure"]) == ("0", [128, 64], "nm:2:4")
    assert (first["sparsity"], first["actual_sparsity"], first["tokens"]) == (0.9, 0.5, 3)


def test_gpt2_is_covered_but_for_its_tied_head() -> None:
    model = tiny_gpt2()
    made = plan(model, torch.zeros(2, 5).long(), structure="block:8", sparsity=0.75)
    kept = [name for name, decision in decisions(made).items() if decision == "dense"]
    assert kept == ["lm_head"] and len(made.sparse) == 4
    assert {site.kind for site in made.sparse} == {"conv1d"}
    assert {site.tokens for site in made.sites} == {10}
    assert made.sites[-1].reason == "its weight is also transformer.wte.weight"


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.w = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) if x.sum() > 0 else self.b(x)
        for _ in range(int(x.abs().max().item() > 0) + 1):
            x = self.c(x) @ self.w
        return x


def test_control_flow_hides_nothing() -> None:
    made = plan(Branches(), torch.ones(3, 64))
    assert decisions(made) == {"a": "sparse", "b": "sparse", "c": "sparse", "w": "sparse"}
    sites = {site.name: site for site in made.sites}
    assert sites["b"].reason == "not run by example_inputs"
    assert sites["c"].uses == 2 and sites["w"].kind == "functional"
    assert made.coverage == 1.0


def test_each_site_may_have_its_own_config() -> None:
    config = {
        "re:[01]": SparseConfig("fan_in:8", permutation="none"),
        "2": SparseConfig("nm:16"),
        "3": None,
    }
    sites = plan(mlp(), config=config).sites
    assert [site.kept for site in sites] == [8, 2, 0]
    assert sites[2].reason == "config says dense ('3')"


def test_a_model_that_is_sparse_already_is_described() -> None:
    model = mlp()
    indices = torch.zeros(8, 1, dtype=torch.int32)
    SparseLinear.adopt(model[0], Block(16), indices, None, "input")
    made = plan(model, torch.ones(3, 64), structure="block:16")
    assert made.sites[0].kind == "sparse" and made.sites[0] not in made.sparse
    assert "sparse already" in str(made) and "2 of 3 sites sparse" in str(made)


def test_planning_touches_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 64))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes, seed = [type(m) for m in model.modules()], torch.get_rng_state()
    plan(model, torch.ones(3, 64))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert classes == [type(m) for m in model.modules()]
    assert torch.equal(seed, torch.get_rng_state()) and model.training


def test_a_model_without_sites_has_an_empty_plan() -> None:
    made = plan(nn.Sequential(nn.LayerNorm(4)), torch.ones(2, 4))
    assert made.sites == [] and str(made).endswith("0 of 0 sites sparse.")


STRICT: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (lambda: nn.Linear(48, 100), {}, r"Site '\(root\)'. Expected features divisible by"),
    (lambda: nn.Sequential(nn.Linear(32, 32)), {}, "Site '0'. Expected .* keeps 1 of 1"),
    (
        lambda: parametrizations.orthogonal(nn.Linear(64, 64)),
        {"config": {"": SparseConfig()}},
        r"Site '\(root\)'. Expected a site that can .*computed by _Orthogonal.*Leave it out",
    ),
]


@pytest.mark.parametrize(("build", "arguments", "said"), STRICT)
def test_strict_raises_where_a_requested_site_stays_dense(
    build: Callable[[], nn.Module], arguments: dict[str, Any], said: str
) -> None:
    (refused,) = [site for site in plan(build(), **arguments).sites if site.refused]
    assert refused.decision == "dense"
    with pytest.raises(ValueError, match=said):
        plan(build(), **arguments, strict=True)


def test_strict_lets_the_default_exceptions_be() -> None:
    assert len(plan(mlp(), strict=True).sparse) == 2
    attention = plan(nn.MultiheadAttention(64, 2), strict=True)
    assert [site.name for site in attention.sparse] == ["in_proj_weight", "out_proj"]


REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([1, 2], {}, TypeError, "Expected a torch.nn.Module. Got list"),
    (nn.ReLU(), {}, ValueError, "Expected a model with parameters. Got an empty ReLU"),
    (mlp(), {"sparsity": 1.0}, ValueError, "Expected 0 <= sparsity < 1. Got 1.0"),
    (mlp(), {"structure": "blok"}, ValueError, "Did you mean 'block'"),
    (mlp(), {"permutation": "no"}, ValueError, "Expected permutation none"),
    (mlp(), {"config": "block"}, TypeError, "Expected a SparseConfig or a mapping"),
    (mlp(), {"config": SparseConfig(), "sparsity": 0.5}, ValueError, "Got both"),
    (mlp(), {"config": {"fc": SparseConfig()}}, ValueError, "which matches none"),
    (mlp(), {"example_inputs": torch.ones(3, 64, device="meta")}, ValueError, "Got meta"),
    (nn.Sequential(nn.LazyLinear(4)), {}, ValueError, "Expected initialised parameters"),
]


@pytest.mark.parametrize(("model", "arguments", "error", "said"), REFUSED)
def test_bad_arguments_are_refused(
    model: Any, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as caught:
        plan(model, **arguments)
    assert said in str(caught.value)
