// One message and its answer, as a card of steps: how it was made, what went over the wire, what came back.
import { deriveCredentials } from './client.mjs'
import { find, h, meanings, verbatim } from './dom.mjs'
import { statusLine } from './words.mjs'

// A card, of parts [title, ...elements]. They are shown one at a time, unless the reader wants all.
export function card(title, parts) {
  const all = find('#all-steps').checked
  const items = parts.map(([name, ...content], n) =>
    h('li', { hidden: n > 0 && !all }, h('h4', {}, name), ...content),
  )
  const next = h('button', { type: 'button', class: 'next', click: () => reveal(1) })
  function reveal(many) {
    const hidden = items.filter((item) => item.hidden)
    for (const item of hidden.slice(0, many)) item.hidden = false
    const left = hidden.slice(many)
    next.hidden = left.length === 0
    if (left.length) next.textContent = `Next: ${find('h4', left[0]).textContent}`
  }
  reveal(0)
  const list = h('ol', { class: 'parts', 'aria-live': 'polite' }, items)
  const details = h('details', { class: 'exchange', open: true }, h('summary', {}, title), list, next)
  details.revealAll = () => reveal(items.length)
  return details
}

function onTheWire({ method, url, headers, body }) {
  const { host, pathname, search } = new URL(url)
  const lines = [`${method} ${pathname}${search} HTTP/1.1`, `Host: ${host}`]
  lines.push(...Object.entries(headers).map(([name, value]) => `${name}: ${value}`))
  return verbatim([...lines, '', body].join('\n'))
}

function answerOf({ status, headers, body }) {
  const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}`)
  return verbatim([`HTTP/1.1 ${statusLine(status)}`, ...lines, '', body].join('\n'))
}

const LINES = {
  'hawk.1.header': 'what these lines are, and their version: the MAC of a request fits no answer',
  'hawk.1.response': 'what these lines are: the MAC of an answer fits no request',
}

// The lines that a MAC covers, with their meanings.
function normalizedLines(text, ofAnswer) {
  const [title, ts, nonce, method, path, host, port, hash] = text.split('\n')
  const same = ofAnswer ? 'of the request: ' : ''
  return meanings('Normalised string: nine lines, each ending with a line feed', [
    [title, LINES[title]],
    [ts, `${same}its time, in seconds since 1970; too far from the gateway's clock is refused`],
    [nonce, `${same}its nonce, a number used once: the same signed request never works twice`],
    [method, `${same}the method`],
    [path, `${same}path and query, as sent`],
    [host, `${same}the host that the client means: a signature for one server is worth nothing to another`],
    [port, `${same}its port`],
    [hash, ofAnswer ? "the hash of the answer's body" : 'the payload hash: it binds the body to the signature'],
    ['', 'ext, which this protocol does not use'],
  ], ['line', 'what it is'])
}

const field = (header, name) => new RegExp(`${name}="([^"]*)"`).exec(header ?? '')?.[1] ?? ''

function hashed(body, contentType, hash) {
  const payload = `hawk.1.payload\n${contentType.split(';')[0]}\n${body}\n`
  return [
    verbatim(payload),
    h('p', {}, 'SHA-256 of these lines, in base64: ', h('code', { class: 'hash' }, hash)),
  ]
}

function signedParts({ request, answer }, credentials) {
  const sent = request.headers.Authorization
  const seal = answer.headers['server-authorization']
  return [
    [
      request.body ? 'The body and its hash' : 'No body: the hash of nothing',
      h('p', {}, request.body
        ? 'The media type and the body, byte by byte. Who changes one of them must change the hash.'
        : 'The lines of the media type and of the body are empty, and hashed all the same.'),
      ...hashed(request.body, request.headers['Content-Type'] ?? '', request.hash),
    ],
    ['What the signature covers', normalizedLines(request.normalized, false)],
    [
      'The MAC',
      h('p', {}, 'HMAC-SHA256 over these lines. Its key is that of the session: the 64 hex digits, as text.'),
      meanings('', [
        [credentials.key, 'the key, which never travels'],
        [field(sent, 'mac'), 'the MAC, in base64'],
      ]),
    ],
    [
      'The request on the wire',
      h('p', {}, 'The browser adds headers of its own; the signature does not cover them.'),
      onTheWire(request),
    ],
    ['The answer', answerOf(answer)],
    [
      "The answer's signature",
      ...(seal ? sealParts(answer, seal) : [unsealed(answer)]),
    ],
  ]
}

function sealParts(answer, seal) {
  const verdict = answer.genuine
    ? 'The same MAC as in Server-Authorization: only who has the key can have written this answer.'
    : 'Not the MAC in Server-Authorization: this answer is not believed.'
  return [
    ...hashed(answer.body, answer.headers['content-type'] ?? '', field(seal, 'hash')),
    normalizedLines(answer.normalized, true),
    h('p', {}, 'HMAC-SHA256 with the same key: ', h('code', {}, field(seal, 'mac'))),
    h('p', { class: answer.genuine ? 'good' : 'bad' }, verdict),
  ]
}

function unsealed({ status }) {
  const why = status === 401 ? 'The gateway signs an answer only where the MAC of its request was right.' : ''
  return h('p', { class: 'bad' }, `There is no Server-Authorization: anybody may have said this. ${why}`)
}

async function derivation(token) {
  const { id, key } = await deriveCredentials(token)
  return [
    'From the token to id and key',
    h('p', {}, 'HKDF-SHA256 makes 64 bytes from the token: two values of which neither tells the other.'),
    meanings('HKDF', [
      [token, 'the token: input key material, 32 bytes'],
      ['none', 'salt'],
      ['identity.mozilla.com/picl/v1/sessionToken', 'info: what the output is for'],
      [id, 'id: bytes 0 to 31, in hex. Every request names it'],
      [key, 'key: bytes 32 to 63, in hex. It signs, and never travels'],
    ]),
  ]
}

// The card of an exchange, as the client's onMessage gives it.
export async function exchange(message, credentials) {
  const { request, answer } = message
  const { pathname, search } = new URL(request.url)
  const sealed = request.normalized ? `, ${answer.genuine ? 'signed' : 'not signed'}` : ''
  const title = `${request.method} ${pathname}${search} → ${statusLine(answer.status)}${sealed}`
  if (request.normalized) return card(title, signedParts(message, credentials))
  const parts = [['The request on the wire', onTheWire(request)], ['The answer', answerOf(answer)]]
  const token = /"msisdnSessionToken": *"([0-9a-f]{64})"/.exec(answer.body)?.[1]
  return card(title, token ? [...parts, await derivation(token)] : parts)
}
