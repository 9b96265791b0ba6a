//! Chance as a pure function of numbers: same key, same draw, on any thread and in any order.

/// The finaliser of `SplitMix64`: a counter in, an even spread of bits out.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// One of many independent streams of chance, named by numbers.
pub fn stream_key(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |key, part| mix(key ^ mix(*part)))
}

/// The `i`-th number of a stream, uniform in `[0, 1)`.
pub fn unit(key: u64, i: u64) -> f64 {
    (mix(key ^ mix(i)) >> 11) as f64 / (1u64 << 53) as f64
}
