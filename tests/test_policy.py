from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from padst_compiler.config import SparseConfig
from padst_compiler.policy import check_names, choose, default_exceptions, find_config
from padst_compiler.sites import Site, discover

A, B = SparseConfig(sparsity=0.5), SparseConfig(sparsity=0.75)


def mlp(**layers: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in layers.items()})


def chosen(model: nn.Module, config: Any = A, filter_fn: Any = None) -> dict[str, Site]:
    sites = discover(model)
    choose(model, sites, config, filter_fn)
    return {site.name: site for site in sites}


def requested(*args: Any) -> list[str]:
    return [name for name, site in chosen(*args).items() if site.requested]


@pytest.mark.parametrize(
    "name",
    ["head", "lm_head", "classifier", "score", "logits", "output_projection", "pooler", "heads"],
)
def test_heads_are_left_out_by_name(name: str) -> None:
    sites = chosen(mlp(**{"fc": (8, 8), name: (8, 8)}))
    assert sites["fc"].requested and not sites[name].requested
    assert sites[name].reason == f"output head by name ({name})"


@pytest.mark.parametrize("name", ["fc_out", "heads.0", "headroom", "scores", "overhead", "output"])
def test_inner_layers_with_such_names_stay(name: str) -> None:
    model = nn.ModuleDict({"inner": nn.ModuleDict(), "last": nn.Linear(8, 8)})
    inner = model["inner"]
    for part in name.split(".")[:-1]:
        inner.add_module(part, nn.ModuleDict())
        inner = inner.get_submodule(part)
    inner.add_module(name.rpartition(".")[2], nn.Linear(8, 8))
    assert requested(model) == [f"inner.{name}", "last"]


def test_nested_heads_are_left_out() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "classifier": mlp(dense=(8, 8), out=(8, 8))})
    assert requested(model) == ["fc"]


def test_the_last_layer_is_the_head_where_nobody_reads_its_width() -> None:
    sites = chosen(mlp(a=(64, 32), b=(32, 10)))
    assert requested(mlp(a=(64, 32), b=(32, 10))) == ["a"]
    assert sites["b"].reason == "output head: no layer reads its 10 features"
    assert requested(mlp(a=(64, 256), b=(256, 64))) == ["a", "b"]
    read = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 3))
    assert requested(read) == ["1", "2"]  # the first convolution reads the input
    assert requested(mlp(head=(64, 10), a=(64, 32))) == ["a"]  # the head has been found by name


def test_a_single_layer_is_no_head() -> None:
    assert requested(nn.Linear(64, 10)) == [""]
    assert requested(nn.Sequential(nn.Linear(64, 10))) == ["0"]
    convolutions = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64, 10))
    assert requested(convolutions) == []


def test_a_first_convolution_stays_dense() -> None:
    stem = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1))
    assert requested(stem) == ["1"]
    assert chosen(stem)["0"].reason == "first convolution: it reads the input"
    assert requested(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))) == ["1"]
    assert requested(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))) == ["1"]
    assert requested(nn.Conv2d(8, 16, 1)) == [""]


def test_obstacles_are_no_requests_by_default_but_are_when_asked_for() -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)))
    assert requested(model) == []
    assert chosen(model)["0"].reason.startswith("its weight is computed by _Orthogonal")
    assert requested(model, {"0": A}) == ["0"]
    assert requested(model, A, lambda site: True) == ["0"]


def test_parameters_of_other_code_are_asked_for_as_layers_are() -> None:
    model = nn.MultiheadAttention(8, 2)
    assert requested(model) == ["in_proj_weight", "out_proj"]
    assert requested(model, {"out_proj": A}) == ["out_proj"]
    assert requested(model, {"re:.*weight": A}) == ["in_proj_weight"]
    assert requested(model, A, lambda module, name: module is model) == ["in_proj_weight"]


def test_depthwise_convolutions_stay_dense_unless_they_are_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    assert requested(model) == ["2"]
    assert chosen(model)["1"].reason == "depthwise convolution: no features meet"
    assert requested(model, {"1": A}) == ["1"]


def test_a_mapping_replaces_the_default_exceptions() -> None:
    model = mlp(fc=(8, 8), head=(8, 10))
    sites = chosen(model, {"head": A})
    assert sites["head"].requested and sites["head"].config == A
    assert sites["fc"].reason == "not in config"
    assert requested(model, {"re:.*": A}) == ["fc", "head"]
    assert chosen(model, {"fc": None, "re:.*": A})["fc"].reason == "config says dense ('fc')"


@pytest.mark.parametrize(
    ("config", "name", "key"),
    [
        ({"re:.*": A, "x": B, "x.y.z": None}, "x.y.z", "x.y.z"),
        ({"re:.*": A, "x": B, "x.y": None}, "x.y.z", "x.y"),
        ({"re:.*z": A, "re:.*": B}, "x.y.z", "re:.*z"),
        ({"re:.*": A, "re:.*z": B}, "x.y.z", "re:.*"),
        ({"re:y": A, "x.": B, "z": B}, "x.y.z", None),
        ({"": A}, "", ""),
    ],
)
def test_names_win_over_modules_over_expressions(
    config: dict[str, SparseConfig | None], name: str, key: str | None
) -> None:
    found = find_config(config, [name])
    assert found == (None if key is None else (key, config[key]))


def test_an_alias_is_a_name() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert requested(model, {"b": A}) == ["a"]


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"fc9": A}, ValueError, "Got 'fc9', which matches none. Did you mean 'fc1'"),
        ({"re:nothing": A}, ValueError, "matches none"),
        ({"re:(": A}, ValueError, "Expected a regular expression after 're:'"),
        ({"fc1": 0.9}, TypeError, "Expected a SparseConfig or None for 'fc1'. Got 0.9"),
        ({"fc": A}, ValueError, "matches none"),  # half a name is no module's name
    ],
)
def test_keys_and_values_are_checked(
    config: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as caught:
        check_names(config, [["fc1"], ["mlp.fc2"]])
    assert said in str(caught.value)


def takes_any(*args: Any) -> bool:
    module, name = args
    return isinstance(module, nn.Linear) and name == "a"


FILTERS: dict[str, Callable[..., bool]] = {
    "site": lambda site: site.name == "a",
    "module and name": lambda module, fqn: fqn == "a" and isinstance(module, nn.Linear),
    "any": takes_any,
    "partial": partial(lambda wanted, site: site.name == wanted, "a"),
    "default": lambda site, wanted="a": site.name == wanted,
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_of_both_kinds_work(name: str) -> None:
    sites = chosen(mlp(a=(8, 8), b=(8, 8)), A, FILTERS[name])
    assert sites["a"].requested and sites["b"].reason == "filter_fn leaves it out"


def test_a_filter_replaces_the_exceptions_and_narrows_a_mapping() -> None:
    model = mlp(a=(8, 8), b=(8, 8), head=(8, 10))
    assert requested(model, A, lambda site: True) == ["a", "b", "head"]
    assert requested(model, {"a": A, "head": B}, lambda site: site.name != "a") == ["head"]


@pytest.mark.parametrize("filter_fn", ["fc", lambda a, b, c: True])
def test_what_is_no_filter_is_refused(filter_fn: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected .*filter_fn"):
        chosen(mlp(a=(8, 8)), A, filter_fn)


def test_a_sparse_layer_counts_as_asked_for_by_default() -> None:
    site = Site("fc", "sparse", 64, names=("fc",), obstacle="sparse already")
    choose(nn.Linear(2, 2), [site], A)
    assert site.requested


def test_poolers_do_not_count_as_the_head() -> None:
    model = mlp(a=(64, 32), pooler=(32, 32), out=(32, 10))
    sites = discover(model)
    assert set(default_exceptions(model, sites)) == {"pooler", "out"}
