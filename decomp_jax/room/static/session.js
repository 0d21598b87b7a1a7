/** Sessions: saved with every question and its answer, opened and asked again; hits and a contact sheet. */

import { ask, look, paint, telling, thumbnails } from "./ask.js";
import { download, make, say } from "./dom.js";
import { call } from "./server.js";
import { cache, channel, facts, fromRuns, keyOf, nameOf, rankOf, replace, state } from "./state.js";
import { draw } from "./viewport.js";

/** @import { Picture, Question } from "./types.js" */
/** @import { Scene } from "./viewport.js" */

const FORMAT = 1;
const SHEET = { columns: 6, side: 200, gap: 10, caption: 40, head: 86 };

export function save() {
  const session = {
    format: FORMAT,
    program: "decomp-jax reading room",
    saved: new Date().toISOString(),
    model: facts.model,
    bank: facts.bank,
    images_at_hand: facts.at_hand,
    state,
  };
  download("session.json", new Blob([JSON.stringify(session, null, 1)], { type: "application/json" }));
}

/**
 * Opens a session: the page as it was, its questions asked again, and whether the answers are the same.
 * @param {File|undefined} file
 */
export async function open(file) {
  if (!file) return;
  /** @type {{format?: unknown, model?: unknown, bank?: unknown, state?: unknown}|null} */
  let session;
  try {
    session = JSON.parse(await file.text());
  } catch {
    session = null;
  }
  if (session?.format !== FORMAT || typeof session.state !== "object" || !session.state) {
    say("This file is no session of a reading room; choose a session.json that one has saved.", true);
    return;
  }
  if (session.model !== facts.model || session.bank !== facts.bank) {
    say("This session was held with another network or archive; start the room with those.", true);
    return;
  }
  replace(session.state);
  [cache.hits, cache.patients, cache.painted] = [null, null, null];
  await thumbnails(Object.keys(state.marks).map(Number));
  if (state.shown) await look(state.shown);
  await paint();
  await askAgain();
}

/** Asks every question of the log again, and tells whether the answers are the same. */
async function askAgain() {
  let [same, other] = [0, 0];
  for (const entry of state.log) {
    const before = "question" in entry ? entry.rows : entry.ids;
    const now = await telling(async () =>
      "question" in entry
        ? (await call("ask", entry.question)).data.rows
        : (await call("ask_patients", entry.patients)).data.patients,
    );
    if (!now) continue; // as of a scan that was brought and is no longer at hand
    if (JSON.stringify(now) === JSON.stringify(before)) same++;
    else other++;
  }
  const last = state.log.filter((entry) => "question" in entry).at(-1);
  if (last) {
    state.question = structuredClone({ ...state.question, ...last.question });
    await ask(true);
  }
  const count = state.log.length;
  const missing = count - same - other;
  say(
    same === count
      ? `Session opened: ${count} questions asked again, all with the same answers.`
      : `Session opened: of ${count} questions asked again, ${same} have the same answers` +
          (other ? `; ${other} have other ones (are the images at hand, as they were?)` : "") +
          (missing ? `; ${missing} could not be asked (bring their scans, and open the session again)` : ""),
    same !== count,
  );
}

/** The hits of the last question as a table, as `evaluate.py search` writes them; with marks and notes. */
export function saveHits() {
  const { hits } = cache;
  if (!hits) return say("Ask first; the hits are then saved.");
  /** @typedef {string|number|boolean} Value */
  const quote = (/** @type {Value} */ value) => `"${String(value).replaceAll('"', '""')}"`;
  // A cell that begins like a formula would be one in a spreadsheet.
  const cell = (/** @type {Value} */ value) =>
    quote(typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : value);
  const lines = hits.rows.map((row, i) => {
    const about = cache.thumbnails.get(row)?.about;
    return [
      i + 1,
      row,
      about?.patient_id ?? "",
      about?.slice_index ?? "",
      hits.distances[i],
      row in state.marks,
      state.marks[row]?.note ?? "",
    ]
      .map(cell)
      .join(",");
  });
  return download(
    "hits.csv",
    new Blob([["rank,row,patient_id,slice_index,distance,marked,note", ...lines, ""].join("\r\n")], {
      type: "text/csv",
    }),
  );
}

/** A contact sheet: what was asked with, and the hits, or the marked ones if there are any. */
export async function saveSheet() {
  const marked = Object.keys(state.marks).map(Number);
  const rows = marked.length ? marked : (cache.hits?.rows ?? []);
  if (!rows.length) return say("Ask first, or mark hits; they are then put on the sheet.");
  await thumbnails(rows);
  const question = cache.hits?.question;
  /** @type {Asked[]} */
  const asked = [];
  if (question?.anatomy) asked.push({ picture: question.anatomy, what: "anatomy asked with" });
  if (question?.lesion) asked.push({ picture: question.lesion, what: "lesion asked with" });
  for (const { picture } of asked) if (picture.drawing === undefined) await look(picture);
  const canvas = sheet(asked, rows, question);
  return canvas.toBlob((blob) => {
    if (blob) download("sheet.png", blob);
  }, "image/png");
}

/** What was asked, in a line. @param {Question} question */
function inWords(question) {
  const share = Math.round(100 * question.share);
  const names = (/** @type {Picture[]} */ pictures) => pictures.map(nameOf).join("; ");
  return [
    share === 0 ? "by anatomy" : share === 100 ? "by lesion" : `anatomy ${100 - share} : lesion ${share}`,
    question.region && "within a region",
    question.like.length && `like ${names(question.like)}`,
    question.unlike.length && `unlike ${names(question.unlike)}`,
    question.other_patients && "other patients only",
    question.one_per_patient && "one slice a patient",
  ]
    .filter(Boolean)
    .join(" · ");
}

/**
 * @typedef {{picture: Picture, what: string}} Asked
 * @param {Asked[]} asked @param {number[]} rows @param {Question} [question]
 */
function sheet(asked, rows, question) {
  const { columns, side, gap, caption, head } = SHEET;
  const lines = Math.ceil((asked.length + rows.length) / columns);
  const canvas = make("canvas", { width: columns * (side + gap) + gap, height: head + lines * (side + caption + gap) });
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  /** @param {string} text @param {number} x @param {number} y @param {number} [width] */
  const write = (text, x, y, width = canvas.width - 2 * gap) => {
    let cut = text;
    while (context.measureText(cut).width > width) cut = `${cut.slice(0, -2)}…`;
    context.fillText(cut, x, y);
  };
  context.fillStyle = "#0a0c0f";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "#c3ccd6";
  context.font = "600 18px system-ui, sans-serif";
  write("Reading room — not for diagnosis", gap, 26);
  context.font = "14px system-ui, sans-serif";
  if (question) write(inWords(question), gap, 50);
  write(state.note.replaceAll("\n", " "), gap, 72);
  const tile = make("canvas");
  // Laid out out of sight, for `draw` goes by the size on the page.
  tile.style.cssText = `position:fixed;left:-999px;width:${side}px;height:${side}px`;
  document.body.append(tile);
  /** @param {number} i @param {Scene} scene @param {string} first @param {string} second @param {boolean} [framed] */
  const place = (i, scene, first, second, framed) => {
    const x = gap + (i % columns) * (side + gap);
    const y = head + Math.floor(i / columns) * (side + caption + gap);
    draw(tile, scene);
    context.drawImage(tile, x, y, side, side);
    context.strokeStyle = "#4f9fdc";
    context.lineWidth = 3;
    if (framed) context.strokeRect(x, y, side, side);
    write(first, x, y + side + 17, side);
    write(second, x, y + side + 35, side);
  };
  asked.forEach(({ picture, what }, i) => place(i, askedScene(picture), nameOf(picture), what, true));
  rows.forEach((row, i) => {
    const rank = rankOf(row);
    const image = cache.thumbnails.get(row)?.image;
    const scene = { plane: image ? { pixels: channel(image), most: 255 } : null };
    place(
      asked.length + i,
      scene,
      nameOf({ row }),
      state.marks[row]?.note || (rank ? `${rank.place}, distance ${rank.distance}` : ""),
    );
  });
  tile.remove();
  return canvas;
}

/** An image or a drawing that was asked with, and the region. @param {Picture} picture @returns {Scene} */
function askedScene(picture) {
  const length = facts.size * facts.size;
  const image = cache.looks.get(keyOf(picture))?.arrays.image;
  const pixels = picture.drawing ? new Uint16Array(length) : image && channel(image);
  const outlines = [
    { labels: fromRuns(state.question.region, length), colours: ["#4f9fdc"] },
    { labels: fromRuns(picture.drawing ?? null, length), colours: facts.colours, fill: 0.6 },
  ];
  return { plane: pixels ? { pixels, most: 65535 } : null, outlines };
}
