"""Schemathesis asks every endpoint what ``/openapi.json`` lets a client ask, and what it does not.

Half of its requests are right by the document, half are wrong. None may be answered by a 5xx, or by
a status, a media type or a body that the document does not name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import lab
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as said
from support import NUMBER, OPEN

import gateway

pytestmark = pytest.mark.slow
REQUESTS = {GenerationMode.POSITIVE: 5, GenerationMode.NEGATIVE: 10}
"""How many to each endpoint: in all some 300, in 10 s if the machine does nothing else."""
CHECKS = [
    not_a_server_error,
    said.status_code_conformance,
    said.content_type_conformance,
    said.response_schema_conformance,
]


class Hawk(requests.auth.AuthBase):
    """Signs what is sent in the end, byte by byte."""

    def __init__(self, client: lab.Client, url: str, now_s: float) -> None:
        self.client, self.url, self.now_s = client, url, now_s

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        assert self.client.credentials
        body = request.body or b""
        request.headers["Authorization"] = gateway.build_authorization(
            self.client.credentials,
            gateway.hawk_target(request.method or "", self.url + request.path_url),
            int(self.now_s),
            self.client.nonce(),
            str(request.headers.get("Content-Type", "")),
            body if isinstance(body, bytes) else str(body).encode(),
        )
        return request


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_5xx_and_nothing_undocumented(
    make_lab: Callable[..., lab.Lab], mode: GenerationMode
) -> None:
    one = make_lab(**OPEN, sends_per_session=255, registers_per_address="9999999/second")
    schema = schemathesis.openapi.from_dict(gateway.openapi_document(one.address))
    statuses, session, turns = set[int](), requests.Session(), itertools.count()

    def ask(case: Any) -> None:
        client = one.client()
        client.register()
        client.verify(NUMBER)
        if next(turns) % 2:  # the others have a code that waits
            client.verify_code(lab.Handset(client, NUMBER).code())
        auth = Hawk(client, one.settings.public_url, one.now_s)
        response = case.call(base_url=one.address, auth=auth, session=session)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    bounds = settings(
        max_examples=REQUESTS[mode],
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    operations: Any = schema.get_all_operations()
    for operation in (found.ok() for found in operations):
        # Where nothing can be sent, nothing can be sent wrongly.
        if mode == GenerationMode.POSITIVE or operation.method == "post":
            strategy = operation.as_strategy(generation_mode=mode)
            bounds(given(case=strategy)(ask))()
    session.close()
    wanted = {200, 204, 400} if mode == GenerationMode.POSITIVE else {400}
    assert wanted <= statuses
    assert 401 not in statuses, "the hook signs wrongly"
