//! Saving and restoring a device together with its transport, as one section.

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};

use super::common::CommonV1;
use super::interrupt::Interrupt;
use super::{is_live, VirtioPci};
use crate::pci::{ConfigV1, MsixV1};
use crate::sync::lock;
use crate::virtio::{QueueProgress, VirtioInterrupt};

const KIND: &str = "virtio-pci";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct ProgressV1 {
    index: u16,
    next_avail: u16,
    next_used: u16,
}

#[derive(Serialize, Deserialize)]
struct VirtioPciV1 {
    config: ConfigV1,
    msix: MsixV1,
    common: CommonV1,
    isr: u8,
    generation: u8,
    needs_reset: bool,
    progress: Vec<ProgressV1>,
    device: Section,
}

impl VirtioPci {
    fn progress(&self, saved: &[ProgressV1]) -> Vec<QueueProgress> {
        saved
            .iter()
            .map(|p| QueueProgress { index: p.index, next_avail: p.next_avail, next_used: p.next_used })
            .collect()
    }
}

/// The section's kind is the name given to [`VirtioPci::new`]. Saving pauses the device and leaves it paused, so that
/// what is saved is also what memory says.
impl Persist for VirtioPci {
    fn save(&self) -> Result<Section, StateError> {
        let progress = self.device.pause();
        let common = lock(&self.common).clone();
        let saved = VirtioPciV1 {
            config: lock(&self.config).save(),
            msix: self.interrupt.msix.save(),
            common,
            isr: self.interrupt.isr(),
            generation: self.interrupt.generation(),
            needs_reset: self.interrupt.broken(),
            progress: progress
                .iter()
                .map(|p| ProgressV1 { index: p.index, next_avail: p.next_avail, next_used: p.next_used })
                .collect(),
            device: self.device.save()?,
        };
        let section = Section::encode(KIND, VERSION, &saved)?;
        Ok(Section { kind: self.name.clone(), ..section })
    }

    /// Leaves the device paused, and active if it was: call [`VirtioPci::resume`] when the machine runs again, and
    /// [`crate::pci::PciRoot::sync`] when all functions are restored.
    fn restore(&self, section: &Section) -> Result<(), StateError> {
        if section.kind != self.name {
            return Err(StateError::WrongKind { expected: KIND, found: section.kind.clone() });
        }
        let saved: VirtioPciV1 = Section { kind: KIND.into(), ..section.clone() }.decode(KIND, VERSION)?;
        let invalid = |what: String| StateError::Invalid { kind: KIND, what };
        let config = lock(&self.config).check(KIND, &saved.config)?;
        self.interrupt.msix.check(KIND, &saved.msix)?;
        saved.common.check(&self.limits).map_err(invalid)?;
        if saved.isr & !Interrupt::ISR_BITS != 0 {
            return Err(invalid(format!("ISR {:#x}", saved.isr)));
        }
        let live = is_live(&saved.common);
        let progress = self.progress(&saved.progress);
        let queues = if live && !saved.needs_reset {
            self.build_queues(&saved.common, &progress).map_err(invalid)?
        } else {
            Vec::new()
        };
        let mut common = lock(&self.common);
        if is_live(&common) {
            return Err(invalid("restored over a driver that has the device running".into()));
        }
        // Nothing has changed yet. The device checks its own half before it changes; after it, nothing can refuse.
        self.device.restore(&saved.device)?;
        self.device.pause();
        lock(&self.config).load(config);
        self.interrupt.msix.load(saved.msix);
        let vectors = saved.common.queues.iter().map(|queue| queue.vector);
        self.interrupt.set_vectors(saved.common.config_vector, vectors);
        self.interrupt.load(saved.isr, saved.generation, saved.needs_reset);
        let features = saved.common.driver_features;
        *common = saved.common;
        if live && !saved.needs_reset && self.activate(queues, features).is_err() {
            self.interrupt.needs_reset();
        }
        Ok(())
    }
}
