/** Two or more images side by side, with one window and one zoom; flicker and difference. */

import { look } from "./ask.js";
import { at, fill, make } from "./dom.js";
import { cache, change, channel, facts, keyOf, nameOf, rankOf, state } from "./state.js";
import { legend } from "./viewer.js";
import { draw } from "./viewport.js";

/** @import { Picture } from "./types.js" */
/** @import { Outline } from "./viewport.js" */

const MOST = 4;
const LABEL = "#dfe6ee";
/** Whether the two are shown by turns in one place, and which of them now; whether their difference is shown. */
const mode = { flick: -1, difference: false };
/** @type {(canvas: HTMLCanvasElement) => void} */
let navigate = () => {};

/** @param {(canvas: HTMLCanvasElement) => void} how canvases are moved in */
export function setUp(how) {
  navigate = how;
}

/** Puts a row beside the image on the desk, or takes it away again. @param {number|null} row */
export async function add(row) {
  if (row === null) return;
  const desk = state.shown;
  const began = !state.compare.length && desk && keyOf(desk) !== row;
  change((now) => {
    if (began) now.compare.push(desk);
    const rest = now.compare.filter((one) => keyOf(one) !== row);
    now.compare = rest.length < now.compare.length ? rest : [...now.compare.slice(0, MOST - 1), { row }];
    if (now.compare.length < 2 && !began) now.compare = [];
  });
  if (state.compare.length) at("compare").focus();
  for (const picture of state.compare) await look(picture); // a newer one would take the place of an older
}

/** Shows the image on the desk beside each of the hits in turn. @param {number|null} row */
export function follow(row) {
  if (row === null || state.compare.length !== 2) return;
  change((now) => {
    now.compare = [now.compare[0], { row }];
  });
  look({ row });
}

export function close() {
  [mode.flick, mode.difference] = [-1, false];
  change((now) => {
    now.compare = [];
  });
}

/** The next of the images in the one place, or back to side by side after `stop`. @param {boolean} [stop] */
export function flick(stop = false) {
  mode.flick = stop ? -1 : (mode.flick + 1) % state.compare.length;
  change();
}

export function difference() {
  mode.difference = !mode.difference;
  change();
}

export function render() {
  const box = at("compare");
  box.hidden = !state.compare.length;
  if (box.hidden) return;
  box.tabIndex = -1;
  /** @param {string} text @param {string} title @param {() => void} run @param {boolean} [pressed] */
  const button = (text, title, run, pressed = false) =>
    make(
      "button",
      {
        "data-key": text,
        title,
        onclick: run,
        "aria-pressed": pressed,
      },
      text,
    );
  const shown = mode.flick >= 0 ? [state.compare[mode.flick % state.compare.length]] : state.compare;
  const places = shown.map((picture) => place(nameOf(picture), String(keyOf(picture)).slice(0, 40), picture));
  if (mode.difference && mode.flick < 0)
    places.push(place("Difference of the first two, twofold", "difference", null));
  fill(
    box,
    make(
      "div.bar",
      {},
      make("h2", {}, "Compare"),
      button("Flicker", "One place, by turns: each press shows the next (F)", () => flick(), mode.flick >= 0),
      button("Side by side", "S", () => flick(true), mode.flick < 0),
      button("Difference", "Of the first two (X)", difference, mode.difference),
      button(
        "Lesion",
        "Outlines of the lesions seen (O)",
        () =>
          change((now) => {
            now.view.outlines = !now.view.outlines;
          }),
        state.view.outlines,
      ),
      make("span.soft", {}, "Up and down: the hit before or after. Window and zoom go together."),
      make("span.spring"),
      button("Close", "Escape", close),
    ),
    make("div.side", {}, ...places),
  );
  drawAll();
}

/** @param {string} name @param {string} key @param {Picture|null} picture none for the difference */
function place(name, key, picture) {
  const canvas = make("canvas", {
    tabIndex: 0,
    "data-key": key,
    "data-compare": picture ? String(state.compare.indexOf(picture)) : "",
    "aria-label": name,
  });
  navigate(canvas);
  const notes = picture ? note(picture) : [];
  return make("div.tile", {}, canvas, make("div.caption", {}, name), make("div.note", {}, ...notes));
}

/** @param {Picture} picture */
function note(picture) {
  const rank = rankOf(picture.row);
  const seen = cache.looks.get(keyOf(picture));
  return [
    rank && `hit ${rank.place}, distance ${rank.distance} · `,
    ...(!seen ? [] : seen.data.at_hand ? legend(seen.arrays.lesion) : ["painted from its codes"]),
  ];
}

/** Draws the images into their places; also where window or zoom alone have changed. */
export function drawAll() {
  if (!state.compare.length) return;
  const looks = state.compare.map((picture) => cache.looks.get(keyOf(picture))?.arrays);
  for (const canvas of at("compare").querySelectorAll("canvas")) {
    const own = canvas.dataset.compare === "" ? null : looks[Number(canvas.dataset.compare)];
    if (own) {
      /** @type {Outline[]} */
      const outlines = state.view.outlines ? [{ labels: own.lesion, colours: facts.colours }] : [];
      if (state.view.labels) outlines.push({ labels: own.label, colours: facts.colours.map(() => LABEL) });
      draw(canvas, { plane: { pixels: channel(own.image), most: 65535 }, outlines }, state.view);
    } else if (canvas.dataset.compare === "" && looks[0] && looks[1]) {
      const [first, second] = [channel(looks[0].image), channel(looks[1].image)];
      const pixels = first.map((value, i) => Math.min(65535, 2 * Math.abs(value - second[i])));
      draw(canvas, { plane: { pixels, most: 65535, fixed: true } }, state.view);
    } else draw(canvas, { plane: null });
  }
}
