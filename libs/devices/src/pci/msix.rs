//! MSI-X (PCI Local Bus 3.0, section 6.8.2): the vector table, the pending bits and the two bits of message control.
//!
//! ```text
//!   device: signal(v) ── enabled and unmasked? ──yes──> MsixNotifier::signal
//!                               └─no──> pending bit ──unmask──> MsixNotifier::signal
//!   guest:  table/control write ──> MsixNotifier::configure for every vector whose message or mask changed
//! ```

use std::sync::{Arc, Mutex};

use ovms_state::StateError;
use serde::{Deserialize, Serialize};

use super::MsixNotifier;
use crate::irq::{MsiMessage, MsiSink};
use crate::sync::lock;

/// Capability ID.
pub(crate) const CAPABILITY_ID: u8 = 0x11;
/// Bytes of one table entry.
pub(crate) const ENTRY_BYTES: u64 = 16;
/// The most vectors that a function may have.
pub const MAX_VECTORS: u16 = 2048;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
/// The bits of message control that a guest may change.
pub(crate) const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_MASK_ALL;

const ENTRY_MASKED: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct EntryV1 {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

impl EntryV1 {
    const POWER_ON: Self = Self { address: 0, data: 0, control: ENTRY_MASKED, pending: false };

    fn bytes(&self) -> [u8; ENTRY_BYTES as usize] {
        let value = u128::from(self.address) | (u128::from(self.data) << 64) | (u128::from(self.control) << 96);
        value.to_le_bytes()
    }

    fn set_bytes(&mut self, bytes: [u8; ENTRY_BYTES as usize]) {
        let value = u128::from_le_bytes(bytes);
        // The low two bits of the address are reserved: messages are aligned.
        self.address = (value as u64) & !3;
        self.data = (value >> 64) as u32;
        self.control = ((value >> 96) as u32) & ENTRY_MASKED;
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MsixV1 {
    control: u16,
    entries: Vec<EntryV1>,
}

impl MsixV1 {
    fn power_on(vectors: u16) -> Self {
        Self { control: 0, entries: vec![EntryV1::POWER_ON; usize::from(vectors)] }
    }

    /// The message of a vector that may be delivered now.
    fn deliverable(&self, entry: &EntryV1) -> Option<MsiMessage> {
        let on = self.control & CONTROL_WRITABLE == CONTROL_ENABLE;
        (on && entry.control & ENTRY_MASKED == 0).then_some(MsiMessage { address: entry.address, data: entry.data })
    }

    fn messages(&self) -> Vec<Option<MsiMessage>> {
        self.entries.iter().map(|entry| self.deliverable(entry)).collect()
    }
}

/// The MSI-X half of a function.
///
/// The notifier is called under the lock: a vector is never signalled by a route that the guest has already changed.
pub struct Msix {
    state: Mutex<MsixV1>,
    notifier: Arc<dyn MsixNotifier>,
}

impl Msix {
    /// A table of `vectors` (1 to [`MAX_VECTORS`]) masked entries.
    pub fn new(vectors: u16, notifier: Arc<dyn MsixNotifier>) -> Self {
        Self { state: Mutex::new(MsixV1::power_on(vectors.clamp(1, MAX_VECTORS))), notifier }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        u16::try_from(lock(&self.state).entries.len()).unwrap_or(MAX_VECTORS)
    }

    /// Delivers `vector`, now or when it is unmasked. A vector that does not exist is nobody's.
    pub fn signal(&self, vector: u16) {
        let mut state = lock(&self.state);
        let Some(entry) = state.entries.get(usize::from(vector)) else { return };
        if state.deliverable(entry).is_some() {
            self.notifier.signal(vector);
        } else if let Some(entry) = state.entries.get_mut(usize::from(vector)) {
            entry.pending = true;
        }
    }

    /// Whether the guest has switched MSI-X on.
    pub fn enabled(&self) -> bool {
        lock(&self.state).control & CONTROL_ENABLE != 0
    }

    /// The guest wrote message control.
    pub(crate) fn set_control(&self, control: u16) {
        self.change(|state| state.control = control & CONTROL_WRITABLE);
    }

    /// Loads from the table: aligned, 4 or 8 bytes; others read as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !is_table_access(offset, data.len()) {
            return;
        }
        let state = lock(&self.state);
        if let Some(entry) = entry_index(offset).and_then(|i| state.entries.get(i)) {
            let from = entry.bytes();
            for (to, from) in data.iter_mut().zip(from.iter().skip((offset % ENTRY_BYTES) as usize)) {
                *to = *from;
            }
        }
    }

    /// Stores to the table: aligned, 4 or 8 bytes; others change nothing.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !is_table_access(offset, data.len()) {
            return;
        }
        self.change(|state| {
            if let Some(entry) = entry_index(offset).and_then(|i| state.entries.get_mut(i)) {
                let mut bytes = entry.bytes();
                for (to, from) in bytes.iter_mut().skip((offset % ENTRY_BYTES) as usize).zip(data) {
                    *to = *from;
                }
                entry.set_bytes(bytes);
            }
        });
    }

    /// Loads from the pending bits, one per vector. They cannot be written.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, byte) in data.iter_mut().enumerate() {
            let start = first.saturating_add(i).saturating_mul(8);
            let entries = state.entries.get(start..).unwrap_or_default().iter().take(8);
            *byte = entries.enumerate().filter(|(_, e)| e.pending).fold(0, |bits, (bit, _)| bits | (1 << bit));
        }
    }

    /// Every vector masked, MSI-X off.
    pub fn reset(&self) {
        self.change(|state| {
            let vectors = state.entries.len();
            state.control = 0;
            state.entries = vec![EntryV1::POWER_ON; vectors];
        });
    }

    /// Changes the state, tells the notifier what came of it, and delivers what had waited.
    fn change(&self, change: impl FnOnce(&mut MsixV1)) {
        let mut state = lock(&self.state);
        let before = state.messages();
        change(&mut state);
        let after = state.messages();
        for (vector, (old, new)) in (0u16..).zip(before.iter().zip(&after)) {
            if old != new {
                self.notifier.configure(vector, *new);
            }
        }
        for (vector, (entry, message)) in (0u16..).zip(state.entries.iter_mut().zip(&after)) {
            if message.is_some() && std::mem::take(&mut entry.pending) {
                self.notifier.signal(vector);
            }
        }
    }

    pub(crate) fn save(&self) -> MsixV1 {
        lock(&self.state).clone()
    }

    pub(crate) fn check(&self, kind: &'static str, saved: &MsixV1) -> Result<(), StateError> {
        let vectors = lock(&self.state).entries.len();
        let entry_ok = |e: &EntryV1| e.address & 3 == 0 && e.control & !ENTRY_MASKED == 0;
        // A pending vector that could be delivered would have been.
        let stuck = |e: &EntryV1| e.pending && saved.deliverable(e).is_some();
        let what = if saved.entries.len() != vectors {
            format!("{} MSI-X vectors instead of {vectors}", saved.entries.len())
        } else if saved.control & !CONTROL_WRITABLE != 0 {
            format!("MSI-X control {:#x}", saved.control)
        } else if let Some(i) = saved.entries.iter().position(|e| !entry_ok(e) || stuck(e)) {
            format!("MSI-X vector {i}")
        } else {
            return Ok(());
        };
        Err(StateError::Invalid { kind, what })
    }

    /// Takes over a state that [`Msix::check`] has passed, and tells the notifier all of it.
    pub(crate) fn load(&self, saved: MsixV1) {
        self.change(|state| *state = saved);
    }
}

/// Software must access the table by aligned dwords or quadwords (6.8.2).
fn is_table_access(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

fn entry_index(offset: u64) -> Option<usize> {
    usize::try_from(offset / ENTRY_BYTES).ok()
}

/// Delivers vectors as plain messages.
pub struct MsiNotifier {
    sink: Arc<dyn MsiSink>,
    messages: Mutex<Vec<Option<MsiMessage>>>,
}

impl MsiNotifier {
    /// A notifier that sends to `sink`.
    pub fn new(sink: Arc<dyn MsiSink>) -> Self {
        Self { sink, messages: Mutex::default() }
    }
}

impl MsixNotifier for MsiNotifier {
    fn configure(&self, vector: u16, message: Option<MsiMessage>) {
        let mut messages = lock(&self.messages);
        let needed = usize::from(vector).saturating_add(1);
        if messages.len() < needed {
            messages.resize(needed, None);
        }
        if let Some(slot) = messages.get_mut(usize::from(vector)) {
            *slot = message;
        }
    }

    fn signal(&self, vector: u16) {
        let message = lock(&self.messages).get(usize::from(vector)).copied().flatten();
        if let Some(message) = message {
            self.sink.signal(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::MsiLog;

    fn msix(vectors: u16) -> (Msix, Arc<MsiLog>) {
        let log = Arc::<MsiLog>::default();
        (Msix::new(vectors, Arc::new(MsiNotifier::new(log.clone()))), log)
    }

    fn program(msix: &Msix, vector: u64, address: u64, data: u32, control: u32) {
        msix.write_table(vector * 16, &address.to_le_bytes());
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &control.to_le_bytes());
    }

    fn pending(msix: &Msix) -> u8 {
        let mut data = [0xff];
        msix.read_pending(0, &mut data);
        data[0]
    }

    #[test]
    fn vector_unmasked_and_enabled_is_sent() {
        let (msix, log) = msix(3);
        program(&msix, 2, 0xfee0_1000, 0x42, 0);
        msix.set_control(CONTROL_ENABLE);
        msix.signal(2);
        assert_eq!(log.take(), [MsiMessage { address: 0xfee0_1000, data: 0x42 }]);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn vector_masked_pends_until_unmasked() {
        let (msix, log) = msix(3);
        program(&msix, 1, 0xfee0_0000, 0x42, ENTRY_MASKED);
        msix.set_control(CONTROL_ENABLE);
        msix.signal(1);
        msix.signal(1);
        assert!(log.take().is_empty());
        assert_eq!(pending(&msix), 0b10);
        program(&msix, 1, 0xfee0_0000, 0x42, 0);
        assert_eq!(log.take().len(), 1);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn function_mask_holds_every_vector_back() {
        let (msix, log) = msix(2);
        program(&msix, 0, 0xfee0_0000, 0x41, 0);
        program(&msix, 1, 0xfee0_0000, 0x42, 0);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        msix.signal(0);
        msix.signal(1);
        assert_eq!(pending(&msix), 0b11);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(log.take().len(), 2);
    }

    #[test]
    fn signal_of_a_vector_beyond_the_table_does_nothing() {
        let (msix, log) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        msix.signal(1);
        msix.signal(u16::MAX);
        assert!(log.take().is_empty());
    }

    #[test]
    fn table_ignores_short_and_unaligned_accesses() {
        let (msix, _) = msix(1);
        program(&msix, 0, 0xfee0_0000, 0x41, 0);
        msix.write_table(0, &[0xff]);
        msix.write_table(2, &[0xff; 4]);
        let mut data = [0xff; 4];
        msix.read_table(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0xfee0_0000);
        msix.read_table(1, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
