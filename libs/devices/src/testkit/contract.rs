//! The contract that every device keeps, as one suite that each device's tests call.
//!
//! * garbage of every width at every offset never panics and never loops;
//! * reset gives the power-on state;
//! * save, restore, save gives the same section;
//! * a damaged section never panics: it is refused and changes nothing, or it yields a state that works.
//!
//! Everything is deterministic: the random numbers are those of a fixed seed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test suite"
)]

use std::sync::Arc;

use ovms_state::{Persist, Section};

use crate::bus::BusDevice;

/// Accesses of one round of garbage.
const ROUND: usize = 4000;
/// Damaged copies of one section.
const MUTATIONS: usize = 400;

/// xorshift64*: enough to stir registers, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers that depend on `seed` alone.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next_u64() % bound.max(1) as u64) as usize
    }

    /// A number with an interesting magnitude: small, near a power of two, all ones, or any.
    pub fn odd_value(&mut self) -> u64 {
        match self.below(5) {
            0 => self.next_u64() & 0x0f,
            1 => 1 << self.below(64),
            2 => (1u64 << self.below(64)).wrapping_sub(1),
            3 => u64::MAX,
            _ => self.next_u64(),
        }
    }
}

/// One random access at an offset of up to a little more than `len`.
fn poke(device: &dyn BusDevice, len: u64, random: &mut Random) {
    let offset = match random.below(50) {
        0 => u64::MAX - random.next_u64() % 16,
        1 => random.next_u64(),
        _ => random.next_u64() % (len + 16),
    };
    let width = [1, 1, 2, 2, 4, 4, 8, 3, 16, 64][random.below(10)];
    let mut data = vec![0xffu8; width];
    if random.below(3) == 0 {
        device.read(offset, &mut data);
    } else {
        for chunk in data.chunks_mut(8) {
            let value = random.odd_value().to_le_bytes();
            chunk.copy_from_slice(&value[..chunk.len()]);
        }
        device.write(offset, &data);
    }
}

/// Does what a mad guest does to a device of `len` bytes.
pub fn stir(device: &dyn BusDevice, len: u64, seed: u64) {
    let mut random = Random::new(seed);
    for _ in 0..ROUND {
        poke(device, len, &mut random);
    }
}

/// What a guest sees that reads the whole range once.
pub fn fingerprint(device: &dyn BusDevice, len: u64) -> Vec<u8> {
    (0..len.min(4096))
        .map(|offset| {
            let mut data = [0xff];
            device.read(offset, &mut data);
            data[0]
        })
        .collect()
}

/// Garbage never panics: every width at every offset, then random sequences.
pub fn bus_device<D: BusDevice>(make: impl Fn() -> Arc<D>, len: u64) {
    let device = make();
    for offset in (0..len.min(4096) + 8).chain([u64::MAX, u64::MAX - 7, 1 << 32]) {
        for width in [0usize, 1, 2, 3, 4, 8, 16] {
            for value in [0x00, 0xff, 0x55] {
                device.write(offset, &vec![value; width]);
                device.read(offset, &mut vec![0xff; width]);
            }
        }
    }
    for seed in 0..8 {
        stir(make().as_ref(), len, seed);
    }
}

/// A stirred device that is reset looks like a new one.
pub fn reset<D: BusDevice>(make: impl Fn() -> Arc<D>, reset: impl Fn(&D), len: u64) {
    let fresh = fingerprint(make().as_ref(), len);
    for seed in 0..8 {
        let device = make();
        stir(device.as_ref(), len, seed);
        reset(&device);
        assert_eq!(fingerprint(device.as_ref(), len), fresh, "after reset, seed {seed}");
    }
}

/// A stirred device saves, restores and saves the same; damaged sections are refused whole or work.
pub fn persist<D: BusDevice + Persist>(make: impl Fn() -> Arc<D>, len: u64) {
    for seed in 0..8 {
        let device = make();
        stir(device.as_ref(), len, seed);
        let saved = device.save().unwrap();
        let other = make();
        other.restore(&saved).unwrap();
        assert_eq!(other.save().unwrap(), saved, "restored and saved again, seed {seed}");
        assert_eq!(fingerprint(other.as_ref(), len), fingerprint(device.as_ref(), len), "as the guest sees it");
        damaged_sections(&saved, &make, |device, seed| stir(device, len, seed));
    }
}

/// Restores damaged copies of `section` into new devices and stirs those that accept.
pub fn damaged_sections<P: Persist>(section: &Section, make: impl Fn() -> Arc<P>, stir: impl Fn(&P, u64)) {
    let mut random = Random::new(section.payload.len() as u64);
    let mut device = make();
    let before = device.save().unwrap();
    for round in 0..MUTATIONS {
        let damaged = damage(section, &mut random);
        match device.restore(&damaged) {
            Err(_) => assert_eq!(device.save().unwrap(), before, "a refused section changed the device: {damaged:?}"),
            Ok(()) => {
                let saved = device.save().unwrap();
                let again = make();
                again.restore(&saved).expect("what a device saves, it restores");
                assert_eq!(again.save().unwrap(), saved);
                if round % 10 == 0 {
                    stir(&again, round as u64);
                }
                device = make();
            }
        }
    }
    let mut other = section.clone();
    other.kind.push('x');
    device.restore(&other).expect_err("another kind");
    let other = Section { version: u32::MAX, ..section.clone() };
    device.restore(&other).expect_err("a version of the future");
}

/// One copy with a few bytes, numbers or a stretch of the payload changed.
fn damage(section: &Section, random: &mut Random) -> Section {
    let mut damaged = section.clone();
    let payload = &mut damaged.payload;
    for _ in 0..=random.below(3) {
        if payload.is_empty() {
            break;
        }
        let at = random.below(payload.len());
        match random.below(5) {
            0 => payload[at] ^= 1 << random.below(8),
            1 => payload.truncate(at),
            2 => drop(payload.drain(at..(at + random.below(8)).min(payload.len()))),
            _ => change_number(payload, at, random),
        }
    }
    damaged
}

/// Replaces the first number at or after `at` by another one.
fn change_number(payload: &mut Vec<u8>, at: usize, random: &mut Random) {
    let Some(start) = payload[at..].iter().position(u8::is_ascii_digit).map(|i| i + at) else { return };
    let end = payload[start..].iter().position(|b| !b.is_ascii_digit()).map_or(payload.len(), |i| i + start);
    payload.splice(start..end, (random.odd_value() >> random.below(60)).to_string().into_bytes());
}
