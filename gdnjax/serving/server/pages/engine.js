// The engine, as GET /server_info tells of it, once a second while it is looked at.

import { getJson } from "./api.js";
import { h, s } from "./dom.js";

const EVERY_MS = 1000;
// Seconds that the curves show.
const SHOWN_S = 120;
// Up to so many slots are drawn one by one.
const MOST_CELLS = 256;

const $ = (id) => document.getElementById(id);
const whole = (number) => Math.round(number).toLocaleString("en");

// 99.7% is not 100%, nor 0.3% none.
function percent(share) {
  if (share === null) return "–";
  const isExtreme = (share > 0 && share < 0.0995) || (share >= 0.9895 && share < 1);
  return `${(100 * share).toFixed(isExtreme ? 1 : 0)}%`;
}

const ratio = (part, all) => (all > 0 ? part / all : null);

function rate(number) {
  if (number === null) return "–";
  return number >= 100 || number === 0 ? whole(number) : number.toFixed(1);
}

function seconds(value) {
  if (value === undefined || value === null) return "–";
  if (value < 0.1) return `${(1000 * value).toFixed(1)} ms`;
  if (value < 1) return `${whole(1000 * value)} ms`;
  return value < 120 ? `${value.toFixed(1)} s` : lasting(value);
}

function lasting(value) {
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(value % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (number >= 1024 && at < units.length - 1) [number, at] = [number / 1024, at + 1];
  return `${number.toFixed(at && number < 100 ? 1 : 0)} ${units[at]}`;
}

export class EngineView {
  constructor({ onUnauthorised }) {
    this.onUnauthorised = onUnauthorised;
    this.samples = [];
    this.timer = null;
    this.isOn = false;
    this.turn = 0;
  }

  start() {
    if (this.isOn) return;
    this.isOn = true;
    this.turn += 1;
    this.poll(this.turn);
  }

  stop() {
    this.isOn = false;
    clearTimeout(this.timer);
  }

  // `turn`: an answer to somebody who has stopped meanwhile is dropped.
  async poll(turn) {
    try {
      const information = await getJson("server_info");
      if (!this.isOn || turn !== this.turn) return;
      $("engine-wrong").hidden = true;
      this.take(information);
    } catch (error) {
      if (!this.isOn || turn !== this.turn) return;
      if (error.status === 401) {
        this.stop();
        this.onUnauthorised(false);
        return;
      }
      const last = this.samples.at(-1);
      const since = last ? ` What is shown is of ${new Date(last.clock).toLocaleTimeString("en-GB")}.` : "";
      $("engine-wrong").textContent = `${error.message}${since}`;
      $("engine-wrong").hidden = false;
    }
    this.timer = setTimeout(() => this.poll(turn), EVERY_MS);
  }

  take({ stats, ...settings }) {
    const before = this.samples.at(-1);
    const uptime = stats.uptime;
    // Another engine: its counters begin anew.
    if (before && uptime < before.stats.uptime) this.samples = [];
    // Made anew only for another server: it may be unfolded.
    const known = JSON.stringify(settings);
    if (known !== this.known) [this.known, this.settings] = [known, settingsPanel(settings)];
    this.samples.push(sampleOf(stats, this.samples.at(-1)));
    while (this.samples[0].stats.uptime < uptime - SHOWN_S) this.samples.shift();
    this.draw();
  }

  draw() {
    const { samples } = this;
    const now = samples.at(-1);
    const { stats } = now;
    const cache = stats.prefix_cache;
    const curve = (...names) => sparkline(samples, names);
    const oldest = samples[0].stats;
    const recent = (of) => of(stats) - of(oldest);
    const hits = ratio(recent((x) => x.prefix_cache.hit_tokens), recent((x) => x.prefix_cache.queried_tokens));
    const drafts = stats.speculation;
    const cards = [
      card("Output", rate(now.output), "tokens/s", `${whole(stats.num_output_tokens)} since the start`, curve("output")),
      card("Prompts", rate(now.prompt), "tokens/s", `${whole(stats.num_prompt_tokens)} computed`, curve("prompt")),
      card(
        "Requests",
        whole(stats.num_running),
        stats.num_waiting ? `running, ${whole(stats.num_waiting)} waiting` : "running",
        legend(["", "running"], ["b", "waiting"]),
        curve("running", "waiting"),
      ),
      card(
        "Prefix cache",
        percent(ratio(cache.hit_tokens, cache.queried_tokens)),
        "of prompts",
        hits === null ? "no prompt in two minutes" : `${percent(hits)} in two minutes`,
        curve("hitRate"),
      ),
      drafts.num_speculative_tokens > 0 &&
        card(
          "Drafts",
          percent(drafts.draft_acceptance_rate),
          "accepted",
          drafts.mean_acceptance_length ? `${drafts.mean_acceptance_length.toFixed(2)} tokens a step` : "none yet",
          curve("acceptance"),
        ),
    ];
    $("cards").replaceChildren(...cards.filter(Boolean));
    const panels = [memoryPanel(stats), latencyPanel(stats), draftPanel(stats), endPanel(stats), hostPanel(stats)];
    // A node that is moved is not the same to who reads it: what was there stays.
    if (this.settings.parentNode) {
      while (this.settings.previousSibling) this.settings.previousSibling.remove();
      this.settings.before(...panels.filter(Boolean));
    } else $("panels").replaceChildren(...panels.filter(Boolean), this.settings);
  }
}

// One look at the engine, with rates since the one before.
function sampleOf(stats, before) {
  const sample = { stats, clock: Date.now(), running: stats.num_running, waiting: stats.num_waiting };
  const passed = before ? stats.uptime - before.stats.uptime : 0;
  const since = (of) => of(stats) - of(before.stats);
  const perSecond = (name) => (passed > 0 ? since((x) => x[name]) / passed : null);
  const over = (part, all) => (passed > 0 ? ratio(since(part), since(all)) : null);
  return {
    ...sample,
    output: perSecond("num_output_tokens"),
    prompt: perSecond("num_prompt_tokens"),
    hitRate: over(
      (x) => x.prefix_cache.hit_tokens,
      (x) => x.prefix_cache.queried_tokens,
    ),
    acceptance: over(
      (x) => x.num_accepted_draft_tokens,
      (x) => x.num_draft_tokens,
    ),
  };
}

function card(title, number, unit, note, picture) {
  const value = h("p", { class: "number" }, number, " ", h("small", {}, unit));
  return h("section", { class: "card" }, h("h2", {}, title), value, h("div", { class: "note" }, note), picture);
}

function legend(...entries) {
  return h("div", { class: "legend" }, ...entries.map(([kind, text]) => h("span", {}, key(kind), text)));
}

const key = (kind) => h("i", { class: `key ${kind}`, "aria-hidden": "true" });

// Curves of the last SHOWN_S seconds, now at the right; shares go up to 1, others to their largest.
function sparkline(samples, names) {
  const [width, height] = [240, 56];
  const last = samples.at(-1).stats.uptime;
  const values = names.flatMap((name) => samples.map((sample) => sample[name] ?? 0));
  const isShare = names[0] === "hitRate" || names[0] === "acceptance";
  const top = isShare ? 1 : Math.max(1e-9, ...values);
  const x = (sample) => (width * (1 - (last - sample.stats.uptime) / SHOWN_S)).toFixed(1);
  const y = (value) => (height - 1 - (value / top) * (height - 4)).toFixed(1);
  const children = [s("line", { class: "ground", x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5 })];
  names.forEach((name, index) => {
    // Where there was nothing to divide by, a share has no value, and its curve goes from the one before to the next.
    const known = samples.filter((sample) => sample[name] !== null);
    if (!known.length) return;
    const points = known.map((sample) => `${x(sample)},${y(sample[name])}`).join(" ");
    if (index === 0) {
      const ground = `${x(known.at(-1))},${height} ${x(known[0])},${height}`;
      children.push(s("polygon", { class: "area", points: `${points} ${ground}` }));
    }
    children.push(s("polyline", { class: index ? "line second" : "line", points }));
  });
  const label = `${names.join(" and ")} over the last two minutes, at most ${isShare ? "100%" : rate(Math.max(...values))}`;
  const attributes = { class: "spark", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" };
  return s("svg", { ...attributes, role: "img", "aria-label": label }, ...children);
}

function panel(title, ...children) {
  return h("section", { class: "card" }, h("h2", {}, title), ...children);
}

// Parts of a whole: [class, share of the whole between 0 and 1].
function strip(parts) {
  const element = h("div", { class: "strip", "aria-hidden": "true" });
  for (const [kind, share] of parts) {
    const part = h("i", { class: kind });
    part.style.width = `${100 * share}%`;
    element.append(part);
  }
  return element;
}

function gauge(title, note, picture, ...entries) {
  const head = h("div", { class: "title" }, h("span", {}, title), h("span", {}, note));
  return h("div", { class: "gauge" }, head, picture, entries.length ? legend(...entries) : null);
}

function memoryPanel(stats) {
  const { slots_used: slots, slots_total: allSlots, blocks_used: blocks, blocks_total: allBlocks } = stats;
  const { cached_states: states, evictable_blocks: kept } = stats.prefix_cache;
  const cells = () => {
    const kinds = [...Array(slots).fill("a"), ...Array(states).fill("c")];
    while (kinds.length < allSlots) kinds.push("");
    return h("div", { class: "cells", "aria-hidden": "true" }, ...kinds.map((kind) => h("i", { class: kind })));
  };
  const slotPicture = allSlots <= MOST_CELLS ? cells() : strip([["", slots / allSlots], ["c", states / allSlots]]);
  const host = stats.host_cache;
  return panel(
    "Memory",
    gauge(
      "Slots, a recurrent state each",
      `${whole(slots + states)} of ${whole(allSlots)}`,
      slotPicture,
      ["", `${whole(slots)} held by requests`],
      ["c", `${whole(states)} checkpoints`],
      ["rest", `${whole(allSlots - slots - states)} free`],
    ),
    gauge(
      "Blocks of keys and values",
      `${whole(blocks + kept)} of ${whole(allBlocks)}`,
      strip([["", ratio(blocks, allBlocks) ?? 0], ["c", ratio(kept, allBlocks) ?? 0]]),
      ["", `${whole(blocks)} held by requests`],
      ["c", `${whole(kept)} kept by the prefix cache`],
      ["rest", `${whole(allBlocks - blocks - kept)} free`],
    ),
    host &&
      gauge(
        "Host memory of the prefix cache",
        `${bytes(host.bytes_used)} of ${bytes(host.bytes_total)}`,
        strip([["c", ratio(host.bytes_used, host.bytes_total) ?? 0]]),
        ["c", `${whole(host.num_blocks)} blocks, ${whole(host.num_states)} states`],
      ),
  );
}

function latencyPanel(stats) {
  const row = (name, times) =>
    h("tr", {}, h("th", { scope: "row" }, name), ...["p50", "p90", "p99"].map((p) => h("td", {}, seconds(times[p]))));
  const head = ["", "half within", "90% within", "99% within"].map((text) => h("th", text ? { scope: "col" } : {}, text));
  const table = h(
    "table",
    {},
    h("thead", {}, h("tr", {}, ...head)),
    h("tbody", {}, row("First token", stats.time_to_first_token), row("Each further token", stats.time_per_output_token)),
  );
  return panel("Latency of the requests that ended last", table);
}

function draftPanel(stats) {
  const shares = stats.speculation.acceptance_per_position;
  if (!shares.length) return null;
  const rows = shares.flatMap((share, index) => [
    h("span", {}, `Draft ${index + 1}`),
    strip([["", share ?? 0]]),
    h("span", {}, percent(share)),
  ]);
  const note = stats.speculation.forced_acceptance ? "Acceptance is forced, for measuring: what is written is noise." : "";
  return panel("Drafts accepted, by their place in a step", h("div", { class: "bars" }, ...rows), note);
}

function endPanel(stats) {
  const row = (name, value) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value));
  const ended = Object.entries(stats.num_ended).map(([reason, count]) => row(`Ended: ${reason}`, whole(count)));
  const { lost_tokens: lost, evicted_blocks: blocks, evicted_states: states } = stats.prefix_cache;
  const rows = [
    row("Up for", lasting(stats.uptime)),
    row("Requests", whole(stats.num_requests)),
    ...ended,
    row("Preemptions", whole(stats.num_preemptions)),
    row("Starts over, after failures", whole(stats.num_start_overs)),
    row("Compilations", whole(stats.num_compilations)),
    row("Padding, of all places in steps", percent(stats.padding_waste)),
    row("Evicted blocks; checkpoints", `${whole(blocks)}; ${whole(states)}`),
    row("Cached tokens without a state", whole(lost)),
  ];
  return panel("Since the start", h("table", {}, h("tbody", {}, ...rows)));
}

function settingsPanel({ version, models, max_model_len: length, engine_config: engine, server_config: server }) {
  const row = (name, value) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value));
  const shown = (value) => (Array.isArray(value) ? value.join(", ") : String(value ?? "–"));
  const own = [
    row("gdnjax", version),
    row("Model", shown(models)),
    row("Tokens of a request, at most", whole(length)),
    row("Requests at once, at most", whole(engine.max_num_seqs)),
  ];
  const all = Object.entries({ ...engine, ...server }).map(([name, value]) => row(name, shown(value)));
  const fold = h("details", {}, h("summary", {}, "All settings"), h("table", { class: "code" }, h("tbody", {}, ...all)));
  return panel("Server", h("table", {}, h("tbody", {}, ...own)), fold);
}

const HOST_PARTS = {
  plan: "plan",
  move: "copies to and from the host",
  pack: "pack batches",
  dispatch: "dispatch, with compiling",
  read: "wait for the device",
  commit: "take over tokens",
  detokenise: "make text",
};

function hostPanel(stats) {
  const parts = Object.entries(HOST_PARTS).filter(([name]) => stats.seconds[name] > 0);
  const all = parts.reduce((sum, [name]) => sum + stats.seconds[name], 0);
  if (!all) return null;
  const rows = parts.flatMap(([name, text]) => [
    h("span", {}, text),
    strip([[name === "read" ? "c" : "", stats.seconds[name] / all]]),
    h("span", {}, seconds(stats.seconds[name])),
  ]);
  return panel("Where the engine's thread spends its time", h("div", { class: "bars" }, ...rows));
}
