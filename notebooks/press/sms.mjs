// What a phone and a browser find in the text of an SMS: its size, and the origin-bound code in it.

// The GSM 7-bit default alphabet, and the signs that take two places in it.
// Source: 3GPP TS 23.038, section 6.2.1.
const GSM7 = new Set(
  '@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !"#¤%&\'()*+,-./0123456789:;<=>?¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§' +
    '¿abcdefghijklmnopqrstuvwxyzäöñüà',
)
const GSM7_TWICE = new Set('\f^{}\\[~]|€')

// The size of a text as an SMS: encoding, units of 7 or 16 bits, how many fit into this many segments.
// A message in parts has a header in each, which leaves 153 or 67 units; no sign is cut in two.
export function measure(text) {
  const signs = Array.from(text)
  const isGsm7 = signs.every((sign) => GSM7.has(sign) || GSM7_TWICE.has(sign))
  const encoding = isGsm7 ? 'GSM-7' : 'UCS-2'
  const [alone, part] = isGsm7 ? [160, 153] : [70, 67]
  const sizes = signs.map((sign) => (isGsm7 ? 1 + GSM7_TWICE.has(sign) : sign.length))
  const units = sizes.reduce((sum, size) => sum + size, 0)
  if (units <= alone) return { encoding, units, segments: 1, room: alone }
  let segments = 1
  let used = 0
  for (const size of sizes) {
    if (used + size > part) {
      segments += 1
      used = 0
    }
    used += size
  }
  return { encoding, units, segments, room: segments * part }
}

// -- Origin-bound one-time codes ----------------------------------------------------
// Source: WICG, "Origin-bound one-time codes delivered via SMS", sections 2.1 (Usage) and 3.2
// (Parsing). The names are the specification's.

const ASCII_WHITESPACE = /[\t\n\f\r ]/

function extractMarkedToken(line, position, marker) {
  if (line[position] !== marker) return null
  const rest = line.slice(position + 1)
  const end = rest.search(ASCII_WHITESPACE)
  return (end < 0 ? rest : rest.slice(0, end)) || null
}

// Parse a message. Gives { line, topLevelHost, code, embeddedHost }, or { line, failure } with the step
// that failed, in words.
export function parseOriginBound(message) {
  const line = message.replace(/\r\n?/g, '\n').split('\n').at(-1)
  const topLevelHost = extractMarkedToken(line, 0, '@')
  if (topLevelHost === null) return { line, failure: 'its last line does not begin with @ and a host' }
  let position = 1 + topLevelHost.length
  if (line[position] !== ' ') return { line, failure: 'no single space follows the host' }
  const code = extractMarkedToken(line, position + 1, '#')
  if (code === null) return { line, failure: 'after the host and one space there is no # with a code' }
  position += 2 + code.length
  const embeddedHost = line[position] === ' ' ? extractMarkedToken(line, position + 1, '%') : null
  return { line, topLevelHost, code, embeddedHost }
}

// Whether a browser would offer a parsed code to the top-level page of an origin: { offered, why }.
// "Same site" asks the Public Suffix List, which this page does not have: hosts of which one ends with
// the other count as the same site here.
export function offeredTo({ topLevelHost, embeddedHost, failure }, origin) {
  const no = (why) => ({ offered: false, why })
  if (failure) return no('the message has no origin-bound code')
  if (embeddedHost !== null) return no(`the code is for a frame of ${embeddedHost}, not for a whole page`)
  const page = hostOf(origin)
  if (!page) return no('that is no origin')
  if (!origin.startsWith('https:')) return no('these codes are for https: pages only')
  const [short, long] = [hostOf(`https://${topLevelHost}`), page].sort((a, b) => a.length - b.length)
  if (short === long) return { offered: true, why: 'the host is that of the page' }
  if (short.includes('.') && long.endsWith(`.${short}`)) {
    return { offered: true, why: 'one host is a subdomain of the other: the same site' }
  }
  return no(`the code is for ${topLevelHost}, and the page is of another site`)
}

// The host name in a URL; '' if it is none.
function hostOf(url) {
  try {
    return new URL(url).hostname
  } catch {
    return ''
  }
}
