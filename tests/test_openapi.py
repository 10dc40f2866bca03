"""``/openapi.json``: what it says is what the running gateway does, field by field."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from support import NUMBER, WsgiClient, documented, undocumented
from test_proofs import public

import gateway

DOCUMENT = documented()
SAMPLES: dict[str, Any] = {
    "msisdn": NUMBER,
    "mcc": "234",
    "code": "000000",
    "publicKey": public("EC"),
    "format": "jwt",
    "audience": "https://shop.example",
    "nonce": "n",
    "duration": 60,
}
"""A right value for each field that is bounded."""
BEYOND: tuple[Any, ...] = (
    *(0, -1, 1.5, 99, 1000, 10**30, True, False, [], {}, [1], {"a": 1}, " "),
    *("x", "0", "12\n", "１２３", "23", "2345", "jwt\n", "JWT", "true"),
)
"""Values of which some lie beyond each bound."""


def operations() -> Iterator[tuple[str, str, Any]]:
    """Every method and path of the document, with what is said there."""
    for path, item in DOCUMENT["paths"].items():
        for method in item.keys() & {"get", "post"}:
            yield method.upper(), path, item[method]


def resolved(schema: Any) -> Any:
    """The schema that a reference leads to."""
    return DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


def bodies(operation: Any) -> list[Any]:
    """The schemas of which a JSON body fits one; none if it takes no JSON."""
    content = operation.get("requestBody", {"content": {}})["content"]
    choices = content.get("application/json", {"schema": {"anyOf": []}})["schema"]["anyOf"]
    return [resolved(choice) for choice in choices]


BODIES = [(path, schema) for _, path, operation in operations() for schema in bodies(operation)]
each_body = pytest.mark.parametrize(
    ("path", "schema"), BODIES, ids=[f"{path} {schema['title']}" for path, schema in BODIES]
)


def required(schema: Any) -> dict[str, Any]:
    """A body that has what the schema requires, and nothing else."""
    return {name: SAMPLES[name] for name in schema.get("required", [])}


@pytest.fixture
def ready(make_client: Callable[..., WsgiClient]) -> WsgiClient:
    """A client that is verified and waits for another code: no endpoint refuses its state."""
    client = make_client(sends_per_session=255).verified()
    assert client.call("/sms/resend_code").status == 200
    return client


def test_it_is_a_valid_document(client: WsgiClient) -> None:
    answer = client.get("/openapi.json")
    validate(answer.json)
    assert answer.json == DOCUMENT
    hidden = gateway.openapi_document("https://id.example")
    validate(hidden)
    assert hidden["info"]["version"] == "hidden"


def test_it_has_every_route_in_both_spellings(client: WsgiClient) -> None:
    said = set()
    for method, path, _ in operations():
        for server in DOCUMENT["paths"][path]["servers"]:
            prefix = server["url"].removeprefix("http://127.0.0.1:5000")
            said.add((method, prefix + re.sub("{(.+?)}", r"<\1>", path)))
    assert said == {(route.method, route.rule) for route in client.app.routes}


def test_names_of_operations_are_unique() -> None:
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len({*names}) == len(names)
    assert all(operation["summary"] for _, _, operation in operations())


def test_signed_is_what_says_so(client: WsgiClient) -> None:
    assert DOCUMENT["components"]["securitySchemes"] == {"hawk": {"type": "http", "scheme": "hawk"}}
    for method, path, operation in operations():
        answer = client.raw(method, path.replace("{secret}", "x"))
        signed = operation["security"] == [{"hawk": []}]
        assert signed == (answer.status == 401), path


def test_a_secret_is_marked() -> None:
    assert DOCUMENT["components"]["schemas"]["CodeBody"]["properties"]["code"]["writeOnly"] is True


def test_no_others_end_unless_it_is_asked_for() -> None:
    body = DOCUMENT["components"]["schemas"]["UnregisterBody"]
    assert body["properties"]["everywhere"]["default"] is False


def test_each_field_has_its_sentence() -> None:
    for path, schema in BODIES:
        for name, field in schema["properties"].items():
            assert field["description"], (path, name)
            default = field.get("default")
            assert name not in schema["required"] or default is None
            if default is not None:
                Draft202012Validator(field).validate(default)


def test_each_field_of_an_answer_has_its_sentence() -> None:
    for name, schema in gateway.ANSWERS.items():
        assert all(field.get("description") for field in schema["properties"].values()), name


@each_body
def test_what_is_required_is_missed_by_name(ready: WsgiClient, path: str, schema: Any) -> None:
    others = [other["required"] for there, other in BODIES if there == path]
    for left_out in schema["required"]:
        for body in (  # the others are there; nothing is there
            {n: v for n, v in required(schema).items() if n != left_out},
            {left_out: None},
            {left_out: ""},
        ):
            given = {name for name, value in body.items() if value not in (None, "")}
            answer = ready.call(path, body)
            fits = [s for there, s in BODIES if there == path]
            if any(Draft202012Validator(s).is_valid({n: body[n] for n in given}) for s in fits):
                assert answer.json.get("errno") != 108  # another declaration fits
                continue
            assert (answer.status, answer.errno) == (400, 108)
            told = answer.json["message"].removeprefix("missing: ").split(", ")
            assert {*told} in [{*names} - given for names in others]
            assert left_out in told or len(others) > 1


@each_body
def test_what_is_beyond_a_bound_is_refused_by_name(
    ready: WsgiClient, path: str, schema: Any
) -> None:
    for name, field in schema["properties"].items():
        validator, refused = Draft202012Validator(field), 0
        for value in BEYOND:
            if not validator.is_valid(value):
                # Another format asks for another declaration, which may require a key.
                key = {"publicKey": SAMPLES["publicKey"]} if name == "format" else {}
                answer = ready.call(path, {**key, **required(schema), name: value})
                assert (answer.status, answer.errno) == (400, 107), (name, value, answer)
                assert name in answer.json["message"]
                refused += 1
        bounded = {"type", "anyOf", "enum", "pattern", "minimum", "maximum"} & field.keys()
        assert bool(refused) == bool(bounded), name


@each_body
def test_what_is_not_bounded_is_never_refused(ready: WsgiClient, path: str, schema: Any) -> None:
    """mcc and mnc are junk on some phones; what has no bound in the document has none."""
    for name, field in schema["properties"].items():
        if not {"type", "anyOf", "enum", "pattern"} & field.keys():
            for value in BEYOND:
                body = {**required(schema), "code": "000000" * ("code" in schema["required"])}
                answer = ready.call(path, {**body, name: value})
                assert answer.json.get("errno") not in (106, 107, 108) if answer.data else True


def whole_flow(client: WsgiClient, prefix: str, more: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Every step that succeeds: method, path, answer. ``more`` are fields that nobody declared."""
    root = "/v1" if prefix else ""

    def post(path: str, **body: Any) -> tuple[Any, ...]:
        spelled = (root if path.startswith("/certificate") else prefix) + path
        return "POST", path, client.call(spelled, {**body, **more})

    yield post("/discover", mcc="234")
    yield post("/discover", msisdn=NUMBER)
    yield post("/register", mcc="234")
    client.register()
    yield post("/sms/mt/verify", msisdn=NUMBER)
    yield post("/sms/resend_code", shortVerificationCode=True)
    yield post("/sms/verify_code", code=client.code(), publicKey=public("EC"))
    yield post("/sms/verify", msisdn=NUMBER)
    yield post("/sms/verify_code", code=client.code(), format="jwt", audience="https://a.example")
    yield post("/certificate/sign", publicKey=public("OKP"), duration="60")
    yield post("/certificate/sign", format="jwt", audience="https://a.example", nonce="n")
    yield "GET", "/session", client.call(prefix + "/session", method="GET")
    yield post("/unregister", everywhere=True)
    for _, path, operation in operations():
        if "get" in DOCUMENT["paths"][path] and not operation["security"] and "secret" not in path:
            where = path.replace("{token}", client.app.token).replace("{name}", "index.html")
            where += "?provider=nexmo" * path.startswith("/sms/")
            where += f"?token={client.app.token}" * (path == "/outbox")
            where = where.replace("{token}", client.app.token).replace("{name}", "index.html")
            token = f"Bearer {client.app.token}" if path == "/metrics" else None
            yield "GET", path, client.get(prefix + where, HTTP_AUTHORIZATION=token)


def strict(schema: Any) -> Any:
    """A schema that also refuses every field that it does not name."""
    schema = copy.deepcopy({**schema, "components": DOCUMENT["components"]})
    for part in schema["components"]["schemas"].values():
        part.setdefault("additionalProperties", False)
    return schema


@pytest.mark.parametrize("prefix", ["", "/v1/msisdn"])
@pytest.mark.parametrize("more", [{}, {"undeclared": [None], "☃": "☃", "kind": "x"}])
def test_answers_have_the_fields_that_it_names_and_no_others(
    make_client: Callable[..., WsgiClient], prefix: str, more: dict[str, Any]
) -> None:
    """And nobody reads fields of a body that it does not name."""
    client, seen = make_client(mo_verifier="+441234"), set()
    for method, path, answer in whole_flow(client, prefix, more):
        operation = DOCUMENT["paths"][path][method.lower()]
        assert 200 <= answer.status < 300, (path, answer)
        content = operation["responses"][str(answer.status)]["content"]
        seen.add((method, path))
        if not content:
            assert (answer.status, answer.data) == (204, b"")
            continue
        (kind,) = content
        assert answer.headers["content-type"].startswith(kind.replace("*/*", ""))
        if kind == "application/json":
            Draft202012Validator(strict(content[kind]["schema"])).validate(answer.json)
    left = {(m, p) for m, p, _ in operations()} - seen
    assert all(path.startswith(("/sms/momt", "/sms/receipt")) for _, path in left), left


def mistakes(client: WsgiClient, method: str, path: str, signed: bool) -> Iterator[Any]:
    """Answers to every mistake that can be made on every endpoint."""
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "CONTENT_TYPE": "application/json"}
    url = path.replace("{secret}", "x") + "?provider=nexmo" * path.startswith("/sms/")
    if method == "POST" or signed:
        yield client.call(url, method=method, environ=chunked)
        yield client.call(url, method=method, environ={"CONTENT_LENGTH": "99999"})
        yield client.call(url, method=method, environ={"CONTENT_LENGTH": "10"})  # it ends early
    if method == "POST":
        yield client.call(url, [1])
        yield client.call(url, {})
        yield client.call(url, {"msisdn": 1}, environ={"CONTENT_TYPE": "text/plain"})
        yield client.call(url, {"msisdn": NUMBER, "mcc": [], "everywhere": True, "code": "123456"})
    if signed:
        yield client.call(url, method=method, signed=False)
        yield client.call(url, method=method, ts=1)
    yield client.call(url, method=method, environ={"HTTP_HOST": "else.example"})


ELSEWHERE = {114, 115, 116, 117, 201, 999}
"""The limits are shown by tests/test_limit_table.py, the last two below."""


def test_every_errno_is_one_that_can_happen(make_client: Callable[..., WsgiClient]) -> None:
    """And none happens that is not named: every test sees to that (``undocumented``)."""
    client = make_client()
    for method, path, operation in operations():
        client.register()
        signed, seen = bool(operation["security"]), set()
        answers = []
        for answer in mistakes(client, method, path, signed):
            answers.append(answer)
            if path == "/unregister":
                client.register()
        if signed and method == "POST":
            answers.append(client.call(path, {**SAMPLES, "everywhere": True}))
            answers.append(client.call(path, {"duration": 0, "publicKey": "", "msisdn": "x"}))
            client.ask()
            answers += [client.call(path, {**SAMPLES, "format": "", "code": "000000"})]
            answers.append(client.call(path, {**SAMPLES, "msisdn": "1", "code": "1"}))
        for answer in answers:
            if answer.headers.get("content-type") == "application/json":
                seen.add((answer.status, dict(answer.json).get("errno")))
        said = named(operation)
        wanted = {(s, e) for s, e in said if e not in ELSEWHERE and e != 107}
        assert wanted <= seen, (path, wanted - seen)


def named(operation: Any) -> set[tuple[int, int]]:
    """Every status with every errno that the document names for an operation."""
    found = set()
    for status, response in operation["responses"].items():
        schema = response["content"].get("application/json", {}).get("schema", {})
        for errno in schema.get("properties", {}).get("errno", {}).get("enum", []):
            found.add((int(status), errno))
    return found


def test_every_errno_is_on_some_route_and_no_other_is() -> None:
    known = {(error.status, int(error.errno or 0)) for error in gateway.error_classes()}
    assert set().union(*(named(operation) for _, _, operation in operations())) == known


def test_a_store_that_is_gone_is_what_it_says(client: WsgiClient, tmp_path: Any) -> None:
    client.register()
    there, client.gateway.storage = client.gateway.storage, gateway.Storage(f"unix://{tmp_path}/no")
    try:
        for method, path, operation in operations():
            body = {"msisdn": NUMBER} if method == "POST" else None
            answer = client.call(path.replace("{secret}", "x"), body, method=method)
            if operation["security"] or path == "/register":
                assert (answer.status, answer.errno) == (503, 201), path
            elif path == "/__heartbeat__":
                assert answer.status == 503
    finally:
        client.gateway.storage = there


def test_what_nobody_foresaw_is_999_on_every_route(session: WsgiClient) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    handlers = {route.handler: fail for route in gateway.ROUTES}
    broken = type("Broken", (gateway.GatewayApp,), handlers)(session.gateway, session.app.token)
    client = WsgiClient(broken)
    client.credentials = session.credentials
    for method, path, operation in operations():
        answer = client.call(path.replace("{secret}", "x"), method=method)
        assert (answer.status, answer.errno) == (500, 999), path
        assert (500, 999) in named(operation), path


def test_the_check_of_all_tests_sees_what_it_must(client: WsgiClient) -> None:
    """``undocumented`` looks at every answer in this process, in all tests."""
    answer = client.get("/session")
    assert undocumented("GET", "/session", answer) == ""
    assert undocumented("GET", "/v1/msisdn/session", answer) == ""
    assert undocumented("GET", "/nowhere", answer) == ""
    assert "401" in undocumented("GET", "/vct/phone/1", answer)
    other = answer._replace(data=json.dumps({**answer.json, "errno": 105}).encode())
    assert "105" in undocumented("GET", "/session", other)


def test_what_is_declared_is_never_changed_and_has_names() -> None:
    """Settings, entries and bodies: fields are given by name, and stay as they were checked."""
    declared = [one for one in vars(gateway).values() if isinstance(one, type(msgspec.Struct))]
    own = [one for one in declared if one.__module__ == gateway.__name__]
    assert len(own) >= 14
    assert [one for one in own if not one.__struct_config__.frozen or one.__match_args__] == []
