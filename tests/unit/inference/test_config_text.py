"""A configuration in text and in JSON: what is kept of it, what is named in the warning, and what is refused."""

import pytest
import structlog
from google.protobuf import text_format

from penstock.inference.config_text import parse_config, parse_config_json
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import WrongStateError


@pytest.mark.parametrize(
    ("text", "kept", "named"),
    [
        ("max_batch_size: 8", "max_batch_size: 8", []),
        ("max_batch_size: 8\nnope: 5\nname: 'x'", "max_batch_size: 8 name: 'x'", ["nope (line 2)"]),
        ("nope: -5 name: 'x'", "name: 'x'", ["nope (line 1)"]),
        ("nope: - 5 name: 'x'", "name: 'x'", ["nope (line 1)"]),
        ("nope: 5, name: 'x'; gone: 1; ", "name: 'x'", ["nope (line 1)", "gone (line 1)"]),
        ("nope: 'a' \"b\" # c\n  'd'\nname: 'x'", "name: 'x'", ["nope (line 1)"]),
        ("nope {\n a: 1 b { c: '}' } # }\n}\nname: 'x'", "name: 'x'", ["nope (line 1)"]),
        ("nope: < a: [1, {b: 2}] > name: 'x'", "name: 'x'", ["nope (line 1)"]),
        ("\n\nnope: [1, 2, 3] name: 'x'", "name: 'x'", ["nope (line 3)"]),
        ("nope: [] name: 'x'", "name: 'x'", ["nope (line 1)"]),
        ("name: 'nope' # nope\nnope: 3\nnope: 4 # nope", "name: 'nope'", ["nope (line 2)", "nope (line 3)"]),
        ("input { name: 'x' nope: 3 dims: [1] }", "input { name: 'x' dims: [1] }", ["nope (line 1)"]),
        ("input { name: 'x'\n nope { dims: 2 }, dims: [1] }", "input { name: 'x' dims: [1] }", ["nope (line 2)"]),
        ("\x0b\x0cname: 'x'\r\n\tnope: 5\r\nmax_batch_size: 2", "name: 'x' max_batch_size: 2", ["nope (line 2)"]),
        ("name: '\u2028' nope: 1\nnope: 2", "name: '\u2028'", ["nope (line 1)", "nope (line 2)"]),
        ("nope " + "{ a " * 5000 + "{" + "}" * 5001 + "name: 'x'", "name: 'x'", ["nope (line 1)"]),
    ],
)
def test_unknown_fields_are_named_with_their_lines_and_all_others_are_kept(
    text: str, kept: str, named: list[str]
) -> None:
    with structlog.testing.capture_logs() as logs:
        config = parse_config(text, "the file")
    assert config == text_format.Parse(kept, ModelConfig())
    assert [(log["file"], log["fields"]) for log in logs] == ([("the file", named)] if named else [])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("max_batch_size: 8\n}", "2:1"),
        ("name: 'x'\nmax_batch_size: 'a'", "2:17"),
        ("input { data_type: TYPE_NOPE }", "1:20"),
        ("name: 'a", "1:7"),
        ("name: 'x' nope", "1:11"),
        ("nope:", "1:1"),
        ("nope: ,", "1:1"),
        ("nope: : 5", "1:1"),
        ("nope: 'abc\nname: 'x'", "1:1"),
        ("nope { a: 1 ] name: 'x'", "1:1"),
        ("nope: {\nname: 'x'", "1:1"),
        ("nope {" * 100_000, "1:1"),
        ("name: 'has no field named \"name\".' }", "1:36"),
        ("\n".join(["nope: 1"] * 101), "101:1"),
    ],
)
def test_what_is_no_configuration_is_refused_with_its_place(text: str, place: str) -> None:
    with pytest.raises(WrongStateError, match=f"^the file is no model configuration: {place} : "):
        parse_config(text, "the file")


def test_a_text_without_end_is_not_looked_at() -> None:
    with pytest.raises(WrongStateError, match="1048576 characters at most"):
        parse_config("#" * 2**20 + "\n", "the file")
    with pytest.raises(WrongStateError, match="1048576 characters at most"):
        parse_config_json("{" + " " * 2**20 + "}", "it")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("{}", ""),
        ('\n{"maxBatchSize": 3}', "max_batch_size: 3"),
        ('{"max_batch_size": 3}', "max_batch_size: 3"),
        ('{"nope": [{"a": 1}], "maxBatchSize": 3, "input": [{"name": "x", "gone": 1}]}', "*some"),
        ('{"nope": ' + '{"a":' * 100 + "1" + "}" * 101, "*nothing"),
    ],
)
def test_json_says_the_same_and_what_is_unknown_is_warned_of(text: str, kept: str) -> None:
    known = {"*some": "max_batch_size: 3 input { name: 'x' }", "*nothing": ""}
    with structlog.testing.capture_logs() as logs:
        assert parse_config_json(text, "it") == text_format.Parse(known.get(kept, kept), ModelConfig())
    assert ["nope" in log["error"] for log in logs] == [True] * kept.startswith("*")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        '"name"',
        "{",
        '{"maxBatchSize": "many"}',
        '{"maxBatchSize": 1, "maxBatchSize": 2}',
        '{"maxBatchSize": ' + "9" * 5000 + "}",
        '{"nope": ' * 100_000,
        '{"nope": ' * 100_000 + "1" + "}" * 100_000,
        '{"nope": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
    ids=lambda text: text[:20],
)
def test_json_that_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(WrongStateError, match=r"^it is no model configuration: "):
        parse_config_json(text, "it")
