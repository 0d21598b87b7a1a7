/**
 * All that the page knows and a session keeps: one plain object. What can be asked for again (images, answers) is kept
 * beside it, in `cache`.
 */

/** @import { Cache, Facts, Picture, Pixels, State } from "./types.js" */

/** @returns {State} */
function fresh() {
  return {
    shown: null, // the Picture on the desk
    question: {
      anatomy: null,
      lesion: null,
      share: 0.5,
      region: null,
      like: [],
      unlike: [],
      other_patients: true,
      one_per_patient: false,
      k: 60,
    },
    drawing: null, // run lengths of the drawn lesion
    view: {
      low: 0,
      high: 1,
      zoom: 1,
      x: 0.5,
      y: 0.5,
      outlines: true,
      labels: false,
      codes: false,
      why: true,
      flick: false,
      channel: 0,
      large: null, // the tile that fills the desk
    },
    tool: { kind: "none", class: 1, size: 5 },
    tab: "hits",
    hit: null, // the row of the chosen answer
    compare: [],
    marks: {},
    note: "",
    log: [],
  };
}

export const state = fresh();

/** Facts of network and archive, from the server. */
export const facts = /** @type {Facts} */ ({});

/** What was fetched or answered, and can be again. @type {Cache} */
export const cache = { looks: new Map(), thumbnails: new Map(), hits: null, patients: null, painted: null };

/** @type {[() => void, boolean][]} */
const listeners = [];
let due = "";
/** Whether a button or slider is held down: were it drawn anew, its click would be lost. (Menus tell of no release.) */
let held = false;
addEventListener("pointerdown", (event) => {
  const control = /** @type {HTMLElement} */ (event.target).closest("button, input, label");
  held = event.button === 0 && control !== null;
});
for (const name of ["pointerup", "pointercancel", "dragend"])
  addEventListener(name, () => {
    held = false;
    if (due) requestAnimationFrame(drawAnew);
  });
/** @type {string[]} */
const past = [];

/**
 * @param {() => void} listener called once a frame in which the state has changed
 * @param {boolean} [always] if the view alone, too
 */
export function onChange(listener, always = false) {
  listeners.push([listener, always]);
}

/**
 * Changes the state and has the page drawn anew.
 * @param {(state: State) => void} [edit] @param {"all"|"view"} [part]
 */
export function change(edit, part = "all") {
  edit?.(state);
  if (!due) requestAnimationFrame(drawAnew);
  if (due !== "all") due = part;
}

function drawAnew() {
  if (held && due === "all") return;
  const all = due === "all";
  due = "";
  for (const [listener, always] of listeners) if (all || always) listener();
}

/** Changes the view alone: what pointers do many times a second. @param {(state: State) => void} [edit] */
export function changeView(edit) {
  change(edit, "view");
}

/** Changes question or drawing, so that `undo` takes it back. @param {(state: State) => void} edit */
export function pose(edit) {
  past.push(JSON.stringify([state.question, state.drawing]));
  if (past.length > 100) past.shift();
  change(edit);
}

/** @returns {boolean} whether there was something to take back */
export function undo() {
  const before = past.pop();
  if (before === undefined) return false;
  change((now) => {
    [now.question, now.drawing] = JSON.parse(before);
  });
  return true;
}

/** @param {Record<string, any>} other a state as `JSON.parse` gives it; parts that it lacks begin afresh */
export function replace(other) {
  const start = fresh();
  past.length = 0;
  change((now) => {
    for (const [key, first] of Object.entries(start)) {
      const plain = first && typeof first === "object" && !Array.isArray(first);
      Object.assign(now, { [key]: plain ? { ...first, ...other[key] } : (other[key] ?? first) });
    }
  });
}

/** @param {Picture} picture @returns {string|number} what it is kept by */
export function keyOf(picture) {
  return picture.row ?? (picture.pixels ?? "") + (picture.slab ?? "");
}

/** @param {Picture} picture @returns {string} */
export function nameOf(picture) {
  if (picture.row === undefined) return picture.name || (picture.pixels ? "brought" : "the drawing");
  const about = cache.thumbnails.get(picture.row)?.about ?? cache.looks.get(picture.row)?.data.about;
  return about ? `${about.patient_id}, ${about.slice_index}` : `row ${picture.row}`;
}

/** The place among the hits, from 1, and the distance in words; null where a row is none. @param {number} [row] */
export function rankOf(row) {
  const i = cache.hits?.rows.indexOf(row ?? -1) ?? -1;
  return cache.hits && i >= 0 ? { place: i + 1, distance: cache.hits.distances[i].toPrecision(3) } : null;
}

/** Of planes [C,S,S] the channel in sight. @param {Pixels} planes @returns {Pixels} */
export function channel(planes) {
  const length = facts.size * facts.size;
  return planes.subarray(state.view.channel * length, (state.view.channel + 1) * length);
}

/** Run lengths of a map, as the server reads them. @param {Uint8Array} map @returns {number[]} */
export function toRuns(map) {
  const runs = [];
  for (let i = 0; i < map.length;) {
    let end = i;
    while (end < map.length && map[end] === map[i]) end++;
    runs.push(map[i], end - i);
    i = end;
  }
  return runs;
}

/** @param {number[]|null} runs @param {number} length @returns {Uint8Array} */
export function fromRuns(runs, length) {
  const map = new Uint8Array(length);
  let start = 0;
  for (let i = 0; runs && i < runs.length; i += 2) {
    map.fill(runs[i], start, start + runs[i + 1]);
    start += runs[i + 1];
  }
  return map;
}
