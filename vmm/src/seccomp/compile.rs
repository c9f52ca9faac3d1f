//! From rules to a BPF program, in the build script.
//!
//! seccompiler compares a call's number with each that a list holds, one after the other. The kernel runs a new filter
//! for every number there is, to remember those that always pass (`seccomp_cache_prepare` of kernel/seccomp.c), and
//! with 40 numbers in a row that takes 0.1 ms for each thread. So the list is cut into groups, seccompiler compiles
//! each, and a binary search leads to the group:
//!
//! ```text
//!  load number ─┬─ below 60 ──┬─ below 16 ── group: arch, number == 0? == 1? … kill
//!               │             └─ else ────── group: arch, number == 16? …       kill
//!               └─ else ─── …
//! ```
//! Each group is a whole filter: what it does not name is killed there.

use seccompiler::{sock_filter, BackendError, BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::rules::Rules;

/// Calls of a group.
const GROUP: usize = 6;

/// `BPF_LD | BPF_W | BPF_ABS` with the offset of `nr` in `struct seccomp_data` (the kernel's include/uapi/linux).
const LOAD_NUMBER: sock_filter = sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
/// `BPF_JMP | BPF_JGE | BPF_K`.
const JUMP_IF_AT_LEAST: u16 = 0x35;
/// `BPF_JMP | BPF_JA`.
const JUMP: u16 = 0x05;

/// A part of the program, and the lowest number that it is for.
struct Part {
    first: u32,
    code: BpfProgram,
}

/// Compiles a filter that kills the process for whatever `rules` do not allow.
pub(crate) fn compile(rules: Rules) -> Result<BpfProgram, BackendError> {
    let mut rules: Vec<_> = rules.into_iter().collect();
    let mut parts = Vec::new();
    while !rules.is_empty() {
        let rest = rules.split_off(rules.len().min(GROUP));
        let first = rules.first().map_or(0, |(number, _)| *number as u32);
        let group = rules.into_iter().collect();
        let filter = SeccompFilter::new(group, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?;
        parts.push(Part { first, code: filter.try_into()? });
        rules = rest;
    }
    let mut program = vec![LOAD_NUMBER];
    program.extend(search(parts));
    Ok(program)
}

/// A binary search among `parts`, which are in order, and the parts.
fn search(mut parts: Vec<Part>) -> BpfProgram {
    let high = parts.split_off(parts.len() / 2);
    let Some(first) = high.first().map(|part| part.first) else { return BpfProgram::new() };
    if parts.is_empty() {
        return high.into_iter().flat_map(|part| part.code).collect();
    }
    let low = search(parts);
    // At least the first of the upper half: on to the jump over the lower one.
    let compare = sock_filter { code: JUMP_IF_AT_LEAST, jt: 0, jf: 1, k: first };
    let over = sock_filter { code: JUMP, jt: 0, jf: 0, k: low.len() as u32 };
    [compare, over].into_iter().chain(low).chain(search(high)).collect()
}
