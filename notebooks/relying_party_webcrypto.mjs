// What a relying party does with an SD-JWT, by WebCrypto and no library: Node 18 or newer, browsers,
// workers. `jwks` is the JSON of `${issuer}/.well-known/jwks.json`: keep it for some minutes, and fetch
// it again when a proof names a key that it has not got (error.kid), but not for every visitor.
// `now` is in seconds. See notebooks/relying_party.mjs for the same with a library that keeps the keys.
const { subtle } = globalThis.crypto ?? (await import('node:crypto')).webcrypto
const VERIFIED_S = 30 * 86400 // how long ago the number may have been verified: numbers change hands
const HOW = { // by the kind of a key: the one alg that goes with it, and its name in WebCrypto
  EC: ['ES256', { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' }],
  OKP: ['EdDSA', { name: 'Ed25519' }],
  RSA: ['RS256', { name: 'RSASSA-PKCS1-v1_5', hash: 'SHA-256' }],
}
const utf8 = new TextEncoder()
const binary = (text) => atob(text.replace(/-/g, '+').replace(/_/g, '/'))
const bytesOf = (text) => Uint8Array.from(binary(text), (letter) => letter.charCodeAt(0))
const jsonOf = (text) => JSON.parse(new TextDecoder().decode(bytesOf(text)))

async function digestOf(text) {
  const digest = new Uint8Array(await subtle.digest('SHA-256', utf8.encode(text)))
  return btoa(String.fromCharCode(...digest)).replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '')
}

function must(holds, why) {
  if (!holds) throw new Error(`not proved: ${why}`)
}

// The claims of a token of this type, if this key signed it.
async function opened(token, typ, { kty, crv, x, y, n, e }) {
  const [header, claims, signature, ...more] = token.split('.'), [alg, how] = HOW[kty]
  const told = jsonOf(header)
  must(!more.length && told.alg === alg && told.typ === typ && !told.crit, `this is no ${typ} by ${alg}`)
  const key = await subtle.importKey('jwk', { kty, crv, x, y, n, e }, how, false, ['verify'])
  const right = await subtle.verify(how, key, bytesOf(signature), utf8.encode(`${header}.${claims}`))
  must(right, `the signature of the ${typ}`)
  return jsonOf(claims)
}

// The number of whoever shows `proof~binding` to us, now; throws if nothing is proved.
export async function numberOfSdJwt(shown, jwks, issuer, audience, nonce, now = Date.now() / 1000) {
  const [proof, binding, ...more] = shown.split('~')
  must(binding && !more.length, 'exactly one ~')
  const { kid } = jsonOf(proof.split('.')[0]), key = jwks.keys.find((one) => one.kid === kid)
  if (!key) throw Object.assign(new Error('not proved: by an unknown key'), { kid })
  const claims = await opened(proof, 'dc+sd-jwt', key)
  must(claims.iss === issuer && claims.vct === `${issuer}/vct/phone/1`, 'another issuer, or no phone')
  must(claims.iat <= now + 60 && claims.exp > now - 60, 'not at this time')
  must(claims.auth_time >= now - VERIFIED_S, 'verified too long ago')
  const note = await opened(binding, 'kb+jwt', claims.cnf.jwk)
  must(note.aud === audience && note.nonce === nonce, 'for another site, or another nonce')
  must(note.sd_hash === (await digestOf(`${proof}~`)), 'the KB-JWT is of another proof')
  must(note.iat <= now + 60 && note.iat >= now - 300, 'the KB-JWT is too old, or from the future')
  return claims.phone_number
}
