// Runs an ONNX model for the process that started this one: node onnxruntime_web.mjs RUNTIME THREADS.
// In: the model's length and bytes; then, for each picture, its height, width, channels and bytes. Out: "ready"; then, for
// each picture, its probabilities. Lengths are uint32, probabilities float32, both little-endian. Ends when the input does.
import { pathToFileURL } from "node:url";

process.on("uncaughtException", ({ message }) => {
  console.error(message);
  process.exit(1);
});
console.log = console.error; // the output is for answers

const chunks = process.stdin[Symbol.asyncIterator]();
let rest = Buffer.alloc(0);

async function read(length) {
  const parts = [rest];
  for (let had = rest.length; had < length; had += parts.at(-1).length) {
    const { value, done } = await chunks.next();
    if (done) process.exit();
    parts.push(value);
  }
  const all = Buffer.concat(parts);
  rest = all.subarray(length);
  return all.subarray(0, length);
}

const [runtime, threads] = process.argv.slice(2);
const ort = await import(pathToFileURL(`${runtime}/ort.node.min.mjs`));
ort.env.logLevel = "error";
ort.env.wasm.numThreads = Number(threads);
const model = await read((await read(4)).readUInt32LE());
const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
process.stdout.write("ready");
for (;;) {
  const header = await read(12);
  const shape = [0, 4, 8].map((at) => header.readUInt32LE(at));
  const pixels = new Uint8Array(await read(shape[0] * shape[1] * shape[2]));
  const { probabilities } = await session.run({ image: new ort.Tensor("uint8", pixels, [1, ...shape]) });
  process.stdout.write(Buffer.from(probabilities.data.buffer, probabilities.data.byteOffset, probabilities.data.byteLength));
}
