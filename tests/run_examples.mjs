// Makes the calls of notebooks/integrate/examples.json in JavaScript, one after the other, as
// tests/test_examples.py asks on stdin; the outcomes as one JSON on stdout.
import { readFileSync } from 'node:fs'

const { path, url, token, numbers, steps } = JSON.parse(readFileSync(0, 'utf8'))
const lib = await import(path)
const client = new lib.Client(url), outcomes = []
const [pair, rsa] = [await lib.generateKey('ES256'), await lib.generateKey('RS256')]
const AsyncFunction = (async () => {}).constructor
const newest = new Map()

async function code() {
  let found = ''
  for (const number of numbers) {
    const texts = await (await fetch(`${url}/outbox?to=${number.slice(1)}&token=${token}`)).json()
    if (texts.length > (newest.get(number)?.length ?? 0) || !found) found = texts.at(-1)?.text ?? found
    newest.set(number, texts)
  }
  return found.split('\n')[0].split(' ').at(-1)
}

for (const { javascript, form } of steps) {
  if (form) {
    const body = form.replace('{id}', client.credentials.id)
    const headers = { 'Content-Type': 'application/x-www-form-urlencoded' }
    const answer = await fetch(`${url}/sms/momt/?provider=nexmo`, { method: 'POST', headers, body })
    outcomes.push(await answer.json())
    continue
  }
  const names = { ...lib, client, pair, rsa, code: await code() }
  const call = new AsyncFunction(...Object.keys(names), `return ${javascript}`)
  try {
    outcomes.push((await call(...Object.values(names))) ?? {})
  } catch (error) {
    if (!(error instanceof lib.GatewayError)) throw error
    outcomes.push({ errno: error.errno })
  }
}
process.stdout.write(JSON.stringify(outcomes))
