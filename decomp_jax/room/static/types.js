/**
 * What the page's modules hand each other: types alone. What the server answers is of `room/session.py`, `archive.py`
 * and `upload.py`.
 *
 * Images.
 * @typedef {{row?: number, pixels?: string, slab?: string, name?: string, scan?: string, drawing?: number[]}} Picture
 *   one of the archive by its row; one that was brought by its pixels and its slab (base64), of a scan that the server
 *   knows by `scan`; or, in the lesion's place alone, the run lengths of a drawing
 * @typedef {Uint8Array|Uint16Array} Pixels of one channel [S,S], or of all [C,S,S]
 * @typedef {{x: number, y: number}} Point in pixels of an image
 * @typedef {{patient_id: string, slice_index: number, position_mm?: number}
 *   & Record<string, string|number|boolean>} About what the archive's columns say of a slice
 * @typedef {{about: About, image?: undefined, label?: undefined}
 *   | {about: About, image: Uint8Array, label: Uint8Array}} Thumbnail
 *
 * What a session keeps.
 * @typedef {{anatomy: Picture|null, lesion: Picture|null, share: number, region: number[]|null, like: Picture[],
 *   unlike: Picture[], other_patients: boolean, one_per_patient: boolean, k: number}} Question as `session.Question`
 * @typedef {"anatomy"|"lesion"} Place
 * @typedef {{share: number} & ({row: number} | {scan: string})} PatientQuestion
 * @typedef {{question: Question, rows: number[], distances: number[], at: string}
 *   | {patients: PatientQuestion, ids: string[], distances: number[], at: string}} LogEntry
 * @typedef {"outlines"|"labels"|"codes"|"why"|"flick"} Switch
 * @typedef {{low: number, high: number, zoom: number, x: number, y: number}} Sight window of grey values, and part
 * @typedef {Sight & Record<Switch, boolean> & {channel: number, large: string|null}} View `large`: the tile that fills
 *   the desk
 * @typedef {"none"|"draw"|"erase"|"region"|"region-erase"} ToolKind
 * @typedef {"hits"|"patients"|"marked"} Tab
 * @typedef {{
 *   shown: Picture|null,
 *   question: Question,
 *   drawing: number[]|null,
 *   view: View,
 *   tool: {kind: ToolKind, class: number, size: number},
 *   tab: Tab,
 *   hit: number|null,
 *   compare: Picture[],
 *   marks: Record<number, {note: string}>,
 *   note: string,
 *   log: LogEntry[],
 * }} State `shown`: on the desk; `drawing`: run lengths of the drawn lesion; `hit`: row of the chosen answer
 *
 * What the server answers.
 * @typedef {{model: string, bank: string, slices: number, patients: number, size: number, grid: number,
 *   modalities: string[], incomplete: boolean, aliases: Record<string, string[]>, pictures: boolean, classes: string[],
 *   colours: string[], at_hand: boolean, can_draw: boolean, white: number[], margin: number, columns: string[],
 *   choices: Record<string, string[]>}} Facts of network and archive
 * @typedef {{ready: false, done: number, steps: number} | {ready: true} & Facts} Readiness
 * @typedef {{id: string, row: number, slices: number, fit: number}} Patient `fit`: slices that fit the filter
 * @typedef {"normal"|"abnormal"} Path
 * @typedef {"image"|"x_minus"|"x_plus"} Painting
 */

/**
 * @template {object} Data
 * @template {object} Arrays
 * @typedef {{data: Data, arrays: {[name in keyof Arrays]: Arrays[name] & {shape: number[]}}}} Answer
 */

/**
 * @typedef {Answer<{at_hand: boolean, about?: About, row?: number}, Record<Painting, Uint16Array>
 *   & Record<"label"|"lesion", Uint8Array> & Record<"normal_codes"|"abnormal_codes", Uint16Array>>} Look
 * @typedef {{rows: number[], distances: number[], parts: Partial<Record<Path, number[]>>}} Found hits, nearest first,
 *   and what each path adds to a distance
 * @typedef {{rows: number[], patients: string[], distances: number[], matches: Record<Path, number[][]>}} FoundPatients
 *   `rows`: the slices asked with; `matches`: a patient's for each of these, -1 for none
 * @typedef {{
 *   patients: Answer<{count: number, patients: Patient[]}, {}>,
 *   slices: Answer<{rows: number[], about: About[]}, {}>,
 *   thumbnails: Answer<{about: About[]}, {image: Uint8Array, label: Uint8Array}>,
 *   look: Look,
 *   paint: Answer<{}, {painted: Uint16Array}>,
 *   ask: Answer<Found & {about: About[]}, {why: Float32Array}>,
 *   ask_patients: Answer<FoundPatients, {image?: Uint8Array}>,
 *   slice_of: Answer<{}, {pixels: Uint16Array, slab: Float32Array}>,
 *   bring: Answer<{id: string, slices: number[], scan: boolean}, {}>,
 * }} Answers by path below /api/
 *
 * What of that is kept.
 * @typedef {Found & {why: Float32Array[], most: number, question: Question}} Hits `why`: what each cell adds
 * @typedef {FoundPatients & {share: number, image?: Answers["ask_patients"]["arrays"]["image"]}} Patients
 * @typedef {{
 *   looks: Map<string|number, Look>,
 *   thumbnails: Map<number, Thumbnail>,
 *   hits: Hits|null,
 *   patients: Patients|null,
 *   painted: {key: string, pixels: Uint16Array}|null,
 * }} Cache
 */
export {};
