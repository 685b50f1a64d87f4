from pathlib import Path

import pytest

from padst_compiler.bench_plots import layers_picture, models_picture

LAYER = {"layer": "768-3072", "threads": "1", "weights": "hot"}
MODEL = {"model": "vit_b16", "structure": "block:32", "batch": "1", "threads": "1"}


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_layers_have_a_panel_a_structure_and_a_line_a_number_of_tokens(
    tmp_path: Path, ending: str
) -> None:
    rows = [
        {**LAYER, "structure": kind, "tokens": tokens, "asked": asked, "x best dense": ratio}
        for kind in ("block:16", "nm:16", "fan_in", "diagonal", "block:64")
        for tokens in ("1", "197")
        for asked, ratio in (("0.90", "4.00"), ("0.50", "0.80"))
    ]
    path = layers_picture(rows, tmp_path / f"rows.{ending}")
    assert path.stat().st_size > 10_000
    if ending == "svg":
        text = path.read_text("utf-8")
        for word in ("block:16", "fan_in", "197 tokens", "times the best dense peer"):
            assert f"<!-- {word} -->" in text
        assert "hot" not in text  # the same everywhere


def test_models_have_a_bar_a_contestant_and_none_for_who_is_missing(tmp_path: Path) -> None:
    speeds = {"eager": "1.8", "Inductor": "2", "onnxruntime": "-", "padst": "8"}
    row = {**MODEL, **speeds, "mode": "inference", "unit": "images/s"}
    other = {**row, "batch": "8", "onnxruntime": "2.5"}
    text = models_picture([row, other], tmp_path / "rows.svg").read_text("utf-8")
    assert text.count("<!-- 8 -->") == 2 and text.count("<!-- 2.5 -->") >= 1
    assert "<!-- onnxruntime -->" in text and "<!-- batch 8, 1 threads -->" in text
