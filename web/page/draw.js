// A small canvas to draw a shape on: strokes with the mouse, a pen or a finger.

import { make } from "./words.js";

const COLOURS = { red: "#e03131", yellow: "#fad61e", green: "#2f9e44", blue: "#1c7ed6", purple: "#7048e8", black: "#212529" };
const LINE_PX = 9;

let strokes = [];
let current = null;
let colour = "red";
let onUse = null;
const byId = (id) => document.getElementById(id);

/** Show the drawing area. `use(file)` receives the drawing as a PNG file. */
export function drawPicture(use) {
  prepare();
  onUse = use;
  strokes = [];
  paint();
  byId("draw").returnValue = "cancel";
  byId("draw").showModal();
}

function prepare() {
  const place = byId("draw-colours");
  if (place.childElementCount) return;
  for (const name of Object.keys(COLOURS)) {
    const radio = make("input", { type: "radio", name: "draw-colour", value: name, checked: name === colour, "aria-label": name });
    radio.addEventListener("change", () => (colour = name));
    const swatch = make("span", { class: "swatch" });
    swatch.style.background = COLOURS[name];
    place.append(make("label", { class: "colour", title: name }, radio, swatch));
  }
  const canvas = byId("draw-canvas");
  canvas.addEventListener("pointerdown", begin);
  canvas.addEventListener("pointermove", move);
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (current = null));
  byId("draw-undo").addEventListener("click", () => {
    strokes.pop();
    paint();
  });
  byId("draw").addEventListener("close", () => {
    if (byId("draw").returnValue !== "send" || !strokes.length) return;
    canvas.toBlob((blob) => onUse(new File([blob], "drawing.png", { type: "image/png" })), "image/png");
  });
}

function begin(event) {
  event.target.setPointerCapture(event.pointerId);
  current = { colour: COLOURS[colour], fill: byId("draw-fill").checked, points: [pointOf(event)] };
  strokes.push(current);
  paint();
}

function move(event) {
  if (!current) return;
  current.points.push(...(event.getCoalescedEvents?.() ?? [event]).map(pointOf));
  paint();
}

function pointOf(event) {
  const canvas = byId("draw-canvas");
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
}

function paint() {
  const canvas = byId("draw-canvas");
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  for (const stroke of strokes) {
    pen.beginPath();
    stroke.points.forEach(([x, y], index) => (index ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    if (stroke.points.length === 1) pen.lineTo(stroke.points[0][0] + 0.1, stroke.points[0][1]);
    pen.strokeStyle = stroke.colour;
    pen.lineWidth = LINE_PX;
    pen.lineJoin = "round";
    pen.lineCap = "round";
    if (stroke.fill && stroke.points.length > 2) {
      pen.closePath();
      pen.fillStyle = stroke.colour;
      pen.fill();
    }
    pen.stroke();
  }
  byId("draw-undo").disabled = !strokes.length;
  byId("draw-send").disabled = !strokes.length;
}
