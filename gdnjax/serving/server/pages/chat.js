// The conversation: what is sent, what comes, and how it is shown.

import { ApiError, streamChat } from "./api.js";
import { copyButton, h, oncePerFrame } from "./dom.js";
import { codeBlock, Prose } from "./markdown.js";
import { Settings } from "./settings.js";

const $ = (id) => document.getElementById(id);

const SUGGESTIONS = [
  "A box has 3 apples. 4 more are put in. How many apples are in the box?",
  "Tell me a short story about a fox.",
  "What is 31 + 46?",
];

// So near to its end the conversation follows what is written.
const NEAR_PX = 60;

export class Chat {
  constructor({ onUnauthorised }) {
    this.onUnauthorised = onUnauthorised;
    this.settings = new Settings();
    this.messages = [];
    this.running = null;
    this.follows = true;
    this.placed = 0;

    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("message").addEventListener("keydown", (event) => {
      // An input method's Enter chooses a word.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    $("message").addEventListener("input", () => this.fitMessage());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      if (this.running) this.stop();
      else this.settings.close();
    });
    $("stop").addEventListener("click", () => this.stop());
    $("new-chat").addEventListener("click", () => this.begin());
    $("log").addEventListener("scroll", () => this.scrolled());
    $("down").addEventListener("click", () => this.toEnd());
    $("suggestions").append(
      ...SUGGESTIONS.map((text) => {
        const ask = () => {
          $("message").value = text;
          this.send();
        };
        return h("li", {}, h("button", { type: "button", onclick: ask }, text));
      }),
    );
  }

  setModels(models) {
    // Of several names of one model the first.
    const roots = models.map((model) => model.root ?? model.id);
    this.settings.setModels(models.filter((_, index) => roots.indexOf(roots[index]) === index).map((model) => model.id));
    const [first] = models;
    const length = first?.max_model_len;
    const room = length ? `, up to ${length.toLocaleString("en")} tokens of conversation` : "";
    $("model-facts").textContent = first ? `${first.id}${room}. Nothing leaves this server.` : "";
  }

  // Forgets the conversation.
  begin() {
    this.stop();
    this.messages = [];
    for (const turn of $("log").querySelectorAll(".turn")) turn.remove();
    $("empty").hidden = false;
    $("message").focus();
  }

  stop() {
    this.running?.abort();
  }

  send() {
    const text = $("message").value;
    if (this.running || !text.trim() || !this.settings.read()) return;
    $("message").value = "";
    this.fitMessage();
    this.messages.push({ role: "user", content: text });
    this.show(h("article", { class: "turn user" }, h("h3", { class: "who" }, "You"), h("div", { class: "text" }, text)));
    this.answer();
  }

  // Asks for the next message, on what has been said so far.
  async answer() {
    const given = this.settings.read();
    if (!given || this.running) return;
    const { system, model, ...options } = given;
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.messages];
    const conversation = this.messages;
    const turn = new Turn(model, {
      again: () => this.again(turn),
      giveResults: (results) => this.giveResults(results),
      grown: () => this.grown(),
    });
    this.show(turn.element);
    this.setRunning(new AbortController());
    try {
      const stream_options = { include_usage: true, continuous_usage_stats: true };
      const body = { model, messages, stream: true, stream_options, ...options };
      for await (const chunk of streamChat(body, this.running.signal)) turn.take(chunk);
      turn.end();
    } catch (error) {
      if (error.name === "AbortError") turn.end("stopped");
      else {
        turn.fail(error instanceof ApiError ? error.message : String(error));
        if (error.status === 401) this.onUnauthorised(false);
        if (!(error instanceof ApiError)) console.error(error);
      }
    } finally {
      this.setRunning(null);
    }
    // After "New chat" the old conversation is nobody's.
    turn.message = turn.asMessage();
    if (turn.message && conversation === this.messages) this.messages.push(turn.message);
    this.grown();
  }

  again(turn) {
    if (this.running) return;
    if (turn.message && this.messages.at(-1) === turn.message) this.messages.pop();
    turn.element.remove();
    this.answer();
  }

  giveResults(results) {
    this.messages.push(...results);
    this.answer();
  }

  setRunning(controller) {
    this.running = controller;
    const focused = document.activeElement;
    $("stop").hidden = !controller;
    $("send").hidden = Boolean(controller);
    // A button that vanishes takes the focus with it.
    if (focused === $("stop") || focused === $("send")) $("message").focus();
  }

  show(element) {
    $("empty").hidden = true;
    $("log").append(element);
    this.toEnd();
  }

  toEnd() {
    this.follows = true;
    $("log").scrollTop = $("log").scrollHeight;
    this.placed = $("log").scrollTop;
    $("down").hidden = true;
  }

  grown() {
    // Who has just scrolled up is further up than we left him, before the event that tells of it.
    if (this.follows && $("log").scrollTop >= this.placed - 1) this.toEnd();
  }

  scrolled() {
    const log = $("log");
    this.placed = log.scrollTop;
    this.follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
    $("down").hidden = this.follows;
  }

  fitMessage() {
    const message = $("message");
    message.style.height = "auto";
    message.style.height = `${message.scrollHeight}px`;
  }
}

// One answer of the model, while it comes and afterwards.
class Turn {
  constructor(model, { again, giveResults, grown }) {
    this.giveResults = giveResults;
    this.grown = grown;
    this.reasoning = "";
    this.content = "";
    this.calls = [];
    this.usage = null;
    this.finishReason = null;
    this.asked = performance.now();
    this.firstAt = null;
    this.lastAt = null;
    this.firstTokens = 0;
    this.thoughtUntil = null;
    this.isOver = false;

    this.thought = h("div");
    this.thinkingLabel = h("summary", {}, "Thinking…");
    this.thinking = h("details", { class: "thinking", hidden: true }, this.thinkingLabel, this.thought);
    this.prose = new Prose();
    this.callsElement = h("div", { class: "calls" });
    this.numbers = h("span", { class: "numbers" });
    this.wrong = h("p", { class: "wrong", role: "alert", hidden: true });
    this.buttons = h("span", { hidden: true });
    this.buttons.append(
      copyButton(() => this.content) ?? "",
      h("button", { type: "button", class: "quiet again", onclick: again }, "Again"),
    );
    this.cursor = h("span", { class: "waiting", role: "img", "aria-label": "writing" });
    this.element = h(
      "article",
      { class: "turn assistant", "aria-busy": "true" },
      h("h3", { class: "who" }, model),
      this.thinking,
      this.prose.element,
      this.callsElement,
      this.cursor,
      this.wrong,
      h("footer", { class: "facts" }, this.numbers, this.buttons),
    );
    this.draw = oncePerFrame(() => this.drawNow());
  }

  take(chunk) {
    const now = performance.now();
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (choice) {
      const delta = choice.delta ?? {};
      const thought = delta.reasoning_content ?? delta.reasoning ?? "";
      this.reasoning += thought;
      this.content += delta.content ?? "";
      for (const piece of delta.tool_calls ?? []) this.takeCall(piece);
      if (choice.finish_reason) this.finishReason = choice.finish_reason;
      if (thought || delta.content || delta.tool_calls?.length) {
        if (this.firstAt === null) {
          this.firstAt = now;
          this.firstTokens = this.usage?.completion_tokens ?? 1;
        }
        this.lastAt = now;
      }
      if (this.reasoning && !thought && (delta.content || delta.tool_calls?.length)) this.thoughtUntil ??= now;
    }
    this.draw();
  }

  takeCall({ index, id, function: part }) {
    this.calls[index] ??= { id: "", type: "function", function: { name: "", arguments: "" } };
    const call = this.calls[index];
    if (id) call.id = id;
    if (part?.name) call.function.name += part.name;
    if (part?.arguments) call.function.arguments += part.arguments;
  }

  // `why`: "stopped" where the reader has stopped it.
  end(why = null) {
    this.why = why;
    this.close();
    // A result belongs to a whole call.
    if (!why && this.calls.length) this.askForResults();
  }

  fail(message) {
    this.wrong.textContent = message;
    this.wrong.hidden = false;
    this.failed = true;
    this.close();
  }

  close() {
    this.isOver = true;
    this.element.removeAttribute("aria-busy");
    this.cursor.remove();
    this.buttons.hidden = false;
    this.drawNow();
  }

  // What it is to the next request; null where nothing whole has come.
  asMessage() {
    const whole = !this.failed && !this.why;
    if (!this.content && !(whole && (this.calls.length || this.reasoning))) return null;
    const message = { role: "assistant", content: this.content || null };
    if (this.reasoning) message.reasoning_content = this.reasoning;
    if (whole && this.calls.length) message.tool_calls = this.calls;
    else message.content ??= "";
    return message;
  }

  drawNow() {
    if (this.reasoning) {
      this.thinking.hidden = false;
      this.thought.textContent = this.reasoning.trim();
      const seconds = ((this.thoughtUntil ?? this.lastAt) - this.firstAt) / 1000;
      const isThinking = this.thoughtUntil === null && !this.isOver;
      const thought = seconds < 0.05 ? "Thought" : `Thought for ${seconds.toFixed(1)} s`;
      this.thinkingLabel.textContent = isThinking ? "Thinking…" : thought;
    }
    this.prose.show(this.content.trim());
    if (!this.resultsAreAsked) this.callsElement.replaceChildren(...this.calls.map((call) => callFigure(call)));
    this.drawNumbers();
    this.grown();
  }

  drawNumbers() {
    const facts = [];
    const { usage } = this;
    if (usage) {
      facts.push(`${usage.completion_tokens} ${usage.completion_tokens === 1 ? "token" : "tokens"}`);
      const seconds = (this.lastAt - this.firstAt) / 1000;
      const later = usage.completion_tokens - this.firstTokens;
      if (later > 0 && seconds > 0.02) facts.push(`${Math.round(later / seconds)} tokens/s`);
    }
    if (this.firstAt !== null) facts.push(`first after ${readable(this.firstAt - this.asked)}`);
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens;
      facts.push(`prompt ${usage.prompt_tokens}${cached ? `, of it ${cached} cached` : ""}`);
    }
    this.numbers.textContent = facts.join(" · ");
    const endings = { length: "cut off at the limit of tokens", content_filter: "cut off by a filter" };
    const ending = this.why ?? endings[this.finishReason];
    if (this.isOver && ending) {
      this.numbers.append(facts.length ? " · " : "", h("span", { class: "cut" }, ending));
    }
  }

  askForResults() {
    this.resultsAreAsked = true;
    const fields = this.calls.map((call, index) => {
      const label = this.calls.length > 1 ? `Result of call ${index + 1}` : "Result of the call";
      return h("textarea", { class: "code", rows: 2, spellcheck: "false", "aria-label": label, placeholder: label });
    });
    const figures = this.calls.map((call, index) => callFigure(call, fields[index]));
    const give = () => {
      button.remove();
      for (const field of fields) field.readOnly = true;
      const results = this.calls.map((call, index) => {
        return { role: "tool", tool_call_id: call.id, content: fields[index].value };
      });
      this.giveResults(results);
    };
    const button = h("button", { type: "button", class: "primary", onclick: give }, `Send the ${fields.length > 1 ? "results" : "result"}`);
    this.callsElement.replaceChildren(...figures, button);
  }
}

function callFigure(call, field = null) {
  const figure = codeBlock(indented(call.function.arguments), `call: ${call.function.name}`);
  figure.classList.add("call");
  if (field) figure.append(h("div", { class: "answer" }, field));
  return figure;
}

// JSON on lines of its own; text that is none, or not yet, as it stands.
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function readable(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}
