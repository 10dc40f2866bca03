"""Webhook signatures, against the vendors' own packages as independent signers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import lab
import pytest
from support import NUMBER, Answer, WsgiClient

MakeClient = Callable[..., WsgiClient]
FORM = {"CONTENT_TYPE": "application/x-www-form-urlencoded"}
PARTS = {name: lab.ROOT / ".parts" / name for name in ("twilio", "vonage")}

if missing := [name for name, folder in PARTS.items() if not folder.exists()]:
    pytest.skip(
        f"the signers of {' and '.join(missing)} are not in .parts: .ci/run installs them",
        allow_module_level=True,
    )


@pytest.fixture(scope="module", params=["twilio", "vonage"])
def signer(request: pytest.FixtureRequest) -> Iterator[Callable[[str, dict[str, Any]], str]]:
    """The signing function of a provider's own package, from URL and parameters."""
    folder = PARTS[request.param]
    sys.path.append(str(folder))
    if request.param == "twilio":
        from twilio.request_validator import RequestValidator

        twilio = RequestValidator("t0psecret")
        yield lambda url, params: str(twilio.compute_signature(url, params))
    else:
        from vonage_http_client.auth import Auth

        vonage = Auth(api_key="k", signature_secret="t0psecret", signature_method="sha256")
        yield lambda url, params: str(vonage.sign_params(params))
    sys.path.remove(str(folder))


class Hook:
    """A webhook of one kind that wants signatures, and a session to answer."""

    def __init__(self, make_client: MakeClient, kind: str, sign: Any) -> None:
        self.kind, self.sign = kind, sign
        secrets = {"signature_secret": "t0psecret", "path_secret": "p4th"}
        self.client = make_client(sms_inbound=[{"kind": kind, **secrets}])
        self.client.register()
        assert self.client.credentials
        self.hawk_id = self.client.credentials.hawk_id

    def params(self, **more: str) -> dict[str, str]:
        """A message with the Hawk id, as the provider writes it."""
        now = str(int(time.time()))
        if self.kind == "twilio":
            fields = {"MessageSid": "SM1", "AccountSid": "AC1", "From": NUMBER, "To": "+1555",
                      "Body": f"é&=+ {self.hawk_id}", "NumMedia": "0", "FromCity": ""}  # fmt: skip
        else:
            fields = {
                "messageId": "M1",
                "msisdn": NUMBER[1:],
                "to": "1555",
                "nonce": "n",
                "text": f"é&=+ {self.hawk_id}",
                "timestamp": now,
                "keyword": "A&B",
            }
        return {**fields, **more}

    def deliver(self, signed: dict[str, str], sent: dict[str, str] | None = None,
                path: str = "/sms/momt/p4th") -> Answer:  # fmt: skip
        """Sign ``signed``, send ``sent``."""
        path += f"?provider={self.kind}"
        signature = self.sign("http://127.0.0.1:5000" + path, dict(signed))
        sent, env = dict(signed if sent is None else sent), dict(FORM)
        if self.kind == "twilio":
            env["HTTP_X_TWILIO_SIGNATURE"] = signature
        else:
            sent.setdefault("sig", signature)
        return self.client.raw("POST", path, urlencode(sent).encode(), env)


@pytest.fixture
def hook(make_client: MakeClient, signer: Any, request: pytest.FixtureRequest) -> Hook:
    """The webhook of the signer's provider."""
    kind = {"twilio": "twilio", "vonage": "nexmo"}[request.node.callspec.params["signer"]]
    return Hook(make_client, kind, signer)


def test_what_the_vendors_package_signs_is_let_in(hook: Hook) -> None:
    answer = hook.deliver(hook.params())
    assert answer.status == 200
    if hook.kind == "twilio":
        assert (answer.data, answer.headers["content-type"]) == (b"<Response/>", "text/xml")
    else:
        assert answer.json == {}
    [message] = hook.client.outbox()
    assert len(message["text"]) == 32
    assert hook.deliver(hook.params()).status == 200  # the provider tries again
    assert len(hook.client.outbox()) == 1  # and each message is handled once


def test_one_changed_field_is_refused(hook: Hook) -> None:
    params = hook.params()
    changes = [{**params, name: value + "x"} for name, value in params.items()]
    changes += [{k: v for k, v in params.items() if k != name} for name in params]
    changes += [{**params, "added": "1"}, {**params, "sig": "0" * 64}, {}]
    if hook.kind == "twilio":
        changes.remove({**params, "sig": "0" * 64})  # it means nothing to them
    for sent in changes:
        answer = hook.deliver(params, sent)
        assert (answer.status, answer.json["error"]) == (403, "Forbidden"), sent
    assert hook.client.outbox() == []
    assert hook.deliver(params).status == 200


def test_another_path_secret_or_url_is_refused(hook: Hook) -> None:
    for path in ("/sms/momt", "/sms/momt/", "/sms/momt/p4tH"):
        assert hook.deliver(hook.params(), path=path).status == 403
    assert hook.client.outbox() == []
