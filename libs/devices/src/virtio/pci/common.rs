//! The common configuration structure (virtio 1.2, 4.1.4.3): a pure register machine that says what its writes mean.
//!
//! ```text
//!   0 ──ACKNOWLEDGE──> ──DRIVER──> features ──FEATURES_OK──> queues ──DRIVER_OK──> live
//!   ^                                                                               │
//!   └────────────────────────── 0 written (reset) ──────────────────────────────────┘
//! ```
//!
//! A register is taken only in the step it belongs to: features before FEATURES_OK, a queue's size and addresses
//! before it is enabled and before DRIVER_OK. Written at any other time it is ignored.

use serde::{Deserialize, Serialize};

pub(super) const ACKNOWLEDGE: u8 = 1;
pub(super) const DRIVER: u8 = 2;
pub(super) const DRIVER_OK: u8 = 4;
pub(super) const FEATURES_OK: u8 = 8;
pub(super) const NEEDS_RESET: u8 = 0x40;
pub(super) const FAILED: u8 = 0x80;

/// "No vector" of a queue or of configuration changes.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Bytes of the structure.
pub(super) const COMMON_LEN: u64 = 0x38;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueV1 {
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) vector: u16,
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

impl QueueV1 {
    pub(super) fn power_on(max_size: u16) -> Self {
        Self { size: max_size, enabled: false, vector: NO_VECTOR, desc: 0, driver: 0, device: 0 }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CommonV1 {
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) config_vector: u16,
    /// Without NEEDS_RESET, which the device sets by itself.
    pub(super) status: u8,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueV1>,
}

/// What the registers are measured against; never changes.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    pub(super) features: u64,
    pub(super) max_sizes: Vec<u16>,
    pub(super) vectors: u16,
}

/// What only the transport knows at the moment of a read.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Live {
    pub(super) needs_reset: bool,
    pub(super) generation: u8,
}

/// What a write asks of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// The driver wrote zero to the status.
    Reset,
    /// The driver set DRIVER_OK.
    Activate,
    /// A vector changed.
    Vectors,
}

impl CommonV1 {
    pub(super) fn power_on(limits: &Limits) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: limits.max_sizes.iter().map(|max| QueueV1::power_on(*max)).collect(),
        }
    }

    fn queue(&self) -> Option<&QueueV1> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The value of the register that exactly `len` bytes at `offset` are; 0 if there is none.
    pub(super) fn read(&self, offset: u64, len: usize, limits: &Limits, live: Live) -> u64 {
        let queue = |value: fn(&QueueV1) -> u64| self.queue().map_or(0, value);
        match (offset, len) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select.into(),
            (DEVICE_FEATURE, 4) => feature_half(limits.features, self.device_feature_select),
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select.into(),
            (DRIVER_FEATURE, 4) => feature_half(self.driver_features, self.driver_feature_select),
            (CONFIG_VECTOR, 2) => self.config_vector.into(),
            (NUM_QUEUES, 2) => self.queues.len() as u64,
            (STATUS, 1) => u64::from(self.status | if live.needs_reset { NEEDS_RESET } else { 0 }),
            (GENERATION, 1) => live.generation.into(),
            (QUEUE_SELECT, 2) => self.queue_select.into(),
            (QUEUE_SIZE, 2) => queue(|q| q.size.into()),
            (QUEUE_VECTOR, 2) => self.queue().map_or(NO_VECTOR, |q| q.vector).into(),
            (QUEUE_ENABLE, 2) => queue(|q| q.enabled.into()),
            (QUEUE_NOTIFY_OFF, 2) => self.queue().map_or(0, |_| self.queue_select.into()),
            (QUEUE_DESC, 8) => queue(|q| q.desc),
            (QUEUE_DRIVER, 8) => queue(|q| q.driver),
            (QUEUE_DEVICE, 8) => queue(|q| q.device),
            (QUEUE_DESC, 4) => queue(|q| q.desc & 0xffff_ffff),
            (QUEUE_DRIVER, 4) => queue(|q| q.driver & 0xffff_ffff),
            (QUEUE_DEVICE, 4) => queue(|q| q.device & 0xffff_ffff),
            (0x24, 4) => queue(|q| q.desc >> 32),
            (0x2c, 4) => queue(|q| q.driver >> 32),
            (0x34, 4) => queue(|q| q.device >> 32),
            _ => 0,
        }
    }

    /// Takes a write of exactly `len` bytes.
    pub(super) fn write(&mut self, offset: u64, len: usize, value: u64, limits: &Limits) -> Effect {
        match (offset, len) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (DRIVER_FEATURE, 4) => self.write_features(value as u32),
            (CONFIG_VECTOR, 2) => {
                self.config_vector = checked_vector(value as u16, limits.vectors);
                return Effect::Vectors;
            }
            (STATUS, 1) => return self.write_status(value as u8, limits),
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_VECTOR, 2) => {
                let vector = checked_vector(value as u16, limits.vectors);
                let select = usize::from(self.queue_select);
                if let Some(queue) = self.queues.get_mut(select) {
                    queue.vector = vector;
                }
                return Effect::Vectors;
            }
            _ => self.write_queue(offset, len, value, limits),
        }
        Effect::None
    }

    fn write_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        let (keep, half) = match self.driver_feature_select {
            0 => (0xffff_ffff_0000_0000, u64::from(value)),
            1 => (0xffff_ffff, u64::from(value) << 32),
            _ => return,
        };
        self.driver_features = (self.driver_features & keep) | half;
    }

    fn write_status(&mut self, value: u8, limits: &Limits) -> Effect {
        if value == 0 {
            *self = Self::power_on(limits);
            return Effect::Reset;
        }
        // Bits are only ever added, each after the one before it (3.1.1); the driver cannot set the device's own.
        let mut added = value & !self.status;
        let mut order =
            [(ACKNOWLEDGE, 0), (DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)].iter();
        if !self.features_acceptable(limits) && self.status & FEATURES_OK == 0 {
            added &= !FEATURES_OK;
        }
        let was_live = self.status & DRIVER_OK != 0;
        self.status |= added & FAILED;
        let _ = order.try_for_each(|(bit, after)| {
            if added & bit != 0 && self.status & after == *after {
                self.status |= bit;
            }
            Some(())
        });
        if !was_live && self.status & DRIVER_OK != 0 {
            Effect::Activate
        } else {
            Effect::None
        }
    }

    /// Only what was offered, and never without VIRTIO_F_VERSION_1 (6.1).
    fn features_acceptable(&self, limits: &Limits) -> bool {
        self.driver_features & !limits.features == 0 && self.driver_features & super::VERSION_1 != 0
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u64, limits: &Limits) {
        if self.status & (DRIVER | DRIVER_OK | FAILED) != DRIVER {
            return;
        }
        let select = usize::from(self.queue_select);
        let max = limits.max_sizes.get(select).copied().unwrap_or(0);
        let Some(queue) = self.queues.get_mut(select).filter(|queue| !queue.enabled) else { return };
        let low = |old: u64| (old & !0xffff_ffff) | (value & 0xffff_ffff);
        let high = |old: u64| (old & 0xffff_ffff) | (value << 32);
        match (offset, len) {
            (QUEUE_SIZE, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= max {
                    queue.size = size;
                }
            }
            (QUEUE_ENABLE, 2) => queue.enabled = value == 1,
            (QUEUE_DESC, 8) => queue.desc = value,
            (QUEUE_DRIVER, 8) => queue.driver = value,
            (QUEUE_DEVICE, 8) => queue.device = value,
            (QUEUE_DESC, 4) => queue.desc = low(queue.desc),
            (QUEUE_DRIVER, 4) => queue.driver = low(queue.driver),
            (QUEUE_DEVICE, 4) => queue.device = low(queue.device),
            (0x24, 4) => queue.desc = high(queue.desc),
            (0x2c, 4) => queue.driver = high(queue.driver),
            (0x34, 4) => queue.device = high(queue.device),
            _ => {}
        }
    }

    /// Says what is wrong with a state that no sequence of writes leads to.
    pub(super) fn check(&self, limits: &Limits) -> Result<(), String> {
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        let vector_ok = |vector: u16| checked_vector(vector, limits.vectors) == vector;
        let ordered = [(DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)]
            .iter()
            .all(|(bit, after)| self.status & bit == 0 || self.status & after != 0);
        if self.status & !known != 0 || !ordered {
            return Err(format!("device status {:#x}", self.status));
        }
        if self.status & FEATURES_OK != 0 && !self.features_acceptable(limits) {
            return Err(format!("features {:#x} of {:#x}", self.driver_features, limits.features));
        }
        if self.queues.len() != limits.max_sizes.len() {
            return Err(format!("{} queues instead of {}", self.queues.len(), limits.max_sizes.len()));
        }
        let bad =
            self.queues.iter().zip(&limits.max_sizes).position(|(queue, max)| {
                !queue.size.is_power_of_two() || queue.size > *max || !vector_ok(queue.vector)
            });
        match bad {
            Some(index) => Err(format!("queue {index}")),
            None if !vector_ok(self.config_vector) => Err(format!("vector {}", self.config_vector)),
            None => Ok(()),
        }
    }
}

fn feature_half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}

/// A vector that does not exist reads back as none: so a driver learns that it cannot have it (4.1.5.1.2.1).
fn checked_vector(vector: u16, vectors: u16) -> u16 {
    if vector < vectors {
        vector
    } else {
        NO_VECTOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits() -> Limits {
        Limits { features: super::super::VERSION_1 | 0b1011, max_sizes: vec![256, 64], vectors: 3 }
    }

    fn negotiated(limits: &Limits) -> CommonV1 {
        let mut regs = CommonV1::power_on(limits);
        regs.write(STATUS, 1, 1, limits);
        regs.write(STATUS, 1, 3, limits);
        regs.write(DRIVER_FEATURE_SELECT, 4, 1, limits);
        regs.write(DRIVER_FEATURE, 4, 1, limits);
        regs.write(STATUS, 1, 11, limits);
        regs
    }

    #[test]
    fn features_ok_needs_version_1_and_offered_bits() {
        let limits = limits();
        assert_eq!(negotiated(&limits).status, 11);
        for (select, bits) in [(0, 1), (0, 0b100), (1, 0b11)] {
            let mut regs = CommonV1::power_on(&limits);
            regs.write(STATUS, 1, 3, &limits);
            regs.write(DRIVER_FEATURE_SELECT, 4, select, &limits);
            regs.write(DRIVER_FEATURE, 4, bits, &limits);
            regs.write(STATUS, 1, 11, &limits);
            assert_eq!(regs.status & FEATURES_OK, 0, "{select} {bits:#b}");
        }
    }

    #[test]
    fn driver_ok_before_features_ok_is_ignored() {
        let limits = limits();
        let mut regs = CommonV1::power_on(&limits);
        assert_eq!(regs.write(STATUS, 1, 7, &limits), Effect::None);
        assert_eq!(regs.status, 3);
    }

    #[test]
    fn queue_registers_are_frozen_once_enabled_and_once_live() {
        let limits = limits();
        let mut regs = negotiated(&limits);
        regs.write(QUEUE_SIZE, 2, 128, &limits);
        regs.write(QUEUE_DESC, 8, 0x1000, &limits);
        regs.write(QUEUE_ENABLE, 2, 1, &limits);
        regs.write(QUEUE_SIZE, 2, 256, &limits);
        regs.write(QUEUE_DESC, 4, 0x2000, &limits);
        assert_eq!((regs.queues[0].size, regs.queues[0].desc), (128, 0x1000));
        assert_eq!(regs.write(STATUS, 1, 15, &limits), Effect::Activate);
        regs.write(QUEUE_SELECT, 2, 1, &limits);
        regs.write(QUEUE_SIZE, 2, 32, &limits);
        regs.write(QUEUE_ENABLE, 2, 1, &limits);
        assert_eq!((regs.queues[1].size, regs.queues[1].enabled), (64, false));
    }

    #[test]
    fn queue_size_odd_or_too_large_is_ignored() {
        let limits = limits();
        let mut regs = negotiated(&limits);
        for size in [0, 3, 512, 0xffff] {
            regs.write(QUEUE_SIZE, 2, size, &limits);
            assert_eq!(regs.queues[0].size, 256);
        }
    }

    #[test]
    fn vector_beyond_the_table_reads_back_as_none() {
        let limits = limits();
        let mut regs = negotiated(&limits);
        regs.write(QUEUE_VECTOR, 2, 2, &limits);
        assert_eq!(regs.read(QUEUE_VECTOR, 2, &limits, Live::default()), 2);
        regs.write(QUEUE_VECTOR, 2, 3, &limits);
        assert_eq!(regs.read(QUEUE_VECTOR, 2, &limits, Live::default()), u64::from(NO_VECTOR));
    }

    #[test]
    fn status_zero_resets_every_register() {
        let limits = limits();
        let mut regs = negotiated(&limits);
        assert_eq!(regs.write(STATUS, 1, 0, &limits), Effect::Reset);
        assert_eq!(regs, CommonV1::power_on(&limits));
    }

    fn any_write() -> impl Strategy<Value = (u64, usize, u64)> {
        let width = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
        let value = prop_oneof![any::<u64>(), 0..16u64, Just(11), Just(15), Just(1), Just(256)];
        (0..COMMON_LEN + 8, width, value)
    }

    proptest! {
        /// Whatever is written: the state stays one that can be saved and restored, the queues that were live stay as
        /// they were, and DRIVER_OK is reached only through FEATURES_OK with acceptable features.
        #[test]
        fn any_sequence_of_writes_keeps_the_rules(writes in proptest::collection::vec(any_write(), 0..200)) {
            let limits = limits();
            let mut regs = negotiated(&limits);
            for (offset, len, value) in writes {
                let before = regs.clone();
                let effect = regs.write(offset, len, value, &limits);
                prop_assert_eq!(regs.check(&limits), Ok(()));
                if before.status & DRIVER_OK != 0 && effect != Effect::Reset {
                    prop_assert_eq!(regs.driver_features, before.driver_features);
                    for (now, then) in regs.queues.iter().zip(&before.queues) {
                        prop_assert_eq!((now.size, now.enabled, now.desc), (then.size, then.enabled, then.desc));
                        prop_assert_eq!((now.driver, now.device), (then.driver, then.device));
                    }
                    prop_assert_ne!(effect, Effect::Activate);
                }
                if effect == Effect::Activate {
                    prop_assert!(regs.status & FEATURES_OK != 0);
                }
                regs.read(offset, len, &limits, Live::default());
            }
        }
    }
}
