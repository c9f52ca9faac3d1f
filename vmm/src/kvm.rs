//! The virtual machine as KVM sees it, made in the order that costs least.
//!
//! Order matters by milliseconds: since Linux 6.18 a registration on KVM's I/O bus (an in-kernel IOAPIC, PIC or PIT,
//! an ioeventfd) leaves an SRCU callback behind, and the next change of memory slots waits for it (7 to 20 ms measured,
//! against 0.2). So memory slots come first, the split irqchip registers nothing, and ioeventfds come when a guest
//! first enables a device.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_enable_cap, kvm_userspace_memory_region, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_SPLIT_IRQCHIP, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::errno;
use zerocopy::FromBytes;

use crate::layout;
use crate::memory::Ram;

/// The only version there has ever been (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// Why KVM cannot run the machine.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The descriptor is not /dev/kvm.
    #[error("the descriptor passed for /dev/kvm speaks KVM version {0}, not 12")]
    Version(i32),
    /// Something that boot cannot do without.
    #[error("the host's KVM lacks {0}: a kernel from Linux 4.7 on has it")]
    Missing(&'static str),
    /// What the processors can offer was not passed.
    #[error("the answer to KVM_GET_SUPPORTED_CPUID that was passed cannot be read")]
    Cpuid(#[source] io::Error),
    /// A call failed.
    #[error("{call} failed")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
}

/// Wraps the error of one ioctl.
pub(crate) fn failed(call: &'static str) -> impl FnOnce(errno::Error) -> KvmError {
    move |source| KvmError::Call { call, source }
}

/// What the host's processors can offer to guests, from `VmConfig::cpuid`.
///
/// # Errors
/// [`KvmError::Cpuid`]: the file has no entries, a part of one, or more than KVM has.
pub fn read_supported_cpuid(file: &File) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    const ENTRY: usize = size_of::<kvm_cpuid_entry2>();
    let mut bytes = vec![0; (KVM_MAX_CPUID_ENTRIES + 1) * ENTRY];
    let length = file.read_at(&mut bytes, 0).map_err(KvmError::Cpuid)?;
    let (entries, rest) = bytes.get(..length).unwrap_or_default().as_chunks::<ENTRY>();
    if !rest.is_empty() || !(1..=KVM_MAX_CPUID_ENTRIES).contains(&entries.len()) {
        let what = format!("it has {length} bytes, not 1 to {KVM_MAX_CPUID_ENTRIES} entries of {ENTRY}");
        return Err(KvmError::Cpuid(io::Error::new(io::ErrorKind::InvalidData, what)));
    }
    entries
        .iter()
        .map(|entry| kvm_cpuid_entry2::read_from_bytes(entry))
        .collect::<Result<_, _>>()
        .map_err(|_| KvmError::Cpuid(io::ErrorKind::InvalidData.into()))
}

/// A virtual machine without processors.
pub struct Vm {
    kvm: Kvm,
    fd: VmFd,
    manual_dirty_log: bool,
}

impl Vm {
    /// Makes a virtual machine without memory and with a split interrupt controller: local APICs in the kernel, the
    /// IOAPIC here, no PIC and no PIT.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn new(device: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned by us and handed over; a wrong one only makes ioctls fail.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::Version(version));
        }
        let required = [
            (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
            (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
            (Cap::MpState, "KVM_CAP_MP_STATE"),
        ];
        for (capability, name) in required {
            if !kvm.check_extension(capability) {
                return Err(KvmError::Missing(name));
            }
        }
        let fd = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        // Refused by kernels that cannot do it.
        let mut manual = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        manual.args[0] = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        let manual_dirty_log = fd.enable_cap(&manual).is_ok();
        let vm = Self { kvm, fd, manual_dirty_log };
        vm.set_reserved_pages()?;
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = u64::from(layout::IOAPIC_PINS);
        vm.fd.enable_cap(&split).map_err(failed("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))?;
        Ok(vm)
    }

    /// Gives it `ram` as its memory, once. Where the MMU is shadowed the kernel takes the longer the larger that is.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn add_memory(&self, ram: &Ram) -> Result<(), KvmError> {
        for (slot, region) in (0u32..).zip(ram.memory().iter()) {
            let description = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is mapped and stays so as long as the process lives (see `Ram`), and slots do not
            // overlap because regions do not.
            unsafe { self.fd.set_user_memory_region(description) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Pages that KVM needs for real mode on Intel processors without unrestricted guests; elsewhere they cost nothing.
    fn set_reserved_pages(&self) -> Result<(), KvmError> {
        if self.kvm.check_extension(Cap::SetIdentityMapAddr) {
            self.fd.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        }
        if self.kvm.check_extension(Cap::SetTssAddr) {
            self.fd.set_tss_address(layout::KVM_TSS as usize).map_err(failed("KVM_SET_TSS_ADDR"))?;
        }
        Ok(())
    }

    /// Makes processor number `index`, whose APIC id is the same number.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(u64::from(index)).map_err(failed("KVM_CREATE_VCPU"))
    }

    /// The registers that a snapshot of a processor must hold.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        Ok(self.kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?.as_slice().to_vec())
    }

    /// Whether the local APICs have a TSC-deadline timer. Older kernels have it without saying so in
    /// KVM_GET_SUPPORTED_CPUID.
    pub fn has_tsc_deadline_timer(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Names of the capabilities among `wanted` that this host has.
    pub fn capabilities(&self, wanted: &[(Cap, &str)]) -> Vec<String> {
        let present = wanted.iter().filter(|(capability, _)| self.kvm.check_extension(*capability));
        present.map(|(_, name)| (*name).to_owned()).collect()
    }

    /// Whether reading the dirty log and taking write access away again are calls of their own (KVM_CLEAR_DIRTY_LOG), and
    /// the log begins with every page written.
    pub fn has_manual_dirty_log(&self) -> bool {
        self.manual_dirty_log
    }

    /// The VM itself, for interrupts and ioeventfds.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn cpuid_is_read_entry_by_entry_and_anything_else_refused() {
        let read = |bytes: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            read_supported_cpuid(&file)
        };
        let entries = [1u32, 2].map(|function| kvm_cpuid_entry2 { function, edx: 7, ..Default::default() });
        assert_eq!(read(entries.as_bytes()).unwrap(), entries);
        for length in [0, 39, 41, 257 * 40] {
            let err = read(&vec![0; length]).unwrap_err();
            assert!(crate::report::chain(&err).contains("not 1 to 256 entries of 40"), "{length}: {err}");
        }
    }

    #[test]
    fn new_with_another_file_returns_version() {
        let file = File::open("/dev/null").unwrap();
        assert!(matches!(Vm::new(file.into()), Err(KvmError::Version(_))));
    }
}
