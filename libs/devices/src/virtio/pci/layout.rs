//! Where the transport's structures lie in its one BAR, and the capabilities that say so (virtio 1.2, 4.1.4).

use super::common::COMMON_LEN;
use crate::pci::{ConfigSpace, MSIX_CAPABILITY_ID, MSIX_CONTROL_WRITABLE};

/// Bytes of BAR 0.
pub const BAR_LEN: u64 = 0x8000;
/// Where the notification area starts in BAR 0: one address per queue, [`NOTIFY_STRIDE`] bytes apart.
pub const NOTIFY_OFFSET: u64 = 0x3000;
/// Bytes from one queue's notification address to the next.
pub const NOTIFY_STRIDE: u64 = 4;
/// Queues that a device may have: as many as fit the notification area and the vectors.
pub const MAX_QUEUES: usize = 64;

pub(super) const COMMON: u64 = 0x0000;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
const DEVICE_LEN: u64 = 0x1000;
const NOTIFY_LEN: u64 = 0x1000;
pub(super) const MSIX_TABLE: u64 = 0x4000;
const MSIX_TABLE_LEN: u64 = 0x1000;
pub(super) const MSIX_PENDING: u64 = 0x5000;
const MSIX_PENDING_LEN: u64 = 0x1000;

const CAPABILITY_VENDOR: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// A structure in the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Area {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPending,
}

/// The structure that an offset into the BAR belongs to, and the offset into that.
pub(super) fn area(offset: u64) -> Option<(Area, u64)> {
    let areas = [
        (Area::Common, COMMON, COMMON_LEN),
        (Area::Isr, ISR, 1),
        (Area::Device, DEVICE, DEVICE_LEN),
        (Area::Notify, NOTIFY_OFFSET, NOTIFY_LEN),
        (Area::MsixTable, MSIX_TABLE, MSIX_TABLE_LEN),
        (Area::MsixPending, MSIX_PENDING, MSIX_PENDING_LEN),
    ];
    areas.into_iter().find_map(|(area, start, len)| {
        let at = offset.checked_sub(start)?;
        (at < len).then_some((area, at))
    })
}

/// Offsets of the capabilities that the transport watches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capabilities {
    pub(super) msix: usize,
    pub(super) window: usize,
}

/// Adds the capabilities. `None` if the space is too small for them, which it is not.
pub(super) fn add_capabilities(space: &mut ConfigSpace, vectors: u16) -> Option<Capabilities> {
    let structures = [(CFG_COMMON, COMMON, COMMON_LEN), (CFG_ISR, ISR, 1), (CFG_DEVICE, DEVICE, DEVICE_LEN)];
    for (kind, offset, len) in structures {
        space.add_capability(CAPABILITY_VENDOR, &structure(kind, offset, len, &[]), &[])?;
    }
    let stride = (NOTIFY_STRIDE as u32).to_le_bytes();
    space.add_capability(CAPABILITY_VENDOR, &structure(CFG_NOTIFY, NOTIFY_OFFSET, NOTIFY_LEN, &stride), &[])?;
    // The window into the BAR by way of configuration space: BAR, offset, length and data may be written.
    let mut writable = [0xff; 18];
    writable.iter_mut().take(2).for_each(|byte| *byte = 0);
    writable.iter_mut().skip(3).take(3).for_each(|byte| *byte = 0);
    let window = space.add_capability(CAPABILITY_VENDOR, &structure(CFG_PCI, 0, 0, &[0; 4]), &writable)?;
    let [control, table, pending] = [
        u32::from(vectors.saturating_sub(1)).to_le_bytes(),
        (MSIX_TABLE as u32).to_le_bytes(),
        (MSIX_PENDING as u32).to_le_bytes(),
    ];
    let mut body = control.get(..2)?.to_vec();
    body.extend_from_slice(&table);
    body.extend_from_slice(&pending);
    let msix = space.add_capability(MSIX_CAPABILITY_ID, &body, &MSIX_CONTROL_WRITABLE.to_le_bytes())?;
    Some(Capabilities { msix, window })
}

/// The body of `struct virtio_pci_cap` behind its first two bytes: length, type, BAR 0, id 0, padding, offset, length.
fn structure(kind: u8, offset: u64, len: u64, rest: &[u8]) -> Vec<u8> {
    let total = rest.len().saturating_add(16);
    let mut body = vec![u8::try_from(total).unwrap_or(u8::MAX), kind, 0, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(len as u32).to_le_bytes());
    body.extend_from_slice(rest);
    body
}
