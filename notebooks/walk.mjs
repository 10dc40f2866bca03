import { randomUUID } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { Client, generateKey, present, publicJwk } from './client.mjs'
import { numberOfSdJwt } from './relying_party_webcrypto.mjs'

const gateway = process.env.GATEWAY ?? 'http://127.0.0.1:5000', number = '+447700900123'

// 1 and 2. The client.
const client = new Client(gateway)
await client.register()
await client.verify(number)

// The phone. Where there is no outbox, the user types the code.
const token = (await readFile('keys/operator.token', 'utf8')).trim()
const texts = await (await fetch(`${gateway}/outbox?to=${number.slice(1)}&token=${token}`)).json()
const code = texts.at(-1).text.split('\n')[0].split(' ').at(-1)

// 3. The code comes back, with a key: the answer holds a proof for an hour.
const pair = await generateKey('ES256')
const { msisdn, cert } = await client.verifyCode(code, { publicKey: await publicJwk(pair) })
console.log('verified:', msisdn)

// 4. A site gives a nonce, and gets the proof with a signature over it.
const site = 'https://shop.example', nonce = randomUUID()
const shown = await present(cert, pair, site, nonce, client.now())

// The site: it trusts this gateway, and has fetched its keys.
const jwks = await (await fetch(`${gateway}/.well-known/jwks.json`)).json()
console.log('proved:  ', await numberOfSdJwt(shown, jwks, gateway, site, nonce))

// 6.
await client.unregister()
