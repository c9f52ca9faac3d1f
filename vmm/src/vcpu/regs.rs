//! A processor's registers before its first instruction.

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, Msrs};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::errno;

use crate::boot::Entry;
use crate::kvm::{failed, KvmError};
use crate::layout;
use crate::memory::Ram;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS: u64 = 2;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, write-back where none says otherwise: firmware would have done so.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// Page table entry: present, writable; large page.
const PTE_TABLE: u64 = 0x03;
const PTE_LARGE: u64 = 0x83;
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
const TABLE_BYTES: u64 = 4096;

/// Why a processor cannot be set up.
#[derive(Debug, Error)]
pub enum RegsError {
    /// An ioctl failed.
    #[error("the processor's registers cannot be set")]
    Kvm(#[from] KvmError),
    /// The tables do not fit.
    #[error("the boot tables cannot be written to guest memory")]
    Tables(#[source] GuestMemoryError),
}

/// Sets what every processor has after firmware: memory types and fast strings. The local APIC stays as it is after
/// reset, with its pins masked: there is no PIC behind LINT0, and kernels program LINT1 from the MADT.
///
/// # Errors
/// [`RegsError`].
pub fn set_common(vcpu: &VcpuFd) -> Result<(), RegsError> {
    let entries = [(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries)
        .map_err(|_| KvmError::Call { call: "KVM_SET_MSRS", source: errno::Error::new(libc::E2BIG) })?;
    // A count below the number of entries is an MSR that this KVM does not have; the guest copes.
    vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
    Ok(())
}

/// Sets the boot processor's registers for `entry`. The others wait for INIT and SIPI.
///
/// # Errors
/// [`RegsError`].
pub fn set_entry(vcpu: &VcpuFd, ram: &Ram, entry: Entry) -> Result<(), RegsError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let regs = match entry {
        Entry::Pvh(address) => {
            set_flat(&mut sregs, false);
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
            kvm_regs { rip: u64::from(address), rbx: layout::PVH_START_INFO, rflags: RFLAGS, ..Default::default() }
        }
        Entry::Linux64(address) => {
            write_tables(ram, &mut sregs).map_err(RegsError::Tables)?;
            kvm_regs { rip: address, rsi: layout::ZERO_PAGE, rflags: RFLAGS, ..Default::default() }
        }
    };
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
    Ok(())
}

/// Flat segments over 4 GiB: code 0x08 (32- or 64-bit), data 0x10, a task 0x18.
fn set_flat(sregs: &mut kvm_sregs, long: bool) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x08,
        type_: 0xb,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x10, type_: 0x3, db: 1, l: 0, ..code };
    let task = kvm_segment { selector: 0x18, limit: 0x67, type_: 0xb, s: 0, g: 0, db: 0, l: 0, ..code };
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.tr = task;
}

/// GDT and page tables for 64-bit mode: the first GiB one to one, as the boot protocol asks for kernel, zero page and
/// command line.
fn write_tables(ram: &Ram, sregs: &mut kvm_sregs) -> Result<(), GuestMemoryError> {
    set_flat(sregs, true);
    let gdt: [u64; 4] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    let (pml4, pdpt) = (layout::BOOT_PAGE_TABLES, layout::BOOT_PAGE_TABLES + TABLE_BYTES);
    let directory = pdpt + TABLE_BYTES;
    let pages: Vec<u8> = (0..ENTRIES).flat_map(|page| ((page * LARGE_PAGE) | PTE_LARGE).to_le_bytes()).collect();
    let gdt_bytes: Vec<u8> = gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let memory = ram.memory();
    memory.write_slice(&gdt_bytes, GuestAddress(layout::BOOT_GDT))?;
    memory.write_obj(pdpt | PTE_TABLE, GuestAddress(pml4))?;
    memory.write_obj(directory | PTE_TABLE, GuestAddress(pdpt))?;
    memory.write_slice(&pages, GuestAddress(directory))?;
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = (gdt_bytes.len() - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = pml4;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    Ok(())
}
