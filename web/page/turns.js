// The list of questions and answers of one chat.

import { button, count, duration, make } from "./words.js";

const ENDS = {
  length: "The answer reached its limit of tokens.",
  deadline: "The time for the answer was over.",
  shutdown: "The server was stopped during this answer.",
};

/** Make the element of one turn. `handlers`: `edit(text)` and `retry()`. `isLast` answers can be regenerated. */
export function turnElement(turn, index, { chatPath, isLast, busy, handlers }) {
  const facts = turn.answer === undefined ? null : factsLine(turn);
  const actions = make(
    "p",
    { class: "actions" },
    isLast ? button("Regenerate", handlers.retry, { class: "small", disabled: busy, "data-retry": true }) : null,
  );
  const item = make(
    "li",
    { class: "turn", "data-turn": index },
    questionElement(turn, index, chatPath, busy, handlers),
    turn.answer === undefined
      ? null
      : make("div", { class: "answer" }, make("h3", { class: "hidden" }, "Answer"), make("p", { class: "text" }, turn.answer), facts, actions),
  );
  return item;
}

/** Make the element of a question that is being answered, with the element for the text of the answer. */
export function liveTurn(question, pictures, chatPath, index) {
  const text = make("p", { class: "text live", "data-live": true });
  const wait = make("span", { class: "wait", "aria-hidden": "true" }, make("i"), make("i"), make("i"));
  text.append(wait);
  const item = make(
    "li",
    { class: "turn", "data-turn": index },
    questionElement({ question, pictures }, index, chatPath, true, {}),
    make("div", { class: "answer" }, make("h3", { class: "hidden" }, "Answer"), text),
  );
  return { item, text, wait };
}

/** Make the element of a question whose answer was stopped or failed: it is no part of the conversation. */
export function endedTurn(question, text, note, buttons) {
  return make(
    "li",
    { class: "turn ended" },
    make("div", { class: "question" }, make("p", { class: "text" }, question)),
    make(
      "div",
      { class: "answer" },
      text ? make("p", { class: "text" }, text) : null,
      make("p", { class: "note", "data-note": true }, note),
      make("p", { class: "actions" }, ...buttons),
    ),
  );
}

function questionElement(turn, index, chatPath, busy, handlers) {
  const text = make("p", { class: "text" }, turn.question);
  const box = make("div", { class: "question" }, make("h3", { class: "hidden" }, "Question"), thumbnails(turn.pictures, chatPath), text);
  if (!handlers.edit) return box;
  const edit = button("Edit", () => box.replaceChildren(editor(turn, box, handlers)), {
    class: "small",
    disabled: busy,
    "data-edit": index,
    "aria-label": `Edit question ${index + 1}`,
  });
  box.append(make("p", { class: "actions" }, edit));
  return box;
}

/** Make thumbnails of pictures by their numbers. */
export function thumbnails(numbers, chatPath) {
  if (!numbers?.length) return null;
  const items = numbers.map((number) => make("li", {}, picture(number, chatPath)));
  return make("ul", { class: "thumbs" }, ...items);
}

/** Make the element of one picture. */
export function picture(number, chatPath) {
  return make("img", { src: `${chatPath}/pictures/${number}`, alt: `Picture or clip ${number + 1}`, decoding: "async" });
}

function editor(turn, box, handlers) {
  const before = [...box.childNodes];
  const field = make("textarea", { rows: "2", maxlength: "4096", "aria-label": "Changed question", "data-edit-text": true });
  field.value = turn.question;
  const cancel = () => {
    box.replaceChildren(...before);
    box.querySelector("[data-edit]")?.focus();
  };
  const save = () => field.value.trim() && handlers.edit(field.value.trim());
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      save();
    }
  });
  queueMicrotask(() => field.focus());
  const note = "The turns after this question are dropped.";
  return make(
    "div",
    { class: "editor" },
    field,
    make("p", { class: "hint" }, note),
    make("p", { class: "row" }, button("Ask again", save, { class: "primary small", "data-edit-save": true }), button("Cancel", cancel, { class: "small" })),
  );
}

function factsLine(turn) {
  const computed = turn.prompt_tokens - turn.cached_tokens;
  const facts = [
    `first token after ${duration(turn.ttft_ms)}`,
    `${count(turn.cached_tokens, "token")} cached, ${computed} computed`,
    turn.replayed ? "the session was opened again for this answer" : null,
  ];
  return make("p", { class: "hint facts-line" }, facts.filter(Boolean).join(" · "), ENDS[turn.finish_reason] ? ` · ${ENDS[turn.finish_reason]}` : null);
}
