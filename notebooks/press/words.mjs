// What answers mean, in words.

export function duration(seconds) {
  const [days, hours] = [Math.floor(seconds / 86400), Math.floor((seconds % 86400) / 3600)]
  const [minutes, rest] = [Math.floor((seconds % 3600) / 60), Math.round(seconds % 60)]
  const parts = [[days, 'd'], [hours, 'h'], [minutes, 'min'], [rest, 's']]
  return parts.filter(([n]) => n).slice(0, 2).map(([n, unit]) => `${n} ${unit}`).join(' ') || '0 s'
}

const count = (n, one, many) => (n === 0 ? `no ${one}` : n === 1 ? `one ${one}` : `${n} ${many}`)

// `next` as the gateway gave it, `ago` seconds later.
export function nextInWords({ resendIn, sendsLeft, triesLeft, expiresIn, verified }, ago = 0) {
  const [wait, life] = [Math.max(0, resendIn - ago), Math.max(0, expiresIn - ago)]
  return [
    verified ? 'The number is verified.' : 'No number is verified.',
    wait ? `Another message may be asked for in ${duration(wait)};` : 'Another message may be asked for now;',
    `${count(sendsLeft, 'message is', 'messages are')} left.`,
    life && triesLeft
      ? `A code waits: it bears ${count(triesLeft, 'wrong try', 'wrong tries')} and lives ${duration(life)}.`
      : 'No code waits.',
  ].join(' ')
}

// An error of the gateway.
export function errorInWords({ status, errno, message }) {
  return `Refused: ${status}${errno ? `, errno ${errno}` : ''}: ${message.replace(/\.$/, '')}.`
}

export function retryInWords(retryAfter) {
  const at = new Date(Date.now() + 1000 * retryAfter).toLocaleTimeString()
  return `Retry-After is ${retryAfter}: a client asks again in ${duration(retryAfter)}, at ${at}.`
}

const PHRASES = {
  200: 'OK', 204: 'No Content', 400: 'Bad Request', 401: 'Unauthorized', 403: 'Forbidden', 404: 'Not Found',
  410: 'Gone', 411: 'Length Required', 413: 'Content Too Large', 415: 'Unsupported Media Type',
  429: 'Too Many Requests', 500: 'Internal Server Error', 503: 'Service Unavailable',
}

export const statusLine = (status) => `${status} ${PHRASES[status] ?? ''}`.trim()
