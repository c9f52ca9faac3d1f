//! The lists behind the filters, read by the build script. Each entry is there because code of ours, of the standard
//! library or of libc makes that call on that kind of thread after the filter is up; `tests.rs` exercises every one.

use std::collections::BTreeMap;

use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::kind::ThreadKind;

/// Call number → rules, any of which lets the call pass; none: it always passes.
pub(crate) type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What libc and the standard library need on every thread: locks, the allocator, the end of a thread, a panic's
/// message.
const EVERY_THREAD: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// The owner waits for packets, wakes vCPUs by signal, and joins threads.
const MAIN: &[i64] = &[
    libc::SYS_poll,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_tgkill,
    // Reading kernel and initrd; opening the new tops of a snapshot. Whatever waits for a disk is on other threads.
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_pread64,
    libc::SYS_statx,
];

/// A vCPU asks for nothing that not every thread may.
const VCPU: &[i64] = &[];

/// Block I/O (see `ovms_disk::Stack`).
const BLOCK: &[i64] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_poll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
];

/// Console input and output, entropy, and memory given back by the balloon.
const CONSOLE: &[i64] = &[libc::SYS_fallocate, libc::SYS_getrandom, libc::SYS_poll, libc::SYS_statx];

/// The page table, the blob and the disks' tops, which it also freezes and flushes (see `ovms_state::SnapshotWriter`, `ovms_disk::Stack`).
const SNAPSHOT: &[i64] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    // The seed of hash sets.
    libc::SYS_getrandom,
    libc::SYS_lseek,
    libc::SYS_poll,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_statx,
];

/// Reads one file and the page map, writes another.
const WORKING_SET: &[i64] = &[libc::SYS_pread64, libc::SYS_pwrite64, libc::SYS_statx];

// Numbers: the kernel's include/uapi/linux/kvm.h.
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_SREGS: u64 = 0x4138_ae84;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_GET_DIRTY_LOG: u64 = 0x4010_ae42;
const KVM_CLEAR_DIRTY_LOG: u64 = 0xc018_aec0;
const KVM_CHECK_EXTENSION: u64 = 0xae03;
const KVM_GET_MSR_INDEX_LIST: u64 = 0xc004_ae02;
const KVM_SET_CLOCK: u64 = 0x4030_ae7b;
const KVM_GET_CLOCK: u64 = 0x8030_ae7c;
const KVM_GET_MSRS: u64 = 0xc008_ae88;
const KVM_SET_MSRS: u64 = 0x4008_ae89;
const KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const KVM_SET_LAPIC: u64 = 0x4400_ae8f;
const KVM_GET_MP_STATE: u64 = 0x8004_ae98;
const KVM_SET_MP_STATE: u64 = 0x4004_ae99;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
const KVM_SET_VCPU_EVENTS: u64 = 0x4040_aea0;
const KVM_GET_DEBUGREGS: u64 = 0x8080_aea1;
const KVM_SET_DEBUGREGS: u64 = 0x4080_aea2;
const KVM_SET_TSC_KHZ: u64 = 0xaea2;
const KVM_GET_TSC_KHZ: u64 = 0xaea3;
const KVM_GET_XSAVE: u64 = 0x9000_aea4;
const KVM_SET_XSAVE: u64 = 0x5000_aea5;
const KVM_GET_XCRS: u64 = 0x8188_aea6;
const KVM_SET_XCRS: u64 = 0x4188_aea7;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const KVM_SET_GSI_ROUTING: u64 = 0x4008_ae6a;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;
const KVM_SIGNAL_MSI: u64 = 0x4020_aea5;

/// Runs the guest; its writes move interrupt routes and doorbells.
const VCPU_IOCTLS: &[u64] = &[KVM_RUN, KVM_GET_REGS, KVM_SET_GSI_ROUTING, KVM_IOEVENTFD, KVM_SIGNAL_MSI];

/// Points the boot processor to the kernel's entry, or gives and takes the whole state of a machine (`crate::saved`), then
/// interrupts (the power button).
const MAIN_IOCTLS: &[u64] = &[
    KVM_CHECK_EXTENSION,
    KVM_GET_MSR_INDEX_LIST,
    KVM_GET_CLOCK,
    KVM_SET_CLOCK,
    KVM_GET_REGS,
    KVM_SET_REGS,
    KVM_GET_SREGS,
    KVM_SET_SREGS,
    KVM_GET_MSRS,
    KVM_SET_MSRS,
    KVM_GET_LAPIC,
    KVM_SET_LAPIC,
    KVM_GET_MP_STATE,
    KVM_SET_MP_STATE,
    KVM_GET_VCPU_EVENTS,
    KVM_SET_VCPU_EVENTS,
    KVM_GET_DEBUGREGS,
    KVM_SET_DEBUGREGS,
    KVM_GET_TSC_KHZ,
    KVM_SET_TSC_KHZ,
    KVM_GET_XSAVE,
    KVM_SET_XSAVE,
    KVM_GET_XCRS,
    KVM_SET_XCRS,
    KVM_KVMCLOCK_CTRL,
    KVM_SET_GSI_ROUTING,
    KVM_SIGNAL_MSI,
    // The instant of a snapshot.
    KVM_GET_DIRTY_LOG,
    UFFDIO_WRITEPROTECT,
];

// Numbers: include/uapi/linux/userfaultfd.h.
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;

/// Follows and holds back the guest's writes.
const SNAPSHOT_IOCTLS: &[u64] = &[
    KVM_SET_USER_MEMORY_REGION,
    KVM_GET_DIRTY_LOG,
    KVM_CLEAR_DIRTY_LOG,
    USERFAULTFD_IOC_NEW,
    UFFDIO_API,
    UFFDIO_REGISTER,
    UFFDIO_WRITEPROTECT,
];

/// Every device may interrupt.
const DEVICE_IOCTLS: &[u64] = &[KVM_SIGNAL_MSI];

/// The rules of one kind of thread.
pub(crate) fn of(kind: ThreadKind) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    let own = match kind {
        ThreadKind::Main => MAIN,
        ThreadKind::Vcpu => VCPU,
        ThreadKind::Block => BLOCK,
        ThreadKind::WorkingSet => WORKING_SET,
        ThreadKind::Console => CONSOLE,
        ThreadKind::Snapshot => SNAPSHOT,
    };
    // A fault of the VMM is to end it as what it is, not as a forbidden call: the standard library's handler of SIGSEGV
    // and SIGBUS gives the signal its default action back, and an abort raises SIGABRT.
    let faults = [libc::SIGABRT, libc::SIGBUS, libc::SIGSEGV].map(|signal| signal as u64);
    rules.insert(libc::SYS_rt_sigaction, one_of(0, &faults)?);
    rules.insert(libc::SYS_tgkill, one_of(2, &[libc::SIGABRT as u64])?);
    for number in EVERY_THREAD.iter().chain(own) {
        rules.insert(*number, Vec::new());
    }
    // The standard library asks before each close, in builds with checks, whether the descriptor is open.
    rules.insert(libc::SYS_fcntl, one_of(1, &[libc::F_GETFD as u64])?);
    rules.insert(libc::SYS_mmap, not_executable()?);
    rules.insert(libc::SYS_mprotect, not_executable()?);
    // Without a rule a call would always pass.
    if !ioctls(kind).is_empty() {
        rules.insert(libc::SYS_ioctl, one_of(1, ioctls(kind))?);
    }
    Ok(rules)
}

/// The `ioctl` requests of one kind of thread.
pub(crate) fn ioctls(kind: ThreadKind) -> &'static [u64] {
    match kind {
        ThreadKind::Vcpu => VCPU_IOCTLS,
        ThreadKind::Main => MAIN_IOCTLS,
        ThreadKind::Block | ThreadKind::Console => DEVICE_IOCTLS,
        ThreadKind::WorkingSet => &[],
        ThreadKind::Snapshot => SNAPSHOT_IOCTLS,
    }
}

/// Passes `mmap` and `mprotect` whose third argument lacks `PROT_EXEC`.
fn not_executable() -> Result<Vec<SeccompRule>, BackendError> {
    let exec = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    Ok(vec![SeccompRule::new(vec![SeccompCondition::new(2, SeccompCmpArgLen::Dword, exec, 0)?])?])
}

/// Passes calls whose argument `index` is one of `values`.
fn one_of(index: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value: &u64| {
        SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?])
    };
    values.iter().map(rule).collect()
}
