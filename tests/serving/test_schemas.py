"""What references of a JSON schema lead to, and how a schema is moved under another."""

import json

import pytest

from gdnjax.serving import schemas
from gdnjax.serving.schemas import check_references, moved

ROUND = {"$ref": "#"}
STRING = {"type": "string"}

ENDLESS = [
    (ROUND, "#"),
    ({"allOf": [ROUND]}, "#"),
    ({"anyOf": [ROUND, ROUND]}, "#"),
    ({"type": "object", "properties": {"a": ROUND}, "required": ["a"]}, "#"),
    ({"type": "array", "items": ROUND, "minItems": 1}, "#"),
    ({"type": "array", "prefixItems": [STRING, ROUND], "minItems": 2}, "#"),
    # Where it need not be: a text that begins with it would still not end.
    ({"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}, "#/properties/a"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "#/$defs/a"),
    ({"$defs": {"a/b~": {"$ref": "#/$defs/a~1b~0"}}}, "#/$defs/a~1b~0"),
]

ENDING = [
    {},
    {"type": "object", "properties": {"next": ROUND}},
    {"type": "object", "properties": {"next": {"anyOf": [ROUND, {"type": "null"}]}}, "required": ["next"]},
    {"type": "array", "items": ROUND},
    {"type": "array", "prefixItems": [STRING, ROUND], "minItems": 1},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": STRING}, "$ref": "#/$defs/a"},
    # Other types than an object fit it, too.
    {"properties": {"a": ROUND}, "required": ["a"]},
    # No references at all, or of another top.
    {"const": ROUND},
    {"enum": [ROUND]},
    {"properties": {"$ref": STRING}},
    {"$ref": "#anchor"},
    {"$ref": "#/nowhere"},
    {"$defs": {"a": {"$id": "http://a.example/", "$defs": {"b": {"$ref": "#/$defs/b"}}}}},
]


@pytest.mark.parametrize(("schema", "place"), ENDLESS, ids=str)
def test_references_that_never_end_are_named(schema, place):
    with pytest.raises(ValueError, match="leads back to itself") as caught:
        check_references(json.dumps(schema))
    assert repr(place) in str(caught.value)


@pytest.mark.parametrize("schema", ENDING, ids=str)
def test_references_that_may_end_are_let_through(schema):
    check_references(json.dumps(schema))


def test_many_references_are_looked_at_no_more_than_in_proportion(monkeypatch):
    """Looked through anew for each that is found to end, 3000 of them would take half a minute."""
    count, looks, ends = 300, 0, schemas._ends

    def counted(*arguments):
        nonlocal looks
        looks += 1
        return ends(*arguments)

    monkeypatch.setattr(schemas, "_ends", counted)
    chain = {f"d{i}": {"type": "array", "minItems": 1, "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
    for names in (list(chain), list(reversed(chain))):
        looks = 0
        check_references(json.dumps({"$defs": {name: chain[name] for name in names} | {f"d{count}": {}}}))
        # Each once, once more for the one that it refers to, and what it holds each time.
        assert count < looks <= 4 * count


def test_moved_schemas_refer_to_where_they_stand():
    schema = {
        "$defs": {"a": STRING},
        "properties": {"b": {"$ref": "#/$defs/a"}, "const": ROUND, "$ref": STRING},
        "anyOf": [ROUND],
        "const": ROUND,
        "enum": [{"$ref": "#/$defs/a"}],
    }
    assert moved(schema, "#/$defs/tool0") == {
        **schema,
        "properties": {"b": {"$ref": "#/$defs/tool0/$defs/a"}, "const": {"$ref": "#/$defs/tool0"}, "$ref": STRING},
        "anyOf": [{"$ref": "#/$defs/tool0"}],
    }


@pytest.mark.parametrize("schema", [{"$ref": "#anchor"}, {"$id": "http://a.example/", "items": ROUND}], ids=str)
def test_references_of_another_top_stay(schema):
    assert moved(schema, "#/$defs/tool0") == schema
