// The page: a picture in, the most probable classes out, all of it in the browser.
import * as ort from "./ort.wasm.bundle.min.mjs";
import { coloured, resized } from "./resize.js";

const TOP = 5;
const STRIP = 2 ** 22; // pixels: phones limit the area of a canvas
const SHOWN = 1024; // pixels: the longer side of the picture on the page
const element = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const threads = crossOriginIsolated ? Math.min(2, navigator.hardwareConcurrency) : 1;

function say(text, kind = "") {
  element("status").textContent = text;
  element("status").className = kind;
}

async function load() {
  ort.env.wasm.numThreads = threads;
  const name = document.querySelector("meta[name=model]").content;
  const [session, contract] = await Promise.all([
    ort.InferenceSession.create(name, { executionProviders: ["wasm"] }),
    fetch("preprocess.json").then((response) => response.json()),
  ]);
  const { size: [height, width], channels } = contract.preprocess;
  const run = (pixels) => session.run({ image: new ort.Tensor("uint8", pixels, [1, height, width, channels]) });
  await run(new Uint8Array(height * width * channels)); // the first run is slower than those that follow
  return { run, ...contract };
}

/** uint8 [H, W, channels] of a bitmap, read in strips. */
function pixels(bitmap, channels) {
  const { width, height } = bitmap;
  const rows = Math.min(height, Math.ceil(STRIP / width));
  const context = new OffscreenCanvas(width, rows).getContext("2d", { willReadFrequently: true });
  context.globalCompositeOperation = "copy";
  const all = new Uint8Array(height * width * channels);
  for (let top = 0; top < height; top += rows) {
    context.drawImage(bitmap, 0, -top);
    const strip = context.getImageData(0, 0, width, Math.min(rows, height - top)).data;
    all.set(coloured(strip, channels), top * width * channels);
  }
  return all;
}

function show(bitmap, name) {
  const canvas = element("picture");
  const scale = Math.min(1, SHOWN / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  canvas.setAttribute("aria-label", `The picture ${name}`);
  canvas.hidden = false;
}

function list(probabilities, classes) {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, TOP);
  const items = order.map((i) => {
    const item = element("answer").content.cloneNode(true);
    item.querySelector(".name").textContent = classes[i];
    item.querySelector(".share").textContent = percent.format(probabilities[i]);
    item.querySelector(".share").value = probabilities[i];
    item.querySelector("progress").value = probabilities[i];
    return item;
  });
  element("answers").replaceChildren(...items);
}

async function answer(file) {
  element("answers").replaceChildren();
  say("Looking …");
  const asStored = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(file, asStored).catch(() => null);
  if (!bitmap) return say(`${file.name} is no picture that this browser can read: choose another one.`, "error");
  show(bitmap, file.name);
  const { run, classes, preprocess: { size, channels } } = await network;
  await new Promise((painted) => setTimeout(painted)); // what follows keeps the page from painting
  const start = performance.now();
  const image = resized(pixels(bitmap, channels), [bitmap.height, bitmap.width], size, channels);
  const ready = performance.now();
  const { probabilities } = await run(image);
  const end = performance.now();
  list(probabilities.data, classes);
  say(`Answered in ${Math.round(end - ready)} ms, scaled in ${Math.round(ready - start)} ms.`);
}

let work = Promise.resolve(); // one picture after the other
function take([file]) {
  if (!file) return;
  work = work.then(() => answer(file)).catch(({ message }) => say(`That failed: ${message}`, "error"));
}

element("threads").textContent = threads === 1 ? "1 thread" : `${threads} threads`;
say("Loading the network …");
const network = load();
network.then(
  () => say("Ready."),
  (error) => say(`The network cannot be loaded: ${error.message}`, "error"),
);
for (const id of ["file", "camera"]) {
  element(id).addEventListener("change", ({ target }) => {
    take(target.files);
    target.value = ""; // so that the same file can be chosen again
  });
}
addEventListener("paste", ({ clipboardData }) => take(clipboardData.files));
addEventListener("dragover", (event) => {
  event.preventDefault();
  element("drop").classList.add("over");
});
addEventListener("dragleave", ({ relatedTarget }) => relatedTarget ?? element("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  element("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
