//! The modern virtio-pci transport (virtio 1.2, 4.1), without the legacy and transitional forms: VIRTIO_F_VERSION_1 or
//! nothing.
//!
//! ```text
//!   config space ── capabilities ──> BAR 0:  common | isr | device config | notify | MSI-X table | MSI-X pending
//!                                      │                                     │
//!                                      v                                     v
//!                              CommonV1 (pure registers)            one EventFd per queue <── ioeventfd
//!                                      │ DRIVER_OK
//!                                      v
//!                              VirtioDevice::activate(copies of the queues)
//! ```

mod common;
mod interrupt;
mod layout;
mod persist;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use super::{ActivateError, ActiveQueue, ActiveState, QueueProgress, VirtioDevice, VirtioInterrupt};
use crate::log_limit::LogLimit;
use crate::pci::{BarRange, BarSpec, ConfigSpace, Identity, Msix, MsixNotifier, PciFunction, BAR_COUNT};
use crate::sync::lock;
use crate::GuestMemory;
use common::{CommonV1, Effect, Limits, Live, QueueV1, DRIVER_OK};
use interrupt::Interrupt;
use layout::{Area, Capabilities};

pub use layout::{BAR_LEN, MAX_QUEUES, NOTIFY_OFFSET, NOTIFY_STRIDE};

/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX: queues do both for every device.
const RING_FEATURES: u64 = (1 << VIRTIO_RING_F_INDIRECT_DESC) | EVENT_IDX;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

const VENDOR: u16 = 0x1af4;
/// Device ID of type 0; a type's ID is this plus its number (4.1.2.1).
const DEVICE_BASE: u16 = 0x1040;

/// Offsets into the body of the window capability, from the capability's start.
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// Why a device cannot be put behind the transport.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The BAR cannot lie there.
    #[error("a virtio BAR of {BAR_LEN:#x} bytes cannot lie at {0:#x}: the address must be a multiple of its size")]
    BadAddress(u64),
    /// The device has too many queues.
    #[error("a virtio device has {0} queues, more than {MAX_QUEUES}")]
    TooManyQueues(usize),
    /// The system has no eventfd to give.
    #[error("cannot make an eventfd for a virtio queue")]
    EventFd(#[source] io::Error),
}

/// How many vectors a device with `queues` queues uses: one each, and one for configuration changes.
pub fn vectors(queues: usize) -> u16 {
    u16::try_from(queues).unwrap_or(u16::MAX).saturating_add(1)
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    name: String,
    device: Arc<dyn VirtioDevice>,
    mem: Arc<GuestMemory>,
    config: Mutex<ConfigSpace>,
    capabilities: Capabilities,
    limits: Limits,
    /// The common structure. Held over activation and reset of the device, which take as long as one request: who
    /// else wants these registers must see them done.
    common: Mutex<CommonV1>,
    interrupt: Arc<Interrupt>,
    kicks: Vec<Arc<EventFd>>,
    log: LogLimit,
}

impl VirtioPci {
    /// Puts `device` behind a function whose BAR 0, of [`BAR_LEN`] bytes, lies at `bar_address`. `name` is unique in
    /// the machine and names the saved state, for instance `virtio-blk/0`. The notifier must take [`vectors`].
    ///
    /// # Errors
    /// [`TransportError`].
    pub fn new(
        name: impl Into<String>,
        device: Arc<dyn VirtioDevice>,
        mem: Arc<GuestMemory>,
        bar_address: u64,
        notifier: Arc<dyn MsixNotifier>,
    ) -> Result<Arc<Self>, TransportError> {
        let max_sizes = device.queue_max_sizes().to_vec();
        let queues = max_sizes.len();
        if queues > MAX_QUEUES {
            return Err(TransportError::TooManyQueues(queues));
        }
        let kind = u16::try_from(device.device_type()).unwrap_or(0);
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE.saturating_add(kind),
            revision: 1,
            class: class_of(kind),
            subsystem_vendor: VENDOR,
            subsystem: DEVICE_BASE.saturating_add(kind),
        });
        let bar = BarSpec { index: 0, address: bar_address, size: BAR_LEN, wide: true, prefetchable: false };
        let vectors = vectors(queues);
        let capabilities = config
            .add_bar(bar)
            .then(|| layout::add_capabilities(&mut config, vectors))
            .flatten()
            .ok_or(TransportError::BadAddress(bar_address))?;
        let limits = Limits { features: device.features() | VERSION_1 | RING_FEATURES, max_sizes, vectors };
        let new_kick = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        let kicks = (0..queues).map(new_kick).collect::<io::Result<_>>().map_err(TransportError::EventFd)?;
        Ok(Arc::new(Self {
            name: name.into(),
            mem,
            config: Mutex::new(config),
            capabilities,
            common: Mutex::new(CommonV1::power_on(&limits)),
            interrupt: Arc::new(Interrupt::new(Msix::new(vectors, notifier), queues)),
            limits,
            kicks,
            log: LogLimit::new(),
            device,
        }))
    }

    /// The eventfds to be signalled by a write, of any value and length, at these offsets into BAR 0. They work without
    /// being registered with the kernel too: a write that exits is passed on.
    pub fn notifiers(&self) -> Vec<(u64, Arc<EventFd>)> {
        let offsets = (NOTIFY_OFFSET..).step_by(NOTIFY_STRIDE as usize);
        offsets.zip(self.kicks.iter().cloned()).collect()
    }

    /// The device itself.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// The name given to [`VirtioPci::new`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Completes what is in flight and holds the device, see [`VirtioDevice::pause`].
    pub fn pause(&self) {
        self.device.pause();
    }

    /// Begins to hold the device; whether it stands at `until`, see [`VirtioDevice::hold`].
    pub fn hold(&self, until: Instant) -> bool {
        self.device.hold(until)
    }

    /// Goes on after [`VirtioPci::pause`], or after a restore, which leaves the device paused.
    pub fn resume(&self) {
        self.device.resume();
    }

    fn live(&self) -> Live {
        Live { needs_reset: self.interrupt.broken(), generation: self.interrupt.generation() }
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let value = lock(&self.common).read(offset, data.len(), &self.limits, self.live());
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let mut common = lock(&self.common);
        match common.write(offset, data.len(), u64::from_le_bytes(bytes), &self.limits) {
            Effect::None => {}
            Effect::Reset => self.reset_device(),
            Effect::Vectors => self.interrupt.set_vectors(common.config_vector, common.queues.iter().map(|q| q.vector)),
            Effect::Activate => {
                let features = common.driver_features;
                let activated = self
                    .build_queues(&common, &[])
                    .and_then(|queues| self.activate(queues, features).map_err(|error| error.to_string()));
                if let Err(why) = activated {
                    if self.log.allows() {
                        tracing::warn!(device = %self.name, why, "the driver's queues cannot be used");
                    }
                    self.interrupt.needs_reset();
                }
            }
        }
    }

    fn reset_device(&self) {
        self.device.reset();
        self.interrupt.reset();
        for kick in &self.kicks {
            // A kick of the driver before is not one of the next.
            let _ = kick.read();
        }
    }

    /// Copies the enabled queues out of the registers, at their `progress` if they have any. Says what is wrong with
    /// one that cannot be used.
    fn build_queues(&self, common: &CommonV1, progress: &[QueueProgress]) -> Result<Vec<ActiveQueue>, String> {
        let event_idx = common.driver_features & EVENT_IDX != 0;
        let registers = (0u16..).zip(common.queues.iter().zip(&self.limits.max_sizes).zip(&self.kicks));
        let enabled = registers.filter(|(_, ((queue, _), _))| queue.enabled);
        enabled
            .map(|(index, ((registers, max), kick))| {
                let at = progress.iter().find(|p| p.index == index);
                let queue =
                    build_queue(registers, *max, at, event_idx).map_err(|error| format!("queue {index}: {error}"))?;
                if queue.is_valid(self.mem.as_ref()) {
                    Ok(ActiveQueue { index, queue, kick: Arc::clone(kick) })
                } else {
                    Err(format!("queue {index} lies outside of guest memory"))
                }
            })
            .collect()
    }

    fn activate(&self, queues: Vec<ActiveQueue>, features: u64) -> Result<(), ActivateError> {
        let interrupt: Arc<dyn VirtioInterrupt> = self.interrupt.clone();
        self.device.activate(ActiveState { mem: Arc::clone(&self.mem), queues, features, interrupt })
    }

    /// What the driver has put into the window capability: offset into BAR 0 and length of the access it wants.
    fn window(&self) -> Option<(u64, usize)> {
        let config = lock(&self.config);
        let at = self.capabilities.window;
        let field = |offset: usize| config.read_u32(at.saturating_add(offset));
        let [bar, ..] = field(WINDOW_BAR).to_le_bytes();
        let (offset, len) = (field(WINDOW_OFFSET), field(WINDOW_LENGTH));
        (bar == 0 && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len)).then_some((offset.into(), len as usize))
    }

    fn window_data(&self) -> usize {
        self.capabilities.window.saturating_add(WINDOW_DATA)
    }
}

/// The PCI class of a device type: what it is most like.
fn class_of(device_type: u16) -> [u8; 3] {
    match device_type {
        // Ethernet, SCSI mass storage, other simple communication, other.
        1 => [0x02, 0x00, 0x00],
        2 => [0x01, 0x00, 0x00],
        3 => [0x07, 0x80, 0x00],
        _ => [0xff, 0x00, 0x00],
    }
}

fn build_queue(
    registers: &QueueV1,
    max_size: u16,
    progress: Option<&QueueProgress>,
    event_idx: bool,
) -> Result<Queue, virtio_queue::Error> {
    Queue::try_from(QueueState {
        max_size,
        next_avail: progress.map_or(0, |p| p.next_avail),
        next_used: progress.map_or(0, |p| p.next_used),
        event_idx_enabled: event_idx,
        size: registers.size,
        ready: true,
        desc_table: registers.desc,
        avail_ring: registers.driver,
        used_ring: registers.device,
    })
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let at = usize::from(offset);
        match self.window() {
            // The data of the window stands for an access to the BAR (4.1.4.9).
            Some((target, len)) if at == self.window_data() && data.len() == len => self.bar_read(0, target, data),
            _ => lock(&self.config).read(offset, data),
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        if at == self.window_data() {
            if let Some((target, _)) = self.window().filter(|(_, len)| *len == data.len()) {
                self.bar_write(0, target, data);
            }
            return;
        }
        let control = {
            let mut config = lock(&self.config);
            config.write(offset, data);
            (config.read_u32(self.capabilities.msix) >> 16) as u16
        };
        let end = at.saturating_add(data.len());
        let msix_control = self.capabilities.msix.saturating_add(2);
        if at < msix_control.saturating_add(2) && end > msix_control {
            self.interrupt.msix.set_control(control);
        }
    }

    fn bars(&self) -> [Option<BarRange>; BAR_COUNT] {
        lock(&self.config).bars()
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match layout::area(offset) {
            Some((Area::Common, at)) => self.read_common(at, data),
            Some((Area::Isr, _)) => {
                if let Some(first) = data.first_mut() {
                    *first = self.interrupt.take_isr();
                }
            }
            Some((Area::Device, at)) => self.device.read_config(at, data),
            Some((Area::MsixTable, at)) => self.interrupt.msix.read_table(at, data),
            Some((Area::MsixPending, at)) => self.interrupt.msix.read_pending(at, data),
            Some((Area::Notify, _)) | None => {}
        }
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        match layout::area(offset) {
            Some((Area::Common, at)) => self.write_common(at, data),
            Some((Area::Device, at)) => self.device.write_config(at, data),
            Some((Area::MsixTable, at)) => self.interrupt.msix.write_table(at, data),
            Some((Area::Notify, at)) => {
                let queue = usize::try_from(at / NOTIFY_STRIDE).unwrap_or(usize::MAX);
                if let (Some(kick), true) = (self.kicks.get(queue), at.is_multiple_of(NOTIFY_STRIDE)) {
                    let _ = kick.write(1);
                }
            }
            Some((Area::Isr | Area::MsixPending, _)) | None => {}
        }
    }

    fn reset(&self) {
        {
            let mut common = lock(&self.common);
            *common = CommonV1::power_on(&self.limits);
            self.reset_device();
        }
        self.interrupt.msix.reset();
        lock(&self.config).reset();
    }
}

/// Whether the driver has the device running.
fn is_live(common: &CommonV1) -> bool {
    common.status & DRIVER_OK != 0
}

#[cfg(test)]
mod tests;
