/** What the page fetches: looks, thumbnails, paintings and answers. */

import { say } from "./dom.js";
import { call, Refused } from "./server.js";
import { cache, change, facts, keyOf, state } from "./state.js";

/** @import { About, Picture, Question } from "./types.js" */

const KEPT = 48;
const THUMBNAILS = 64; // asked for at a time
const KEPT_THUMBNAILS = 600;

/**
 * Runs a request; what went wrong is told, unless a newer one took its place.
 * @template Result @param {() => Promise<Result>} request
 * @param {string} [name] of the file that it is about, which the server is not told
 */
export async function telling(request, name) {
  try {
    return await request();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status !== 409) say(name ? error.message.replace(/^the file/, `“${name}”`) : error.message, true);
    return undefined;
  }
}

/** Shows a picture on the desk. @param {Picture} picture */
export async function show(picture) {
  change((now) => {
    now.shown = picture;
  });
  await Promise.all([look(picture), paint()]);
}

/** @param {Picture} picture */
export async function look(picture) {
  const key = keyOf(picture);
  if (cache.looks.has(key)) return;
  const answer = await telling(() => call("look", { image: picture }));
  if (!answer) return;
  keep(cache.looks, key, answer, KEPT);
  say("");
  change();
}

/** Fetches the thumbnails of rows that are not there yet. @param {number[]} rows @param {About[]} [about] */
export async function thumbnails(rows, about) {
  rows.forEach((row, i) => {
    if (about && !cache.thumbnails.has(row)) cache.thumbnails.set(row, { about: about[i] });
  });
  const missing = [...new Set(rows)].filter((row) => !cache.thumbnails.get(row)?.image);
  for (let start = 0; start < missing.length; start += THUMBNAILS) {
    const some = missing.slice(start, start + THUMBNAILS);
    const answer = await telling(() => call("thumbnails", { rows: some }));
    if (!answer) return;
    const part = (/** @type {Uint8Array} */ array, /** @type {number} */ i) =>
      array.slice((i * array.length) / some.length, ((i + 1) * array.length) / some.length);
    some.forEach((row, i) =>
      cache.thumbnails.set(row, {
        about: answer.data.about[i],
        image: part(answer.arrays.image, i),
        label: part(answer.arrays.label, i),
      }),
    );
    change();
  }
  forgetThumbnails(rows);
}

/** Forgets the images, not the names, of the oldest thumbnails. @param {number[]} used rows that are in sight */
function forgetThumbnails(used) {
  for (const row of used) {
    const one = cache.thumbnails.get(row);
    if (!one) continue;
    cache.thumbnails.delete(row);
    cache.thumbnails.set(row, one);
  }
  let spare = [...cache.thumbnails.values()].filter((one) => one.image).length - KEPT_THUMBNAILS;
  for (const [row, { about, image }] of cache.thumbnails) {
    if (spare <= 0) return;
    if (!image) continue;
    cache.thumbnails.set(row, { about });
    spare--;
  }
}

/** What the network paints from the drawing and the anatomy. */
export async function paint() {
  const anatomy = state.question.anatomy ?? state.shown;
  if (!state.drawing || !anatomy) {
    cache.painted = null;
    return change();
  }
  const key = JSON.stringify([keyOf(anatomy), state.drawing]);
  if (cache.painted?.key === key) return undefined;
  const answer = await telling(() => call("paint", { anatomy, drawing: state.drawing }));
  if (!answer) return undefined;
  cache.painted = { key, pixels: answer.arrays.painted };
  return change();
}

/** The question as it would be asked, or null where an image lacks. @returns {Question|null} */
export function posed() {
  const question = structuredClone(state.question);
  if ((question.share < 1 && !question.anatomy) || (question.share > 0 && !question.lesion)) return null;
  if (question.share === 0) question.lesion = null;
  if (question.share === 1) question.anatomy = null;
  return question;
}

/** Asks the question, fills the list of answers and the log. @param {boolean} [again] whether a session is opened */
export async function ask(again = false) {
  const question = posed();
  if (!question) return say("Choose an image for the empty place first, or draw a lesion.");
  say("Searching …");
  const began = performance.now();
  const answer = await telling(() => call("ask", question));
  if (!answer) return undefined;
  const { rows, distances, parts, about } = answer.data;
  const cells = facts.grid * facts.grid;
  const why = rows.map((_, i) => answer.arrays.why.subarray(i * cells, (i + 1) * cells));
  const sorted = Float32Array.from(answer.arrays.why).sort();
  cache.hits = {
    rows,
    distances,
    parts,
    why,
    most: Math.max(sorted[Math.floor(0.98 * sorted.length)] ?? 1, 1e-6),
    question,
  };
  say(`${rows.length} slices in ${Math.round(performance.now() - began)} ms`);
  change((now) => {
    now.tab = "hits";
    now.hit = rows.includes(now.hit ?? -1) ? now.hit : (rows[0] ?? null);
    if (!again) now.log.push({ question, rows, distances, at: new Date().toISOString() });
  });
  await thumbnails(rows, about);
  return rows;
}

/** Whether the image on the desk is of a patient, the archive's or a scan's that was brought. @returns {boolean} */
export function ofPatient() {
  return state.shown?.row !== undefined || state.shown?.scan !== undefined;
}

/** Asks for the patients nearest to the one on the desk. */
export async function askPatients() {
  const { row, scan } = state.shown ?? {};
  const of = row !== undefined ? { row } : scan !== undefined ? { scan } : null;
  if (!of) return say("Choose a slice of a patient, or bring a scan, first.");
  say("Comparing patients …");
  const question = { ...of, share: state.question.share };
  const answer = await telling(() => call("ask_patients", question));
  if (!answer) return undefined;
  cache.patients = { ...answer.data, share: question.share, image: answer.arrays.image };
  say(`${answer.data.patients.length} patients`);
  change((now) => {
    now.tab = "patients";
    now.log.push({
      patients: question,
      ids: answer.data.patients,
      distances: answer.data.distances,
      at: new Date().toISOString(),
    });
  });
  const matched = Object.values(answer.data.matches)
    .flat(2)
    .filter((match) => match >= 0);
  return thumbnails([...answer.data.rows, ...matched]);
}

/**
 * Keeps at most so many, the newest.
 * @template Key, Value @param {Map<Key, Value>} map @param {Key} key @param {Value} value @param {number} most
 */
function keep(map, key, value, most) {
  map.set(key, value);
  for (const oldest of map.keys()) {
    if (map.size <= most) return;
    map.delete(oldest);
  }
}
