import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serving.grammar import MAX_TEXT, Grammar, GrammarError, Grammars

Draw = Callable[[Grammar, int], list[int]]


def tokens_of(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether an answer may be this text and end there."""
    constraint = grammar.constraint()
    for token in tokenizer.encode(text, allow_special=False):
        if token not in tokens_of(constraint.mask()):
            return False
        constraint.accept(token)
    return tokenizer.control_ids["<|end|>"] in tokens_of(constraint.mask())


def object_of(required: bool = True, **properties: Any) -> dict[str, Any]:
    closed = {"type": "object", "properties": properties, "additionalProperties": False}
    return closed | {"required": list(properties)} if required else closed


SCHEMAS = {
    "anything": {},
    "string": {"type": "string"},
    "short": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[a-zé]+-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "integer": {"type": "integer", "minimum": -3, "maximum": 40},
    "number": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    "enum": {"enum": ["red", "grün", "蓝 😀", 3, None, True, ["a"], {"b": 1}]},
    "const": {"const": {"a": [1, 'quoted "text" \\ \n', 2.5]}},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"type": "integer"}], "items": False, "minItems": 2},
    "nested": object_of(a=object_of(b=object_of(c={"type": "array", "items": object_of(d={"type": "null"})}))),
    "optional": object_of(False, a={"type": "integer"}, b={"type": "string"}, c={"type": "boolean"}),
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "open": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
    "any of": {"anyOf": [{"type": "integer"}, object_of(x={"type": "string"})]},
    "one of": {
        "oneOf": [object_of(kind={"const": k}, value={"type": t}) for k, t in (("a", "null"), ("b", "boolean"))]
    },
    "all of": {"allOf": [{"type": "object", "properties": {"a": {"type": "null"}}}, {"required": ["a"]}]},
    "types": {"type": ["string", "null"]},
    "multiples": object_of(a={"type": "number", "multipleOf": 0.25, "minimum": 0}, b={"multipleOf": 12}),
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {"node": object_of(False, value={"type": "integer"}, next={"$ref": "#/$defs/node"})},
    },
    "control tokens": object_of(**{"<|end|>": {"const": "<|tool_call|>"}}),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_is_valid(name: str, grammars: Grammars, draw: Draw, tokenizer: Tokenizer) -> None:
    grammar = grammars.json_schema(SCHEMAS[name])
    validator = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    controls = set(tokenizer.control_ids.values())
    for seed in range(25):
        drawn = draw(grammar, seed)
        assert controls.isdisjoint(drawn)
        validator.validate(json.loads(tokenizer.decode(drawn)))


def test_any_object(grammars: Grammars, draw: Draw, tokenizer: Tokenizer) -> None:
    grammar = grammars.json_object()
    objects = [json.loads(tokenizer.decode(draw(grammar, seed))) for seed in range(40)]
    assert all(isinstance(value, dict) for value in objects)
    assert any(objects)


def test_answers_that_a_schema_has_room_for(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.json_schema(object_of(a={"type": "string"}, b={"type": "array", "items": {"type": "integer"}}))
    value = {"a": 'é蓝😀 "\\ \n\t<|end|>', "b": [1, -20]}
    for indent in (None, 1, 2, 4, "\t"):
        assert accepts(grammar, tokenizer, json.dumps(value, ensure_ascii=False, indent=indent))
    assert accepts(grammar, tokenizer, json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    assert not accepts(grammar, tokenizer, json.dumps({"a": "x"}))
    assert not accepts(grammar, tokenizer, json.dumps({"a": "x", "b": ["1"]}))
    assert not accepts(grammar, tokenizer, json.dumps({"a": "x", "b": [], "c": 1}))


def test_white_space_comes_to_an_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    blank = {i for i in range(1024) if (text := tokenizer.token_bytes(i)) and not text.strip()}
    for start in ("{", '{"a"', '{"a":', '{"a":[', '{"a":[1', '{"a":[1,', '{"a":[1]'):
        constraint = grammars.json_object().constraint()
        for token in tokenizer.encode(start, allow_special=False):
            constraint.accept(token)
        length = 0
        while choice := blank & set(tokens_of(constraint.mask())):
            token = min(choice, key=lambda i: (tokenizer.token_bytes(i) == b" ", i))  # a line break first
            constraint.accept(token)
            length += len(tokenizer.token_bytes(token))
        assert 1 <= length <= 33, start


def test_white_space_as_the_schema_says(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.json_schema({"type": "object", "x-guidance": {"whitespace_flexible": False}})
    assert accepts(grammar, tokenizer, '{"a":[1,2]}')
    assert not accepts(grammar, tokenizer, '{"a": [1,2]}')


REGEXES = {
    "date": r"[0-9]{4}-[01][0-9]-[0-3][0-9]",
    "choice": "yes|no|vielleicht|はい",
    "slashes": r"/a//b\/[/]{2}",
    "lines": "a\nb\r\n\tc\\\nd",
    "control tokens": r"<\|end\|><\|tool_call\|>",
    "quotes": "\"'`%#{2}[\\\\]",
    "letters": r"(?i)[a-e]{3,9}\.?",
    "anything": r"(?s).{1,30}",
}


@pytest.mark.parametrize("name", REGEXES)
def test_text_matches_the_regex(name: str, grammars: Grammars, draw: Draw, tokenizer: Tokenizer) -> None:
    grammar = grammars.regex(REGEXES[name])
    for seed in range(25):
        drawn = draw(grammar, seed)
        assert set(tokenizer.control_ids.values()).isdisjoint(drawn)
        assert re.fullmatch(REGEXES[name], tokenizer.decode(drawn))


def test_empty_regex(grammars: Grammars, draw: Draw) -> None:
    assert draw(grammars.regex(""), 0) == []


def test_lark(grammars: Grammars, draw: Draw, tokenizer: Tokenizer) -> None:
    grammar = grammars.lark(
        """
        start: sum
        sum: term ("+" term){1,3}
        term: NUMBER | "(" sum ")" | @names
        NUMBER: /[1-9][0-9]?/
        """,
        {"names": {"enum": ["x", "y"]}},
    )
    seen = ""
    for seed in range(40):
        text = tokenizer.decode(draw(grammar, seed))
        seen += text
        eval(text.replace('"x"', "1").replace('"y"', "2"), {"__builtins__": {}})
        assert "+" in text
    assert {"(", '"x"', '"y"'} <= set(re.findall(r'\(|"[xy]"', seen))


def test_inline_schemas(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.lark(
        r"""
        start: "%json {" /%json \{[}]"/ value  // %json {
        value: %json {"type": "array", "items": {"enum": ["}", 1]}} ";"  # "
        """
    )
    assert accepts(grammar, tokenizer, '%json {%json {}"["}", 1,\n    "}"];')
    assert not accepts(grammar, tokenizer, '%json {%json {}"["}", 2];')
    assert not accepts(grammar, tokenizer, '%json {%json {}"["}",  1];')  # bounded, as elsewhere


def test_control_tokens_only_where_lark_names_them(grammars: Grammars, tokenizer: Tokenizer, eos: list[int]) -> None:
    ids = tokenizer.control_ids
    named = grammars.lark('start: <|tool_call|> "a"').constraint()
    assert tokens_of(named.mask()) == [ids["<|tool_call|>"]]
    spelled = grammars.lark('start: "<|tool_call|>"').constraint()
    assert tokens_of(spelled.mask()) == tokenizer.encode("<", allow_special=False)
    # These match any bytes, or any id.
    for text in ("start: ~/a/", "start: A\nA: ~/<.*/ & ~/b/", "start: <[*]>"):
        allowed = set(tokens_of(grammars.lark(text).constraint().mask()))
        assert not (set(ids.values()) - set(eos)) & allowed
        assert all(tokenizer.token_bytes(i, skip_special=False) for i in allowed)
        assert len(allowed) > 500


def test_mask_has_the_width_of_the_model(tokenizer: Tokenizer, eos: list[int]) -> None:
    for vocab_size in (990, 1024, 1025, 1100):
        constraint = Grammars(tokenizer, vocab_size, eos).regex("(?s).*").constraint()
        assert constraint.mask().shape == (-(-vocab_size // 32),)
        assert max(tokens_of(constraint.mask())) == max(eos)


def test_complete(grammars: Grammars, tokenizer: Tokenizer, eos: list[int]) -> None:
    (a,) = tokenizer.encode("a", allow_special=False)
    for end in eos:
        constraint = grammars.regex("a").constraint()
        assert not set(eos) & set(tokens_of(constraint.mask()))
        constraint.accept(a)
        assert tokens_of(constraint.mask()) == sorted(eos)
        constraint.accept(end)
        assert tokens_of(constraint.mask()) == sorted(eos)


def test_constraints_are_independent_and_masks_stay(grammars: Grammars, tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a", allow_special=False) + tokenizer.encode("b", allow_special=False)
    grammar = grammars.regex("aa|bb")
    first, second = grammar.constraint(), grammar.constraint()
    first.accept(a)
    second.accept(b)
    for _ in range(3):
        assert tokens_of(first.mask()) == [a]
        assert tokens_of(second.mask()) == [b]
    assert set(tokens_of(grammar.constraint().mask())) >= {a, b}


def test_token_that_does_not_fit(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.regex("aa").constraint()
    with pytest.raises(GrammarError, match="doesn't satisfy the grammar"):
        constraint.accept(tokenizer.encode("b", allow_special=False)[0])
    with pytest.raises(GrammarError):
        constraint.mask()


def test_a_step_that_takes_too_much_ends_the_answer(grammars: Grammars, tokenizer: Tokenizer) -> None:
    rules = "\n".join(f"A{i}: A{i + 1} /y*/" for i in range(800))
    constraint = grammars.lark(f'start: A0\n{rules}\nA800: "x"').constraint()
    constraint.accept(tokenizer.encode("x", allow_special=False)[0])
    with pytest.raises(GrammarError, match="too many"):
        constraint.mask()


UNSUPPORTED = {
    "not": {},
    "if": {"type": "string"},
    "contains": {},
    "uniqueItems": True,
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {}},
    "propertyNames": {"pattern": "^a"},
    "unevaluatedProperties": False,
    "$dynamicRef": "#a",
}


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_unsupported_keywords_are_named(keyword: str, grammars: Grammars) -> None:
    schema = object_of(a={"type": ["object", "array"], keyword: UNSUPPORTED[keyword]})
    with pytest.raises(GrammarError, match=re.escape(keyword)):
        grammars.json_schema(schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "strin"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"$ref": "#/$defs/a"}, r"\$defs/a"),
        ({"$ref": "https://example.com/schema.json"}, "example.com"),
        ({"$ref": "#"}, "nothing fits"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"properties": [1]}, "properties"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3, "type": "string"}]}, "oneOf"),
        ({"const": {1, 2}}, "as JSON"),
        ({"const": "\ud800"}, "surrogates"),
        ({"const": float("nan")}, "as JSON"),
        ({"x-guidance": 1}, "x-guidance"),
        ({"multipleOf": 0}, "multiple"),
        ({"properties": {"a": {"multipleOf": 1e-9}, "b": {"multipleOf": 3}}}, "multipleOf"),
        ("{}", "mapping"),
        (None, "mapping"),
    ],
)
def test_bad_schema(schema: Any, message: str, grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match=message) as raised:
        grammars.json_schema(schema)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 250


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "unclosed group"),
        ("a\\", "lexer error"),
        ("(?=a)", "look-ahead"),
        (r"(?-u:\xff)", "UTF-8"),
        (r"(a)\1", "backreferences"),
        ("[^\\s\\S]", "nothing fits"),
        ("\ud800", "surrogates"),
        ("a" * (MAX_TEXT + 1), str(MAX_TEXT)),
        (3, "string"),
    ],
)
def test_bad_regex(pattern: Any, message: str, grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match=message):
        grammars.regex(pattern)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rule|start"),
        ('begin: "a"', "start"),
        ('start: "a" |', None),
        ("start: b", "b"),
        ("start: @b", "b"),
        ("start: <|nothing|>", "nothing"),
        ('start: "a', "lexer error"),
        ("start: start", "nothing fits"),
        ('start: "a" x\nx[stop=""]: /.*/', None),
        ("start: %json {", "%json: "),
    ],
)
def test_bad_lark(text: str, message: str | None, grammars: Grammars) -> None:
    if message is None:
        grammars.lark(text)
        return
    with pytest.raises(GrammarError, match=message):
        grammars.lark(text)


def chain(count: int, rule: str, last: str) -> str:
    return "\n".join(["start: A0", *(rule.format(i, i + 1) for i in range(count)), f"A{count}: {last}"])


def nested(depth: int, key: str = "items") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {key: schema}
    return schema


def referring(count: int) -> dict[str, Any]:
    links = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": {"type": "string"}}}


HOSTILE = {
    "nested schema": lambda g: g.json_schema(nested(200)),
    "very deeply nested schema": lambda g: g.json_schema(nested(100_000)),
    "many references": lambda g: g.json_schema(referring(2200)),
    "too many references": lambda g: g.json_schema(referring(5000)),
    "reference to itself": lambda g: g.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "product of choices": lambda g: g.json_schema(
        {"allOf": [{"anyOf": [object_of(False, **{f"p{i}{j}": {}}) for j in range(4)]} for i in range(12)]}
    ),
    "large enum": lambda g: g.json_schema({"enum": [f"value {i}" for i in range(5000)]}),
    "multiples": lambda g: g.json_schema({"type": "integer", "multipleOf": 99999989, "maximum": 10**18}),
    "common multiples": lambda g: g.json_schema({"allOf": [{"multipleOf": n, "type": "integer"} for n in (9973, 977)]}),
    "inline multiples": lambda g: g.lark('start: "a" | %json {"type": "integer", "multiple\\u004ff": 99999989}'),
    "largest multiple": lambda g: g.json_schema({"type": "integer", "multipleOf": 99991}),
    "long array": lambda g: g.json_schema({"type": "array", "minItems": 10**9, "items": {"maxLength": 10**9}}),
    "repeated regex": lambda g: g.regex("(a{1000}){1000}"),
    "choice of repetitions": lambda g: g.regex("((a?){100}){100}((a?){100}){100}"),
    "exponential regex": lambda g: g.regex("[ab]*a[ab]{25}c"),
    "nested regex": lambda g: g.regex("(" * 8000 + "a" + ")" * 8000),
    "doubling rules": lambda g: g.lark(chain(60, "A{0}: A{1} A{1}", '"x"').replace("A", "a")),
    "doubling terminals": lambda g: g.lark(chain(60, "A{0}: A{1} A{1}", '"x"')),
    "chain of rules": lambda g: g.lark(chain(1100, "A{0}: A{1}", '"x"').replace("A", "a")),
    "chain of terminals": lambda g: g.lark(chain(900, 'A{0}: (A{1} "z")*', '"x"')),
    "ambiguity": lambda g: g.lark('start: s\ns: s s | s s s | "a" |'),
    "nested groups": lambda g: g.lark("start: " + "(" * 8000 + '"a"' + ")" * 8000),
    "negation": lambda g: g.lark("start: A\nA: /[ab]*a[ab]{18}/ & /[ab]*b[ab]{17}/ & ~/.*aa.*/"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_bounded(
    name: str, grammars: Grammars, tokenizer: Tokenizer, eos: list[int]
) -> None:
    generator = np.random.default_rng(0)
    begin = time.process_time()
    try:
        constraint = HOSTILE[name](grammars).constraint()
        for _ in range(40):
            token = int(generator.choice(tokens_of(constraint.mask())))
            constraint.accept(token)
            if token in eos:
                break
    except GrammarError as error:
        assert 0 < len(str(error)) < 250
    assert time.process_time() - begin < 5


def test_the_next_grammar_after_a_bad_one(grammars: Grammars, draw: Draw) -> None:
    with pytest.raises(GrammarError):
        grammars.json_schema(referring(5000))
    assert draw(grammars.regex(""), 0) == []


def test_released_vocabulary(released_tokenizer_directory: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(released_tokenizer_directory)
    eos = [200020, 199999]
    grammars = Grammars(tokenizer, 200064, eos)
    constraint = grammars.json_schema(object_of(answer={"enum": ["Paris", "Rome"]})).constraint()
    for token in tokenizer.encode('{"answer": "Paris"}', allow_special=False):
        assert token in tokens_of(constraint.mask())
        constraint.accept(token)
    assert tokens_of(constraint.mask()) == sorted(eos)


def test_of_a_long_forced_text_only_the_beginning_is_encoded(grammars, tokenizer, eos, monkeypatch):
    text, lengths = "What is 21 plus 84 " * 100, []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda t, **options: lengths.append(len(t)) or encode(t, **options))
    constraint, drawn = grammars.regex(text).constraint(), []
    while True:
        allowed = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little"))
        constraint.accept(int(allowed[0]))
        if allowed[0] in eos:
            break
        assert len(allowed) == 1
        drawn.append(int(allowed[0]))
    assert drawn == encode(text, allow_special=False)
    assert max(lengths) <= 512
