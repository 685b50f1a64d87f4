import io
import logging

import pytest

from padst_compiler.progress import counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_is_written_over_and_cleared() -> None:
    stream = Terminal()
    with counted("timing", 4, stream) as step:
        for name in "abcd":
            step(name)
    lines = stream.getvalue().split("\r\x1b[2K")
    assert lines[0] == lines[-1] == ""
    assert lines[1] == "padst: timing [....................] 0/4 a"
    assert lines[4] == "padst: timing [###############.....] 3/4 d"
    assert "\n" not in stream.getvalue()


def test_an_error_clears_the_line_too() -> None:
    stream = Terminal()
    with pytest.raises(KeyError), counted("timing", 1, stream) as step:
        step("a")
        raise KeyError
    assert stream.getvalue().endswith("\r\x1b[2K")


def test_anything_else_gets_nothing_and_the_log_all(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    with caplog.at_level(logging.DEBUG, "padst_compiler"), counted("timing", 2, stream) as step:
        step("a")
        step("b")
    assert stream.getvalue() == ""
    assert caplog.messages == ["timing", "0/2 a", "1/2 b"]
