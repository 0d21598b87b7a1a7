/** The answers: hits grouped by patient, patients with their strips, and what was marked. */

import { openPatient } from "./archive.js";
import { add as compareWith } from "./compare.js";
import { at, fill, make } from "./dom.js";
import { ask } from "./ask.js";
import { addExample, draggable, put } from "./question.js";
import { cache, change, channel, facts, pose, rankOf, state } from "./state.js";
import { drawEach } from "./viewport.js";

/** @import { About, Hits, Patients, Tab } from "./types.js" */
/** @import { Scene } from "./viewport.js" */

const LABEL = "#dfe6ee";
const MOST_HITS = 200;
const NONE = "No slice within reach of this one's height";
const STRIP = 6; // slices of a patient in sight

/** Rows of the tab in sight, in the order of the list. @returns {number[]} */
export function listed() {
  if (state.tab === "marked") return Object.keys(state.marks).map(Number);
  if (state.tab === "hits" && cache.hits) return groups(cache.hits).flatMap(([, rows]) => rows);
  if (state.tab === "patients" && cache.patients)
    return [...new Set(strips(cache.patients).flat())].filter((row) => row >= 0);
  return [];
}

/** Rows by patient, in the order of each one's nearest. @param {Hits} hits @returns {[string, number[]][]} */
function groups({ rows }) {
  /** @type {Map<string, number[]>} */
  const byPatient = new Map();
  for (const row of rows) {
    const id = cache.thumbnails.get(row)?.about.patient_id ?? "…";
    byPatient.set(id, [...(byPatient.get(id) ?? []), row]);
  }
  return [...byPatient];
}

/** @param {number} by places on from the chosen hit */
export function move(by) {
  const rows = listed();
  if (!rows.length) return;
  const i = rows.indexOf(state.hit ?? -1);
  choose(rows[Math.min(rows.length - 1, Math.max(0, i < 0 ? 0 : i + by))]);
}

/** To the first hit of the next patient, or of the one before. @param {number} by */
export function movePatient(by) {
  if (state.tab !== "hits" || !cache.hits) return move(by);
  const all = groups(cache.hits);
  const i = all.findIndex(([, rows]) => rows.includes(state.hit ?? -1));
  choose(all[Math.min(all.length - 1, Math.max(0, i + by))][1][0]);
  return undefined;
}

/** @param {number} row */
function choose(row) {
  change((now) => {
    now.hit = row;
  });
  requestAnimationFrame(() => {
    const thumb = /** @type {HTMLElement|null} */ (at("answers").querySelector(`[data-key="hit-${row}"]`));
    thumb?.focus({ preventScroll: true });
    thumb?.scrollIntoView({ block: "nearest" });
  });
}

/** @param {number|null} row */
export function mark(row) {
  if (row === null) return;
  change((now) => {
    if (now.marks[row]) delete now.marks[row];
    else now.marks[row] = { note: "" };
  });
}

export function render() {
  const marked = Object.keys(state.marks).length;
  const tab = (/** @type {Tab} */ name, /** @type {string} */ text) =>
    make(
      "button",
      {
        role: "tab",
        "data-key": `tab-${name}`,
        "aria-selected": state.tab === name,
        onclick: () =>
          change((now) => {
            now.tab = name;
          }),
      },
      text,
    );
  const lists = { hits: hitList, patients: patientList, marked: markedList };
  fill(
    at("answers"),
    make(
      "div.tabs",
      { role: "tablist" },
      tab("hits", "Hits"),
      tab("patients", "Patients"),
      tab("marked", `Marked ${marked || ""}`),
      make("span.spring"),
      make(
        "button",
        {
          "data-key": "why",
          "aria-pressed": state.view.why,
          disabled: state.tab !== "hits",
          title: "Tint the cells that add to the distance (W)",
          onclick: () =>
            change((now) => {
              now.view.why = !now.view.why;
            }),
        },
        "Why",
      ),
    ),
    make("div.list", { "data-scroll": "answers" }, ...lists[state.tab]()),
    state.hit !== null && listed().includes(state.hit) && detail(state.hit),
  );
  drawEach(at("answers").querySelectorAll("canvas[data-row]"), ofThumb);
  drawEach(at("answers").querySelectorAll("canvas[data-slice]"), ofSlice);
}

/** @param {HTMLCanvasElement} canvas @returns {Scene} */
function ofThumb(canvas) {
  const row = Number(canvas.dataset.row);
  const small = cache.thumbnails.get(row);
  const { hits } = cache;
  const rank = hits && canvas.dataset.why ? hits.rows.indexOf(row) : -1;
  return {
    plane: small?.image ? { pixels: channel(small.image), most: 255 } : null,
    outlines:
      small?.image && state.view.labels ? [{ labels: small.label, colours: facts.colours.map(() => LABEL) }] : [],
    heat: hits && state.view.why && rank >= 0 ? { values: hits.why[rank], most: hits.most } : null,
  };
}

/** A slice of the scan that was asked with. @param {HTMLCanvasElement} canvas @returns {Scene} */
function ofSlice(canvas) {
  const image = cache.patients?.image;
  if (!image) return { plane: null };
  const i = Number(canvas.dataset.slice);
  const length = image.length / image.shape[0];
  const slice = image.subarray(i * length, (i + 1) * length);
  return { plane: { pixels: channel(slice), most: 255 } };
}

/** @param {number} row @param {string} text @param {{small?: boolean, why?: boolean}} [options] */
function thumb(row, text, { small, why } = {}) {
  const about = cache.thumbnails.get(row)?.about;
  const element = make(
    `button.thumb${small ? ".small" : ""}`,
    {
      "data-key": `hit-${row}`,
      "aria-pressed": state.hit === row,
      "aria-label": about ? `${about.patient_id}, slice ${about.slice_index}, ${text}` : text,
      onclick: () => choose(row),
      ondblclick: () => openPatient(row),
    },
    make("canvas", { "data-row": String(row), "data-why": why ? "1" : "" }),
    text && make("span", {}, text),
    state.marks[row] && make("span.mark", {}, "★"),
  );
  draggable(element, () => ({ row }));
  return element;
}

function hitList() {
  const { hits } = cache;
  if (!hits) {
    return [
      make(
        "div.empty",
        {},
        make("strong", {}, "Nothing asked yet"),
        "With an image on the desk press 1 for its anatomy, 2 for both, 3 for its lesion, 4 for patients; or drag " +
          "images into the two places below it.",
      ),
    ];
  }
  if (!hits.rows.length) return [make("div.empty", {}, "The archive has no other patient.")];
  const patients = groups(hits).map(([id, rows]) =>
    make(
      "div",
      {},
      make("div.group-head", {}, make("b", {}, id), make("span.soft", {}, rows.length > 1 ? rows.length : "")),
      make("div.thumbs", {}, ...rows.map((row) => thumb(row, rankOf(row)?.distance ?? "", { why: true }))),
    ),
  );
  const { k } = hits.question;
  const full = hits.rows.length === k && k < MOST_HITS;
  return [
    make("div.groups", {}, ...patients),
    full && make("button.more", { "data-key": "more-hits", onclick: more }, "More"),
  ];
}

function more() {
  pose((now) => {
    now.question.k = MOST_HITS;
  });
  return ask();
}

/** Of each patient, the matches of some slices of the one asked with, evenly. @param {Patients} answer */
function strips(answer) {
  const { matches, share } = answer;
  return matches[share > 0.5 ? "abnormal" : "normal"].map((rows) => places(answer).map((i) => rows[i]));
}

/** Which slices these are. @param {Patients} answer */
function places({ image, rows }) {
  const count = image ? image.shape[0] : rows.length;
  const length = Math.min(count, STRIP);
  return Array.from({ length }, (_, i) => Math.floor(((i + 0.5) * count) / length));
}

function patientList() {
  const answer = cache.patients;
  if (!answer) {
    return [
      make(
        "div.empty",
        {},
        make("strong", {}, "No patients compared yet"),
        "Press 4, or “Patients”, to find the patients nearest to the one on the desk, slice by slice.",
      ),
    ];
  }
  /** @param {string} id @param {string} text @param {Node[]} thumbs */
  const line = (id, text, thumbs) =>
    make(
      "div",
      {},
      make("div.group-head", {}, make("b", {}, id), make("span.soft", {}, text)),
      make("div.thumbs", {}, ...thumbs),
    );
  const slice = (/** @type {number} */ i) => make("div.thumb.small", {}, make("canvas", { "data-slice": String(i) }));
  const match = (/** @type {number} */ row) =>
    row >= 0 ? thumb(row, "", { small: true }) : make("div.thumb.small.none", { title: NONE }, "no match");
  const own = places(answer).map((i) => (answer.image ? slice(i) : thumb(answer.rows[i], "", { small: true })));
  const name = answer.image ? "the scan" : (cache.thumbnails.get(answer.rows[0])?.about.patient_id ?? "");
  return [
    line(name, "asked with", own),
    ...strips(answer).map((rows, n) => line(answer.patients[n], answer.distances[n].toPrecision(3), rows.map(match))),
  ];
}

function markedList() {
  const rows = Object.keys(state.marks).map(Number);
  /** @param {string} text @param {string} label @param {string} key @param {(text: string) => void} write */
  const note = (text, label, key, write) =>
    make("textarea", {
      value: text,
      placeholder: label,
      "aria-label": label,
      "data-key": key,
      oninput: (event) => write(event.currentTarget.value),
    });
  return [
    make("div.group-head", {}, make("b", {}, "Note of the session")),
    note(state.note, "What was asked, and what was found", "note", (text) => {
      state.note = text;
    }),
    rows.length
      ? null
      : make("div.empty", {}, "Mark a hit with M; it is kept here with a note and exported with the session."),
    ...rows.map((row) =>
      make(
        "div",
        {},
        make("div.group-head", {}, make("b", {}, cache.thumbnails.get(row)?.about?.patient_id ?? `row ${row}`)),
        make("div.thumbs", {}, thumb(row, "")),
        note(state.marks[row].note, "Note", `note-${row}`, (text) => {
          state.marks[row].note = text;
        }),
      ),
    ),
  ];
}

/** What is known of a row, and what can be done with it. @param {number} row */
function detail(row) {
  const about = cache.thumbnails.get(row)?.about;
  if (!about) return null;
  const { patient_id: id, slice_index: slice, ...rest } = about;
  const far = state.tab !== "patients" && distance(row);
  const said = (/** @type {About[string]} */ value) =>
    typeof value === "number" ? Number(value.toFixed(1)) : typeof value === "boolean" ? (value ? "yes" : "no") : value;
  const facts_ = Object.entries(rest).map(([name, value]) =>
    name === "position_mm" ? `${said(value)} mm` : `${name.replaceAll("_", " ")}: ${said(value)}`,
  );
  const button = (/** @type {string} */ text, /** @type {string} */ title, /** @type {() => unknown} */ run) =>
    make("button", { "data-key": `do-${text}`, title, onclick: run }, text);
  return make(
    "div.detail",
    {},
    make(
      "div.facts",
      {},
      make("b", {}, `${id}, slice ${slice}`),
      make("br"),
      ...(far ? [`distance ${far}`, make("br")] : []),
      facts_.join("  ·  "),
    ),
    make(
      "div.line",
      {},
      button("Its anatomy", "Into the place of the anatomy (A)", () => put("anatomy", { row })),
      button("Its lesion", "Into the place of the lesion (L)", () => put("lesion", { row })),
      button("More like it", "As a further example (P)", () => addExample("like", { row })),
      button("Less like it", "As a counter-example (N)", () => addExample("unlike", { row })),
      button("Compare", "Beside the image on the desk (C)", () => compareWith(row)),
      button(state.marks[row] ? "Unmark" : "Mark", "Kept with a note (M)", () => mark(row)),
      button("Open", "On the desk (double click)", () => openPatient(row)),
    ),
  );
}

/** A hit's distance, and of what it is made where both codes were asked by; null if it is none. @param {number} row */
function distance(row) {
  const rank = rankOf(row);
  const { normal, abnormal } = cache.hits?.parts ?? {};
  if (!rank || !normal || !abnormal) return rank && rank.distance;
  const [anatomy, lesion] = [normal, abnormal].map((part) => part[rank.place - 1].toPrecision(3));
  return `${rank.distance}: anatomy ${anatomy}, lesion ${lesion}`;
}

/** The picture that keys act on: the chosen hit while the answers have the focus, else that on the desk. */
export function target() {
  return state.hit !== null && at("answers").contains(document.activeElement) ? { row: state.hit } : state.shown;
}
