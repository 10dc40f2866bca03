import json
import os
import secrets
from pathlib import Path
from urllib.request import urlopen

import jwt
from client import Client, present, public_jwk
from cryptography.hazmat.primitives.asymmetric import ec
from relying_party import number_of_sd_jwt

gateway, number = os.environ.get("GATEWAY", "http://127.0.0.1:5000"), "+447700900123"

# 1 and 2. The client.
client = Client(gateway)
client.register()
client.call("POST", "/sms/verify", {"msisdn": number})

# The phone. Where there is no outbox, the user types the code.
token = Path("keys/operator.token").read_text().strip()
texts = json.load(urlopen(f"{gateway}/outbox?to={number[1:]}&token={token}"))
code = texts[-1]["text"].split("\n")[0].split(" ")[-1]

# 3. The code comes back, with a key: the answer holds a proof for an hour.
key = ec.generate_private_key(ec.SECP256R1())
body = {"code": code, "publicKey": public_jwk(key)}
answer = client.call("POST", "/sms/verify_code", body)
print("verified:", answer["msisdn"])

# 4. A site gives a nonce, and gets the proof with a signature over it.
site, nonce = "https://shop.example", secrets.token_urlsafe()
shown = present(answer["cert"], key, site, nonce, client.now())

# The site: it trusts this gateway, and fetches its keys.
keys = jwt.PyJWKClient(f"{gateway}/.well-known/jwks.json")
print("proved:  ", number_of_sd_jwt(shown, keys, gateway, site, nonce))

# 6.
client.call("POST", "/unregister")
