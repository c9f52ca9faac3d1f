//! Getting a processor out of the guest: a flag that KVM_RUN looks at before it enters, and a signal that interrupts
//! it when it is inside.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{register_signal_handler, SIGRTMIN};

/// The first page of `kvm_run`, mapped a second time: the processor's thread has the other mapping.
const PAGE: usize = 4096;

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The signal that interrupts KVM_RUN.
pub(super) fn signal() -> libc::c_int {
    SIGRTMIN()
}

/// Gives the signal a handler that does nothing: only so does it interrupt a system call.
///
/// # Errors
/// What the kernel says.
pub fn install_handler() -> io::Result<()> {
    register_signal_handler(signal(), on_kick).map_err(Into::into)
}

/// The `immediate_exit` flag of one processor.
pub(super) struct ImmediateExit {
    page: NonNull<u8>,
}

// SAFETY: the page stays mapped until the value is dropped, and is only accessed by atomic stores.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    pub(super) fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists; the kernel checks
        // the descriptor and the length.
        let page = unsafe { libc::mmap(ptr::null_mut(), PAGE, protection, flags, vcpu.as_raw_fd(), 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(page.cast()).map(|page| Self { page }).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Makes the next KVM_RUN, or the one that a signal interrupts, return at once with EINTR.
    pub(super) fn set(&self) {
        // SAFETY: the field lies inside the mapped page and is one byte that this process and the kernel only load and
        // store whole (KVM reads it with READ_ONCE, kernel's virt/kvm/kvm_main.c).
        let flag = unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset_of!(kvm_run, immediate_exit))) };
        flag.store(1, Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: `page` was mapped with this length and nothing refers to it any more.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}
