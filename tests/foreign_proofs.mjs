// Foreign eyes on our proofs: npm's jose by notebooks/relying_party.mjs, and @sd-jwt/core.
// Reads one JSON from stdin; writes one. tests/test_proofs.py lays node_modules beside a copy of this.
import { SDJwtInstance } from '@sd-jwt/core'
import { CompactSign, compactVerify, createRemoteJWKSet, exportJWK, generateKeyPair, importJWK } from 'jose'
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { numberOfJwt, numberOfSdJwt } from './relying_party.mjs'

const { judge, present } = JSON.parse(readFileSync(0, 'utf8'))
const ALGORITHMS = { EC: 'ES256', OKP: 'EdDSA', RSA: 'RS256' }
const hasher = (data, name = 'sha-256') => createHash(name.replace('-', '')).update(data).digest()

// As @sd-jwt/core wants to be called: it leaves signatures, issuer, audience and age to its caller.
async function bySdJwtCore({ shown, issuer, audience, nonce }, keys) {
  const instance = new SDJwtInstance({
    hasher,
    verifier: async (data, signature) => {
      const { protectedHeader } = await compactVerify(`${data}.${signature}`, keys, { algorithms: ['ES256'] })
      return protectedHeader.typ === 'dc+sd-jwt' && !protectedHeader.crit
    },
    kbVerifier: async (data, signature, { cnf }) => {
      const algorithm = ALGORITHMS[cnf.jwk.kty]
      await compactVerify(`${data}.${signature}`, await importJWK(cnf.jwk, algorithm), { algorithms: [algorithm] })
      return true
    },
  })
  const { payload, kb } = await instance.verify(shown, { keyBindingNonce: nonce, skewSeconds: 60 })
  const age = Date.now() / 1000 - kb.payload.iat
  if (payload.iss !== issuer || payload.vct !== `${issuer}/vct/phone/1` || !Number.isInteger(payload.exp)) throw new Error('issuer')
  if (kb.payload.aud !== audience || !Number.isInteger(kb.payload.iat) || age > 300 || age < -60) throw new Error('audience, or age')
  return payload.phone_number
}

async function verdict(call) {
  try {
    return await call()
  } catch (error) {
    return null
  }
}

async function judgeAll({ jwks, cases }) {
  const keys = createRemoteJWKSet(new URL(jwks))
  const found = []
  for (const one of cases) {
    const args = [one.shown, keys, one.issuer, one.audience, one.nonce]
    found.push(one.form === 'jwt'
      ? { jose: await verdict(() => numberOfJwt(...args, new Set())) }
      : {
          jose: await verdict(() => numberOfSdJwt(...args)),
          'sd-jwt': await verdict(() => bySdJwtCore(one, keys)),
        })
  }
  return found
}

// Key pairs made by jose; then, for a proof about each, a presentation by each of the two libraries.
async function presentAll({ privateKeys, audience, nonce }) {
  if (!privateKeys) {
    const made = {}
    for (const [kty, algorithm] of Object.entries(ALGORITHMS)) {
      const pair = await generateKeyPair(algorithm, { extractable: true })
      made[kty] = { public: await exportJWK(pair.publicKey), private: await exportJWK(pair.privateKey) }
    }
    return made
  }
  const found = {}
  for (const [kty, { private: jwk, proof }] of Object.entries(privateKeys)) {
    const alg = ALGORITHMS[kty], key = await importJWK(jwk, alg), iat = Math.floor(Date.now() / 1000)
    const note = { aud: audience, nonce, iat }
    const whole = { ...note, sd_hash: hasher(proof).toString('base64url') }
    const sign = (payload) =>
      new CompactSign(new TextEncoder().encode(JSON.stringify(payload))).setProtectedHeader({ alg, typ: 'kb+jwt' }).sign(key)
    const kbSigner = async (data) => {
      const [header, payload] = data.split('.').map((part) => Buffer.from(part, 'base64url'))
      const signed = await new CompactSign(payload).setProtectedHeader(JSON.parse(header)).sign(key)
      const [first, second, signature] = signed.split('.')
      if (`${first}.${second}` !== data) throw new Error('jose writes that otherwise')
      return signature
    }
    const instance = new SDJwtInstance({ hasher, kbSigner, kbSignAlg: alg })
    found[kty] = {
      jose: proof + (await sign(whole)),
      'sd-jwt': await instance.present(proof, undefined, { kb: { payload: note } }),
    }
  }
  return found
}

process.stdout.write(JSON.stringify(judge ? await judgeAll(judge) : await presentAll(present)))
