/** The desk: the image, what the network makes of it, and the tools to look and to draw with. */

import { paint } from "./ask.js";
import { cursor, drawing, drawOn, maps } from "./brush.js";
import { at, fill, make } from "./dom.js";
import { draggable } from "./question.js";
import { cache, change, changeView, channel, facts, keyOf, nameOf, pose, state, undo } from "./state.js";
import { draw, firstView, inImage, window_, zoomAt } from "./viewport.js";

/** @import { Look, Pixels, Switch, ToolKind } from "./types.js" */
/** @import { Outline, Plane, Scene } from "./viewport.js" */

const LABEL = "#dfe6ee";
const REGION = ["#4f9fdc"];
/** @typedef {"image"|"x_minus"|"difference"|"painted"} TileName */
/** @type {TileName[]} */
const NAMES = ["image", "x_minus", "difference", "painted"];
const tiles = /** @type {Record<TileName, ReturnType<typeof makeTile>>} */ ({});

/** Makes the tiles once; `render` draws into them. */
export function setUp() {
  for (const name of NAMES) {
    const { canvas, caption } = (tiles[name] = makeTile(name));
    draggable(caption, () => state.shown);
    navigate(canvas);
    canvas.addEventListener("dblclick", () => drawing() || enlarge(name));
    if (name === "image" || name === "x_minus") drawOn(canvas, lifted);
  }
  new ResizeObserver(() => change()).observe(at("tiles"));
}

/** @param {TileName} name */
function makeTile(name) {
  const canvas = make("canvas", { tabIndex: 0, "data-tile": name });
  const [caption, note] = [make("div.caption"), make("div.note")];
  return { canvas, caption, note, element: make("div.tile", {}, canvas, caption, note) };
}

/** One tile fills the desk, or all four share it again. @param {TileName|""} name */
export function enlarge(name) {
  change(({ view }) => {
    view.large = view.large ? null : name;
  });
}

/** After a stroke: the drawing takes the lesion's place, and the network paints it. */
function lifted() {
  change((now) => {
    now.question.lesion = now.drawing ? { drawing: now.drawing } : null;
  });
  paint();
}

/**
 * Wheel zooms, dragging moves the window, with shift or the middle button the image.
 * @param {HTMLCanvasElement} canvas
 */
export function navigate(canvas) {
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const point = inImage(canvas, event);
      changeView((now) => zoomAt(now.view, Math.exp(-event.deltaY / 400), point));
    },
    { passive: false },
  );
  canvas.addEventListener("pointerdown", (event) => {
    if (drawing() && event.button === 0 && canvas.dataset.tile !== undefined) return;
    canvas.setPointerCapture(event.pointerId);
    const pans = event.shiftKey || event.button === 1;
    const moved = (/** @type {PointerEvent} */ move) =>
      changeView(({ view }) => {
        if (pans) {
          const side = Math.min(canvas.clientWidth, canvas.clientHeight) * view.zoom;
          view.x = Math.min(1, Math.max(0, view.x - move.movementX / side));
          view.y = Math.min(1, Math.max(0, view.y - move.movementY / side));
        } else window_(view, move.movementX / 200, -move.movementY / 400);
      });
    const end = () => canvas.removeEventListener("pointermove", moved);
    canvas.addEventListener("pointermove", moved);
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"])
      canvas.addEventListener(name, end, { once: true });
  });
}

/** The scenes of a look, by tile. @param {Look} answer @returns {Record<TileName, Scene>} */
export function scenes(answer) {
  const { label, lesion, abnormal_codes: codes, normal_codes: anatomy } = answer.arrays;
  const image = channel(answer.arrays.image);
  const xMinus = channel(answer.arrays.x_minus);
  const { view } = state;
  /** @type {Outline[]} */
  const outlines = [];
  if (view.outlines) outlines.push({ labels: lesion, colours: facts.colours });
  if (view.labels) outlines.push({ labels: label, colours: facts.colours.map(() => LABEL), dashed: true });
  const difference = image.map((value, i) => Math.min(65535, 2 * Math.abs(value - xMinus[i])));
  /** @param {Pixels} pixels @param {boolean} [fixed] @returns {Plane} */
  const plane = (pixels, fixed = false) => ({ pixels, most: 65535, fixed });
  return {
    image: {
      plane: plane(view.flick ? xMinus : image),
      outlines: view.flick ? [] : outlines,
      codes: view.codes ? codes : null,
    },
    x_minus: { plane: plane(xMinus), codes: view.codes ? anatomy : null },
    difference: { plane: plane(difference, true) },
    painted: { plane: plane(channel(answer.arrays.x_plus)) },
  };
}

export function render() {
  const parent = at("tiles");
  const picture = state.shown;
  const answer = picture && cache.looks.get(keyOf(picture));
  parent.classList.toggle("waiting", !answer);
  if (!answer && picture && parent.contains(tiles.image.canvas)) return; // the image before, dimmed
  if (!answer) {
    fill(
      parent,
      make(
        "div.empty",
        {},
        ...(picture
          ? ["Decomposing the image …"]
          : [
              make("strong", {}, "Choose a patient and a slice on the left, or bring an image."),
              "The network shows it with the lesion it sees, and without it, and finds slices that are like it by " +
                "anatomy, by lesion or by both.",
            ]),
      ),
    );
    return;
  }
  if (!parent.contains(tiles.image.canvas)) parent.replaceChildren(...Object.values(tiles).map((tile) => tile.element));
  const shown = scenes(answer);
  const drawn = maps();
  const marks = [
    { labels: drawn.lesion, colours: facts.colours, fill: 0.35 },
    { labels: drawn.region, colours: REGION, fill: 0.12 },
  ];
  for (const name of /** @type {const} */ (["image", "x_minus"])) {
    shown[name].outlines = [...(shown[name].outlines ?? []), ...marks];
    shown[name].cursor = cursor();
    tiles[name].element.classList.toggle("drawing", drawing());
  }
  const painted = state.drawing && cache.painted;
  if (painted) shown.painted = { plane: { pixels: channel(painted.pixels), most: 65535 } };
  const captions = {
    image: state.view.flick ? "Without the lesion, painted" : answer.data.at_hand ? "Image" : "Painted from its codes",
    x_minus: "Without the lesion, painted",
    difference: "Difference of the two, twofold",
    painted: painted ? "Painted with the drawn lesion" : "Painted with its lesion",
  };
  parent.classList.toggle("one", Boolean(state.view.large));
  for (const name of NAMES) {
    tiles[name].element.hidden = Boolean(state.view.large) && state.view.large !== name;
  }
  for (const name of NAMES) {
    const tile = tiles[name];
    if (tile.element.hidden) continue;
    tile.caption.textContent = captions[name];
    tile.canvas.setAttribute("aria-label", tile.caption.textContent);
    draw(tile.canvas, shown[name], state.view);
  }
  const name = `${nameOf(picture)} · `;
  tiles.image.note.replaceChildren(
    ...(answer.data.at_hand ? [name, ...legend(answer.arrays.lesion)] : [`${name}the image is not at hand`]),
  );
}

/**
 * The classes that are in a label map, each beside its colour.
 * @param {Uint8Array} lesion @returns {(Node|string)[]}
 */
export function legend(lesion) {
  const seen = facts.classes.flatMap((name, i) => {
    if (!lesion.includes(i + 1)) return [];
    const swatch = make("i.swatch");
    swatch.style.background = facts.colours[i];
    return [swatch, `${name}  `];
  });
  return seen.length ? seen : ["no lesion seen"];
}

export function renderTools() {
  const { view, tool } = state;
  /** @param {Switch} key @param {string} text @param {string} title */
  const toggle = (key, text, title) =>
    make(
      "button",
      {
        "data-key": `view-${key}`,
        "aria-pressed": view[key],
        title,
        onclick: () =>
          change((now) => {
            now.view[key] = !now.view[key];
          }),
      },
      text,
    );
  /** @param {ToolKind} name @param {string} text @param {string} title @param {boolean} [off] */
  const kind = (name, text, title, off = false) =>
    make(
      "button",
      {
        "data-key": `tool-${name}`,
        "aria-pressed": tool.kind === name,
        title,
        disabled: off,
        onclick: () => pick(name),
      },
      text,
    );
  const draws = facts.can_draw;
  fill(
    at("tools"),
    make(
      "div.group",
      {},
      toggle("outlines", "Lesion", "Outline of the lesion that the network sees (O)"),
      toggle("labels", "Label", "Outline of the label that the archive holds (T)"),
      toggle("codes", "Codes", "The codes of the cells: lesion on the image, anatomy beside it (G)"),
      toggle("flick", "Flicker", "Image and painting by turns (F)"),
      make("button", { "data-key": "reset", title: "Window and zoom as at first (0)", onclick: reset }, "Reset view"),
      facts.modalities.length > 1 && channels(),
    ),
    make(
      "div.group",
      {},
      kind("draw", "Draw", draws ? "Draw a lesion (D)" : "This network can't read drawings", !draws),
      kind("erase", "Erase", "Take away from the drawing (E)", !draws),
      make(
        "select",
        {
          "data-key": "class",
          "aria-label": "Class of the drawn lesion",
          disabled: !draws,
          onchange: (event) =>
            change((now) => {
              now.tool.class = Number(event.currentTarget.value);
            }),
        },
        ...facts.classes.map((name, i) =>
          make("option", { value: String(i + 1), selected: tool.class === i + 1 }, name),
        ),
      ),
      kind("region", "Region", "Search in a part of the image alone (R)"),
      tool.kind === "region" || tool.kind === "region-erase"
        ? kind("region-erase", "Erase region", "Take away from the region")
        : null,
      make("input", {
        type: "range",
        min: "1",
        max: String(Math.round(facts.size / 3)),
        value: String(tool.size),
        "data-key": "size",
        title: "Size of the brush ([ and ])",
        "aria-label": "Size of the brush",
        oninput: (event) =>
          changeView((now) => {
            now.tool.size = Number(event.currentTarget.value);
          }),
      }),
      make(
        "button",
        { "data-key": "undo", title: "Take back the last stroke or change (Ctrl+Z)", onclick: takeBack },
        "Undo",
      ),
      make(
        "button",
        {
          "data-key": "clear",
          disabled: !state.drawing,
          title: "Remove the drawing",
          onclick: () => {
            pose((now) => {
              now.drawing = null;
            });
            lifted();
          },
        },
        "Clear",
      ),
    ),
  );
}

function channels() {
  return make(
    "select",
    {
      "data-key": "channel",
      "aria-label": "Modality in sight",
      title: "Modality in sight (H)",
      onchange: (event) => showChannel(Number(event.currentTarget.value)),
    },
    ...facts.modalities.map((name, i) =>
      make("option", { value: String(i), selected: state.view.channel === i }, name),
    ),
  );
}

/** @param {number} i of the modality that all images are shown in */
export function showChannel(i) {
  change(({ view }) => {
    view.channel = i % facts.modalities.length;
    Object.assign(view, { low: 0, high: firstView().high });
  });
}

/** @param {ToolKind} kind a tool, put down if it is held already */
export function pick(kind) {
  change((now) => {
    now.tool.kind = now.tool.kind === kind ? "none" : kind;
  });
  if (drawing()) tiles.image.canvas.focus();
}

export function reset() {
  change((now) => {
    Object.assign(now.view, firstView());
  });
}

export function takeBack() {
  if (undo()) paint();
}
