"""Stateless random numbers: splitmix64 over a counter, and the distributions that the plan samples from.

NumPy only. Every number is a function of its key, so any rank can compute any of them directly, and they do not
depend on NumPy's version.
"""

import math

import numpy as np
import numpy.typing as npt

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TRIES = 32  # of the rejection methods: all fail with a probability of at most 2^-32


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): uint64 -> uint64, a bijection that mixes every bit."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):
        x = x + GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_counter(*parts: npt.ArrayLike) -> np.ndarray:
    """uint64 hash of the parts, each an integer or an array of them (broadcast together)."""
    key = np.asarray(0, np.uint64)
    for part in parts:
        key = splitmix64(key ^ np.asarray(part).astype(np.uint64))
    return key


def uniform(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 of 64 random bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """float64 in [0, 1), [B, count]: `count` draws for each key (uint64 [B])."""
    counters = np.arange(count, dtype=np.uint64) * GOLDEN
    return uniform(splitmix64(np.asarray(keys, np.uint64)[:, None] + counters))


def normal(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Standard normal float64 from two uniform numbers (Box and Muller 1958)."""
    return np.sqrt(-2 * np.log1p(-one)) * np.cos(2 * math.pi * other)


def symmetric_beta(keys: np.ndarray, alpha: float) -> np.ndarray:
    """float64 [B] of the distribution Beta(alpha, alpha), one for each key: by Joehnk's method (1964) up to 1, by
    Cheng's BB (1978) above."""
    draws = np.maximum(uniforms(keys, 2 * _TRIES), 2.0**-54).reshape(-1, _TRIES, 2)
    one, other = draws[..., 0], draws[..., 1]
    if alpha <= 1:
        one, other = np.log(one) / alpha, np.log(other) / alpha  # logarithms: the powers may be too small for a float
        largest = np.maximum(one, other)
        total = largest + np.log(np.exp(one - largest) + np.exp(other - largest))
        fits, value = total <= 0, np.exp(one - total)
    else:
        beta = math.sqrt((2 * alpha - 2) / (2 * alpha * alpha - 2 * alpha))
        v = beta * np.log(one / (1 - one))
        w = alpha * np.exp(v)
        right = np.log(one * one * other)
        left = (alpha + 1 / beta) * v - math.log(4) + 2 * alpha * np.log(2 * alpha / (alpha + w))
        fits, value = left >= right, w / (alpha + w)
    return value[np.arange(len(value)), fits.argmax(1)]
