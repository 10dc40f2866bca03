// Walks with notebooks/client.mjs, as tests/test_clients.py asks on stdin; one JSON on stdout.
// What the phone sees it asks from /outbox, and what it texts it gives to the webhook, as a provider does.
import { readFileSync } from 'node:fs'

const { client: path, url, token, walk, number, site, calls } = JSON.parse(readFileSync(0, 'utf8'))
const lib = await import(path)
const { Client, GatewayError, assertion, browserIdKey, generateKey, present, publicJwk } = lib

const messages = []
const client = Client && new Client(url, { onMessage: (message) => messages.push(message) })
const texts = async () => (await fetch(`${url}/outbox?to=${number.slice(1)}&token=${token}`)).json()
const code = async () => (await texts()).at(-1).text.split('\n')[0].split(' ').at(-1)

async function refusal(promise) {
  try {
    await promise
  } catch (error) {
    if (!(error instanceof GatewayError)) return { name: error.name, message: error.message }
    return { ...error, message: error.message }
  }
  return null
}

const walks = {
  async mt() {
    const ways = await client.discover({ msisdn: number })
    const opened = await client.register({ msisdn: number, mcc: '234' })
    const mo = client.moInfo() ?? null
    const early = await refusal(client.sign({}))
    const asked = await client.verify(number)
    const wrong = await refusal(client.verifyCode('000000'))
    const again = await client.resend()
    const pair = await generateKey('ES256')
    const verified = await client.verifyCode(await code(), { publicKey: await publicJwk(pair) })
    const state = await client.session()
    const rsa = await generateKey('RS256'), browserid = browserIdKey(await publicJwk(rsa))
    const { cert } = await client.sign(browserid)
    const jwt = (await client.sign(undefined, { format: 'jwt', ...site })).cert
    const sdRsa = (await client.sign(await publicJwk(rsa))).cert
    const now = client.now(), { credentials, token: secret } = client
    const shown = [
      await present(verified.cert, pair, site.audience, site.nonce, now),
      await present(sdRsa, rsa, site.audience, site.nonce, now),
    ]
    const backed = await assertion(cert, rsa, site.audience, now)
    const reloaded = new Client(url)
    await reloaded.resume(client.token)
    const resumed = await reloaded.session()
    await client.unregister()
    const gone = await refusal(reloaded.session())
    const keys = [browserid, lib.jwkOfBrowserId(browserid), await publicJwk(rsa)]
    return { ways, opened, mo, early, asked, wrong, again, verified, state, resumed, jwt, shown, backed, gone, keys,
      credentials, secret }
  },
  async mo() {
    await client.register({ mcc: '214', mnc: '07' })
    const info = client.moInfo()
    const body = new URLSearchParams({ msisdn: number.slice(1), text: info.text, messageId: '0A1' })
    const webhook = await fetch(`${url}/sms/momt/?provider=nexmo`, { method: 'POST', body })
    const text = (await texts()).at(-1).text
    return { info, webhook: webhook.status, text, verified: await client.verifyCode(text), credentials: client.credentials }
  },
  async clock() {
    const { now } = Date
    Date.now = () => now() - 3_600_000
    await client.register()
    const states = [await client.session(), await client.session()]
    return { states, skew: client.skew }
  },
  async tampered() {
    await client.register()
    const found = {}
    for (const how of calls) found[how] = await refusal(client.call('GET', `/session?${how}`))
    return found
  },
  async parts() { // functions alone, of vectors.json
    const found = []
    for (const [name, ...args] of calls) {
      try {
        found.push(await lib[name](...args))
      } catch (error) {
        found.push({ error: error.message })
      }
    }
    return found
  },
}
const found = await walks[walk]()
process.stdout.write(JSON.stringify({ found, messages }))
