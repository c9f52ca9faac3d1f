//! What was written since the last look: KVM's dirty log for the processors, the devices' own log for this process.
//!
//! KVM's log is switched on by a change of its memory slots, which waits for a grace period of the kernel (7 to 20 ms
//! where the machine has doorbells); the guest runs on meanwhile. From then on a page counts as written until it is
//! cleared, and clearing takes write access away from the processors again. So a look takes the pages, clears exactly
//! these, and only then are they copied: a write after the clearing is in the next look, one before it is in the copy.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_userspace_memory_region, KVM_MEM_LOG_DIRTY_PAGES};
use ovms_state::CHUNK;
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::chunks::ChunkSet;
use super::view::{Region, View};
use crate::kvm::Vm;

/// `_IOW(KVMIO, 0x42, struct kvm_dirty_log)` of include/uapi/linux/kvm.h.
const KVM_GET_DIRTY_LOG: libc::c_ulong = 0x4010_ae42;
/// `_IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)`.
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;
/// `_IOW(KVMIO, 0x46, struct kvm_userspace_memory_region)`.
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;

const PAGE: u64 = 4096;
/// Pages for which one word of KVM's bitmap stands.
const PAGES_PER_WORD: u64 = u64::BITS as u64;
const PAGES_PER_CHUNK: u64 = CHUNK as u64 / PAGE;
/// Pages that are cleared at once: KVM keeps processors that need its page tables waiting meanwhile. A multiple of 64.
const CLEAR_PAGES: u64 = 1 << 16;

/// `struct kvm_clear_dirty_log`; its union of pointer and padding is one 64-bit word.
#[repr(C)]
struct ClearDirtyLog {
    slot: u32,
    num_pages: u32,
    first_page: u64,
    dirty_bitmap: u64,
}

/// KVM does not log.
#[derive(Debug, Error)]
#[error("{call} failed")]
pub(super) struct LogError {
    call: &'static str,
    #[source]
    source: io::Error,
}

/// Both logs of one machine.
pub(super) struct Log {
    vm: Arc<Vm>,
    view: View,
}

impl Log {
    pub(super) fn new(vm: Arc<Vm>, view: View) -> Self {
        Self { vm, view }
    }

    /// Logs from now on, beginning with nothing written.
    pub(super) fn start(&self) -> Result<(), LogError> {
        for region in self.view.ram().memory().iter() {
            region.bitmap().log().start();
        }
        for region in self.view.regions() {
            self.set_flags(region, KVM_MEM_LOG_DIRTY_PAGES)?;
            if self.vm.has_manual_dirty_log() {
                // It begins with every page written, which leaves processors their write access: take it.
                let pages = region.len / PAGE;
                let words = vec![u64::MAX; CLEAR_PAGES.min(pages).div_ceil(PAGES_PER_WORD) as usize];
                for first in (0..pages).step_by(CLEAR_PAGES as usize) {
                    self.clear(region, first, CLEAR_PAGES.min(pages - first), &words)?;
                }
            }
        }
        Ok(())
    }

    /// Logs no more. Nothing is to be done if KVM refuses: it then logs on, and nobody looks.
    pub(super) fn stop(&self) {
        for region in self.view.ram().memory().iter() {
            region.bitmap().log().stop();
        }
        for region in self.view.regions() {
            if let Err(err) = self.set_flags(region, 0) {
                tracing::warn!("the dirty log stays on: {}", crate::report::chain(&err));
            }
        }
    }

    /// Adds to `into` what was written since the last look, and logs on.
    pub(super) fn take(&self, into: &ChunkSet) -> Result<(), LogError> {
        self.take_own(into);
        for region in self.view.regions() {
            let words = self.get(region)?;
            note(region, &words, into);
            if !self.vm.has_manual_dirty_log() {
                continue;
            }
            let slice = (CLEAR_PAGES / PAGES_PER_WORD) as usize;
            for (first, words) in (0..).step_by(CLEAR_PAGES as usize).zip(words.chunks(slice)) {
                if words.iter().any(|word| *word != 0) {
                    self.clear(region, first, CLEAR_PAGES.min(region.len / PAGE - first), words)?;
                }
            }
        }
        Ok(())
    }

    /// The last look, while nobody writes: processors keep their write access.
    pub(super) fn take_last(&self, into: &ChunkSet) -> Result<(), LogError> {
        self.take_own(into);
        for region in self.view.regions() {
            note(region, &self.get(region)?, into);
        }
        Ok(())
    }

    fn take_own(&self, into: &ChunkSet) {
        for (region, memory) in self.view.regions().iter().zip(self.view.ram().memory().iter()) {
            memory.bitmap().log().take(|grain| into.insert(region.first + grain as u64));
        }
    }

    fn get(&self, region: &Region) -> Result<Vec<u64>, LogError> {
        let mut words = vec![0u64; (region.len / PAGE).div_ceil(PAGES_PER_WORD) as usize];
        let bitmap = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() };
        let log = kvm_dirty_log { slot: region.slot, padding1: 0, __bindgen_anon_1: bitmap };
        // SAFETY: the bitmap has a bit for each page of the slot, rounded up to whole words, which is what KVM writes.
        let done = unsafe { libc::ioctl(self.vm.fd().as_raw_fd(), KVM_GET_DIRTY_LOG, &raw const log) };
        check("KVM_GET_DIRTY_LOG", done).map(|()| words)
    }

    fn clear(&self, region: &Region, first_page: u64, pages: u64, words: &[u64]) -> Result<(), LogError> {
        let needed = pages.div_ceil(PAGES_PER_WORD) as usize;
        let Some(words) = words.get(..needed) else { return Ok(()) };
        let num_pages = pages as u32;
        let dirty_bitmap = words.as_ptr() as u64;
        let clear = ClearDirtyLog { slot: region.slot, num_pages, first_page, dirty_bitmap };
        // SAFETY: the bitmap has a word for each 64 of the pages, and KVM only reads it.
        let done = unsafe { libc::ioctl(self.vm.fd().as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw const clear) };
        check("KVM_CLEAR_DIRTY_LOG", done)
    }

    fn set_flags(&self, region: &Region, flags: u32) -> Result<(), LogError> {
        let description = kvm_userspace_memory_region {
            slot: region.slot,
            flags,
            guest_phys_addr: region.guest,
            memory_size: region.len,
            userspace_addr: region.host,
        };
        // SAFETY: the slot is as it was made from this memory, which is never unmapped; only its flags change.
        let done = unsafe { libc::ioctl(self.vm.fd().as_raw_fd(), KVM_SET_USER_MEMORY_REGION, &raw const description) };
        check("KVM_SET_USER_MEMORY_REGION", done)
    }
}

fn check(call: &'static str, done: libc::c_int) -> Result<(), LogError> {
    match done {
        0.. => Ok(()),
        _ => Err(LogError { call, source: io::Error::last_os_error() }),
    }
}

/// Adds the chunks of a region's written pages, one bit a page.
fn note(region: &Region, words: &[u64], into: &ChunkSet) {
    let mask = (1u64 << PAGES_PER_CHUNK) - 1;
    let chunks_per_word = PAGES_PER_WORD / PAGES_PER_CHUNK;
    for (index, word) in (0u64..).zip(words).filter(|(_, word)| **word != 0) {
        for part in (0..chunks_per_word).filter(|part| (word >> (part * PAGES_PER_CHUNK)) & mask != 0) {
            into.insert(region.first + index * chunks_per_word + part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Ram;
    use std::fs::File;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn note_finds_the_chunks_of_pages() {
        let region = Region { slot: 0, host: 0, guest: 0, first: 100, len: 128 * PAGE };
        let into = ChunkSet::new(200);
        note(&region, &[1 << 15 | 1 << 48, 1 << 16], &into);
        assert_eq!(into.runs(0), [100..101, 103..104, 105..106]);
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn writes_of_this_process_are_in_the_next_look_and_only_there() {
        let ram = Ram::map(64 << 20).unwrap();
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        let vm = Arc::new(Vm::new(kvm.into()).unwrap());
        vm.add_memory(&ram).unwrap();
        let log = Log::new(vm, View::new(&ram));
        let look = || {
            let set = ChunkSet::new(1024);
            log.take(&set).unwrap();
            set.runs(0)
        };
        log.start().unwrap();
        assert!(look().is_empty());
        ram.memory().write_obj(1u8, GuestAddress(3 * CHUNK as u64)).unwrap();
        ram.memory().write_obj(1u8, GuestAddress((64 << 20) - 1)).unwrap();
        assert_eq!(look(), [3..4, 1023..1024]);
        assert!(look().is_empty());
        log.stop();
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        log.start().unwrap();
        assert!(look().is_empty());
        log.stop();
    }
}
