/** An image on a canvas: window, zoom, outlines of labels, colours over cells. */

import { facts, state } from "./state.js";

/** @import { Pixels, Point, Sight } from "./types.js" */

/**
 * @typedef {{pixels: Pixels, most: number, fixed?: boolean}} Plane 0 to `most`; `fixed`: no window
 * @typedef {{labels: Uint8Array, colours: string[], dashed?: boolean, fill?: number}} Outline
 * @typedef {{plane: Plane|null, outlines?: Outline[], heat?: {values: Float32Array, most: number}|null,
 *   codes?: Uint16Array|null, cursor?: Point & {radius: number}|null}} Scene
 */

/** The view at first: the part of the field that images of this archive use, black to white. @returns {Sight} */
export function firstView() {
  return { low: 0, high: facts.white[state.view.channel] || 1, zoom: 1 / (1 - 2 * facts.margin), x: 0.5, y: 0.5 };
}

const SCRATCH = document.createElement("canvas");

/**
 * Draws a scene into a canvas of any size, the part that window and zoom of `view` show.
 * @param {HTMLCanvasElement} canvas @param {Scene} scene @param {Sight} [view]
 */
export function draw(canvas, scene, view = firstView()) {
  drawAt(sizeOf(canvas), canvas, scene, view);
}

/**
 * Draws many scenes in the first view. All canvases are measured before one is drawn: the page is laid out once.
 * @param {Iterable<HTMLCanvasElement>} canvases @param {(canvas: HTMLCanvasElement) => Scene} scene
 */
export function drawEach(canvases, scene) {
  const view = firstView();
  const sizes = [...canvases].map((canvas) => /** @type {const} */ ([canvas, sizeOf(canvas)]));
  for (const [canvas, size] of sizes) drawAt(size, canvas, scene(canvas), view);
}

/** Width and height in pixels of the screen. @param {HTMLCanvasElement} canvas @returns {[number, number]} */
function sizeOf(canvas) {
  const pixels = (/** @type {number} */ side) => Math.max(1, Math.round(side * (devicePixelRatio || 1)));
  return [pixels(canvas.clientWidth), pixels(canvas.clientHeight)];
}

/** @param {[number, number]} size @param {HTMLCanvasElement} canvas @param {Scene} scene @param {Sight} view */
function drawAt([width, height], canvas, scene, view) {
  const ratio = devicePixelRatio || 1;
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  if (!scene.plane) return;
  const size = facts.size;
  const { scale, left, top } = placed(canvas, view);
  paint(scene.plane, view, size);
  context.setTransform(scale, 0, 0, scale, left, top);
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(SCRATCH, 0, 0);
  if (scene.heat) drawHeat(context, scene.heat, size);
  for (const outline of scene.outlines ?? []) drawOutline(context, outline, size, scale, ratio);
  if (scene.codes) drawCodes(context, scene.codes, size, scale, ratio);
  if (scene.cursor) drawCursor(context, scene.cursor, scale, ratio);
}

/**
 * Where the image lies in a canvas: pixels of the canvas a pixel of the image, and its corner.
 * @param {HTMLCanvasElement} canvas @param {Sight} view
 */
function placed(canvas, view) {
  const size = facts.size;
  const scale = (Math.min(canvas.width, canvas.height) / size) * view.zoom;
  const { x, y } = view;
  return { scale, left: canvas.width / 2 - x * size * scale, top: canvas.height / 2 - y * size * scale };
}

/**
 * Position of a pointer in the image, in its pixels.
 * @param {HTMLCanvasElement} canvas @param {PointerEvent|WheelEvent} event @returns {Point}
 */
export function inImage(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const { scale, left, top } = placed(canvas, state.view);
  const ratio = canvas.width / box.width;
  return {
    x: ((event.clientX - box.left) * ratio - left) / scale,
    y: ((event.clientY - box.top) * ratio - top) / scale,
  };
}

/** @param {Plane} plane @param {Sight} view @param {number} size */
function paint(plane, view, size) {
  [SCRATCH.width, SCRATCH.height] = [size, size];
  const context = /** @type {CanvasRenderingContext2D} */ (SCRATCH.getContext("2d"));
  const image = context.createImageData(size, size);
  const [low, high] = plane.fixed ? [0, 1] : [view.low, view.high];
  const slope = 255 / Math.max(high - low, 1e-3) / plane.most;
  const shift = (-255 * low) / Math.max(high - low, 1e-3);
  const words = new Uint32Array(image.data.buffer);
  for (let i = 0; i < words.length; i++) {
    const grey = Math.min(255, Math.max(0, Math.round(plane.pixels[i] * slope + shift)));
    words[i] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
  }
  context.putImageData(image, 0, 0);
}

/**
 * Lines between pixels of unlike labels, each in the colour of the label inside.
 * @param {CanvasRenderingContext2D} context @param {Outline} outline
 * @param {number} size @param {number} scale @param {number} ratio
 */
function drawOutline(context, outline, size, scale, ratio) {
  const { labels, colours, dashed, fill } = outline;
  context.lineWidth = (1.4 * ratio) / scale;
  context.setLineDash(dashed ? [(3 * ratio) / scale, (3 * ratio) / scale] : []);
  for (let value = 1; value <= colours.length; value++) {
    context.strokeStyle = context.fillStyle = colours[value - 1];
    context.beginPath();
    const cells = [];
    for (let i = 0; i < labels.length; i++) {
      if (labels[i] !== value) continue;
      const x = i % size;
      const y = (i - x) / size;
      cells.push(x, y);
      if (x === 0 || labels[i - 1] !== value) segment(context, x, y, x, y + 1);
      if (x === size - 1 || labels[i + 1] !== value) segment(context, x + 1, y, x + 1, y + 1);
      if (y === 0 || labels[i - size] !== value) segment(context, x, y, x + 1, y);
      if (y === size - 1 || labels[i + size] !== value) segment(context, x, y + 1, x + 1, y + 1);
    }
    context.stroke();
    if (!fill) continue;
    context.globalAlpha = fill;
    context.beginPath();
    for (let i = 0; i < cells.length; i += 2) context.rect(cells[i], cells[i + 1], 1, 1);
    context.fill();
    context.globalAlpha = 1;
  }
  context.setLineDash([]);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {number} x0 @param {number} y0 @param {number} x1 @param {number} y1
 */
function segment(context, x0, y0, x1, y1) {
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
}

/**
 * The more a cell adds to the distance, the more it is tinted.
 * @param {CanvasRenderingContext2D} context @param {NonNullable<Scene["heat"]>} heat @param {number} size
 */
function drawHeat(context, heat, size) {
  const grid = facts.grid;
  const cell = size / grid;
  for (let i = 0; i < heat.values.length; i++) {
    const share = Math.min(1, Math.max(0, heat.values[i] / heat.most));
    context.fillStyle = `rgb(79 159 220 / ${(0.45 * share).toFixed(3)})`;
    context.fillRect((i % grid) * cell, Math.floor(i / grid) * cell, cell, cell);
  }
}

/**
 * @param {CanvasRenderingContext2D} context @param {Uint16Array} codes
 * @param {number} size @param {number} scale @param {number} ratio
 */
function drawCodes(context, codes, size, scale, ratio) {
  const grid = facts.grid;
  const cell = size / grid;
  context.lineWidth = ratio / scale;
  context.strokeStyle = "rgb(195 204 214 / 30%)";
  context.fillStyle = "rgb(226 232 238 / 85%)";
  context.font = `${cell * 0.28}px system-ui`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let i = 0; i < codes.length; i++) {
    const [x, y] = [(i % grid) * cell, Math.floor(i / grid) * cell];
    context.strokeRect(x, y, cell, cell);
    context.fillText(codes[i] ? String(codes[i]) : "·", x + cell / 2, y + cell / 2);
  }
}

/**
 * @param {CanvasRenderingContext2D} context @param {NonNullable<Scene["cursor"]>} cursor
 * @param {number} scale @param {number} ratio
 */
function drawCursor(context, cursor, scale, ratio) {
  context.lineWidth = ratio / scale;
  context.strokeStyle = "#e4eef7";
  context.beginPath();
  context.arc(cursor.x, cursor.y, cursor.radius, 0, 2 * Math.PI);
  context.stroke();
}

/**
 * Narrows or widens, and moves, the window of grey values.
 * @param {Sight} view @param {number} width @param {number} level
 */
export function window_(view, width, level) {
  const centre = (view.low + view.high) / 2 + level;
  const half = Math.max(0.01, ((view.high - view.low) / 2) * (1 + width));
  [view.low, view.high] = [centre - half, centre + half];
}

/**
 * Zooms so that a point of the image stays where it is.
 * @param {Sight} view @param {number} factor @param {Point} point
 */
export function zoomAt(view, factor, { x, y }) {
  const zoom = Math.min(16, Math.max(1, view.zoom * factor));
  const moved = view.zoom / zoom;
  view.x = zoom === 1 ? 0.5 : x / facts.size + (view.x - x / facts.size) * moved;
  view.y = zoom === 1 ? 0.5 : y / facts.size + (view.y - y / facts.size) * moved;
  view.zoom = zoom;
}
