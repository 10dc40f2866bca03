// An SMSC over SMPP, on npm's smpp: node smpp_sim.js PORT FOLDER
// Numbers ending in 11 are rejected, in 58 throttled once, in 13 never delivered.
// Each message taken is one line of JSON on stdout.
const smpp = require(process.argv[3] + "/.parts/smpp/node_modules/smpp");

const throttled = new Set();
let next = 1;

function receipt(session, pdu, id, state, status) {
  const text = `id:${id} sub:001 dlvrd:001 submit date:2611220900 done date:2611220901 ` +
    `stat:${state} err:000 text:${String(pdu.short_message.message).slice(0, 20)}`;
  session.deliver_sm({
    source_addr: pdu.destination_addr, destination_addr: pdu.source_addr, esm_class: 4,
    short_message: text, receipted_message_id: id, message_state: status,
  });
}

const server = smpp.createServer((session) => {
  session.on("error", () => {});
  session.on("bind_transceiver", (pdu) => session.send(pdu.response()));
  session.on("enquire_link", (pdu) => session.send(pdu.response()));
  session.on("unbind", (pdu) => { session.send(pdu.response()); session.close(); });
  session.on("submit_sm", (pdu) => {
    const to = pdu.destination_addr;
    if (to.endsWith("11")) return session.send(pdu.response({ command_status: 0x0b }));
    if (to.endsWith("58") && !throttled.has(to)) {
      throttled.add(to);
      return session.send(pdu.response({ command_status: 0x58 }));
    }
    const id = String(next++);
    session.send(pdu.response({ message_id: id }));
    console.log(JSON.stringify({ from: pdu.source_addr, to, text: pdu.short_message.message }));
    if (to.endsWith("13")) receipt(session, pdu, id, "UNDELIV", 5);
    else receipt(session, pdu, id, "DELIVRD", 2);
  });
});
server.listen(Number(process.argv[2]), "127.0.0.1");
