// The phone: shows what the outbox has for its number, and texts to the gateway's webhook.
import { find, h } from './dom.mjs'
import { measure, offeredTo, parseOriginBound } from './sms.mjs'

const size = ({ encoding, units, segments, room }) =>
  `${encoding}: ${units} of ${room} units, ${segments} ${segments === 1 ? 'segment' : 'segments'}`

// The code in a message: the last word of its first line.
const codeIn = (text) => text.split('\n')[0].split(' ').at(-1)

export class Phone {
  // token: the operator's. useCode gets a code that the reader takes over. texted gets the webhook's call for
  // each message that the phone sent, { request, answer }.
  constructor(token, { useCode, texted }) {
    Object.assign(this, { token, useCode, texted, shown: [] })
    const [number, origin] = [find('#phone-number'), find('#phone-origin')]
    origin.value = location.origin
    number.addEventListener('change', () => this.look())
    origin.addEventListener('input', () => this.judge())
    find('#look').addEventListener('click', () => this.look())
    find('#compose-text').addEventListener('input', () => this.measure())
    find('#compose').addEventListener('submit', (event) => {
      event.preventDefault()
      this.text()
    })
    addEventListener('focus', () => this.look())
    this.measure()
    this.look()
  }

  get number() {
    return find('#phone-number').value.replace(/[^\d+]/g, '')
  }

  // The outbox's messages to its number, oldest first; none, with the reason shown, if it does not answer.
  async messages() {
    const query = new URLSearchParams({ to: this.number.replace('+', ''), token: this.token })
    const found = await fetch(`/outbox?${query}`, { cache: 'no-store' }).catch(() => null)
    const empty = find('#no-messages')
    empty.textContent = found?.ok
      ? 'No messages. The outbox keeps each for an hour.'
      : 'The outbox does not answer: start the gateway, and open the URL that it prints.'
    return found?.ok ? found.json() : []
  }

  // Show what has come.
  async look() {
    const messages = await this.messages()
    const same = this.shown.every((one, n) => JSON.stringify(one) === JSON.stringify(messages[n]))
    if (!same) {
      find('#messages').replaceChildren()
      this.shown = []
    }
    const fresh = messages.slice(this.shown.length)
    const list = find('#messages')
    list.append(...fresh.map((message) => this.bubble(message)))
    this.shown = messages
    find('#no-messages').hidden = messages.length > 0
    this.judge()
    if (fresh.length) find('#inbox').scrollTop = list.scrollHeight
  }

  bubble({ from, text, at }) {
    const code = codeIn(text)
    const time = new Date(1000 * at)
    return h(
      'li', { 'data-text': text },
      h('p', { class: 'small' }, `From ${from}, `, h('time', { datetime: time.toISOString() }, time.toLocaleTimeString())),
      h('p', { class: 'text' }, text),
      h('p', { class: 'small size' }, size(measure(text))),
      h('p', { class: 'small bound' }),
      h('button', { type: 'button', click: () => this.useCode(code) },
        `Write ${code.length > 10 ? `${code.slice(0, 6)}…` : code} into the client`),
    )
  }

  // Say of each message whether its last line binds the code to the page that waits.
  judge() {
    const origin = find('#phone-origin').value
    for (const bubble of find('#messages').children) {
      const found = parseOriginBound(bubble.dataset.text)
      const { offered, why } = offeredTo(found, origin)
      find('.bound', bubble).textContent = found.failure
        ? `No origin-bound code: ${found.failure}. A browser can only guess which word is the code, and for whom.`
        : `Origin-bound code ${found.code} for ${found.topLevelHost}. ${offered ? 'Offered' : 'Not offered'} to ${origin}: ${why}.`
    }
  }

  measure() {
    find('#compose-size').textContent = size(measure(find('#compose-text').value))
  }

  compose(text, to) {
    find('#compose-text').value = text
    if (to) find('#compose-to').value = to
    this.measure()
  }

  // What the provider does with a message from the phone: it calls the webhook, here in Vonage's shape.
  async text() {
    const fields = { msisdn: this.number.replace('+', ''), text: find('#compose-text').value }
    const to = find('#compose-to').value
    if (/\d/.test(to)) fields.to = to.replace(/\D/g, '')
    fields.messageId = `0A${crypto.randomUUID().replaceAll('-', '').slice(0, 14).toUpperCase()}`
    const url = new URL('/sms/momt/?provider=nexmo', location.origin).href
    const headers = { 'Content-Type': 'application/x-www-form-urlencoded' }
    const body = new URLSearchParams(fields).toString()
    const before = this.shown.length
    const found = await fetch(url, { method: 'POST', headers, body })
    const answer = { status: found.status, headers: Object.fromEntries(found.headers), body: await found.text() }
    await this.look()
    const came = this.shown.length - before
    const outcome = find('#compose-outcome')
    outcome.textContent = outcomeOf(answer, came)
    outcome.className = `outcome ${came ? 'good' : 'bad'}`
    await this.texted({ request: { method: 'POST', url, headers, body, normalized: null }, answer })
  }
}

function outcomeOf({ status, body }, came) {
  if (status !== 200) return `The webhook refused: ${status}: ${JSON.parse(body).message}.`
  if (came) return 'The gateway answered with a code.'
  return (
    'Nothing came back. The webhook answers 200 all the same, so that a provider never delivers the same ' +
    "garbage again; the gateway's log says why the message was not used."
  )
}
