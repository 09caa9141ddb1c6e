// The session panel of a chat: where the session is, its memory and expiry, and the time to each first token.

import { button, count, countdown, duration, make, size } from "./words.js";

const PLACES = {
  resident: ["Resident", "The KV cache is on the device. The next question starts at once."],
  offloaded: ["Offloaded", "The KV cache was moved to the host's memory. The next question copies it back."],
  cold: ["Cold", "The KV cache was dropped. The next question computes the conversation again, once."],
  ended: ["Ended", "The server no longer has this session."],
  unknown: ["Unknown", "The server does not answer at the moment."],
};
const METHOD =
  "Both times run from sending the question to the first piece of its answer. Without a session, the whole " +
  "conversation is sent as a new one, and the server shares no picture and no prefix with it. That session is closed again at once.";

export class Panel {
  /** `onCompare(turn)` measures a turn without a session. */
  constructor(details, onCompare) {
    this.details = details;
    this.onCompare = onCompare;
    this.summary = details.querySelector("[data-summary]");
    this.expiresAt = null;
    this.lifetime = null;
    this.place = null;
    this.state = make("span", { class: "place" });
    this.meaning = make("p", { class: "hint" });
    this.clock = make("span", { class: "clock", role: "timer" });
    this.left = make("progress", { max: "1", value: "1", "aria-label": "Time until the session expires" });
    this.memory = make("dd");
    this.tokens = make("dd");
    this.turns = make("ol", { class: "bars" });
    this.none = make("p", { class: "hint" }, "Ask a question: its time appears here.");
    details.querySelector("[data-panel-body]").append(
      make("section", {}, make("h3", {}, "Where the session is"), make("p", {}, this.state), this.meaning, this.facts()),
      make(
        "section",
        {},
        make("h3", {}, "Time to the first token"),
        this.legend(),
        this.none,
        this.turns,
        make("p", { class: "hint" }, METHOD),
      ),
    );
  }

  facts() {
    return make(
      "dl",
      { class: "facts" },
      make("dt", {}, "Memory"),
      this.memory,
      make("dt", {}, "In the KV cache"),
      this.tokens,
      make("dt", {}, "Expires in"),
      make("dd", {}, this.clock, this.left),
    );
  }

  legend() {
    return make(
      "p",
      { class: "legend" },
      make("span", { class: "key with" }, "In this session"),
      make("span", { class: "key without" }, "Without a session"),
      make("span", { class: "key cached" }, "Cached part of the prompt"),
    );
  }

  /** Show a description of the session, as the page's server returns it; null while the server does not answer. */
  showSession(session) {
    const place = session?.place ?? "unknown";
    this.place = place;
    const [name, meaning] = PLACES[place];
    this.state.textContent = name;
    this.state.dataset.place = place;
    this.meaning.textContent = meaning;
    if (session?.expires_in_s !== undefined && session.expires_in_s !== null) {
      this.expiresAt = performance.now() + session.expires_in_s * 1000;
      this.lifetime = Math.max(this.lifetime ?? 0, session.expires_in_s);
    }
    if (place === "ended") this.expiresAt = null;
    const memory = session?.memory;
    this.memory.replaceChildren(...(memory ? memoryLines(memory) : ["–"]));
    this.tokens.textContent = session?.cached_tokens === undefined ? "–" : count(session.cached_tokens, "token");
    this.tick();
  }

  /** Show the countdown. Call it once a second. Return the seconds until the session expires, or null. */
  tick() {
    const left = this.expiresAt === null ? null : (this.expiresAt - performance.now()) / 1000;
    this.clock.textContent = left === null ? "–" : left > 0 ? countdown(left) : "now";
    this.left.value = left === null || !this.lifetime ? 0 : Math.max(left / this.lifetime, 0);
    this.left.hidden = left === null;
    this.left.toggleAttribute("data-soon", left !== null && left < 60);
    const latest = this.latest === undefined ? "" : `first token ${duration(this.latest)} · `;
    const time = left === null ? "" : ` · expires in ${left > 0 ? countdown(left) : "0:00"}`;
    this.summary.textContent = `${latest}${PLACES[this.place ?? "unknown"][0].toLowerCase()}${time}`;
    return left;
  }

  /** Show the times of all turns, the latest first. `busy`: no measurement may start now. */
  showTurns(turns, busy) {
    const most = Math.max(1, ...turns.flatMap((turn) => [turn.ttft_ms, turn.comparison?.ttft_ms ?? 0]));
    this.latest = turns.at(-1)?.ttft_ms;
    this.none.hidden = turns.length > 0;
    this.turns.replaceChildren(...turns.map((turn, index) => this.row(turn, index, most, busy)).reverse());
    this.tick();
  }

  row(turn, index, most, busy) {
    const compared = turn.comparison;
    const cached = turn.prompt_tokens ? turn.cached_tokens / turn.prompt_tokens : 0;
    const share = make("span", { class: "share", "aria-hidden": "true" }, make("span", {}));
    share.firstChild.style.width = `${100 * cached}%`;
    const measure = button(compared ? "Measure again" : "Measure without a session", () => this.onCompare(index), {
      class: "small",
      disabled: busy || turn.measuring,
      "data-compare": index,
    });
    const faster = compared && compared.ttft_ms / Math.max(turn.ttft_ms, 0.01);
    return make(
      "li",
      {},
      make("p", { class: "bar-title" }, `${index + 1}. ${turn.question}`),
      bar("with", turn.ttft_ms, most, "In this session"),
      compared ? bar("without", compared.ttft_ms, most, "Without a session") : null,
      compared ? make("p", { class: "verdict", "data-verdict": true }, verdict(faster)) : null,
      share,
      make(
        "p",
        { class: "hint tokens" },
        `${count(turn.cached_tokens, "token")} cached, ${turn.prompt_tokens - turn.cached_tokens} computed`,
        compared ? `; without a session ${compared.prompt_tokens - compared.cached_tokens} computed` : "",
      ),
      turn.measuring ? make("p", { class: "hint", role: "status" }, "Measuring …") : measure,
      turn.compare_problem ? make("p", { class: "problem", role: "alert" }, turn.compare_problem) : null,
    );
  }
}

function memoryLines(memory) {
  const lines = [];
  if (memory.kv_bytes) lines.push(`${size(memory.kv_bytes)} KV cache on the device`);
  if (memory.offloaded_bytes) lines.push(`${size(memory.offloaded_bytes)} KV cache on the host`);
  if (memory.features_bytes) lines.push(`${size(memory.features_bytes)} picture features`);
  return (lines.length ? lines : ["none"]).map((line) => make("span", { class: "line" }, line));
}

function bar(kind, ms, most, label) {
  const fill = make("span", { class: `fill ${kind}` });
  fill.style.width = `${Math.max(1.5, (100 * ms) / most)}%`;
  return make(
    "p",
    { class: "bar" },
    make("span", { class: "hidden" }, `${label}: `),
    make("span", { class: "track", "aria-hidden": "true" }, fill),
    make("span", { class: "value" }, duration(ms)),
  );
}

function verdict(faster) {
  if (faster >= 1.05) return `The session answers ${faster.toFixed(1)} times sooner.`;
  if (faster > 0.95) return "Both answer equally soon.";
  return `Without a session it was ${(1 / faster).toFixed(1)} times sooner this time.`;
}
