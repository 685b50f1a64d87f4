from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from padst_compiler.demo import run


@pytest.mark.slow
def test_the_demo_trains_compiles_exports_and_draws(tmp_path: Path) -> None:
    table = run(None, tmp_path, seeds=1, epochs=1)
    for variant in ("dense", "block", "block + permutation"):
        assert f"\n{variant} " in table
    assert (tmp_path / "demo.png").stat().st_size > 20_000
    assert len(list(tmp_path.glob("*.onnx"))) == 3


def test_data_that_is_not_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, a=np.zeros(3))
    with pytest.raises(ValueError, match="x_train"):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
