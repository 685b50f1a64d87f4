import pytest
import torch
from torch.nn import functional as F

from padst_compiler.bench_models import MODELS, Size, make, size_of

VIT = Size(text=False, depth=2, width=32, heads=2, side=32, outputs=7)
GPT = Size(text=True, depth=2, width=32, heads=2, side=9, outputs=11)


@pytest.mark.parametrize("size", [VIT, GPT], ids=["vit", "gpt"])
def test_a_model_is_seeded_and_trains(size: Size) -> None:
    model, x, classes = make(size, batch=3)
    again, y, _ = make(size, batch=3)
    assert torch.equal(x, y) and torch.equal(model(x), again(y))
    assert model(x).shape == (3, size.outputs) and classes.shape == (3,)
    F.cross_entropy(model(x), classes).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_text_is_read_in_one_direction_and_images_in_all() -> None:
    model, x, _ = make(GPT, batch=1)
    seen: list[torch.Tensor] = []
    model.get_submodule("norm").register_forward_hook(lambda m, a, y: seen.append(y))
    other = x.clone()
    other[0, -1] = (other[0, -1] + 1) % GPT.outputs
    model(x), model(other)
    assert torch.equal(seen[0][:, :-1], seen[1][:, :-1])
    assert not torch.equal(seen[0][:, -1], seen[1][:, -1])
    model, x, _ = make(VIT, batch=1)
    changed = x.clone()
    changed[..., -1] += 1
    assert not torch.equal(model(x), model(changed))


def test_the_sizes_are_those_of_the_papers() -> None:
    count = {}
    for name in MODELS:
        size = size_of(name)
        assert size == MODELS[name] and size.items == (128 if size.text else 1)
        count[name] = sum(p.numel() for p in make(size, batch=1)[0].parameters())
    assert count["vit_b16"] == 86_567_656
    # A head of its own, and 128 of its 1024 positions.
    assert count["gpt2"] == 124_439_808 + 50257 * 768 - 896 * 768
    assert size_of("gpt2:3").depth == 3 and size_of("gpt2:3").width == 768


@pytest.mark.parametrize("name", ["resnet", "gpt2:-1", "gpt2:x", ""])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"Expected vit_b16 or gpt2, or .*\. Got "):
        size_of(name)
