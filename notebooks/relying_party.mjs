// What a relying party does with a proof of a phone number: npm's jose, and nothing of the gateway's.
// `keys` is createRemoteJWKSet(new URL(`${issuer}/.well-known/jwks.json`)), made once: it keeps what it
// has fetched, and asks again when a proof names a key that it does not know. (jose looks whether an
// iat lies in the future only where maxTokenAge is given.)
// A proof of this minute may be about a number that was verified a year ago, and numbers change hands.
// So `auth_time` is bounded, by VERIFIED_S: choose what you can bear.
import { importJWK, jwtVerify } from 'jose'
import { createHash } from 'node:crypto'

const VERIFIED_S = 30 * 86400
const ALGORITHMS = { EC: ['ES256'], OKP: ['EdDSA', 'Ed25519'], RSA: ['RS256'] }

// The number of whoever shows `proof~binding` to us, now; throws if nothing is proved.
export async function numberOfSdJwt(shown, keys, issuer, audience, nonce) {
  const [proof, binding, ...more] = shown.split('~')
  if (more.length) throw new Error('exactly one ~')
  const { payload } = await jwtVerify(proof, keys, {
    algorithms: ['ES256'], typ: 'dc+sd-jwt', issuer, clockTolerance: 60, maxTokenAge: 86400,
    requiredClaims: ['exp', 'iat', 'cnf', 'phone_number'],
  })
  const algorithms = ALGORITHMS[payload.cnf.jwk.kty]
  const key = await importJWK(payload.cnf.jwk, algorithms[0])
  const note = (await jwtVerify(binding, key, {
    algorithms, typ: 'kb+jwt', audience, maxTokenAge: 300, clockTolerance: 60,
  })).payload
  const digest = createHash('sha256').update(`${proof}~`).digest('base64url')
  if (note.nonce !== nonce || note.sd_hash !== digest) throw new Error('another nonce, or proof')
  if (payload.vct !== `${issuer}/vct/phone/1`) throw new Error('a proof of something else')
  return numberLately(payload)
}

// The number that a bearer's JWT proves to us, once: `used` is a Set that keeps each jti till exp.
export async function numberOfJwt(token, keys, issuer, audience, nonce, used) {
  const { payload } = await jwtVerify(token, keys, {
    algorithms: ['ES256'], typ: 'JWT', issuer, audience, clockTolerance: 60, maxTokenAge: 600,
    requiredClaims: ['exp', 'iat', 'jti', 'phone_number'],
  })
  if (payload.nonce !== nonce || used.has(payload.jti)) throw new Error('another nonce, or shown before')
  used.add(payload.jti)
  return numberLately(payload)
}

function numberLately({ auth_time: verified, phone_number: number }) {
  if (!(verified >= Date.now() / 1000 - VERIFIED_S)) throw new Error('verified too long ago')
  return number
}
