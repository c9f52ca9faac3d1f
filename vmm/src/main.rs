//! `ovms-vmm`: one virtual machine. Started by the engine with a control socket as descriptor 3 and nothing else; what
//! the machine is made of comes over that socket (see `ovms_proto::control`). The exit status is that of the machine.
#![no_main]

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::exit;
use std::sync::Arc;

use ovms_config::vm::{StartConfig, VmConfig, VmConfigError, VmSpec};
use ovms_devices::threads::{Spawner, ThreadKind as DeviceThread};
use ovms_proto::control::{FailureKind, FromVmm};
use ovms_proto::{Channel, ChannelError};
use ovms_vmm::boot::Payload;
use ovms_vmm::control::Owner;
use ovms_vmm::fds::{FdError, Fds};
use ovms_vmm::jail::{self, JailError};
use ovms_vmm::machine::{Base, BuildError, Machine, ThreadStart};
use ovms_vmm::mailbox::Mailbox;
use ovms_vmm::memory::{MemoryError, Ram};
use ovms_vmm::report;
use ovms_vmm::saved::{RestoreError, Saved};
use ovms_vmm::seccomp::{self, SeccompError, ThreadKind};
use ovms_vmm::snapshot::{Chore, Host, Snapshots, Threads};
use ovms_vmm::timeline::Recorder;
use ovms_vmm::working_set::Plan;
use thiserror::Error;

/// The control socket.
const CONTROL: RawFd = 3;
/// Exit status when the machine could not be built: what a shell gives for "cannot run".
const STATUS_NOT_BUILT: i32 = 126;

/// Why there is no machine.
#[derive(Debug, Error)]
enum StartError {
    #[error("no configuration came over the control socket")]
    Receive(#[source] ChannelError),
    #[error("the configuration is not for this VMM: install one version of ovms")]
    Foreign(#[source] ChannelError),
    #[error("the configuration makes no machine")]
    Config(#[from] VmConfigError),
    #[error("the configuration and its descriptors do not fit")]
    Fd(#[from] FdError),
    #[error("the machine cannot go on from its RAM snapshot")]
    Restore(#[from] RestoreError),
    #[error("the machine has no memory")]
    Memory(#[from] MemoryError),
    #[error("the walls around the VMM cannot be put up")]
    Jail(#[from] JailError),
    #[error("the walls around the VMM's threads cannot be put up")]
    Seccomp(#[from] SeccompError),
    #[error("the machine's working set can be neither read ahead nor recorded")]
    WorkingSet(#[source] std::io::Error),
    #[error("the owner cannot be told anything")]
    Mailbox(#[source] std::io::Error),
    #[error("the threads that take snapshots cannot be started")]
    Snapshots(#[source] std::io::Error),
    #[error("the machine cannot be built")]
    Build(#[from] BuildError),
}

impl StartError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Restore(err) | Self::Build(BuildError::Restore(err)) if err.is_incompatible() => {
                FailureKind::Incompatible
            }
            _ => FailureKind::Other,
        }
    }
}

/// The C entry, in the place of the one that the standard library brings: that one reads /proc/self/maps for the bounds
/// of the stack and gives every thread an alternate signal stack, only to say "stack overflow" before a process dies
/// of it. A tenth of a start goes into that; the guard pages are there without it.
#[no_mangle]
extern "C" fn main() -> libc::c_int {
    // SAFETY: sets a disposition before there is a second thread. A console or socket whose other end is gone must be
    // an error of a call, not the end of the process.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    // SAFETY: as above. A file that may not grow any more must be an error of a write.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    run()
}

fn run() -> ! {
    let timeline = Recorder::start();
    // SAFETY: sets a parameter of the allocator. One arena for all threads: they allocate little, and each arena of its
    // own would cost every thread three system calls at its start and the machine 100 KiB.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // SAFETY: the engine passes the socket as descriptor 3 and nothing here has opened one before; if it did not, every
    // call on the descriptor fails.
    let channel = Channel::from_fd(unsafe { OwnedFd::from_raw_fd(CONTROL) });
    match start(&channel, timeline) {
        Ok(Started { machine, mailbox, snapshots, timeline }) => {
            let configured = FromVmm::Configured { timeline: timeline.timeline().clone() };
            if channel.send(&configured, &[]).is_err() {
                exit(STATUS_NOT_BUILT);
            }
            // While the engine reads that. No guest runs before every thread is behind its wall.
            if let Err(err) = snapshots.wait_ready() {
                tracing::error!("{}", report::chain(&StartError::Snapshots(err)));
                exit(STATUS_NOT_BUILT);
            }
            // Not dropped: the kernel takes the machine apart faster than we would, and nobody waits for it.
            let mut owner = ManuallyDrop::new(Owner::new(channel, mailbox, machine, snapshots, timeline));
            let reason = owner.run();
            tracing::info!(?reason, "the machine has ended");
            exit(i32::try_from(reason.status()).unwrap_or(STATUS_NOT_BUILT));
        }
        Err(err) => {
            let message = report::chain(&err);
            tracing::error!("{message}");
            // If the engine is gone, nobody is left to tell.
            let _ = channel.send(&FromVmm::Failed { kind: err.kind(), message }, &[]);
            exit(STATUS_NOT_BUILT);
        }
    }
}

/// A machine that only waits to run, and what its owner needs.
struct Started {
    machine: Machine,
    mailbox: Mailbox,
    snapshots: Snapshots,
    timeline: Recorder,
}

/// From the first packet to a machine that only waits to run. The order is that of trust: what needs privileges, the
/// walls, then what a hostile image or guest can reach.
fn start(channel: &Channel, mut timeline: Recorder) -> Result<Started, StartError> {
    let (config, fds) = channel.recv::<VmConfig>().map_err(|err| match err {
        ChannelError::Decode(_) => StartError::Foreign(err),
        _ => StartError::Receive(err),
    })?;
    report::start_log(&config.log_level);
    let spec = VmSpec::new(config, fds.len())?;
    let mut fds = Fds::new(fds);
    let config = spec.config();
    timeline.passed("configuration");
    let (ram, host) = map_memory(config, &mut fds)?;
    let plan = plan(config, &mut fds, &host)?;
    let (root, netns) = (fds.take(config.jail.root)?, fds.take(config.jail.netns)?);
    timeline.passed("map");
    jail::enter(&config.jail, root, netns)?;
    timeline.passed("jail");
    let (mail, mailbox) = Mailbox::new().map_err(StartError::Mailbox)?;
    let takers = Threads::start(host, mail.clone(), Arc::new(|| install(ThreadKind::Snapshot)));
    let takers = takers.map_err(StartError::Snapshots)?;
    let threads = thread_start(takers.first());
    let base = Base::new(config, &mut fds, ram.clone(), &threads)?;
    timeline.passed("vm");
    let origin = Origin::take(config, &mut fds)?;
    timeline.passed("origin");
    let watch = plan.start(ram, mail.clone(), Arc::new(|| install(ThreadKind::WorkingSet)));
    let watch = watch.map_err(StartError::WorkingSet)?;
    let mut machine = Machine::build(base, &spec, &mut fds, mail, &threads, origin.saved(), &mut timeline)?;
    if let Some(watch) = watch {
        machine.watch(watch);
    }
    let (vm, ram) = (Arc::clone(machine.vm()), machine.ram().clone());
    let snapshots = Snapshots::new(takers, vm, ram);
    drop(fds);
    seccomp::install(ThreadKind::Main)?;
    timeline.passed("wall");
    match origin {
        Origin::Boot(payload) => machine.boot(payload, &mut timeline)?,
        Origin::Restore(saved) => machine.restore(&saved, &mut timeline)?,
    }
    Ok(Started { machine, mailbox, snapshots, timeline })
}

/// Memory is mapped, and locked, while there are privileges; none of it is looked at. What snapshots will need of the host
/// is opened, too.
fn map_memory(config: &VmConfig, fds: &mut Fds) -> Result<(Ram, Host), StartError> {
    let mut host = Host {
        // A host that hides it makes snapshots larger work, not impossible.
        pagemap: File::open("/proc/self/pagemap").ok(),
        userfault: fds.take_optional(config.userfault)?,
        memory: None,
    };
    let ram = match &config.start {
        StartConfig::Boot(_) => Ram::map(config.memory)?,
        StartConfig::Restore(restore) => {
            let file = fds.take_file(restore.memory)?;
            let ram = Ram::restore(&file, config.memory, restore.mlock)?;
            host.memory = Some(Arc::new(file));
            ram
        }
    };
    Ok((ram, host))
}

/// What is to be read ahead and recorded of a restored machine's memory.
fn plan(config: &VmConfig, fds: &mut Fds, host: &Host) -> Result<Plan, StartError> {
    let StartConfig::Restore(restore) = &config.start else { return Ok(Plan::default()) };
    let prefetch = fds.take_optional(restore.working_set)?.map(Into::into);
    let record = fds.take_optional(restore.record_working_set)?.map(File::from);
    let map = host.pagemap.as_ref().map(File::try_clone).transpose().map_err(StartError::WorkingSet)?;
    Ok(Plan { prefetch, record: map.zip(record) })
}

/// Where the machine's state comes from.
enum Origin {
    Boot(Payload),
    Restore(Box<Saved>),
}

impl Origin {
    fn take(config: &VmConfig, fds: &mut Fds) -> Result<Self, StartError> {
        Ok(match &config.start {
            StartConfig::Boot(boot) => Self::Boot(Payload {
                kernel: fds.take_file(boot.kernel)?,
                initrd: fds.take_optional(boot.initrd)?.map(Into::into),
                cmdline: boot.cmdline.clone(),
            }),
            StartConfig::Restore(restore) => {
                Self::Restore(Box::new(Saved::read(&fds.take_file(restore.state)?, config)?))
            }
        })
    }

    fn saved(&self) -> Option<&Saved> {
        match self {
            Self::Boot(_) => None,
            Self::Restore(saved) => Some(saved),
        }
    }
}

/// What each new thread does first: it puts itself behind the filter of its kind.
fn thread_start(beside: impl Fn(Chore) + 'static) -> ThreadStart {
    let device = Spawner::new(|kind| {
        install(match kind {
            DeviceThread::Block => ThreadKind::Block,
            DeviceThread::ConsoleReader | DeviceThread::ConsoleWriter | DeviceThread::Device => ThreadKind::Console,
        });
    });
    ThreadStart { device, vcpu: Arc::new(|| install(ThreadKind::Vcpu)), beside: Box::new(beside) }
}

/// A thread without its filter must not live, and nobody is there to take its error.
fn install(kind: ThreadKind) {
    if let Err(err) = seccomp::install(kind) {
        tracing::error!("{}", report::chain(&err));
        exit(STATUS_NOT_BUILT);
    }
}
