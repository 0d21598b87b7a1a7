/** The archive: patients, filters, the slices of one; and what the reader brings. */

import { show, telling, thumbnails } from "./ask.js";
import { chosen, isDicom, sort } from "./bring.js";
import { at, fill, make, say } from "./dom.js";
import { bring, call } from "./server.js";
import { cache, change, channel, facts, state } from "./state.js";
import { drawEach } from "./viewport.js";
import { draggable } from "./question.js";

/** @import { Found } from "./bring.js" */
/** @import { About, Patient } from "./types.js" */

const filter = { text: "", where: /** @type {Record<string, string>} */ ({}) };
/** @type {{count: number, patients: Patient[]}} */
let found = { count: 0, patients: [] };
/**
 * The slices of the patient that is open, or of the scan that was brought, and at which of these the reader is.
 * @typedef {{rows: number[], about: About[], name: string}} OpenPatient
 * @typedef {{rows?: undefined, id: string, slices: number[], name: string, scan: boolean, at: number}} OpenScan
 * @type {OpenPatient|OpenScan|null}
 */
let opened = null;
/** The row that the strip was last moved to. @type {number|undefined} */
let centred;

/** Fetches the list by the filter; from `start` on, to be added. @param {number} [start] */
export async function find(start = 0) {
  const answer = await telling(() => call("patients", { ...filter, start }));
  if (!answer) return;
  found = { count: answer.data.count, patients: [...(start ? found.patients : []), ...answer.data.patients] };
  change();
}

/**
 * Opens a patient at one of its slices.
 * @param {number} row @param {boolean} [exactly] that slice, or else one in the middle
 */
export async function openPatient(row, exactly = true) {
  const answer = await telling(() => call("slices", { row }));
  if (!answer) return;
  const { rows, about } = answer.data;
  opened = { rows, about, name: about[0].patient_id };
  rows.forEach((one, i) => {
    if (!cache.thumbnails.has(one)) cache.thumbnails.set(one, { about: about[i] });
  });
  show({ row: exactly ? row : best(rows, about) });
  thumbnails(rows, about);
}

/** A slice to begin with: in the middle of those that fit the filter. @param {number[]} rows @param {About[]} about */
function best(rows, about) {
  const capital = (/** @type {About[string]} */ value) =>
    typeof value === "boolean" ? (value ? "True" : "False") : String(value);
  const fitting = rows.filter((_, i) =>
    Object.entries(filter.where).every(([column, value]) => capital(about[i][column]) === value),
  );
  const abnormal = fitting.filter((row) => about[rows.indexOf(row)].has_abnormality);
  const some = abnormal.length ? abnormal : fitting.length ? fitting : rows;
  return some[Math.floor(some.length / 2)];
}

/**
 * Brings files: a scan, of which a slice is then chosen, or a picture. Names of DICOM files may be a patient's.
 * @param {Found[]} found
 */
export async function take(found) {
  const groups = found.length ? await sort(found) : null;
  if (!groups) return;
  say("Reading the scan …");
  const [first] = groups.flat(); // of the first modality that is not missing
  const name = (await isDicom(first)) ? "DICOM" : first.name.replace(/\.nii(\.gz)?$/i, "");
  const answer = await telling(() => bring(groups), groups.length === 1 ? first.name : undefined);
  if (!answer) return;
  const { id, slices, scan } = answer.data;
  opened = { id, slices, name, scan, at: Math.floor(slices.length / 2) };
  say("");
  await choose(opened.at);
}

/** Shows the i-th slice of what is open. @param {number} i */
export async function choose(i) {
  if (!opened) return;
  const all = opened.rows ?? opened.slices;
  const index = Math.min(all.length - 1, Math.max(0, i));
  if (opened.rows) {
    await show({ row: opened.rows[index] });
    return;
  }
  opened.at = index;
  const { id, name, scan } = opened;
  const slice = all[index];
  const answer = await telling(() => call("slice_of", { id, slice }));
  if (!answer) return;
  await show({
    pixels: base64(answer.arrays.pixels),
    slab: base64(answer.arrays.slab),
    ...(scan ? { name: `${name}, ${slice}`, scan: id } : { name }),
  });
}

/** Bytes in base64. @param {Uint16Array | Float32Array} array */
function base64(array) {
  const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

/** @param {number} by slices upwards */
export function step(by) {
  const i = place();
  if (i >= 0) choose(i + by);
}

function place() {
  if (!opened) return -1;
  return opened.rows ? opened.rows.indexOf(state.shown?.row ?? -1) : opened.at;
}

export function render() {
  fill(
    at("archive"),
    make(
      "button",
      {
        "data-key": "bring",
        onclick: () => at("file").click(),
        title: `${facts.pictures ? "PNG, JPEG or DICOM" : "NIfTI or DICOM, all its files"} (B)`,
      },
      facts.pictures ? "Bring a picture …" : "Bring a scan …",
    ),
    make("input", {
      type: "search",
      placeholder: "Patient …",
      value: filter.text,
      "data-key": "search",
      "aria-label": "Patient id contains",
      oninput: (event) => {
        filter.text = event.currentTarget.value;
        find();
      },
    }),
    ...Object.entries(facts.choices ?? {}).map(([column, values]) => select(column, values)),
    make("div.soft", {}, `${found.count.toLocaleString("en")} patients`),
    list(),
    opened && slices(opened),
  );
  drawEach(at("archive").querySelectorAll("canvas"), (canvas) => {
    const small = cache.thumbnails.get(Number(canvas.dataset.row))?.image;
    return { plane: small ? { pixels: channel(small), most: 255 } : null };
  });
  if (centred !== state.shown?.row) {
    centred = state.shown?.row;
    at("archive").querySelector(".strip .chosen")?.scrollIntoView({ block: "nearest", inline: "center" });
  }
}

/** The filter by a column. @param {string} column @param {string[]} values */
function select(column, values) {
  const name = column.replaceAll("_", " ");
  return make(
    "select",
    {
      "data-key": `filter-${column}`,
      "aria-label": name,
      onchange: (event) => {
        delete filter.where[column];
        if (event.currentTarget.value) filter.where[column] = event.currentTarget.value;
        find();
      },
    },
    make("option", { value: "" }, `${name}: any`),
    ...values.map((value) => make("option", { value, selected: filter.where[column] === value }, `${name}: ${value}`)),
  );
}

function more() {
  return find(found.patients.length);
}

function list() {
  return make(
    "ul.patients",
    { "data-scroll": "patients" },
    ...found.patients.map((patient) =>
      make(
        "li",
        {},
        make(
          "button",
          {
            "data-key": `patient-${patient.id}`,
            "aria-pressed": opened?.rows?.includes(patient.row) ?? false,
            onclick: () => openPatient(patient.row, false),
          },
          make("span", {}, patient.id),
          make("span.soft", {}, patient.fit),
        ),
      ),
    ),
    found.patients.length < found.count &&
      make("li", {}, make("button.more", { "data-key": "more", onclick: more }, "More …")),
    !found.count && make("li.empty", {}, "No patient fits the filter."),
  );
}

/** @param {OpenPatient|OpenScan} opened */
function slices(opened) {
  const count = (opened.rows ?? opened.slices).length;
  const i = place();
  const height = opened.rows && i >= 0 ? opened.about[i].position_mm : undefined;
  const box = make(
    "div.slices",
    {},
    make("div.row", {}, make("b", {}, opened.name), make("span.soft", {}, i < 0 ? "" : `${i + 1} / ${count}`)),
    make("input", {
      type: "range",
      min: "0",
      max: String(count - 1),
      value: String(Math.max(i, 0)),
      "data-key": "slice",
      "aria-label": "Slice, from the feet up",
      onchange: (event) => choose(Number(event.currentTarget.value)),
    }),
    height !== undefined && make("span.soft", {}, `${height.toFixed(0)} mm`),
  );
  if (opened.rows) box.append(strip(opened.rows, state.shown?.row));
  return box;
}

/** Thumbnails in a line. @param {number[]} rows @param {number|undefined} chosen */
function strip(rows, chosen) {
  return make(
    "div.strip",
    { "data-scroll": "strip" },
    ...rows.map((row) => {
      const thumb = make(
        `button.thumb.small${row === chosen ? ".chosen" : ""}`,
        {
          "data-key": `slice-${row}`,
          tabIndex: -1,
          "aria-label": `slice ${cache.thumbnails.get(row)?.about?.slice_index}`,
          onclick: () => show({ row }),
        },
        make("canvas", { "data-row": String(row) }),
      );
      draggable(thumb, () => ({ row }));
      return thumb;
    }),
  );
}
