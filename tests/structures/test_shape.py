from padst_compiler.structures import Shape


def test_a_shape_counts_and_prints() -> None:
    assert (Shape(4, 6).numel, Shape(4, 6).perimeter, str(Shape(4, 6))) == (24, 10, "4x6")


def test_the_kernel_counts_in_the_perimeter_only() -> None:
    conv = Shape(64, 32 * 9, kernel=(3, 3))
    assert conv.perimeter == 64 + 32 + 3 + 3
    assert conv == Shape(64, 288) and hash(conv) == hash(Shape(64, 288))
    assert repr(conv) == repr(Shape(64, 288))
