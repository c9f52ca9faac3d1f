use std::collections::BTreeMap;

use libc::c_long;
use nix::sys::signal::Signal;
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{fork, ForkResult};
use seccompiler::SeccompRule;

use super::*;

/// Makes a system call in a child behind the filter of a kind of thread and says how the child ended.
fn attempt(kind: ThreadKind, number: i64, args: [c_long; 6]) -> WaitStatus {
    // SAFETY: the child makes system calls only: installing a filter allocates nothing unless
    // it fails.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        ForkResult::Child => {
            let code = c_long::from(install(kind).is_err());
            // SAFETY: every pointer argument that the tests pass is null or out of reach, which the kernel refuses
            // without touching memory of ours; the second call does not return.
            unsafe {
                if code == 0 {
                    libc::syscall(number, args[0], args[1], args[2], args[3], args[4], args[5]);
                }
                libc::syscall(libc::SYS_exit_group, code);
                libc::_exit(99)
            }
        }
    }
}

/// Arguments with which a call comes back at once and does nothing.
fn harmless(number: i64) -> [c_long; 6] {
    let none = -1;
    match number {
        // No descriptors, no time.
        libc::SYS_poll => [0, 0, 0, 0, 0, 0],
        libc::SYS_ppoll => [0, 0, 8, 0, 0, 0],
        // No such operation, clock, option.
        libc::SYS_futex | libc::SYS_clock_nanosleep | libc::SYS_prctl | libc::SYS_seccomp => {
            [none, none, none, 0, 0, 0]
        }
        libc::SYS_brk | libc::SYS_sigaltstack | libc::SYS_exit | libc::SYS_exit_group => [0; 6],
        _ => [none, 0, 0, 0, 0, 0],
    }
}

fn rules_of(kind: ThreadKind) -> BTreeMap<i64, Vec<SeccompRule>> {
    rules::of(kind).unwrap()
}

fn was_forbidden(status: WaitStatus) -> bool {
    matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _))
}

#[test]
fn every_allowed_call_passes() {
    for kind in ThreadKind::ALL {
        for (number, conditions) in rules_of(kind) {
            if !conditions.is_empty() {
                continue;
            }
            let status = attempt(kind, number, harmless(number));
            match number {
                // There is no signal to return from: it goes wrong, and the end is what it is.
                libc::SYS_rt_sigreturn => {
                    assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGSEGV, _)), "{kind:?}: {status:?}");
                }
                _ => assert!(matches!(status, WaitStatus::Exited(_, 0)), "{kind:?} {number}: {status:?}"),
            }
        }
    }
}

#[test]
fn allowed_calls_with_conditions_pass_with_and_die_without() {
    let (none, exec) = (-1, c_long::from(libc::PROT_READ | libc::PROT_EXEC));
    let plain = c_long::from(libc::PROT_READ | libc::PROT_WRITE);
    for kind in ThreadKind::ALL {
        let mut cases = vec![
            (libc::SYS_mmap, [0, 0, plain, 0, none, 0], true),
            (libc::SYS_mmap, [0, 0, exec, 0, none, 0], false),
            (libc::SYS_mprotect, [none, 0, plain, 0, 0, 0], true),
            (libc::SYS_mprotect, [none, 0, exec, 0, 0, 0], false),
            (libc::SYS_fcntl, [none, c_long::from(libc::F_GETFD), 0, 0, 0, 0], true),
            (libc::SYS_fcntl, [none, c_long::from(libc::F_SETFL), 0, 0, 0, 0], false),
            (libc::SYS_rt_sigaction, [c_long::from(libc::SIGSEGV), 0, 0, 8, 0, 0], true),
            (libc::SYS_rt_sigaction, [c_long::from(libc::SIGSYS), 0, 0, 8, 0, 0], false),
            (libc::SYS_tgkill, [none, none, c_long::from(libc::SIGABRT), 0, 0, 0], true),
            // KVM_CREATE_VM, TUNSETIFF, TIOCSTI
            (libc::SYS_ioctl, [none, 0xae01, 0, 0, 0, 0], false),
            (libc::SYS_ioctl, [none, 0x4004_54ca, 0, 0, 0, 0], false),
            (libc::SYS_ioctl, [none, 0x5412, 0, 0, 0, 0], false),
        ];
        let ioctls = rules::ioctls(kind).iter().map(|request| *request as c_long);
        cases.extend(ioctls.map(|request| (libc::SYS_ioctl, [none, request, 0, 0, 0, 0], true)));
        for (number, args, passes) in cases {
            let status = attempt(kind, number, args);
            assert_eq!(!was_forbidden(status), passes, "{kind:?} {number} {args:x?}: {status:?}");
        }
    }
}

#[test]
fn calls_that_reach_the_host_kill() {
    let forbidden = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_fork,
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_kill,
        libc::SYS_ptrace,
        libc::SYS_process_vm_writev,
        libc::SYS_mount,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_setuid,
        libc::SYS_bpf,
        libc::SYS_io_uring_setup,
        libc::SYS_userfaultfd,
        libc::SYS_memfd_create,
        libc::SYS_pidfd_getfd,
        libc::SYS_add_key,
        libc::SYS_perf_event_open,
        libc::SYS_modify_ldt,
    ];
    for kind in ThreadKind::ALL {
        for number in forbidden {
            let status = attempt(kind, number, [-1, 0, 0, 0, 0, 0]);
            assert!(was_forbidden(status), "{kind:?} {number}: {status:?}");
        }
    }
}

/// The filter searches its list by halves: no number may fall through between two of its groups.
#[test]
fn every_other_number_kills() {
    // uretprobe and uprobe (arch/x86/entry/syscalls/syscall_64.tbl): no filter sees them, since the kernel lets them by
    // from its own trampolines and ends a process that calls them from anywhere else.
    let unseen = [335, 336];
    for kind in ThreadKind::ALL {
        let rules = rules_of(kind);
        for number in (0..600).filter(|number| !rules.contains_key(number) && !unseen.contains(number)) {
            let status = attempt(kind, number, [-1, 0, 0, 0, 0, 0]);
            assert!(was_forbidden(status), "{kind:?} {number}: {status:?}");
        }
    }
}

#[test]
fn calls_of_other_architectures_kill() {
    // `__X32_SYSCALL_BIT`: a filter that only compares numbers of x86-64 must not let these by.
    let status = attempt(ThreadKind::Vcpu, 0x4000_0000 | libc::SYS_getpid, [0; 6]);
    assert!(was_forbidden(status), "{status:?}");
}

#[test]
fn no_thread_can_change_its_filter() {
    for kind in ThreadKind::ALL {
        let rules = rules_of(kind);
        assert!(!rules.contains_key(&libc::SYS_seccomp) && !rules.contains_key(&libc::SYS_prctl), "{kind:?}");
    }
}
