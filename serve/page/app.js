// The page: a key, a person, a prompt; then a clip. It uses the same API as every other client.
// The key lives in this tab's sessionStorage. Nothing that comes from the server is ever parsed as HTML.

const api = new URL("v1/", document.baseURI);
const KEY = "magicid.key";
const BUSY_MS = 1000, IDLE_MS = 10000, PAGE = 24;
const WORDS = { queued: "Waiting", in_progress: "In progress", completed: "Done", failed: "Failed" };

const $ = (id) => document.getElementById(id);
const state = { key: sessionStorage.getItem(KEY), models: [], videos: new Map(), chosen: null, limit: PAGE, more: false, session: 0, made: 0 };
const pictures = new Map(); // video id -> object URL of its thumbnail
const cards = new Map(); // video id -> its elements
let clip = { id: null, url: null };
let timer = 0;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// ---- the API ---------------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, message, retryMs) {
    super(message);
    Object.assign(this, { status, retryMs });
  }
}

async function call(path, options = {}) {
  const session = state.session;
  const headers = { Authorization: `Bearer ${state.key}`, ...options.headers };
  const answer = await fetch(new URL(path, api), { ...options, headers, cache: "no-store" });
  if (answer.ok) return answer;
  let message = `The endpoint answered ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* not one of its own answers */ }
  if (answer.status === 401 && session === state.session) leave("That key is not known here.");
  throw new Refused(answer.status, message, 1000 * Number(answer.headers.get("Retry-After") || 0));
}

// A lost connection says nothing about whether the request arrived; the same key makes asking again harmless.
async function create(body) {
  const once = [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
  const headers = { "Content-Type": "application/json", "Idempotency-Key": once };
  for (let attempt = 0; ; attempt++) {
    try {
      return await (await call("videos", { method: "POST", headers, body: JSON.stringify(body) })).json();
    } catch (error) {
      if (error instanceof Refused || attempt === 2) throw error;
      await new Promise((resolve) => setTimeout(resolve, 500 * (attempt + 1)));
    }
  }
}

const say = (error) => (error instanceof Refused ? error.message : "The endpoint cannot be reached. Try again in a moment.");

function show(place, message) {
  place.textContent = message || "";
  place.hidden = !message;
}

// ---- in and out ------------------------------------------------------------------------------------------------

async function enter() {
  const session = state.session;
  const models = (await (await call("models")).json()).data;
  if (session !== state.session) return;
  state.models = models;
  sessionStorage.setItem(KEY, state.key);
  $("door").hidden = true;
  $("studio").hidden = $("leave").hidden = false;
  showPeople();
  await refresh();
}

function leave(message) {
  clearTimeout(timer);
  sessionStorage.removeItem(KEY);
  for (const url of pictures.values()) URL.revokeObjectURL(url);
  dropClip();
  pictures.clear();
  cards.clear();
  $("cards").replaceChildren();
  Object.assign(state, { key: null, models: [], videos: new Map(), chosen: null, limit: PAGE, session: state.session + 1 });
  $("studio").hidden = $("leave").hidden = true;
  $("load").textContent = "";
  $("door").hidden = false;
  show($("door-problem"), message);
  $("key").value = "";
  $("key").focus();
}

$("door-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  show($("door-problem"));
  state.key = $("key").value.trim();
  try {
    await enter();
    $("key").value = "";
  } catch (error) {
    if (error.status !== 401) show($("door-problem"), say(error));
  }
});
$("leave").addEventListener("click", () => leave());

// ---- the composer ----------------------------------------------------------------------------------------------

const label = (model) => model.identity ?? "No one";
const hue = (text) => [...text].reduce((sum, letter) => sum + letter.codePointAt(0), 0) % 6;

function showPeople() {
  const people = [...state.models].sort((a, b) => !a.identity - !b.identity);
  $("people").replaceChildren(...people.map((model, number) => {
    const name = label(model);
    const face = element("span", { className: `face ${model.identity ? `hue-${hue(name)}` : "base"}`, ariaHidden: "true" });
    face.textContent = model.identity ? [...name][0].toUpperCase() : "–";
    const input = element("input", { type: "radio", name: "model", value: model.id, checked: number === 0, onchange: showVersions });
    return element("label", { className: "person", title: model.id }, input, element("div", { className: "box" }, face, element("span", {}, name)));
  }));
  showVersions();
}

const chosenModel = () => state.models.find((model) => model.id === $("form").elements.model.value);

function showVersions() {
  const model = chosenModel();
  const aliases = Object.entries(model?.aliases ?? {});
  const versions = [...(model?.versions ?? [])].reverse();
  const usual = model?.aliases?.prod ? `prod (${model.aliases.prod.version})` : `newest (${versions[0]})`;
  const options = [["", usual], ...aliases.filter(([name]) => name !== "prod").map(([name, alias]) => [name, `${name} (${alias.version})`])];
  options.push(...versions.map((version) => [version, version]));
  $("version").replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
  $("version-row").hidden = options.length < 3; // one version and its newest: nothing to choose
  $("strength-row").hidden = !model?.identity;
}

$("strength").addEventListener("input", () => ($("strength-value").value = Number($("strength").value).toFixed(2)));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  show($("problem"));
  const model = chosenModel(), version = $("version").value;
  const body = { prompt: $("prompt").value, model: version ? `${model.id}@${version}` : model.id };
  if (model.identity && Number($("strength").value) !== 1) body.lora = { scale: Number($("strength").value) };
  for (const [field, id] of [["num_frames", "frames"], ["num_inference_steps", "steps"], ["seed", "seed"]]) {
    if ($(id).value !== "") body[field] = Number($(id).value);
  }
  $("make").disabled = true;
  try {
    const video = await create(body);
    state.videos = new Map([[video.id, video], ...state.videos]);
    Object.assign(state, { chosen: video.id, made: state.made + 1 });
    render();
    if (matchMedia("(max-width: 760px)").matches) $("stage").scrollIntoView({ behavior: "smooth" });
    schedule(BUSY_MS);
  } catch (error) {
    show($("problem"), say(error));
  } finally {
    $("make").disabled = false;
  }
});

// ---- the records -----------------------------------------------------------------------------------------------

const isOpen = (video) => video.status === "queued" || video.status === "in_progress";

async function refresh() {
  const { session, made } = state;
  let wait = IDLE_MS;
  try {
    const found = new Map();
    let after = "", page;
    do { // pages of at most 100
      const query = `videos?limit=${Math.min(100, state.limit - found.size)}${after && `&after=${after}`}`;
      page = await (await call(query)).json();
      for (const video of page.data) found.set(video.id, video);
      after = page.last_id;
    } while (page.has_more && found.size < state.limit);
    if (session !== state.session) return;
    if (made !== state.made) return schedule(0); // one was made while this list was on its way
    Object.assign(state, { videos: found, more: page.has_more });
    if (!found.has(state.chosen)) state.chosen = found.keys().next().value ?? null;
    render();
    if ([...found.values()].some(isOpen)) wait = BUSY_MS;
  } catch (error) {
    if (session !== state.session) return;
    $("load").textContent = say(error);
    wait = Math.max(error.retryMs || 0, 3000);
  }
  schedule(wait);
}

function schedule(wait) {
  clearTimeout(timer);
  timer = setTimeout(() => (document.hidden ? schedule(wait) : refresh()), wait);
}

async function act(path, method) {
  try {
    await call(path, { method });
  } catch (error) {
    $("state-note").textContent = say(error);
    return;
  }
  await refresh();
}

// ---- what is seen ----------------------------------------------------------------------------------------------

const person = (video) => video.model.split(":")[1]?.split("@")[0] ?? "No one";
const ago = (seconds) => {
  const passed = Math.max(0, Date.now() / 1000 - seconds);
  if (passed < 60) return "just now";
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  return passed < 86400 ? `${Math.floor(passed / 3600)} h ago` : new Date(1000 * seconds).toLocaleDateString();
};

function note(video) {
  if (video.status === "queued") {
    const again = video.attempt > 1 ? `, attempt ${video.attempt}` : "";
    return (video.queue_position ? `${video.queue_position} before it` : "next in the queue") + again;
  }
  if (video.status === "in_progress") return `${video.progress} %`;
  if (video.status === "failed") return video.error?.code === "cancelled" ? "cancelled" : (video.error?.message ?? "");
  return `in ${Math.max(1, video.completed_at - video.created_at)} s`;
}

function render() {
  const videos = [...state.videos.values()];
  const count = (status) => videos.filter((video) => video.status === status).length;
  const parts = [[count("queued"), "waiting"], [count("in_progress"), "in progress"]].filter(([n]) => n);
  $("load").textContent = parts.map(([n, what]) => `${n} ${what}`).join(" · ");
  $("nothing").hidden = videos.length > 0;
  $("older").hidden = !state.more;
  for (const [id, card] of cards) if (!state.videos.has(id)) { card.item.remove(); cards.delete(id); }
  for (const [number, video] of videos.entries()) {
    const { item } = card(video);
    if ($("cards").children[number] !== item) $("cards").insertBefore(item, $("cards").children[number] ?? null);
  }
  showStage();
}

function card(video) {
  let made = cards.get(video.id);
  if (!made) {
    made = { picture: element("span", { className: "picture" }), tag: element("span", { className: "tag" }), line: element("span", { className: "line" }) };
    const who = element("span", { className: "who" }, element("span", {}, person(video)), made.tag);
    made.button = element("button", { type: "button", className: "card", onclick: () => choose(video.id) }, made.picture, who, element("span", { className: "line" }, video.prompt), made.line);
    made.item = element("li", {}, made.button);
    cards.set(video.id, made);
  }
  made.tag.className = `tag ${video.status}`;
  made.tag.textContent = WORDS[video.status];
  made.line.textContent = isOpen(video) ? note(video) : ago(video.created_at);
  made.button.ariaPressed = String(video.id === state.chosen);
  if (video.status === "in_progress") {
    const bar = made.picture.querySelector("progress") ?? element("progress", { max: 100, ariaLabel: "progress" });
    bar.value = video.progress;
    made.picture.replaceChildren(bar);
  } else if (video.status === "completed") {
    if (!made.picture.querySelector("img") && !made.loading) loadPicture(video.id, made);
  } else {
    made.picture.replaceChildren(element("span", { className: "dim", ariaHidden: "true" }, video.status === "failed" ? "×" : "…"));
  }
  return made;
}

async function loadPicture(id, made) {
  made.loading = true;
  const session = state.session;
  try {
    const blob = await (await call(`videos/${id}/content?variant=thumbnail`)).blob();
    if (session !== state.session) return;
    pictures.set(id, URL.createObjectURL(blob));
    made.picture.replaceChildren(element("img", { src: pictures.get(id), alt: "" }));
  } catch {
    made.loading = false; // the next refresh tries again
  }
}

function choose(id) {
  state.chosen = id;
  render();
}

function dropClip() {
  if (clip.url) URL.revokeObjectURL(clip.url);
  clip = { id: null, url: null };
}

function showStage() {
  const video = state.videos.get(state.chosen);
  $("stage").hidden = !video;
  if (!video) return;
  $("state").className = `tag ${video.status}`;
  $("state").textContent = WORDS[video.status];
  $("state-note").textContent = note(video);
  $("progress").hidden = !isOpen(video);
  $("progress").value = video.progress;
  $("words").textContent = video.prompt;
  const rows = { Who: person(video), Version: video.lora_version, Length: `${video.seconds} s`, Size: video.size, Seed: video.seed };
  if (video.expires_at) rows["Kept until"] = new Date(1000 * video.expires_at).toLocaleDateString();
  const shown = Object.entries(rows).filter(([, value]) => value !== null);
  $("facts").replaceChildren(...shown.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]));
  showScreen(video);
  showActs(video);
}

function showScreen(video) {
  const mark = `${video.id} ${video.status}`;
  if ($("screen").dataset.shows === mark) return;
  $("screen").dataset.shows = mark;
  if (clip.id !== video.id) dropClip();
  if (isOpen(video)) $("screen").replaceChildren(element("div", { className: `ring ${video.status === "queued" ? "waits" : ""}` }));
  else if (video.status === "failed") $("screen").replaceChildren(element("p", {}, "There is no clip."));
  else loadClip(video, mark);
}

async function loadClip(video, mark) {
  $("screen").replaceChildren(element("div", { className: "ring" }));
  try {
    const blob = await (await call(`videos/${video.id}/content`)).blob();
    if ($("screen").dataset.shows !== mark) return;
    dropClip();
    clip = { id: video.id, url: URL.createObjectURL(blob) };
    const player = element("video", { src: clip.url, controls: true, loop: true, muted: true, autoplay: true, playsInline: true, id: "player" });
    $("screen").replaceChildren(player);
    showActs(video);
  } catch (error) {
    if ($("screen").dataset.shows !== mark) return;
    $("screen").replaceChildren(element("p", {}, say(error)));
    delete $("screen").dataset.shows;
  }
}

function showActs(video) {
  const mark = `${video.id} ${video.status} ${clip.id === video.id}`;
  if ($("acts").dataset.shows === mark) return;
  $("acts").dataset.shows = mark;
  const acts = [];
  if (clip.id === video.id && video.status === "completed") acts.push(["Download", () => element("a", { href: clip.url, download: `${video.id}.mp4` }).click()]);
  if (isOpen(video)) acts.push(["Cancel", () => act(`videos/${video.id}/cancel`, "POST")]);
  acts.push(["Use again", () => useAgain(video)]);
  const buttons = acts.map(([text, onclick]) => element("button", { type: "button", onclick }, text));
  const remove = () => confirm("Delete this clip for good?") && act(`videos/${video.id}`, "DELETE");
  if (!isOpen(video)) buttons.push(element("button", { type: "button", className: "danger", onclick: remove }, "Delete"));
  $("acts").replaceChildren(...buttons);
}

function useAgain(video) {
  const name = video.model.split("@")[0];
  const radio = [...$("form").elements.model].find((input) => input.value === name);
  if (radio) radio.checked = true;
  showVersions();
  $("prompt").value = video.prompt;
  $("seed").value = video.seed;
  $("prompt").focus();
}

$("older").addEventListener("click", () => {
  state.limit += PAGE;
  refresh();
});
document.addEventListener("visibilitychange", () => document.hidden || !state.key || refresh());

// ---- begin -----------------------------------------------------------------------------------------------------

if (state.key) enter().catch((error) => state.key && leave(say(error)));
else leave();
