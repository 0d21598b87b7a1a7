/** The question: two places for images, what each counts, the region, examples and counter-examples. */

import { ask, askPatients, ofPatient, paint, posed } from "./ask.js";
import { at, fill, make } from "./dom.js";
import { cache, change, channel, facts, fromRuns, keyOf, nameOf, pose, state } from "./state.js";
import { draw } from "./viewport.js";

/** @import { Picture, Place, Question, State } from "./types.js" */

/** The picture that is being dragged. @type {Picture|null} */
let dragged = null;

/** Lets an element be dragged into a place. @param {HTMLElement} element @param {() => Picture|null} picture */
export function draggable(element, picture) {
  element.draggable = true;
  element.addEventListener("dragstart", (event) => {
    dragged = picture();
    event.dataTransfer?.setData("text/plain", "image");
  });
  element.addEventListener("dragend", () => {
    dragged = null;
  });
}

/** Puts a picture into a place. @param {Place} place @param {Picture|null} picture */
export function put(place, picture) {
  if (!picture) return;
  pose((now) => {
    now.question[place] = picture;
    if (place === "lesion" && picture.drawing === undefined) now.drawing = null;
    if (now.question.share === (place === "anatomy" ? 1 : 0)) now.question.share = 0.5;
  });
  paint();
}

/** Asks by the picture on the desk, with a share of the lesion. @param {number} share */
export function askBy(share) {
  pose((now) => {
    now.question.share = share;
    if (!now.shown) return;
    const mixed =
      now.question.anatomy && now.question.lesion && keyOf(now.question.anatomy) !== keyOf(now.question.lesion);
    if (!mixed || (now.drawing && !now.question.anatomy)) now.question.anatomy = now.shown;
    if (!mixed && !now.drawing) now.question.lesion = now.shown;
  });
  return ask();
}

/** Asks by the picture on the desk alone, whatever was in the places. */
export function askAnew() {
  if (!state.shown) return undefined;
  pose((now) => {
    Object.assign(now.question, { anatomy: now.shown, lesion: now.shown, like: [], unlike: [], region: null });
    now.drawing = null;
  });
  paint();
  return ask();
}

/** @param {"like"|"unlike"} list @param {Picture|null} picture */
export function addExample(list, picture) {
  if (!picture) return;
  const other = list === "like" ? "unlike" : "like";
  const rest = (/** @type {Picture[]} */ pictures) => pictures.filter((one) => keyOf(one) !== keyOf(picture));
  pose((now) => {
    now.question[other] = rest(now.question[other]);
    now.question[list] = [...rest(now.question[list]), picture];
  });
  if (posed()) ask();
}

export function render() {
  const { question } = state;
  const share = Math.round(100 * question.share);
  const set =
    (/** @type {"other_patients"|"one_per_patient"} */ name) =>
    (/** @type {{currentTarget: HTMLInputElement}} */ event) =>
      pose((now) => {
        now.question[name] = event.currentTarget.checked;
      });
  fill(
    at("question"),
    slot("anatomy", "Anatomy of", question.share === 1),
    make(
      "div.balance",
      {},
      make("div.ends", {}, make("b", {}, `${100 - share} : ${share}`)),
      make("input", {
        type: "range",
        min: "0",
        max: "100",
        step: "5",
        value: String(share),
        "data-key": "share",
        "aria-label": "Share of the lesion in the question",
        title: "What counts how much",
        onchange: (event) => {
          pose((now) => {
            now.question.share = Number(event.currentTarget.value) / 100;
          });
          if (posed()) ask();
        },
      }),
    ),
    slot("lesion", "Lesion of", question.share === 0),
    make(
      "div.buttons",
      {},
      make("button.main", { "data-key": "ask", disabled: !posed(), title: "Enter", onclick: () => ask() }, "Ask"),
      make(
        "button",
        {
          "data-key": "ask-patients",
          disabled: !ofPatient(),
          title: "Patients like the one on the desk (4)",
          onclick: askPatients,
        },
        "Patients",
      ),
    ),
    make(
      "div.line",
      {},
      make(
        "label",
        {},
        make("input", {
          type: "checkbox",
          checked: question.other_patients,
          "data-key": "others",
          onchange: set("other_patients"),
        }),
        "other patients only",
      ),
      make(
        "label",
        {},
        make("input", {
          type: "checkbox",
          checked: question.one_per_patient,
          "data-key": "single",
          onchange: set("one_per_patient"),
        }),
        "one slice a patient",
      ),
      ...chips(),
    ),
  );
  for (const canvas of at("question").querySelectorAll("canvas"))
    paintSlot(canvas, question[/** @type {Place} */ (canvas.dataset.place)]);
}

/** @param {Place} place @param {string} title @param {boolean} unused whether it counts nothing */
function slot(place, title, unused) {
  const picture = state.question[place];
  const drawn = picture?.drawing !== undefined;
  return make(
    `div.slot${picture ? ".full" : ""}${unused ? ".unused" : ""}`,
    {
      "data-key": place,
      tabIndex: 0,
      role: "button",
      "aria-label": `${title} ${picture ? (drawn ? "the drawing" : nameOf(picture)) : "nothing yet"}`,
      title: `Drag an image here, or press ${place === "anatomy" ? "A" : "L"} with the image chosen; Delete empties it`,
      onkeydown: (event) => {
        if (event.key === "Delete" || event.key === "Backspace")
          pose((now) => {
            now.question[place] = null;
          });
      },
      ondragover: (event) => {
        if (dragged) {
          event.preventDefault();
          event.currentTarget.classList.add("over");
        }
      },
      ondragleave: (event) => event.currentTarget.classList.remove("over"),
      ondrop: (event) => {
        event.preventDefault();
        put(place, dragged);
      },
    },
    picture ? make("canvas", { "data-place": place }) : make("div.hole"),
    make("b", {}, title),
    make("span", {}, picture ? (drawn ? "the drawing" : nameOf(picture)) : "drag an image"),
  );
}

/** @param {HTMLCanvasElement} canvas @param {Picture|null} picture */
function paintSlot(canvas, picture) {
  if (!picture) return;
  if (picture.drawing !== undefined) {
    const size = facts.size;
    draw(canvas, {
      plane: { pixels: new Uint8Array(size * size), most: 255 },
      outlines: [{ labels: fromRuns(picture.drawing, size * size), colours: facts.colours, fill: 0.6 }],
    });
    return;
  }
  const look = cache.looks.get(keyOf(picture));
  const small = cache.thumbnails.get(picture.row ?? -1)?.image;
  draw(canvas, {
    plane: look
      ? { pixels: channel(look.arrays.image), most: 65535 }
      : small
        ? { pixels: channel(small), most: 255 }
        : null,
  });
}

function chips() {
  const { question } = state;
  /** @param {string} key @param {string} text @param {(state: State) => void} remove */
  const chip = (key, text, remove) =>
    make(
      "button.chip",
      {
        "data-key": key,
        title: "Remove",
        onclick: () => {
          pose(remove);
          if (posed()) ask();
        },
      },
      `${text} ✕`,
    );
  const list = (/** @type {"like"|"unlike"} */ name) =>
    question[name].map((picture, i) =>
      chip(`${name}-${i}`, `${name} ${nameOf(picture)}`, (now) => {
        now.question[name].splice(i, 1);
      }),
    );
  return [
    question.region &&
      chip("region", "region alone", (now) => {
        now.question.region = null;
      }),
    ...list("like"),
    ...list("unlike"),
  ];
}
