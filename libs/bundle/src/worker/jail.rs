//! The walls that the worker puts around itself before it reads the first byte of a layer.

use std::collections::BTreeMap;

use nix::unistd::{setgroups, setresgid, setresuid, Gid, Uid};
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Address space: the decoder's window, the largest tables of a qcow2 image and the largest map, with room to spare.
const MAX_MEMORY: u64 = 3 << 30;
const MAX_FILES: u64 = 16;
/// What any file may have: a map, the state of a machine.
const EXTRA: u64 = 64 << 20;

/// Calls with any arguments: memory, positional I/O on the descriptors at hand, the socket, the end.
const ALLOWED: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_close,
    libc::SYS_sendto,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Drops everything that a parser does not need, for all threads that there are; no more can be made. Files can become
/// `max_file` bytes long and a little more. What fails is named, and the worker must not go on.
pub(super) fn enter(max_file: u64, ids: Option<(u32, u32)>) -> Result<(), String> {
    let set = |resource, value: u64| {
        // Never above what the parent was given.
        let value = getrlimit(resource).maximum.map_or(value, |hard| hard.min(value));
        let limit = Rlimit { current: Some(value), maximum: Some(value) };
        setrlimit(resource, limit).map_err(|e| format!("cannot set a resource limit: {e}"))
    };
    set(Resource::Fsize, max_file.saturating_add(EXTRA))?;
    set(Resource::As, MAX_MEMORY)?;
    set(Resource::Nofile, MAX_FILES)?;
    set(Resource::Core, 0)?;
    set(Resource::Nproc, 0)?;
    if let Some((uid, gid)) = ids {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        setgroups(&[]).map_err(|e| format!("cannot drop the groups: {e}"))?;
        setresgid(gid, gid, gid).map_err(|e| format!("cannot become group {gid}: {e}"))?;
        // With the last user id 0 the capabilities go as well.
        setresuid(uid, uid, uid).map_err(|e| format!("cannot become user {uid}: {e}"))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(|e| format!("cannot set no_new_privs: {e}"))?;
    let filter = filter().map_err(|e| format!("cannot build the system call filter: {e}"))?;
    seccompiler::apply_filter_all_threads(&filter).map_err(|e| format!("cannot apply the system call filter: {e}"))
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // New code never: memory may be mapped, not made executable.
    let exec = libc::PROT_EXEC as u64;
    let no_exec = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(exec), 0)?;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![SeccompRule::new(vec![no_exec.clone()])?]);
    }
    // Rust's runtime asks whether a descriptor is open when it closes one in a debug build.
    let getfd = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::F_GETFD as u64)?;
    rules.insert(libc::SYS_fcntl, vec![SeccompRule::new(vec![getfd])?]);
    let arch = if cfg!(target_arch = "x86_64") { TargetArch::x86_64 } else { TargetArch::aarch64 };
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch)?.try_into()
}
