// One chat: its conversation, its composer and its session panel.

import { Problem, send, stream } from "./api.js";
import { acceptDrops, choose, objection, picturesOf } from "./intake.js";
import { Panel } from "./panel.js";
import { endedTurn, liveTurn, picture, turnElement } from "./turns.js";
import { announce, button, fromTemplate, make } from "./words.js";

const STOPPED = "You stopped this answer. The question and the half answer are no part of the conversation.";

export class Card {
  /** `chat`: as the page's server returns it. `on`: `changed()`, `closed()`, `alone()` and `draw(use)` of the page. */
  constructor(chat, on) {
    this.chat = chat;
    this.on = on;
    this.path = `/api/chats/${chat.id}`;
    this.busy = false;
    this.ended = null;
    this.comparing = null;
    this.compareProblems = new Map();
    this.element = fromTemplate("card-template");
    this.find = (name) => this.element.querySelector(`[data-${name}]`);
    this.panel = new Panel(this.find("panel"), (turn) => this.compare(turn));
    this.text = this.find("text");
    this.listen();
    this.followEnd();
    this.show();
    this.panel.showSession(chat.session);
    this.describe();
  }

  get title() {
    return this.chat.turns[0]?.question ?? this.live?.question ?? "New picture";
  }

  listen() {
    this.find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.ask();
      }
    });
    this.text.addEventListener("input", () => this.grow());
    this.text.addEventListener("paste", (event) => {
      const files = picturesOf(event.clipboardData);
      if (files.length) {
        event.preventDefault();
        event.stopPropagation();
        this.attach(files);
      }
    });
    this.find("stop").addEventListener("click", () => this.stop());
    this.find("close").addEventListener("click", () => this.close());
    this.find("beside").addEventListener("click", () => this.on.alone());
    this.find("choose").addEventListener("click", async () => this.attach(await choose(false)));
    this.find("photo").addEventListener("click", async () => this.attach(await choose(true)));
    this.find("draw").addEventListener("click", () => this.on.draw((file) => this.attach([file])));
    acceptDrops(this.element, (files) => this.attach(files), (text) => this.banner({ title: text, advice: "" }));
  }

  grow() {
    this.text.style.height = "auto";
    this.text.style.height = `${Math.min(this.text.scrollHeight, 160)}px`;
  }

  // --- what is shown ---

  show() {
    const { turns, pictures } = this.chat;
    this.find("title").textContent = this.title;
    this.element.setAttribute("aria-label", `Chat: ${this.title}`);
    this.element.dataset.chat = this.chat.id;
    const opened = pictures.filter((one) => one.turn === null && !one.pending).map((one) => one.number);
    const items = turns.map((turn, index) =>
      turnElement({ ...turn, pictures: [...(index ? [] : opened), ...turn.pictures] }, index, {
        chatPath: this.path,
        isLast: index === turns.length - 1,
        busy: this.busy,
        handlers: { edit: (text) => this.edit(index, text), retry: () => this.retry() },
      }),
    );
    if (!turns.length && !this.busy && !this.ended) items.push(this.waiting(opened));
    if (this.ended) items.push(this.ended);
    this.find("turns").replaceChildren(...items);
    this.showAttached();
    this.find("notices").textContent = this.chat.notices.join(" ");
    this.find("notices").hidden = !this.chat.notices.length;
    this.showBusy();
    this.showTimes();
    this.on.changed();
  }

  waiting(numbers) {
    const pictures = numbers.map((number) => picture(number, this.path));
    return make("li", { class: "turn first" }, make("div", { class: "shown" }, ...pictures), make("p", { class: "hint" }, "The session is open. Ask the first question."));
  }

  /** Show the pictures of the next question: during an answer, those that were added since it began. */
  showAttached() {
    const pending = this.chat.pictures.filter((one) => one.pending && !(this.busy && this.live?.pictures.includes(one.number)));
    const items = pending.map((one) =>
      make("li", {}, picture(one.number, this.path), button("Remove", () => this.detach(one.number), { class: "small", "aria-label": `Remove picture ${one.number + 1}` })),
    );
    this.find("attached").replaceChildren(...items);
    this.find("attached").hidden = !items.length;
  }

  showBusy() {
    const { busy } = this;
    this.element.toggleAttribute("data-busy", busy);
    this.find("send").hidden = busy;
    this.find("stop").hidden = !busy;
    for (const name of ["choose", "photo", "draw"]) this.find(name).disabled = busy;
    this.find("label").textContent = `Question to the chat "${this.title}"`;
    this.find("label").htmlFor = this.text.id ||= `text-${this.chat.id}`;
  }

  showTimes() {
    const turns = this.chat.turns.map((turn, index) => ({
      ...turn,
      measuring: this.comparing === index,
      compare_problem: this.compareProblems.get(index),
    }));
    this.panel.showTurns(turns, this.busy || this.comparing !== null);
  }

  /** Show a problem above the composer; null removes it. */
  banner(problem, ...buttons) {
    const banner = this.find("banner");
    banner.hidden = !problem;
    if (!problem) return;
    const dismiss = button("Dismiss", () => this.banner(null), { class: "small" });
    banner.replaceChildren(
      make("p", {}, make("strong", { "data-problem-title": true }, problem.title), ` ${problem.advice}`),
      make("p", { class: "row" }, ...buttons, ...(problem.action === "reopen" ? [] : [dismiss])),
    );
  }

  /** Show the end of the conversation. */
  scroll() {
    const talk = this.find("talk");
    talk.scrollTop = talk.scrollHeight;
  }

  /** Keep the end of the conversation in view when the size of the chat or of its content changes. */
  followEnd() {
    const talk = this.find("talk");
    let isAtEnd = true;
    talk.addEventListener("scroll", () => (isAtEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40));
    const observer = new ResizeObserver(() => isAtEnd && this.scroll());
    observer.observe(talk);
    observer.observe(this.find("turns"));
  }

  // --- questions ---

  ask() {
    const question = this.text.value.trim();
    if (!question || this.busy) return;
    this.text.value = "";
    this.grow();
    this.askNext(question);
  }

  /** Ask the next question, with the pictures that wait now. */
  askNext(question) {
    const pictures = this.chat.pictures.filter((one) => one.pending || (one.turn === null && !this.chat.turns.length));
    const numbers = pictures.map((one) => one.number);
    this.run(`${this.path}/questions`, { text: question }, { question, pictures: numbers, keep: Infinity, again: () => this.askNext(question) });
  }

  edit(index, text) {
    const before = this.chat.turns[index];
    this.run(`${this.path}/turns/${index}/edit`, { text }, { question: text, pictures: before.pictures, keep: index, again: () => this.edit(index, text) });
  }

  retry() {
    const index = this.chat.turns.length - 1;
    const { question, pictures } = this.chat.turns[index];
    this.run(`${this.path}/retry`, {}, { question, pictures, keep: index, again: () => this.retry() });
  }

  /** Send a question and show its answer as it arrives. `keep`: so many turns stay shown above it. `again` repeats it. */
  async run(path, body, { question, pictures, keep, again }) {
    if (this.busy) return;
    const hadFocus = this.element.contains(document.activeElement);
    this.busy = true;
    this.ended = null;
    this.banner(null);
    this.live = { question, pictures };
    this.show();
    const list = this.find("turns");
    [...list.children].slice(keep === Infinity ? this.chat.turns.length : keep).forEach((item) => item.remove());
    const live = liveTurn(question, pictures, this.path, list.children.length);
    list.append(live.item);
    this.scroll();
    if (hadFocus) this.text.focus(); // the button that was pressed is hidden or gone
    announce("The model is answering.");
    let text = "";
    let problem = null;
    let wasStopped = false;
    try {
      await stream(path, body, (name, data) => {
        if (name === "piece") {
          live.wait.remove();
          text += data.text;
          live.text.append(data.text);
          this.scroll();
        } else if (name === "problem") problem = new Problem(data);
        else {
          wasStopped = name === "stopped";
          this.chat = data.chat;
        }
      });
    } catch (error) {
      problem = error instanceof Problem ? error : new Problem({ title: "The page has failed.", advice: "Reload it." });
    }
    this.finish({ question, text, problem, wasStopped, again });
  }

  finish({ question, text, problem, wasStopped, again }) {
    this.busy = false;
    this.live = null;
    if (problem) {
      const repeat = problem.action === "reopen" ? this.reopenButton(again) : button("Ask again", again, { class: "small", "data-again": true });
      this.ended = endedTurn(question, text, `${problem.title} ${problem.advice}`, [repeat]);
      if (problem.action === "reopen") this.panel.showSession({ place: "ended" });
      announce(`${problem.title} ${problem.advice}`);
    } else if (wasStopped) {
      this.ended = endedTurn(question, text, STOPPED, [button("Ask again", again, { class: "small", "data-again": true })]);
      announce("The answer was stopped.");
    } else announce(`Answer: ${this.chat.turns.at(-1).answer}`);
    this.compareProblems.clear();
    this.show();
    this.scroll();
    if (!problem) this.describe();
    if (this.element.contains(document.activeElement) || document.activeElement === document.body) this.text.focus();
  }

  reopenButton(again) {
    return button("Continue in a new session", () => this.reopen(again), { class: "primary small", "data-reopen": true });
  }

  async stop() {
    await send("POST", `${this.path}/stop`).catch((problem) => this.banner(problem));
  }

  // --- the session ---

  /** Open the chat again in a new session, with its history, and repeat the question that failed. */
  async reopen(again) {
    try {
      this.chat = (await send("POST", `${this.path}/reopen`)).chat;
      this.ended = null;
      this.isEnded = false;
      this.banner(null);
      this.panel.lifetime = null;
      this.show();
      await this.describe();
      again?.();
    } catch (problem) {
      this.banner(problem);
    }
  }

  async describe() {
    if (this.isEnded) return;
    try {
      const session = await send("GET", `${this.path}/session`);
      this.panel.showSession(session);
      if (session.place === "ended" && !this.ended) this.showEnd();
    } catch (problem) {
      this.panel.showSession(null);
      if (problem.code === "chat_not_found") this.showGone();
    }
  }

  showEnd() {
    this.isEnded = true;
    const title = "The session of this chat has ended.";
    this.banner({ title, advice: "Its conversation is still here.", action: "reopen" }, this.reopenButton());
  }

  /** The page's server no longer has the chat. Its conversation stays readable. */
  showGone() {
    this.isEnded = true;
    this.panel.showSession({ place: "ended" });
    const advice = "It was started again, or the chat was closed in another tab or because it was unused for long. Start a new chat.";
    this.banner({ title: "This page's server no longer has this chat.", advice });
  }

  /** Called once a second. */
  tick() {
    const left = this.panel.tick();
    if (left !== null && left < -3 && !this.busy && !this.isEnded) this.describe();
  }

  async compare(turn) {
    this.comparing = turn;
    this.compareProblems.delete(turn);
    this.showTimes();
    try {
      this.chat = (await send("POST", `${this.path}/turns/${turn}/comparison`)).chat;
      announce("The measurement is done.");
    } catch (problem) {
      this.compareProblems.set(turn, `${problem.title} ${problem.advice}`);
    }
    this.comparing = null;
    this.showTimes();
    this.panel.turns.querySelector(`[data-compare="${turn}"]`)?.focus();
  }

  // --- pictures ---

  /** Show the pictures after a change. A running answer stays as it is. */
  showPictures() {
    if (this.busy) this.showAttached();
    else this.show();
  }

  async attach(files) {
    for (const file of files) {
      const objected = objection(file);
      if (objected) {
        this.banner({ title: objected, advice: "" });
        return;
      }
      try {
        this.chat = (await send("POST", `${this.path}/pictures`, file)).chat;
        this.banner(null);
        announce("The file is attached to the next question.");
      } catch (problem) {
        this.banner(problem);
        return;
      }
      this.showPictures();
    }
    this.text.focus();
  }

  async detach(number) {
    try {
      this.chat = (await send("DELETE", `${this.path}/pictures/${number}`)).chat;
      this.showPictures();
      this.text.focus();
    } catch (problem) {
      this.banner(problem);
    }
  }

  async close() {
    await send("DELETE", this.path).catch(() => null);
    this.on.closed();
  }
}
