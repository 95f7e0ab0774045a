// Reads what pack.py writes. A chunk is inflated when a response of it is first shown; the last few stay in memory.

const ESCAPE = 255;
const NO_ENTROPY = 65535;
const ENTROPY_STEP = 1 / 4096;
const TOP_STEP = 1 / 1024;
const CHUNKS_KEPT = 80;
const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array, f4: Float32Array };
const chunkCache = new Map();
const textCache = new Map();
let tokenTexts = new Map();

async function inflate(id) {
  const binary = atob(byId(id).textContent);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const inflateJson = async (id) => JSON.parse(new TextDecoder().decode(await inflate(id)));

async function loadTokenTexts() {
  const { ids, texts } = await inflateJson("token-table");
  tokenTexts = new Map(ids.map((id, i) => [id, texts[i]]));
}

const textOfId = (id) => tokenTexts.get(id) ?? `#${id}`;

function readColumns(bytes) {
  const headLength = new DataView(bytes.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + headLength)));
  let at = 4 + headLength;
  const columns = {};
  for (const [name, kind, count] of header.columns) {
    const values = new ARRAYS[kind](count);
    const flat = new Uint8Array(values.buffer);
    const width = values.BYTES_PER_ELEMENT;
    for (let plane = 0; plane < width; plane++) for (let i = 0; i < count; i++) flat[i * width + plane] = bytes[at++];
    columns[name] = values;
  }
  return { header, columns };
}

function startsOf(counts) {
  const starts = new Uint32Array(counts.length + 1);
  for (let i = 0; i < counts.length; i++) starts[i + 1] = starts[i] + counts[i];
  return starts;
}

// Python: clip(floor(x / TOP_STEP + 0.5), -32767, 0), with NaN at the lower end.
const stepOf = (logprob) => (Number.isNaN(logprob) ? -32767 : Math.min(0, Math.max(-32767, Math.floor(logprob / TOP_STEP + 0.5))));

function decodeTokenIds(columns, base) {
  const index = columns.token_index ?? new Uint8Array(0);
  const ids = new Uint32Array(index.length);
  let escaped = 0;
  for (let n = 0; n < ids.length; n++) ids[n] = index[n] === ESCAPE ? columns.token_id[escaped++] : base.ids[base.starts[n] + index[n]];
  return ids;
}

function decodeListIds(columns, v, starts, base) {
  const index = columns[`top${v}_index`];
  if (!index) return columns[`top${v}_id`];
  const ids = new Uint32Array(index.length);
  let escaped = 0;
  for (let n = 0; n + 1 < starts.length; n++) {
    for (let i = starts[n]; i < starts[n + 1]; i++) {
      ids[i] = index[i] === ESCAPE ? columns[`top${v}_id`][escaped++] : base.ids[base.starts[n] + index[i]];
    }
  }
  return ids;
}

function decodeSteps(columns, v, list, tokenIds, base) {
  const steps = Int32Array.from(columns[`top${v}_step`]);
  const index = columns[`top${v}_index`];
  for (let n = 0; n < tokenIds.length; n++) {
    for (let i = list.starts[n]; i < list.starts[n + 1]; i++) {
      if (list.ids[i] === tokenIds[n]) steps[i] += stepOf(columns[`logprob${v}`][n]);
      else if (index && index[i] !== ESCAPE) steps[i] += base.steps[base.starts[n] + index[i]];
    }
  }
  return steps;
}

function decodeChunk(bytes) {
  const { header, columns } = readColumns(bytes);
  const hasList = (v) => columns[`top${v}_count`] !== undefined;
  const base = { starts: null, ids: null, steps: null };
  if (hasList(header.base)) {
    base.starts = startsOf(columns[`top${header.base}_count`]);
    base.ids = columns[`top${header.base}_id`];
  }
  const tokenIds = decodeTokenIds(columns, base);
  if (base.ids) base.steps = decodeSteps(columns, header.base, base, tokenIds, base);
  const lists = [];
  for (let v = 0; v < header.views; v++) {
    if (v === header.base || !hasList(v)) {
      lists.push(v === header.base && base.ids ? base : null);
      continue;
    }
    const list = { starts: startsOf(columns[`top${v}_count`]), ids: null, steps: null };
    list.ids = decodeListIds(columns, v, list.starts, base);
    list.steps = decodeSteps(columns, v, list, tokenIds, base);
    lists.push(list);
  }
  return { header, columns, tokenIds, lists, starts: startsOf(header.lengths) };
}

async function cached(cache, key, make) {
  if (!cache.has(key)) {
    cache.set(key, make());
    if (cache.size > CHUNKS_KEPT) cache.delete(cache.keys().next().value);
  }
  return cache.get(key);
}

const loadChunk = (c) => cached(chunkCache, c, async () => decodeChunk(await inflate(`tokens-${c}`)));
const loadTexts = (c) => cached(textCache, c, () => inflateJson(`texts-${c}`));

// One response, ready to show. View 0 is the behaviour, view 1 + i is target i.
async function loadResponse(r) {
  const c = index.chunk[r];
  const [chunk, texts] = await Promise.all([loadChunk(c), loadTexts(c)]);
  const place = r - index.firstOfChunk[c];
  return { r, chunk, start: chunk.starts[place], length: chunk.header.lengths[place], ...texts[place] };
}

const tokenIdAt = (response, t) => response.chunk.tokenIds[response.start + t];
const tokenTextAt = (response, t) => response.own[t] ?? textOfId(tokenIdAt(response, t));

function valueAt(response, name, v, t) {
  const column = response.chunk.columns[`${name}${v}`];
  return column ? column[response.start + t] : NaN;
}

// The policy did not sample this token: it has no logprob, and counts nowhere.
const isContext = (response, t) => Boolean(response.chunk.columns.context?.[response.start + t]);
const logprobAt = (response, v, t) => valueAt(response, "logprob", v, t);

function entropyAt(response, v, t) {
  const step = valueAt(response, "entropy", v, t);
  return step === NO_ENTROPY ? NaN : step * ENTROPY_STEP;
}

const rankAt = (response, v, t) => valueAt(response, "rank", v, t) || NaN;
const ratioAt = (response, v, t) => logprobAt(response, v, t) - logprobAt(response, 0, t);

function topListAt(response, v, t) {
  const list = response.chunk.lists[v];
  if (!list) return null;
  const n = response.start + t;
  const logprob = logprobAt(response, v, t);
  const entries = [];
  for (let i = list.starts[n]; i < list.starts[n + 1]; i++) {
    const exact = list.ids[i] === response.chunk.tokenIds[n] && list.steps[i] === stepOf(logprob);
    entries.push({ id: list.ids[i], exact, probability: Math.exp(exact ? logprob : list.steps[i] * TOP_STEP) });
  }
  return entries;
}
