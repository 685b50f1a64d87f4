"""Text forms: what is meant, and what is refused with a cure."""

import pytest
import torch

from padst_compiler.relaxations.spelling import FULL_LIMIT, is_learned, make, parse, read_back


@pytest.mark.parametrize(
    ("text", "name", "option"),
    [
        ("sinkhorn", "sinkhorn", None),
        ("gumbel", "gumbel", None),
        ("autoshuffle", "autoshuffle", None),
        ("low_rank", "low_rank", None),
        ("low_rank:16", "low_rank", 16),
        ("clos", "clos", None),
        ("clos:2", "clos", 2),
        ("blockwise:64", "blockwise", 64),
    ],
)
def test_forms_are_read(text: str, name: str, option: int | None) -> None:
    kind, number = parse(text)
    assert kind is not None and (kind.name, number) == (name, option) and is_learned(text)


def test_none_random_and_learned_have_no_kind() -> None:
    assert [parse(text) for text in ("none", "random", "learned")] == [(None, None)] * 3
    assert [is_learned(text) for text in ("none", "random", "learned")] == [False, False, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sinkhron", "Did you mean 'sinkhorn'"),
        ("", "Expected permutation none, random, magnitude, learned"),
        (None, "Expected permutation none, random, magnitude, learned"),
        ("low_rank:", "low_rank:rank, a whole number of at least 1. Got 'low_rank:'"),
        ("low_rank:0", "low_rank:rank"),
        ("low_rank:x", "low_rank:rank"),
        ("clos:-3", "clos:factors"),
        ("sinkhorn:3", "Expected permutation sinkhorn alone"),
        ("random:3", "Expected permutation random alone"),
        ("learned:16", "Expected permutation learned alone"),
    ],
)
def test_other_texts_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text)


def test_learned_has_full_logits_up_to_a_limit_and_low_rank_above() -> None:
    generator = torch.Generator().manual_seed(0)
    assert make("learned", 64, generator).name == "sinkhorn"
    wide = make("learned", FULL_LIMIT + 1, generator)
    assert (wide.name, wide.settings()["rank"]) == ("low_rank", 16)
    assert make("low_rank:7", 64, generator).settings()["rank"] == 7


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("sinkhron", {}, "Did you mean 'sinkhorn'"),
        ("sinkhorn", {"iterations": 0}, "Expected settings above 0"),
        ("blockwise", {"block": 5}, "Expected a block that divides 16"),
        ("clos", {"factors": 7}, "Expected clos:2 or clos:3"),
    ],
)
def test_a_file_with_another_form_or_settings_is_refused(
    name: str, settings: dict[str, float], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        read_back(name, 16, settings)
    with pytest.raises(TypeError):
        read_back("low_rank", 16, {"colour": 3})
