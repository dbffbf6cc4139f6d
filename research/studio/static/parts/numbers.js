// Numbers as the server writes them, so that a live value looks like the first one.

export function formatNumber(value) {
  if (value === null || value === undefined || value === "") return "-";
  if (typeof value === "string") return value;
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (value && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace("e+", "e");
  const digits = size < 1000 ? { maximumSignificantDigits: 4 } : { maximumFractionDigits: 0 };
  return value.toLocaleString("en-US", digits);
}

// `1 token`, `2 tokens`, as the server's `counted`.
export const counted = (count, noun) => `${formatNumber(count)} ${noun}${count === 1 ? "" : "s"}`;

export function formatDuration(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}
