// The page: its buttons, and the client behind them. The protocol is in client.mjs, which the gateway
// serves beside this file; its source is notebooks/client.mjs.
import {
  assertion, authorization, browserIdKey, checkAnswer, Client, GatewayError, generateKey, normalizedAnswer,
  normalizedRequest, payloadHash, present, publicJwk,
} from './client.mjs'
import { find, h, meanings, verbatim } from './dom.mjs'
import { card, exchange } from './exchange.mjs'
import { Phone } from './phone.mjs'
import { base64urlOf, checkBrowserId, checkSdJwt, decode } from './proof.mjs'
import { errorInWords, nextInWords, retryInWords } from './words.mjs'

// The operator's token stands in the path, /press/TOKEN/index.html. Out of the address with it, before
// somebody photographs the screen.
const token = location.pathname.split('/').at(-2)
find('link[rel=icon]').href = new URL('icon.svg', import.meta.url) // which is loaded later
history.replaceState(null, '', '/press')

// -- What the page remembers -----------------------------------------------------------

const client = new Client(location.origin, { onMessage })
let step = find('#step-open') // the one whose button was pressed: its messages go there
let recorded = null // the last signed request and its credentials, for who records it on the way
let held = null // the proof: { alg, pair, cert }
let stands = null // what the last answer said about the session: { next, at }

const phone = new Phone(token, {
  useCode(code) {
    find('#step-code [name=code]').value = code
    say(find('#step-code'), 'The code stands in the field. Press Verify.', '')
  },
  async texted(message) {
    await show(find('#step-text'), exchange(message))
  },
})

// -- Showing ----------------------------------------------------------------------------

// A step's outcome: its first sentence, whose kind is 'good', 'bad' or '', and more.
function say(where, words, kind, ...more) {
  const outcome = find('.outcome', where)
  outcome.className = `outcome ${kind}`
  outcome.replaceChildren(h('b', {}, words), ...more.flatMap((one) => [' ', one]))
}

async function show(where, made) {
  const card = await made
  for (const older of document.querySelectorAll('.exchange')) older.open = false
  find('.cards', where).prepend(card)
}

// Called with each exchange, in time for the session's credentials to be still there.
async function onMessage(message, credentials = client.credentials) {
  if (message.request.normalized) recorded = { request: message.request, credentials }
  const body = message.answer.headers['content-type'] === 'application/json' && JSON.parse(message.answer.body || '{}')
  if (body?.next) stands = { next: body.next, at: Date.now() }
  await show(step, exchange(message, credentials))
}

function showState() {
  const words = !client.credentials
    ? 'There is no session yet.'
    : stands
      ? nextInWords(stands.next, Math.round((Date.now() - stands.at) / 1000))
      : 'It is open. Nothing was asked for yet.'
  find('#state').textContent = client.credentials ? `Id ${client.credentials.id.slice(0, 8)}…. ${words}` : words
}
setInterval(showState, 1000)

// -- Steps -------------------------------------------------------------------------------

// What a reader did wrong, in words: nothing was sent.
class Hint extends Error {}

function needSession() {
  if (!client.credentials) throw new Hint('Register first: without a token there is nothing to sign with.')
}

let busy = false

// Have a form do something: `does` gets its fields, and gives the outcome's words, or all that say() takes.
function onSubmit(id, does) {
  const where = find(id)
  where.append(h('p', { class: 'outcome', role: 'status' }), h('div', { class: 'cards' }))
  find('form', where).addEventListener('submit', async (event) => {
    event.preventDefault()
    if (busy) return
    busy = true
    step = where
    where.setAttribute('aria-busy', 'true')
    try {
      const [words, kind = 'good', ...more] = [await does(Object.fromEntries(new FormData(event.target)))].flat()
      say(where, words, kind, ...more)
    } catch (error) {
      say(where, ...inWords(error))
    } finally {
      where.removeAttribute('aria-busy')
      busy = false
      showState()
      await phone.look()
    }
  })
}

function inWords(error) {
  if (error instanceof Hint) return [error.message, 'bad']
  if (error instanceof GatewayError) return refusal(error, 'bad')
  console.error(error)
  if (error instanceof TypeError) return [`Nothing came back (${error.message}). Is the gateway running?`, 'bad']
  return [`Refused by the client: ${error.message}.`, 'bad']
}

// What an error of the gateway says, when to ask again, what may be done next, and where it is explained.
function refusal(error, kind) {
  const { errno, retryAfter, next } = error
  const link = { href: `/errors#${errno}`, target: '_blank', rel: 'noopener' }
  return [
    errorInWords(error), kind,
    ...(retryAfter === undefined ? [] : [retryInWords(retryAfter)]),
    ...(next ? [nextInWords(next)] : []),
    ...(errno ? [h('a', link, `What errno ${errno} means`)] : []),
  ]
}

onSubmit('#step-open', async ({ mcc, mnc }) => {
  const body = document.body.dataset.flow === 'momt' && mcc ? { mcc, ...(mnc && { mnc }) } : undefined
  for (const old of document.querySelectorAll('.outcome, .cards')) old.replaceChildren()
  await client.register(body)
  stands = null
  held = null
  const way = client.moInfo()
  if (way) phone.compose(find('#compose-text').value, way.moVerifier)
  if (!body) return 'A session is open. From now on every request is signed.'
  if (way) return `A session is open. On this network a phone can text to ${way.moVerifier}.`
  return (
    'A session is open. The gateway names no number to text to on this network (setting mo_verifier), so a ' +
    'real client would go the other way. At a desk the webhook takes a message all the same.'
  )
})

onSubmit('#step-ask', async ({ msisdn, kind }) => {
  needSession()
  const before = phone.shown.length
  const { mtSender } = await client.verify(msisdn, { shortVerificationCode: kind === 'short' })
  await phone.look()
  const came = phone.shown.length - before
  const where = msisdn.replace(/[^\d+]/g, '') === phone.number ? 'this phone' : 'another phone'
  if (!came && where === 'this phone') return 'The same answer, and no second message: that was a double click.'
  return `An SMS from ${mtSender} is on its way to ${where}.`
})

onSubmit('#step-text', async () => {
  needSession()
  phone.compose(client.credentials.id, client.moInfo()?.moVerifier)
  return 'The id stands in the message on the phone. Press Send there.'
})

onSubmit('#step-resend', async () => {
  needSession()
  await client.resend()
  return 'A fresh code is on its way. The older one is dead.'
})

onSubmit('#step-code', async ({ code }) => {
  needSession()
  const { msisdn } = await client.verifyCode(code)
  if (stands) stands = { next: { ...stands.next, verified: true, triesLeft: 0, expiresIn: 0 }, at: stands.at }
  return `Verified: ${msisdn}. The code is used up.`
})

onSubmit('#step-proof', async ({ kind: alg }) => {
  needSession()
  const pair = await generateKey(alg)
  const jwk = await publicJwk(pair)
  const { cert } = await client.sign(alg === 'RS256' ? browserIdKey(jwk) : jwk)
  held = { alg, pair, cert }
  await show(step, anatomy(cert))
  return 'The gateway signed it. Anybody can read what it says, and nobody can change it.'
})

onSubmit('#step-show', async ({ audience, trick }) => {
  if (!held) throw new Hint('Get a proof first.')
  const nonce = base64urlOf(crypto.getRandomValues(new Uint8Array(12)))
  const shown = await madeFor({ audience, nonce, trick })
  const checks = await checked(shown, audience, nonce)
  await show(step, presentation(shown, checks, nonce))
  const wrong = checks.filter(({ ok }) => !ok).map(({ what }) => what)
  if (wrong.length) return [`The site refuses it. Not right: ${wrong.join('; ')}.`, 'bad']
  const { claims } = decode(shown.split('~')[0])
  return `The site believes it: ${claims.phone_number ?? claims.verifiedMSISDN}.`
})

onSubmit('#step-attack', async ({ trick }) => {
  if (trick === 'replay') {
    if (!recorded) throw new Hint('Send a signed request first.')
    return sendAgain(recorded.request, recorded.credentials)
  }
  needSession()
  if (trick === 'clock') {
    client.skew -= 3600
    await client.session()
    return (
      'The gateway refused the time, and signed its own (tsm in WWW-Authenticate). The client set its clock by ' +
      'that, and asked again.'
    )
  }
  const body = trick === 'body' ? JSON.stringify({ msisdn: find('#step-ask [name=msisdn]').value }) : ''
  const [method, path] = trick === 'body' ? ['POST', '/sms/verify'] : ['GET', '/session']
  const { id, key } = client.credentials
  const credentials = { id, key: trick === 'key' ? key.replace(/./g, '0') : key }
  const request = await signed(credentials, method, path, body)
  const changed = body.replace(/\d(?="})/, (digit) => (Number(digit) + 1) % 10)
  return sendAgain({ ...request, body: changed }, credentials)
})

onSubmit('#step-end', async () => {
  needSession()
  await client.unregister()
  stands = null
  held = null
  return 'The session is gone. Send the last signed request once more (above), and the token is unknown.'
})

onSubmitState()
function onSubmitState() {
  const where = find('.state')
  where.append(h('form', {}, h('div', { class: 'buttons' }, h('button', {}, 'Ask the gateway (GET /session)'))))
  onSubmit('.state', async () => {
    needSession()
    const { msisdn } = await client.session()
    return msisdn ? `Verified: ${msisdn}.` : 'So it stands. Asking changed nothing.'
  })
}

// -- Requests by hand ---------------------------------------------------------------------

async function signed(credentials, method, path, body) {
  const url = new URL(path, location.origin).href
  const contentType = body && 'application/json'
  const nonce = base64urlOf(crypto.getRandomValues(new Uint8Array(9)))
  const request = { method, url, ts: client.now(), nonce, hash: await payloadHash(contentType, body) }
  const headers = body ? { 'Content-Type': contentType } : {}
  headers.Authorization = await authorization(credentials, request)
  return { ...request, headers, body, normalized: normalizedRequest(request) }
}

// Send what was signed before, as whoever stands between client and gateway could.
async function sendAgain(request, credentials) {
  const { method, url, headers, body } = request
  const found = await fetch(url, { method, headers, body: body || undefined })
  const text = await found.text()
  const kind = found.headers.get('Content-Type') ?? ''
  const seal = found.headers.get('Server-Authorization')
  const answer = { status: found.status, headers: Object.fromEntries(found.headers), body: text }
  answer.genuine = seal !== null && (await checkAnswer(credentials, request, seal, kind, text))
  answer.normalized = seal && normalizedAnswer({ ...request, hash: await payloadHash(kind, text) })
  await onMessage({ request, answer }, credentials)
  return found.ok
    ? ['It was taken. That should not be.', 'bad']
    : refusal({ status: found.status, ...JSON.parse(text) }, 'good')
}

// -- Proofs ----------------------------------------------------------------------------------

const CLAIMS = {
  iss: 'issuer: who says so', vct: 'what kind of statement this is', iat: 'issued at', exp: 'expires at',
  cnf: "confirmation: the holder's public key", phone_number: 'the number', amr: 'how it was verified',
  phone_number_verified: 'and not only claimed', auth_time: 'when the code came back: a site bounds its age',
  method: 'which way', 'public-key': "the holder's public key", verifiedMSISDN: 'the number',
  principal: 'a pseudonym of the number at this gateway', lastAuthAt: 'when the code came back, in milliseconds',
  lastVerifiedAt: 'the same, in milliseconds', alg: 'algorithm', typ: 'type', kid: 'which of the published keys signed',
}

function anatomy(cert) {
  const { header, claims, signature } = decode(cert.split('~')[0])
  const rows = (part) => Object.entries(part).map(([name, value]) => [
    `${name}: ${JSON.stringify(value)}`, `${CLAIMS[name] ?? ''}${timeOf(value)}`,
  ])
  const heads = ['what it says', 'what that is']
  return card('The proof, decoded', [
    ['As it came', h('p', {}, 'Three pieces of base64url with dots between them.'), verbatim(cert)],
    ['Header', meanings('', rows(header), heads)],
    ['Claims', meanings('', rows(claims), heads)],
    ['Signature', h('p', {}, `${signature.length} bytes by the gateway, over the first two pieces as they stand there.`)],
  ])
}

// A time in a proof, to read: SD-JWT counts seconds, BrowserID milliseconds.
function timeOf(value) {
  if (typeof value !== 'number') return ''
  return `: ${new Date(value > 1e11 ? value : 1000 * value).toISOString().slice(0, 19)}Z`
}

function presentation(shown, checks, nonce) {
  const [proof, binding] = shown.split('~')
  const { header, claims } = decode(binding)
  const rows = checks.map(({ what, ok, found }) => [
    `${ok ? '✓ right' : ok === null ? '? not checked' : '✗ wrong'}: ${what}`, found,
  ])
  return card('What the site was shown', [
    ['What the client signed for this occasion', verbatim(JSON.stringify(header)), verbatim(JSON.stringify(claims, null, 1))],
    ['What it showed', h('p', {}, 'The proof, a ~, and the binding. The line break after the ~ is ours.'), verbatim(`${proof}~\n${binding}`)],
    ['What the site checked', h('p', {}, 'Its nonce: ', h('code', {}, nonce)), meanings('', rows, ['check', 'found'])],
  ])
}

const yesterday = 86400

// What the client shows to a site, with what goes wrong on the way.
async function madeFor({ audience, nonce, trick }) {
  const { alg } = held
  const now = client.now() - (trick === 'nonce' ? yesterday : 0)
  const origin = trick === 'audience' ? 'https://elsewhere.example' : audience
  const cert = trick === 'number' ? withAnotherNumber(held.cert) : held.cert
  const pair = trick === 'key' ? await generateKey(alg) : held.pair
  if (alg === 'RS256') return assertion(cert, pair, origin, now)
  return present(cert, pair, origin, trick === 'nonce' ? 'yesterdays-nonce' : nonce, now)
}

function withAnotherNumber(cert) {
  const [header, , signature] = cert.split('.')
  const { claims } = decode(cert.split('~')[0])
  const name = 'phone_number' in claims ? 'phone_number' : 'verifiedMSISDN'
  const text = JSON.stringify({ ...claims, [name]: '+447700900999' })
  return [header, base64urlOf(new TextEncoder().encode(text)), signature].join('.')
}

async function checked(shown, audience, nonce) {
  const get = async (path) => (await fetch(path)).json()
  const now = client.now()
  const { issuer } = await get('/.well-known/jwt-vc-issuer')
  if (held.alg === 'ES256') {
    return checkSdJwt(shown, { jwks: await get('/.well-known/jwks.json'), issuer, audience, nonce, now })
  }
  const wellKnown = await get('/.well-known/browserid')
  return checkBrowserId(shown, { wellKnown, host: new URL(issuer).host, audience, now })
}

// -- What else can be pressed ------------------------------------------------------------------

for (const radio of document.querySelectorAll('[name=flow]')) {
  radio.addEventListener('change', () => {
    document.body.dataset.flow = radio.value
  })
}
document.body.dataset.flow = find('[name=flow]:checked').value
find('#all-steps').addEventListener('change', ({ target }) => {
  if (target.checked) for (const made of document.querySelectorAll('.exchange')) made.revealAll()
})
showState()
