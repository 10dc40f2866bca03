// A client of the gateway for Node (18 or newer) and browsers: fetch and WebCrypto, nothing else.
// Copy it. A browser has WebCrypto only in pages from https:// or from localhost.
//
//   const client = new Client('https://id.example')
//   await client.register()
//   await client.verify('+447700900123')                   // an SMS with a PIN is on its way
//   const pair = await generateKey('ES256')
//   const { cert } = await client.verifyCode('123456', { publicKey: await publicJwk(pair) })
//   const shown = await present(cert, pair, 'https://shop.example', nonceOfTheShop, client.now())
const crypto = globalThis.crypto ?? (await import('node:crypto')).webcrypto // Node 18 has no global one
const { subtle } = crypto
const utf8 = new TextEncoder()

// -- Texts of bytes ------------------------------------------------------------

const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('')
const fromHex = (text) => Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16))
const base64 = (bytes) => btoa(String.fromCharCode(...bytes))
const fromBase64 = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))
const base64url = (bytes) => base64(bytes).replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '')
const fromBase64url = (text) => fromBase64(text.replace(/-/g, '+').replace(/_/g, '/'))
const bytesOf = (data) => (typeof data === 'string' ? utf8.encode(data) : data)
const sha256 = async (data) => new Uint8Array(await subtle.digest('SHA-256', bytesOf(data)))

// -- Hawk ------------------------------------------------------------------------

// The public id and the secret key of a session, both 64 hex digits, from its token.
export async function deriveCredentials(token) {
  const source = await subtle.importKey('raw', fromHex(token), 'HKDF', false, ['deriveBits'])
  const info = utf8.encode('identity.mozilla.com/picl/v1/sessionToken')
  const how = { name: 'HKDF', hash: 'SHA-256', salt: new Uint8Array(), info }
  const text = hex(new Uint8Array(await subtle.deriveBits(how, source, 512)))
  return { id: text.slice(0, 64), key: text.slice(64) }
}

// The hash of a body (a string or bytes) and its media type. No body is '' of type ''.
export async function payloadHash(contentType, body) {
  const kind = contentType.split(';')[0].trim().toLowerCase()
  const parts = [...utf8.encode(`hawk.1.payload\n${kind}\n`), ...bytesOf(body), 10]
  return base64(await sha256(Uint8Array.from(parts)))
}

function normalized(title, { method, url, ts, nonce, hash }) {
  const { protocol, hostname, port, pathname, search } = new URL(url)
  const host = hostname.replace(/^\[|\]$/g, '') // of an IPv6 address
  const lines = [ts, nonce, method, pathname + search, host, port || (protocol === 'https:' ? 443 : 80), hash]
  return [title, ...lines, '', ''].join('\n')
}

// What the MAC of a request covers; `hash` is the payload hash of its body.
export const normalizedRequest = (request) => normalized('hawk.1.header', request)

// What the MAC of its answer covers: ts, nonce, method and URL of the request; the hash of the answer.
export const normalizedAnswer = (request) => normalized('hawk.1.response', request)

// The 64 hex digits of the key sign as text: they are not turned into bytes before.
const hmacKey = (key) =>
  subtle.importKey('raw', utf8.encode(key), { name: 'HMAC', hash: 'SHA-256' }, false, ['sign', 'verify'])
async function isMac(key, mac, text) {
  try {
    return await subtle.verify('HMAC', await hmacKey(key), fromBase64(mac), utf8.encode(text))
  } catch {
    return false // it is no base64
  }
}

// The fields of a Hawk header; {} if it is none.
function fieldsOf(header) {
  const fields = header?.startsWith('Hawk ') ? header.matchAll(/(\w+)="([^"]*)"/g) : []
  return Object.fromEntries(Array.from(fields, ([, name, value]) => [name, value]))
}

// The header Authorization of a request { method, url, ts, nonce, hash }.
export async function authorization({ id, key }, request) {
  const text = utf8.encode(normalizedRequest(request))
  const mac = base64(new Uint8Array(await subtle.sign('HMAC', await hmacKey(key), text)))
  const { ts, nonce, hash } = request
  return `Hawk id="${id}", ts="${ts}", nonce="${nonce}", hash="${hash}", mac="${mac}"`
}

// Whether a header Server-Authorization signs this body as the answer to this request.
export async function checkAnswer({ key }, request, header, contentType, body) {
  const { mac, hash } = fieldsOf(header)
  if (!mac || hash !== (await payloadHash(contentType, body))) return false
  return isMac(key, mac, normalizedAnswer({ ...request, hash }))
}

// -- The client ------------------------------------------------------------------

// What the gateway refused. `signed`: it did so itself; else a proxy, or anybody, may have said it.
export class GatewayError extends Error {
  constructor(status, body, signed) {
    super(body.message ?? `HTTP status ${status}`)
    const { errno, retryAfter, next, info } = body
    Object.assign(this, { name: 'GatewayError', status, errno, retryAfter, next, info, signed })
  }
}

export class Client {
  // onMessage gets each exchange, before the answer is judged: { request, answer }. `request` has method,
  // url, ts, nonce, hash, headers, body and normalized (null if it is not signed); `answer` has status,
  // headers, body, normalized (null likewise) and genuine.
  constructor(baseUrl, { onMessage = () => {} } = {}) {
    Object.assign(this, { baseUrl, onMessage, skew: 0, token: null, credentials: null, ways: {} })
  }

  // Seconds since the epoch, by the gateway's clock as far as it is known.
  now() {
    return Math.floor(Date.now() / 1000 + this.skew)
  }

  async call(method, path, body, { signed = true, again = true } = {}) {
    if (signed && !this.credentials) throw new Error('register() or resume(token) first')
    const text = body === undefined ? '' : JSON.stringify(body)
    const contentType = text && 'application/json'
    const url = new URL(path, this.baseUrl).href
    const nonce = base64url(crypto.getRandomValues(new Uint8Array(9)))
    const request = { method, url, ts: this.now(), nonce, hash: await payloadHash(contentType, text) }
    const headers = text ? { 'Content-Type': contentType } : {}
    if (signed) headers.Authorization = await authorization(this.credentials, request)

    const signal = AbortSignal.timeout(30_000)
    const found = await fetch(url, { method, headers, body: text || undefined, cache: 'no-store', signal })
    const data = new Uint8Array(await found.arrayBuffer())
    const kind = found.headers.get('Content-Type') ?? ''
    const seal = signed ? found.headers.get('Server-Authorization') : null
    const genuine = seal !== null && (await checkAnswer(this.credentials, request, seal, kind, data))

    const sent = { ...request, headers, body: text, normalized: signed ? normalizedRequest(request) : null }
    const answer = {
      status: found.status,
      headers: Object.fromEntries(found.headers),
      body: new TextDecoder().decode(data),
      normalized: seal && normalizedAnswer({ ...request, hash: await payloadHash(kind, data) }),
      genuine,
    }
    await this.onMessage({ request: sent, answer })
    // Only an error may come without a seal: of a proxy, or where our MAC was not right.
    if (signed && !genuine && (found.ok || seal)) throw new Error('the answer is not signed by the gateway')
    if (seal && again && (await this.setClock(found.headers.get('WWW-Authenticate')))) {
      return this.call(method, path, body, { again: false }) // once, with the right time
    }
    const json = kind.startsWith('application/json') ? JSON.parse(answer.body) : {}
    // The seal covers the body and no status; the body of an error says its own, as `code`.
    if (!found.ok || json.errno) throw new GatewayError(json.code ?? found.status, json, genuine)
    return json
  }

  // Set our clock by the time in a refusal, if the gateway signed that.
  async setClock(challenge) {
    const { ts, tsm } = fieldsOf(challenge)
    if (!ts || !(await isMac(this.credentials.key, tsm, `hawk.1.ts\n${ts}\n`))) return false
    this.skew = ts - Date.now() / 1000
    return true
  }

  // How a number can be verified: { mcc, mnc?, msisdn? }.
  discover(body) {
    return this.call('POST', '/discover', body, { signed: false })
  }

  // Open a session. Keep `client.token`, secret: a page that was reloaded goes on by resume(token).
  async register(body) {
    const answer = await this.call('POST', '/register', body, { signed: false })
    await this.resume(answer.msisdnSessionToken)
    this.ways = answer.verificationDetails ?? {}
    return answer
  }

  async resume(token) {
    Object.assign(this, { token, credentials: await deriveCredentials(token) })
  }

  // Have a PIN sent by SMS; { shortVerificationCode: false } asks for 32 hex digits.
  verify(msisdn, more = {}) {
    return this.call('POST', '/sms/verify', { msisdn, ...more })
  }

  // The other way round, after register({ mcc }): the phone texts `text` to `moVerifier`, and gets a long
  // code from `mtSender`. undefined where the gateway has no number for this network.
  moInfo() {
    const way = this.ways['sms/momt']
    return way && { ...way, text: this.credentials.id }
  }

  resend(body) {
    return this.call('POST', '/sms/resend_code', body)
  }

  // Return the code; with { publicKey } the answer has a `cert`, too, as from sign().
  verifyCode(code, more = {}) {
    return this.call('POST', '/sms/verify_code', { code, ...more })
  }

  // A proof. A JWK gives an SD-JWT, browserIdKey(jwk) a BrowserID certificate, and no key with
  // { format: 'jwt', audience, nonce } a JWT for one site.
  sign(publicKey, more = {}) {
    return this.call('POST', '/certificate/sign', { publicKey, ...more })
  }

  session() {
    return this.call('GET', '/session')
  }

  async unregister(body) {
    await this.call('POST', '/unregister', body)
    Object.assign(this, { token: null, credentials: null })
  }
}

// -- Keys and proofs ---------------------------------------------------------------

const ALGORITHMS = {
  ES256: { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' },
  RS256: {
    name: 'RSASSA-PKCS1-v1_5', modulusLength: 2048, publicExponent: Uint8Array.of(1, 0, 1), hash: 'SHA-256',
  },
}

// A pair for 'ES256' (SD-JWT) or 'RS256' (BrowserID, SD-JWT). Nobody can read its private half.
export const generateKey = (alg) => subtle.generateKey(ALGORITHMS[alg], false, ['sign', 'verify'])

// Its public half as a JWK.
export async function publicJwk({ publicKey }) {
  const { kty, crv, x, y, n, e } = await subtle.exportKey('jwk', publicKey)
  return kty === 'EC' ? { kty, crv, x, y } : { kty, n, e }
}

// An RSA key of BrowserID has decimal numbers, a JWK base64url.
export function browserIdKey({ n, e }) {
  const decimal = (text) => BigInt('0x' + hex(fromBase64url(text))).toString()
  return { algorithm: 'RS', n: decimal(n), e: decimal(e) }
}

export function jwkOfBrowserId({ n, e }) {
  const even = (digits) => digits.padStart(digits.length + (digits.length % 2), '0')
  const whole = (text) => base64url(fromHex(even(BigInt(text).toString(16))))
  return { kty: 'RSA', n: whole(n), e: whole(e) }
}

async function jws(header, claims, { privateKey }) {
  const text = [header, claims].map((part) => base64url(utf8.encode(JSON.stringify(part)))).join('.')
  const how = { name: privateKey.algorithm.name, hash: 'SHA-256' }
  return `${text}.${base64url(new Uint8Array(await subtle.sign(how, privateKey, utf8.encode(text))))}`
}
const algOf = ({ privateKey }) => (privateKey.algorithm.name === 'ECDSA' ? 'ES256' : 'RS256')

// An SD-JWT as one site is shown it: with a KB-JWT for its origin and nonce. `now` in seconds.
export async function present(cert, pair, audience, nonce, now) {
  const note = { aud: audience, nonce, iat: now, sd_hash: base64url(await sha256(cert)) }
  return cert + (await jws({ alg: algOf(pair), typ: 'kb+jwt' }, note, pair))
}

// A BrowserID certificate as one site is shown it: with an assertion that lives five minutes.
export async function assertion(cert, pair, audience, now) {
  return `${cert}~${await jws({ alg: algOf(pair) }, { exp: (now + 300) * 1000, aud: audience }, pair)}`
}
