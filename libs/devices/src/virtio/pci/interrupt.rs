//! How a device behind the PCI transport interrupts its driver: MSI-X vectors, and the ISR byte for drivers that poll.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU8, Ordering};

use super::common::NO_VECTOR;
use crate::pci::Msix;
use crate::virtio::VirtioInterrupt;

const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;

/// Shared by the transport and the device's workers; takes none of the transport's locks. A device has it only while it
/// is active, so nothing is sent before DRIVER_OK (virtio 1.2, 3.1.1).
pub(super) struct Interrupt {
    pub(super) msix: Msix,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    needs_reset: AtomicBool,
    generation: AtomicU8,
}

impl Interrupt {
    pub(super) fn new(msix: Msix, queues: usize) -> Self {
        Self {
            msix,
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU8::new(0),
        }
    }

    /// Follows the vector registers.
    pub(super) fn set_vectors(&self, config: u16, queues: impl Iterator<Item = u16>) {
        self.config_vector.store(config, Ordering::Release);
        for (slot, vector) in self.queue_vectors.iter().zip(queues) {
            slot.store(vector, Ordering::Release);
        }
    }

    pub(super) fn broken(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    /// Reading the ISR clears it (4.1.4.5).
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn reset(&self) {
        self.load(0, 0, false);
        self.set_vectors(NO_VECTOR, self.queue_vectors.iter().map(|_| NO_VECTOR));
    }

    pub(super) fn load(&self, isr: u8, generation: u8, needs_reset: bool) {
        self.isr.store(isr, Ordering::Release);
        self.generation.store(generation, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    pub(super) const ISR_BITS: u8 = ISR_QUEUE | ISR_CONFIG;

    fn send(&self, vector: Option<&AtomicU16>) {
        let vector = vector.map_or(NO_VECTOR, |v| v.load(Ordering::Acquire));
        if vector != NO_VECTOR && self.msix.enabled() {
            self.msix.signal(vector);
        }
    }
}

impl VirtioInterrupt for Interrupt {
    fn queue(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        self.send(self.queue_vectors.get(usize::from(index)));
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.send(Some(&self.config_vector));
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.config();
    }
}
