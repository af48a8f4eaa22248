// A picture as the network takes it: RGB or grey, through Pillow's antialiased bilinear filter, to the same bits.

const BITS = 22; // of the fraction in a weight

/** For each of `to` pixels: where its window of the `from` pixels starts, and the window's weights times 2^BITS. */
function windows(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const triangle = (_, j) => Math.max(0, 1 - Math.abs((j + start - centre + 0.5) * (1 / support)));
    const heights = Array.from({ length: end - start }, triangle);
    const sum = heights.reduce((a, b) => a + b, 0);
    return { start, weights: Int32Array.from(heights, (each) => Math.trunc(0.5 + (each / sum) * 2 ** BITS)) };
  });
}

/** uint8 [outer, from, inner] → [outer, to, inner], rounded; weights add up to 2^BITS, so that nothing overflows. */
function along(pixels, outer, from, inner, to) {
  if (from === to) return pixels;
  const out = new Uint8Array(outer * to * inner);
  const all = windows(from, to);
  for (let o = 0, next = 0; o < outer; o++)
    for (const { start, weights } of all)
      for (let k = 0; k < inner; k++) {
        let sum = 1 << (BITS - 1);
        const at = (o * from + start) * inner + k;
        for (let j = 0; j < weights.length; j++) sum += pixels[at + j * inner] * weights[j];
        out[next++] = sum >> BITS;
      }
  return out;
}

/** RGBA bytes → RGB, or ITU-R 601-2 luma as Pillow rounds it; alpha is dropped. */
export function coloured(rgba, channels) {
  const out = new Uint8Array((rgba.length / 4) * channels);
  for (let i = 0, next = 0; i < rgba.length; i += 4) {
    const r = rgba[i], g = rgba[i + 1], b = rgba[i + 2];
    if (channels === 1) out[next++] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else { out[next++] = r; out[next++] = g; out[next++] = b; }
  }
  return out;
}

/** uint8 [height, width, channels] → [h, w, channels]. */
export function resized(pixels, [height, width], [h, w], channels) {
  // Rows and columns are rounded one after the other; Pillow 13 begins with the rows where far more of them go.
  if (height > h && height - h > 2 * (width - w)) {
    const low = along(pixels, 1, height, width * channels, h);
    return along(low, h, width, channels, w);
  }
  const narrow = along(pixels, height, width, channels, w);
  return along(narrow, 1, height, w * channels, h);
}
