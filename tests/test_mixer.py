import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from padst_compiler.mixer import Images, Mixer, digits, load_images


def write(path: Path, count: int = 30, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x_train": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
        "y_train": rng.integers(0, 10, count, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (7, 28, 28), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 7, dtype=np.uint8),
    }
    arrays |= changes
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
    return path


# -- data ------------------------------------------------------------------------------------------


def test_digits_are_what_the_docstring_says() -> None:
    images, again = digits(), digits()
    assert isinstance(images, Images) and (images.name, images.side) == ("digits", 8)
    assert images.train_x.shape == (1437, 8, 8) and images.test_x.shape == (360, 8, 8)
    assert images.train_y.shape == (1437,) and images.test_y.shape == (360,)
    for x, y in ((images.train_x, images.train_y), (images.test_x, images.test_y)):
        assert x.dtype is torch.float32 and y.dtype is torch.int64
        assert float(x.min()) == 0.0 and float(x.max()) == 1.0
        assert set(y.tolist()) == set(range(10))
    assert torch.equal(images.train_x, again.train_x)


def test_the_split_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    digits()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"^Expected scikit-learn .*\[demo\].*--data"):
        digits()


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_file_of_images(given: str, tmp_path: Path) -> None:
    path = write(tmp_path / "fashion.npz")
    images = load_images(path if given == "file" else tmp_path)
    assert (images.name, images.side) == ("fashion", 28)
    assert images.train_x.shape == (30, 28, 28) and images.test_x.shape == (7, 28, 28)
    with np.load(path) as arrays:
        torch.testing.assert_close(images.train_x * 255, torch.tensor(arrays["x_train"]).float())
        assert images.test_y.tolist() == arrays["y_test"].tolist()
    assert images.train_x.dtype is torch.float32 and images.train_y.dtype is torch.int64
    assert float(images.train_x.min()) >= 0.0 and float(images.train_x.max()) <= 1.0


def test_the_limit_cuts_the_training_images_only(tmp_path: Path) -> None:
    images = load_images(write(tmp_path / "images.npz"), limit=5)
    assert len(images.train_x) == len(images.train_y) == 5 and len(images.test_x) == 7


@pytest.mark.parametrize("bad", ["missing", "no array", "one array", "bytes", "empty", "folder"])
def test_another_file_is_refused(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    if bad == "no array":
        write(path, y_test=None)
    elif bad == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif bad == "bytes":
        path.write_bytes(b"no archive" * 50)
    elif bad == "empty":
        path.write_bytes(b"")
    elif bad == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=r"^Expected an \.npz file.* Pass --data") as error:
        load_images(path)
    assert str(path) in str(error.value)


def test_an_archive_cut_short_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "images.npz")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"^Expected an \.npz file"):
        load_images(path)


# -- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "patch"), [(8, 2), (8, 4), (28, 7)])
def test_one_number_per_class(side: int, patch: int) -> None:
    model = Mixer(side, patch, width=16, depth=1, classes=7)
    y = model(torch.randn(3, side, side))
    assert y.shape == (3, 7)
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_patches_are_squares_of_neighbouring_pixels() -> None:
    model = Mixer(side=4, patch=2, width=4, depth=0)
    seen: list[torch.Tensor] = []
    model.embed.register_forward_hook(lambda _m, x, _y: seen.append(x[0]))
    model(torch.arange(16.0).view(1, 4, 4))
    assert seen[0].tolist() == [
        [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
    ]


def test_images_do_not_mix_with_each_other() -> None:
    model, x = Mixer(side=8, patch=2, width=16), torch.randn(4, 8, 8)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_the_linear_layers_and_their_widths() -> None:
    model = Mixer(side=8, patch=2, width=32, depth=2)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n.endswith("fc1.weight")}
    assert shapes == {
        "blocks.0.tokens.fc1.weight": (32, 16),
        "blocks.0.channels.fc1.weight": (128, 32),
        "blocks.1.tokens.fc1.weight": (32, 16),
        "blocks.1.channels.fc1.weight": (128, 32),
    }
