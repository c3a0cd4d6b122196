// exp, erf and tanh of vectors of floats, with the bits of the functions that torch's CPU activations call: exp and tanh are
// those of SLEEF 3 with an error of one unit in the last place (https://sleef.org), erf is formula 7.1.26 of Abramowitz and
// Stegun. A fused kernel then agrees with the unfused model to the last bit. The constants and the order of operations are
// theirs, so no step may be simplified. exp of doubles is the C library's.
#pragma once

#include "vectors.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

constexpr float log2_e = 1.442695040888963407359924681001892137426645954152985934135449406931f;
// ln 2 in two parts: the upper one has trailing zeros, so that q · ln2_upper is exact for small whole q.
constexpr float ln2_upper = 0.693145751953125f;
constexpr float ln2_lower = 1.428606765330187045e-06f;

INLINE Floats splat(float x) { return Floats{} + x; }

// The nearest whole number, ties to even, for |x| < 2²²; else anything. A float of 1.5 · 2²³ has no bits for a fraction, so the
// processor's addition rounds.
INLINE Floats nearest(Floats x) {
  const Floats shift = splat(0x1.8p23f);
  return (x + shift) - shift;
}

// x · 2^q for whole q; anything for |q| ≥ 256.
INLINE Floats scaled(Floats x, Floats q) {
#if defined(__AVX512F__)
  return (Floats)INSTRUCTION_SCALEF(x, q);
#else
  // In two products: 2^q itself may be outside the range of float where x · 2^q is not.
  q = pick((q < splat(256.0f)) & (q > splat(-256.0f)), q, Floats{});
  const Ints whole = __builtin_convertvector(q, Ints), half = whole >> 1;
  return x * as_floats((Bits)(half + 127) << 23) * as_floats((Bits)(whole - half + 127) << 23);
#endif
}

// eˣ = 2^q · eˢ with s = x - q ln 2, |s| ≤ ln 2 / 2, and a polynomial for eˢ.
LONG Floats exponential(Floats x) {
  const Floats q = nearest(x * log2_e);
  Floats s = fma(q, splat(-ln2_upper), x);
  s = fma(q, splat(-ln2_lower), s);
  Floats u = splat(0.000198527617612853646278381f);
  u = fma(u, s, splat(0.00139304355252534151077271f));
  u = fma(u, s, splat(0.00833336077630519866943359f));
  u = fma(u, s, splat(0.0416664853692054748535156f));
  u = fma(u, s, splat(0.166666671633720397949219f));
  u = fma(u, s, splat(0.5f));
  u = 1.0f + fma(s * s, u, s);
  u = scaled(u, q);
  u = pick(x < splat(-104.0f), Floats{}, u);
  return pick(x > splat(100.0f), splat(__builtin_inff()), u);
}

LONG Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// Computed for |x|, then given the sign of x: erf is odd.
LONG Floats error_function(Floats x) {
  const Bits sign = as_bits(x) & 0x80000000u;
  const Floats t = 1.0f / fma(splat(0.3275911f), as_floats(as_bits(x) & 0x7fffffffu), splat(1.0f));
  Floats r = fma(splat(1.061405429f), t, splat(-1.453152027f));
  r = fma(r, t, splat(1.421413741f));
  r = fma(r, t, splat(-0.284496736f));
  r = fma(r, t, splat(0.254829592f));
  const Floats result = fma(-exponential(-(x * x)) * t, r, splat(1.0f));
  return as_floats(as_bits(result) ^ sign);
}

// A number as the unevaluated sum of two floats ("double-float"), about 48 bits: x, and what x lacks. tanh needs it because eˣ
// - e⁻ˣ cancels for small x.
struct Pair {
  Floats x, y;
};

INLINE Pair normalized(Pair a) {
  const Floats s = a.x + a.y;
  return {s, (a.x - s) + a.y};
}
INLINE Pair product(Pair a, Floats b) {
  const Floats s = a.x * b;
  return {s, fma(a.y, b, fma(a.x, b, -s))};
}
INLINE Pair product(Pair a, Pair b) {
  const Floats s = a.x * b.x;
  return {s, fma(a.x, b.y, fma(a.y, b.x, fma(a.x, b.x, -s)))};
}
INLINE Pair square(Pair a) {
  const Floats s = a.x * a.x;
  return {s, fma(a.x + a.x, a.y, fma(a.x, a.x, -s))};
}
INLINE Pair inverse(Pair a) {
  const Floats s = 1.0f / a.x;
  return {s, s * fma(-a.y, s, fma(-a.x, s, splat(1.0f)))};
}
INLINE Pair quotient(Pair a, Pair b) {
  const Floats t = 1.0f / b.x, s = t * a.x;
  const Floats u = fma(t, a.x, -s), v = fma(-b.y, t, fma(-b.x, t, splat(1.0f)));
  return {s, fma(s, v, fma(a.y, t, u))};
}
// For |a| ≥ |b| three additions give the error of a sum (Dekker) ...
INLINE Pair ordered_sum(Pair a, Pair b) {
  const Floats s = a.x + b.x;
  return {s, (((a.x - s) + b.x) + a.y) + b.y};
}
INLINE Pair ordered_sum(Floats a, Pair b) {
  const Floats s = a + b.x;
  return {s, ((a - s) + b.x) + b.y};
}
// ... and in general six do (Knuth).
INLINE Pair any_sum(Pair a, Floats b) {
  const Floats s = a.x + b, v = s - a.x;
  return {s, ((a.x - (s - v)) + (b - v)) + a.y};
}
INLINE Pair any_sum(Pair a, Pair b) {
  const Floats s = a.x + b.x, v = s - a.x;
  return {s, ((a.x - (s - v)) + (b.x - v)) + (a.y + b.y)};
}

// e^y for 0 ≤ y ≤ 9.
LONG Pair exponential_pair(Floats y) {
  const Floats q = nearest(y * log2_e);
  Pair s = any_sum(Pair{y, Floats{}}, q * -ln2_upper);
  s = any_sum(s, q * -ln2_lower);
  s = normalized(s);
  Floats u = splat(0.1980960224e-3f);
  u = fma(u, s.x, splat(0.1394256484e-2f));
  u = fma(u, s.x, splat(0.8333456703e-2f));
  u = fma(u, s.x, splat(0.4166637361e-1f));
  Pair t = any_sum(product(s, u), splat(0.166666659414234244790680580464e+0f));
  t = any_sum(product(s, t), splat(0.5f));
  t = any_sum(s, product(square(s), t));
  t = ordered_sum(splat(1.0f), t);
  return {scaled(t.x, q), scaled(t.y, q)};
}

// (eˣ - e⁻ˣ) / (eˣ + e⁻ˣ) for |x|, 1 where that is 1 in float, and the sign of x.
LONG Floats hyperbolic_tangent(Floats x) {
  const Bits sign = as_bits(x) & 0x80000000u;
  const Floats y = as_floats(as_bits(x) & 0x7fffffffu);
  const Pair d = exponential_pair(y), e = inverse(d);
  const Pair result = quotient(ordered_sum(d, Pair{-e.x, -e.y}), ordered_sum(d, e));
  const Floats value = pick(y > splat(8.664339742f), splat(1.0f), result.x + result.y);
  return pick(x != x, x, as_floats(as_bits(value) ^ sign));
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
