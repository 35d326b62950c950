// Shows the sets of data.js one by one, in an order of its own for everybody, and saves the answers as one file.
// Nothing leaves the browser; answers so far are kept in localStorage, so that a closed page can be opened again.
"use strict";

const questions = Object.entries(STUDY.questions);
const find = (id) => document.getElementById(id);
const slot = "study-" + STUDY.study;
let state = load() || begin();

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(slot));
    return found && found.order.length === STUDY.sets.length ? found : null;
  } catch {
    return null;
  }
}

function begin() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  const participant = [...bytes].map((b) => b.toString(16).padStart(2, "0")).join("");
  const order = shuffled(STUDY.sets.map((_, number) => number));
  return { participant, order, clips: STUDY.sets.map((set) => shuffled(set.clips)), answers: {}, at: -1 };
}

function shuffled(items) {
  const found = [...items];
  for (let i = found.length - 1; i > 0; i--) {
    const j = crypto.getRandomValues(new Uint32Array(1))[0] % (i + 1);
    [found[i], found[j]] = [found[j], found[i]];
  }
  return found;
}

function keep() {
  try {
    localStorage.setItem(slot, JSON.stringify(state));
  } catch {
    // A browser that keeps nothing: the answers live as long as the page.
  }
}

function show() {
  const total = STUDY.sets.length;
  find("start").hidden = state.at >= 0;
  find("set").hidden = state.at < 0 || state.at >= total;
  find("end").hidden = state.at < total;
  find("progress").value = Math.max(0, state.at) / total;
  find("where").textContent = state.at < 0 ? total + " sets" : state.at < total ? `Set ${state.at + 1} of ${total}` : "Done";
  find("problem").textContent = "";
  if (state.at >= total) {
    find("file").textContent = fileName();
  } else if (state.at >= 0) {
    draw(state.order[state.at]);
  }
}

function draw(number) {
  const set = STUDY.sets[number];
  const clips = state.clips[number];
  const kept = state.answers[set.set] || {};
  find("prompt").textContent = set.prompt;
  find("photos").replaceChildren(...set.photos.map((photo, i) => image(photo, `Photo ${i + 1} of the person`)));
  const grid = find("clips");
  grid.style.setProperty("--count", clips.length);
  grid.replaceChildren(corner(), ...clips.map(figure));
  for (const [name, text] of questions) {
    const label = document.createElement("div");
    label.className = "question";
    label.id = "q-" + name;
    label.textContent = text;
    grid.append(label, ...clips.map((clip, i) => choice(name, clip, letter(i), kept[name] === clip)));
  }
  find("back").disabled = state.at === 0;
  find("next").textContent = state.at + 1 === STUDY.sets.length ? "Finish" : "Next";
  window.scrollTo(0, 0);
}

function corner() {
  const empty = document.createElement("div");
  empty.className = "corner";
  empty.style.border = "0";
  return empty;
}

const letter = (i) => String.fromCharCode(65 + i);

function image(source, text) {
  const element = document.createElement("img");
  element.src = source;
  element.alt = text;
  return element;
}

function figure(clip, i) {
  const video = document.createElement("video");
  Object.assign(video, { src: clip, muted: true, loop: true, autoplay: true, playsInline: true });
  video.setAttribute("aria-label", "Clip " + letter(i));
  const caption = document.createElement("figcaption");
  caption.textContent = letter(i);
  const element = document.createElement("figure");
  element.append(video, caption);
  return element;
}

function choice(question, clip, name, chosen) {
  const input = document.createElement("input");
  Object.assign(input, { type: "radio", name: question, value: clip, checked: chosen });
  input.setAttribute("aria-label", `${STUDY.questions[question]} Clip ${name}`);
  const label = document.createElement("label");
  label.className = "choice";
  label.append(input);
  return label;
}

function replay() {
  for (const video of document.querySelectorAll("video")) {
    video.currentTime = 0;
    video.play().catch(() => {});
  }
}

function fileName() {
  return `answers-${STUDY.study}-${state.participant}.json`;
}

function save() {
  const answers = [];
  for (const number of state.order) {
    const set = STUDY.sets[number];
    for (const [question, clip] of Object.entries(state.answers[set.set] || {})) {
      answers.push({ set: set.set, question, choice: clip, shown: state.clips[number] });
    }
  }
  const content = { study: STUDY.study, participant: state.participant, answers };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  link.download = fileName();
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

find("begin").addEventListener("click", () => {
  state.at = 0;
  keep();
  show();
});

find("form").addEventListener("change", (event) => {
  const set = STUDY.sets[state.order[state.at]];
  state.answers[set.set] = { ...state.answers[set.set], [event.target.name]: event.target.value };
  find("q-" + event.target.name).classList.remove("missing");
  keep();
});

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = state.answers[STUDY.sets[state.order[state.at]].set] || {};
  const missing = questions.filter(([name]) => !given[name]);
  for (const [name] of missing) find("q-" + name).classList.add("missing");
  if (missing.length) {
    find("problem").textContent = "Please answer all four questions.";
    return;
  }
  state.at += 1;
  keep();
  show();
  if (state.at === STUDY.sets.length) save();
});

find("back").addEventListener("click", () => {
  state.at -= 1;
  keep();
  show();
});
find("replay").addEventListener("click", replay);
find("save").addEventListener("click", save);
show();
