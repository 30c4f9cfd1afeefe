"""Typed errors name what is wrong, what was given, and what to do."""

from __future__ import annotations

import pytest

from redif_env.errors import (
    InvalidArgumentError,
    MissingExtraError,
    check_choice,
    check_number,
    plain_errors,
    require,
)


def test_the_message_names_argument_value_and_remedy():
    error = InvalidArgumentError("eta", -1, "pass more.")
    assert str(error) == "eta=-1: pass more."
    assert isinstance(error, ValueError)


def test_long_values_are_cut():
    assert len(str(InvalidArgumentError("x", "y" * 1000, "shorten it."))) < 230


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1, "a", "0.5", b"0.5", None])
def test_numbers_outside_the_interval_are_refused(value):
    with pytest.raises(InvalidArgumentError, match="eta"):
        check_number("eta", value, 0, 1)


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(InvalidArgumentError, match="'a', 'b'"):
        check_choice("kind", "c", ("a", "b"))


def test_command_lines_end_with_the_message_alone(capsys):
    with pytest.raises(SystemExit) as caught, plain_errors():
        raise InvalidArgumentError("eta", -1, "pass more.")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: eta=-1: pass more.\n"
    with pytest.raises(ZeroDivisionError), plain_errors():  # a bug keeps its traceback
        1 / 0  # noqa: B018


def test_a_missing_extra_says_how_to_install_it():
    with pytest.raises(MissingExtraError, match=r"pip install redif\[examples\]") as caught:
        require("no_such_package_anywhere", "examples")
    assert "pip install -e '.[examples]'" in str(caught.value)  # no index is needed


def test_a_present_package_is_imported():
    assert require("json", "examples").loads("[1]") == [1]
