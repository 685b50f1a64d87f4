import pytest
import torch
from torch import nn

from padst_compiler.tensors import is_plain, storage_key, tensors_in, written_by

aten = torch.ops.aten


def test_the_same_numbers_have_one_key() -> None:
    base = torch.arange(12.0).view(3, 4)
    assert storage_key(base) == storage_key(base.t()) == storage_key(nn.Parameter(base))
    assert storage_key(base) != storage_key(base[1:]) != storage_key(base.clone())


@pytest.mark.filterwarnings("ignore")  # nested tensors announce changes
def test_tensors_without_plain_storage_are_only_themselves() -> None:
    sparse = torch.eye(3).to_sparse()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert not is_plain(sparse) and not is_plain(nested)
    assert storage_key(sparse) == storage_key(sparse) != storage_key(nested)
    assert is_plain(torch.ones(2, device="meta"))


def test_tensors_are_found_in_nested_containers() -> None:
    a, b = torch.ones(1), torch.ones(2)
    assert [t.numel() for t in tensors_in({"x": [a, 3], "y": (b, None, "text")})] == [1, 2]


def test_writes_are_read_off_the_schema() -> None:
    x, out = torch.ones(2), torch.empty(2)
    assert written_by(aten.add_.Tensor, (x, out), {})[0] is x
    assert written_by(aten.add.out, (x, x), {"out": out})[0] is out
    assert written_by(aten.add.Tensor, (x, x), {}) == []
    assert written_by(aten.view.default, (x, [2]), {}) == []
