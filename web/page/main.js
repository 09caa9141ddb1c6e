// The page: the list of chats, which of them are visible, the state of the server, and the start of a chat.

import { Problem, send } from "./api.js";
import { Card } from "./card.js";
import { drawPicture } from "./draw.js";
import { acceptDrops, choose, objection, picturesOf } from "./intake.js";
import { followTheme } from "./theme.js";
import { announce, button, fromTemplate, make } from "./words.js";

const STORED = "llava-sessions-chats";
const NARROWEST_CARD_PX = 400;
const POLL_MS = 5000;
const RETRY_MS = 1500;
const POLLS_PER_DESCRIPTION = 3;
const SERVER_WORDS = { ready: "Ready", starting: "Starting", unreachable: "Not reachable", unknown: "Connected" };

const cards = new Map(); // by the chat's ID, oldest first
const visible = []; // IDs of the chats in the window; the latest is last
let start = null; // the element of the start page, while it is shown
let status = null;
let wasRoomy = null;
const byId = (id) => document.getElementById(id);

// --- chats ---

function add(chat) {
  const card = new Card(chat, {
    changed: () => queueMicrotask(list),
    closed: () => remove(chat.id),
    alone: () => showOnly(chat.id),
    draw: drawPicture,
  });
  cards.set(chat.id, card);
  remember((ids) => [...ids.filter((one) => one !== chat.id), chat.id]);
  return card;
}

function remove(id) {
  const card = cards.get(id);
  cards.delete(id);
  card?.element.remove();
  hide(id);
  remember((ids) => ids.filter((one) => one !== id));
  if (!visible.length && cards.size) visible.push([...cards.keys()].at(-1));
  layOut();
  (visible.length ? cards.get(visible.at(-1)).text : byId("new-chat")).focus();
}

/** Return the IDs of the chats of all tabs. */
function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED) ?? "[]").filter((one) => /^[\w-]+$/.test(one));
  } catch {
    return [];
  }
}

/** Change the stored IDs. Other tabs have their own chats among them. */
function remember(change) {
  try {
    localStorage.setItem(STORED, JSON.stringify(change(stored())));
  } catch {
    // Without storage the chats are forgotten when the page is reloaded.
  }
}

async function recall() {
  const gone = [];
  for (const id of stored()) {
    const found = await send("GET", `/api/chats/${id}`).catch((problem) => problem);
    if (!(found instanceof Problem)) add(found.chat);
    else if (found.code === "chat_not_found") gone.push(id);
  }
  remember((ids) => ids.filter((id) => !gone.includes(id)));
  if (cards.size) showOnly([...cards.keys()].at(-1));
}

// --- what is visible ---

function room() {
  return Math.max(1, Math.floor(byId("cards").clientWidth / NARROWEST_CARD_PX));
}

function hide(id) {
  const at = visible.indexOf(id);
  if (at >= 0) visible.splice(at, 1);
}

function showOnly(id) {
  visible.splice(0, visible.length, id);
  closeStart();
  layOut();
  cards.get(id).text.focus();
}

function showBeside(id) {
  hide(id);
  visible.push(id);
  closeStart();
  layOut();
  cards.get(id).text.focus();
}

function closeStart() {
  start?.remove();
  start = null;
}

/** Show the visible chats from left to right, the latest last, as many as fit. */
function layOut() {
  if (!cards.size && !start) showStart();
  const main = byId("cards");
  const most = room() - (start ? 1 : 0);
  const shown = most > 0 ? visible.slice(-most) : [];
  const elements = shown.map((id) => cards.get(id).element);
  for (const card of cards.values()) if (!elements.includes(card.element)) card.element.remove();
  elements.forEach((element) => element.parentNode === main || main.append(element));
  if (start) main.append(start);
  main.dataset.count = elements.length + (start ? 1 : 0);
  for (const id of shown) {
    const beside = cards.get(id).find("beside");
    beside.hidden = elements.length < 2;
  }
  showPanels(shown);
  list();
}

/** Open the panel of a chat that has a wide window for itself. Otherwise panels stay as the person has left them. */
function showPanels(shown) {
  const roomy = shown.length === 1 && !start && window.innerWidth > 760;
  if (roomy === wasRoomy) return;
  wasRoomy = roomy;
  for (const id of cards.keys()) cards.get(id).find("panel").open = roomy;
}

function list() {
  const items = [...cards.values()].reverse().map((card) => {
    const { id } = card.chat;
    const isShown = card.element.isConnected;
    const open = button("", () => pick(id, showOnly), { class: "open", "aria-current": isShown ? "true" : null, "data-open": id });
    open.append(make("span", { class: "name" }, card.title), make("span", { class: "hint" }, card.busy ? "answering" : describeCount(card)));
    const beside = button("Beside", () => pick(id, showBeside), {
      class: "small only-wide",
      title: "Show this chat beside the others",
      "aria-label": `Show beside: ${card.title}`,
      hidden: isShown || room() < 2,
      "data-show-beside": id,
    });
    return make("li", {}, open, beside);
  });
  byId("chat-list").replaceChildren(...items);
  byId("chats-hint").hidden = !items.length;
}

function pick(id, show) {
  toggleMenu(false);
  show(id);
}

function describeCount(card) {
  const turns = card.chat.turns.length;
  return turns === 1 ? "1 turn" : `${turns} turns`;
}

// --- the start of a chat ---

function showStart() {
  toggleMenu(false);
  closeStart();
  start = fromTemplate("start-template");
  const find = (name) => start.querySelector(`[data-${name}]`);
  find("choose").addEventListener("click", async () => open(await choose(false)));
  find("photo").addEventListener("click", async () => open(await choose(true)));
  find("draw").addEventListener("click", () => drawPicture((file) => open([file])));
  acceptDrops(start, open, complain);
  find("examples").replaceChildren(...(status?.examples ?? []).map(exampleItem));
  layOut();
}

function exampleItem(example) {
  const image = make("img", { src: example.url, alt: "", width: "96", height: "96" });
  const pressed = button("", () => openExample(example), { "data-example": example.name });
  pressed.append(image, make("span", {}, example.title));
  return make("li", {}, pressed);
}

async function openExample(example) {
  const reply = await fetch(example.url).catch(() => null);
  if (!reply?.ok) return complain("The example cannot be loaded: the page has lost its own server.");
  return open([new File([await reply.blob()], example.name, { type: "image/png" })], example.question);
}

function complain(text) {
  const place = start?.querySelector("[data-problem]");
  if (!place) return;
  place.hidden = !text;
  place.textContent = text;
}

/** Open a chat on the first picture or clip; the others are attached to its first question. */
async function open(files, question = "") {
  if (!files.length || start?.hasAttribute("data-opening")) return;
  const objected = objection(files[0]);
  if (objected) {
    complain(objected);
    return;
  }
  complain("");
  start?.setAttribute("data-opening", "");
  announce("The file is being sent.");
  try {
    const card = add((await send("POST", "/api/chats", files[0])).chat);
    const wasAlone = visible.length === 0;
    closeStart();
    if (wasAlone) showOnly(card.chat.id);
    else showBeside(card.chat.id);
    card.text.value = question;
    card.text.select();
    announce("The session is open. Ask the first question.");
    if (files.length > 1) await card.attach(files.slice(1));
  } catch (problem) {
    complain(`${problem.title} ${problem.advice ?? ""}`);
    checkServer();
  }
  start?.removeAttribute("data-opening");
}

// --- the server ---

async function checkServer() {
  let found = null;
  try {
    found = await send("GET", "/api/status");
  } catch (problem) {
    found = { state: "unreachable", title: problem.title, advice: problem.advice };
  }
  const wasDown = status && status.state !== "ready" && status.state !== "unknown";
  const isUp = found.state === "ready" || found.state === "unknown";
  const hadExamples = status?.examples;
  status = { examples: hadExamples, ...found };
  byId("server").dataset.state = found.state;
  byId("server-text").textContent = SERVER_WORDS[found.state];
  byId("server-name").textContent = found.name ?? "";
  const alert = byId("alert");
  if (alert.hidden !== isUp) alert.hidden = isUp;
  const words = isUp ? "" : `${found.title} ${found.advice}`;
  if (alert.textContent !== words) alert.textContent = words;
  if (!hadExamples && found.examples && start) start.querySelector("[data-examples]").replaceChildren(...found.examples.map(exampleItem));
  if (wasDown && isUp) {
    announce("The server is back.");
    cards.forEach((card) => card.describe());
  }
  return isUp;
}

async function watch(polls = 1) {
  const isUp = await checkServer();
  if (isUp && !document.hidden && polls % POLLS_PER_DESCRIPTION === 0) visible.forEach((id) => cards.get(id)?.busy || cards.get(id)?.describe());
  setTimeout(watch, isUp ? POLL_MS : RETRY_MS, polls + 1);
}

// --- the window ---

function toggleMenu(isOpen) {
  byId("chats").classList.toggle("open", isOpen);
  byId("menu").setAttribute("aria-expanded", String(isOpen));
}

/** Close the menu; or stop an answer, that of the chat with the focus or the latest one; or leave the start page. */
function escape() {
  if (byId("chats").classList.contains("open")) {
    toggleMenu(false);
    byId("menu").focus();
    return;
  }
  const busy = visible.map((id) => cards.get(id)).filter((card) => card?.busy);
  if (busy.length) (busy.find((card) => card.element.contains(document.activeElement)) ?? busy.at(-1)).stop();
  else if (start && visible.length) showBeside(visible.at(-1));
}

function listen() {
  byId("new-chat").addEventListener("click", () => {
    showStart();
    start.querySelector("[data-choose]").focus();
  });
  byId("menu").addEventListener("click", () => toggleMenu(!byId("chats").classList.contains("open")));
  document.addEventListener("keydown", (event) => event.key === "Escape" && !byId("draw").open && escape());
  document.addEventListener("paste", (event) => {
    const files = picturesOf(event.clipboardData);
    if (!files.length) return;
    if (start) open(files);
    else cards.get(visible.at(-1))?.attach(files);
  });
  // A picture that is dropped next to a chat must not replace the page.
  for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
  window.addEventListener("resize", layOut);
  setInterval(() => cards.forEach((card) => card.tick()), 1000);
}

followTheme(byId("theme"));
listen();
await checkServer();
await recall();
layOut();
setTimeout(watch, POLL_MS);
document.documentElement.dataset.loaded = "true";
