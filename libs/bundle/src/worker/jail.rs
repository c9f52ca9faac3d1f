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
    let filter = filter(std::process::id()).map_err(|e| format!("cannot build the system call filter: {e}"))?;
    seccompiler::apply_filter_all_threads(&filter).map_err(|e| format!("cannot apply the system call filter: {e}"))
}

/// The filter of a worker of this process id.
fn filter(own: u32) -> Result<BpfProgram, seccompiler::BackendError> {
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
    // Its end by abort is a signal to itself. All workers have one user id, so that the id alone keeps none from another.
    let itself = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own.into())?;
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![itself])?]);
    let arch = if cfg!(target_arch = "x86_64") { TargetArch::x86_64 } else { TargetArch::aarch64 };
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KILL_PROCESS: u32 = 0x8000_0000;
    const ALLOW: u32 = 0x7fff_0000;
    /// `AUDIT_ARCH_X86_64`, `AUDIT_ARCH_AARCH64` (linux/audit.h).
    const ARCH: u32 = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };

    /// What the filter answers to a call, as the kernel runs it (linux/bpf_common.h, `struct seccomp_data`).
    fn verdict(program: &BpfProgram, call: i64, args: [u64; 6]) -> u32 {
        let mut data = [call as u32, ARCH, 0, 0].to_vec();
        data.extend(args.iter().flat_map(|arg| [*arg as u32, (*arg >> 32) as u32]));
        let (mut at, mut word) = (0, 0_u32);
        loop {
            let step = &program[at];
            at += 1;
            let jump = |holds: bool| usize::from(if holds { step.jt } else { step.jf });
            match step.code {
                0x20 => word = data[step.k as usize / 4],
                0x54 => word &= step.k,
                0x05 => at += step.k as usize,
                0x15 => at += jump(word == step.k),
                0x25 => at += jump(word > step.k),
                0x35 => at += jump(word >= step.k),
                0x45 => at += jump(word & step.k != 0),
                0x06 => return step.k,
                other => panic!("the program has an instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn a_worker_may_send_signals_to_itself_alone() {
        let program = filter(4711).unwrap();
        let abort = libc::SIGABRT as u64;
        assert_eq!(verdict(&program, libc::SYS_tgkill, [4711, 4712, abort, 0, 0, 0]), ALLOW);
        for other in [4712, 1, 0, u64::from(u32::MAX)] {
            assert_eq!(verdict(&program, libc::SYS_tgkill, [other, 4712, 9, 0, 0, 0]), KILL_PROCESS, "{other}");
        }
        for call in [libc::SYS_kill, libc::SYS_tkill, libc::SYS_rt_sigqueueinfo, libc::SYS_rt_tgsigqueueinfo] {
            assert_eq!(verdict(&program, call, [4711, 4711, 9, 0, 0, 0]), KILL_PROCESS, "{call}");
        }
        assert_eq!(verdict(&program, libc::SYS_read, [0; 6]), ALLOW);
    }

    #[test]
    fn memory_is_mapped_and_never_executable() {
        let program = filter(1).unwrap();
        let mapped = |protection: i32| verdict(&program, libc::SYS_mmap, [0, 4096, protection as u64, 0, 0, 0]);
        assert_eq!(mapped(libc::PROT_READ | libc::PROT_WRITE), ALLOW);
        assert_eq!(mapped(libc::PROT_READ | libc::PROT_EXEC), KILL_PROCESS);
        assert_eq!(verdict(&program, libc::SYS_execve, [0; 6]), KILL_PROCESS);
    }
}
