/** The room's server: JSON in, JSON and arrays out. */

/** @import { Answers, Readiness } from "./types.js" */

const TOKEN = location.hash.slice(1);
const PAGE = crypto.randomUUID();
const TYPES = { u1: Uint8Array, u2: Uint16Array, f2: Uint16Array, f4: Float32Array };

/** An error in plain words; `status` 409 means that a newer question took its place. */
export class Refused extends Error {
  /** @param {string} message @param {number} status */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** @template {keyof Answers} Path @param {Path} path @param {object} body @returns {Promise<Answers[Path]>} */
export async function call(path, body) {
  const response = await send(path, "POST", JSON.stringify(body), "application/json");
  return unpack(await response.arrayBuffer());
}

/** @param {File[][]} groups a list of files a modality @returns {Promise<Answers["bring"]>} */
export async function bring(groups) {
  const head = new TextEncoder().encode(JSON.stringify(groups.map((files) => files.map((file) => file.size))));
  const body = new Blob([new Uint32Array([head.length]), head, ...groups.flat()]);
  return unpack(await (await send("bring", "PUT", body, "application/octet-stream")).arrayBuffer());
}

/** @returns {Promise<Readiness>} */
export async function about() {
  return (await send("about", "GET")).json();
}

/** @param {string} path @param {string} method @param {string|Blob} [body] @param {string} [type] */
async function send(path, method, body, type) {
  /** @type {Record<string, string>} */
  const headers = { Authorization: `Bearer ${TOKEN}`, "X-Page": PAGE };
  if (type) headers["Content-Type"] = type;
  let response;
  try {
    response = await fetch(`/api/${path}`, { method, headers, body });
  } catch {
    throw new Refused("the program that serves this room has stopped; start it again and open its new address", 0);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({ error: "the file or question is larger than the room takes" }));
  throw new Refused(told.error, response.status);
}

/** @param {ArrayBuffer} buffer @returns {any} one of `Answers` */
function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  /** @type {{data: object, arrays: {name: string, type: keyof typeof TYPES, shape: number[]}[]}} */
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  /** @type {Record<string, object>} */
  const arrays = {};
  let start = 4 + length;
  for (const { name, type, shape } of head.arrays) {
    const Kind = TYPES[type];
    const count = shape.reduce((a, b) => a * b, 1);
    arrays[name] = Object.assign(new Kind(buffer, start, count), { shape });
    start += Math.ceil((count * Kind.BYTES_PER_ELEMENT) / 4) * 4;
  }
  return { data: head.data, arrays };
}
