/** Sessions: saved with every question and its answer, opened and asked again; hits and a contact sheet. */

import { ask, look, paint, telling, thumbnails } from "./ask.js";
import { download, make, say } from "./dom.js";
import { call } from "./server.js";
import { cache, facts, keyOf, nameOf, replace, state } from "./state.js";
import { draw } from "./viewport.js";

const FORMAT = 1;
const SHEET = { columns: 6, side: 200, gap: 10, caption: 40 };

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
  let session;
  try {
    session = JSON.parse(await file.text());
  } catch {
    session = null;
  }
  if (session?.format !== FORMAT || typeof session.state !== "object") {
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
  let same = 0;
  for (const entry of state.log) {
    const before = entry.rows ?? entry.ids;
    const answer = await telling(() =>
      entry.patients ? call("ask_patients", entry.patients) : call("ask", entry.question),
    );
    if (!answer) return;
    const now = answer.data.rows && entry.rows ? answer.data.rows : answer.data.patients;
    if (JSON.stringify(now) === JSON.stringify(before)) same++;
  }
  const last = state.log.filter((entry) => entry.question).at(-1);
  if (last) {
    state.question = structuredClone({ ...state.question, ...last.question });
    await ask(true);
  }
  const count = state.log.length;
  say(
    same === count
      ? `Session opened: ${count} questions asked again, all with the same answers.`
      : `Session opened: of ${count} questions asked again, ${count - same} have other answers now` +
          " (are the images at hand, as they were?)",
    same !== count,
  );
}

/** The hits of the last question as a table, as `evaluate.py search` writes them; with marks and notes. */
export function saveHits() {
  if (!cache.hits) return say("Ask first; the hits are then saved.");
  const quote = (value) => `"${String(value).replaceAll('"', '""')}"`;
  // A cell that begins like a formula would be one in a spreadsheet.
  const cell = (value) => quote(/^[=+\-@\t\r]/.test(String(value)) && typeof value === "string" ? `'${value}` : value);
  const lines = cache.hits.rows.map((row, i) => {
    const about = cache.thumbnails.get(row).about;
    return [
      i + 1,
      row,
      about.patient_id,
      about.slice_index,
      cache.hits.distances[i],
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

/** A contact sheet: the images asked with and the hits, or the marked ones if there are any. */
export async function saveSheet() {
  const marked = Object.keys(state.marks).map(Number);
  const rows = marked.length ? marked : (cache.hits?.rows.slice(0, 24) ?? []);
  if (!rows.length) return say("Ask first, or mark hits; they are then put on the sheet.");
  await thumbnails(rows);
  const { question } = state;
  const asked = [question.share < 1 && question.anatomy, question.share > 0 && question.lesion].filter(
    (picture) => picture && picture.drawing === undefined,
  );
  const pictures = [...new Map(asked.map((picture) => [keyOf(picture), picture])).values()];
  for (const picture of pictures) await look(picture);
  const canvas = sheet(pictures, rows);
  return canvas.toBlob((blob) => {
    if (blob) download("sheet.png", blob);
  }, "image/png");
}

function sheet(pictures, rows) {
  const { columns, side, gap, caption } = SHEET;
  const lines = Math.ceil((pictures.length + rows.length) / columns);
  const canvas = make("canvas", { width: columns * (side + gap) + gap, height: 60 + lines * (side + caption + gap) });
  const context = canvas.getContext("2d");
  context.fillStyle = "#0a0c0f";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "#c3ccd6";
  context.font = "600 18px system-ui, sans-serif";
  context.fillText("Reading room — not for diagnosis", gap, 26);
  context.font = "14px system-ui, sans-serif";
  context.fillText(state.note.replaceAll("\n", " ").slice(0, 150), gap, 48);
  const tile = make("canvas");
  // Laid out out of sight, for `draw` goes by the size on the page.
  tile.style.cssText = `position:fixed;left:-999px;width:${side}px;height:${side}px`;
  document.body.append(tile);
  const all = [...pictures.map((picture) => ({ picture, row: -1 })), ...rows.map((row) => ({ picture: { row }, row }))];
  all.forEach(({ picture, row }, i) => {
    const x = gap + (i % columns) * (side + gap);
    const y = 60 + Math.floor(i / columns) * (side + caption + gap);
    const own = cache.looks.get(keyOf(picture))?.arrays.image;
    draw(tile, {
      plane:
        row < 0 ? (own ? { pixels: own, most: 65535 } : null) : { pixels: cache.thumbnails.get(row)?.image, most: 255 },
    });
    context.drawImage(tile, x, y, side, side);
    context.strokeStyle = "#4f9fdc";
    context.lineWidth = 3;
    if (row < 0) context.strokeRect(x, y, side, side);
    const rank = cache.hits?.rows.indexOf(row) ?? -1;
    context.fillText(nameOf(picture).slice(0, 28), x, y + side + 16);
    context.fillText(
      (state.marks[row]?.note || (rank >= 0 ? `rank ${rank + 1}` : row < 0 ? "asked with" : "")).slice(0, 28),
      x,
      y + side + 34,
    );
  });
  tile.remove();
  return canvas;
}
