"""Settings files: strict, and every error names file, line and key."""

import msgspec
import pytest

from protocol.settings import MAX_SETTINGS, BadSettings, decode_settings


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    port: int = 1
    name: str = ""


class Outer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    title: str = ""


BAD = {
    "an unknown key in a table": (
        "[inner]\nport = 2\nprt = 3\n",
        3,
        "unknown key 'inner.prt'; known here: port, name",
    ),
    "an unknown table": (
        "title = 'x'\n\n[iner]\nport = 1\n",
        3,
        "unknown key 'iner'; known here: inner, many, title",
    ),
    "a wrong type": ("[inner]\nport = 'x'\n", 2, "inner.port: Expected `int`, got `str`"),
    "a wrong type in a list of tables": ("[[many]]\nport = 1\n[[many]]\nname = 7\n", 4, "many.name: Expected `str`"),
    "not TOML": ("title = \n", 1, "not TOML"),
    "the same key in another table is not blamed": (
        "[inner]\nname = 'x'\n[[many]]\nnme = 'y'\n",
        4,
        "unknown key 'many.nme'",
    ),
}


@pytest.mark.parametrize(("text", "line", "message"), BAD.values(), ids=BAD.keys())
def test_a_wrong_file_is_refused_with_line_and_key(text: str, line: int, message: str) -> None:
    with pytest.raises(BadSettings) as refused:
        decode_settings(text, Outer, "x.toml")
    assert line == refused.value.line
    assert str(refused.value).startswith(f"x.toml:{line}: {message}")


def test_a_right_file_is_decoded() -> None:
    settings = decode_settings("title = 'a'\n[inner]\nport = 9\n[[many]]\nname = 'm'\n", Outer, "x.toml")
    assert Outer(title="a", inner=Inner(port=9), many=(Inner(name="m"),)) == settings


def test_a_file_over_the_cap_is_refused() -> None:
    with pytest.raises(BadSettings, match="larger than"):
        decode_settings("#" * (MAX_SETTINGS + 1), Outer, "x.toml")
