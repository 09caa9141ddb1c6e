// Requests to this page's own server. Nothing here knows another host.

/** A request that failed, in words: `title` is what happened, `advice` is what to do, `action` is a button or "". */
export class Problem extends Error {
  constructor({ code = "page_server_lost", title, advice, action = "" }) {
    super(title);
    Object.assign(this, { code, title, advice, action });
  }
}

const LOST = {
  title: "The page cannot reach its own server.",
  advice: "Check that `make web` still runs. The page goes on by itself when it is back.",
};

/** Send a request and return the parsed reply. Throw a `Problem` for any failure. */
export async function send(method, path, body, { signal } = {}) {
  const reply = await start(method, path, body, signal);
  return reply.status === 204 ? null : reply.json();
}

/** Send a question and call `onEvent(name, data)` for each server-sent event of the reply. */
export async function stream(path, body, onEvent) {
  const reply = await start("POST", path, body);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    const { done, value } = await reader.read().catch(() => ({ done: true }));
    if (done) break;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const { name, data } = parse(block);
      ended ||= name !== "piece";
      onEvent(name, data);
    }
  }
  if (!ended) throw new Problem({ ...LOST, title: "The answer broke off: the page lost its own server.", action: "retry" });
}

function parse(block) {
  const [first, second] = block.split("\n");
  return { name: first.slice("event: ".length), data: JSON.parse(second.slice("data: ".length)) };
}

async function start(method, path, body, signal) {
  const isBlob = body instanceof Blob;
  const headers = body === undefined ? {} : { "Content-Type": isBlob ? "application/octet-stream" : "application/json" };
  const content = body === undefined || isBlob ? body : JSON.stringify(body);
  let reply;
  try {
    reply = await fetch(path, { method, headers, body: content, signal, cache: "no-store", credentials: "same-origin" });
  } catch {
    throw new Problem(LOST);
  }
  if (reply.ok) return reply;
  const found = await reply.json().catch(() => ({}));
  throw new Problem(found.problem ?? { ...LOST, title: `The page's server answered with status ${reply.status}.` });
}
