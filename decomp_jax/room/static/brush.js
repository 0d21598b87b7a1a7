/** The brush: strokes without gaps that may end anywhere, by pointer or by keyboard. */

import { changeView, facts, fromRuns, pose, state, toRuns } from "./state.js";
import { inImage } from "./viewport.js";

/** @import { Point } from "./types.js" */

/**
 * The stroke under way: what it draws, with which value, its map, where the pen was last, and the pointer, -1 for keys.
 * @typedef {{target: "lesion"|"region", value: number, map: Uint8Array, last: Point, pointer: number}} Stroke
 * @type {Stroke|null}
 */
let stroke = null;
/** Where the brush is shown. @type {Point|null} */
let pen = null;

/** @returns {boolean} whether strokes draw */
export function drawing() {
  return state.tool.kind !== "none";
}

/** The drawn lesion and the region, with the stroke under way. @returns {{lesion: Uint8Array, region: Uint8Array}} */
export function maps() {
  const length = facts.size * facts.size;
  const own = { lesion: state.drawing, region: state.question.region };
  const read = (/** @type {keyof typeof own} */ name) =>
    stroke?.target === name ? stroke.map : fromRuns(own[name], length);
  return { lesion: read("lesion"), region: read("region") };
}

/** The brush as `Scene.cursor`. */
export function cursor() {
  return drawing() && pen ? { ...pen, radius: state.tool.size / 2 } : null;
}

/**
 * Lets a canvas be drawn on. The pointer is captured, so that a stroke goes on and ends outside of it, too.
 * @param {HTMLCanvasElement} canvas @param {() => void} lifted called after each stroke
 */
export function drawOn(canvas, lifted) {
  const end = () => finish(lifted);
  canvas.addEventListener("pointerdown", (event) => {
    if (!drawing() || event.button !== 0) return;
    event.preventDefault();
    canvas.focus();
    canvas.setPointerCapture(event.pointerId);
    begin(inImage(canvas, event), event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drawing()) return;
    if (stroke?.pointer === event.pointerId) {
      // Positions between two frames come with the event; between those the line is straight.
      for (const one of event.getCoalescedEvents?.() ?? []) moveTo(inImage(canvas, one));
      moveTo(inImage(canvas, event));
    }
    pen = inImage(canvas, event);
    changeView();
  });
  for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) canvas.addEventListener(name, end);
  canvas.addEventListener("pointerleave", () => {
    if (!stroke) {
      pen = null;
      changeView();
    }
  });
  canvas.addEventListener("keydown", (event) => {
    if (drawing() && byKey(event, lifted)) event.stopPropagation();
  });
  canvas.addEventListener("blur", end);
}

/** @param {Point} point @param {number} pointer */
function begin(point, pointer) {
  const { kind } = state.tool;
  const target = kind.startsWith("region") ? "region" : "lesion";
  stroke = { target, map: maps()[target], last: point, pointer, value: kind === "draw" ? state.tool.class : 0 };
  if (kind === "region") stroke.value = 1;
  moveTo(point);
  changeView();
}

/** @param {() => void} lifted */
function finish(lifted) {
  if (!stroke) return;
  const { target, map } = stroke;
  stroke = null;
  const runs = map.some(Boolean) ? toRuns(map) : null;
  pose((now) => {
    if (target === "region") now.question.region = runs;
    else now.drawing = runs;
  });
  lifted();
}

/** Discs from the last point to this one, less than half a pixel apart. @param {Point} point */
function moveTo(point) {
  if (!stroke) return;
  const { last, map, value } = stroke;
  stampLine(map, facts.size, last, point, state.tool.size / 2, value);
  stroke.last = point;
}

/**
 * @param {Uint8Array} map @param {number} size @param {Point} from @param {Point} to
 * @param {number} radius @param {number} value
 */
export function stampLine(map, size, from, to, radius, value) {
  const steps = Math.max(1, Math.ceil(2 * Math.hypot(to.x - from.x, to.y - from.y)));
  for (let step = 0; step <= steps; step++) {
    const x = from.x + ((to.x - from.x) * step) / steps;
    const y = from.y + ((to.y - from.y) * step) / steps;
    const reach = Math.max(radius, 0.5);
    for (let row = Math.max(0, Math.floor(y - reach)); row <= Math.min(size - 1, y + reach); row++) {
      for (let column = Math.max(0, Math.floor(x - reach)); column <= Math.min(size - 1, x + reach); column++) {
        if (
          Math.hypot(column + 0.5 - x, row + 0.5 - y) <= reach ||
          (column === Math.floor(x) && row === Math.floor(y))
        ) {
          map[row * size + column] = value;
        }
      }
    }
  }
}

/**
 * Arrows move the brush, space sets it down and lifts it.
 * @param {KeyboardEvent} event @param {() => void} lifted @returns {boolean} whether the key was the brush's
 */
function byKey(event, lifted) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const move = moves[/** @type {keyof typeof moves} */ (event.key)];
  if (!move && event.key !== " ") return false;
  event.preventDefault();
  pen ??= { x: facts.size / 2, y: facts.size / 2 };
  if (move) {
    const far = event.shiftKey ? 4 : 1;
    const inside = (/** @type {number} */ value) => Math.min(facts.size, Math.max(0, value));
    pen = { x: inside(pen.x + far * move[0]), y: inside(pen.y + far * move[1]) };
    if (stroke) moveTo(pen);
  } else if (stroke) finish(lifted);
  else begin(pen, -1);
  changeView();
  return true;
}
