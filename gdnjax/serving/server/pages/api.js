// What the page asks of the server. Addresses are relative, so that the page also works behind a path of a proxy.

const STORED_KEY = "gdnjax-api-key";

export class ApiError extends Error {
  // status: of HTTP; 0 where the server did not answer, 200 for an error within a stream.
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(STORED_KEY, key);
}

function headers() {
  const key = sessionStorage.getItem(STORED_KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function messageOf(body) {
  if (typeof body?.error?.message === "string") return body.error.message;
  if (typeof body?.error === "string") return body.error;
  if (body?.detail) return typeof body.detail === "string" ? body.detail : JSON.stringify(body.detail);
  return null;
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers }, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.", 0);
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = null;
  try {
    message = messageOf(JSON.parse(text));
  } catch {
    message = text.slice(0, 500);
  }
  throw new ApiError(message || `The server answered ${response.status}.`, response.status);
}

export async function getJson(path) {
  return (await ask(path, {})).json();
}

// The data of server-sent events, one string each. Lines end in LF, CR or CRLF, wherever pieces are cut.
export async function* eventsOf(pieces) {
  let rest = "";
  let data = [];
  for await (const piece of pieces) {
    rest += piece;
    // A CR at the end may be half of a CRLF.
    const whole = rest.endsWith("\r") ? rest.slice(0, -1) : rest;
    const lines = whole.split(/\r\n|\n|\r/);
    rest = lines.pop() + rest.slice(whole.length);
    for (const line of lines) {
      if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
      }
    }
  }
}

async function* textOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.releaseLock();
  }
}

// The chunks of a streamed chat completion. Throws ApiError, also for an error that comes in the stream and for a
// stream that ends without its last event.
export async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let ended = false;
  try {
    for await (const data of eventsOf(textOf(response.body))) {
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(messageOf(chunk) ?? "The server reports an error.", 200);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection to the server was lost.", 0);
  }
  if (!ended) throw new ApiError("The connection to the server was lost.", 0);
}
