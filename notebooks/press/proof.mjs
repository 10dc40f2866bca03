// What a site does with a proof: it decodes it, and checks it with the gateway's public keys. Each check
// is { what, ok, found }, so that the page can show them one by one; `ok` is null where WebCrypto lacks
// the algorithm. A program that only wants to know stops at the first that is not right.
import { jwkOfBrowserId } from './client.mjs'

const { subtle } = globalThis.crypto
const utf8 = new TextEncoder()

export function bytesOf(base64url) {
  const text = atob(base64url.replace(/-/g, '+').replace(/_/g, '/'))
  return Uint8Array.from(text, (letter) => letter.charCodeAt(0))
}

export function base64urlOf(bytes) {
  const text = btoa(String.fromCharCode(...bytes))
  return text.replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '')
}

// The three pieces of a JWS: { header, claims, signed, signature }. Anybody can read them.
export function decode(token) {
  const [header, claims, signature] = token.split('.')
  const json = (piece) => JSON.parse(new TextDecoder().decode(bytesOf(piece)))
  return { header: json(header), claims: json(claims), signed: `${header}.${claims}`, signature: bytesOf(signature) }
}

const KINDS = {
  EC: { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' },
  RSA: { name: 'RSASSA-PKCS1-v1_5', hash: 'SHA-256' },
  OKP: { name: 'Ed25519' },
}

async function isSigned({ signed, signature }, jwk) {
  const how = KINDS[jwk.kty]
  const { kty, crv, x, y, n, e } = jwk
  const key = await subtle.importKey('jwk', { kty, crv, x, y, n, e }, how, false, ['verify'])
  return subtle.verify(how, key, signature, utf8.encode(signed))
}

const near = (a, b, seconds) => Math.abs(a - b) <= seconds
const utc = (seconds) => new Date(seconds * 1000).toISOString().replace('.000', '')

// Check an SD-JWT with its key binding.
//
// shown: what the client showed, `proof~binding`. jwks: of /.well-known/jwks.json. issuer: of
// /.well-known/jwt-vc-issuer. audience, nonce: the site's own origin, and what it gave for this occasion.
// now: in seconds.
export async function checkSdJwt(shown, { jwks, issuer, audience, nonce, now }) {
  const [proof, binding, ...more] = shown.split('~')
  const { header, claims, ...jws } = decode(proof)
  const note = decode(binding)
  const key = jwks.keys.find(({ kid }) => kid === header.kid)
  const digest = base64urlOf(new Uint8Array(await subtle.digest('SHA-256', utf8.encode(`${proof}~`))))
  return [
    { what: 'one proof, one ~, one key binding', ok: more.length === 0 && binding !== '', found: '' },
    {
      what: 'header: typ dc+sd-jwt, alg ES256, and a kid that the gateway publishes',
      ok: header.typ === 'dc+sd-jwt' && header.alg === 'ES256' && Boolean(key),
      found: `${header.typ}, ${header.alg}, kid ${header.kid}`,
    },
    { what: 'the gateway signed it, with that key', ok: Boolean(key) && (await isSigned(jws, key)), found: '' },
    { what: 'iss is this gateway', ok: claims.iss === issuer, found: claims.iss },
    { what: 'vct: it is about a phone number', ok: claims.vct === `${issuer}/vct/phone/1`, found: claims.vct },
    {
      what: 'iat is not in the future, exp is',
      ok: claims.iat <= now + 60 && now - 60 < claims.exp,
      found: `${utc(claims.iat)} to ${utc(claims.exp)}`,
    },
    {
      what: 'the key in cnf signed the binding',
      ok: note.header.typ === 'kb+jwt' && (await isSigned(note, claims.cnf.jwk)),
      found: `${note.header.typ}, ${note.header.alg}`,
    },
    { what: 'aud of the binding is my origin', ok: note.claims.aud === audience, found: note.claims.aud },
    { what: 'nonce is the one I gave', ok: note.claims.nonce === nonce, found: note.claims.nonce },
    { what: 'the binding is fresh: at most five minutes old', ok: near(note.claims.iat, now, 300), found: utc(note.claims.iat) },
    { what: 'sd_hash is the hash of this proof', ok: note.claims.sd_hash === digest, found: note.claims.sd_hash },
  ]
}

// Check a BrowserID certificate with its assertion.
//
// shown: `certificate~assertion`. wellKnown: of /.well-known/browserid. host: the gateway's, with its port
// if it has one. audience: the site's own origin. now: in seconds; BrowserID counts milliseconds.
export async function checkBrowserId(shown, { wellKnown, host, audience, now }) {
  const [certificate, assertion, ...more] = shown.split('~')
  const { header, claims, ...jws } = decode(certificate)
  const note = decode(assertion)
  const signer = wellKnown['public-key']
  const isRsa = signer.algorithm === 'RS'
  return [
    { what: 'one certificate, one ~, one assertion', ok: more.length === 0 && assertion !== '', found: '' },
    {
      what: isRsa ? 'the gateway signed the certificate' : 'the gateway signs with DSA, which WebCrypto lacks',
      ok: isRsa ? header.alg === 'RS256' && (await isSigned(jws, jwkOfBrowserId(signer))) : null,
      found: header.alg,
    },
    { what: 'iss is this gateway', ok: claims.iss === host, found: claims.iss },
    {
      what: 'iat is not in the future, exp is',
      ok: claims.iat <= (now + 60) * 1000 && (now - 60) * 1000 < claims.exp,
      found: `${utc(Math.floor(claims.iat / 1000))} to ${utc(Math.floor(claims.exp / 1000))}`,
    },
    {
      what: 'the key in the certificate signed the assertion',
      ok: await isSigned(note, jwkOfBrowserId(claims['public-key'])),
      found: note.header.alg,
    },
    { what: 'aud of the assertion is my origin', ok: note.claims.aud === audience, found: note.claims.aud },
    {
      what: 'the assertion has not expired',
      ok: (now - 60) * 1000 < note.claims.exp && note.claims.exp <= (now + 600) * 1000,
      found: utc(Math.floor(note.claims.exp / 1000)),
    },
  ]
}
