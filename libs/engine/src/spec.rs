//! What a caller asks for: [`CreateSpec`] and its parts.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::sizing::Wishes;

/// Everything that [`crate::Engine::create`] needs to know.
#[derive(Debug, Default)]
pub struct CreateSpec {
    /// Name of the machine, unique in its namespace: letters, digits, `.`, `_`, `-`; it starts with a letter or digit
    /// and has at most 128 bytes.
    pub id: String,
    /// containerd's namespace, or `ovm` for the CLI; the same alphabet.
    pub namespace: String,
    /// Which one of the machines that have this name one after the other it is, for [`crate::Engine::cleanup`]: anything
    /// that the caller never says twice. `None`: whoever cleans up under this name means it.
    pub instance: Option<String>,
    /// The bundle's record (`ovms_bundle::Record`), which says what is booted and from which disk.
    pub bundle: PathBuf,
    /// What spec and annotations say about vCPUs and memory; [`crate::sizing::settle`] decides. The image's wishes are
    /// taken from the bundle where they are not set here.
    pub wishes: Wishes,
    /// Appended to the image's kernel command line (annotation `io.ovms.kernel-args`).
    pub extra_kernel_args: Option<String>,
    /// The guest may not write to its disks.
    pub read_only: bool,
    /// Where the console goes.
    pub stdio: Stdio,
    /// `linux.cgroupsPath` of the OCI spec: a path below each hierarchy's root, or systemd's `slice:prefix:name`.
    /// `None`: `/ovms/<namespace>-<id>`.
    pub cgroups_path: Option<String>,
    /// Limits for the VMM's cgroup. Its memory limit is the machine's memory (or `limits.memory` if that is larger)
    /// plus the `overhead` of the settings.
    pub limits: Limits,
    /// Path of the network namespace that the VMM joins; `None`: an empty one of its own.
    pub netns: Option<PathBuf>,
    /// Host name in the VMM's own UTS namespace; empty: the id.
    pub hostname: String,
    /// `oom_score_adj` of the VMM. Lowering it needs CAP_SYS_RESOURCE; without it the value is left as it was.
    pub oom_score_adj: Option<i32>,
    /// What a bundle that carries RAM does.
    pub boot: BootChoice,
    /// What becomes of one whose RAM this host cannot resume.
    pub on_incompatible: OnIncompatible,
    /// Hold the RAM file locked for as long as the machine lives if its record asks for that (`mlock_required`): for
    /// callers beside which no snapshotter does.
    pub lock_ram: bool,
    /// When the caller began with this start: its time line counts from there. `None`: when `create` begins.
    pub began: Option<Instant>,
    /// Steps that the caller has passed since, for the time line.
    pub passed: Vec<(String, Instant)>,
}

/// What a bundle that carries RAM does (annotation `io.ovms.boot`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BootChoice {
    /// It resumes; one without RAM boots.
    #[default]
    Auto,
    /// It boots from its disk (`cold`).
    Cold,
}

/// What becomes of a machine whose RAM this host cannot resume (annotation `io.ovms.on-incompatible`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnIncompatible {
    /// Its creation fails, with the feature that lacks.
    #[default]
    Refuse,
    /// It boots from its disk (`boot`).
    Boot,
}

impl CreateSpec {
    /// A second one like it; the ends of the console are duplicated.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let twin = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        let Stdio { stdin, stdout, stderr } = &self.stdio;
        Ok(Self {
            id: self.id.clone(),
            namespace: self.namespace.clone(),
            instance: self.instance.clone(),
            bundle: self.bundle.clone(),
            wishes: self.wishes.clone(),
            extra_kernel_args: self.extra_kernel_args.clone(),
            stdio: Stdio { stdin: twin(stdin)?, stdout: twin(stdout)?, stderr: twin(stderr)? },
            cgroups_path: self.cgroups_path.clone(),
            limits: self.limits.clone(),
            netns: self.netns.clone(),
            hostname: self.hostname.clone(),
            passed: self.passed.clone(),
            ..*self
        })
    }
}

/// The ends of the machine's serial console. The engine hands them to the VMM and keeps none, so a reader sees the end
/// of the stream when the VMM is gone. They should not be shared with anyone who minds `O_NONBLOCK` (the flag belongs
/// to the open file, not to the descriptor): pass pipes, fifos or a pty of your own, never the user's terminal; nor a
/// plain file, which would meet the VMM's `RLIMIT_FSIZE`.
#[derive(Debug, Default)]
pub struct Stdio {
    /// What the guest reads.
    pub stdin: Option<OwnedFd>,
    /// What the guest writes.
    pub stdout: Option<OwnedFd>,
    /// Not used by the console, which has one stream; held open as long as the machine lives.
    pub stderr: Option<OwnedFd>,
}

/// Limits of a cgroup, as the OCI spec's `linux.resources` has them; `None` leaves a figure as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// `memory.limit` in bytes: the guest's memory. -1 or 0: no limit asked for.
    pub memory: Option<i64>,
    /// `memory.reservation` in bytes (soft limit, v2 `memory.low`).
    pub memory_reservation: Option<i64>,
    /// `memory.swap` in bytes: memory plus swap, as v1 counts.
    pub memory_swap: Option<i64>,
    /// `cpu.shares`, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// `cpu.quota` in microseconds a period; -1: no limit.
    pub cpu_quota: Option<i64>,
    /// `cpu.period` in microseconds.
    pub cpu_period: Option<u64>,
    /// `cpu.cpus`, for instance `0-3,7`.
    pub cpuset_cpus: Option<String>,
    /// `cpu.mems`.
    pub cpuset_mems: Option<String>,
    /// `blockIO.weight`, 10 to 1000.
    pub io_weight: Option<u16>,
    /// `unified` of the OCI spec: file name and value, written as they are on cgroup v2 alone.
    pub unified: Vec<(String, String)>,
}
