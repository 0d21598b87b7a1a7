/** What the keys do. */

import { step, take } from "./archive.js";
import { ask, askPatients } from "./ask.js";
import * as bring from "./bring.js";
import * as compare from "./compare.js";
import { at, fill, make, say } from "./dom.js";
import * as hits from "./hits.js";
import { addExample, askAnew, askBy, put } from "./question.js";
import * as session from "./session.js";
import { change, facts, state } from "./state.js";
import { enlarge, pick, reset, showChannel, takeBack } from "./viewer.js";
import { window_, zoomAt } from "./viewport.js";

/** @import { Switch } from "./types.js" */

const toggle = (/** @type {Switch} */ key) =>
  change((now) => {
    now.view[key] = !now.view[key];
  });
const zoom = (/** @type {number} */ factor) =>
  change(({ view }) => zoomAt(view, factor, { x: view.x * facts.size, y: view.y * facts.size }));
const grey = (/** @type {number} */ width, /** @type {number} */ level) =>
  change((now) => window_(now.view, width, level));
const size = (/** @type {number} */ by) =>
  change((now) => {
    now.tool.size = Math.min(Math.round(facts.size / 3), Math.max(1, now.tool.size + by));
  });
const comparing = () => state.compare.length > 0;
const moved = (/** @type {() => void} */ move) => () => {
  move();
  compare.follow(state.hit);
};
const hit = () => (state.hit === null ? null : { row: state.hit });

/** Key, what it is called, what it does. @type {[string, string, () => unknown][]} */
const KEYS = [
  ["1", "ask by anatomy", () => askBy(0)],
  ["2", "ask by both", () => askBy(0.5)],
  ["3", "ask by lesion", () => askBy(1)],
  ["4", "patients like this one", askPatients],
  ["Enter", "ask the question as it stands", () => ask()],
  ["i", "ask by the image on the desk alone", askAnew],
  ["a", "its anatomy into the question", () => put("anatomy", hits.target())],
  ["l", "its lesion into the question", () => put("lesion", hits.target())],
  ["p", "more like this hit", () => addExample("like", hit())],
  ["n", "less like this hit", () => addExample("unlike", hit())],
  ["ArrowRight", "next hit", moved(() => hits.move(1))],
  ["ArrowLeft", "hit before", moved(() => hits.move(-1))],
  ["ArrowDown", "next patient", moved(() => hits.movePatient(1))],
  ["ArrowUp", "patient before", moved(() => hits.movePatient(-1))],
  ["PageUp", "slice above", () => step(1)],
  ["PageDown", "slice below", () => step(-1)],
  ["m", "mark the hit", () => hits.mark(state.hit)],
  ["c", "compare the hit with the desk", () => compare.add(state.hit)],
  ["f", "flicker", () => (comparing() ? compare.flick() : toggle("flick"))],
  ["s", "side by side", () => comparing() && compare.flick(true)],
  ["x", "difference in comparison", () => comparing() && compare.difference()],
  ["d", "draw a lesion", () => facts.can_draw && pick("draw")],
  ["e", "erase", () => facts.can_draw && pick("erase")],
  ["r", "mark a region", () => pick("region")],
  [
    "v",
    "put the brush down",
    () =>
      change((now) => {
        now.tool.kind = "none";
      }),
  ],
  ["]", "larger brush", () => size(1)],
  ["[", "smaller brush", () => size(-1)],
  [
    "k",
    "next class to draw",
    () =>
      change((now) => {
        now.tool.class = (now.tool.class % facts.classes.length) + 1;
      }),
  ],
  ["o", "outline of the lesion seen", () => toggle("outlines")],
  ["t", "outline of the label", () => toggle("labels")],
  ["g", "codes of the cells", () => toggle("codes")],
  ["w", "why: tint of the cells", () => toggle("why")],
  ["h", "next modality", () => showChannel(state.view.channel + 1)],
  ["z", "the image alone", () => enlarge("image")],
  ["+", "zoom in", () => zoom(1.25)],
  ["-", "zoom out", () => zoom(0.8)],
  [".", "brighter", () => grey(0, -0.03)],
  [",", "darker", () => grey(0, 0.03)],
  ["<", "more contrast", () => grey(-0.1, 0)],
  [">", "less contrast", () => grey(0.1, 0)],
  ["0", "window and zoom as at first", reset],
  ["b", "bring an image", () => at("file").click()],
  ["?", "these keys", help],
];
const NAMES = { ArrowRight: "→", ArrowLeft: "←", ArrowDown: "↓", ArrowUp: "↑" };

export function setUp() {
  document.addEventListener("keydown", (event) => {
    const target = /** @type {HTMLElement} */ (event.target);
    const writes = target.matches("textarea, select, input:not([type=range]):not([type=checkbox])");
    if (event.key === "Escape" && !at("keys").open && !at("bring").open) {
      if (at("status").matches(".error")) say("");
      else if (comparing()) compare.close();
      else if (state.view.large) enlarge("");
      else if (state.tool.kind !== "none")
        change((now) => {
          now.tool.kind = "none";
        });
      else target.blur();
      return;
    }
    if ((event.ctrlKey || event.metaKey) && event.key === "z" && !writes) {
      event.preventDefault();
      takeBack();
      return;
    }
    if (writes || event.ctrlKey || event.metaKey || event.altKey || at("keys").open || at("bring").open) return;
    if (target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
    if (event.key === "Enter" && target.matches("button")) return;
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const found = KEYS.find(([key]) => key === name || (key === "+" && name === "="));
    if (!found) return;
    event.preventDefault();
    found[2]();
  });
  at("show-keys").addEventListener("click", help);
  at("open-session").addEventListener("click", () => at("session-file").click());
  at("session-file").addEventListener("change", () => {
    session.open(at("session-file").files?.[0]);
    at("session-file").value = "";
  });
  at("file").addEventListener("change", () => {
    take(bring.chosen(at("file").files ?? []));
    at("file").value = "";
  });
  at("save-session").addEventListener("click", session.save);
  at("save-hits").addEventListener("click", session.saveHits);
  at("save-sheet").addEventListener("click", session.saveSheet);
  dropped();
}

/** Files dropped anywhere on the page are brought. */
function dropped() {
  const files = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", async (event) => {
    document.body.classList.remove("dropping");
    if (!event.dataTransfer || !files(event)) return;
    event.preventDefault();
    const found = await bring.dropped(event.dataTransfer);
    if (found[0]?.path.endsWith(".json")) session.open(found[0].file);
    else take(found);
  });
}

function help() {
  fill(
    at("keys"),
    make("h2", {}, "Keys"),
    make(
      "dl",
      {},
      ...KEYS.flatMap(([key, what]) => [
        make(
          "dt",
          {},
          make(
            "kbd",
            {},
            NAMES[/** @type {keyof typeof NAMES} */ (key)] ?? (key.length === 1 ? key.toUpperCase() : key),
          ),
        ),
        make("dd", {}, what),
      ]),
      make("dt", {}, make("kbd", {}, "Ctrl Z")),
      make("dd", {}, "take back"),
      make("dt", {}, make("kbd", {}, "Esc")),
      make("dd", {}, "close, put down"),
    ),
    make(
      "p.soft",
      {},
      "With the brush in hand and the image focused, arrows move it, Shift farther, Space sets it down and lifts it. " +
        "On images the wheel zooms, dragging sets the window, Shift and dragging moves.",
    ),
  );
  at("keys").showModal();
}
