// Calls the proxy and reads its reply exactly as the browser SDK does: it splits at \n, looks only at
// lines that begin with "data: " or "error: ", and stops at the chunk with isLast. What it has seen so
// far stands in `seen` for the test to read.
let seen, controller;

function ask(url, body, headers = {}) {
  controller = new AbortController();
  seen = {status: 0, headers: {}, text: "", chunks: [], json: null, refusal: null, failure: null, done: false};
  call(url, body, headers).catch(({name, message, statusCode, code}) => {
    seen.failure = {name, message, statusCode, code};
  }).finally(() => { seen.done = true; });
}

async function call(url, body, headers) {
  const reply = await fetch(url, {
    method: "POST",
    headers: {"Content-Type": "application/json", Accept: "text/event-stream", ...headers},
    body: JSON.stringify(body),
    signal: controller.signal,
  });
  seen.status = reply.status;
  seen.headers = Object.fromEntries(reply.headers); // those alone that CORS lets a page read
  if (!reply.ok) seen.refusal = await reply.json();
  else if (reply.headers.get("content-type").includes("application/json")) seen.json = await reply.json();
  else await read(reply.body.getReader());
}

async function read(reader) {
  const decoder = new TextDecoder();
  for (let rest = "";;) {
    const {done, value} = await reader.read();
    if (done) break;
    const lines = (rest + decoder.decode(value, {stream: true})).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("error: ")) {
        throw Object.assign(new Error(), {name: "ProviderAPIError"}, JSON.parse(line.slice(7)));
      }
      if (!line.startsWith("data: ")) continue;
      const chunk = JSON.parse(line.slice(6));
      seen.chunks.push(chunk);
      seen.text += chunk.token;
      document.getElementById("answer").textContent = seen.text;
      if (chunk.isLast) return reader.cancel();
    }
  }
  if (!seen.chunks.length) throw new Error("No tokens received");
}
